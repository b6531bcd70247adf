//! A key as it is stored: its private half sealed, what describes it in the open. Knows neither the file nor the master key.
//!
//! docs/store.md has the layout. The description can be read while the store is locked, and is authenticated by the seal.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use base64ct::{Base64Unpadded, Encoding};

use super::record::{RecordError, list, open, put_list};
use crate::{
    devices::{MAX_BLOB, MAX_LABEL},
    rfc4251::{Put, Reader},
    vault::key::{Destination, Grants, Hop, HostKey},
};

/// The longest comment of a stored key, in bytes.
pub const MAX_COMMENT: usize = 1024;
/// The most certificates of a stored key.
pub const MAX_CERTIFICATES: usize = 64;
/// The most destinations of a stored key, and the most host keys of one end of a step.
pub const MAX_DESTINATIONS: usize = 1024;
/// The longest private half, in bytes: that of an RSA key of 16384 bits has 9.3 KiB.
pub const MAX_SECRET: usize = 16 * 1024;
/// The longest description, in bytes, so that the whole fits in one record of the file.
const MAX_METADATA: usize = 128 * 1024;

/// XChaCha20's nonce.
pub(super) const NONCE: usize = 24;
/// Poly1305's tag.
pub(super) const TAG: usize = 16;

/// SHA-256 of the plain public key's blob: what a stored key is known by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 32]);

impl KeyId {
    /// That of a plain public key.
    pub fn of(blob: &[u8]) -> Self {
        let mut id = [0; 32];
        id.copy_from_slice(digest(&SHA256, blob).as_ref());
        Self(id)
    }
}

/// As ssh shows it: `SHA256:…`.
impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SHA256:{}", Base64Unpadded::encode_string(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is known of a stored key while the store is locked. Changing any of it seals the key anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The plain public key's blob, at most [`MAX_BLOB`] bytes.
    pub blob: Box<[u8]>,
    /// What it is called in this vault, at most [`MAX_LABEL`] bytes; may be empty.
    pub name: Box<str>,
    /// What ssh shows of it, at most [`MAX_COMMENT`] bytes.
    pub comment: Box<[u8]>,
    /// When it was made or taken in, in seconds since 1970.
    pub created: u64,
    /// Whether its private half may leave the store. Never turned on later.
    pub exportable: bool,
    /// Whether it is in use; a key that is not is listed and does nothing.
    pub enabled: bool,
    /// What it does beyond plain signatures.
    pub grants: Grants,
    /// Whether a person confirms each use.
    pub confirm: bool,
    /// Where it may be used, at most [`MAX_DESTINATIONS`]; empty for anywhere.
    pub destinations: Box<[Destination]>,
    /// From when on it is not used any more, in seconds since 1970.
    pub expires: Option<u64>,
    /// Certificates for it, whole, at most [`MAX_CERTIFICATES`] of [`MAX_BLOB`] bytes.
    pub certificates: Vec<Box<[u8]>>,
    /// The key whose successor this one is.
    pub succeeds: Option<KeyId>,
    /// From when on this one, which has a successor, is not used any more, in seconds since 1970.
    pub retires: Option<u64>,
}

/// A key with its private half sealed, as the file has it. Made by [`MasterKey::seal_key`](super::MasterKey::seal_key).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedKey {
    pub(super) metadata: Metadata,
    pub(super) nonce: [u8; NONCE],
    /// With the tag at its end.
    pub(super) ciphertext: Box<[u8]>,
}

impl SealedKey {
    /// What it is known by.
    pub fn id(&self) -> KeyId {
        KeyId::of(&self.metadata.blob)
    }

    /// How long its private half is, in bytes.
    pub fn secret_len(&self) -> usize {
        self.ciphertext.len() - TAG
    }

    /// What is known of it without opening it. The seal has proved it true only once the key was opened.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![super::record::VERSION];
        out.put_string(&self.metadata.encode());
        out.extend_from_slice(&self.nonce);
        out.put_string(&self.ciphertext);
        out
    }

    /// The key that the file has under `id`.
    pub(super) fn decode(id: &[u8], bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes)?;
        let metadata = Metadata::decode(r.string()?)?;
        let mut nonce = [0; NONCE];
        nonce.copy_from_slice(r.take(NONCE)?);
        let ciphertext = r.string()?;
        r.finish()?;
        if !(TAG..=MAX_SECRET + TAG).contains(&ciphertext.len()) {
            return Err(RecordError::Invalid("a sealed private half is too short or too long"));
        }
        if KeyId::of(&metadata.blob).0 != *id {
            return Err(RecordError::Invalid("its name is not that of its public key"));
        }
        Ok(Self { metadata, nonce, ciphertext: ciphertext.into() })
    }
}

impl Metadata {
    /// Whether it keeps the bounds, so that the file takes it; otherwise which it exceeds.
    pub(super) fn checked(&self) -> Result<Vec<u8>, RecordError> {
        let bytes = self.encode();
        Self::decode(&bytes).map(|_| bytes)
    }

    pub(in crate::vault) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.put_string(&self.blob);
        out.put_string(self.name.as_bytes());
        out.put_string(&self.comment);
        out.put_u64(self.created);
        let flags =
            [self.exportable, self.enabled, self.confirm, self.grants.sign, self.grants.decrypt, self.grants.derive];
        out.extend(flags.map(u8::from));
        put_list(&mut out, &self.destinations, |out, Destination { from, to }| {
            put_hop(out, from);
            put_hop(out, to);
        });
        put_option(&mut out, self.expires, Put::put_u64);
        put_list(&mut out, &self.certificates, |out, certificate| out.put_string(certificate));
        put_option(&mut out, self.succeeds, |out, id| out.extend_from_slice(&id.0));
        put_option(&mut out, self.retires, Put::put_u64);
        out
    }

    pub(in crate::vault) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > MAX_METADATA {
            return Err(RecordError::Invalid("a key's description is longer than 128 KiB"));
        }
        let mut r = Reader::new(bytes);
        let blob = bounded(r.string()?, 1..=MAX_BLOB, "a public key is empty or too long")?;
        let name = bounded(r.string()?, 0..=MAX_LABEL, "a key's name is too long")?;
        let name = std::str::from_utf8(&name).map_err(|_| RecordError::Invalid("a key's name is not UTF-8"))?.into();
        let comment = bounded(r.string()?, 0..=MAX_COMMENT, "a key's comment is too long")?;
        let created = r.u64()?;
        let mut flag = || flag(&mut r);
        let (exportable, enabled, confirm) = (flag()?, flag()?, flag()?);
        let grants = Grants { sign: flag()?, decrypt: flag()?, derive: flag()? };
        let destinations = list(&mut r, MAX_DESTINATIONS, |r| Ok(Destination { from: hop(r)?, to: hop(r)? }))?;
        let expires = option(&mut r, |r| Ok(r.u64()?))?;
        let certificates = list(&mut r, MAX_CERTIFICATES, |r| {
            bounded(r.string()?, 1..=MAX_BLOB, "a certificate is empty or too long")
        })?;
        let succeeds = option(&mut r, |r| {
            let mut id = [0; 32];
            id.copy_from_slice(r.take(32)?);
            Ok(KeyId(id))
        })?;
        let retires = option(&mut r, |r| Ok(r.u64()?))?;
        r.finish()?;
        let destinations = destinations.into();
        Ok(Self {
            blob,
            name,
            comment,
            created,
            exportable,
            enabled,
            grants,
            confirm,
            destinations,
            expires,
            certificates,
            succeeds,
            retires,
        })
    }
}

fn put_hop(out: &mut Vec<u8>, hop: &Hop) {
    out.put_string(&hop.user);
    out.put_string(&hop.host);
    put_list(out, &hop.keys, |out, key| {
        out.put_string(&key.blob);
        out.push(u8::from(key.is_ca));
    });
}

fn hop(r: &mut Reader<'_>) -> Result<Hop, RecordError> {
    const TOO_LONG: &str = "a host's or user's name in a destination is too long";
    Ok(Hop {
        user: bounded(r.string()?, 0..=MAX_COMMENT, TOO_LONG)?,
        host: bounded(r.string()?, 0..=MAX_COMMENT, TOO_LONG)?,
        keys: list(r, MAX_DESTINATIONS, |r| {
            Ok(HostKey {
                blob: bounded(r.string()?, 1..=MAX_BLOB, "a host's key is empty or too long")?,
                is_ca: flag(r)?,
            })
        })?
        .into(),
    })
}

fn bounded(
    bytes: &[u8],
    lengths: std::ops::RangeInclusive<usize>,
    otherwise: &'static str,
) -> Result<Box<[u8]>, RecordError> {
    if lengths.contains(&bytes.len()) { Ok(bytes.into()) } else { Err(RecordError::Invalid(otherwise)) }
}

/// Exactly 0 or 1, so that what is read and written again has the same bytes: the seal covers them.
fn flag(r: &mut Reader<'_>) -> Result<bool, RecordError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(RecordError::Invalid("a flag is neither 0 nor 1")),
    }
}

fn put_option<T>(out: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    out.push(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn option<'a, T>(
    r: &mut Reader<'a>,
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, RecordError>,
) -> Result<Option<T>, RecordError> {
    if flag(r)? { read(r).map(Some) } else { Ok(None) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(max: usize) -> impl Strategy<Value = Box<[u8]>> {
        prop::collection::vec(any::<u8>(), 1..max).prop_map(Into::into)
    }

    fn any_hop() -> impl Strategy<Value = Hop> {
        let key = (bytes(40), any::<bool>()).prop_map(|(blob, is_ca)| HostKey { blob, is_ca });
        (bytes(9), bytes(9), prop::collection::vec(key, 0..3)).prop_map(|(user, host, keys)| Hop {
            user,
            host,
            keys: keys.into(),
        })
    }

    pub(in crate::vault) fn any_metadata() -> impl Strategy<Value = Metadata> {
        let destination = (any_hop(), any_hop()).prop_map(|(from, to)| Destination { from, to });
        let text = (bytes(80), ".{0,40}", bytes(50), any::<u64>(), any::<[bool; 6]>());
        let more = (
            prop::collection::vec(destination, 0..3),
            any::<Option<u64>>(),
            prop::collection::vec(bytes(90), 0..3),
            any::<Option<[u8; 32]>>(),
            any::<Option<u64>>(),
        );
        (text, more).prop_map(|((blob, name, comment, created, flags), more)| Metadata {
            blob,
            name: name.into(),
            comment,
            created,
            exportable: flags[0],
            enabled: flags[1],
            confirm: flags[2],
            grants: Grants { sign: flags[3], decrypt: flags[4], derive: flags[5] },
            destinations: more.0.into(),
            expires: more.1,
            certificates: more.2,
            succeeds: more.3.map(KeyId),
            retires: more.4,
        })
    }

    #[test]
    fn what_was_written_by_the_documentation_reads() {
        let seed = include_bytes!("../../../fuzz/seeds/store/key");
        let (id, record) = seed.split_first_chunk::<32>().unwrap();
        let metadata = SealedKey::decode(id, record).unwrap().metadata;
        assert_eq!((&*metadata.name, metadata.expires, metadata.grants.sign), ("work", Some(9), true));
        assert_eq!(&*metadata.destinations[0].to.host, b"host");
    }

    #[test]
    fn what_exceeds_a_bound_is_refused() {
        let refused = |change: fn(&mut Metadata)| {
            let mut metadata = Metadata { blob: [1].into(), ..Metadata::default() };
            assert!(metadata.checked().is_ok());
            change(&mut metadata);
            metadata.checked().is_err()
        };
        assert!(refused(|m| m.blob = [].into()));
        assert!(refused(|m| m.blob = vec![0; MAX_BLOB + 1].into()));
        assert!(refused(|m| m.name = "x".repeat(MAX_LABEL + 1).into()));
        assert!(refused(|m| m.comment = vec![0; MAX_COMMENT + 1].into()));
        assert!(refused(|m| m.certificates = vec![[1].into(); MAX_CERTIFICATES + 1]));
        assert!(refused(|m| m.certificates = vec![vec![1; MAX_BLOB].into(); 9]));
        assert!(refused(|m| {
            let nowhere = Destination { from: Hop::default(), to: Hop::default() };
            m.destinations = vec![nowhere; MAX_DESTINATIONS + 1].into();
        }));
    }

    proptest! {
        #[test]
        fn a_sealed_key_reads_back_as_it_was_written(metadata in any_metadata(), nonce: [u8; NONCE], secret in bytes(99)) {
            let ciphertext = [&secret[..], &[0; TAG]].concat().into();
            let key = SealedKey { metadata, nonce, ciphertext };
            prop_assert_eq!(SealedKey::decode(&key.id().0, &key.encode()).unwrap(), key.clone());
            prop_assert!(SealedKey::decode(&[0; 32], &key.encode()).is_err());
        }

        #[test]
        fn what_is_read_has_one_form(metadata in any_metadata(), at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = metadata.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(read) = Metadata::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes: Vec<u8>) {
            let _ = (Metadata::decode(&bytes), SealedKey::decode(&[0; 32], &bytes));
            bytes.insert(0, super::super::record::VERSION);
            let _ = SealedKey::decode(&[0; 32], &bytes);
        }
    }
}
