//! The audit log: one line for each use of a key and each administrative act, each with the hash of the one before.
//! Knows callers, keys and outcomes; never data, a PIN or a secret.
//!
//! A [`Note`] is begun with each request that is recorded and ended with its outcome. What it says goes into a bounded
//! queue, and a thread of its own makes lines of it and brings them to the disk (`writer`); no request waits for that.
//! The reply to an administrative act does: [`Audit::flushed`].

mod files;
mod line;
mod note;
pub mod verify;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::timeout};
use tracing::warn;

use super::{key::Caller, policy::Refusal, store::Store};
use line::Record;
use writer::Writer;

pub use files::{AuditError, Head, Lines, MAX_SIZE, MIN_SIZE, Piece, numbers, path_of};
pub use line::{Hash, MAX_LINE, Peer, Position, date};
use note::NoteHere;
pub use note::{MEMORY, Note};

/// The size that all files together have at most unless it is configured, in bytes.
pub const DEFAULT_SIZE: u64 = 64 << 20;
/// Records that wait for the disk, those of requests under way included.
const MAX_WAITING: usize = 16_384;
/// The operation of a line that stands for others.
const UNRECORDED: &str = "unrecorded";
/// How long an administrative reply waits for the disk at most.
const FLUSH: Duration = Duration::from_secs(5);

/// How the log is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where its files are: absolute.
    pub directory: PathBuf,
    /// What all of them take at most, in bytes: [`MIN_SIZE`] to [`MAX_SIZE`].
    pub max_size: u64,
    /// What becomes of requests that cannot be recorded.
    pub on_full: OnFull,
}

/// What becomes of requests that cannot be recorded, because the disk is full, broken or too slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFull {
    /// No key is used or added, and nothing is unlocked, until there is room.
    Refuse,
    /// The same of uses of keys in the encrypted store; all else is served as below.
    #[default]
    RefuseStored,
    /// They are served, a warning is logged, and a line says how many there were once it can be written.
    Warn,
}

/// The audit log: a handle that can be cloned, of a log that is kept or of none.
#[derive(Clone, Default)]
pub struct Audit(Option<Arc<Shared>>);

impl Audit {
    /// No log: nothing is recorded.
    pub fn off() -> Self {
        Self::default()
    }

    /// Goes on with the log that ends at `head`, as the store knows, or begins one. Blocks while it reads the end of it.
    pub fn start(settings: &Settings, head: Option<Head>, store: &Store) -> Result<Self, AuditError> {
        let shared = Writer::start(settings, head, store.clone())?;
        let audit = Self(Some(shared));
        audit.act("start").end(Ok(())).ok();
        Ok(audit)
    }

    /// A log that cannot be begun, for as long as the process lives: all requests are such that cannot be recorded.
    pub fn broken(settings: &Settings) -> Self {
        let shared = Shared::new(settings);
        shared.queue().waiting = MAX_WAITING;
        shared.is_failing();
        shared.is_closed();
        Self(Some(Arc::new(shared)))
    }

    /// Whether there is a log.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Puts another size and choice in force; the directory stays.
    pub fn configure(&self, settings: &Settings) {
        let Some(shared) = &self.0 else { return };
        shared.refuses.store(settings.on_full == OnFull::Refuse, Ordering::Relaxed);
        shared.refuses_stored.store(settings.on_full != OnFull::Warn, Ordering::Relaxed);
        shared.queue().max_size = settings.max_size;
    }

    /// Begins the record of something that must not happen unrecorded, where that is configured.
    pub fn admit(&self, caller: &Caller, operation: &'static str) -> Result<Note, Refusal> {
        Ok(self.admit_here(caller, operation)?.into_note())
    }

    /// The same for something that may be over at once, which then costs less.
    pub(super) fn admit_here(&self, caller: &Caller, operation: &'static str) -> Result<NoteHere<'_>, Refusal> {
        let Some(shared) = &self.0 else { return Ok(NoteHere::none()) };
        let refuses = shared.refuses.load(Ordering::Relaxed);
        if refuses && !shared.is_sure_of_a_place() {
            shared.lose();
            return Err(Refusal::Unrecorded);
        }
        Ok(NoteHere::here(caller, operation, shared, refuses))
    }

    /// Begins the record of something that happens anyway: a refusal, or what makes keys safer.
    pub fn note(&self, caller: &Caller, operation: &'static str) -> Note {
        self.0.as_ref().map_or_else(Note::none, |shared| Note::of(caller, operation, shared))
    }

    /// Begins the record of something that the vault does by itself or on a signal.
    pub fn act(&self, operation: &'static str) -> Note {
        self.0.as_ref().map_or_else(Note::none, |shared| Note::ours(operation, shared))
    }

    /// Completes when all that was recorded before is on the disk, the head too; or when that fails or takes longer than
    /// an administrative reply may. Whoever waits does not gather with others.
    pub async fn flushed(&self) {
        let Some(shared) = &self.0 else { return };
        let mut progress = shared.progress.subscribe();
        let recorded = shared.hurry();
        let flushed =
            timeout(FLUSH, progress.wait_for(|now| now.written >= recorded || now.failing || now.closed)).await;
        if flushed.is_err() {
            warn!("the audit log's disk takes longer than {FLUSH:?}; a reply does not wait for it");
        }
    }

    /// What the state file knows of the log. `None` without a log.
    pub fn head(&self) -> Option<Head> {
        self.0.as_ref()?.progress.borrow().head.clone()
    }

    /// The same, with everything in it that was recorded before, unless the disk is in the way.
    pub async fn flushed_head(&self) -> Option<Head> {
        self.flushed().await;
        self.head()
    }

    /// Writes down the end of the vault and closes the log. Everything after is lost.
    pub async fn close(&self) {
        let Some(shared) = &self.0 else { return };
        self.act("stop").end(Ok(())).ok();
        shared.queue().closing = true;
        shared.wake.notify_one();
        let mut progress = shared.progress.subscribe();
        let _ = timeout(FLUSH, progress.wait_for(|now| now.closed)).await;
    }
}

/// What is between those who record and the thread that writes.
pub struct Shared {
    queue: Mutex<Queue>,
    /// Wakes the writer.
    wake: Condvar,
    /// Whether what cannot be recorded is refused.
    refuses: AtomicBool,
    /// The same of uses of stored keys.
    refuses_stored: AtomicBool,
    /// Whether the last attempt to write failed.
    failing: AtomicBool,
    progress: watch::Sender<Progress>,
}

struct Queue {
    records: Vec<Record>,
    /// Records that wait, the writer's included, and places that are kept for those under way.
    waiting: usize,
    /// All records so far.
    recorded: u64,
    /// What could not be recorded, since the last line that says so.
    lost: u64,
    /// Whether somebody waits for the disk.
    hurries: bool,
    closing: bool,
    max_size: u64,
}

impl Queue {
    /// Whether there was a place for one more, which is taken now.
    fn take_place(&mut self) -> bool {
        let free = self.waiting < MAX_WAITING;
        self.waiting += usize::from(free);
        free
    }
}

/// How far the writer is.
struct Progress {
    /// How many records are on the disk.
    written: u64,
    failing: bool,
    closed: bool,
    head: Option<Head>,
}

/// What the writer is to do.
struct Taken {
    records: Vec<Record>,
    /// The number of the last record.
    upto: u64,
    lost: u64,
    max_size: u64,
    closing: bool,
}

impl Shared {
    fn new(settings: &Settings) -> Self {
        let queue = Queue {
            records: Vec::new(),
            waiting: 0,
            recorded: 0,
            lost: 0,
            hurries: false,
            closing: false,
            max_size: settings.max_size,
        };
        Self {
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            refuses: AtomicBool::new(settings.on_full == OnFull::Refuse),
            refuses_stored: AtomicBool::new(settings.on_full != OnFull::Warn),
            failing: AtomicBool::new(false),
            progress: watch::Sender::new(Progress { written: 0, failing: false, closed: false, head: None }),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the writer begin at once, and gives the number of the last record.
    fn hurry(&self) -> u64 {
        let mut queue = self.queue();
        let idle = queue.records.is_empty() && self.progress.borrow().written == queue.recorded;
        queue.hurries = !idle;
        let recorded = queue.recorded;
        drop(queue);
        self.wake.notify_one();
        recorded
    }

    /// The same for what must not be lost: not while the disk is in the way either.
    fn is_sure_of_a_place(&self) -> bool {
        !self.failing.load(Ordering::Relaxed) && self.take_place()
    }

    /// Keeps a place for a record; without one it will be lost.
    fn take_place(&self) -> bool {
        self.queue().take_place()
    }

    fn lose(&self) {
        let first = {
            let mut queue = self.queue();
            queue.lost += 1;
            queue.lost == 1
        };
        if first {
            warn!("the audit log takes no more; what is not recorded is counted");
        }
    }

    /// For a record that has a place, or takes one now: without, it is lost.
    fn push(&self, record: Record, has_place: bool) {
        let first = {
            let mut queue = self.queue();
            if !has_place && !queue.take_place() {
                drop(queue);
                return self.lose();
            }
            queue.records.push(record);
            queue.recorded += 1;
            queue.records.len() == 1
        };
        if first {
            self.wake.notify_one();
        }
    }

    /// Waits for something to do, then a little for more of it; with `retry` for so long at most. What comes next is
    /// gathered in `spare`, which is empty.
    fn wait(&self, retry: Option<Duration>, gather: Duration, spare: Vec<Record>) -> Taken {
        let idle = |queue: &mut Queue| queue.records.is_empty() && !queue.hurries && !queue.closing;
        let calm = |queue: &mut Queue| !queue.hurries && !queue.closing;
        let mut queue = self.queue();
        queue = match retry {
            None => self.wake.wait_while(queue, idle).unwrap_or_else(PoisonError::into_inner),
            // What waits is tried again then, and not with every record that comes.
            Some(retry) => self.wait_while(queue, retry, calm),
        };
        queue = self.wait_while(queue, gather, calm);
        queue.hurries = false;
        let lost = std::mem::take(&mut queue.lost);
        if lost > 0 {
            // The line that tells of them has its place, whatever else waits.
            queue.waiting += 1;
        }
        Taken {
            records: std::mem::replace(&mut queue.records, spare),
            upto: queue.recorded,
            lost,
            max_size: queue.max_size,
            closing: queue.closing,
        }
    }

    fn wait_while<'a>(
        &self,
        queue: MutexGuard<'a, Queue>,
        time: Duration,
        condition: impl FnMut(&mut Queue) -> bool,
    ) -> MutexGuard<'a, Queue> {
        self.wake.wait_timeout_while(queue, time, condition).unwrap_or_else(PoisonError::into_inner).0
    }

    fn has_room(&self, records: usize) {
        self.queue().waiting -= records;
    }

    fn is_written(&self, upto: u64, head: Head) {
        self.failing.store(false, Ordering::Relaxed);
        self.progress.send_modify(|now| {
            (now.written, now.failing, now.head) = (upto, false, Some(head));
        });
    }

    fn is_failing(&self) {
        self.failing.store(true, Ordering::Relaxed);
        self.progress.send_modify(|now| now.failing = true);
    }

    fn is_closed(&self) {
        self.progress.send_modify(|now| now.closed = true);
    }
}

/// Stands for records that were lost.
fn lost(count: u64) -> Record {
    Record { at: SystemTime::now(), outcome: "full", count: Some(count), ..Record::begun(UNRECORDED, None) }
}
