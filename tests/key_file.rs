//! Private keys in files of other programs' making: OpenSSH, OpenSSL, PuTTY, GnuPG, tor. Each is read, and signs under the
//! public key that its own program gives it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, io::Write, os::unix::fs::PermissionsExt, path::Path, process::Stdio};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64ct::{Base64, Encoding};
use fips204::{
    ml_dsa_44,
    traits::{KeyGen, SerDes},
};
use secrecy::SecretString;
use sha2::{Digest as _, Sha256, Sha512};
use strongroom::{
    devices::{DeriveScheme, Hash, Input, Operation, Scheme, verify::verify},
    key_file::{KeyFile, KeyFileError, MAX_FILE, WriteError},
    public_key::{KeyType, PublicKey},
    rfc4251::Put,
    spki,
};
use support::{
    Outcome, command,
    gpg::Home as Gpg,
    keygen, run,
    soft::{Soft, message, unhex},
};
use tempfile::TempDir;
use zeroize::Zeroizing;

const PASSPHRASE: &str = "correct horse: battery staple ü";

fn passphrase(text: &str) -> SecretString {
    text.into()
}

/// A directory with the passphrase in a file.
fn directory() -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("passphrase"), PASSPHRASE).unwrap();
    dir
}

fn tool(dir: &Path, line: &str) -> Outcome {
    let mut words = line.split_whitespace();
    run(command(words.next().unwrap(), dir).args(words))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[track_caller]
fn refused(bytes: &[u8], given: Option<&str>) -> KeyFileError {
    KeyFile::read(bytes, given.map(passphrase).as_ref()).err().expect("it is refused")
}

/// Reads a file that is not encrypted, and checks that the key can be added, and that it signs.
#[track_caller]
fn works(file: &KeyFile) -> Soft {
    let mut request = file.fields().to_vec();
    request.put_string(file.comment().as_bytes());
    let soft = Soft::from_request(&request);
    assert_eq!(soft.blob, file.blob());
    let scheme = match soft.key_type() {
        KeyType::X25519 => return soft,
        KeyType::Rsa => Scheme::RsaPkcs1v15Raw,
        KeyType::Ecdsa(_) | KeyType::MlDsa44Ed25519 => soft.key.schemes()[0],
        _ => Scheme::Ed25519,
    };
    let signature = soft.sign(scheme, message(b"message")).unwrap();
    assert!(verify(file.blob(), scheme, &message(b"message"), &signature));
    soft
}

#[track_caller]
fn plain(bytes: &[u8]) -> KeyFile {
    let file = KeyFile::read(bytes, None).unwrap();
    works(&file);
    file
}

/// Reads an encrypted file: not without its passphrase, nor with another.
#[track_caller]
fn encrypted(bytes: &[u8]) -> KeyFile {
    assert_eq!(refused(bytes, None), KeyFileError::PassphraseNeeded);
    assert_eq!(refused(bytes, Some("another")), KeyFileError::WrongPassphrase);
    assert_eq!(refused(bytes, Some("")), KeyFileError::WrongPassphrase);
    let file = KeyFile::read(bytes, Some(&passphrase(PASSPHRASE))).unwrap();
    works(&file);
    file
}

/// The blob in a line of an authorized_keys file.
fn blob(line: &str) -> Vec<u8> {
    Base64::decode_vec(line.split_whitespace().nth(1).unwrap()).unwrap()
}

const TYPES: [(&str, &str); 5] =
    [("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521"), ("rsa", "2048")];

#[test]
fn what_ssh_keygen_writes() {
    let dir = directory();
    let dir = dir.path();
    for (n, (key_type, bits)) in TYPES.into_iter().enumerate() {
        let path = keygen(dir, &format!("key{n}"), &["-t", key_type, "-b", bits, "-C", "a comment"]);
        let public = blob(&fs::read_to_string(path.with_extension("pub")).unwrap());
        let file = plain(&fs::read(&path).unwrap());
        assert_eq!((file.blob(), file.comment()), (&public[..], "a comment"));
        // Encrypted, with each of the ciphers that OpenSSH has for it.
        for cipher in [
            "aes256-ctr",
            "aes128-ctr",
            "aes192-ctr",
            "aes256-cbc",
            "aes128-cbc",
            "aes256-gcm@openssh.com",
            "aes128-gcm@openssh.com",
            "chacha20-poly1305@openssh.com",
        ] {
            if n > 0 && cipher != "aes256-ctr" {
                continue;
            }
            let copy = dir.join("copy");
            fs::copy(&path, &copy).unwrap();
            let change = ["-q", "-p", "-a", "1", "-P", "", "-N", PASSPHRASE, "-Z", cipher, "-f"];
            run(command("ssh-keygen", dir).args(change).arg(&copy)).ok();
            let bytes = fs::read(&copy).unwrap();
            let file = encrypted(&bytes);
            assert_eq!((file.blob(), file.comment()), (&public[..], "a comment"), "{cipher}");
        }
        // In the older format, and in PKCS#8, which has no comment.
        for format in ["PEM", "PKCS8"] {
            if key_type == "ed25519" {
                continue;
            }
            for new in ["", PASSPHRASE] {
                let copy = dir.join("copy");
                fs::copy(&path, &copy).unwrap();
                run(command("ssh-keygen", dir).args(["-q", "-p", "-P", "", "-N", new, "-m", format, "-f"]).arg(&copy))
                    .ok();
                let bytes = fs::read(&copy).unwrap();
                let file = if new.is_empty() { plain(&bytes) } else { encrypted(&bytes) };
                assert_eq!(file.blob(), public, "{key_type} {format}");
            }
        }
    }
}

#[test]
fn what_arti_writes() {
    let expanded = plain(include_bytes!("fixtures/schemes/arti_ed25519_expanded"));
    assert_eq!(works(&expanded).key.schemes(), [Scheme::Ed25519, Scheme::Ed25519BlindedTor]);
    assert!(expanded.fields()[4..].starts_with(KeyType::Ed25519Expanded.name().as_bytes()));
    let x25519 = works(&plain(include_bytes!("fixtures/schemes/arti_x25519")));
    assert_eq!(x25519.key_type(), KeyType::X25519);
}

/// OpenSSL's keys, each in the forms that it can write: the same key comes out of every one of them.
#[test]
fn what_openssl_writes() {
    let dir = directory();
    let dir = dir.path();
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    let algorithms = [
        "RSA -pkeyopt rsa_keygen_bits:2048",
        "RSA -pkeyopt rsa_keygen_bits:1024",
        "EC -pkeyopt ec_paramgen_curve:P-256",
        "EC -pkeyopt ec_paramgen_curve:P-384",
        "EC -pkeyopt ec_paramgen_curve:P-521",
        "ED25519",
        "X25519",
    ];
    for algorithm in algorithms {
        tool(dir, &format!("openssl genpkey -algorithm {algorithm} -out key.pem")).ok();
        let key = plain(&read("key.pem"));
        let same = |file: KeyFile, how: &str| assert_eq!(file.blob(), key.blob(), "{algorithm} {how}");
        tool(dir, "openssl pkey -in key.pem -outform DER -out key.der").ok();
        same(plain(&read("key.der")), "DER");
        for how in [
            "-v2 aes256",
            "-v2 aes128 -v2prf hmacWithSHA512",
            "-v2 des3 -v2prf hmacWithSHA1",
            "-scrypt",
            "-v1 PBE-SHA1-3DES",
        ] {
            tool(dir, &format!("openssl pkcs8 -topk8 -in key.pem -passout file:passphrase {how} -out encrypted.pem"))
                .ok();
            same(encrypted(&read("encrypted.pem")), how);
            tool(dir, "openssl asn1parse -in encrypted.pem -noout -out encrypted.der").ok();
            same(encrypted(&read("encrypted.der")), how);
        }
        if algorithm.contains("25519") {
            continue;
        }
        for how in ["", "-aes128", "-aes256", "-des3"] {
            let out = if how.is_empty() { "" } else { "-passout file:passphrase" };
            tool(dir, &format!("openssl pkey -in key.pem -traditional {how} {out} -out old.pem")).ok();
            let bytes = read("old.pem");
            assert!(!String::from_utf8_lossy(&bytes).contains("BEGIN PRIVATE"), "{algorithm} {how}");
            same(if how.is_empty() { plain(&bytes) } else { encrypted(&bytes) }, how);
        }
        tool(dir, "openssl pkey -in key.pem -traditional -outform DER -out old.der").ok();
        same(plain(&read("old.der")), "old DER");
    }
}

#[test]
fn parameters_before_the_key_are_passed_over() {
    let dir = directory();
    tool(dir.path(), "openssl ecparam -name prime256v1 -genkey -out key.pem").ok();
    let bytes = fs::read(dir.path().join("key.pem")).unwrap();
    assert!(bytes.starts_with(b"-----BEGIN EC PARAMETERS-----"));
    plain(&bytes);
}

#[test]
fn what_puttygen_writes() {
    let dir = directory();
    let dir = dir.path();
    fs::write(dir.join("empty"), "").unwrap();
    for (n, (key_type, bits)) in TYPES.into_iter().enumerate() {
        let path = keygen(dir, &format!("key{n}"), &["-t", key_type, "-b", bits, "-C", "a comment"]);
        let public = blob(&fs::read_to_string(path.with_extension("pub")).unwrap());
        for parameters in
            ["version=2", "version=3,kdf=argon2id,memory=256,passes=2", "version=3,kdf=argon2d,memory=256,passes=1"]
        {
            for passphrase in ["empty", "passphrase"] {
                let out = format!("--ppk-param {parameters} --new-passphrase {passphrase} -O private -o key.ppk");
                tool(dir, &format!("puttygen key{n} {out}")).ok();
                let bytes = fs::read(dir.join("key.ppk")).unwrap();
                let file = if passphrase == "empty" { plain(&bytes) } else { encrypted(&bytes) };
                assert_eq!((file.blob(), file.comment()), (&public[..], "a comment"), "{key_type} {parameters}");
            }
        }
    }
}

/// PuTTY leaves out the zeros at the end of an Ed25519 key.
#[test]
fn a_short_number_of_puttygen() {
    let dir = directory();
    let dir = dir.path();
    let seed = [&[7; 30][..], &[0; 2]].concat();
    let der = [&[0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20][..], &seed].concat();
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", Base64::encode_string(&der));
    let ours = plain(pem.as_bytes());
    let path = dir.join("key");
    fs::write(&path, openssh(&seed, ours.blob())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    tool(dir, "puttygen key -O private -o key.ppk").ok();
    assert_eq!(plain(&fs::read(dir.join("key.ppk")).unwrap()).blob(), ours.blob());
}

/// OpenSSH's file of an Ed25519 key.
fn openssh(seed: &[u8], blob: &[u8]) -> String {
    let public = &blob[blob.len() - 32..];
    let mut private = vec![0; 8];
    private.put_string(b"ssh-ed25519");
    private.put_string(public);
    private.put_string(&[seed, public].concat());
    private.put_string(b"");
    private.extend((1..).take(private.len().next_multiple_of(8) - private.len()));
    let mut file = b"openssh-key-v1\0".to_vec();
    [&b"none"[..], b"none", b""].into_iter().for_each(|part| file.put_string(part));
    file.put_u32(1);
    file.put_string(blob);
    file.put_string(&private);
    let base64 = Base64::encode_string(&file);
    let lines: Vec<_> = base64.as_bytes().chunks(70).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n", lines.join("\n"))
}

/// What directory authorities have: tor-gencert encrypts the identity key in a way of its own.
#[test]
fn what_tor_writes() {
    let dir = directory();
    let dir = dir.path();
    let mut gencert = command("tor-gencert", dir)
        .args(["--create-identity-key", "-s", "signing", "-i", "identity", "-c", "certificate", "-m", "1"])
        .args(["--passphrase-fd", "0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    gencert.stdin.take().unwrap().write_all(format!("{PASSPHRASE}\n").as_bytes()).unwrap();
    assert!(gencert.wait().unwrap().success());
    let identity = encrypted(&fs::read(dir.join("identity")).unwrap());
    let signing = plain(&fs::read(dir.join("signing")).unwrap());
    let certificate = fs::read_to_string(dir.join("certificate")).unwrap();
    for (key, name) in [(&identity, "dir-identity-key"), (&signing, "dir-signing-key")] {
        let pem: String =
            certificate.split_once(name).unwrap().1.split_inclusive("-----END RSA PUBLIC KEY-----").take(1).collect();
        fs::write(dir.join("public.pem"), pem.trim_start()).unwrap();
        let spki = tool(dir, "openssl rsa -RSAPublicKey_in -in public.pem -pubout").ok();
        fs::write(dir.join("spki.pem"), spki).unwrap();
        let public = run(command("ssh-keygen", dir).args(["-i", "-m", "PKCS8", "-f", "spki.pem"])).ok();
        assert_eq!(key.blob(), blob(&public), "{name}");
    }
}

/// What tor has written, of an encrypted master key.
fn tor_master_key(dir: &Path) -> (Vec<u8>, Vec<u8>) {
    let file = fs::File::open(dir.join("passphrase")).unwrap();
    let options = "--keygen --ignore-missing-torrc -f /dev/null --defaults-torrc /dev/null --passphrase-fd 0";
    run(command("tor", dir).args(options.split(' ')).arg("--DataDirectory").arg(dir.join("tor")).stdin(file)).ok();
    let read = |name: &str| fs::read(dir.join("tor/keys").join(name)).unwrap();
    (read("ed25519_master_id_secret_key_encrypted"), read("ed25519_master_id_public_key"))
}

#[test]
fn master_keys_that_tor_encrypts() {
    let dir = directory();
    let (secret, public) = tor_master_key(dir.path());
    let file = encrypted(&secret);
    assert_eq!(file.blob(), PublicKey::Ed25519(&public[32..]).to_blob());
    assert_eq!(works(&file).key_type(), KeyType::Ed25519);
    // What is authenticated is all of it.
    let mut changed = secret;
    let last = changed.len() - 40;
    changed[last] ^= 1;
    assert_eq!(refused(&changed, Some(PASSPHRASE)), KeyFileError::WrongPassphrase);
}

/// A tor that has libscrypt writes scrypt; its format has PBKDF2, too. OpenSSL makes both here.
#[test]
fn tors_other_ways_of_encryption() {
    let dir = directory();
    let dir = dir.path();
    let seed = [7; 32];
    let expanded: [u8; 64] = Sha512::digest(seed).into();
    let mut plain = 64u32.to_be_bytes().to_vec();
    plain.extend_from_slice(&expanded);
    plain[4] &= 248;
    plain[35] = plain[35] & 63 | 64;
    fs::write(dir.join("plain"), &plain).unwrap();
    let salt = "000102030405060708090a0b0c0d0e0f";
    let pass = format!("hexpass:{}", hex(PASSPHRASE.as_bytes()));
    let ways = [
        (vec![2, 12, 0x31], "SCRYPT", vec!["n:4096", "r:8", "p:2"]),
        (vec![1, 10], "PBKDF2", vec!["digest:SHA1", "iter:1024"]),
    ];
    for (how, name, parameters) in ways {
        let mut kdf = command("openssl", dir);
        let salt_option = format!("hexsalt:{salt}");
        kdf.args(["kdf", "-binary", "-keylen", "48", "-out", "keys"]);
        for option in parameters.iter().copied().chain([&*pass, &*salt_option]) {
            kdf.args(["-kdfopt", option]);
        }
        run(kdf.arg(name)).ok();
        let keys = fs::read(dir.join("keys")).unwrap();
        let (key, mac) = keys.split_at(16);
        tool(dir, &format!("openssl enc -aes-128-ctr -K {} -iv {salt} -in plain -out sealed", hex(key))).ok();
        let mut boxed = b"TORBOX00".to_vec();
        boxed.push(how.len() as u8 + 16);
        boxed.push(how[0]);
        boxed.extend(unhex(salt));
        boxed.extend_from_slice(&how[1..]);
        boxed.extend(unhex(salt));
        boxed.extend(fs::read(dir.join("sealed")).unwrap());
        fs::write(dir.join("boxed"), &boxed).unwrap();
        tool(dir, &format!("openssl dgst -sha256 -mac HMAC -macopt hexkey:{} -binary -out tag boxed", hex(mac))).ok();
        let tag = fs::read(dir.join("tag")).unwrap();
        let file = [b"== Boxed Ed25519 key: master ==\0", &boxed[..], &tag].concat();
        let public = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
        let expected = PublicKey::Ed25519(public.public_key().as_ref()).to_blob();
        assert_eq!(encrypted(&file).blob(), expected, "{name}");
    }
}

/// Every key that gpg makes and we have: the primary ones, which certify, and subkeys that sign, decrypt or authenticate.
#[test]
fn what_gpg_writes() {
    let gpg = Gpg::new();
    let of_25519 = "ed25519 ed25519/sign cv25519/encrypt ed25519/auth";
    let of_rsa = "rsa2048/cert rsa2048/encrypt";
    let of_nist = ["nistp256", "nistp384", "nistp521"].map(|curve| format!("{curve} {curve}/encrypt"));
    let [p256, p384, p521] = &of_nist;
    for (name, keys) in [("twisted", of_25519), ("rsa", of_rsa), ("p256", p256), ("p384", p384), ("p521", p521)] {
        for protection in ["", PASSPHRASE] {
            let user_id = format!("{name} {} <a@example.org>", protection.len());
            let fingerprint = gpg.generate(&user_id, keys, protection);
            let bytes = gpg.export(&fingerprint, protection);
            let armoured = gpg.run(protection, &["--armor", "--export-secret-keys", &fingerprint]).ok();
            assert!(armoured.starts_with("-----BEGIN PGP PRIVATE KEY BLOCK-----"));
            // The public numbers as gpg has them, in the order of the file.
            let public = gpg.colons(&fingerprint, "pkd");
            for bytes in [&bytes[..], armoured.as_bytes()] {
                let given = (!protection.is_empty()).then(|| passphrase(protection));
                if given.is_some() {
                    assert_eq!(KeyFile::read_all(bytes, None).err(), Some(KeyFileError::PassphraseNeeded));
                    assert_eq!(refused(bytes, Some("another")), KeyFileError::WrongPassphrase);
                    assert_eq!(refused(bytes, Some("")), KeyFileError::WrongPassphrase);
                }
                let contents = KeyFile::read_all(bytes, given.as_ref()).unwrap();
                assert_eq!((contents.keys.len(), contents.left_out.len()), (keys.split(' ').count(), 0));
                let mut known = public.iter();
                for key in &contents.keys {
                    assert_eq!(key.comment(), user_id);
                    works(key);
                    // The modulus, or the point behind the byte that says which form it has.
                    let number = match PublicKey::parse(key.blob()).unwrap() {
                        PublicKey::Rsa { n, .. } => n.to_vec(),
                        PublicKey::Ecdsa(_, point) => point.to_vec(),
                        PublicKey::Ed25519(point) | PublicKey::X25519(point) => [&[0x40], point].concat(),
                        other => panic!("{other:?}"),
                    };
                    let hex = hex(&number).to_uppercase();
                    assert!(known.any(|fields| fields[3] == hex), "{name}: {hex}");
                }
                assert_eq!(refused(bytes, Some(PASSPHRASE)), KeyFileError::Several(contents.keys.len()));
            }
        }
    }
}

/// The signatures of a key are those of gpg's own agent, which keeps it.
#[test]
fn what_gpg_writes_signs_as_in_gpg() {
    let gpg = Gpg::new();
    let digest = Sha256::digest(b"message");
    for (algorithm, scheme) in [("ed25519", Scheme::Ed25519), ("rsa2048", Scheme::RsaPkcs1v15(Hash::Sha256))] {
        let fingerprint = gpg.generate(algorithm, algorithm, "");
        let grip = gpg.colons(&fingerprint, "grp").remove(0)[9].clone();
        let theirs = gpg.sign(&grip, &digest);
        let ours = works(&plain(&gpg.export(&fingerprint, "")));
        // gpg signs digests with Ed25519, too, as messages.
        let input = match scheme {
            Scheme::Ed25519 => Input::Message(digest.to_vec().into()),
            _ => Input::Digest(digest.to_vec().into()),
        };
        let ours = ours.sign(scheme, input).unwrap();
        let halves = ours.as_bytes().chunks(if algorithm == "rsa2048" { 256 } else { 32 });
        for half in halves {
            let same = theirs.windows(half.len()).any(|window| window == half);
            assert!(same, "{algorithm}: {} {}", hex(half), hex(&theirs));
        }
    }
}

#[test]
fn what_gpg_leaves_out_is_left_out() {
    let gpg = Gpg::new();
    let fingerprint = gpg.generate("stub", "ed25519 ed25519/sign cv25519/encrypt", PASSPHRASE);
    let out = gpg.path().join("subkeys");
    gpg.run(PASSPHRASE, &["--output", out.to_str().unwrap(), "--export-secret-subkeys", &fingerprint]).ok();
    let bytes = fs::read(&out).unwrap();
    assert_eq!(KeyFile::read_all(&bytes, None).err(), Some(KeyFileError::PassphraseNeeded));
    let contents = KeyFile::read_all(&bytes, Some(&passphrase(PASSPHRASE))).unwrap();
    assert_eq!(contents.keys.iter().map(KeyFile::comment).collect::<Vec<_>>(), ["stub", "stub"]);
    assert!(contents.left_out[0].to_string().contains("private half is not in the file"), "{:?}", contents.left_out);
    // With nothing else in the file it is an error.
    let public = gpg.run("", &["--armor", "--export", &fingerprint]).ok();
    assert_eq!(refused(public.as_bytes(), None), KeyFileError::PublicKey);
    let dsa = gpg.generate("old", "dsa2048", "");
    assert!(refused(&gpg.export(&dsa, ""), None).to_string().contains("a DSA key is not supported"));
    let k1 = gpg.generate("koblitz", "secp256k1", "");
    assert!(refused(&gpg.export(&k1, ""), None).to_string().contains("Curve25519, P-256"));
}

/// What we write, ssh-keygen, OpenSSL and PuTTYgen read with the passphrase, as the same key under the same comment.
#[test]
fn what_we_write_others_read() {
    let dir = directory();
    let dir = dir.path();
    let key = |name: &str| dir.join(name);
    let write = |name: &str, text: String| {
        fs::write(key(name), text).unwrap();
        fs::set_permissions(key(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    let given = passphrase(PASSPHRASE);
    for (n, (key_type, bits)) in TYPES.into_iter().enumerate() {
        let path = keygen(dir, &format!("key{n}"), &["-t", key_type, "-b", bits, "-C", "a comment"]);
        let public = fs::read_to_string(path.with_extension("pub")).unwrap();
        let file = plain(&fs::read(&path).unwrap());
        assert_eq!(file.to_openssh(&"".into()).err(), Some(WriteError::EmptyPassphrase));
        write("written", file.to_openssh(&given).unwrap());
        let read = encrypted(&fs::read(key("written")).unwrap());
        assert_eq!((read.fields(), read.comment()), (file.fields(), "a comment"));
        let same = |words: &[&str]| {
            let shown = run(command("ssh-keygen", dir).args(words)).ok();
            assert_eq!(blob(&shown), blob(&public), "{key_type} {bits}");
            shown
        };
        assert!(same(&["-y", "-P", PASSPHRASE, "-f", "written"]).trim_end().ends_with(" a comment"));
        write("written.pem", file.to_pkcs8(&given).unwrap());
        let read = encrypted(&fs::read(key("written.pem")).unwrap());
        assert_eq!((read.fields(), read.comment()), (file.fields(), ""));
        tool(dir, "openssl pkey -in written.pem -passin file:passphrase -pubout -out written.pub").ok();
        if key_type == "ed25519" {
            let der = tool(dir, "openssl pkey -pubin -in written.pub -outform DER -out written.der");
            der.ok();
            assert_eq!(spki::decode(&fs::read(key("written.der")).unwrap()).unwrap(), file.blob());
        } else {
            same(&["-i", "-m", "PKCS8", "-f", "written.pub"]);
            same(&["-y", "-P", PASSPHRASE, "-f", "written.pem"]);
        }
        tool(dir, "openssl pkey -in written.pem -passin file:passphrase -check -noout").ok();
    }
}

/// Types that ssh-keygen or OpenSSL do not know.
#[test]
fn what_we_write_we_read() {
    let given = passphrase(PASSPHRASE);
    let dir = directory();
    tool(dir.path(), "openssl genpkey -algorithm X25519 -out x25519.pem").ok();
    let x25519 = plain(&fs::read(dir.path().join("x25519.pem")).unwrap()).with_comment("exchange");
    fs::write(dir.path().join("written.pem"), x25519.to_pkcs8(&given).unwrap()).unwrap();
    tool(dir.path(), "openssl pkey -in written.pem -passin file:passphrase -out again.pem").ok();
    assert_eq!(plain(&fs::read(dir.path().join("again.pem")).unwrap()).fields(), x25519.fields());

    let expanded = plain(include_bytes!("fixtures/schemes/arti_ed25519_expanded"));
    let (mldsa, blob) = mldsa44_ed25519();
    let mldsa = KeyFile::from_secret(KeyType::MlDsa44Ed25519, &blob, &mldsa).unwrap().with_comment("hybrid");
    for key in [x25519, expanded, mldsa] {
        let text = key.to_openssh(&given).unwrap();
        let read = encrypted(text.as_bytes());
        assert_eq!((read.fields(), read.blob(), read.comment()), (key.fields(), key.blob(), key.comment()));
        if !key.fields()[4..].starts_with(b"x25519") {
            assert_eq!(key.to_pkcs8(&given).err(), Some(WriteError::NoForm));
        }
    }
}

/// Two seeds, and the public key that they make.
fn mldsa44_ed25519() -> ([u8; 64], Vec<u8>) {
    let (mldsa, _) = ml_dsa_44::KG::keygen_from_seed(&[1; 32]);
    let ed25519 = Ed25519KeyPair::from_seed_unchecked(&[2; 32]).unwrap();
    let seeds = [[1; 32], [2; 32]].concat().try_into().unwrap();
    (seeds, PublicKey::MlDsa44Ed25519(&mldsa.into_bytes(), ed25519.public_key().as_ref()).to_blob())
}

/// What the store keeps of a soft key is enough to write it.
#[test]
fn stored_private_halves_are_written() {
    let dir = directory();
    let dir = dir.path();
    for (n, (key_type, bits)) in TYPES.into_iter().enumerate() {
        let path = keygen(dir, &format!("key{n}"), &["-t", key_type, "-b", bits, "-C", ""]);
        let file = plain(&fs::read(&path).unwrap());
        let soft = works(&file);
        let mut secret = Zeroizing::new(Vec::new());
        let mut keep = |bytes: &[u8]| {
            secret.extend_from_slice(bytes);
            Ok([0].into())
        };
        soft.key.seal(&mut keep).unwrap();
        let again = KeyFile::from_secret(soft.key_type(), file.blob(), &secret).unwrap();
        assert_eq!((again.fields(), again.blob()), (file.fields(), file.blob()), "{key_type} {bits}");
        let other = keygen(dir, &format!("other{n}"), &["-t", key_type, "-b", bits]);
        let other = plain(&fs::read(&other).unwrap());
        assert!(KeyFile::from_secret(soft.key_type(), other.blob(), &secret).is_err());
    }
}

#[test]
fn what_is_no_private_key_says_what_it_is() {
    let dir = directory();
    let dir = dir.path();
    let path = keygen(dir, "key", &["-t", "ed25519"]);
    assert_eq!(refused(&fs::read(path.with_extension("pub")).unwrap(), None), KeyFileError::PublicKey);
    tool(dir, "openssl genpkey -algorithm ED25519 -out key.pem").ok();
    tool(dir, "openssl pkey -in key.pem -pubout -out public.pem").ok();
    assert_eq!(refused(&fs::read(dir.join("public.pem")).unwrap(), None), KeyFileError::PublicKey);
    assert_eq!(refused(b"", None), KeyFileError::UnknownFormat);
    assert_eq!(refused(b"hello, world", None), KeyFileError::UnknownFormat);
    assert_eq!(refused(&vec![0; MAX_FILE + 1], None), KeyFileError::TooLong);
    tool(dir, "openssl genpkey -genparam -algorithm DSA -pkeyopt dsa_paramgen_bits:1024 -out dsa.param").ok();
    tool(dir, "openssl genpkey -paramfile dsa.param -out dsa.pem").ok();
    assert!(matches!(refused(&fs::read(dir.join("dsa.pem")).unwrap(), None), KeyFileError::Unsupported(..)));
    tool(dir, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:secp256k1 -out k1.pem").ok();
    let error = refused(&fs::read(dir.join("k1.pem")).unwrap(), None).to_string();
    assert!(error.contains("P-256, P-384 and P-521"), "{error}");
}

/// A changed byte anywhere gives an error or the same public key, and never a panic.
#[test]
fn damage_is_no_panic() {
    let dir = directory();
    let dir = dir.path();
    let path = keygen(dir, "key", &["-t", "ecdsa"]);
    tool(dir, "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem").ok();
    tool(dir, "openssl pkey -in key.pem -outform DER -out key.der").ok();
    tool(
        dir,
        "openssl pkcs8 -topk8 -in key.pem -passout file:passphrase -v1 PBE-SHA1-3DES -iter 1 -outform DER -out old.der",
    )
    .ok();
    tool(dir, "puttygen key -O private -o key.ppk").ok();
    let gpg = Gpg::new();
    let pgp = gpg.export(&gpg.generate("damaged", "ed25519", ""), "");
    let files = [
        pgp,
        tor_master_key(dir).0,
        fs::read(&path).unwrap(),
        fs::read(dir.join("key.der")).unwrap(),
        fs::read(dir.join("old.der")).unwrap(),
        fs::read(dir.join("key.ppk")).unwrap(),
    ];
    for file in files {
        let given = passphrase(PASSPHRASE);
        assert!(KeyFile::read(&file, Some(&given)).is_ok());
        for n in 0..file.len() {
            let mut changed = file.clone();
            changed[n] ^= 1 << (n % 8);
            let _ = KeyFile::read(&changed, Some(&given));
            let _ = KeyFile::read(&file[..n], Some(&given));
        }
    }
}

#[test]
fn derived_secrets_agree_with_openssl() {
    let dir = directory();
    let dir = dir.path();
    for name in ["ours", "theirs"] {
        tool(dir, &format!("openssl genpkey -algorithm X25519 -out {name}.pem")).ok();
        tool(dir, &format!("openssl pkey -in {name}.pem -pubout -out {name}.pub")).ok();
    }
    tool(dir, "openssl pkeyutl -derive -inkey theirs.pem -peerkey ours.pub -out secret").ok();
    let ours = works(&plain(&fs::read(dir.join("ours.pem")).unwrap()));
    let theirs = plain(&fs::read(dir.join("theirs.pem")).unwrap());
    let peer = &theirs.blob()[theirs.blob().len() - 32..];
    let operation = Operation::Derive { scheme: DeriveScheme::X25519, peer: peer.into() };
    let secret = ours.key.operate(&operation).unwrap().secret().unwrap();
    assert_eq!(*secret, fs::read(dir.join("secret")).unwrap());
}
