//! OpenSSL verifies what soft keys sign, decrypts to them, and agrees with them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, path::Path, sync::LazyLock};

use proptest::prelude::*;
use strongroom::{
    devices::{
        DecryptScheme, DeriveScheme, DeviceError, Hash, Input, Operation, Scheme, Signature, operation::MAX_INPUT,
        verify::verify,
    },
    public_key::{Curve, PublicKey},
    rfc4251::Put,
};
use support::{
    command, run,
    soft::{Soft, digest, from_openssh_file, message, unhex},
    with_suffix,
};
use tempfile::TempDir;
use zeroize::Zeroizing;

const HASHES: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];
const MESSAGE: &[u8] = b"what is signed here";

/// OpenSSL's name of a hash.
fn name(hash: Hash) -> &'static str {
    match hash {
        Hash::Sha1 => "sha1",
        Hash::Sha256 => "sha256",
        Hash::Sha384 => "sha384",
        Hash::Sha512 => "sha512",
    }
}

/// OpenSSL with files in `dir`, which all names are relative to.
fn openssl(dir: &Path, arguments: &str) -> support::Outcome {
    run(command("openssl", dir).args(arguments.split_whitespace()))
}

fn openssl_digest(dir: &Path, hash: Hash, message: &[u8]) -> Vec<u8> {
    fs::write(dir.join("message"), message).unwrap();
    openssl(dir, &format!("dgst -{} -binary -out digest message", name(hash))).ok();
    fs::read(dir.join("digest")).unwrap()
}

/// Writes the public key in `NAME.pub` as OpenSSL reads it: `NAME.pem`.
fn to_pem(dir: &Path, name: &str) {
    let public = with_suffix(&dir.join(name), ".pub");
    let pem = run(command("ssh-keygen", dir).args(["-e", "-m", "PKCS8", "-f"]).arg(public)).ok();
    fs::write(dir.join(format!("{name}.pem")), pem).unwrap();
}

/// Writes a raw public key of the Edwards or Montgomery curve as OpenSSL reads it (RFC 8410): `NAME.pem`.
fn raw_to_pem(dir: &Path, name: &str, oid: u8, public: &[u8]) {
    let der = [&[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, oid, 0x03, 0x21, 0x00], public].concat();
    fs::write(dir.join("der"), der).unwrap();
    openssl(dir, &format!("pkey -pubin -inform DER -in der -pubout -out {name}.pem")).ok();
}
const ED25519: u8 = 0x70;
const X25519: u8 = 0x6e;

/// `r ‖ s` as OpenSSL reads it: an ECDSA-Sig-Value of RFC 3279.
fn ecdsa_der(fixed: &[u8]) -> Vec<u8> {
    let (r, s) = fixed.split_at(fixed.len() / 2);
    let mut both = Vec::new();
    for half in [r, s] {
        // An mpint has the contents of a DER INTEGER behind its four bytes of length.
        let mut integer = Vec::new();
        integer.put_mpint(half);
        both.extend_from_slice(&[2, u8::try_from(integer.len() - 4).unwrap()]);
        both.extend_from_slice(&integer[4..]);
    }
    let len = u8::try_from(both.len()).unwrap();
    let head: &[u8] = if len < 0x80 { &[0x30, len] } else { &[0x30, 0x81, len] };
    [head, &both].concat()
}

/// Checks that our own verification accepts a signature, and nothing else.
#[track_caller]
fn verifies(key: &Soft, scheme: Scheme, input: &Input<'_>, signature: &Signature) {
    assert!(verify(&key.blob, scheme, input, signature), "{scheme:?}");
    assert!(!verify(&key.blob, scheme, &message(b"something else"), signature), "{scheme:?}");
    let mut bytes = signature.as_bytes().to_vec();
    bytes[0] ^= 1;
    let key_type = key.key_type();
    let broken = Signature::from_bytes(scheme, key_type, bytes).unwrap();
    assert!(!verify(&key.blob, scheme, input, &broken), "{scheme:?}");
}

fn check_rsa(dir: &Path, name_of_key: &str, key: &Soft, schemes: &[Scheme]) {
    to_pem(dir, name_of_key);
    for &scheme in schemes {
        let (hash, options) = match scheme {
            Scheme::RsaPkcs1v15(hash) => (hash, ""),
            Scheme::RsaPss(hash) => (hash, "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest"),
            _ => {
                let signature = key.sign(scheme, message(MESSAGE)).unwrap();
                assert_eq!(key.sign(scheme, digest(MESSAGE)).unwrap(), signature);
                verifies(key, scheme, &message(MESSAGE), &signature);
                fs::write(dir.join("signature"), signature.as_bytes()).unwrap();
                let recover = "pkeyutl -verifyrecover -pubin -in signature -out found -pkeyopt rsa_padding_mode:pkcs1";
                openssl(dir, &format!("{recover} -inkey {name_of_key}.pem")).ok();
                assert_eq!(fs::read(dir.join("found")).unwrap(), MESSAGE);
                continue;
            }
        };
        let hashed = openssl_digest(dir, hash, MESSAGE);
        for input in [message(MESSAGE), digest(&hashed)] {
            let signature = key.sign(scheme, input.clone()).unwrap();
            verifies(key, scheme, &input, &signature);
            fs::write(dir.join("signature"), signature.as_bytes()).unwrap();
            let hash = name(hash);
            openssl(dir, &format!("dgst -{hash} -verify {name_of_key}.pem {options} -signature signature message"))
                .ok();
        }
    }
}

#[test]
fn openssl_verifies_rsa() {
    let dir = TempDir::new().unwrap();
    for bits in ["1024", "2048", "3071"] {
        let key = Soft::generate(dir.path(), bits, &["-t", "rsa", "-b", bits]);
        let fits = |scheme: &&Scheme| bits != "1024" || **scheme != Scheme::RsaPss(Hash::Sha512);
        let schemes: Vec<_> = key.key.schemes().iter().filter(fits).copied().collect();
        check_rsa(dir.path(), bits, &key, &schemes);
        if bits == "1024" {
            let refused = key.sign(Scheme::RsaPss(Hash::Sha512), message(MESSAGE));
            assert!(matches!(refused, Err(DeviceError::Unsupported(_))), "{refused:?}");
        }
    }
}

#[test]
fn the_longest_rsa_keys_work() {
    let dir = TempDir::new().unwrap();
    let key = Soft::convert(dir.path(), "long", &fixture("rsa16384"));
    let schemes = [Scheme::RsaPkcs1v15(Hash::Sha256), Scheme::RsaPkcs1v15Raw, Scheme::RsaPss(Hash::Sha512)];
    check_rsa(dir.path(), "long", &key, &schemes);
    check_decryption(dir.path(), "long", &key);
}

#[test]
fn openssl_verifies_ecdsa() {
    let dir = TempDir::new().unwrap();
    for bits in ["256", "384", "521"] {
        let key = Soft::generate(dir.path(), bits, &["-t", "ecdsa", "-b", bits]);
        to_pem(dir.path(), bits);
        assert_eq!(key.key.schemes().len(), 3);
        for &scheme in key.key.schemes() {
            let Scheme::Ecdsa(hash) = scheme else { panic!("{scheme:?}") };
            let hashed = openssl_digest(dir.path(), hash, MESSAGE);
            for input in [message(MESSAGE), digest(&hashed)] {
                let signature = key.sign(scheme, input.clone()).unwrap();
                verifies(&key, scheme, &input, &signature);
                fs::write(dir.path().join("signature"), ecdsa_der(signature.as_bytes())).unwrap();
                let hash = name(hash);
                openssl(dir.path(), &format!("dgst -{hash} -verify {bits}.pem -signature signature message")).ok();
            }
        }
    }
}

#[test]
fn openssl_verifies_ed25519_and_its_blinded_form() {
    let dir = TempDir::new().unwrap();
    let key = Soft::generate(dir.path(), "key", &["-t", "ed25519"]);
    let parameter = [7; 32];
    let input = [&parameter, MESSAGE].concat();
    let plain = key.sign(Scheme::Ed25519, message(MESSAGE)).unwrap();
    let blinded = key.sign(Scheme::Ed25519BlindedTor, message(&input)).unwrap();
    verifies(&key, Scheme::Ed25519, &message(MESSAGE), &plain);
    verifies(&key, Scheme::Ed25519BlindedTor, &message(&input), &blinded);
    let (blinded, blinded_key) = blinded.as_bytes().split_at(64);
    fs::write(dir.path().join("message"), MESSAGE).unwrap();
    for (public, signature) in [(&key.blob[key.blob.len() - 32..], plain.as_bytes()), (blinded_key, blinded)] {
        raw_to_pem(dir.path(), "public", ED25519, public);
        fs::write(dir.path().join("signature"), signature).unwrap();
        openssl(dir.path(), "pkeyutl -verify -pubin -inkey public.pem -rawin -in message -sigfile signature").ok();
    }
    for scheme in [Scheme::Ed25519, Scheme::Ed25519BlindedTor] {
        assert!(matches!(key.sign(scheme, digest(&[0; 64])), Err(DeviceError::Unsupported(_))));
    }
    assert!(matches!(key.sign(Scheme::Ed25519BlindedTor, message(&[0; 31])), Err(DeviceError::Unsupported(_))));
}

fn check_decryption(dir: &Path, name_of_key: &str, key: &Soft) {
    to_pem(dir, name_of_key);
    fs::write(dir.join("plaintext"), MESSAGE).unwrap();
    let encrypt = |options: &str| {
        let command =
            format!("pkeyutl -encrypt -pubin -inkey {name_of_key}.pem -in plaintext -out ciphertext {options}");
        openssl(dir, &command).ok();
        fs::read(dir.join("ciphertext")).unwrap()
    };
    for &scheme in key.key.decrypts() {
        let DecryptScheme::RsaOaep(hash) = scheme else {
            assert_eq!(**key.decrypt(scheme, b"", &encrypt("-pkeyopt rsa_padding_mode:pkcs1")).unwrap(), *MESSAGE);
            continue;
        };
        let hash = name(hash);
        let oaep = format!("-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:{hash} -pkeyopt rsa_mgf1_md:{hash}");
        assert_eq!(**key.decrypt(scheme, b"", &encrypt(&oaep)).unwrap(), *MESSAGE);
        let ciphertext = encrypt(&format!("{oaep} -pkeyopt rsa_oaep_label:6c6162656c"));
        assert_eq!(**key.decrypt(scheme, b"label", &ciphertext).unwrap(), *MESSAGE);
        for label in [&b""[..], b"other"] {
            assert!(matches!(key.decrypt(scheme, label, &ciphertext), Err(DeviceError::Unsupported(_))));
        }
    }
}

#[test]
fn what_openssl_encrypts_is_decrypted() {
    let dir = TempDir::new().unwrap();
    for bits in ["1024", "2048", "3071"] {
        let key = Soft::generate(dir.path(), bits, &["-t", "rsa", "-b", bits]);
        assert_eq!(key.key.decrypts().len(), 3);
        check_decryption(dir.path(), bits, &key);
    }
}

#[test]
fn bad_padding_gives_the_message_that_the_draft_says() {
    let dir = TempDir::new().unwrap();
    let key = Soft::convert(dir.path(), "key", &fixture("implicit_rejection_key"));
    let vectors = fs::read_to_string(fixture("implicit_rejection.txt")).unwrap();
    let vectors: Vec<Vec<_>> =
        vectors.lines().filter(|line| !line.starts_with('#')).map(|line| line.split(' ').collect()).collect();
    assert_eq!(vectors.len(), 10);
    for vector in vectors {
        let [what, ciphertext, expected] = vector[..] else { panic!("{vector:?}") };
        let found = key.decrypt(DecryptScheme::RsaPkcs1v15, b"", &unhex(ciphertext)).unwrap();
        let expected = if expected == "-" { Vec::new() } else { unhex(expected) };
        assert_eq!(**found, expected, "{what}");
    }
}

#[test]
fn a_ciphertext_that_is_none_is_refused_whatever_is_in_it() {
    let dir = TempDir::new().unwrap();
    let key = Soft::generate(dir.path(), "key", &["-t", "rsa", "-b", "1024"]);
    for scheme in key.key.decrypts() {
        for ciphertext in [&[][..], &[0; 127], &[0; 129], &[0xff; 128]] {
            let refused = key.decrypt(*scheme, b"", ciphertext).map(drop);
            assert!(matches!(refused, Err(DeviceError::Unsupported(_))), "{refused:?}");
        }
    }
    // Two is below every modulus, and what it decrypts to has no padding.
    assert!(key.decrypt(DecryptScheme::RsaPkcs1v15, b"", &two()).is_ok());
}

/// The public key in `NAME.pem`, which OpenSSL wrote: the last `len` bytes of its DER form.
fn peer(dir: &Path, name: &str, len: usize) -> Vec<u8> {
    openssl(dir, &format!("pkey -in {name} -pubout -outform DER -out der")).ok();
    let der = fs::read(dir.join("der")).unwrap();
    der[der.len() - len..].to_vec()
}

fn agrees(dir: &Path, key: &Soft, scheme: DeriveScheme, peer: &[u8]) {
    openssl(dir, "pkeyutl -derive -inkey peer -peerkey public.pem -out secret").ok();
    assert_eq!(**key.derive(scheme, peer).unwrap(), fs::read(dir.join("secret")).unwrap());
}

#[test]
fn openssl_agrees_on_ecdh() {
    let dir = TempDir::new().unwrap();
    for (bits, curve) in [("256", Curve::P256), ("384", Curve::P384), ("521", Curve::P521)] {
        let key = Soft::generate(dir.path(), bits, &["-t", "ecdsa", "-b", bits]);
        to_pem(dir.path(), bits);
        fs::rename(dir.path().join(format!("{bits}.pem")), dir.path().join("public.pem")).unwrap();
        openssl(dir.path(), &format!("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-{bits} -out peer")).ok();
        let good = peer(dir.path(), "peer", 1 + 2 * curve.scalar_len());
        assert_eq!(key.key.derives(), [DeriveScheme::Ecdh]);
        agrees(dir.path(), &key, DeriveScheme::Ecdh, &good);

        let mut off_the_curve = good.clone();
        *off_the_curve.last_mut().unwrap() ^= 1;
        let compressed = [&[2 + (good[good.len() - 1] & 1)], &good[1..=curve.scalar_len()]].concat();
        let not_below_the_prime = [&[4], &vec![0xff; 2 * curve.scalar_len()][..]].concat();
        let der = fs::read(dir.path().join("der")).unwrap();
        for bad in [off_the_curve, compressed, not_below_the_prime, der, vec![0], vec![0; good.len()], vec![]] {
            assert!(matches!(key.derive(DeriveScheme::Ecdh, &bad), Err(DeviceError::Unsupported(_))), "{bad:?}");
        }
        assert!(key.derive(DeriveScheme::X25519, &[9; 32]).is_err());
    }
}

#[test]
fn openssl_agrees_on_x25519() {
    let dir = TempDir::new().unwrap();
    openssl(dir.path(), "genpkey -algorithm X25519 -out own").ok();
    openssl(dir.path(), "genpkey -algorithm X25519 -out peer").ok();
    let public = peer(dir.path(), "own", 32);
    openssl(dir.path(), "pkey -in own -outform DER -out der").ok();
    let private = fs::read(dir.path().join("der")).unwrap();
    let mut fields = Vec::new();
    for field in [b"x25519@spec.torproject.org", &public[..], &private[private.len() - 32..], b"comment"] {
        fields.put_string(field);
    }
    let key = Soft::from_request(&fields);
    raw_to_pem(dir.path(), "public", X25519, &public);
    assert_eq!(key.key.derives(), [DeriveScheme::X25519]);
    agrees(dir.path(), &key, DeriveScheme::X25519, &peer(dir.path(), "peer", 32));
    // Points of small order would make the secret zero.
    let one = [&[1][..], &[0; 31]].concat();
    for bad in [&[0; 32][..], &one, &[9; 31], &[9; 33], &[]] {
        assert!(matches!(key.derive(DeriveScheme::X25519, bad), Err(DeviceError::Unsupported(_))), "{bad:?}");
    }
}

#[test]
fn a_digest_must_have_the_length_of_its_hash() {
    let dir = TempDir::new().unwrap();
    let rsa = Soft::generate(dir.path(), "rsa", &["-t", "rsa", "-b", "2048"]);
    let ecdsa = Soft::generate(dir.path(), "ecdsa", &["-t", "ecdsa"]);
    for key in [&rsa, &ecdsa] {
        for &scheme in key.key.schemes() {
            let (Scheme::RsaPkcs1v15(hash) | Scheme::RsaPss(hash) | Scheme::Ecdsa(hash)) = scheme else { continue };
            for len in [0, hash.digest_len() - 1, hash.digest_len() + 1] {
                let refused = key.sign(scheme, digest(&vec![1; len]));
                assert!(matches!(refused, Err(DeviceError::Unsupported(_))), "{scheme:?} {len}");
            }
        }
    }
    let raw = |len| rsa.sign(Scheme::RsaPkcs1v15Raw, message(&vec![1; len]));
    assert!(raw(0).is_ok() && raw(245).is_ok());
    assert_eq!(raw(246), Err(DeviceError::TooLong { max: 245 }));
}

#[test]
fn a_locked_key_does_nothing_and_afterwards_what_it_did() {
    let dir = TempDir::new().unwrap();
    let keys = one_of_each(dir.path());
    for key in &keys {
        let outcomes = || -> Vec<_> { every_operation(key).iter().map(|o| key.key.operate(o).map(drop)).collect() };
        let before = outcomes();
        key.key.seal(&mut |secret| Ok(secret.iter().map(|b| b ^ 0xff).collect())).unwrap();
        assert!(outcomes().iter().all(|outcome| *outcome == Err(DeviceError::Sealed)));
        key.key.unseal(&mut |sealed| Ok(Zeroizing::new(sealed.iter().map(|b| b ^ 0xff).collect()))).unwrap();
        assert_eq!(outcomes(), before);
        assert!(before.iter().any(Result::is_ok));
    }
}

/// The number two, as long as a modulus of 1,024 bits. (aws-lc refuses what decrypts to itself: zero, one, n - 1.)
fn two() -> Vec<u8> {
    [&[0; 127][..], &[2]].concat()
}

/// A valid request for everything that a key claims.
fn every_operation(key: &Soft) -> Vec<Operation<'static>> {
    // One's own public key is as good a peer as any.
    let peer = match PublicKey::parse(&key.blob).unwrap() {
        PublicKey::Ecdsa(_, point) | PublicKey::X25519(point) => point.to_vec(),
        _ => Vec::new(),
    };
    let sign = key.key.schemes().iter().map(|&scheme| Operation::Sign { scheme, input: message(&[1; 64]) });
    let decrypt = key.key.decrypts().iter().map(|&scheme| Operation::Decrypt {
        scheme,
        label: Vec::new().into(),
        ciphertext: two().into(),
    });
    let derive = key.key.derives().iter().map(|&scheme| Operation::Derive { scheme, peer: peer.clone().into() });
    sign.chain(decrypt).chain(derive).collect()
}

fn one_of_each(dir: &Path) -> Vec<Soft> {
    let mut keys: Vec<_> = [
        ("ed25519", &["-t", "ed25519"][..]),
        ("rsa", &["-t", "rsa", "-b", "1024"]),
        ("256", &["-t", "ecdsa", "-b", "256"]),
        ("384", &["-t", "ecdsa", "-b", "384"]),
        ("521", &["-t", "ecdsa", "-b", "521"]),
    ]
    .iter()
    .map(|(name, options)| Soft::generate(dir, name, options))
    .collect();
    for file in ["arti_ed25519_expanded", "arti_x25519"] {
        keys.push(from_openssh_file(Path::new(&fixture(file))));
    }
    keys
}

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/schemes/{name}", env!("CARGO_MANIFEST_DIR"))
}

static KEYS: LazyLock<Vec<Soft>> = LazyLock::new(|| one_of_each(TempDir::new().unwrap().path()));

fn any_hash() -> impl Strategy<Value = Hash> {
    prop::sample::select(&HASHES[..])
}

fn any_scheme() -> impl Strategy<Value = Scheme> {
    prop_oneof![
        any_hash().prop_map(Scheme::RsaPkcs1v15),
        any_hash().prop_map(Scheme::RsaPss),
        any_hash().prop_map(Scheme::Ecdsa),
        Just(Scheme::RsaPkcs1v15Raw),
        Just(Scheme::Ed25519),
        Just(Scheme::Ed25519BlindedTor),
        Just(Scheme::MlDsa44Ed25519),
        Just(Scheme::Sk),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_is_answered_or_refused(
        which in 0usize..7,
        scheme in any_scheme(),
        hash in any_hash(),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        hashed: bool,
        exact: bool,
    ) {
        let key = &KEYS[which];
        let input = || if hashed { digest(&bytes) } else { message(&bytes) };
        if let Ok(signature) = key.sign(scheme, input()) {
            prop_assert!(key.key.schemes().contains(&scheme));
            prop_assert!(verify(&key.blob, scheme, &input(), &signature));
        }
        let mut ciphertext = bytes.clone();
        if exact {
            ciphertext.resize(128, 0);
        }
        for scheme in [DecryptScheme::RsaPkcs1v15, DecryptScheme::RsaOaep(hash)] {
            let plaintext = key.decrypt(scheme, &bytes, &ciphertext);
            prop_assert!(plaintext.is_err() || key.key.decrypts().contains(&scheme));
        }
        for scheme in [DeriveScheme::Ecdh, DeriveScheme::X25519] {
            let secret = key.derive(scheme, &bytes);
            prop_assert!(secret.is_err() || key.key.derives().contains(&scheme));
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_signature(
        which in 0usize..7,
        scheme in any_scheme(),
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        len in prop::sample::select(&[64usize, 96, 128, 132][..]),
    ) {
        let key = &KEYS[which];
        for len in [len, bytes.len()] {
            let mut signature = bytes.clone();
            signature.resize(len, 0);
            for signature in [
                Signature::from_bytes(scheme, key.key_type(), signature.clone()).unwrap_or(Signature::Plain(signature.clone())),
                Signature::Sk(signature),
            ] {
                prop_assert!(!verify(&key.blob, scheme, &message(&bytes), &signature));
                prop_assert!(!verify(&bytes, scheme, &digest(&bytes), &signature));
            }
        }
    }
}

#[test]
fn the_longest_message_is_signed() {
    let longest = vec![1; MAX_INPUT];
    for key in KEYS.iter() {
        for &scheme in key.key.schemes().iter().filter(|scheme| **scheme != Scheme::RsaPkcs1v15Raw) {
            if key.key.decrypts().is_empty() || scheme != Scheme::RsaPss(Hash::Sha512) {
                assert!(verify(&key.blob, scheme, &message(&longest), &key.sign(scheme, message(&longest)).unwrap()));
            }
        }
    }
}
