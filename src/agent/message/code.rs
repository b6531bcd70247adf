//! Why a request of ours was not done: the failure that carries a reason code. Knows no bytes but its own.

use crate::{
    devices::DeviceError,
    rfc4251::{Put, Reader, WireError},
    vault::policy::Refusal,
};

pub use crate::vault::reason::Code;

/// The longest message of a failure, in bytes.
pub const MAX_MESSAGE: usize = 1024;
/// How long to wait before asking again what was refused as [`Code::Busy`], in milliseconds.
const BUSY_PAUSE_MS: u32 = 200;
/// `tries_left` where the device does not say.
const UNKNOWN: u32 = u32::MAX;

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
        let mut of = refusal;
        while let Refusal::At(_, inner) = of {
            of = inner;
        }
        let tries_left = match of {
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
