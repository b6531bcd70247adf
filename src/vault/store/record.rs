//! The records of the state file as bytes: RFC 4251 values behind a version byte. Knows no file.
//!
//! What is read is bounded like what a stranger sends: the file may have been damaged or made by somebody else.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::PathBuf};

use aws_lc_rs::{error::Unspecified, rand};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    devices::{DecryptScheme, DeriveScheme, FoundKey, Hash, MAX_BLOB, MAX_LABEL, MAX_SLOT, Scheme, Slot},
    rfc4251::{Put, Reader, WireError},
    vault::audit::{Head, Position},
};

/// The longest record, in bytes.
pub(super) const MAX_RECORD: usize = 256 * 1024;
/// The most certificates of one key.
const MAX_CERTIFICATES: usize = 64;
/// The most schemes in one of a key's lists; there are fewer.
const MAX_SCHEMES: usize = 64;

/// Why a record is not one.
#[derive(Debug, Error)]
pub(in crate::vault) enum RecordError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("its version is {0}, and this program knows 1")]
    Version(u8),
    #[error("{0}")]
    Invalid(&'static str),
}

/// A device that was seen at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceRecord {
    pub(super) kind: String,
    pub(super) serial: String,
    pub(super) first_seen: u64,
    pub(super) last_seen: u64,
}

/// What makes PIN marks: a key for HMAC-SHA-256 and a salt for Argon2id.
pub(super) struct MarkSecret {
    pub(super) key: Zeroizing<[u8; 32]>,
    pub(super) salt: [u8; 16],
}

/// What is known of a PIN that was sent and not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MarkState {
    /// It is on its way, or nobody knows what became of it.
    Pending,
    /// The token refused it.
    Refused,
}

pub(super) const VERSION: u8 = 1;

fn begin() -> Vec<u8> {
    vec![VERSION]
}

pub(super) fn open(bytes: &[u8]) -> Result<Reader<'_>, RecordError> {
    if bytes.len() > MAX_RECORD {
        return Err(RecordError::Invalid("it is longer than 256 KiB"));
    }
    let mut r = Reader::new(bytes);
    match r.u8()? {
        VERSION => Ok(r),
        other => Err(RecordError::Version(other)),
    }
}

impl DeviceRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = begin();
        out.put_string(self.kind.as_bytes());
        out.put_string(self.serial.as_bytes());
        out.extend_from_slice(&self.first_seen.to_be_bytes());
        out.extend_from_slice(&self.last_seen.to_be_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes)?;
        let record =
            Self { kind: label(r.string()?)?, serial: label(r.string()?)?, first_seen: r.u64()?, last_seen: r.u64()? };
        r.finish()?;
        Ok(record)
    }
}

/// How far the audit log was written.
pub(super) fn encode_head(head: &Head) -> Vec<u8> {
    let mut out = begin();
    out.put_string(head.directory.as_os_str().as_encoded_bytes());
    for Position { seq, hash } in [&head.last, &head.before_oldest] {
        out.extend_from_slice(&seq.to_be_bytes());
        out.put_string(hash);
    }
    for number in [head.file, head.length, head.oldest_file] {
        out.extend_from_slice(&number.to_be_bytes());
    }
    out
}

/// What [`encode_head`] wrote.
pub(super) fn decode_head(bytes: &[u8]) -> Result<Head, RecordError> {
    let mut r = open(bytes)?;
    let directory = PathBuf::from(OsStr::from_bytes(r.string()?));
    let mut position = || {
        let (seq, hash) = (r.u64()?, r.string()?);
        let hash = hash.try_into().map_err(|_| RecordError::Invalid("a hash has 32 bytes"))?;
        Ok::<_, RecordError>(Position { seq, hash })
    };
    let (last, before_oldest) = (position()?, position()?);
    let head = Head { directory, last, file: r.u64()?, length: r.u64()?, oldest_file: r.u64()?, before_oldest };
    r.finish()?;
    Ok(head)
}

/// A key's place, without its slot, which is the record's name.
pub(super) fn encode_key(key: &FoundKey) -> Vec<u8> {
    let mut out = begin();
    out.put_string(&key.blob);
    put_list(&mut out, &key.certificates, |out, certificate| out.put_string(certificate));
    out.put_string(key.label.as_bytes());
    put_list(&mut out, &key.schemes, |out, scheme| out.extend_from_slice(&scheme_code(*scheme)));
    put_list(&mut out, &key.decrypts, |out, scheme| out.extend_from_slice(&decrypt_code(*scheme)));
    put_list(&mut out, &key.derives, |out, scheme| out.push(derive_code(*scheme)));
    out.push(u8::from(key.touch));
    out.push(u8::from(key.ssh));
    out.put_string(key.note.as_bytes());
    out
}

/// The key in `slot`. What [`encode_key`] writes of a key that exceeds the bounds is refused here.
pub(super) fn decode_key(slot: &[u8], bytes: &[u8]) -> Result<FoundKey, RecordError> {
    if slot.len() > MAX_SLOT {
        return Err(RecordError::Invalid("the slot is too long"));
    }
    let mut r = open(bytes)?;
    let mut key = FoundKey {
        slot: Slot(slot.into()),
        blob: blob(r.string()?)?,
        certificates: list(&mut r, MAX_CERTIFICATES, |r| blob(r.string()?))?,
        label: label(r.string()?)?,
        schemes: list(&mut r, MAX_SCHEMES, |r| scheme([r.u8()?, r.u8()?]))?,
        decrypts: list(&mut r, MAX_SCHEMES, |r| decrypt([r.u8()?, r.u8()?]))?,
        derives: list(&mut r, MAX_SCHEMES, |r| derive(r.u8()?))?,
        touch: r.bool()?,
        ssh: true,
        note: String::new(),
    };
    // The records of the first version end here.
    if !r.is_empty() {
        key.ssh = r.bool()?;
        key.note = label(r.string()?)?;
    }
    r.finish()?;
    Ok(key)
}

impl MarkSecret {
    /// A new one.
    pub(super) fn generate() -> Result<Self, Unspecified> {
        let mut secret = Self { key: Zeroizing::new([0; 32]), salt: [0; 16] };
        rand::fill(&mut *secret.key)?;
        rand::fill(&mut secret.salt)?;
        Ok(secret)
    }

    pub(super) fn encode(&self) -> Zeroizing<Vec<u8>> {
        // With its capacity in advance, so that growing leaves no copy of the key behind.
        let mut out = Vec::with_capacity(1 + 32 + 16);
        out.push(VERSION);
        out.extend_from_slice(&*self.key);
        out.extend_from_slice(&self.salt);
        Zeroizing::new(out)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes)?;
        let (key, salt) = (r.take(32)?, r.take(16)?);
        r.finish()?;
        let mut secret = Self { key: Zeroizing::new([0; 32]), salt: [0; 16] };
        secret.key.copy_from_slice(key);
        secret.salt.copy_from_slice(salt);
        Ok(secret)
    }
}

impl MarkState {
    pub(super) fn encode(self) -> Vec<u8> {
        vec![
            VERSION,
            match self {
                Self::Pending => 1,
                Self::Refused => 2,
            },
        ]
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes)?;
        let state = match r.u8()? {
            1 => Self::Pending,
            2 => Self::Refused,
            _ => return Err(RecordError::Invalid("no such state of a PIN")),
        };
        r.finish()?;
        Ok(state)
    }
}

/// Text of a device's: a name, kind, serial or label.
pub(super) fn label(bytes: &[u8]) -> Result<String, RecordError> {
    if bytes.len() > MAX_LABEL {
        return Err(RecordError::Invalid("a text is too long"));
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| RecordError::Invalid("a text is not UTF-8"))
}

fn blob(bytes: &[u8]) -> Result<Box<[u8]>, RecordError> {
    if bytes.is_empty() || bytes.len() > MAX_BLOB {
        return Err(RecordError::Invalid("a public key is empty or too long"));
    }
    Ok(bytes.into())
}

pub(super) fn put_list<T>(out: &mut Vec<u8>, items: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    out.put_u32(u32::try_from(items.len()).unwrap_or(u32::MAX));
    for item in items {
        put(out, item);
    }
}

pub(super) fn list<'a, T>(
    r: &mut Reader<'a>,
    max: usize,
    read: impl Fn(&mut Reader<'a>) -> Result<T, RecordError>,
) -> Result<Vec<T>, RecordError> {
    let count = r.u32()? as usize;
    if count > max {
        return Err(RecordError::Invalid("a list is too long"));
    }
    (0..count).map(|_| read(r)).collect()
}

// The codes below are in files: none is ever given another meaning.

fn hash_code(hash: Hash) -> u8 {
    match hash {
        Hash::Sha1 => 1,
        Hash::Sha256 => 2,
        Hash::Sha384 => 3,
        Hash::Sha512 => 4,
    }
}

fn hash(code: u8) -> Result<Hash, RecordError> {
    Ok(match code {
        1 => Hash::Sha1,
        2 => Hash::Sha256,
        3 => Hash::Sha384,
        4 => Hash::Sha512,
        _ => return Err(RecordError::Invalid("no such hash")),
    })
}

/// The scheme and its hash, 0 for none.
fn scheme_code(scheme: Scheme) -> [u8; 2] {
    match scheme {
        Scheme::RsaPkcs1v15(hash) => [1, hash_code(hash)],
        Scheme::RsaPkcs1v15Raw => [2, 0],
        Scheme::RsaPss(hash) => [3, hash_code(hash)],
        Scheme::Ecdsa(hash) => [4, hash_code(hash)],
        Scheme::Ed25519 => [5, 0],
        Scheme::Ed25519BlindedTor => [6, 0],
        Scheme::MlDsa44Ed25519 => [7, 0],
        Scheme::Sk => [8, 0],
    }
}

fn scheme(code: [u8; 2]) -> Result<Scheme, RecordError> {
    Ok(match code {
        [1, h] => Scheme::RsaPkcs1v15(hash(h)?),
        [2, 0] => Scheme::RsaPkcs1v15Raw,
        [3, h] => Scheme::RsaPss(hash(h)?),
        [4, h] => Scheme::Ecdsa(hash(h)?),
        [5, 0] => Scheme::Ed25519,
        [6, 0] => Scheme::Ed25519BlindedTor,
        [7, 0] => Scheme::MlDsa44Ed25519,
        [8, 0] => Scheme::Sk,
        _ => return Err(RecordError::Invalid("no such scheme")),
    })
}

fn decrypt_code(scheme: DecryptScheme) -> [u8; 2] {
    match scheme {
        DecryptScheme::RsaOaep(hash) => [1, hash_code(hash)],
        DecryptScheme::RsaPkcs1v15 => [2, 0],
    }
}

fn decrypt(code: [u8; 2]) -> Result<DecryptScheme, RecordError> {
    Ok(match code {
        [1, h] => DecryptScheme::RsaOaep(hash(h)?),
        [2, 0] => DecryptScheme::RsaPkcs1v15,
        _ => return Err(RecordError::Invalid("no such decryption scheme")),
    })
}

fn derive_code(scheme: DeriveScheme) -> u8 {
    match scheme {
        DeriveScheme::Ecdh => 1,
        DeriveScheme::X25519 => 2,
    }
}

fn derive(code: u8) -> Result<DeriveScheme, RecordError> {
    Ok(match code {
        1 => DeriveScheme::Ecdh,
        2 => DeriveScheme::X25519,
        _ => return Err(RecordError::Invalid("no such key agreement")),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HASHES: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];

    /// A key with every scheme there is.
    fn versatile() -> FoundKey {
        let mut schemes: Vec<_> =
            [Scheme::RsaPkcs1v15Raw, Scheme::Ed25519, Scheme::Ed25519BlindedTor, Scheme::MlDsa44Ed25519, Scheme::Sk]
                .into();
        schemes.extend(HASHES.map(Scheme::RsaPkcs1v15));
        schemes.extend(HASHES.map(Scheme::RsaPss));
        schemes.extend(HASHES.map(Scheme::Ecdsa));
        let mut decrypts: Vec<_> = HASHES.map(DecryptScheme::RsaOaep).into();
        decrypts.push(DecryptScheme::RsaPkcs1v15);
        FoundKey {
            slot: Slot((*b"slot").into()),
            blob: (*b"public key").into(),
            certificates: vec![(*b"one").into(), (*b"two").into()],
            label: "Schlüssel".to_owned(),
            schemes,
            decrypts,
            derives: vec![DeriveScheme::Ecdh, DeriveScheme::X25519],
            touch: true,
            ssh: false,
            note: "ABCD".to_owned(),
        }
    }

    #[test]
    fn a_key_of_the_first_version_is_offered_to_ssh() {
        let key = FoundKey { ssh: true, note: String::new(), ..versatile() };
        let bytes = encode_key(&key);
        assert_eq!(decode_key(b"slot", &bytes[..bytes.len() - 5]).unwrap(), key);
    }

    #[test]
    fn records_read_back_as_they_were_written() {
        let key = versatile();
        assert_eq!(decode_key(b"slot", &encode_key(&key)).unwrap(), key);
        let device = DeviceRecord { kind: "pkcs11".into(), serial: "0815".into(), first_seen: 1, last_seen: u64::MAX };
        assert_eq!(DeviceRecord::decode(&device.encode()).unwrap(), device);
        for state in [MarkState::Pending, MarkState::Refused] {
            assert_eq!(MarkState::decode(&state.encode()).unwrap(), state);
        }
        let secret = MarkSecret { key: Zeroizing::new([7; 32]), salt: [9; 16] };
        let again = MarkSecret::decode(&secret.encode()).unwrap();
        assert_eq!((*again.key, again.salt), ([7; 32], [9; 16]));
    }

    #[test]
    fn what_exceeds_a_bound_is_refused() {
        let long = |change: fn(&mut FoundKey)| {
            let mut key = versatile();
            change(&mut key);
            decode_key(&key.slot.0, &encode_key(&key)).is_err()
        };
        assert!(long(|key| key.slot = Slot(vec![0; MAX_SLOT + 1].into())));
        assert!(long(|key| key.blob = vec![0; MAX_BLOB + 1].into()));
        assert!(long(|key| key.blob = [].into()));
        assert!(long(|key| key.certificates = vec![[1].into(); MAX_CERTIFICATES + 1]));
        assert!(long(|key| key.certificates = vec![vec![1; MAX_BLOB].into(); MAX_CERTIFICATES]));
        assert!(long(|key| key.label = "x".repeat(MAX_LABEL + 1)));
    }

    #[test]
    fn another_version_is_not_guessed_at() {
        let mut bytes = encode_key(&versatile());
        bytes[0] = 2;
        assert!(matches!(decode_key(b"slot", &bytes), Err(RecordError::Version(2))));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes: Vec<u8>) {
            let _ = (decode_key(b"s", &bytes), DeviceRecord::decode(&bytes), MarkState::decode(&bytes));
            bytes.insert(0, VERSION);
            let _ = (decode_key(b"s", &bytes), DeviceRecord::decode(&bytes), MarkState::decode(&bytes));
        }

        #[test]
        fn a_damaged_record_is_another_or_none(at: prop::sample::Index, bit in 0u8..8) {
            let mut bytes = encode_key(&versatile());
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            // `touch` is true for every byte but 0.
            prop_assume!(at + 10 != bytes.len());
            prop_assert!(decode_key(b"slot", &bytes).ok() != Some(versatile()));
        }
    }
}
