//! Signatures verified by code that has nothing to do with ours: OpenSSL's program, and RustCrypto where there are many.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use signature::Verifier;
use ssh_encoding::Encode;
use ssh_key::{
    Algorithm, EcdsaCurve, Mpint, PublicKey,
    public::{EcdsaPublicKey, Ed25519PublicKey, KeyData},
};
use strongroom::devices::{Hash, Input, Scheme, Signature};

fn openssl(dir: &Path, args: &[&str]) -> bool {
    let output = Command::new("openssl").args(args).current_dir(dir).stdin(Stdio::null()).output();
    output.expect("OpenSSL's program is installed").status.success()
}

/// The key of a blob.
pub(crate) fn parse(blob: &[u8]) -> KeyData {
    PublicKey::from_bytes(blob).expect("a blob that others understand").key_data().clone()
}

/// The name that OpenSSL has for a hash.
fn name(hash: Hash) -> &'static str {
    match hash {
        Hash::Sha1 => "sha1",
        Hash::Sha256 => "sha256",
        Hash::Sha384 => "sha384",
        Hash::Sha512 => "sha512",
    }
}

/// The digest of a message, by OpenSSL.
pub(crate) fn digest(hash: Hash, message: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("message"), message).unwrap();
    let hashed = openssl(dir.path(), &["dgst", "-binary", &format!("-{}", name(hash)), "-out", "digest", "message"]);
    assert!(hashed, "OpenSSL knows {hash:?}");
    fs::read(dir.path().join("digest")).unwrap()
}

/// Whether OpenSSL takes `signature` for one over `input` by the key of this SSH blob.
pub(crate) fn verifies(blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let hashed = |hash| match input {
        Input::Message(message) => digest(hash, message),
        Input::Digest(digest) => digest.to_vec(),
    };
    let mut key = parse(blob);
    let mut bytes = signature.as_bytes().to_vec();
    let mut options = Vec::new();
    let data = match scheme {
        Scheme::RsaPkcs1v15(hash) => {
            options.push(format!("digest:{}", name(hash)));
            hashed(hash)
        }
        Scheme::RsaPkcs1v15Raw => {
            // What is longer than a hash OpenSSL only gives back.
            write("key", &spki(&key));
            write("signature", &bytes);
            let args = ["pkeyutl", "-verifyrecover", "-pubin", "-inkey", "key", "-keyform", "DER", "-in", "signature"];
            let recovered = openssl(dir.path(), &[&args[..], &["-out", "data"]].concat());
            return recovered && fs::read(dir.path().join("data")).unwrap() == input.bytes();
        }
        Scheme::RsaPss(hash) => {
            options.extend(["rsa_padding_mode:pss".into(), "rsa_pss_saltlen:digest".into()]);
            options.push(format!("digest:{}", name(hash)));
            hashed(hash)
        }
        Scheme::Ecdsa(hash) => {
            bytes = ecdsa_der(&bytes);
            hashed(hash)
        }
        Scheme::Ed25519 => input.bytes().to_vec(),
        Scheme::Ed25519BlindedTor => {
            // The key that it was made with stands behind it.
            let blinded = bytes.split_off(64);
            key = KeyData::Ed25519(Ed25519PublicKey(blinded.try_into().unwrap()));
            input.bytes()[32..].to_vec()
        }
        Scheme::MlDsa44Ed25519 | Scheme::Sk => panic!("OpenSSL does not know {scheme:?}"),
    };
    write("key", &spki(&key));
    write("data", &data);
    write("signature", &bytes);
    let mut args = vec!["pkeyutl", "-verify", "-pubin", "-inkey", "key", "-keyform", "DER"];
    args.extend(["-in", "data", "-sigfile", "signature"]);
    if matches!(scheme, Scheme::Ed25519 | Scheme::Ed25519BlindedTor) {
        args.push("-rawin");
    }
    args.extend(options.iter().flat_map(|option| ["-pkeyopt", option]));
    openssl(dir.path(), &args)
}

/// Whether RustCrypto takes it for one: Ed25519 and P-256 over a message, quickly.
pub(crate) fn verifies_quickly(blob: &[u8], message: &[u8], signature: &Signature) -> bool {
    let (algorithm, bytes) = match signature {
        Signature::Ed25519(bytes) => (Algorithm::Ed25519, bytes.to_vec()),
        Signature::Ecdsa(_, bytes) => {
            let mut body = Vec::new();
            for half in bytes.chunks(bytes.len() / 2) {
                Mpint::from_positive_bytes(half).unwrap().encode(&mut body).unwrap();
            }
            (Algorithm::Ecdsa { curve: EcdsaCurve::NistP256 }, body)
        }
        other => panic!("not quick: {other:?}"),
    };
    let signature = ssh_key::Signature::new(algorithm, bytes).unwrap();
    parse(blob).verify(message, &signature).is_ok()
}

/// A value in DER.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let mut out = vec![tag];
    match content.len() {
        len @ ..0x80 => out.push(len as u8),
        len @ ..0x100 => out.extend([0x81, len as u8]),
        len => out.extend([0x82, (len >> 8) as u8, len as u8]),
    }
    out.extend(content);
    out
}

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const SEQUENCE: u8 = 0x30;

/// A key as X.509 has it (RFC 5280, RFC 5480, RFC 8410).
fn spki(key: &KeyData) -> Vec<u8> {
    let (algorithm, public): (&[u8], Vec<u8>) = match key {
        KeyData::Ed25519(key) => (b"\x06\x03\x2b\x65\x70", key.0.to_vec()),
        KeyData::Ecdsa(key) => {
            let curve: &[u8] = match key {
                EcdsaPublicKey::NistP256(_) => {
                    b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07"
                }
                EcdsaPublicKey::NistP384(_) => b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22",
                EcdsaPublicKey::NistP521(_) => b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x23",
            };
            (curve, key.as_sec1_bytes().to_vec())
        }
        KeyData::Rsa(key) => {
            let integers = [der(INTEGER, &[key.n.as_bytes()]), der(INTEGER, &[key.e.as_bytes()])];
            (b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00", der(SEQUENCE, &[&integers[0], &integers[1]]))
        }
        other => panic!("OpenSSL does not know {other:?}"),
    };
    der(SEQUENCE, &[&der(SEQUENCE, &[algorithm]), &der(BIT_STRING, &[&[0], &public])])
}

/// `r ‖ s` as the Ecdsa-Sig-Value of RFC 3279.
fn ecdsa_der(signature: &[u8]) -> Vec<u8> {
    let halves: Vec<_> = signature
        .chunks(signature.len() / 2)
        .map(|half| der(INTEGER, &[Mpint::from_positive_bytes(half).unwrap().as_bytes()]))
        .collect();
    der(SEQUENCE, &[&halves[0], &halves[1]])
}
