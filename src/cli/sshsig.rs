//! SSHSIG, what `ssh-keygen -Y` signs and verifies (OpenSSH's PROTOCOL.sshsig). Knows its bytes and its armour.

use base64ct::{Base64, Encoding};

use crate::{
    devices::Hash,
    key_file::pem::armour,
    rfc4251::{Put, Reader, WireError},
};

const MAGIC: &[u8] = b"SSHSIG";
const VERSION: u32 = 1;
const LABEL: &str = "SSH SIGNATURE";
/// As OpenSSH breaks the lines.
const WIDTH: usize = 70;
/// The hash that we sign with, as OpenSSH does.
pub(super) const HASH: Hash = Hash::Sha512;

/// A signature with what it says of itself.
pub(super) struct SshSig {
    /// The blob of the key or certificate.
    pub(super) key: Vec<u8>,
    /// What the signature is for: `git`, `file`, …
    pub(super) namespace: Vec<u8>,
    /// The message's hash.
    pub(super) hash: Hash,
    /// An SSH signature blob over what [`signed`] makes of the message.
    pub(super) signature: Vec<u8>,
}

/// What is signed for a message with this digest.
pub(super) fn signed(namespace: &[u8], hash: Hash, digest: &[u8]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    for field in [namespace, b"", name(hash).as_bytes(), digest] {
        out.put_string(field);
    }
    out
}

/// SSHSIG knows two hashes.
fn name(hash: Hash) -> &'static str {
    if hash == Hash::Sha256 { "sha256" } else { "sha512" }
}

impl SshSig {
    /// With its armour.
    pub(super) fn to_text(&self) -> String {
        let mut out = MAGIC.to_vec();
        out.put_u32(VERSION);
        for field in [&self.key[..], &self.namespace, b"", name(self.hash).as_bytes(), &self.signature] {
            out.put_string(field);
        }
        armour(LABEL, &out, WIDTH)
    }

    /// Whether the bytes begin as the armour does.
    pub(super) fn is_one(bytes: &[u8]) -> bool {
        bytes.trim_ascii_start().starts_with(b"-----BEGIN SSH SIGNATURE-----")
    }

    /// Reads it with its armour; `None` when it is not one of version 1.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?.trim_start();
        let body = text.strip_prefix("-----BEGIN SSH SIGNATURE-----")?.split_once("-----END SSH SIGNATURE-----")?.0;
        let base64: String = body.split_whitespace().collect();
        Self::read(Base64::decode_vec(&base64).ok()?.strip_prefix(MAGIC)?).ok()?
    }

    fn read(bytes: &[u8]) -> Result<Option<Self>, WireError> {
        let mut r = Reader::new(bytes);
        let version = r.u32()?;
        let (key, namespace, _reserved) = (r.string()?.to_vec(), r.string()?.to_vec(), r.string()?);
        let hash = match r.string()? {
            b"sha256" => Hash::Sha256,
            b"sha512" => Hash::Sha512,
            _ => return Ok(None),
        };
        let signature = r.string()?.to_vec();
        r.finish()?;
        Ok((version == VERSION).then_some(Self { key, namespace, hash, signature }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn signatures_round_trip(key: Vec<u8>, namespace: Vec<u8>, signature: Vec<u8>, short: bool) {
            let hash = if short { Hash::Sha256 } else { Hash::Sha512 };
            let text = SshSig { key: key.clone(), namespace: namespace.clone(), hash, signature: signature.clone() }.to_text();
            prop_assert!(SshSig::is_one(text.as_bytes()) && text.lines().all(|line| line.len() <= WIDTH));
            let read = SshSig::parse(text.as_bytes()).unwrap();
            prop_assert_eq!((read.key, read.namespace, read.hash, read.signature), (key, namespace, hash, signature));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = SshSig::parse(&bytes);
            let _ = SshSig::read(&bytes);
            let _ = SshSig::parse(armour(LABEL, &bytes, WIDTH).as_bytes());
        }
    }
}
