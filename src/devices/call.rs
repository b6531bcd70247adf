//! What is asked of a driver, as one value: it passes through a queue, and to a child process. Knows drivers only.

use std::{fmt, future::Future};

use secrecy::SecretString;
use zeroize::Zeroizing;

use super::{DeviceError, Driver, Operation, Scan, Slot, Status};

/// One request to a driver.
#[derive(Clone)]
pub enum Call {
    /// [`Driver::scan`]
    Scan,
    /// [`Driver::health`]
    Health,
    /// [`Driver::unlock`]
    Unlock(SecretString),
    /// [`Driver::lock`]
    Lock,
    /// [`Driver::random`], so many bytes.
    Random(usize),
    /// [`Driver::sign`], [`Driver::decrypt`] or [`Driver::derive`].
    Operate(Slot, Operation<'static>),
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scan => "scan",
            Self::Health => "health",
            Self::Unlock(_) => "unlock",
            Self::Lock => "lock",
            Self::Random(_) => "random",
            Self::Operate(_, operation) => operation.name(),
        })
    }
}

/// What a driver answered.
pub enum Reply {
    /// To a scan.
    Scan(Scan),
    /// To a question for its health.
    Status(Status),
    /// To an unlock or lock.
    Done,
    /// A signature, a plaintext, a secret, random bytes: in the form that the call's scheme has. Nobody has verified it.
    Bytes(Zeroizing<Vec<u8>>),
}

/// Makes the call.
pub async fn perform<D: Driver>(driver: &D, call: Call) -> Result<Reply, DeviceError> {
    match call {
        Call::Scan => driver.scan().await.map(Reply::Scan),
        Call::Health => driver.health().await.map(Reply::Status),
        Call::Unlock(pin) => driver.unlock(pin).await.map(|()| Reply::Done),
        Call::Lock => driver.lock().await.map(|()| Reply::Done),
        Call::Random(len) => driver.random(len).await.map(Reply::Bytes),
        Call::Operate(slot, Operation::Sign { scheme, input }) => {
            driver.sign(&slot, scheme, &input).await.map(|bytes| Reply::Bytes(Zeroizing::new(bytes)))
        }
        Call::Operate(slot, Operation::Decrypt { scheme, label, ciphertext }) => {
            driver.decrypt(&slot, scheme, &label, &ciphertext).await.map(Reply::Bytes)
        }
        Call::Operate(slot, Operation::Derive { scheme, peer }) => {
            driver.derive(&slot, scheme, &peer).await.map(Reply::Bytes)
        }
    }
}

/// What runs a driver: this process, or a child.
pub trait Engine: Send + Sync + 'static {
    /// A driver that runs.
    type Session: Session;

    /// Starts the driver and opens its device. Dropping the future ends what it started.
    fn open(&self) -> impl Future<Output = Result<Self::Session, DeviceError>> + Send;
}

/// A driver that runs. Dropping it ends it, too, but nobody learns when.
pub trait Session: Send + Sync + 'static {
    /// [`Driver::lanes`]: more calls than that are not made at once.
    fn lanes(&self) -> usize;

    /// Makes a call. Dropping the future gives up the answer; where the driver runs in another process, it goes on there.
    /// [`Restarted`](DeviceError::Restarted) when the driver dies in the middle of it.
    fn call(&self, call: Call) -> impl Future<Output = Result<Reply, DeviceError>> + Send + 'static;

    /// Completes when the driver has died by itself, with the reason for a person.
    fn died(&self) -> impl Future<Output = String> + Send + 'static;

    /// Ends it, whatever it is doing, and completes when nothing of it is left.
    fn end(self) -> impl Future<Output = ()> + Send;
}
