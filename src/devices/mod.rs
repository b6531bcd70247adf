//! Devices: what they are asked, how they can fail, and how they are kept from making anybody wait. Knows keys, schemes
//! and signatures; never the vault or a peer.
//!
//! A [`Driver`] is code for one kind of device. The vault holds [`Device`]s: handles with a queue, a deadline for each
//! operation and a state, behind which a driver works in this process or in a child process of its own.

pub mod call;
pub mod card;
pub mod compute;
pub mod device;
pub mod host;
pub mod in_process;
pub mod life;
#[cfg(feature = "openpgp")]
pub mod openpgp;
pub mod operation;
pub mod pkcs11;
pub mod scheme;
#[cfg(feature = "scripted")]
pub mod scripted;
pub mod sk;
pub mod soft;
pub mod turns;
pub mod verify;
mod want;
mod worker;

use std::{borrow::Cow, fmt, future::Future, sync::Arc};

use secrecy::SecretString;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{public_key::KeyType, rfc4251::Reader};

pub use want::{Deed, Want, Wanted};

pub use card::{CardChange, CardPin, CardStatus, CardText};
pub use device::{Counters, Device, Patience, Settings};
pub use life::{Algorithm, CardSlot, NewKey, PrivateHalf, Touch};
pub use operation::{DecryptScheme, DeriveScheme, Hash, Input, Operation, Outcome, Scheme, Signature};

/// Encrypts a secret when the vault is locked.
pub type Seal<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Box<[u8]>, DeviceError>;
/// Decrypts what a [`Seal`] made.
pub type Open<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError>;

/// The longest [`Slot`], in bytes.
pub const MAX_SLOT: usize = 256;
/// The most keys that a scan may find on one device.
pub const MAX_KEYS: usize = 4096;
/// The most notes that a scan makes.
pub const MAX_NOTES: usize = 32;
/// The longest public key or certificate on a device, in bytes.
pub const MAX_BLOB: usize = 16 * 1024;
/// The longest label of a key, name or serial of a device, in bytes.
pub const MAX_LABEL: usize = 256;

/// Why a device did not do what it was asked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The key is sealed by `ssh-add -x`: unlock the vault and ask again.
    #[error("the vault is locked; `ssh-add -X` unlocks it")]
    Sealed,
    /// The device wants a PIN first: ask its holder, then ask again with it.
    #[error("a PIN is needed")]
    PinRequired,
    /// The device wants its PIN for each such use, given for this one: ask its holder, log in with what they give, and ask
    /// again. A PIN that was kept is not meant.
    #[error("the device wants its PIN for each use of this key")]
    PinEachTime,
    /// The PIN was refused: by the device, which spends a try, or because no PIN of it can be so short or long. Never send
    /// the same PIN again.
    #[error("the PIN is wrong{}", tries(*.left))]
    PinWrong {
        /// The tries that are left, where the device says.
        left: Option<u8>,
    },
    /// No try is left: only the device's administrator can help, with its PUK or SO PIN.
    #[error(
        "the PIN is blocked; unblock it with the device's own tools, an OpenPGP card's with `strongroom card reset-pin`"
    )]
    PinBlocked,
    /// The touch that the device waited for did not come: ask again when somebody is there.
    #[error("the device was not touched")]
    NotTouched,
    /// The device is here and has no such key: it was deleted, or the device was initialised anew.
    #[error("the device does not have this key any more")]
    NoSuchKey,
    /// The device is not here: plug it in and ask again.
    #[error("the device is not connected")]
    Absent,
    /// The device or the key cannot do this, now or ever.
    #[error("this cannot be done: {0}")]
    Unsupported(Cow<'static, str>),
    /// The input is longer than the device takes: hash it first where the scheme allows.
    #[error("the input is too long for the device, which takes {max} bytes")]
    TooLong {
        /// The longest that it takes, in bytes.
        max: usize,
    },
    /// More work is waiting than the device's queue holds: ask again later.
    #[error("too much work is waiting for the device")]
    Busy,
    /// Another program has the device for itself: end it, or ask again later.
    #[error("another program has the device for itself; end that program, or try again when it is done")]
    InUse,
    /// The deadline passed before there was a result.
    #[error("the device did not answer in time")]
    Timeout,
    /// The device's process died or was restarted with the request inside it: what became of it there is not known. A
    /// signature can be asked for again; a login counts as refused.
    #[error("the device's process was restarted in mid-operation")]
    Restarted,
    /// The device was taken out of the vault, by its configuration or with the last of its keys.
    #[error("the device was taken away")]
    Gone,
    /// Anything else; the words are for a person.
    #[error("{0}")]
    Failed(String),
}

impl DeviceError {
    /// That a key cannot do something.
    pub const fn unsupported(why: &'static str) -> Self {
        Self::Unsupported(Cow::Borrowed(why))
    }

    /// Whether a driver that answers a login so has not tried the PIN.
    pub fn is_of_no_login(&self) -> bool {
        matches!(self, Self::InUse | Self::Busy | Self::Unsupported(_) | Self::PinRequired)
    }

    /// Whether another device with the same key may be asked in place of this one: never after a person or a PIN
    /// decided, nor when the outcome would be the same.
    pub fn lets_another_try(&self) -> bool {
        matches!(self, Self::Absent | Self::Busy | Self::InUse | Self::Restarted | Self::Gone | Self::Failed(_))
    }
}

fn tries(left: Option<u8>) -> String {
    match left {
        Some(1) => "; 1 try is left".to_owned(),
        Some(left) => format!("; {left} tries are left"),
        None => String::new(),
    }
}

const NO_CARD: DeviceError = DeviceError::unsupported("this kind of device is no OpenPGP card");

/// Code for one kind of device. It never knows whether it runs in the daemon's process, where it must not block, or in a
/// child process, where each lane is a thread and it may.
pub trait Driver: Send + Sync + Sized + 'static {
    /// What tells it which device to open.
    type Config: Send;
    /// `pkcs11`, `openpgp`, …: the name in the configuration.
    const KIND: &'static str;

    /// Opens the device. [`Absent`](DeviceError::Absent) when it is not here; it is asked again later.
    fn open(config: Self::Config) -> impl Future<Output = Result<Self, DeviceError>> + Send;

    /// How many operations it does at once: at least 1.
    fn lanes(&self) -> usize;

    /// Looks for keys. Spends no PIN try.
    fn scan(&self) -> impl Future<Output = Result<Scan, DeviceError>> + Send;

    /// Signs. The result is in the scheme's own form (see [`Signature`]).
    fn sign(
        &self,
        slot: &Slot,
        scheme: Scheme,
        input: &Input<'_>,
    ) -> impl Future<Output = Result<Vec<u8>, DeviceError>> + Send;

    /// Decrypts.
    fn decrypt(
        &self,
        slot: &Slot,
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
    ) -> impl Future<Output = Result<Zeroizing<Vec<u8>>, DeviceError>> + Send {
        let _ = (slot, scheme, label, ciphertext);
        async { Err(DeviceError::unsupported("this kind of device does not decrypt")) }
    }

    /// Agrees on a secret.
    fn derive(
        &self,
        slot: &Slot,
        scheme: DeriveScheme,
        peer: &[u8],
    ) -> impl Future<Output = Result<Zeroizing<Vec<u8>>, DeviceError>> + Send {
        let _ = (slot, scheme, peer);
        async { Err(DeviceError::unsupported("this kind of device derives no secrets")) }
    }

    /// `len` random bytes of the device's own making, at most 1,024.
    fn random(&self, len: usize) -> impl Future<Output = Result<Zeroizing<Vec<u8>>, DeviceError>> + Send {
        let _ = len;
        async { Err(DeviceError::unsupported("this kind of device gives no random bytes")) }
    }

    /// Makes a key. What it asks for is checked with what the device can; nothing of it is left out in silence.
    /// [`PinRequired`](DeviceError::PinRequired) where the device wants its user's PIN first,
    /// [`PinWrong`](DeviceError::PinWrong) where it refuses [`NewKey::secret`].
    fn generate(&self, new: &NewKey) -> impl Future<Output = Result<FoundKey, DeviceError>> + Send {
        let _ = new;
        async { Err(DeviceError::unsupported("this kind of device makes no keys")) }
    }

    /// Takes over a private key that was made elsewhere; otherwise like [`generate`](Self::generate).
    fn import(
        &self,
        new: &NewKey,
        private: &PrivateHalf,
    ) -> impl Future<Output = Result<FoundKey, DeviceError>> + Send {
        let _ = (new, private);
        async { Err(DeviceError::unsupported("this kind of device takes no keys from elsewhere")) }
    }

    /// Calls a key something else: `label` is what [`FoundKey::label`] is from now on. The key keeps its slot.
    fn rename(&self, slot: &Slot, label: &str) -> impl Future<Output = Result<(), DeviceError>> + Send {
        let _ = (slot, label);
        async { Err(DeviceError::unsupported("this kind of device keeps no names of keys")) }
    }

    /// Deletes a key for good, with its certificates.
    fn delete(&self, slot: &Slot) -> impl Future<Output = Result<(), DeviceError>> + Send {
        let _ = slot;
        async { Err(DeviceError::unsupported("this kind of device deletes no single keys")) }
    }

    /// What an OpenPGP card says of itself. Spends no PIN try.
    fn card_status(&self) -> impl Future<Output = Result<CardStatus, DeviceError>> + Send {
        async { Err(NO_CARD) }
    }

    /// Changes an OpenPGP card. A PIN is sent once at most, and not as the last try unless
    /// [`card_status`](Self::card_status) told that it is the last. [`PinWrong`](DeviceError::PinWrong) and
    /// [`PinBlocked`](DeviceError::PinBlocked) are about the PIN that was to allow it.
    fn change_card(&self, change: &CardChange) -> impl Future<Output = Result<(), DeviceError>> + Send {
        let _ = change;
        async { Err(NO_CARD) }
    }

    /// Logs in. Called once with each PIN, one call at a time. [`InUse`](DeviceError::InUse), [`Busy`](DeviceError::Busy)
    /// and [`Unsupported`](DeviceError::Unsupported) say that the PIN was not tried: then it may be sent again. So does
    /// [`PinRequired`](DeviceError::PinRequired), when one try is left and not `even_last`: whoever gave the PIN did not know.
    fn unlock(&self, pin: SecretString, even_last: bool) -> impl Future<Output = Result<(), DeviceError>> + Send {
        let _ = (pin, even_last);
        async { Err(DeviceError::unsupported("this kind of device has no PIN")) }
    }

    /// Logs out, so that a PIN is needed again.
    fn lock(&self) -> impl Future<Output = Result<(), DeviceError>> + Send {
        async { Ok(()) }
    }

    /// How the device is, without using a key and without spending a PIN try. Called when it has been idle for a while, and
    /// after a login that failed.
    fn health(&self) -> impl Future<Output = Result<Status, DeviceError>> + Send;
}

/// Names a key on its device: what a scan gave. It means something to the driver only, and outlives the process, so that
/// a key can be registered while its device is away.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub Arc<[u8]>);

impl FoundKey {
    /// The type in its blob; `None` for a type that is not known here.
    pub fn key_type(&self) -> Option<KeyType> {
        let mut reader = Reader::new(&self.blob);
        KeyType::from_name(reader.string().ok()?).map(|(key_type, _)| key_type)
    }
}

/// What a scan found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// The keys, at most [`MAX_KEYS`].
    pub keys: Vec<FoundKey>,
    /// Whether there are no others: a key that was here before is then gone. False where some show only after a login.
    pub complete: bool,
    /// How the device is.
    pub status: Status,
    /// What people should know of the device: keys that are left out, and why. At most [`MAX_NOTES`] of [`MAX_LABEL`] bytes.
    pub notes: Vec<String>,
}

/// A key on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundKey {
    /// Its name there.
    pub slot: Slot,
    /// The public key's blob (RFC 4253, 6.6), at most [`MAX_BLOB`] bytes.
    pub blob: Box<[u8]>,
    /// Its certificates' blobs.
    pub certificates: Vec<Box<[u8]>>,
    /// For people, at most [`MAX_LABEL`] bytes.
    pub label: String,
    /// How it signs; what is not here is [`Unsupported`](DeviceError::Unsupported).
    pub schemes: Vec<Scheme>,
    /// How it decrypts.
    pub decrypts: Vec<DecryptScheme>,
    /// How it agrees on secrets.
    pub derives: Vec<DeriveScheme>,
    /// Whether each use wants a touch: it then has the deadline of a person.
    pub touch: bool,
    /// Whether ssh is offered it, where its type is one of ssh's. Other keys are for our own messages.
    pub ssh: bool,
    /// What else people may want to know of it, as a fingerprint of another system: at most [`MAX_LABEL`] bytes.
    pub note: String,
}

/// How a device is that answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// What tells this token from others of its kind, at most [`MAX_LABEL`] bytes; empty where it has none. PINs belong
    /// to it.
    pub serial: String,
    /// Whether a PIN is needed before keys can be used.
    pub locked: bool,
    /// PIN tries that are left, where the device says.
    pub tries_left: Option<u8>,
    /// Changes whenever the keys may have: then they are looked for again.
    pub generation: u64,
}

/// How a device is, seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// Whether it works.
    pub health: Health,
    /// What it last said of itself; `None` before it first answered.
    pub status: Option<Status>,
    /// The keys that the last scan found; `None` before there was one.
    pub scan: Option<Arc<Scan>>,
}

/// Whether a device works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is being opened, and has not been ready since the start.
    Probing,
    /// It takes work.
    Ready,
    /// All its lanes are at work.
    Busy,
    /// An operation has outlived its time inside the driver. The device takes no new work and is about to be restarted.
    Stalled,
    /// It is being opened again.
    Restarting,
    /// It is not here. It is looked for in the background.
    Absent,
    /// It cannot be opened or keeps dying, for this reason. It is tried again in the background.
    Failed(String),
}

impl Health {
    /// `probing`, `ready`, `busy`, `stalled`, `restarting`, `absent` or `failed`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Probing => "probing",
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Stalled => "stalled",
            Self::Restarting => "restarting",
            Self::Absent => "absent",
            Self::Failed(_) => "failed",
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(why) => write!(f, "failed: {why}"),
            other => f.write_str(other.name()),
        }
    }
}
