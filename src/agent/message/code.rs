//! Why a request of ours was not done: the closed list of reason codes, and the failure that carries one. Knows every
//! reason of the vault and of devices, and no bytes but those of a failure.

use crate::{
    devices::DeviceError,
    rfc4251::{Put, Reader, WireError},
    vault::policy::Refusal,
};

/// The longest message of a failure, in bytes.
pub const MAX_MESSAGE: usize = 1024;
/// How long to wait before asking again what was refused as [`Code::Busy`], in milliseconds.
const BUSY_PAUSE_MS: u32 = 200;
/// `tries_left` where the device does not say.
const UNKNOWN: u32 = u32::MAX;

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
    /// The vault holds as much as it can: remove something.
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
            DeviceError::PinRequired => Self::PinRequired,
            DeviceError::PinWrong { .. } => Self::PinWrong,
            DeviceError::PinBlocked => Self::PinBlocked,
            DeviceError::NotTouched => Self::NotTouched,
            DeviceError::NoSuchKey => Self::NoSuchKey,
            DeviceError::Absent => Self::Absent,
            DeviceError::Unsupported(_) => Self::Unsupported,
            DeviceError::TooLong { .. } => Self::TooLong,
            DeviceError::Busy => Self::Busy,
            DeviceError::Timeout => Self::Timeout,
            DeviceError::Restarted => Self::Restarted,
            DeviceError::Failed(_) => Self::Failed,
        }
    }
}

impl From<&Refusal> for Code {
    fn from(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Locked => Self::Locked,
            Refusal::NotLocked => Self::NotLocked,
            Refusal::WrongPassword => Self::WrongPassword,
            Refusal::NoSuchKey => Self::NoSuchKey,
            Refusal::NotPermitted(_) | Refusal::NotForForwarded | Refusal::NotWebsafe | Refusal::Provider(_) => {
                Self::NotPermitted
            }
            Refusal::OnDevice(_) | Refusal::NotGranted => Self::NotPermitted,
            Refusal::NoSuchDevice => Self::NoSuchKey,
            Refusal::Ending => Self::Cancelled,
            Refusal::LastTry(_) | Refusal::PinUncertain(_) => Self::PinRequired,
            Refusal::PinRefusedBefore(_) => Self::PinWrong,
            Refusal::NoPin(_) => Self::NoPrompt,
            Refusal::Denied => Self::Denied,
            Refusal::NoPrompt(_) => Self::NoPrompt,
            Refusal::TooManyPrompts => Self::Busy,
            Refusal::EmptyPassword | Refusal::Constraint(_) => Self::BadRequest,
            Refusal::Full => Self::Full,
            Refusal::Timeout => Self::Timeout,
            Refusal::Device(error) => error.into(),
        }
    }
}

/// Why a request was not done, as its caller is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The reason, for programs.
    pub code: Code,
    /// The reason, for people: at most [`MAX_MESSAGE`] bytes of it are sent.
    pub message: String,
    /// When it makes sense to ask again, in milliseconds from now; 0 where nobody knows.
    pub retry_after_ms: u32,
    /// The PIN tries that are left, where the device says.
    pub tries_left: Option<u32>,
}

impl Failure {
    /// A failure with nothing to say but its reason.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let retry_after_ms = if code == Code::Busy { BUSY_PAUSE_MS } else { 0 };
        Self { code, message: message.into(), retry_after_ms, tries_left: None }
    }

    /// Appends `string code, string message, uint32 retry_after_ms, uint32 tries_left`.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.code.as_str().as_bytes());
        out.put_string(self.sent_message());
        out.put_u32(self.retry_after_ms);
        out.put_u32(self.tries_left.unwrap_or(UNKNOWN));
    }

    /// How many bytes [`put`](Self::put) appends.
    pub(super) fn encoded_len(&self) -> usize {
        4 + self.code.as_str().len() + 4 + self.sent_message().len() + 8
    }

    fn sent_message(&self) -> &[u8] {
        &self.message.as_bytes()[..self.message.floor_char_boundary(MAX_MESSAGE)]
    }

    /// Reads what [`put`](Self::put) wrote. A code that a newer daemon has and we do not is [`Code::Failed`].
    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let code = Code::from_name(r.string()?).unwrap_or(Code::Failed);
        let message = r.string()?;
        let message = String::from_utf8_lossy(&message[..message.len().min(MAX_MESSAGE)]).into_owned();
        let retry_after_ms = r.u32()?;
        let tries_left = Some(r.u32()?).filter(|&tries| tries != UNKNOWN);
        Ok(Self { code, message, retry_after_ms, tries_left })
    }
}

impl From<&Refusal> for Failure {
    fn from(refusal: &Refusal) -> Self {
        let tries_left = match refusal {
            Refusal::Device(DeviceError::PinWrong { left }) => left.map(u32::from),
            Refusal::Device(DeviceError::PinBlocked) => Some(0),
            _ => None,
        };
        Self { tries_left, ..Self::new(refusal.into(), refusal.to_string()) }
    }
}

impl From<&DeviceError> for Failure {
    fn from(error: &DeviceError) -> Self {
        Self::from(&Refusal::from(error.clone()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
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

    #[test]
    fn a_refusal_says_what_to_do_next() {
        let failure = Failure::from(&DeviceError::PinWrong { left: Some(2) });
        assert_eq!((failure.code, failure.tries_left), (Code::PinWrong, Some(2)));
        assert_eq!(Failure::from(&DeviceError::PinBlocked).tries_left, Some(0));
        assert_eq!(Failure::from(&DeviceError::Sealed).code, Code::Locked);
        assert!(Failure::from(&Refusal::TooManyPrompts).retry_after_ms > 0);
        assert_eq!(Failure::from(&Refusal::Denied).message, Refusal::Denied.to_string());
    }

    #[test]
    fn a_message_is_cut_between_characters() {
        let failure = Failure::new(Code::Failed, "é".repeat(MAX_MESSAGE));
        let mut out = Vec::new();
        failure.put(&mut out);
        assert_eq!(out.len(), failure.encoded_len());
        let read = Failure::read(&mut Reader::new(&out)).unwrap();
        assert_eq!(read.message, "é".repeat(MAX_MESSAGE / 2));
    }

    #[test]
    fn a_code_of_tomorrow_is_a_failure() {
        let mut out = Vec::new();
        out.put_string(b"on_fire");
        out.put_string(b"the device burns");
        out.put_u32(0);
        out.put_u32(UNKNOWN);
        let read = Failure::read(&mut Reader::new(&out)).unwrap();
        assert_eq!(read, Failure::new(Code::Failed, "the device burns"));
    }
}
