//! The handle of a device: its queue, its deadlines, its state. Knows calls and time; not what runs the driver.

use std::{
    fmt,
    ops::RangeInclusive,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use secrecy::SecretString;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch},
    time::{Instant, timeout, timeout_at},
};
use zeroize::Zeroizing;

use super::{
    CardChange, CardStatus, DeriveScheme, DeviceError, DeviceState, FoundKey, Health, NewKey, Operation, Outcome,
    PrivateHalf, Scan, Signature, Slot,
    call::{Call, Engine, Reply},
    life,
    operation::MAX_INPUT,
    turns::Turns,
    verify::RsaKeys,
    want::{Want, Wanted, Wants},
    worker::Worker,
};
use crate::public_key::KeyType;

/// The most random bytes that one call gives.
pub const MAX_RANDOM: usize = 1024;

/// The bounds of a device. Each has a default that fits tokens and cards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Calls that may wait for a lane, besides those whose callers wait however full it is.
    pub queue: usize,
    /// How long an operation may take, the wait in the queue included, unless its caller asks for less.
    pub timeout: Duration,
    /// The same for operations that want a touch.
    pub touch_timeout: Duration,
    /// The same for making a key, or taking one over: RSA takes some cards minutes.
    pub generate_timeout: Duration,
    /// How long opening and scanning may take.
    pub open_timeout: Duration,
    /// How long the other lanes may take to finish when one is stalled.
    pub grace: Duration,
    /// How often a device that is idle, absent or failed is looked at.
    pub probe: Duration,
    /// Whether a request for one of its keys waits for it while it is absent, up to its deadline.
    pub wait: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue: 1024,
            timeout: Duration::from_secs(5),
            touch_timeout: Duration::from_secs(30),
            generate_timeout: Duration::from_secs(120),
            open_timeout: Duration::from_secs(30),
            grace: Duration::from_secs(1),
            probe: Duration::from_secs(5),
            wait: false,
        }
    }
}

/// How long a caller waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Patience {
    /// Its own deadline; the device's applies where that is sooner.
    pub deadline: Option<Instant>,
    /// Whether it waits although the queue is full, rather than take [`DeviceError::Busy`] for an answer.
    pub waits_for_place: bool,
}

/// Whose turns logins and logouts have: nobody's call is before one, and may not begin until it has.
const LOGINS: u64 = u64::MAX;
const LOGOUTS: u64 = u64::MAX - 1;

/// Of logins and logouts: they are few, and what comes of them decides about all that waits.
const PATIENT: Patience = Patience { deadline: None, waits_for_place: true };

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

/// Why a login failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoginError {
    /// The reason.
    pub error: DeviceError,
    /// Whether the PIN went to the driver: only then can it have cost a try.
    pub sent: bool,
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
    /// A permit for each job that may wait in the queue, besides those whose callers wait however full it is: how many
    /// these are is for whoever has the callers to bound.
    places: Arc<Semaphore>,
    jobs: AtomicU64,
    /// Calls that the driver has and has not begun.
    pub(super) ahead: AtomicUsize,
    /// Logins that wait or are under way.
    pub(super) logins: AtomicUsize,
    /// Calls inside the driver, and how many it makes at once; 0 while there is none.
    pub(super) active: AtomicUsize,
    pub(super) lanes: AtomicUsize,
    pub(super) counts: Counts,
    /// True when the worker has ended and nothing of the driver is left.
    pub(super) ended: watch::Sender<bool>,
    wants: Wants,
    rsa_keys: RsaKeys,
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
    /// Why the device ends, once it does.
    ending: Option<DeviceError>,
    probe_now: bool,
    /// Whether a lane has nothing to do, so that the worker wants to hear of the next job. Otherwise it looks by itself when a
    /// lane comes free.
    is_awaited: bool,
}

/// A call that waits for a lane, and who waits for its answer.
pub(super) struct Job {
    id: u64,
    owner: u64,
    pub(super) call: Call,
    pub(super) reply: oneshot::Sender<Result<Reply, DeviceError>>,
    /// How long the driver may take from when it begins. Not the caller's own deadline: who asks for little must not be
    /// able to have a device restarted that merely takes its time.
    pub(super) limit: Duration,
    /// Becomes true when it is taken out of the queue to be made.
    begun: Arc<AtomicBool>,
    /// `None` for a caller that waits however full the queue is.
    place: Option<OwnedSemaphorePermit>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job that somebody still waits for, of those that may begin now.
    pub(super) fn next_job(&self, may: impl Fn(&Call) -> bool) -> Option<Job> {
        self.take_job(|turns| turns.pop_if(|job| job.reply.is_closed() || may(&job.call)))
    }

    /// The job whose turn it is, if it is one that may be given to the driver before there is a lane for it.
    pub(super) fn next_job_ahead(&self, may: impl Fn(&Job) -> bool) -> Option<Job> {
        let mut job = self.take_job(|turns| turns.pop_next_if(|job| job.reply.is_closed() || may(job)))?;
        // Nobody can be crowded out of it here.
        job.place = None;
        Some(job)
    }

    fn take_job(&self, mut next: impl FnMut(&mut Turns<Job>) -> Option<Job>) -> Option<Job> {
        let mut queue = self.queue();
        let job = std::iter::from_fn(|| next(&mut queue.turns)).find(|job| !job.reply.is_closed());
        queue.is_awaited = job.is_none();
        job.inspect(|job| job.begun.store(true, Ordering::Relaxed))
    }

    /// Has a job wait again that the driver had and did not begin: before those that came after it.
    pub(super) fn put_back(&self, job: Job) {
        let mut queue = self.queue();
        match queue.refusal.clone() {
            Some(refusal) => {
                drop(queue);
                let _ = job.reply.send(Err(refusal));
            }
            None if job.reply.is_closed() => drop(queue),
            None => {
                job.begun.store(false, Ordering::Relaxed);
                queue.turns.put_back(job.owner, job, |one, other| one.id < other.id);
            }
        }
    }

    /// A place in the full queue for an owner that has fewer than another: whoever fills it must not keep the others out.
    fn place_of_another(&self, owner: u64) -> Option<OwnedSemaphorePermit> {
        let Job { reply, place, .. } = self.queue().turns.crowd_out(owner, |job| job.place.is_some())?;
        let _ = reply.send(Err(DeviceError::Busy));
        place
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
        if queue.ending.is_none() {
            queue.refusal = None;
        }
    }

    pub(super) fn is_ending(&self) -> bool {
        self.queue().ending.is_some()
    }

    /// What callers are told when the device ends.
    pub(super) fn end_reason(&self) -> DeviceError {
        self.queue().ending.clone().unwrap_or(DeviceError::Gone)
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
        // Dropped outside the lock, like all that may be long.
        let job = self.shared.queue().turns.remove(self.owner, |job| job.id == self.id);
        drop(job);
    }
}

/// A login, until its outcome is known: no operation begins meanwhile.
struct Login<'a>(&'a Shared);

impl<'a> Login<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.logins.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Login<'_> {
    fn drop(&mut self) {
        self.0.logins.fetch_sub(1, Ordering::Relaxed);
        self.0.wake.notify_one();
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
            ahead: AtomicUsize::new(0),
            logins: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            lanes: AtomicUsize::new(0),
            counts: Counts::default(),
            ended: watch::Sender::new(false),
            wants: Wants::default(),
            rsa_keys: RsaKeys::default(),
        });
        let engine = Arc::new(engine);
        engine.spawn(Worker::new(Arc::clone(&shared), Arc::clone(&engine)).run());
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

    /// Whether it wants a PIN before its keys can be used; false where that is not known.
    pub fn is_locked(&self) -> bool {
        self.0.state.borrow().status.as_ref().is_some_and(|status| status.locked)
    }

    /// Tells every scan, and every change of its state but for [`Health::Busy`], which shows as ready.
    pub fn watch(&self) -> watch::Receiver<Arc<DeviceState>> {
        self.0.state.subscribe()
    }

    /// How many calls its driver makes at once; 0 while there is none.
    pub fn lanes(&self) -> usize {
        self.0.lanes.load(Ordering::Relaxed)
    }

    /// Calls that wait for a lane, and calls inside the driver.
    pub fn load(&self) -> (usize, usize) {
        (self.0.queue().turns.len() + self.0.ahead.load(Ordering::Relaxed), self.0.active.load(Ordering::Relaxed))
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

    /// Lets it be known that a person is to do something at the device, until the returned value is dropped.
    pub fn want(&self, want: Want) -> Wanted {
        self.0.wants.add(want)
    }

    /// What a person is to do at the device now; where it is more than one thing, the first.
    pub fn wanted(&self) -> Option<Arc<Want>> {
        self.0.wants.first()
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
        operation: Arc<Operation<'static>>,
        patience: Patience,
    ) -> Result<Outcome, DeviceError> {
        check(key, &operation)?;
        let settings = &self.0.settings;
        let limit = if key.touch { settings.touch_timeout } else { settings.timeout };
        let call = Call::Operate(key.slot.clone(), Arc::clone(&operation));
        let Reply::Bytes(mut bytes) = self.request(owner, call, limit, patience).await? else {
            return Err(nonsense());
        };
        let Operation::Sign { scheme, input } = &*operation else {
            let is_one = secret_lengths(key, &operation).contains(&bytes.len());
            return if is_one { Ok(Outcome::Secret(bytes)) } else { Err(nonsense()) };
        };
        let lie = || DeviceError::Failed("the device's signature does not verify".to_owned());
        let signature = Signature::from_bytes(*scheme, key.key_type().ok_or_else(lie)?, std::mem::take(&mut *bytes));
        let signature = signature.ok_or_else(lie)?;
        if self.0.rsa_keys.verify(&key.blob, *scheme, input, &signature) {
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

    /// Makes a key. Once it is answered, the key is in [`state`](Self::state). When this fails with
    /// [`Restarted`](DeviceError::Restarted) or [`Timeout`](DeviceError::Timeout), or the future is dropped, the key may
    /// be there all the same, and a scan finds it.
    pub async fn generate(&self, owner: u64, new: NewKey, patience: Patience) -> Result<FoundKey, DeviceError> {
        let algorithm = new.algorithm;
        self.made(owner, Call::Generate(new), algorithm, patience).await
    }

    /// Takes over a private key; otherwise like [`generate`](Self::generate).
    pub async fn import(
        &self,
        owner: u64,
        new: NewKey,
        private: PrivateHalf,
        patience: Patience,
    ) -> Result<FoundKey, DeviceError> {
        let algorithm = new.algorithm;
        self.made(owner, Call::Import(new, private), algorithm, patience).await
    }

    async fn made(
        &self,
        owner: u64,
        call: Call,
        algorithm: life::Algorithm,
        patience: Patience,
    ) -> Result<FoundKey, DeviceError> {
        let Reply::Key(key) = self.request(owner, call, self.0.settings.generate_timeout, patience).await? else {
            return Err(nonsense());
        };
        life::check_made(&key, algorithm)?;
        Ok(*key)
    }

    /// Calls the key in `slot` something else. Once it is answered, [`state`](Self::state) has the new label.
    pub async fn rename(&self, owner: u64, slot: Slot, label: String, patience: Patience) -> Result<(), DeviceError> {
        self.request(owner, Call::Rename(slot, label), self.0.settings.timeout, patience).await.map(drop)
    }

    /// Deletes the key in `slot`. Once it is answered, the key is not in [`state`](Self::state) any more.
    pub async fn delete(&self, owner: u64, slot: Slot, patience: Patience) -> Result<(), DeviceError> {
        self.request(owner, Call::Delete(slot), self.0.settings.timeout, patience).await.map(drop)
    }

    /// What an OpenPGP card says of itself.
    pub async fn card_status(&self, owner: u64, patience: Patience) -> Result<CardStatus, DeviceError> {
        match self.request(owner, Call::CardStatus, self.0.settings.timeout, patience).await? {
            Reply::Card(status) => Ok(*status),
            _ => Err(nonsense()),
        }
    }

    /// Changes an OpenPGP card. Once it is answered, [`state`](Self::state) has what came of it, if the card could be
    /// looked at. When this fails with [`Restarted`](DeviceError::Restarted) or [`Timeout`](DeviceError::Timeout), it may
    /// have been done, and PINs may have been tried.
    pub async fn change_card(&self, owner: u64, change: CardChange, patience: Patience) -> Result<(), DeviceError> {
        self.request(owner, Call::ChangeCard(change), self.0.settings.generate_timeout, patience).await?;
        let _ = self.scan().await;
        Ok(())
    }

    /// Logs in. The caller sees to it that one login at a time is tried, and no PIN twice: when the PIN was sent and this
    /// fails with [`Restarted`](DeviceError::Restarted) or [`Timeout`](DeviceError::Timeout), or the future is dropped,
    /// it may have been tried.
    ///
    /// A lane is waited for as long as an operation may take. What becomes of a PIN that was sent is waited for until the
    /// driver says it or is ended, which is as long again and [`Settings::grace`]: a refusal must not go unheard.
    ///
    /// With `even_last` also when one try is left: whoever gave the PIN knew.
    pub async fn log_in(&self, pin: SecretString, even_last: bool) -> Result<(), LoginError> {
        let begun = Arc::new(AtomicBool::new(false));
        let limit = self.0.settings.timeout;
        let _login = Login::new(&self.0);
        let answer = {
            // Out of the queue before it is asked whether it has begun.
            let mut asked = pin!(self.enqueue(LOGINS, Call::Unlock(pin, even_last), limit, true, &begun));
            match timeout(limit, &mut asked).await {
                Ok(answer) => answer,
                Err(_) if begun.load(Ordering::Relaxed) => asked.await,
                Err(_) => Err(DeviceError::Timeout),
            }
        };
        let done = self.counted(answer);
        done.map(drop).map_err(|error| LoginError { error, sent: begun.load(Ordering::Relaxed) })
    }

    /// [`Device::log_in`], even with the last try, for whom the reason is enough.
    pub async fn unlock(&self, pin: SecretString) -> Result<(), DeviceError> {
        self.log_in(pin, true).await.map_err(|failed| failed.error)
    }

    /// Logs out.
    pub async fn lock(&self) -> Result<(), DeviceError> {
        self.request(LOGOUTS, Call::Lock, self.0.settings.timeout, PATIENT).await.map(drop)
    }

    /// Has the device looked at now, where it would have been later.
    pub fn probe(&self) {
        self.0.queue().probe_now = true;
        self.0.wake.notify_one();
    }

    /// Refuses everything from now on for this reason, and ends the driver: [`Device::ended`] tells when.
    pub fn begin_end(&self, reason: DeviceError) {
        let reason = self.0.queue().ending.get_or_insert(reason).clone();
        self.0.refuse(&reason);
        self.0.wake.notify_one();
    }

    /// Completes when the device was told to end and nothing of its driver is left.
    pub async fn ended(&self) {
        let _ = self.0.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Whether both are handles of one device.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Looks for keys, spending no PIN try, and returns what there is. The state has it, too, unless keys changed or somebody logged
    /// in or out meanwhile; then the next scan tells.
    pub async fn scan(&self) -> Result<Arc<Scan>, DeviceError> {
        match self.request(0, Call::Scan, self.0.settings.open_timeout, Patience::default()).await? {
            Reply::Scan(scan) => Ok(Arc::new(scan)),
            _ => Err(nonsense()),
        }
    }

    async fn request(&self, owner: u64, call: Call, limit: Duration, patience: Patience) -> Result<Reply, DeviceError> {
        let own = Instant::now() + limit;
        let deadline = patience.deadline.map_or(own, |deadline| deadline.min(own));
        let begun = Arc::default();
        let asked = self.enqueue(owner, call, limit, patience.waits_for_place, &begun);
        let answer = timeout_at(deadline, asked).await;
        self.counted(answer.unwrap_or(Err(DeviceError::Timeout)))
    }

    fn counted(&self, answer: Result<Reply, DeviceError>) -> Result<Reply, DeviceError> {
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

    /// Makes `begun` true when the call goes to the driver.
    async fn enqueue(
        &self,
        owner: u64,
        call: Call,
        limit: Duration,
        waits: bool,
        begun: &Arc<AtomicBool>,
    ) -> Result<Reply, DeviceError> {
        let shared = &*self.0;
        // Where there is no place, there is one beside the others for who waits: in its turn, not behind a flood.
        let place = match Arc::clone(&shared.places).try_acquire_owned() {
            _ if waits => None,
            Ok(place) => Some(place),
            Err(_) => Some(shared.place_of_another(owner).ok_or_else(|| self.refusal().unwrap_or(DeviceError::Busy))?),
        };
        let (reply, answer) = oneshot::channel();
        let id = shared.jobs.fetch_add(1, Ordering::Relaxed);
        let is_awaited = {
            let mut queue = shared.queue();
            if let Some(refusal) = &queue.refusal {
                return Err(refusal.clone());
            }
            let begun = Arc::clone(begun);
            queue.turns.push(owner, Job { id, owner, call, reply, limit, begun, place });
            std::mem::take(&mut queue.is_awaited)
        };
        let _waiting = Waiting { shared, owner, id };
        if is_awaited {
            shared.wake.notify_one();
        }
        // A worker that has gone without an answer died: its device may have done anything.
        answer.await.unwrap_or(Err(DeviceError::Restarted))
    }

    /// Why a call made now would be refused; `None` where it would wait for an answer.
    pub fn refusal(&self) -> Option<DeviceError> {
        self.0.queue().refusal.clone()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {})", self.0.name, self.0.kind)
    }
}

fn nonsense() -> DeviceError {
    DeviceError::Failed("the device's answer makes no sense".to_owned())
}

/// How long the secret that an operation gives may be: all that can be told of it from outside.
fn secret_lengths(key: &FoundKey, operation: &Operation<'_>) -> RangeInclusive<usize> {
    match (operation, key.key_type()) {
        (Operation::Decrypt { ciphertext, .. }, _) => 0..=ciphertext.len(),
        (Operation::Derive { scheme: DeriveScheme::Ecdh, .. }, Some(KeyType::Ecdsa(curve))) => {
            curve.scalar_len()..=curve.scalar_len()
        }
        (Operation::Derive { scheme: DeriveScheme::X25519, .. }, _) => 32..=32,
        _ => 0..=0,
    }
}

/// What need not be asked of a device at all.
fn check(key: &FoundKey, operation: &Operation<'_>) -> Result<(), DeviceError> {
    let known = operation.is_among(&key.schemes, &key.decrypts, &key.derives);
    let len = match operation {
        Operation::Sign { input, .. } => input.bytes().len(),
        Operation::Decrypt { label, ciphertext, .. } => label.len().max(ciphertext.len()),
        Operation::Derive { peer, .. } => peer.len(),
    };
    if !known {
        return Err(DeviceError::unsupported("the device offers no such scheme with this key"));
    }
    if len > MAX_INPUT {
        return Err(DeviceError::TooLong { max: MAX_INPUT });
    }
    Ok(())
}
