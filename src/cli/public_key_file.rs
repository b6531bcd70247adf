//! Files with public keys and certificates, in every form that OpenSSH and OpenSSL write: bytes ↔ SSH blobs.

use std::path::Path;

use base64ct::{Base64, Encoding};
use serde_json::json;

use super::{CliError, input};
use crate::{
    jwk,
    key_file::pem::armour,
    public_key::{Blob, KeyType, PublicKey},
    spki,
};

/// A public key.
pub(super) struct PublicKeyFile {
    /// The plain key's blob, also where the file has a certificate.
    pub(super) blob: Vec<u8>,
}

impl PublicKeyFile {
    /// Reads a file in one of the forms below.
    pub(super) fn read(path: &Path) -> Result<Self, CliError> {
        let bytes = input::read(path)?;
        parse(&bytes).map(|blob| Self { blob }).map_err(|why| CliError::NotAKey { path: path.to_owned(), why })
    }
}

/// The plain key's blob in an OpenSSH line, an RFC 4716 file, PEM or DER.
fn parse(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let text = std::str::from_utf8(bytes).ok().map(|text| text.trim_start_matches('\u{feff}').trim_start());
    match text {
        Some(text) if text.starts_with("-----BEGIN ") => parse_pem(text),
        Some(text) if text.starts_with("---- BEGIN SSH2 PUBLIC KEY ----") => parse_rfc4716(text),
        Some(text) if bytes.first() != Some(&crate::der::SEQUENCE) => parse_line(text),
        _ => spki::decode(bytes)
            .or_else(|_| spki::decode_certificate(bytes))
            .or_else(|_| spki::decode_rsa(bytes))
            .map_err(|error| format!("it has no public key: {error}")),
    }
}

/// `TYPE BASE64 COMMENT`, as in `.pub` files and, with options in front, authorized_keys.
fn parse_line(text: &str) -> Result<Vec<u8>, String> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let line = lines.next().ok_or("it is empty")?;
    if lines.next().is_some() {
        return Err("it has several keys; keep one of them".to_owned());
    }
    let mut words = line.split_whitespace().skip_while(|word| KeyType::from_name(word.as_bytes()).is_none());
    let base64 = words.nth(1).ok_or("it has no public key")?;
    plain(&Base64::decode_vec(base64).map_err(|_| "its public key is no base64")?)
}

/// RFC 4716, as `ssh-keygen -e` writes it: headers, some of which go on in the next line, and base64.
fn parse_rfc4716(text: &str) -> Result<Vec<u8>, String> {
    let mut base64 = String::new();
    let mut in_header = false;
    for line in text.lines().skip(1).map(str::trim).take_while(|line| !line.starts_with("---- END")) {
        if !in_header && !line.contains(':') {
            base64.push_str(line);
        }
        in_header = (in_header || line.contains(':')) && line.ends_with('\\');
    }
    plain(&Base64::decode_vec(&base64).map_err(|_| "its public key is no base64")?)
}

fn parse_pem(text: &str) -> Result<Vec<u8>, String> {
    let head = text.lines().next().unwrap_or_default().trim();
    let label = head.strip_prefix("-----BEGIN ").and_then(|rest| rest.strip_suffix("-----")).unwrap_or_default();
    let base64: String = text.lines().skip(1).map(str::trim).take_while(|line| !line.starts_with("-----END")).collect();
    let der = Base64::decode_vec(&base64).map_err(|_| "its contents are no base64")?;
    let decoded = match label {
        "PUBLIC KEY" => spki::decode(&der),
        "CERTIFICATE" | "X509 CERTIFICATE" | "TRUSTED CERTIFICATE" => spki::decode_certificate(&der),
        "RSA PUBLIC KEY" => spki::decode_rsa(&der),
        _ if label.contains("PRIVATE KEY") => return Err("it is a private key; name the public one".to_owned()),
        _ => return Err("it is neither a public key nor a certificate".to_owned()),
    };
    decoded.map_err(|error| error.to_string())
}

/// The blob of the key itself.
fn plain(blob: &[u8]) -> Result<Vec<u8>, String> {
    Blob::parse(blob).map(|blob| blob.key().to_blob()).map_err(|error| error.to_string())
}

/// `TYPE BASE64 COMMENT`, without a line break.
pub(super) fn line(blob: &[u8], comment: &str) -> String {
    // The type stands at the front of the blob, whatever it is.
    let kind = crate::rfc4251::Reader::new(blob).string().unwrap_or_default();
    let line = format!("{} {} {comment}", String::from_utf8_lossy(kind), Base64::encode_string(blob));
    line.trim_end().to_owned()
}

/// SubjectPublicKeyInfo in DER.
pub(super) fn der(blob: &[u8]) -> Result<Vec<u8>, CliError> {
    PublicKey::parse(blob).ok().and_then(|key| spki::encode(&key)).ok_or_else(no_form)
}

fn no_form() -> CliError {
    CliError::Unsupported("keys of this type have no form but OpenSSH's; use --format ssh".to_owned())
}

/// SubjectPublicKeyInfo in PEM.
pub(super) fn pem(blob: &[u8]) -> Result<String, CliError> {
    Ok(armour("PUBLIC KEY", &der(blob)?, 64))
}

/// A JSON Web Key, or a set of them: of several keys, or where a set is wanted.
pub(super) fn jwk<'a>(blobs: impl ExactSizeIterator<Item = &'a [u8]>, set: bool) -> Result<String, CliError> {
    let set = set || blobs.len() != 1;
    let key = |blob: &[u8]| PublicKey::parse(blob).ok().and_then(|key| jwk::encode(&key)).ok_or_else(no_form);
    let mut keys = blobs.map(key).collect::<Result<Vec<_>, _>>()?;
    let value = match keys.pop() {
        Some(key) if !set => json!(key),
        last => {
            keys.extend(last);
            json!({ "keys": keys })
        }
    };
    Ok(format!("{value:#}\n"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_we_write_we_read(point: [u8; 32], comment in "[ -~]{0,30}") {
            let blob = PublicKey::Ed25519(&point).to_blob();
            let options = format!("from=\"10.0.0.0/8\",no-pty {}", line(&blob, &comment));
            for text in [line(&blob, &comment), format!("# a note\n\n{}\n", line(&blob, "")), options, pem(&blob).unwrap()] {
                prop_assert_eq!(parse(text.as_bytes()), Ok(blob.clone()), "{}", text);
            }
            prop_assert_eq!(parse(&der(&blob).unwrap()), Ok(blob));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, text in ".{0,80}") {
            for head in ["", "-----BEGIN PUBLIC KEY-----\n", "---- BEGIN SSH2 PUBLIC KEY ----\n", "ssh-rsa ", "0"] {
                let _ = parse(&[head.as_bytes(), &bytes].concat());
                let _ = parse(format!("{head}{text}").as_bytes());
            }
        }
    }
}
