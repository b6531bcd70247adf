//! What must survive a restart: which devices there are, where keys are, and which PINs must not be sent again. Knows
//! devices by name; opens none of them.
//!
//! Everything is read once, at the start. Each change is on the disk before its caller hears of it. One thread writes, so
//! that a slow disk holds up nobody else. Without a file the PIN marks are the same, in memory, with no thread and no
//! clock.

mod file;
mod marks;
mod record;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use aws_lc_rs::{hmac, rand};
use secrecy::SecretString;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use crate::devices::{FoundKey, Scan};
use file::{StateFile, quoted};
use marks::{Digest, Marks};
use record::MarkState;

/// How many changes may wait for the disk; further callers wait for a place.
const QUEUE: usize = 64;

/// Why there is no store, or a change was not kept. The messages say what to do.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The system refused: make room or mend the directory, or name another.
    #[error("{path}: {source}; mend that, or name another directory with --state", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others can reach it.
    #[error("{path} has mode {mode:04o}, so that others can reach it; run: {command}", path = path.display())]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What mends it.
        command: String,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to uid {uid}; start as that user, or run as root: {command}", path = path.display())]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// What mends it.
        command: String,
    },
    /// Another process has it open, or this one a second time.
    #[error("{path} is used by another strongroom; end that one, or name another directory with --state", path = path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A later version of this program wrote it. Nothing was changed.
    #[error(
        "{path} was written by a newer strongroom (schema {version}; this one knows up to {known}); \
         start that one, or name another directory with --state",
        path = path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema version.
        version: u32,
        /// The newest version that this program knows.
        known: u32,
    },
    /// The file is not what was written. It holds the refused PINs, so nothing goes on without a person.
    #[error(
        "{path} is damaged: {why}. Make sure that the PINs in the configuration are right, since those that were refused \
         are no longer known; then move the file away: mv {quoted} {quoted}.damaged; keys are found again by looking at \
         the devices",
        path = path.display(), quoted = quoted(path)
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, for a person.
        why: String,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
    /// No thread can be started.
    #[error("no thread can be started: {0}; look at the limit on processes (ulimit -u)")]
    Thread(#[source] io::Error),
    /// The store was closed: the vault is ending.
    #[error("the vault is ending")]
    Closed,
}

/// Why a PIN must not be sent.
#[derive(Debug, Error)]
pub enum MarkError {
    /// It was sent before and nobody knows what became of it. A person has to say that it is right:
    /// [`Store::forget_pins`].
    #[error("this PIN was sent before and the token's answer is not known; it is not sent again until you allow it")]
    Pending,
    /// The token refused it before: give another, or have a person say that it is right: [`Store::forget_pins`].
    #[error("this PIN was refused before; it is not sent again until you allow it")]
    Refused,
    /// More PINs were refused than are remembered: [`Store::forget_pins`].
    #[error("too many PINs were refused; none is sent until you allow it")]
    TooMany,
    /// Its mark could not be made; there may be too little memory.
    #[error("the PIN could not be marked as sent, so it was not sent")]
    Hash,
    /// Its mark could not be kept.
    #[error("the PIN could not be marked as sent, so it was not sent: {0}")]
    Store(#[from] StoreError),
}

/// A device that was seen before, and the keys on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownDevice {
    /// Its name in the configuration.
    pub name: String,
    /// Its driver's [`KIND`](crate::devices::Driver::KIND).
    pub kind: String,
    /// The serial of the token that was last seen in it.
    pub serial: String,
    /// In seconds since 1970.
    pub first_seen: u64,
    /// In seconds since 1970, an hour late at most.
    pub last_seen: u64,
    /// The keys that were found on it, ordered by slot; at most [`MAX_KEYS`](crate::devices::MAX_KEYS).
    pub keys: Vec<FoundKey>,
}

/// The store: a handle that can be cloned. It is closed when the last is gone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    /// Makes PIN marks.
    key: hmac::Key,
    worker: Worker,
}

/// Where work on the ledger is done.
enum Worker {
    /// On the spot: nothing in it blocks.
    Here(Mutex<Ledger>),
    /// On the store's thread.
    Thread(mpsc::Sender<Job>),
}

type Job = Box<dyn FnOnce(&mut Ledger) + Send>;

/// The marks, and where they and everything else are kept.
struct Ledger {
    marks: Marks,
    keeping: Keeping,
}

enum Keeping {
    Memory,
    File(StateFile),
    Closed,
}

impl Store {
    /// Opens the state file in `directory`, or makes both, and gives what it remembers. Blocks while it reads and checks
    /// all of it.
    ///
    /// A damaged file is an error, not an empty store: its PIN marks are what keeps a wrong PIN from being sent until the
    /// token blocks itself.
    pub fn open(directory: &Path) -> Result<(Self, Vec<KnownDevice>), StoreError> {
        let (file, contents) = StateFile::open(directory)?;
        let mut marks = Marks::stretched(contents.secret.salt);
        for (serial, digest, state) in contents.marks {
            marks.set(&serial, digest, state);
        }
        let mut ledger = Ledger { marks, keeping: Keeping::File(file) };
        let (sender, mut jobs) = mpsc::channel::<Job>(QUEUE);
        let serve = move || {
            while let Some(job) = jobs.blocking_recv() {
                job(&mut ledger);
            }
        };
        thread::Builder::new().name("store".to_owned()).spawn(serve).map_err(StoreError::Thread)?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &*contents.secret.key);
        Ok((Self(Arc::new(Inner { key, worker: Worker::Thread(sender) })), contents.devices))
    }

    /// A store that ends with the process.
    pub fn in_memory() -> Result<Self, StoreError> {
        let mut key = Zeroizing::new([0; 32]);
        rand::fill(&mut *key).map_err(|_| StoreError::NoRandom)?;
        let ledger = Ledger { marks: Marks::default(), keeping: Keeping::Memory };
        let key = hmac::Key::new(hmac::HMAC_SHA256, &*key);
        Ok(Self(Arc::new(Inner { key, worker: Worker::Here(Mutex::new(ledger)) })))
    }

    /// Keeps what a scan found on the device called `device`: in place of what was known of it when the scan is complete,
    /// beside that otherwise. `now` is in seconds since 1970. A key that exceeds the bounds of `devices` is left out, and
    /// the log says so. Costs no write when nothing changed.
    pub async fn remember(
        &self,
        device: &str,
        kind: &'static str,
        scan: Arc<Scan>,
        now: u64,
    ) -> Result<(), StoreError> {
        let device = device.to_owned();
        self.run(move |ledger| ledger.keep(|file| file.remember(&device, kind, &scan, now))).await?
    }

    /// Drops a device that will not come back, and its keys' places. What its tokens refused stays known.
    pub async fn forget_device(&self, device: &str) -> Result<(), StoreError> {
        let device = device.to_owned();
        self.run(move |ledger| ledger.keep(|file| file.forget_device(&device))).await?
    }

    /// Before a PIN is sent: marks it as pending, durably. An error means that it must not be sent.
    ///
    /// `serial` is the token's; tokens without one share theirs, and a try. A PIN that a person has just typed is sent
    /// although what became of it the last time is not known, but not when it was refused.
    pub async fn begin(&self, serial: &str, pin: &SecretString, typed: bool) -> Result<Attempt, MarkError> {
        let tag = marks::tag(&self.0.key, serial, pin);
        let serial = serial.to_owned();
        let (digest, serial) =
            self.run(move |ledger| ledger.begin(&tag, &serial, typed).map(|mark| (mark, serial))).await??;
        Ok(Attempt { store: self.clone(), serial, digest })
    }

    /// A person says that this token's PINs may be sent again, whatever became of them before.
    pub async fn forget_pins(&self, serial: &str) -> Result<(), StoreError> {
        let serial = serial.to_owned();
        self.run(move |ledger| {
            ledger.keep(|file| file.clear_marks(&serial))?;
            ledger.marks.clear_serial(&serial);
            Ok(())
        })
        .await?
    }

    /// Completes when everything before is done and the file is closed, so that another process can open it. Everything
    /// after fails with [`StoreError::Closed`].
    pub async fn close(&self) {
        let _ = self.run(|ledger| ledger.keeping = Keeping::Closed).await;
    }

    /// Does `work` on the ledger. It is not begun once the caller has given up, and finished once it is begun.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Ledger) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        match &self.0.worker {
            Worker::Here(ledger) => Ok(work(&mut ledger.lock().unwrap_or_else(PoisonError::into_inner))),
            Worker::Thread(jobs) => {
                let (sender, receiver) = oneshot::channel();
                let job = move |ledger: &mut Ledger| {
                    if !sender.is_closed() {
                        let _ = sender.send(work(ledger));
                    }
                };
                jobs.send(Box::new(job)).await.map_err(|_| StoreError::Closed)?;
                receiver.await.map_err(|_| StoreError::Closed)
            }
        }
    }
}

/// A PIN on its way to a token. Dropped without an answer, as when the device's process died or the time was up, it
/// stays pending and is not sent again.
#[must_use = "a PIN whose outcome is not told is never sent again"]
pub struct Attempt {
    store: Store,
    serial: String,
    digest: Digest,
}

impl Attempt {
    /// The token took it: it may be sent again. Wait for this to the end; if it fails the PIN stays pending.
    pub async fn accepted(self) -> Result<(), StoreError> {
        self.end(None).await
    }

    /// The token refused it.
    pub async fn refused(self) -> Result<(), StoreError> {
        self.end(Some(MarkState::Refused)).await
    }

    async fn end(self, state: Option<MarkState>) -> Result<(), StoreError> {
        let Self { store, serial, digest } = self;
        store.run(move |ledger| ledger.mark(&serial, &digest, state)).await?
    }
}

impl Ledger {
    fn begin(&mut self, tag: &Digest, serial: &str, typed: bool) -> Result<Digest, MarkError> {
        let digest = self.marks.digest(tag)?;
        self.marks.check(serial, &digest, typed)?;
        self.mark(serial, &digest, Some(MarkState::Pending))?;
        Ok(digest)
    }

    /// The file first: what is not on the disk is not acknowledged.
    fn mark(&mut self, serial: &str, digest: &Digest, state: Option<MarkState>) -> Result<(), StoreError> {
        self.keep(|file| file.mark(serial, digest, state))?;
        match state {
            Some(state) => self.marks.set(serial, *digest, state),
            None => self.marks.clear(serial, digest),
        }
        Ok(())
    }

    /// Makes a change to the file, where there is one.
    fn keep(&mut self, change: impl FnOnce(&mut StateFile) -> Result<(), StoreError>) -> Result<(), StoreError> {
        match &mut self.keeping {
            Keeping::Memory => Ok(()),
            Keeping::File(file) => change(file),
            Keeping::Closed => Err(StoreError::Closed),
        }
    }
}

#[cfg(test)]
mod tests;
