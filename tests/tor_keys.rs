//! Tor's forms of Ed25519 and X25519 keys: the vectors of tor's own tests, files of arti's and tor's making, tor itself,
//! and the attack that our nonces of blinded keys stop.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Stdio,
};

use aws_lc_rs::digest::{SHA3_256, digest};
use curve25519_dalek::{EdwardsPoint, Scalar, scalar::clamp_integer};
use ed25519_dalek::{
    VerifyingKey,
    hazmat::{ExpandedSecretKey, raw_sign},
};
use sha2::{Digest as _, Sha512};
use strongroom::{
    devices::{
        DeriveScheme, Scheme,
        soft::ed25519::{ExpandedKey, blind, from_tor_file},
        verify::verify,
    },
    public_key::{KeyType, PublicKey},
    rfc4251::Put,
};
use support::{
    command,
    soft::{Soft, from_openssh_file, message, unhex},
};
use tempfile::TempDir;

/// From src/test/ed25519_vectors.inc of tor 0.4: seed, expanded key, public key, its signature of itself, blinding
/// parameter, blinded private key (its prefix is A.2's), blinded public key.
const VECTORS: [[&str; 7]; 5] = [
    [
        "26c76712d89d906e6672dafa614c42e5cb1caac8c6568e4d2493087db51f0d36",
        "c0a4de23cc64392d85aa1da82b3defddbea946d13bb053bf8489fa9296281f495022f1f7ec0dcf52f07d4c7965c4eaed121d5d88d0a8ff546b06116a20e97755",
        "c2247870536a192d142d056abefca68d6193158e7c1a59c1654c954eccaff894",
        "d23188eac3773a316d46006fa59c095060be8b1a23582a0dd99002a82a0662bd246d8449e172e04c5f46ac0d1404cebe4aabd8a75a1457aa06cae41f3334f104",
        "54a513898b471d1d448a2f3c55c1de2c0ef718c447b04497eeb999ed32027823",
        "293c3acff4e902f6f63ddc5d5caa2a57e771db4f24de65d4c28df3232f47fa01171d43f24e3f53e70ec7ac280044ac77d4942dee5d6807118a59bdf3ee647e89",
        "1fc1fa4465bd9d4956fdbdc9d3acb3c7019bb8d5606b951c2e1dfe0b42eaeb41",
    ],
    [
        "fba7a5366b5cb98c2667a18783f5cf8f4f8d1a2ce939ad22a6e685edde85128d",
        "18a8a69a06790dac778e882f7e868baacfa12521a5c058f5194f3a729184514a2a656fe7799c3e41f43d756da8d9cd47a061316cfe6147e23ea2f90d1ca45f30",
        "1519a3b15816a1aafab0b213892026ebf5c0dc232c58b21088d88cb90e9b940d",
        "3a785ac1201c97ee5f6f0d99323960d5f264c7825e61aa7cc81262f15bef75eb4fa5723add9b9d45b12311b6d403eb3ac79ff8e4e631fc3cd51e4ad2185b200b",
        "831e9b5325b5d31b7ae6197e9c7a7baf2ec361e08248bce055908971047a2347",
        "38b88f9f9440358da544504ee152fb475528f7c51c285bd1c68b14ade8e29a07b8ceff20dfcf53eb52b891fc078c934efbf0353af7242e7dc51bb32a093afa29",
        "1cbbd4a88ce8f165447f159d9f628ada18674158c4f7c5ead44ce8eb0fa6eb7e",
    ],
    [
        "c6bbcce615839756aed2cc78b1de13884dd3618f48367a17597a16c1cd7a290b",
        "b003077c1e52a62308eef7950b2d532e1d4a7eea50ad22d8ac11b892851f1c40ffb9c9ff8dcd0c6c233f665a2e176324d92416bfcfcd1f787424c0c667452d86",
        "95126f14d86494020665face03f2d42ee2b312a85bc729903eb17522954a1c4a",
        "815213640a643d198bd056e02bba74e1c8d2d931643e84497adf3347eb485079c9afe0afce9284cdc084946b561abbb214f1304ca11228ff82702185cf28f60d",
        "3f44f6a5a92cde816635dfc12ade70539871078d2ff097278be2a555c9859cd0",
        "288cbfd923cb286d48c084555b5bdd06c05e92fb81acdb45271367f57515380e053d9c00c81e1331c06ab50087be8cfc7dc11691b132614474f1aa9c2503cccd",
        "0eefdc795b59cabbc194c6174e34ba9451e8355108520554ec285acabebb34ac",
    ],
    [
        "c6bbcce615839756aed2cc78b1de13884dd3618f48367a17597a16c1cd7a290b",
        "b003077c1e52a62308eef7950b2d532e1d4a7eea50ad22d8ac11b892851f1c40ffb9c9ff8dcd0c6c233f665a2e176324d92416bfcfcd1f787424c0c667452d86",
        "95126f14d86494020665face03f2d42ee2b312a85bc729903eb17522954a1c4a",
        "815213640a643d198bd056e02bba74e1c8d2d931643e84497adf3347eb485079c9afe0afce9284cdc084946b561abbb214f1304ca11228ff82702185cf28f60d",
        "0000000000000000000000000000000000000000000000000000000000000000",
        "e5cd03eb4cc456e11bc36724b558873df0045729b22d8b748360067a7770ac02053d9c00c81e1331c06ab50087be8cfc7dc11691b132614474f1aa9c2503cccd",
        "312404d06a0a9de489904b18d5233e83a50b225977fa8734f2c897a73c067952",
    ],
    [
        "c6bbcce615839756aed2cc78b1de13884dd3618f48367a17597a16c1cd7a290b",
        "b003077c1e52a62308eef7950b2d532e1d4a7eea50ad22d8ac11b892851f1c40ffb9c9ff8dcd0c6c233f665a2e176324d92416bfcfcd1f787424c0c667452d86",
        "95126f14d86494020665face03f2d42ee2b312a85bc729903eb17522954a1c4a",
        "815213640a643d198bd056e02bba74e1c8d2d931643e84497adf3347eb485079c9afe0afce9284cdc084946b561abbb214f1304ca11228ff82702185cf28f60d",
        "1111111111111111111111111111111111111111111111111111111111111111",
        "2cf7ed8b163f5af960d2fc62e1883aa422a6090736b4f18a5456ddcaf78ede0c053d9c00c81e1331c06ab50087be8cfc7dc11691b132614474f1aa9c2503cccd",
        "952a908a4a9e0e5176a2549f8f328955aca6817a9fdc59e3acec5dec50838108",
    ],
];

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap()
}

fn soft(name: &[u8], public: &[u8], private: &[u8]) -> Soft {
    let mut fields = Vec::new();
    for field in [name, public, private, b"comment"] {
        fields.put_string(field);
    }
    Soft::from_request(&fields)
}

fn expanded(secret: &[u8], public: &[u8]) -> Soft {
    soft(b"ed25519-expanded@spec.torproject.org", public, secret)
}

#[test]
fn expanded_keys_are_those_of_tors_vectors() {
    for vector in VECTORS {
        let [seed, secret, public, signature, ..] = vector.map(unhex);
        let from_seed = ExpandedKey::from_seed(&seed).unwrap();
        assert_eq!((from_seed.to_bytes(), &from_seed.public()[..]), (&secret[..], &public[..]));

        let key = expanded(&secret, &public);
        assert_eq!(key.blob, PublicKey::Ed25519(&public).to_blob());
        let made = key.sign(Scheme::Ed25519, message(&public)).unwrap();
        assert_eq!(made.as_bytes(), signature);
        assert!(verify(&key.blob, Scheme::Ed25519, &message(&public), &made));
        assert_eq!(made, key.key.sign(Scheme::Ed25519, &public).unwrap());
    }
}

#[test]
fn blinded_keys_are_those_of_tors_vectors() {
    for vector in VECTORS {
        let [seed, secret, public, _, parameter, blinded_secret, blinded] = vector.map(unhex);
        assert_eq!(blind(&array(&public), &array(&parameter)).unwrap(), *blinded);
        let theirs = ExpandedKey::new(&array(&blinded_secret)).unwrap();
        assert_eq!(theirs.public()[..], blinded);
        // Tor would sign so, and the attack below is on what it would sign.
        let as_tor = sign_as_the_specification(&secret, &array(&parameter), b"a descriptor");
        assert_eq!(as_tor[..64], theirs.sign(b"a descriptor"));

        let input = [&parameter[..], b"a descriptor"].concat();
        let from_seed = soft(b"ssh-ed25519", &public, &[&seed[..], &public].concat());
        for key in [expanded(&secret, &public), from_seed] {
            let signature = key.sign(Scheme::Ed25519BlindedTor, message(&input)).unwrap();
            assert_eq!(signature.as_bytes()[64..], blinded);
            assert!(verify(&key.blob, Scheme::Ed25519BlindedTor, &message(&input), &signature));
            // Under another parameter the same signature is none.
            let other = [&[3; 32][..], b"a descriptor"].concat();
            assert!(!verify(&key.blob, Scheme::Ed25519BlindedTor, &message(&other), &signature));
        }
    }
}

/// Signs as rend-spec-v3 has it, A.2: the nonce prefix of the blinded key is a hash of the key's prefix alone.
fn sign_as_the_specification(secret: &[u8], parameter: &[u8; 32], message: &[u8]) -> [u8; 96] {
    let (scalar, prefix) = secret.split_at(32);
    let scalar = Scalar::from_bytes_mod_order(array(scalar)) * factor(parameter);
    let prefix = Sha512::new().chain_update("Derive temporary signing key hash input").chain_update(prefix).finalize();
    let key = ExpandedSecretKey { scalar, hash_prefix: array(&prefix[..32]) };
    let public = VerifyingKey::from(&key);
    array(&[&raw_sign::<Sha512>(&key, message, &public).to_bytes()[..], public.as_bytes()].concat())
}

fn factor(parameter: &[u8; 32]) -> Scalar {
    Scalar::from_bytes_mod_order(clamp_integer(*parameter))
}

/// What anybody computes of two signatures of one message under two parameters: the scalar, if the nonce was the same.
/// S = r + k·h·a, so a = (S₁ − S₂) / (k₁·h₁ − k₂·h₂).
fn recover(message: &[u8], signatures: [([u8; 32], [u8; 96]); 2]) -> Scalar {
    let [first, second] = signatures.map(|(parameter, signature)| {
        let (nonce, rest) = signature.split_at(32);
        let (s, public) = rest.split_at(32);
        let challenge = Sha512::new().chain_update(nonce).chain_update(public).chain_update(message).finalize();
        let challenge = Scalar::from_bytes_mod_order_wide(&challenge.into());
        (Scalar::from_bytes_mod_order(array(s)), challenge * factor(&parameter))
    });
    (first.0 - second.0) * (first.1 - second.1).invert()
}

#[test]
fn two_parameters_for_one_message_do_not_give_the_key_away() {
    let [_, secret, public, ..] = VECTORS[0].map(unhex);
    let message_signed = b"one message, two time periods";
    let attack = |sign: &dyn Fn(&[u8; 32]) -> [u8; 96]| {
        let signatures = [[1; 32], [2; 32]].map(|parameter| (parameter, sign(&parameter)));
        EdwardsPoint::mul_base(&recover(message_signed, signatures)).compress().to_bytes()
    };
    // The attack is a real one.
    assert_eq!(attack(&|parameter| sign_as_the_specification(&secret, parameter, message_signed)), *public);

    let key = expanded(&secret, &public);
    let ours = |parameter: &[u8; 32]| {
        let input = [&parameter[..], message_signed].concat();
        let signature = key.sign(Scheme::Ed25519BlindedTor, message(&input)).unwrap();
        assert!(verify(&key.blob, Scheme::Ed25519BlindedTor, &message(&input), &signature));
        array(signature.as_bytes())
    };
    assert_ne!(attack(&ours), *public);
    assert_ne!(ours(&[1; 32])[..32], ours(&[2; 32])[..32]);
    // Nor is the nonce that of an unblinded signature.
    assert_ne!(ours(&[1; 32])[..32], key.sign(Scheme::Ed25519, message(message_signed)).unwrap().as_bytes()[..32]);
}

#[test]
fn keys_in_artis_files_are_read() {
    let fixture = |name| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/schemes").join(name);
    let key = from_openssh_file(&fixture("arti_ed25519_expanded"));
    assert_eq!(key.key_type(), KeyType::Ed25519);
    let signature = key.sign(Scheme::Ed25519, message(b"message")).unwrap();
    assert!(verify(&key.blob, Scheme::Ed25519, &message(b"message"), &signature));

    let key = from_openssh_file(&fixture("arti_x25519"));
    assert_eq!(key.key_type(), KeyType::X25519);
    assert!(!key.key_type().is_ssh());
    // RFC 7748, section 6.1: what everybody derives with the base point is the public key.
    let base = [&[9][..], &[0; 31]].concat();
    assert_eq!(**key.derive(DeriveScheme::X25519, &base).unwrap(), key.blob[key.blob.len() - 32..]);
    assert!(key.key.sign(Scheme::Ed25519, b"message").is_err());
}

/// The name of an onion service (rend-spec-v3, section 6).
fn onion(public: &[u8]) -> String {
    let checksum = digest(&SHA3_256, &[b".onion checksum", public, &[3]].concat());
    let bytes = [public, &checksum.as_ref()[..2], &[3]].concat();
    let bit = |n: usize| usize::from(bytes[n / 8] >> (7 - n % 8) & 1);
    let digit = |at: usize| (0..5).fold(0, |digit, n| digit << 1 | bit(at * 5 + n));
    let name: String =
        (0..bytes.len() * 8 / 5).map(|at| char::from(b"abcdefghijklmnopqrstuvwxyz234567"[digit(at)])).collect();
    name + ".onion"
}

/// Lets tor load the onion service in `dir/service`, or make it, and returns its name.
fn start_tor(dir: &Path) -> String {
    let service = dir.join("service");
    fs::create_dir_all(&service).unwrap();
    fs::set_permissions(&service, fs::Permissions::from_mode(0o700)).unwrap();
    let configuration = format!(
        "DataDirectory {0}/data\nHiddenServiceDir {0}/service\nHiddenServicePort 80\nSocksPort 0\nDisableNetwork 1\n\
         Log notice stdout\n",
        dir.display()
    );
    fs::write(dir.join("torrc"), configuration).unwrap();
    let mut tor = command("tor", dir)
        .args(["--defaults-torrc", "none", "-f", "torrc"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("tor starts");
    let mut log = String::new();
    // It has loaded its keys when it begins to reach for a network, which it may not.
    let ready = BufReader::new(tor.stdout.take().unwrap()).lines().map_while(Result::ok).any(|line| {
        log += &(line.clone() + "\n");
        line.contains("Bootstrapped 0%")
    });
    // SIGTERM to `timeout`, which hands it on.
    let pid = rustix::process::Pid::from_child(&tor);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    tor.wait().unwrap();
    assert!(ready, "{log}");
    fs::read_to_string(service.join("hostname")).unwrap().trim().to_owned()
}

#[test]
fn tor_and_we_read_each_others_files() {
    let dir = TempDir::new().unwrap();
    // Tor makes a key.
    let name = start_tor(&dir.path().join("theirs"));
    let file = fs::read(dir.path().join("theirs/service/hs_ed25519_secret_key")).unwrap();
    let key = ExpandedKey::new(from_tor_file(&file).unwrap()).unwrap();
    assert_eq!(onion(key.public()), name);
    let public = fs::read(dir.path().join("theirs/service/hs_ed25519_public_key")).unwrap();
    assert_eq!(public[32..], *key.public());
    assert!(from_tor_file(&file[..95]).is_none() && from_tor_file(&public).is_none());

    // Tor takes a key of ours.
    let key = ExpandedKey::from_seed(&[42; 32]).unwrap();
    fs::create_dir_all(dir.path().join("ours/service")).unwrap();
    let file = [b"== ed25519v1-secret: type0 ==\0\0\0", key.to_bytes()].concat();
    fs::write(dir.path().join("ours/service/hs_ed25519_secret_key"), file).unwrap();
    assert_eq!(start_tor(&dir.path().join("ours")), onion(key.public()));
    let public = fs::read(dir.path().join("ours/service/hs_ed25519_public_key")).unwrap();
    assert_eq!(public[32..], *key.public());
}

#[test]
fn a_public_half_that_is_not_the_private_ones_is_refused() {
    use strongroom::devices::soft::{SoftKey, SoftParts};
    let [_, secret, public, ..] = VECTORS[0].map(unhex);
    for (secret, public) in [(&secret[..], &[1; 32][..]), (&secret[..63], &public), (&[0; 64], &public), (&[], &[])] {
        assert!(SoftKey::new(&SoftParts::Ed25519Expanded { secret, public }).is_err());
        assert!(SoftKey::new(&SoftParts::X25519 { secret, public }).is_err());
    }
    // The scalar zero has the neutral element for a public key.
    let neutral = [&[1][..], &[0; 31]].concat();
    assert!(SoftKey::new(&SoftParts::Ed25519Expanded { secret: &[0; 64], public: &neutral }).is_err());
}
