//! What must survive a restart: which devices there are, where keys are, which PINs must not be sent again, and how far
//! the audit log was written. Knows devices by name; opens none of them.
//!
//! Everything is read once, at the start. Each change is on the disk before its caller hears of it. One thread writes, so
//! that a slow disk holds up nobody else. Without a file the PIN marks are the same, in memory, with no thread and no
//! clock.

mod attempt;
mod changes;
mod contents;
mod copy;
mod envelope;
mod error;
mod file;
mod held;
mod marks;
mod master;
mod offer;
mod record;
mod recover;
mod salvage;
mod sealed;
mod slot;
mod tables;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use aws_lc_rs::hmac;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::sync::{mpsc, oneshot};
use tracing::error;
use zeroize::Zeroizing;

use super::audit::Head;
use crate::devices::{FoundKey, Scan, Slot};
use attempt::OnTheirWay;
use file::StateFile;

pub use attempt::{Attempt, PinTurn};
pub use error::{MarkError, StoreError};
pub(super) use file::private;
pub use master::{MasterKey, SealError};
pub use offer::{MAX_OFFERS, SealedOffer};
pub use recover::Recovery;
#[cfg(test)]
pub(in crate::vault) use sealed::tests::any_metadata;
pub use sealed::{KeyId, MAX_CERTIFICATES, MAX_COMMENT, MAX_DESTINATIONS, MAX_SECRET, Metadata, SealedKey};
pub use slot::{KEY_FILE_LENGTHS, KeySlot, MAX_SLOTS, SlotError, SlotKind, looks_like_recovery_key};

use marks::{Digest, Marks};
use record::MarkState;
use tables::{Change, Fault};

/// How many changes may wait for the disk; further callers wait for a place.
const QUEUE: usize = 64;

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
    /// Whether there is a slot.
    initialised: AtomicBool,
    /// What had to be mended when it was opened.
    recovery: Option<Recovery>,
    worker: Worker,
    on_their_way: OnTheirWay,
}

/// What an opened store remembers.
pub struct Opened {
    /// The store.
    pub store: Store,
    /// The devices that were seen before.
    pub devices: Vec<KnownDevice>,
    /// The keys in the store, ordered by [`KeyId`].
    pub keys: Vec<SealedKey>,
    /// How far the audit log was written when that was last kept.
    pub audit_head: Option<Head>,
}

/// Where work on the ledger is done.
enum Worker {
    /// On the spot: nothing in it blocks.
    Here(Box<Mutex<Ledger>>),
    /// On the store's thread.
    Thread(mpsc::Sender<Job>),
}

type Job = Box<dyn FnOnce(&mut Ledger) + Send>;

/// The marks, and where they and everything else are kept.
struct Ledger {
    marks: Marks,
    /// By number.
    slots: Vec<KeySlot>,
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
    /// What is damaged is mended from the second copy, or else from what can be read of both, and
    /// [`recovery`](Self::recovery) says what was lost. When nothing can be read it is an error, not an empty store.
    pub fn open(directory: &Path) -> Result<Opened, StoreError> {
        let (file, contents, recovery) = StateFile::open(directory)?;
        let mut marks = Marks::stretched(contents.secret.salt);
        marks.hold(contents.held);
        for (serial, digest, state) in contents.marks {
            marks.set(&serial, digest, state);
        }
        let initialised = AtomicBool::new(!contents.slots.is_empty());
        let mut ledger = Ledger { marks, slots: contents.slots, keeping: Keeping::File(file) };
        let (sender, mut jobs) = mpsc::channel::<Job>(QUEUE);
        let serve = move || {
            ledger.settle();
            while let Some(job) = jobs.blocking_recv() {
                job(&mut ledger);
            }
        };
        thread::Builder::new().name("store".to_owned()).spawn(serve).map_err(StoreError::Thread)?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &*contents.secret.key);
        let (worker, audit_head) = (Worker::Thread(sender), contents.audit_head);
        if let Some(mended) = &recovery {
            mended.log();
        }
        let store = Self(Arc::new(Inner { key, initialised, recovery, worker, on_their_way: OnTheirWay::default() }));
        Ok(Opened { store, devices: contents.devices, keys: contents.keys, audit_head })
    }

    /// A store that ends with the process.
    pub fn in_memory() -> Result<Self, StoreError> {
        let mut key = Zeroizing::new([0; 32]);
        // The system's own: the first number of aws-lc's generator takes tens of milliseconds, for which a start would wait.
        let filled = getrandom(&mut *key, GetRandomFlags::empty()).map_err(|_| StoreError::NoRandom)?;
        if filled < key.len() {
            return Err(StoreError::NoRandom);
        }
        let ledger = Ledger { marks: Marks::default(), slots: Vec::new(), keeping: Keeping::Memory };
        let key = hmac::Key::new(hmac::HMAC_SHA256, &*key);
        let worker = Worker::Here(Box::new(Mutex::new(ledger)));
        let initialised = AtomicBool::new(false);
        Ok(Self(Arc::new(Inner { key, initialised, recovery: None, worker, on_their_way: OnTheirWay::default() })))
    }

    /// Whether it is a file.
    pub fn is_durable(&self) -> bool {
        matches!(self.0.worker, Worker::Thread(_))
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
        self.run(move |ledger| ledger.keep(|change| changes::remember(change, &device, kind, &scan, now))).await?
    }

    /// Drops a device that will not come back, and its keys' places. What its tokens refused stays known.
    pub async fn forget_device(&self, device: &str) -> Result<(), StoreError> {
        let device = device.to_owned();
        self.run(move |ledger| ledger.keep(|change| changes::forget_device(change, &device))).await?
    }

    /// Drops the place of one key, which was deleted from the device.
    pub async fn forget_key(&self, device: &str, slot: &Slot) -> Result<(), StoreError> {
        let (device, slot) = (device.to_owned(), slot.clone());
        self.run(move |ledger| ledger.keep(|change| changes::forget_key(change, &device, &slot))).await?
    }

    /// A person says that this token's PINs may be sent again, whatever became of them before.
    pub async fn forget_pins(&self, serial: &str) -> Result<(), StoreError> {
        let serial = serial.to_owned();
        self.run(move |ledger| {
            let held = ledger.marks.is_held();
            ledger.keep(|change| changes::clear_marks(change, &serial, held))?;
            ledger.marks.clear_serial(&serial);
            Ok(())
        })
        .await?
    }

    /// What had to be mended when the store was opened, if anything.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.0.recovery.as_ref()
    }

    /// Whether there is something that opens stored keys: a slot.
    pub fn is_initialised(&self) -> bool {
        self.0.initialised.load(Relaxed)
    }

    /// Begins a store with these slots, of which each wraps the same master key under a number of its own. Refused with
    /// [`StoreError::AlreadyInitialised`] when there are slots already.
    pub async fn initialise(&self, slots: Vec<KeySlot>) -> Result<(), StoreError> {
        self.slot_change(slots, |change, slots| changes::initialise(change, slots), |own, slots| *own = slots).await?;
        self.0.initialised.store(true, Relaxed);
        Ok(())
    }

    /// The slots, ordered by number.
    pub async fn slots(&self) -> Result<Vec<KeySlot>, StoreError> {
        self.run(|ledger| ledger.slots.clone()).await
    }

    /// Adds a slot. Its number must be free: [`StoreError::SlotTaken`].
    pub async fn add_slot(&self, slot: KeySlot) -> Result<(), StoreError> {
        self.slot_change(slot, changes::add_slot, Vec::push).await
    }

    /// Puts a slot in the place of the one with its number, as for another passphrase; in one step, so that there is
    /// always one or the other.
    pub async fn replace_slot(&self, slot: KeySlot) -> Result<(), StoreError> {
        let number = slot.number();
        let replace = move |own: &mut Vec<KeySlot>, slot| {
            own.retain(|other| other.number() != number);
            own.push(slot);
        };
        self.slot_change(slot, changes::replace_slot, replace).await
    }

    /// Removes a slot; not the last: [`StoreError::LastSlot`].
    pub async fn remove_slot(&self, number: u32) -> Result<(), StoreError> {
        let remove = |own: &mut Vec<KeySlot>, number| own.retain(|slot| slot.number() != number);
        self.slot_change(number, |change, &number| changes::remove_slot(change, number), remove).await
    }

    /// Keeps a key, in place of the one with its [`KeyId`] if there is one.
    pub async fn put_key(&self, key: SealedKey) -> Result<(), StoreError> {
        self.replace_keys(Vec::new(), vec![key]).await
    }

    /// Removes a key. It is no error when it is not there.
    pub async fn remove_key(&self, id: KeyId) -> Result<(), StoreError> {
        self.replace_keys(vec![id], Vec::new()).await
    }

    /// Removes some keys and puts others, all in one step: after a power cut it is all of it or nothing.
    pub async fn replace_keys(&self, remove: Vec<KeyId>, put: Vec<SealedKey>) -> Result<(), StoreError> {
        self.run(move |ledger| ledger.keep_stored(|change| changes::replace_keys(change, &remove, &put))).await?
    }

    /// Changes slots in the file, then in memory.
    async fn slot_change<T: Send + 'static>(
        &self,
        what: T,
        file: impl FnOnce(&mut Change<'_>, &T) -> Result<(), Fault> + Send + 'static,
        memory: impl FnOnce(&mut Vec<KeySlot>, T) + Send + 'static,
    ) -> Result<(), StoreError> {
        self.run(move |ledger| {
            ledger.keep_stored(|change| file(change, &what))?;
            memory(&mut ledger.slots, what);
            ledger.slots.sort_by_key(KeySlot::number);
            Ok(())
        })
        .await?
    }

    /// Keeps how far the audit log is written. Blocks until it is on the disk: not for a task.
    pub fn keep_audit_head(&self, head: Head) -> Result<(), StoreError> {
        self.run_blocking(move |ledger| ledger.keep_in(false, |change| changes::keep_audit_head(change, &head)))?
    }

    /// How far the audit log was written, by the state in a directory that no daemon has open; makes nothing. `None` when
    /// there is no log, or no state file either.
    pub fn audit_head_in(directory: &Path) -> Result<Option<Head>, StoreError> {
        Ok(StateFile::open_if_there(directory)?.and_then(|contents| contents.audit_head))
    }

    /// Completes when everything before is done and the file is closed, so that another process can open it. Everything
    /// after fails with [`StoreError::Closed`].
    pub async fn close(&self) {
        let _ = self.run(|ledger| ledger.keeping = Keeping::Closed).await;
    }

    /// Does `work` on the ledger, for a thread that may block.
    fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Ledger) -> T + Send + 'static,
    ) -> Result<T, StoreError> {
        match &self.0.worker {
            Worker::Here(ledger) => Ok(work(&mut ledger.lock().unwrap_or_else(PoisonError::into_inner))),
            Worker::Thread(jobs) => {
                let (sender, receiver) = oneshot::channel();
                let job = move |ledger: &mut Ledger| drop(sender.send(work(ledger)));
                jobs.blocking_send(Box::new(job)).map_err(|_| StoreError::Closed)?;
                receiver.blocking_recv().map_err(|_| StoreError::Closed)
            }
        }
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

impl Ledger {
    /// Has on the disk what opening the file changed in it, for which no start waits.
    fn settle(&mut self) {
        if let Keeping::File(file) = &mut self.keeping
            && let Err(error) = file.settle()
        {
            error!("the state cannot be written: {error}");
        }
    }

    /// The mark, and whether it was pending before.
    fn begin(&mut self, tag: &Digest, serial: &str, typed: bool) -> Result<(Digest, bool), MarkError> {
        let digest = self.marks.digest(tag)?;
        let was_pending = self.marks.check(serial, &digest, typed)?;
        self.mark(serial, &digest, Some(MarkState::Pending))?;
        Ok((digest, was_pending))
    }

    /// The file first: what is not on the disk is not acknowledged.
    fn mark(&mut self, serial: &str, digest: &Digest, state: Option<MarkState>) -> Result<(), StoreError> {
        self.keep(|change| changes::mark(change, serial, digest, state))?;
        match state {
            Some(state) => self.marks.set(serial, *digest, state),
            None => self.marks.clear(serial, digest),
        }
        Ok(())
    }

    /// Makes a change to what is stored for good: never in memory alone.
    fn keep_stored(&mut self, change: impl FnOnce(&mut Change<'_>) -> Result<(), Fault>) -> Result<(), StoreError> {
        if matches!(self.keeping, Keeping::Memory) {
            return Err(StoreError::NotDurable);
        }
        self.keep(change)
    }

    /// Makes a change to the file, where there is one.
    fn keep(&mut self, change: impl FnOnce(&mut Change<'_>) -> Result<(), Fault>) -> Result<(), StoreError> {
        self.keep_in(true, change)
    }

    /// The same; with `twice`, it is in the second copy, too, when this returns.
    fn keep_in(
        &mut self,
        twice: bool,
        change: impl FnOnce(&mut Change<'_>) -> Result<(), Fault>,
    ) -> Result<(), StoreError> {
        match &mut self.keeping {
            Keeping::Memory => Ok(()),
            Keeping::File(file) => file.write(twice, change),
            Keeping::Closed => Err(StoreError::Closed),
        }
    }
}

/// Reads `bytes` as everything that is in the files. What is read is the same when written again.
#[cfg(fuzzing)]
pub fn fuzz(bytes: &[u8]) {
    if let Some((number, key)) = bytes.split_first_chunk::<4>() {
        assert!(KeySlot::decode(number, key).map_or(true, |slot| slot.encode() == key));
    }
    if let Some((id, key)) = bytes.split_first_chunk::<32>() {
        assert!(SealedKey::decode(id, key).map_or(true, |sealed| sealed.encode() == key));
    }
    if let Ok(metadata) = Metadata::decode(bytes) {
        assert_eq!(metadata.encode(), bytes);
    }
    let _ = copy::read(bytes);
    let (main, copy) = bytes.split_at(bytes.len() / 2);
    let _ = (salvage::salvage(main, copy), salvage::salvage(bytes, bytes));
}

#[cfg(test)]
mod tests;
