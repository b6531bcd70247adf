//! The messages about keys that leave the vault or come into it: backups and transfers. Knows their fields and bounds; no
//! vault.
//!
//! What is longer than a frame goes in pieces: `fetch` gets what `backup` or `transfer-wrap` has made on this connection,
//! `upload` brings what `restore` and `transfer-accept` are about.

use secrecy::{ExposeSecret, SecretString};

use super::{
    Answer, Name, RequestError,
    answer::read_text as read_answer_text,
    request::{read_blob, read_name, read_secret, read_text},
};
use crate::{
    rfc4251::{Put, Reader, WireError},
    vault::{
        backup::MAX_RECIPIENTS,
        transfer::{MAX_NAME, MAX_OFFER},
    },
};

/// The longest piece, in bytes.
pub const MAX_PART: usize = 128 * 1024;
/// The most keys that one `transfer-wrap` names.
pub const MAX_WRAPPED: usize = 1024;
/// The longest age recipient, and the longest fingerprint, in bytes.
const MAX_WORD: usize = 128;

/// A request about a backup or a transfer. It does not print: it holds a passphrase.
#[derive(Clone)]
pub enum CarryRequest<'a> {
    /// `backup`
    Backup {
        /// A passphrase that opens the store, or its recovery key.
        proof: SecretString,
        /// Age recipients that can read it, beside the recovery keys.
        recipients: Vec<&'a str>,
    },
    /// `fetch` from here on.
    Fetch(u64),
    /// `upload`
    Upload {
        /// Where the piece belongs: behind the one before, or 0.
        offset: u64,
        /// The piece.
        bytes: &'a [u8],
    },
    /// `restore` of what was uploaded.
    Restore {
        /// As in `backup`.
        proof: SecretString,
        /// The recovery key, or the other age key, that the backup is encrypted to.
        key: SecretString,
    },
    /// `transfer-offer`
    TransferOffer {
        /// As in `backup`.
        proof: SecretString,
        /// What this vault calls itself.
        name: &'a str,
    },
    /// `transfer-wrap`
    TransferWrap {
        /// As in `backup`.
        proof: SecretString,
        /// The target's offer.
        offer: &'a [u8],
        /// Its fingerprint, as the target shows it.
        fingerprint: &'a str,
        /// The keys' blobs.
        keys: Vec<&'a [u8]>,
    },
    /// `transfer-look` at what was uploaded.
    TransferLook,
    /// `transfer-accept` of what was uploaded.
    TransferAccept {
        /// As in `backup`.
        proof: SecretString,
        /// The fingerprint over offer and wrap, as the source shows it.
        fingerprint: &'a str,
    },
}

impl<'a> CarryRequest<'a> {
    /// Reads the fields of the message with this name; `None` for one that is about something else.
    pub(super) fn read(name: Name, r: &mut Reader<'a>) -> Result<Option<Self>, RequestError> {
        Ok(Some(match name {
            Name::Backup => Self::Backup {
                proof: read_secret(r)?,
                recipients: list(r, MAX_RECIPIENTS, "a backup has at most 16 recipients", word)?,
            },
            Name::Fetch => Self::Fetch(r.u64()?),
            Name::Upload => {
                let (offset, bytes) = (r.u64()?, r.string()?);
                if bytes.len() > MAX_PART {
                    return Err(RequestError::Invalid("a piece has at most 128 KiB"));
                }
                Self::Upload { offset, bytes }
            }
            Name::Restore => Self::Restore { proof: read_secret(r)?, key: read_secret(r)? },
            Name::TransferOffer => {
                let (proof, name) = (read_secret(r)?, read_name(r)?);
                if name.len() > MAX_NAME {
                    return Err(RequestError::Invalid("a vault's name has at most 128 bytes"));
                }
                Self::TransferOffer { proof, name }
            }
            Name::TransferWrap => {
                let (proof, offer) = (read_secret(r)?, r.string()?);
                if offer.len() > MAX_OFFER {
                    return Err(RequestError::Invalid("an offer has at most 512 bytes"));
                }
                let fingerprint = word(r)?;
                let keys = list(r, MAX_WRAPPED, "at most 1024 keys are wrapped at once", read_blob)?;
                Self::TransferWrap { proof, offer, fingerprint, keys }
            }
            Name::TransferLook => Self::TransferLook,
            Name::TransferAccept => Self::TransferAccept { proof: read_secret(r)?, fingerprint: word(r)? },
            _ => return Ok(None),
        }))
    }

    /// The message that it is.
    pub fn name(&self) -> Name {
        match self {
            Self::Backup { .. } => Name::Backup,
            Self::Fetch(_) => Name::Fetch,
            Self::Upload { .. } => Name::Upload,
            Self::Restore { .. } => Name::Restore,
            Self::TransferOffer { .. } => Name::TransferOffer,
            Self::TransferWrap { .. } => Name::TransferWrap,
            Self::TransferLook => Name::TransferLook,
            Self::TransferAccept { .. } => Name::TransferAccept,
        }
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let secret = |out: &mut Vec<u8>, secret: &SecretString| out.put_string(secret.expose_secret().as_bytes());
        match self {
            Self::Backup { proof, recipients } => {
                secret(out, proof);
                out.put_u32(recipients.len() as u32);
                recipients.iter().for_each(|recipient| out.put_string(recipient.as_bytes()));
            }
            Self::Fetch(offset) => out.put_u64(*offset),
            Self::Upload { offset, bytes } => {
                out.put_u64(*offset);
                out.put_string(bytes);
            }
            Self::Restore { proof, key } => {
                secret(out, proof);
                secret(out, key);
            }
            Self::TransferOffer { proof, name } => {
                secret(out, proof);
                out.put_string(name.as_bytes());
            }
            Self::TransferWrap { proof, offer, fingerprint, keys } => {
                secret(out, proof);
                out.put_string(offer);
                out.put_string(fingerprint.as_bytes());
                out.put_u32(keys.len() as u32);
                keys.iter().for_each(|key| out.put_string(key));
            }
            Self::TransferLook => {}
            Self::TransferAccept { proof, fingerprint } => {
                secret(out, proof);
                out.put_string(fingerprint.as_bytes());
            }
        }
    }
}

fn word<'a>(r: &mut Reader<'a>) -> Result<&'a str, RequestError> {
    let word = read_text(r)?;
    if word.len() > MAX_WORD {
        return Err(RequestError::Invalid("a recipient or fingerprint has at most 128 bytes"));
    }
    Ok(word)
}

fn list<'a, T>(
    r: &mut Reader<'a>,
    max: usize,
    otherwise: &'static str,
    mut item: impl FnMut(&mut Reader<'a>) -> Result<T, RequestError>,
) -> Result<Vec<T>, RequestError> {
    let count = r.u32()? as usize;
    if count > max {
        return Err(RequestError::Invalid(otherwise));
    }
    (0..count).map(|_| item(r)).collect()
}

/// What `backup` and `transfer-wrap` have made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedEntry<'a> {
    /// How long it is, in bytes: what is to be fetched.
    pub length: u64,
    /// How many keys are in it.
    pub keys: u32,
    /// How many are not, since they are not exportable.
    pub left_out: u32,
    /// How many are not, since their records are damaged.
    pub damaged: u32,
    /// The fingerprint over offer and wrap; empty of a backup.
    pub fingerprint: &'a str,
}

impl<'a> Answer<'a> for PackedEntry<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_u64(self.length);
        [self.keys, self.left_out, self.damaged].into_iter().for_each(|count| out.put_u32(count));
        out.put_string(self.fingerprint.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self {
            length: r.u64()?,
            keys: r.u32()?,
            left_out: r.u32()?,
            damaged: r.u32()?,
            fingerprint: read_answer_text(r)?,
        })
    }
}

/// What became of keys that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenInEntry {
    /// How many are new here.
    pub new: u32,
    /// How many were here before, and stay as they are.
    pub present: u32,
    /// How many are left out, since their halves do not belong together.
    pub damaged: u32,
}

impl Answer<'_> for TakenInEntry {
    fn put(&self, out: &mut Vec<u8>) {
        [self.new, self.present, self.damaged].into_iter().for_each(|count| out.put_u32(count));
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self { new: r.u32()?, present: r.u32()?, damaged: r.u32()? })
    }
}

/// An offer, in the answers to `transfer-offer` and `transfer-look`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferEntry<'a> {
    /// What the source gets.
    pub offer: &'a [u8],
    /// The offer's own fingerprint after `transfer-offer`; that over offer and wrap after `transfer-look`.
    pub fingerprint: &'a str,
}

impl<'a> Answer<'a> for OfferEntry<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.offer);
        out.put_string(self.fingerprint.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self { offer: r.string()?, fingerprint: read_answer_text(r)? })
    }
}
