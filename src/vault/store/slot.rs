//! Key slots: the master key, wrapped for each of those who may open the store. Knows neither the file nor stored keys.
//!
//! Each slot alone opens the store, as in LUKS. docs/store.md has the layout. Everything in a record is authenticated twice:
//! by the wrapping, before the master key is known, and by a tag under the master key, so that nobody who could only write
//! the file gets a recipient of his own believed.

use std::{
    ffi::OsStr,
    fmt,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use aws_lc_rs::{constant_time, rand};
use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    StoreError,
    master::{self, MasterKey, SealError},
    record::{RecordError, VERSION, label, open},
    sealed::{NONCE, TAG},
};
use crate::{
    age::{self, AgeError, Recipient, SecretKey},
    rfc4251::{Put, Reader},
    vault::seal::{self, Cost},
};

/// The most slots of a store.
pub const MAX_SLOTS: usize = 32;
/// The shortest and the longest key file or credential, in bytes.
pub const KEY_FILE_LENGTHS: std::ops::RangeInclusive<usize> = 32..=64 * 1024;
/// The longest path of a key file, in bytes.
const MAX_PATH: usize = 4096;
/// The longest age file around a master key, in bytes; it has some 250.
const MAX_AGE_FILE: usize = 4096;

const SLOT: &[u8] = b"strongroom slot 1";
const KEY_FILE: &[u8] = b"strongroom key file 1";
const CREDENTIAL: &[u8] = b"strongroom credential 1";

/// What every recovery key begins with.
const RECOVERY_KEY: &str = "AGE-SECRET-KEY-";

/// Whether a text is taken for a recovery key rather than a passphrase.
pub fn looks_like_recovery_key(text: &str) -> bool {
    text.trim_start().get(..RECOVERY_KEY.len()).is_some_and(|start| start.eq_ignore_ascii_case(RECOVERY_KEY))
}

/// A slot of the store, not of a device: one way to the master key.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySlot {
    number: u32,
    label: Box<str>,
    created: u64,
    kind: SlotKind,
    wrapped: Box<[u8]>,
    tag: [u8; 32],
}

/// What opens a slot, and what has to be known for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// A passphrase, stretched by Argon2id.
    Passphrase {
        /// Argon2id's salt.
        salt: [u8; 16],
        /// What a try costs.
        cost: Cost,
    },
    /// The recovery key, an age identity that was printed once. Backups are encrypted to the same recipient.
    Recovery {
        /// Its public half.
        recipient: Recipient,
    },
    /// A file with a key in it, which the daemon reads at its start.
    KeyFile {
        /// HKDF's salt.
        salt: [u8; 16],
        /// Where the file is; absolute.
        path: PathBuf,
    },
    /// A file in `$CREDENTIALS_DIRECTORY` (`LoadCredentialEncrypted=` of systemd), which the daemon reads at its start.
    Credential {
        /// HKDF's salt.
        salt: [u8; 16],
        /// The credential's name.
        name: Box<str>,
    },
}

impl SlotKind {
    /// As messages and the command line call it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Passphrase { .. } => "passphrase",
            Self::Recovery { .. } => "recovery",
            Self::KeyFile { .. } => "key-file",
            Self::Credential { .. } => "credential",
        }
    }

    /// Whether a person can open it alone, without this machine.
    pub fn is_for_people(&self) -> bool {
        matches!(self, Self::Passphrase { .. } | Self::Recovery { .. })
    }
}

/// Why a slot did not open, or was not made.
#[derive(Debug, Error)]
pub enum SlotError {
    /// Another passphrase, recovery key or file is needed.
    #[error("that does not open the slot")]
    Wrong,
    /// The secret opens it, but its record is not the one that was written. Use another slot, and make this one anew.
    #[error("the slot's record was changed; open the store by another slot, then remove this one and add it again")]
    Damaged,
    /// A key file or credential of such a length.
    #[error("a key file has 32 bytes to 64 KiB, and this one has {0}; make one with: head -c 32 /dev/urandom")]
    Length(usize),
    /// No recovery key.
    #[error(transparent)]
    Age(#[from] AgeError),
    /// A passphrase that would be taken for a recovery key, and would then open nothing.
    #[error("a passphrase cannot begin with {RECOVERY_KEY}, as recovery keys do; choose another")]
    RecoveryKey,
    /// A name or path is longer than a slot keeps.
    #[error("the slot cannot be kept: {0}")]
    TooLong(&'static str),
    /// Argon2id needs memory that is not there.
    #[error("there is not enough memory to stretch the passphrase; end some programs and try again")]
    Memory,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
}

impl From<StoreError> for SlotError {
    fn from(_: StoreError) -> Self {
        Self::NoRandom
    }
}

impl From<SealError> for SlotError {
    fn from(_: SealError) -> Self {
        Self::NoRandom
    }
}

/// Without what is wrapped.
impl fmt::Debug for KeySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, label, created, kind, .. } = self;
        write!(f, "KeySlot {{ {number}, {label:?}, {created}, {kind:?} }}")
    }
}

impl KeySlot {
    /// A slot that a passphrase opens. Blocks for as long as one try at it costs: not for a task. `cost` as
    /// [`Cost::calibrated`] gives it.
    pub fn passphrase(
        number: u32,
        label: &str,
        now: u64,
        master: &MasterKey,
        passphrase: &SecretString,
        cost: Cost,
    ) -> Result<Self, SlotError> {
        if looks_like_recovery_key(passphrase.expose_secret()) {
            return Err(SlotError::RecoveryKey);
        }
        let kind = SlotKind::Passphrase { salt: salt()?, cost };
        Self::wrap(number, label, now, kind, master, passphrase.expose_secret().as_bytes())
    }

    /// A slot for a new recovery key, and that key: `AGE-SECRET-KEY-1…`. It is shown once and kept nowhere.
    pub fn recovery(number: u32, label: &str, now: u64, master: &MasterKey) -> Result<(Self, SecretString), SlotError> {
        let key = SecretKey::generate()?;
        let kind = SlotKind::Recovery { recipient: key.recipient()? };
        let slot = Self::wrap(number, label, now, kind, master, &[])?;
        Ok((slot, SecretString::from(key.to_text().as_str())))
    }

    /// A slot that the contents of the file at `path` open: 32 bytes to 64 KiB that nobody can guess.
    pub fn key_file(
        number: u32,
        label: &str,
        now: u64,
        master: &MasterKey,
        path: &Path,
        contents: &[u8],
    ) -> Result<Self, SlotError> {
        let kind = SlotKind::KeyFile { salt: salt()?, path: path.to_owned() };
        Self::wrap(number, label, now, kind, master, contents)
    }

    /// The same for a credential of systemd's.
    pub fn credential(
        number: u32,
        label: &str,
        now: u64,
        master: &MasterKey,
        name: &str,
        contents: &[u8],
    ) -> Result<Self, SlotError> {
        let kind = SlotKind::Credential { salt: salt()?, name: name.into() };
        Self::wrap(number, label, now, kind, master, contents)
    }

    /// The master key, when `secret` is what this slot was made for: the passphrase, the text of the recovery key, or the
    /// contents of the file. With a passphrase it blocks for about half a second and takes up to 1 GiB: not for a task.
    pub fn open(&self, secret: &[u8]) -> Result<MasterKey, SlotError> {
        let master = match &self.kind {
            SlotKind::Recovery { .. } => {
                let text = std::str::from_utf8(secret).map_err(|_| AgeError::NoKey)?;
                age::decrypt(&SecretKey::parse(text)?, &self.wrapped).map_err(|error| match error {
                    AgeError::NotForThisKey => SlotError::Wrong,
                    _ => SlotError::Damaged,
                })?
            }
            kind => {
                let (nonce, sealed) = self.wrapped.split_first_chunk::<NONCE>().ok_or(SlotError::Damaged)?;
                let key = wrapping_key(kind, secret)?;
                // A wrong secret and a changed record look the same here.
                master::open(&*key, &associated(&self.header()), nonce, sealed).ok_or(SlotError::Wrong)?
            }
        };
        let master = MasterKey::from_bytes(&master).ok_or(SlotError::Damaged)?;
        if self.is_of(&master) { Ok(master) } else { Err(SlotError::Damaged) }
    }

    /// Whether its record was written by somebody who had `master`. What it says, a recipient above all, is believed for
    /// that alone.
    pub fn is_of(&self, master: &MasterKey) -> bool {
        let made = master.slot_tag(&self.tagged());
        made.is_ok_and(|tag| constant_time::verify_slices_are_equal(tag.as_ref(), &self.tag).is_ok())
    }

    /// Its number, by which people name it. Part of what is authenticated.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What it is for, in its owner's words; at most [`MAX_LABEL`](crate::devices::MAX_LABEL) bytes.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// In seconds since 1970.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// What opens it.
    pub fn kind(&self) -> &SlotKind {
        &self.kind
    }

    fn wrap(
        number: u32,
        label: &str,
        created: u64,
        kind: SlotKind,
        master: &MasterKey,
        secret: &[u8],
    ) -> Result<Self, SlotError> {
        let mut slot =
            Self { number, label: label.into(), created, kind, wrapped: Box::default(), tag: Default::default() };
        slot.wrapped = match &slot.kind {
            SlotKind::Recovery { recipient } => age::encrypt(&[*recipient], master.bytes())?.into(),
            kind => {
                let key = wrapping_key(kind, secret)?;
                let (nonce, sealed) = master::seal(&*key, &associated(&slot.header()), master.bytes())?;
                [&nonce[..], &sealed].concat().into()
            }
        };
        let tag = master.slot_tag(&slot.tagged())?;
        slot.tag.copy_from_slice(tag.as_ref());
        match Self::decode(&number.to_be_bytes(), &slot.encode()) {
            Ok(_) => Ok(slot),
            Err(RecordError::Invalid(why)) => Err(SlotError::TooLong(why)),
            Err(_) => Err(SlotError::TooLong("its record is too long")),
        }
    }

    /// Everything but what is wrapped and the tag.
    fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u32(self.number);
        out.put_string(self.label.as_bytes());
        out.put_u64(self.created);
        match &self.kind {
            SlotKind::Passphrase { salt, cost } => {
                out.push(1);
                out.extend_from_slice(salt);
                out.put_u32(cost.memory_kib());
                out.put_u32(cost.passes());
            }
            SlotKind::Recovery { recipient } => {
                out.push(2);
                out.put_string(recipient.to_string().as_bytes());
            }
            SlotKind::KeyFile { salt, path } => {
                out.push(3);
                out.extend_from_slice(salt);
                out.put_string(path.as_os_str().as_bytes());
            }
            SlotKind::Credential { salt, name } => {
                out.push(4);
                out.extend_from_slice(salt);
                out.put_string(name.as_bytes());
            }
        }
        out
    }

    /// What the tag is made of.
    fn tagged(&self) -> Vec<u8> {
        let mut out = associated(&self.header());
        out.put_string(&self.wrapped);
        out
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.header());
        out.put_string(&self.wrapped);
        out.extend_from_slice(&self.tag);
        out
    }

    /// The slot that the file has under `number`.
    pub(super) fn decode(number: &[u8], bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = open(bytes)?;
        let slot = Self {
            number: r.u32()?,
            label: label(r.string()?)?.into(),
            created: r.u64()?,
            kind: slot_kind(&mut r)?,
            wrapped: r.string()?.into(),
            tag: array(&mut r)?,
        };
        r.finish()?;
        let sealed = NONCE + master::LENGTH + TAG;
        let fits = match slot.kind {
            SlotKind::Recovery { .. } => slot.wrapped.len() <= MAX_AGE_FILE,
            _ => slot.wrapped.len() == sealed,
        };
        if !fits {
            return Err(RecordError::Invalid("a wrapped master key has the wrong length"));
        }
        if slot.number.to_be_bytes() != *number {
            return Err(RecordError::Invalid("its number is not the one it is kept under"));
        }
        Ok(slot)
    }
}

fn slot_kind(r: &mut Reader<'_>) -> Result<SlotKind, RecordError> {
    Ok(match r.u8()? {
        1 => {
            let salt = array(r)?;
            let cost = Cost::bounded(r.u32()?, r.u32()?);
            SlotKind::Passphrase {
                salt,
                cost: cost.ok_or(RecordError::Invalid("Argon2id would cost too much or too little"))?,
            }
        }
        2 => {
            let text = std::str::from_utf8(r.string()?).unwrap_or_default();
            // In the one form that is written: the tag is over it.
            let recipient = text.parse::<Recipient>().ok().filter(|recipient| recipient.to_string() == text);
            SlotKind::Recovery { recipient: recipient.ok_or(RecordError::Invalid("no age recipient"))? }
        }
        3 => {
            let (salt, path) = (array(r)?, r.string()?);
            let path = PathBuf::from(OsStr::from_bytes(path));
            if path.as_os_str().len() > MAX_PATH || !path.is_absolute() {
                return Err(RecordError::Invalid("the path of a key file is relative or too long"));
            }
            SlotKind::KeyFile { salt, path }
        }
        4 => {
            let (salt, name) = (array(r)?, label(r.string()?)?);
            if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
                return Err(RecordError::Invalid("that is no name of a credential"));
            }
            SlotKind::Credential { salt, name: name.into() }
        }
        _ => return Err(RecordError::Invalid("no such kind of slot")),
    })
}

/// What the master key is wrapped with.
fn wrapping_key(kind: &SlotKind, secret: &[u8]) -> Result<Zeroizing<[u8; 32]>, SlotError> {
    let from_file = |salt: &[u8; 16], info| {
        if !KEY_FILE_LENGTHS.contains(&secret.len()) {
            return Err(SlotError::Length(secret.len()));
        }
        Ok(master::derive(salt, secret, info)?)
    };
    match kind {
        SlotKind::Passphrase { salt, cost } => seal::stretch(secret, salt, *cost).map_err(|_| SlotError::Memory),
        SlotKind::KeyFile { salt, .. } => from_file(salt, KEY_FILE),
        SlotKind::Credential { salt, .. } => from_file(salt, CREDENTIAL),
        SlotKind::Recovery { .. } => Err(SlotError::Wrong),
    }
}

fn associated(header: &[u8]) -> Vec<u8> {
    [SLOT, header].concat()
}

fn salt() -> Result<[u8; 16], SlotError> {
    let mut salt = [0; 16];
    rand::fill(&mut salt).map_err(|_| SlotError::NoRandom)?;
    Ok(salt)
}

fn array<const N: usize>(r: &mut Reader<'_>) -> Result<[u8; N], RecordError> {
    let mut out = [0; N];
    out.copy_from_slice(r.take(N)?);
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::devices::MAX_LABEL;
    use proptest::prelude::*;

    fn master() -> MasterKey {
        MasterKey::from_bytes(&[7; 32]).unwrap()
    }

    /// One slot of each kind, and what opens it.
    fn all() -> Vec<(KeySlot, Vec<u8>)> {
        let master = master();
        let words = SecretString::from("correct horse");
        let (recovery, key) = KeySlot::recovery(1, "paper", 100, &master).unwrap();
        let file = [5; 32];
        vec![
            (
                KeySlot::passphrase(0, "mine", 100, &master, &words, Cost::bounded(64 * 1024, 1).unwrap()).unwrap(),
                words.expose_secret().as_bytes().to_vec(),
            ),
            (recovery, key.expose_secret().as_bytes().to_vec()),
            (KeySlot::key_file(2, "", 100, &master, Path::new("/etc/key"), &file).unwrap(), file.to_vec()),
            (KeySlot::credential(u32::MAX, "boot", 100, &master, "store", &file).unwrap(), file.to_vec()),
        ]
    }

    #[test]
    fn a_passphrase_that_would_be_taken_for_a_recovery_key_is_none() {
        let key = SecretKey::generate().unwrap().to_text();
        for words in [key.as_str(), " age-secret-key-1 and more"] {
            let words = SecretString::from(words);
            let made = KeySlot::passphrase(0, "", 100, &master(), &words, Cost::bounded(64 * 1024, 1).unwrap());
            assert!(matches!(made, Err(SlotError::RecoveryKey)), "{made:?}");
        }
    }

    #[test]
    fn each_kind_opens_with_its_secret_alone_and_reads_back() {
        for (slot, secret) in all() {
            let read = KeySlot::decode(&slot.number.to_be_bytes(), &slot.encode()).unwrap();
            assert_eq!(read, slot);
            assert_eq!(read.open(&secret).unwrap().bytes(), master().bytes(), "{slot:?}");
            assert!(KeySlot::decode(&7u32.to_be_bytes(), &slot.encode()).is_err(), "{slot:?}");
            let other = SecretKey::generate().unwrap().to_text();
            for wrong in [&[6; 32][..], b"", other.as_bytes()] {
                assert!(slot.open(wrong).is_err(), "{slot:?}");
            }
            assert!(slot.is_of(&master()) && !slot.is_of(&MasterKey::generate().unwrap()));
        }
    }

    #[test]
    fn a_recipient_of_somebody_elses_is_not_believed() {
        let (mut slot, key) = KeySlot::recovery(1, "paper", 100, &master()).unwrap();
        let theirs = SecretKey::generate().unwrap();
        slot.kind = SlotKind::Recovery { recipient: theirs.recipient().unwrap() };
        assert!(!slot.is_of(&master()));
        assert!(matches!(slot.open(key.expose_secret().as_bytes()), Err(SlotError::Damaged)));
        slot.wrapped = age::encrypt(&[theirs.recipient().unwrap()], &[8; 32]).unwrap().into();
        assert!(matches!(slot.open(theirs.to_text().as_bytes()), Err(SlotError::Damaged)));
    }

    #[test]
    fn a_recipient_has_one_form() {
        let (slot, _) = KeySlot::recovery(1, "paper", 100, &master()).unwrap();
        let SlotKind::Recovery { recipient } = slot.kind() else { unreachable!() };
        let (mut bytes, text) = (slot.encode(), recipient.to_string());
        let at = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
        bytes[at..at + text.len()].make_ascii_uppercase();
        assert!(KeySlot::decode(&1u32.to_be_bytes(), &bytes).is_err());
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let file = |path: &str, contents: &[u8]| KeySlot::key_file(0, "", 0, &master(), Path::new(path), contents);
        assert!(matches!(file("/key", &[1; 31]), Err(SlotError::Length(31))));
        assert!(matches!(file("/key", &vec![1; 64 * 1024 + 1]), Err(SlotError::Length(65_537))));
        assert!(matches!(file("key", &[1; 32]), Err(SlotError::TooLong(_))));
        for name in ["", "../key", "a/b", ".", "a\0"] {
            let made = KeySlot::credential(0, "", 0, &master(), name, &[1; 32]);
            assert!(matches!(made, Err(SlotError::TooLong(_))), "{name}");
        }
        let long = "x".repeat(MAX_LABEL + 1);
        assert!(matches!(KeySlot::recovery(0, &long, 0, &master()), Err(SlotError::TooLong(_))));
        for (memory, passes) in [(64 * 1024 - 1, 1), ((1 << 20) + 1, 1), (64 * 1024, 0), (64 * 1024, 1025)] {
            assert!(Cost::bounded(memory, passes).is_none());
        }
    }

    proptest! {
        #[test]
        fn a_changed_record_does_not_open(at: prop::sample::Index, bit in 0u8..8) {
            // Not the passphrase: each try at it costs.
            for (slot, secret) in all_cheap() {
                let mut bytes = slot.encode();
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
                if let Ok(changed) = KeySlot::decode(&slot.number.to_be_bytes(), &bytes) {
                    prop_assert!(changed.open(&secret).is_err());
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes: Vec<u8>) {
            let _ = KeySlot::decode(&[0; 4], &bytes);
            bytes.insert(0, VERSION);
            let _ = KeySlot::decode(&[0; 4], &bytes);
        }
    }

    fn all_cheap() -> Vec<(KeySlot, Vec<u8>)> {
        let master = master();
        let (recovery, key) = KeySlot::recovery(1, "paper", 100, &master).unwrap();
        let file = KeySlot::key_file(2, "x", 100, &master, Path::new("/etc/key"), &[5; 32]).unwrap();
        vec![(recovery, key.expose_secret().as_bytes().to_vec()), (file, [5; 32].to_vec())]
    }
}
