//! What is asked of a driver, as one value: it passes through a queue, and to a child process. Knows drivers only.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use secrecy::SecretString;
use zeroize::Zeroizing;

use super::{
    CardChange, CardStatus, DeviceError, Driver, FoundKey, NewKey, Operation, PrivateHalf, Scan, Slot, Status,
};

/// One request to a driver.
#[derive(Clone)]
pub enum Call {
    /// [`Driver::scan`]
    Scan,
    /// [`Driver::health`]
    Health,
    /// [`Driver::unlock`], and whether even with the last try.
    Unlock(SecretString, bool),
    /// [`Driver::lock`]
    Lock,
    /// [`Driver::random`], so many bytes.
    Random(usize),
    /// [`Driver::sign`], [`Driver::decrypt`] or [`Driver::derive`].
    Operate(Slot, Arc<Operation<'static>>),
    /// [`Driver::generate`]
    Generate(NewKey),
    /// [`Driver::import`]
    Import(NewKey, PrivateHalf),
    /// [`Driver::rename`]: the key in this slot, to this label.
    Rename(Slot, String),
    /// [`Driver::delete`]
    Delete(Slot),
    /// [`Driver::card_status`]
    CardStatus,
    /// [`Driver::change_card`]
    ChangeCard(CardChange),
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scan => "scan",
            Self::Health => "health",
            Self::Unlock(..) => "unlock",
            Self::Lock => "lock",
            Self::Random(_) => "random",
            Self::Operate(_, operation) => operation.name(),
            Self::Generate(_) => "generate",
            Self::Import(..) => "import",
            Self::Rename(..) => "rename",
            Self::Delete(_) => "delete",
            Self::CardStatus => "card-status",
            Self::ChangeCard(change) => change.name(),
        })
    }
}

/// What a driver answered.
pub enum Reply {
    /// To a scan.
    Scan(Scan),
    /// To a question for its health.
    Status(Status),
    /// To an unlock, lock, rename, delete or change of a card.
    Done,
    /// To a generate or import: the key that is there now.
    Key(Box<FoundKey>),
    /// To a question what a card says of itself.
    Card(Box<CardStatus>),
    /// A signature, a plaintext, a secret, random bytes: in the form that the call's scheme has. Nobody has verified it.
    Bytes(Zeroizing<Vec<u8>>),
    /// To a call that was [withdrawn](Underway::withdraw) before the driver began it: it never does.
    Withdrawn,
}

/// Makes the call.
pub async fn perform<D: Driver>(driver: &D, call: Call) -> Result<Reply, DeviceError> {
    match call {
        Call::Scan => driver.scan().await.map(Reply::Scan),
        Call::Health => driver.health().await.map(Reply::Status),
        Call::Unlock(pin, even_last) => driver.unlock(pin, even_last).await.map(|()| Reply::Done),
        Call::Lock => driver.lock().await.map(|()| Reply::Done),
        Call::Random(len) => driver.random(len).await.map(Reply::Bytes),
        Call::Operate(slot, operation) => {
            let bytes = match &*operation {
                Operation::Sign { scheme, input } => driver.sign(&slot, *scheme, input).await.map(Zeroizing::new),
                Operation::Decrypt { scheme, label, ciphertext } => {
                    driver.decrypt(&slot, *scheme, label, ciphertext).await
                }
                Operation::Derive { scheme, peer } => driver.derive(&slot, *scheme, peer).await,
            };
            bytes.map(Reply::Bytes)
        }
        Call::Generate(new) => driver.generate(&new).await.map(|key| Reply::Key(Box::new(key))),
        Call::Import(new, private) => driver.import(&new, &private).await.map(|key| Reply::Key(Box::new(key))),
        Call::Rename(slot, label) => driver.rename(&slot, &label).await.map(|()| Reply::Done),
        Call::Delete(slot) => driver.delete(&slot).await.map(|()| Reply::Done),
        Call::CardStatus => driver.card_status().await.map(|status| Reply::Card(Box::new(status))),
        Call::ChangeCard(change) => driver.change_card(&change).await.map(|()| Reply::Done),
    }
}

/// What runs a driver: this process, or a child.
pub trait Engine: Send + Sync + 'static {
    /// A driver that runs.
    type Session: Session;

    /// Starts the driver and opens its device. Dropping the future ends what it started.
    fn open(&self) -> impl Future<Output = Result<Self::Session, DeviceError>> + Send;

    /// Has the device's worker polled: where the answers of its sessions come, so that no thread wakes another for them.
    fn spawn(&self, worker: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(worker);
    }
}

/// A call on its way to its answer. Polling it takes no time: the driver works elsewhere. Dropping it gives up the answer;
/// where the driver runs in another process, it goes on there.
pub trait Underway: Future<Output = Result<Reply, DeviceError>> + Send + 'static {
    /// Takes back what the driver has not begun: the answer is [`Reply::Withdrawn`] then, and otherwise whatever it is.
    fn withdraw(&self);
}

/// A driver that runs. Dropping it ends it, too, but nobody learns when.
pub trait Session: Send + Sync + 'static {
    /// [`Driver::lanes`]: more calls than that are not made at once.
    fn lanes(&self) -> usize;

    /// How many calls it takes besides those in the lanes: at most as many again, or three for each lane. They begin in the
    /// order they were given, each when a lane has answered, and can be [withdrawn](Underway::withdraw) until then.
    fn ahead(&self) -> usize {
        0
    }

    /// Makes a call. [`Restarted`](DeviceError::Restarted) when the driver dies before it has answered.
    fn call(&self, call: Call) -> impl Underway;

    /// Completes when the driver has died by itself, with the reason for a person.
    fn died(&self) -> impl Future<Output = String> + Send + 'static;

    /// Ends it, and completes when nothing of it is left. `parting` is how long the driver may take to finish what it is
    /// doing and to let go of its device.
    fn end(self, parting: Duration) -> impl Future<Output = ()> + Send;
}
