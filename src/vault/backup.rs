//! Backups: an age file with the keys of a store. Knows who may have which keys; neither the store nor a file system.
//!
//! `age -d` opens a backup wherever there is an age; `carried` has what is inside.

use thiserror::Error;

use super::{
    carried::{self, CarriedError, CarriedKey, MAX_CARRIED},
    store::Metadata,
};
use crate::age::{self, AgeError, Recipient, SecretKey};

/// The longest backup that is read, in bytes: age adds 16 to every 64 KiB, and a header.
pub const MAX_BACKUP: usize = MAX_CARRIED + MAX_CARRIED / 1024 + 64 * 1024;
/// The most that a backup can be encrypted to.
pub const MAX_RECIPIENTS: usize = 16;

/// Why there is no backup, or nothing is restored.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BackupError {
    /// A key that is not exportable leaves the store under the recovery key alone: leave it out, or name no recipients.
    #[error("some keys are not exportable, and go into a backup under the recovery key only; leave out --to, or them")]
    NotExportable,
    /// Nobody could read it.
    #[error(
        "there is nobody to encrypt the backup to: add a recovery key with `strongroom slot add recovery`, or give --to"
    )]
    NoRecipient,
    /// More than [`MAX_RECIPIENTS`].
    #[error("a backup can be encrypted to 16 recipients at most")]
    TooManyRecipients,
    /// What was written does not read back as what it was written from. Nothing of it may be relied on: try again.
    #[error("the backup does not read back as it was written; it was thrown away")]
    NotVerified,
    /// Longer than any backup is.
    #[error("the file is longer than any backup is")]
    TooLong,
    /// age's part.
    #[error(transparent)]
    Age(#[from] AgeError),
    /// What is inside.
    #[error(transparent)]
    Carried(#[from] CarriedError),
}

/// To whom a backup is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recipients {
    /// The store's recovery keys.
    pub recovery: Vec<Recipient>,
    /// Others, whom a person has named and has given a passphrase for.
    pub others: Vec<Recipient>,
}

impl Recipients {
    /// Whether they may have this key.
    pub fn may_have(&self, key: &Metadata) -> bool {
        key.exportable || self.others.is_empty()
    }
}

/// A backup of these keys, which was read back and is the same.
///
/// The verification needs a private key: one is made for it, that the file is encrypted to, too, and that is forgotten.
/// Takes some milliseconds for each MiB: not for a thread that others wait for.
pub fn write(keys: &[CarriedKey], recipients: &Recipients, created: u64) -> Result<Vec<u8>, BackupError> {
    let all = [&recipients.recovery[..], &recipients.others].concat();
    match all.len() {
        0 => return Err(BackupError::NoRecipient),
        count if count > MAX_RECIPIENTS => return Err(BackupError::TooManyRecipients),
        _ => {}
    }
    if !keys.iter().all(|key| recipients.may_have(&key.metadata)) {
        return Err(BackupError::NotExportable);
    }
    let plain = carried::encode(keys, created)?;
    let verifier = SecretKey::generate()?;
    let file = age::encrypt(&[&all[..], &[verifier.recipient()?]].concat(), &plain)?;
    let (_, back) = read(&file, &verifier).map_err(|_| BackupError::NotVerified)?;
    let same = back.len() == keys.len()
        && back.iter().zip(keys).all(|(back, key)| back.metadata == key.metadata && *back.secret == *key.secret);
    if same { Ok(file) } else { Err(BackupError::NotVerified) }
}

/// When a backup was made, in seconds since 1970, and its keys. Nothing is returned before all of it has proved whole.
pub fn read(file: &[u8], key: &SecretKey) -> Result<(u64, Vec<CarriedKey>), BackupError> {
    if file.len() > MAX_BACKUP {
        return Err(BackupError::TooLong);
    }
    Ok(carried::decode(&age::decrypt(key, file)?)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{super::carried::tests::key, *};
    use proptest::prelude::*;

    fn recovery(key: &SecretKey) -> Recipients {
        Recipients { recovery: vec![key.recipient().unwrap()], others: Vec::new() }
    }

    #[test]
    fn whoever_it_is_encrypted_to_reads_it() {
        let [recovery_key, other, stranger] = [(); 3].map(|()| SecretKey::generate().unwrap());
        let keys = [key(1, true), key(2, false)];
        let file = write(&keys, &recovery(&recovery_key), 7).unwrap();
        let (created, back) = read(&file, &recovery_key).unwrap();
        assert_eq!((created, back.len()), (7, 2));
        assert_eq!((&back[1].metadata, &back[1].secret), (&keys[1].metadata, &keys[1].secret));
        assert_eq!(read(&file, &stranger).unwrap_err(), BackupError::Age(AgeError::NotForThisKey));
        // Under another key, only what may leave the store.
        let both = Recipients { others: vec![other.recipient().unwrap()], ..recovery(&recovery_key) };
        assert_eq!(write(&keys, &both, 7).unwrap_err(), BackupError::NotExportable);
        let file = write(&keys[..1], &both, 7).unwrap();
        for key in [recovery_key, other] {
            assert_eq!(read(&file, &key).unwrap().1.len(), 1);
        }
    }

    #[test]
    fn somebody_must_be_able_to_read_it() {
        assert_eq!(write(&[key(1, true)], &Recipients::default(), 0).unwrap_err(), BackupError::NoRecipient);
        let many = vec![SecretKey::generate().unwrap().recipient().unwrap(); MAX_RECIPIENTS + 1];
        let many = Recipients { recovery: many, others: Vec::new() };
        assert_eq!(write(&[key(1, true)], &many, 0).unwrap_err(), BackupError::TooManyRecipients);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_changed_backup_is_none(at: prop::sample::Index, bit in 0u8..8, cut: bool) {
            let own = SecretKey::generate().unwrap();
            let mut file = write(&[key(1, false), key(2, true)], &recovery(&own), 7).unwrap();
            let at = at.index(file.len());
            if cut {
                file.truncate(at);
            } else {
                file[at] ^= 1 << bit;
            }
            prop_assert!(read(&file, &own).is_err());
        }
    }
}
