//! The closed list of reason codes: what a caller is told and the audit log says. Knows every reason of the vault and of
//! devices, and no bytes.

use super::{backup::BackupError, policy::Refusal, transfer::TransferError};
use crate::devices::DeviceError;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A reason. What the caller can do about each is in docs/protocol.md, too.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $variant,)*
        }

        impl Code {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name on the wire.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

codes! {
    /// The vault is sealed by `ssh-add -x`: unlock it and ask again.
    Locked = "locked",
    /// There is no lock to undo.
    NotLocked = "not_locked",
    /// The vault's unlock password is wrong; the next attempt waits longer.
    WrongPassword = "wrong_password",
    /// The request must carry the store's passphrase or recovery key, whether the store is open or not: ask again with it.
    ProofRequired = "proof_required",
    /// No such key or device, or none that this caller may know of: list what there is.
    NoSuchKey = "no_such_key",
    /// The device wants a PIN: `unlock` it and ask again.
    PinRequired = "pin_required",
    /// The PIN was refused and a try is spent: never send the same one again.
    PinWrong = "pin_wrong",
    /// No try is left: only the device's own tools help.
    PinBlocked = "pin_blocked",
    /// Nobody touched the device: ask again when somebody is there.
    NotTouched = "not_touched",
    /// The device is not connected: ask again once it is.
    Absent = "absent",
    /// Too much is waiting: ask again after `retry_after_ms`.
    Busy = "busy",
    /// The deadline passed. Whether the device did the work is not known.
    Timeout = "timeout",
    /// The device was restarted with the request inside it: ask again.
    Restarted = "restarted",
    /// The key, device or daemon cannot do this, now or ever.
    Unsupported = "unsupported",
    /// The input is longer than the device takes: hash it first, where the scheme allows.
    TooLong = "too_long",
    /// A person said no, or this connection is shut out: do not ask again.
    Denied = "denied",
    /// The request was given up before it was done: the daemon ends, or the key or its device was taken away.
    Cancelled = "cancelled",
    /// The key's constraints, its grants or the rules are against it: ask for something else, or from elsewhere.
    NotPermitted = "not_permitted",
    /// The request reads well and makes no sense: mend the program.
    BadRequest = "bad_request",
    /// A person should be asked and cannot be: give the daemon an askpass program.
    NoPrompt = "no_prompt",
    /// The vault, or the disk of its audit log, holds as much as it can: remove something, or make room.
    Full = "full",
    /// Anything else: the message is for a person.
    Failed = "failed",
}

impl Code {
    /// The code with this name.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.as_str().as_bytes() == name)
    }
}

impl From<&DeviceError> for Code {
    fn from(error: &DeviceError) -> Self {
        match error {
            DeviceError::Sealed => Self::Locked,
            DeviceError::PinRequired | DeviceError::PinEachTime => Self::PinRequired,
            DeviceError::PinWrong { .. } => Self::PinWrong,
            DeviceError::PinBlocked => Self::PinBlocked,
            DeviceError::NotTouched => Self::NotTouched,
            DeviceError::NoSuchKey => Self::NoSuchKey,
            DeviceError::Absent => Self::Absent,
            DeviceError::Unsupported(_) => Self::Unsupported,
            DeviceError::TooLong { .. } => Self::TooLong,
            DeviceError::Busy | DeviceError::InUse => Self::Busy,
            DeviceError::Timeout => Self::Timeout,
            DeviceError::Restarted => Self::Restarted,
            DeviceError::Gone => Self::Cancelled,
            DeviceError::Failed(_) => Self::Failed,
        }
    }
}

impl From<&Refusal> for Code {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Locked | Refusal::StoreLocked => Self::Locked,
            Refusal::NotLocked => Self::NotLocked,
            Refusal::WrongPassword | Refusal::WrongPassphrase => Self::WrongPassword,
            Refusal::ProofNeeded => Self::ProofRequired,
            Refusal::NoSuchKey => Self::NoSuchKey,
            Refusal::NotPermitted(_) | Refusal::NotForForwarded | Refusal::NotWebsafe | Refusal::Provider(_) => {
                Self::NotPermitted
            }
            Refusal::OnDevice(_)
            | Refusal::NotGranted
            | Refusal::BeyondConfiguration(_)
            | Refusal::NotOwner
            | Refusal::Forbidden => Self::NotPermitted,
            Refusal::NoSuchDevice | Refusal::NothingNew(_) => Self::NoSuchKey,
            Refusal::Configured(_)
            | Refusal::Disabled
            | Refusal::Expired
            | Refusal::InStore
            | Refusal::NotExportable
            | Refusal::LastSlot => Self::NotPermitted,
            Refusal::NoSuchSlot => Self::NoSuchKey,
            Refusal::NoStore | Refusal::StoreExists | Refusal::StoredAlready => Self::Unsupported,
            Refusal::Store(_) => Self::Failed,
            Refusal::At(_, refusal) => (&**refusal).into(),
            Refusal::Ending => Self::Cancelled,
            Refusal::LastTry(_) | Refusal::PinUncertain(_) => Self::PinRequired,
            Refusal::PinRefusedBefore(_) => Self::PinWrong,
            Refusal::NoPin(_) => Self::NoPrompt,
            Refusal::Denied => Self::Denied,
            Refusal::NoPrompt(_) => Self::NoPrompt,
            Refusal::TooManyPrompts => Self::Busy,
            Refusal::EmptyPassword | Refusal::Constraint(_) | Refusal::WrongName | Refusal::Slot(_) => Self::BadRequest,
            Refusal::Backup(BackupError::NotExportable) | Refusal::Transfer(TransferError::NotExportable(_)) => {
                Self::NotPermitted
            }
            Refusal::Backup(BackupError::NotVerified) | Refusal::Transfer(TransferError::Failed) => Self::Failed,
            Refusal::Backup(_) | Refusal::Transfer(_) => Self::BadRequest,
            Refusal::Full | Refusal::Unrecorded => Self::Full,
            Refusal::Timeout => Self::Timeout,
            Refusal::Device(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_known() {
        for (n, code) in Code::ALL.iter().enumerate() {
            assert_eq!(Code::from_name(code.as_str().as_bytes()), Some(*code));
            assert!(Code::ALL[..n].iter().all(|other| other.as_str() != code.as_str()));
        }
        assert_eq!(Code::from_name(b"Locked"), None);
    }
}
