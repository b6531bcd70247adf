//! The handle of a device: its queue, its deadlines, its state. Knows calls and time; not what runs the driver.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use secrecy::SecretString;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::{Instant, timeout_at},
};
use zeroize::Zeroizing;

use super::{
    DeviceError, DeviceState, FoundKey, Health, Operation, Outcome, Signature,
    call::{Call, Engine, Reply},
    operation::MAX_INPUT,
    turns::Turns,
    verify,
    worker::Worker,
};

/// The most random bytes that one call gives.
pub const MAX_RANDOM: usize = 1024;

/// The bounds of a device. Each has a default that fits tokens and cards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Calls that may wait for a lane.
    pub queue: usize,
    /// How long an operation may take, the wait in the queue included, unless its caller asks for less.
    pub timeout: Duration,
    /// The same for operations that want a touch.
    pub touch_timeout: Duration,
    /// How long opening and scanning may take.
    pub open_timeout: Duration,
    /// How long the other lanes may take to finish when one is stalled.
    pub grace: Duration,
    /// How often a device that is idle, absent or failed is looked at.
    pub probe: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue: 1024,
            timeout: Duration::from_secs(5),
            touch_timeout: Duration::from_secs(30),
            open_timeout: Duration::from_secs(30),
            grace: Duration::from_secs(1),
            probe: Duration::from_secs(5),
        }
    }
}

/// How long a caller waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Patience {
    /// Its own deadline; the device's applies where that is sooner.
    pub deadline: Option<Instant>,
    /// Whether it waits for a place in a full queue, rather than take [`DeviceError::Busy`] for an answer.
    pub waits_for_place: bool,
}

/// What a device has done since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Calls with a result.
    pub done: u64,
    /// Calls that failed for whatever reason, the ones of [`Counters::timeouts`] included.
    pub failed: u64,
    /// Calls that had no answer by their deadline.
    pub timeouts: u64,
    /// How often the driver was ended, or ended by itself, while it had a device open.
    pub restarts: u64,
}

/// One token, card or file of keys. Cheap to clone; clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Shared>);

pub(super) struct Shared {
    pub(super) name: String,
    pub(super) kind: &'static str,
    pub(super) settings: Settings,
    /// Changes of everything but Busy, which comes and goes with each call.
    pub(super) state: watch::Sender<Arc<DeviceState>>,
    queue: Mutex<Queue>,
    /// Wakes the worker: there is a job, or it is to end, or to look at the device now.
    pub(super) wake: Notify,
    /// A permit for each job that may wait in the queue.
    places: Arc<Semaphore>,
    jobs: AtomicU64,
    /// Calls inside the driver, and how many it makes at once; 0 while there is none.
    pub(super) active: AtomicUsize,
    pub(super) lanes: AtomicUsize,
    pub(super) counts: Counts,
    /// True when the worker has ended and nothing of the driver is left.
    pub(super) ended: watch::Sender<bool>,
}

#[derive(Default)]
pub(super) struct Counts {
    done: AtomicU64,
    failed: AtomicU64,
    timeouts: AtomicU64,
    pub(super) restarts: AtomicU64,
}

#[derive(Default)]
struct Queue {
    turns: Turns<Job>,
    /// Why there is no point in waiting; then nothing waits.
    refusal: Option<DeviceError>,
    ending: bool,
    probe_now: bool,
}

/// A call that waits for a lane, and who waits for its answer.
pub(super) struct Job {
    id: u64,
    pub(super) call: Call,
    pub(super) reply: oneshot::Sender<Result<Reply, DeviceError>>,
    /// How long the driver may take from when it begins. Not the caller's own deadline: who asks for little must not be
    /// able to have a device restarted that merely takes its time.
    pub(super) limit: Duration,
    _place: OwnedSemaphorePermit,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job that somebody still waits for.
    pub(super) fn next_job(&self) -> Option<Job> {
        let mut queue = self.queue();
        std::iter::from_fn(|| queue.turns.pop()).find(|job| !job.reply.is_closed())
    }

    /// Answers everything that waits, and all that comes until [`Shared::admit`], with `refusal`.
    pub(super) fn refuse(&self, refusal: &DeviceError) {
        let waiting = {
            let mut queue = self.queue();
            queue.refusal = Some(refusal.clone());
            queue.turns.take()
        };
        for job in waiting {
            let _ = job.reply.send(Err(refusal.clone()));
        }
    }

    /// Lets jobs wait again.
    pub(super) fn admit(&self) {
        let mut queue = self.queue();
        if !queue.ending {
            queue.refusal = None;
        }
    }

    pub(super) fn is_ending(&self) -> bool {
        self.queue().ending
    }

    /// Whether somebody asked since the last time to look at the device now.
    pub(super) fn take_probe(&self) -> bool {
        std::mem::take(&mut self.queue().probe_now)
    }
}

/// Takes a job out of the queue when its caller gives up. A job that has begun is not there any more.
struct Waiting<'a> {
    shared: &'a Shared,
    owner: u64,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Dropped outside the lock: it wakes whoever waits for its place.
        let job = self.shared.queue().turns.remove(self.owner, |job| job.id == self.id);
        drop(job);
    }
}

impl Device {
    /// A device that `engine` runs, and the task that keeps it running. Needs a Tokio runtime around it.
    pub fn start(name: impl Into<String>, kind: &'static str, settings: Settings, engine: impl Engine) -> Self {
        let shared = Arc::new(Shared {
            name: name.into(),
            kind,
            places: Arc::new(Semaphore::new(settings.queue.clamp(1, Semaphore::MAX_PERMITS))),
            settings,
            state: watch::Sender::new(Arc::new(DeviceState { health: Health::Probing, status: None, scan: None })),
            queue: Mutex::default(),
            wake: Notify::new(),
            jobs: AtomicU64::new(0),
            active: AtomicUsize::new(0),
            lanes: AtomicUsize::new(0),
            counts: Counts::default(),
            ended: watch::Sender::new(false),
        });
        tokio::spawn(Worker::new(Arc::clone(&shared), engine).run());
        Self(shared)
    }

    /// Its name in the configuration: unique among the devices.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The name of its driver.
    pub fn kind(&self) -> &'static str {
        self.0.kind
    }

    /// Its bounds.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// How it is now.
    pub fn state(&self) -> Arc<DeviceState> {
        let state = Arc::clone(&self.0.state.borrow());
        let lanes = self.0.lanes.load(Ordering::Relaxed);
        let busy = state.health == Health::Ready && lanes > 0 && self.0.active.load(Ordering::Relaxed) >= lanes;
        if busy { Arc::new(DeviceState { health: Health::Busy, ..DeviceState::clone(&state) }) } else { state }
    }

    /// Tells every change of its state but for [`Health::Busy`], which shows as ready.
    pub fn watch(&self) -> watch::Receiver<Arc<DeviceState>> {
        self.0.state.subscribe()
    }

    /// How many calls its driver makes at once; 0 while there is none.
    pub fn lanes(&self) -> usize {
        self.0.lanes.load(Ordering::Relaxed)
    }

    /// Calls that wait for a lane, and calls inside the driver.
    pub fn load(&self) -> (usize, usize) {
        (self.0.queue().turns.len(), self.0.active.load(Ordering::Relaxed))
    }

    /// What it has done.
    pub fn counters(&self) -> Counters {
        let counts = &self.0.counts;
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counters {
            done: read(&counts.done),
            failed: read(&counts.failed),
            timeouts: read(&counts.timeouts),
            restarts: read(&counts.restarts),
        }
    }

    /// Whether a call made now would wait for an answer, rather than be refused.
    pub fn is_available(&self) -> bool {
        self.0.queue().refusal.is_none()
    }

    /// Uses a key. `owner` tells clients apart, which take turns. Dropping the future gives up: a call that waits is
    /// dropped, one that has begun is abandoned.
    ///
    /// A signature is verified before it is returned: one that is wrong is [`DeviceError::Failed`].
    pub async fn operate(
        &self,
        owner: u64,
        key: &FoundKey,
        operation: Operation<'static>,
        patience: Patience,
    ) -> Result<Outcome, DeviceError> {
        check(key, &operation)?;
        let signed = match &operation {
            Operation::Sign { scheme, input } => Some((*scheme, input.clone())),
            _ => None,
        };
        let settings = &self.0.settings;
        let limit = if key.touch { settings.touch_timeout } else { settings.timeout };
        let call = Call::Operate(key.slot.clone(), operation);
        let Reply::Bytes(mut bytes) = self.request(owner, call, limit, patience).await? else {
            return Err(nonsense());
        };
        let Some((scheme, input)) = signed else { return Ok(Outcome::Secret(bytes)) };
        let lie = || DeviceError::Failed("the device's signature does not verify".to_owned());
        let signature = Signature::from_bytes(scheme, key.key_type().ok_or_else(lie)?, std::mem::take(&mut *bytes));
        let signature = signature.ok_or_else(lie)?;
        if verify::verify(&key.blob, scheme, &input, &signature) {
            Ok(Outcome::Signature(signature))
        } else {
            Err(lie())
        }
    }

    /// Random bytes of the device's own making: at most [`MAX_RANDOM`].
    pub async fn random(&self, owner: u64, len: usize, patience: Patience) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        if len > MAX_RANDOM {
            return Err(DeviceError::TooLong { max: MAX_RANDOM });
        }
        match self.request(owner, Call::Random(len), self.0.settings.timeout, patience).await? {
            Reply::Bytes(bytes) if bytes.len() == len => Ok(bytes),
            _ => Err(nonsense()),
        }
    }

    /// Logs in. The caller sees to it that one login at a time is tried, and no PIN twice: when this fails with
    /// [`Restarted`](DeviceError::Restarted) or [`Timeout`](DeviceError::Timeout), or the future is dropped, the PIN may
    /// have been tried.
    pub async fn unlock(&self, pin: SecretString) -> Result<(), DeviceError> {
        self.request(0, Call::Unlock(pin), self.0.settings.timeout, Patience::default()).await.map(drop)
    }

    /// Logs out.
    pub async fn lock(&self) -> Result<(), DeviceError> {
        self.request(0, Call::Lock, self.0.settings.timeout, Patience::default()).await.map(drop)
    }

    /// Has the device looked at now, where it would have been later.
    pub fn probe(&self) {
        self.0.queue().probe_now = true;
        self.0.wake.notify_one();
    }

    /// Refuses everything from now on, ends the driver, and completes when nothing of it is left.
    pub async fn end(&self) {
        {
            let mut queue = self.0.queue();
            queue.ending = true;
        }
        self.0.refuse(&shutting_down());
        self.0.wake.notify_one();
        let _ = self.0.ended.subscribe().wait_for(|ended| *ended).await;
    }

    async fn request(&self, owner: u64, call: Call, limit: Duration, patience: Patience) -> Result<Reply, DeviceError> {
        let own = Instant::now() + limit;
        let deadline = patience.deadline.map_or(own, |deadline| deadline.min(own));
        let answer = timeout_at(deadline, self.enqueue(owner, call, limit, patience.waits_for_place));
        let answer = answer.await.unwrap_or(Err(DeviceError::Timeout));
        let counts = &self.0.counts;
        let count = |count: &AtomicU64| _ = count.fetch_add(1, Ordering::Relaxed);
        match &answer {
            Ok(_) => count(&counts.done),
            Err(error) => {
                count(&counts.failed);
                if *error == DeviceError::Timeout {
                    count(&counts.timeouts);
                }
            }
        }
        answer
    }

    async fn enqueue(&self, owner: u64, call: Call, limit: Duration, waits: bool) -> Result<Reply, DeviceError> {
        let shared = &*self.0;
        let places = Arc::clone(&shared.places);
        let place = match places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) if waits && self.is_available() => places.acquire_owned().await.map_err(|_| DeviceError::Busy)?,
            Err(_) => return Err(self.refusal().unwrap_or(DeviceError::Busy)),
        };
        let (reply, answer) = oneshot::channel();
        let id = shared.jobs.fetch_add(1, Ordering::Relaxed);
        {
            let mut queue = shared.queue();
            if let Some(refusal) = &queue.refusal {
                return Err(refusal.clone());
            }
            queue.turns.push(owner, Job { id, call, reply, limit, _place: place });
        }
        let _waiting = Waiting { shared, owner, id };
        shared.wake.notify_one();
        // A worker that has gone without an answer died: its device may have done anything.
        answer.await.unwrap_or(Err(DeviceError::Restarted))
    }

    fn refusal(&self) -> Option<DeviceError> {
        self.0.queue().refusal.clone()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {})", self.0.name, self.0.kind)
    }
}

pub(super) fn shutting_down() -> DeviceError {
    DeviceError::Failed("the vault is shutting down".to_owned())
}

fn nonsense() -> DeviceError {
    DeviceError::Failed("the device's answer makes no sense".to_owned())
}

/// What need not be asked of a device at all.
fn check(key: &FoundKey, operation: &Operation<'_>) -> Result<(), DeviceError> {
    let (known, len) = match operation {
        Operation::Sign { scheme, input } => (key.schemes.contains(scheme), input.bytes().len()),
        Operation::Decrypt { scheme, label, ciphertext } => {
            (key.decrypts.contains(scheme), label.len().max(ciphertext.len()))
        }
        Operation::Derive { scheme, peer } => (key.derives.contains(scheme), peer.len()),
    };
    if !known {
        return Err(DeviceError::unsupported("the device offers no such scheme with this key"));
    }
    if len > MAX_INPUT {
        return Err(DeviceError::TooLong { max: MAX_INPUT });
    }
    Ok(())
}
