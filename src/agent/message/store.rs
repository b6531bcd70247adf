//! The messages about the encrypted store: how it is made and what opens it. Knows their fields and bounds; no store.

use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};

use super::{
    Answer, Name, RequestError,
    answer::{Entry, put_entries, read_entries, read_text as read_answer_text},
    request::{read_label, read_name, read_secret, read_text},
};
use crate::{
    rfc4251::{Put, Reader, WireError},
    vault::stored::AddSlot,
};

/// The longest path of a key file, in bytes.
const MAX_PATH: usize = 4096;

/// A request about the store. It does not print: it holds a passphrase.
#[derive(Clone)]
pub enum StoreRequest<'a> {
    /// `store`
    Status,
    /// `init`
    Init {
        /// What opens it from then on.
        passphrase: SecretString,
        /// Whether a recovery key is wanted, too.
        recovery: bool,
    },
    /// `add-slot`
    AddSlot {
        /// A passphrase that opens the store, or its recovery key.
        proof: SecretString,
        /// What the slot is for, in its owner's words.
        label: &'a str,
        /// What is to open it.
        add: NewSlot<'a>,
    },
    /// `remove-slot`
    RemoveSlot {
        /// As in `add-slot`.
        proof: SecretString,
        /// Its number.
        number: u32,
    },
    /// `change-passphrase`
    ChangePassphrase {
        /// The passphrase as it is, or the recovery key.
        old: SecretString,
        /// As it is to be.
        new: SecretString,
    },
}

/// What is to open a slot.
#[derive(Clone)]
pub enum NewSlot<'a> {
    /// This passphrase.
    Passphrase(SecretString),
    /// A new recovery key.
    Recovery,
    /// The file at this absolute path.
    KeyFile(&'a str),
    /// The credential of systemd's with this name.
    Credential(&'a str),
}

impl NewSlot<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Self::Passphrase(_) => "passphrase",
            Self::Recovery => "recovery",
            Self::KeyFile(_) => "key-file",
            Self::Credential(_) => "credential",
        }
    }

    fn value(&self) -> &str {
        match self {
            Self::Passphrase(passphrase) => passphrase.expose_secret(),
            Self::Recovery => "",
            Self::KeyFile(value) | Self::Credential(value) => value,
        }
    }

    /// In the vault's words.
    pub fn to_add(&self) -> AddSlot {
        match self {
            Self::Passphrase(passphrase) => AddSlot::Passphrase(passphrase.clone()),
            Self::Recovery => AddSlot::Recovery,
            Self::KeyFile(path) => AddSlot::KeyFile(PathBuf::from(path)),
            Self::Credential(name) => AddSlot::Credential((*name).to_owned()),
        }
    }
}

impl<'a> StoreRequest<'a> {
    /// Reads the fields of the message with this name; `None` for one that is about something else.
    pub(super) fn read(name: Name, r: &mut Reader<'a>) -> Result<Option<Self>, RequestError> {
        Ok(Some(match name {
            Name::Store => Self::Status,
            Name::Init => Self::Init { passphrase: read_secret(r)?, recovery: r.bool()? },
            Name::AddSlot => {
                let (proof, kind, label) = (read_secret(r)?, r.string()?, read_name(r)?);
                let add = match kind {
                    b"passphrase" => NewSlot::Passphrase(read_secret(r)?),
                    b"recovery" => match r.string()? {
                        b"" => NewSlot::Recovery,
                        _ => return Err(RequestError::Invalid("a recovery key is made by the daemon")),
                    },
                    b"key-file" => match read_text(r)? {
                        path if path.starts_with('/') && path.len() <= MAX_PATH => NewSlot::KeyFile(path),
                        _ => return Err(RequestError::Invalid("a key file is named by its absolute path")),
                    },
                    b"credential" => NewSlot::Credential(read_label(r)?),
                    _ => return Err(RequestError::Unknown("kind of slot")),
                };
                Self::AddSlot { proof, label, add }
            }
            Name::RemoveSlot => Self::RemoveSlot { proof: read_secret(r)?, number: r.u32()? },
            Name::ChangePassphrase => Self::ChangePassphrase { old: read_secret(r)?, new: read_secret(r)? },
            _ => return Ok(None),
        }))
    }

    /// The message that it is.
    pub fn name(&self) -> Name {
        match self {
            Self::Status => Name::Store,
            Self::Init { .. } => Name::Init,
            Self::AddSlot { .. } => Name::AddSlot,
            Self::RemoveSlot { .. } => Name::RemoveSlot,
            Self::ChangePassphrase { .. } => Name::ChangePassphrase,
        }
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let secret = |secret: &SecretString, out: &mut Vec<u8>| out.put_string(secret.expose_secret().as_bytes());
        match self {
            Self::Status => {}
            Self::Init { passphrase, recovery } => {
                secret(passphrase, out);
                out.push((*recovery).into());
            }
            Self::AddSlot { proof, label, add } => {
                secret(proof, out);
                [add.kind(), label, add.value()].into_iter().for_each(|text| out.put_string(text.as_bytes()));
            }
            Self::RemoveSlot { proof, number } => {
                secret(proof, out);
                out.put_u32(*number);
            }
            Self::ChangePassphrase { old, new } => {
                secret(old, out);
                secret(new, out);
            }
        }
    }
}

/// What there is of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreStatus<'a> {
    /// `none`, `locked` or `open`.
    pub state: &'a str,
    /// What opens it; at most 32.
    pub slots: Vec<SlotEntry<'a>>,
    /// What became of a damaged state file when the daemon started; empty where nothing did.
    pub report: &'a str,
}

/// A slot of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotEntry<'a> {
    /// By which it is named.
    pub number: u32,
    /// `passphrase`, `recovery`, `key-file` or `credential`.
    pub kind: &'a str,
    /// What it is for, in its owner's words; may be empty.
    pub label: &'a str,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// What is known of it besides: the recovery key's age recipient, the key file's path, the credential's name.
    pub what: &'a str,
}

impl<'a> Answer<'a> for SlotEntry<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.number);
        [self.kind, self.label].into_iter().for_each(|text| out.put_string(text.as_bytes()));
        out.put_u64(self.created);
        out.put_string(self.what.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self {
            number: r.u32()?,
            kind: read_answer_text(r)?,
            label: read_answer_text(r)?,
            created: r.u64()?,
            what: read_answer_text(r)?,
        })
    }
}

impl<'a> Entry<'a> for SlotEntry<'a> {}

impl<'a> Answer<'a> for StoreStatus<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.state.as_bytes());
        put_entries(out, &self.slots);
        out.put_string(self.report.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self { state: read_answer_text(r)?, slots: read_entries(r)?, report: read_answer_text(r)? })
    }
}

/// A slot that was made. It does not print: it may hold the recovery key.
#[derive(Clone, PartialEq, Eq)]
pub struct SlotMade<'a> {
    /// Its number.
    pub number: u32,
    /// The recovery key, which is told here and never again; empty where none was made.
    pub recovery: &'a str,
}

impl<'a> Answer<'a> for SlotMade<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.number);
        out.put_string(self.recovery.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self { number: r.u32()?, recovery: read_answer_text(r)? })
    }

    fn encoded_len(&self) -> usize {
        4 + 4 + self.recovery.len()
    }
}
