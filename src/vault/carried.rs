//! Keys on their way out of a vault or into one, private halves included: the plaintext of backups and transfers. Knows its
//! bytes; encrypts nothing.
//!
//! docs/store.md has the layout.

use std::{collections::HashSet, fmt};

use thiserror::Error;
use zeroize::Zeroizing;

use super::store::{KeyId, MAX_SECRET, Metadata};
use crate::{
    key_file::{KeyFile, KeyFileError},
    public_key::{KeyType, PublicKey},
    rfc4251::{Put, Reader, WireError},
};

/// The most keys that are carried at once.
pub const MAX_KEYS: usize = 65_536;
/// The longest plaintext, in bytes. A vault of 10,000 Ed25519 keys has less than 5 MiB.
pub const MAX_CARRIED: usize = 64 << 20;
/// What it begins with.
const MAGIC: &[u8] = b"strongroom keys 1\n";

/// Why bytes are no keys.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CarriedError {
    /// They begin otherwise: written by another program, or by a newer version of this one.
    #[error("what is inside was not written by strongroom, or by a newer version of it")]
    NoKeys,
    /// They are not what they begin as.
    #[error("what is inside is damaged: {0}")]
    Malformed(#[from] WireError),
    /// A bound is exceeded.
    #[error("there are more than {MAX_KEYS} keys, or more than 64 MiB of them")]
    TooMany,
    /// A key's description or its private half is none.
    #[error("key {0} inside is damaged: {1}")]
    Key(usize, String),
}

/// A key with its private half in the open. Wiped when it is dropped, and not printed.
pub struct CarriedKey {
    /// What is known of it.
    pub metadata: Metadata,
    /// The private half, as the key's type has it in the store. At most [`MAX_SECRET`] bytes.
    pub secret: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for CarriedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CarriedKey({:?})", KeyId::of(&self.metadata.blob))
    }
}

impl CarriedKey {
    /// The type of its private half. An Ed25519 public key belongs to a seed or to tor's expanded form, which differ in
    /// length.
    pub fn key_type(&self) -> Option<KeyType> {
        let public = PublicKey::parse(&self.metadata.blob).ok()?.key_type();
        let expanded = public == KeyType::Ed25519 && self.secret.len() == 64;
        Some(if expanded { KeyType::Ed25519Expanded } else { public })
    }

    /// The key in the form that files have; an error when its halves do not belong together.
    pub fn to_file(&self) -> Result<KeyFile, KeyFileError> {
        let key_type = self.key_type().ok_or(KeyFileError::UnknownFormat)?;
        KeyFile::from_secret(key_type, &self.metadata.blob, &self.secret)
    }
}

/// The keys as bytes. `created` is in seconds since 1970.
pub fn encode(keys: &[CarriedKey], created: u64) -> Result<Zeroizing<Vec<u8>>, CarriedError> {
    let records: Vec<_> = keys.iter().map(|key| key.metadata.encode()).collect();
    let lengths = keys.iter().zip(&records).map(|(key, record)| 8 + record.len() + key.secret.len());
    let len = MAGIC.len() + 8 + 4 + lengths.sum::<usize>();
    if keys.len() > MAX_KEYS || len > MAX_CARRIED {
        return Err(CarriedError::TooMany);
    }
    // Room from the start: a buffer that grows leaves copies behind.
    let mut out = Zeroizing::new(Vec::with_capacity(len));
    out.extend_from_slice(MAGIC);
    out.put_u64(created);
    out.put_u32(keys.len() as u32);
    for (key, record) in keys.iter().zip(&records) {
        out.put_string(record);
        out.put_string(&key.secret);
    }
    Ok(out)
}

/// Reads what [`encode`] wrote: when, and the keys. Whether halves belong together is not looked at:
/// [`CarriedKey::to_file`] does that.
pub fn decode(bytes: &[u8]) -> Result<(u64, Vec<CarriedKey>), CarriedError> {
    if bytes.len() > MAX_CARRIED {
        return Err(CarriedError::TooMany);
    }
    let mut r = Reader::new(bytes.strip_prefix(MAGIC).ok_or(CarriedError::NoKeys)?);
    let (created, count) = (r.u64()?, r.u32()? as usize);
    if count > MAX_KEYS {
        return Err(CarriedError::TooMany);
    }
    // Nothing is reserved for what is only claimed.
    let (mut keys, mut seen) = (Vec::new(), HashSet::new());
    for n in 1..=count {
        let (record, secret) = (r.string()?, r.string()?);
        let wrong = |why: &dyn fmt::Display| CarriedError::Key(n, why.to_string());
        let metadata = Metadata::decode(record).map_err(|error| wrong(&error))?;
        if secret.is_empty() || secret.len() > MAX_SECRET {
            return Err(wrong(&"its private half is empty or too long"));
        }
        if !seen.insert(KeyId::of(&metadata.blob)) {
            return Err(wrong(&"it is there twice"));
        }
        keys.push(CarriedKey { metadata, secret: Zeroizing::new(secret.to_vec()) });
    }
    r.finish()?;
    Ok((created, keys))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::{super::store::any_metadata, *};
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    use proptest::prelude::*;

    /// An Ed25519 key of this seed.
    pub(in crate::vault) fn key(seed: u8, exportable: bool) -> CarriedKey {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        let blob = PublicKey::Ed25519(pair.public_key().as_ref()).to_blob().into();
        let metadata = Metadata { blob, name: format!("key {seed}").into(), exportable, ..Metadata::default() };
        CarriedKey { metadata, secret: Zeroizing::new(vec![seed; 32]) }
    }

    fn any_key() -> impl Strategy<Value = CarriedKey> {
        let secret = prop::collection::vec(any::<u8>(), 1..200).prop_map(Zeroizing::new);
        (any_metadata(), secret).prop_map(|(metadata, secret)| CarriedKey { metadata, secret })
    }

    proptest! {
        #[test]
        fn keys_read_back_as_they_were_written(
            keys in prop::collection::vec(any_key(), 0..5),
            created: u64,
            at: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let mut bytes = encode(&keys, created).unwrap();
            let (when, back) = decode(&bytes).unwrap();
            prop_assert_eq!(when, created);
            prop_assert_eq!(back.len(), keys.len());
            for (back, key) in back.iter().zip(&keys) {
                prop_assert_eq!(&back.metadata, &key.metadata);
                prop_assert_eq!(&back.secret, &key.secret);
            }
            prop_assert!(decode(&bytes[..at.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            // What still reads is other keys, or another time; the outside authenticates.
            let _ = decode(&bytes);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
            let _ = decode(&[MAGIC, &bytes].concat());
        }
    }

    #[test]
    fn bounds_hold() {
        let head = |count: u32| [MAGIC, &[0; 8], &count.to_be_bytes()].concat();
        assert!(decode(&head(0)).unwrap().1.is_empty());
        assert!(matches!(decode(&head(1)), Err(CarriedError::Malformed(WireError::Truncated))));
        assert!(matches!(decode(&head(u32::MAX)), Err(CarriedError::TooMany)));
        assert!(matches!(decode(&vec![0; MAX_CARRIED + 1]), Err(CarriedError::TooMany)));
        assert!(matches!(decode(b"strongroom keys 2\n"), Err(CarriedError::NoKeys)));
        let twice = encode(&[key(1, true), key(1, true)], 0).unwrap();
        assert!(matches!(decode(&twice), Err(CarriedError::Key(2, _))));
        let long = CarriedKey { secret: Zeroizing::new(vec![0; MAX_SECRET + 1]), ..key(1, true) };
        assert!(matches!(decode(&encode(&[long], 0).unwrap()), Err(CarriedError::Key(1, _))));
    }

    #[test]
    fn halves_that_do_not_belong_together_are_found() {
        assert!(key(1, true).to_file().is_ok());
        let wrong = CarriedKey { secret: Zeroizing::new(vec![2; 32]), ..key(1, true) };
        assert!(wrong.to_file().is_err());
        assert_eq!(format!("{wrong:?}").len(), "CarriedKey(SHA256:)".len() + 43);
    }
}
