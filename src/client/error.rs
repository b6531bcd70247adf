//! Why a client has no answer.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use thiserror::Error;

use crate::agent::message::{Code, Failure, ReplyError};

/// Why a request was not done.
#[derive(Clone, Debug, Error)]
pub enum ClientError {
    /// The daemon says why. [`Code`] tells what can be done about each reason.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// Nobody could be reached. The request was not sent: start the daemon, or name another socket.
    #[error("{path}: {source}", path = path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: Arc<io::Error>,
    },
    /// The connection ended before the answer came: the daemon ended, or was restarted. Whether the request was done is
    /// not known.
    #[error("the connection ended before the answer came; whether the request was done is not known")]
    Lost,
    /// The deadline passed without a word, or the daemon hangs. Whether the request was done is not known.
    #[error("no answer came in time; whether the request was done is not known")]
    NoAnswer,
    /// The agent at this socket does not offer this.
    #[error("the agent at this socket does not offer `{0}`")]
    Unsupported(&'static str),
    /// The request is longer than a frame: sign a digest, where the scheme allows.
    #[error("the request takes {0} bytes, and at most 262144 can be sent")]
    TooLong(usize),
    /// The answer is not one to the request: the program behind the socket speaks another protocol, or is broken.
    #[error(transparent)]
    Protocol(#[from] ReplyError),
    /// The runtime in which the client was connected has ended.
    #[error("the client's runtime has ended")]
    Ended,
}

impl ClientError {
    /// The reason among the protocol's codes, where it has one: the daemon's, or what is known without it.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused(failure) => Some(failure.code),
            Self::NoAnswer => Some(Code::Timeout),
            Self::Unsupported(_) => Some(Code::Unsupported),
            Self::TooLong(_) => Some(Code::TooLong),
            Self::Unreachable { .. } | Self::Lost | Self::Protocol(_) | Self::Ended => None,
        }
    }

    /// When it makes sense to ask again, where the daemon says.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused(failure) if failure.retry_after_ms > 0 => {
                Some(Duration::from_millis(failure.retry_after_ms.into()))
            }
            _ => None,
        }
    }

    /// The PIN tries that are left, where the device says.
    pub fn tries_left(&self) -> Option<u32> {
        match self {
            Self::Refused(failure) => failure.tries_left,
            _ => None,
        }
    }
}
