//! Our messages, as docs/protocol.md has them: bytes ↔ requests and answers, in both directions. Knows no vault and no
//! connection; the client library and the tests use the direction that the daemon does not.
//!
//! Requests borrow from their frame. Frames that carry secrets ([`Name::brings_secrets`], and the answers to whatever
//! [`Name::gives_secrets`]) are to be wiped by whoever holds them.

pub mod answer;
pub mod audit;
pub mod carry;
pub mod code;
pub mod compatible;
pub mod request;
pub mod store;
pub mod stored;

use thiserror::Error;

pub use answer::{
    Answer, Cancelled, Checked, Collected, DeviceEntry, Entry, Finished, KeyEntry, Made, Page, PinState, Place,
    RefusalEntry, fitting,
};
pub use carry::{CarryRequest, MAX_PART, OfferEntry, PackedEntry, TakenInEntry};
pub use code::{Code, Failure};
pub use request::{Collect, How, KeyUse, Paging, Request, Submit, Target};
pub use store::{NewSlot, SlotEntry, SlotMade, StoreRequest, StoreStatus};
pub use stored::StoredRequest;

pub use crate::devices::scheme;

use super::wire::{number, put_frame};
use crate::{
    devices::card::CardFormError,
    rfc4251::{Put, Reader, WireError},
};

/// The longest deadline, and the longest time that a `collect` waits, in milliseconds: an hour.
pub const MAX_WAIT_MS: u32 = 3_600_000;
/// The most bytes that one `random` gives.
pub const MAX_RANDOM: u32 = 1024;
/// The longest cursor of a paged list, in bytes.
pub const MAX_CURSOR: usize = 64;
/// The longest PIN or passphrase that an `unlock` takes, in bytes.
pub const MAX_SECRET: usize = 1024;

/// What the names of our messages end in.
pub const DOMAIN: &str = "@strongroom.alt";

macro_rules! names {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Our messages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Name {
            $($(#[$doc])* $variant,)*
        }

        impl Name {
            /// Every message.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in a frame, and in the answer to `query`.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($name, "@strongroom.alt"),)*
                }
            }
        }
    };
}

names! {
    /// Lists the keys.
    Keys = "keys",
    /// Lists the devices.
    Devices = "devices",
    /// Signs.
    Sign = "sign",
    /// Decrypts.
    Decrypt = "decrypt",
    /// Agrees on a secret.
    Derive = "derive",
    /// Asks for one of the above without waiting for it.
    Submit = "submit",
    /// Takes what has been finished of it.
    Collect = "collect",
    /// Gives one of them up.
    Cancel = "cancel",
    /// Gives a device or key its PIN or passphrase.
    Unlock = "unlock",
    /// Makes a device want its PIN again.
    Lock = "lock",
    /// Wipes cached secrets.
    Forget = "forget",
    /// Lists the last refusals.
    Why = "why",
    /// Gives random bytes.
    Random = "random",
    /// Tells how far the audit log is written.
    Audit = "audit",
    /// Tells what would become of a use.
    Check = "check",
    /// Makes a key on a device.
    Generate = "generate",
    /// Moves a key from memory to a device.
    Import = "import",
    /// Names a key.
    Rename = "rename",
    /// Says what a key may do.
    Allow = "allow",
    /// Deletes a key.
    Delete = "delete",
    /// Tells what an OpenPGP card says of itself.
    CardStatus = "card-status",
    /// Changes an OpenPGP card.
    ChangeCard = "change-card",
    /// Tells of the encrypted store.
    Store = "store",
    /// Makes the encrypted store.
    Init = "init",
    /// Adds something that opens it.
    AddSlot = "add-slot",
    /// Takes something away that opens it.
    RemoveSlot = "remove-slot",
    /// Puts another passphrase in place of one.
    ChangePassphrase = "change-passphrase",
    /// Makes a backup of the store, which is then fetched.
    Backup = "backup",
    /// Gets a piece of what was made on this connection.
    Fetch = "fetch",
    /// Brings a piece of what is to be taken in.
    Upload = "upload",
    /// Takes a backup in.
    Restore = "restore",
    /// Offers to take keys of another vault in.
    TransferOffer = "transfer-offer",
    /// Wraps keys for another vault's offer.
    TransferWrap = "transfer-wrap",
    /// Tells the fingerprint of a wrap.
    TransferLook = "transfer-look",
    /// Takes the keys of a wrap in.
    TransferAccept = "transfer-accept",
    /// Puts a private key into the encrypted store.
    ImportKey = "import-key",
    /// Changes what a stored key may be used for.
    SetKey = "set-key",
    /// Offers a stored key with a certificate, too.
    Attach = "attach",
    /// Gives a stored key's private half, sealed by a passphrase.
    Export = "export",
    /// Makes a successor of a stored key.
    Rotate = "rotate",
}

impl Name {
    /// The message with this name.
    pub fn from_bytes(name: &[u8]) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.as_str().as_bytes() == name)
    }

    /// Without the domain: for logs, and as the operation inside a `submit`.
    pub fn short(self) -> &'static str {
        let name = self.as_str();
        name.strip_suffix(DOMAIN).unwrap_or(name)
    }

    /// Whether it may overlap with others of its kind on one connection: what takes a device its time.
    pub fn is_key_operation(self) -> bool {
        matches!(self, Self::Sign | Self::Decrypt | Self::Derive | Self::Submit | Self::Collect | Self::Cancel)
            || matches!(self, Self::Generate | Self::Import | Self::CardStatus | Self::ChangeCard | Self::Rotate)
    }

    /// Whether its request carries a secret.
    pub fn brings_secrets(self) -> bool {
        matches!(self, Self::Unlock | Self::Generate | Self::Import | Self::ChangeCard | Self::Allow | Self::Delete)
            || matches!(self, Self::Init | Self::AddSlot | Self::RemoveSlot | Self::ChangePassphrase)
            || matches!(self, Self::Backup | Self::Restore)
            || matches!(self, Self::TransferOffer | Self::TransferWrap | Self::TransferAccept)
            || matches!(self, Self::ImportKey | Self::SetKey | Self::Export)
    }

    /// Whether its answer may carry a secret.
    pub fn gives_secrets(self) -> bool {
        matches!(self, Self::Decrypt | Self::Derive | Self::Collect | Self::Random | Self::Init | Self::AddSlot)
    }
}

/// Why a request cannot be handled.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// Fields are missing, left over or of the wrong kind: answered with SSH_AGENT_EXTENSION_FAILURE.
    #[error("the message is malformed: {0}")]
    Malformed(#[from] WireError),
    /// The fields are there and make no sense.
    #[error("{0}")]
    Invalid(&'static str),
    /// The scheme or operation has a name that nobody here knows.
    #[error("this version does not know the {0}")]
    Unknown(&'static str),
}

impl From<CardFormError> for RequestError {
    fn from(error: CardFormError) -> Self {
        match error {
            CardFormError::Malformed(error) => Self::Malformed(error),
            CardFormError::TooLong => Self::Invalid("PINs on cards have at most 127 bytes, and texts 1024"),
            CardFormError::Unknown => Self::Unknown("change of a card, or a name in it"),
        }
    }
}

impl RequestError {
    /// What the caller is told; `None` where the frame is answered with SSH_AGENT_EXTENSION_FAILURE.
    pub fn failure(&self) -> Option<Failure> {
        let code = match self {
            Self::Malformed(_) => return None,
            Self::Invalid(_) => Code::BadRequest,
            Self::Unknown(_) => Code::Unsupported,
        };
        Some(Failure::new(code, self.to_string()))
    }
}

/// Appends the frame that answers a message of this name.
pub fn put_reply<'a, T: Answer<'a>>(out: &mut Vec<u8>, name: Name, reply: Result<&T, &Failure>) {
    // The buffer grows before the answer is in it, so that growing leaves no copy of a secret behind.
    let head = 4 + 1 + 4 + name.as_str().len() + 1;
    out.reserve(head + reply.map_or_else(Failure::encoded_len, T::encoded_len));
    put_frame(out, number::EXTENSION_RESPONSE, |out| {
        out.put_string(name.as_str().as_bytes());
        put_outcome(out, reply);
    });
}

/// Appends `byte 0` and the answer, or `byte 1` and the failure.
fn put_outcome<'a, T: Answer<'a>>(out: &mut Vec<u8>, outcome: Result<&T, &Failure>) {
    match outcome {
        Ok(answer) => {
            out.push(0);
            answer.put(out);
        }
        Err(failure) => {
            out.push(1);
            failure.put(out);
        }
    }
}

/// Why an agent's reply holds no answer of ours.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ReplyError {
    /// SSH_AGENT_FAILURE: this agent, or this door of it, does not speak the message.
    #[error("the agent does not speak this message here")]
    NotSpoken,
    /// SSH_AGENT_EXTENSION_FAILURE: the agent could not read the request.
    #[error("the agent could not read the request")]
    Unreadable,
    /// The reply is to another message, or of a kind that no request of ours has.
    #[error("the agent's reply is not to this request")]
    Unexpected,
    /// The reply is cut off or broken.
    #[error("the agent's reply is malformed: {0}")]
    Malformed(#[from] WireError),
}

/// Reads the reply to a message of this name from a frame's body. Bytes behind the fields that we know are ignored:
/// they are a newer daemon's.
pub fn read_reply<'a, T: Answer<'a>>(name: Name, body: &'a [u8]) -> Result<Result<T, Failure>, ReplyError> {
    let mut r = Reader::new(body);
    match r.u8()? {
        number::FAILURE => return Err(ReplyError::NotSpoken),
        number::EXTENSION_FAILURE => return Err(ReplyError::Unreadable),
        number::EXTENSION_RESPONSE => {}
        _ => return Err(ReplyError::Unexpected),
    }
    if r.string()? != name.as_str().as_bytes() {
        return Err(ReplyError::Unexpected);
    }
    read_outcome(&mut r)
}

fn read_outcome<'a, T: Answer<'a>>(r: &mut Reader<'a>) -> Result<Result<T, Failure>, ReplyError> {
    match r.u8()? {
        0 => Ok(Ok(T::read(r)?)),
        1 => Ok(Err(Failure::read(r)?)),
        _ => Err(ReplyError::Unexpected),
    }
}

#[cfg(test)]
mod tests;
