//! The master key: what seals the private halves of stored keys. Knows neither the file nor how it is wrapped itself.

use std::fmt;

use aws_lc_rs::{hkdf, hmac, rand};
use chacha20poly1305::{AeadInPlace, KeyInit, XChaCha20Poly1305};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    StoreError,
    record::RecordError,
    sealed::{KeyId, MAX_SECRET, Metadata, NONCE, SealedKey, TAG},
};

/// What a sealed key's associated data begins with.
const KEY: &[u8] = b"strongroom key 1";
/// What the tag of a slot's record is made for.
const SLOT_TAG: &[u8] = b"strongroom slot tag 1";

/// Its length, in bytes.
pub(super) const LENGTH: usize = 32;

/// 32 random bytes, the same for as long as the store lives. Wiped when it is dropped; not printed.
///
/// On the heap, so that moving it leaves no copy behind.
pub struct MasterKey(Zeroizing<Box<[u8]>>);

/// Why a private half was not sealed, or did not open.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SealError {
    /// It is longer than [`MAX_SECRET`], or the description exceeds a bound, which is told.
    #[error("the key cannot be stored: {0}")]
    TooLong(&'static str),
    /// The record was changed, or sealed under another master key. The key is lost, unless a backup has it.
    #[error("the stored key does not open: its record was changed; restore it from a backup")]
    Damaged,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey")
    }
}

impl MasterKey {
    /// A new one, for a new store.
    pub fn generate() -> Result<Self, StoreError> {
        let mut key = Zeroizing::new(vec![0; LENGTH].into_boxed_slice());
        rand::fill(&mut key).map_err(|_| StoreError::NoRandom)?;
        Ok(Self(key))
    }

    /// What [`bytes`](Self::bytes) gave; `None` for another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == LENGTH).then(|| Self(Zeroizing::new(bytes.into())))
    }

    /// The key itself, to be sealed in turn.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Seals a private half under its description. `secret` is what the key's type calls its private values, at most
    /// [`MAX_SECRET`] bytes.
    pub fn seal_key(&self, metadata: Metadata, secret: &[u8]) -> Result<SealedKey, SealError> {
        if secret.len() > MAX_SECRET {
            return Err(SealError::TooLong("its private half has more than 16 KiB"));
        }
        let described = metadata.checked().map_err(|error| match error {
            RecordError::Invalid(why) => SealError::TooLong(why),
            _ => SealError::TooLong("its description is too long"),
        })?;
        let (nonce, ciphertext) = seal(&self.0, &associated(&metadata.blob, &described), secret)?;
        Ok(SealedKey { metadata, nonce, ciphertext })
    }

    /// The private half again. Takes microseconds.
    pub fn open_key(&self, key: &SealedKey) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let associated = associated(&key.metadata.blob, &key.metadata.encode());
        open(&self.0, &associated, &key.nonce, &key.ciphertext).ok_or(SealError::Damaged)
    }

    /// The same key under another description: what [`open_key`](Self::open_key) and [`seal_key`](Self::seal_key) do.
    pub fn reseal_key(&self, key: &SealedKey, metadata: Metadata) -> Result<SealedKey, SealError> {
        self.seal_key(metadata, &self.open_key(key)?)
    }

    /// What proves that a slot's record was written by somebody who had this key.
    pub(super) fn slot_tag(&self, record: &[u8]) -> Result<hmac::Tag, StoreError> {
        Ok(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &*derive(&[], &self.0, SLOT_TAG)?), record))
    }
}

fn associated(blob: &[u8], metadata: &[u8]) -> Vec<u8> {
    [KEY, &KeyId::of(blob).0, metadata].concat()
}

/// HKDF-SHA-256 (RFC 5869), 32 bytes of it.
pub(super) fn derive(salt: &[u8], secret: &[u8], info: &[u8]) -> Result<Zeroizing<[u8; LENGTH]>, StoreError> {
    let mut key = Zeroizing::new([0; LENGTH]);
    let made = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    // HKDF refuses nothing but lengths that this is not.
    made.expand(&[info], hkdf::HKDF_SHA256).and_then(|okm| okm.fill(&mut *key)).map_err(|_| StoreError::NoRandom)?;
    Ok(key)
}

/// XChaCha20-Poly1305 under a random nonce: the nonce, and the ciphertext with its tag.
pub(super) fn seal(key: &[u8], associated: &[u8], secret: &[u8]) -> Result<([u8; NONCE], Box<[u8]>), SealError> {
    let mut nonce = [0; NONCE];
    rand::fill(&mut nonce).map_err(|_| SealError::NoRandom)?;
    // With room for the tag, so that no plaintext is left where it grew from.
    let mut text = Zeroizing::new(Vec::with_capacity(secret.len() + TAG));
    text.extend_from_slice(secret);
    XChaCha20Poly1305::new(key.into())
        .encrypt_in_place(&nonce.into(), associated, &mut *text)
        .map_err(|_| SealError::TooLong("it is too long to be sealed"))?;
    Ok((nonce, text.as_slice().into()))
}

/// Undoes [`seal`]; `None` when anything was changed.
pub(super) fn open(key: &[u8], associated: &[u8], nonce: &[u8; NONCE], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(sealed.to_vec());
    XChaCha20Poly1305::new(key.into()).decrypt_in_place(nonce.into(), associated, &mut *text).ok()?;
    Some(text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{super::sealed::tests::any_metadata, *};
    use proptest::prelude::*;

    fn metadata() -> Metadata {
        Metadata { blob: (*b"public key").into(), name: "deploy".into(), ..Metadata::default() }
    }

    #[test]
    fn a_sealed_key_opens_under_its_master_key_and_description_only() {
        let [master, other] = [(); 2].map(|()| MasterKey::generate().unwrap());
        let sealed = master.seal_key(metadata(), b"secret").unwrap();
        assert_ne!(sealed, master.seal_key(metadata(), b"secret").unwrap(), "another nonce");
        assert_eq!(**master.open_key(&sealed).unwrap(), *b"secret");
        assert_eq!(other.open_key(&sealed).unwrap_err(), SealError::Damaged);
        for change in [
            (|m| m.exportable = true) as fn(&mut Metadata),
            |m| m.enabled = true,
            |m| m.blob = (*b"another key").into(),
            |m| m.expires = Some(7),
        ] {
            let mut changed = sealed.clone();
            change(&mut changed.metadata);
            assert_eq!(master.open_key(&changed).unwrap_err(), SealError::Damaged);
        }
        let resealed = master.reseal_key(&sealed, Metadata { enabled: true, ..metadata() }).unwrap();
        assert_eq!(**master.open_key(&resealed).unwrap(), *b"secret");
        assert!(resealed.metadata().enabled);
    }

    #[test]
    fn another_implementation_agrees() {
        // draft-irtf-cfrg-xchacha-03, A.3.1
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
        };
        let plain =
            b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen \
            would be it.";
        let key: Vec<u8> = (0x80..=0x9f).collect();
        let nonce: Vec<u8> = (0x40..=0x57).collect();
        let sealed = hex(concat!(
            "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb",
            "731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216cb96b72e1213b452",
            "2f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff9",
            "21f9664c97637da9768812f615c68b13b52ec0875924c1c7987947deafd8780acf49"
        ));
        let associated = hex("50515253c0c1c2c3c4c5c6c7");
        let opened = open(&key, &associated, &nonce.try_into().unwrap(), &sealed).unwrap();
        assert_eq!(**opened, *plain);
    }

    #[test]
    fn a_master_key_does_not_print_and_has_one_length() {
        let key = MasterKey::from_bytes(&[7; 32]).unwrap();
        assert_eq!(format!("{key:?}"), "MasterKey");
        assert!(MasterKey::from_bytes(&[7; 31]).is_none());
    }

    proptest! {
        #[test]
        fn a_changed_record_does_not_open(
            metadata in any_metadata(),
            secret in prop::collection::vec(any::<u8>(), 0..200),
            at: prop::sample::Index,
            bit in 0u8..8,
        ) {
            let master = MasterKey::from_bytes(&[3; 32]).unwrap();
            let sealed = master.seal_key(metadata, &secret).unwrap();
            prop_assert_eq!(&**master.open_key(&sealed).unwrap(), &secret);
            let mut bytes = sealed.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(changed) = SealedKey::decode(&sealed.id().0, &bytes) {
                prop_assert_eq!(master.open_key(&changed).unwrap_err(), SealError::Damaged);
            }
        }
    }
}
