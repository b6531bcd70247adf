//! The task that keeps a device running: it opens it, hands calls to its lanes, notices when one outlives its time or the
//! driver dies, and starts it again. Knows no vault and no person.

use std::{
    collections::{BTreeMap, VecDeque},
    future::{pending, poll_fn},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{
    DeviceError, DeviceState, FoundKey, Health, Scan, Slot, Status,
    call::{Call, Engine, Reply, Session, Underway},
    device::{Job, Shared},
};

/// The pause before a driver is started again after its second death in a row; doubled each time…
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// …up to this. After the first death there is none.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Deaths in a row after which the device counts as failed.
const MAX_DEATHS: u32 = 5;
/// A driver that has lived this long died for the first time.
const STABLE: Duration = Duration::from_secs(10);
/// How long a driver may take to let go of its device. pcscd resets the card of a process that is killed, under whoever else
/// has it open.
const PARTING: Duration = Duration::from_millis(500);
/// How long a killed driver may take to be gone. A process in an uninterruptible sleep is left to itself.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// An operation that takes no longer is brisk. With up to three ahead for each lane ([`Session::ahead`]), a call of somebody else
/// waits for four of them. After a few in a row…
const BRISK: Duration = Duration::from_millis(10);
/// …a driver is given operations before its lanes are free, so that no lane sleeps between two; until one takes longer. For a
/// slow device the wait would matter.
const BRISK_RUN: u32 = 4;
/// Each time that has to be taken back the run is to be twice as long as before, up to this, after which it is as at first: a device
/// that is now quick and now slow gains nothing by what goes to and fro.
const LONGEST_RUN: u32 = 256;

pub(super) struct Worker<E> {
    shared: Arc<Shared>,
    engine: Arc<E>,
    /// Deaths in a row.
    deaths: u32,
    /// Attempts in a row to open it that failed for a reason which will last.
    failures: u32,
}

/// Why a driver does not run any more.
enum Ended {
    /// The daemon ends.
    Told,
    /// The device went away; the driver may be well.
    Absent,
    /// The driver died or hung, with the reason for a person.
    Died(String),
}

impl<E: Engine> Worker<E> {
    pub(super) fn new(shared: Arc<Shared>, engine: Arc<E>) -> Self {
        Self { shared, engine, deaths: 0, failures: 0 }
    }

    /// Until the device is told to end.
    pub(super) async fn run(mut self) {
        while !self.shared.is_ending() {
            let pause = match self.open().await {
                Some(Ok(session)) => self.serve(session).await,
                Some(Err(error)) => self.not_opened(error),
                None => break,
            };
            self.pause(pause).await;
        }
        self.shared.refuse(&self.shared.end_reason());
        self.shared.ended.send_replace(true);
    }

    /// Opens the device and looks for its keys. `None` when told to end meanwhile.
    async fn open(&self) -> Option<Result<E::Session, DeviceError>> {
        let engine = Arc::clone(&self.engine);
        // A task of its own: a driver that panics must not take the worker with it.
        let mut opening = JoinSet::new();
        opening.spawn(async move {
            let session = engine.open().await?;
            match session.call(Call::Scan).await {
                Ok(Reply::Scan(scan)) => Ok((session, scan)),
                result => {
                    session.end(PARTING).await;
                    Err(result.err().unwrap_or_else(|| DeviceError::Failed("a scan was answered with nonsense".into())))
                }
            }
        });
        let opened = tokio::select! {
            biased;
            opened = timeout(self.shared.settings.open_timeout, opening.join_next()) => opened,
            () = self.told_to_end() => return None,
        };
        Some(match opened {
            Ok(Some(Ok(Ok((session, scan))))) => {
                let (status, scan) = (scan.status.clone(), Arc::new(scan));
                self.publish(|state| (state.status, state.scan) = (Some(status), Some(scan)));
                Ok(session)
            }
            Ok(Some(Ok(Err(error)))) => Err(error),
            Ok(_) => Err(DeviceError::Failed("the driver panicked".to_owned())),
            Err(_) => Err(DeviceError::Timeout),
        })
    }

    async fn told_to_end(&self) {
        while !self.shared.is_ending() {
            self.shared.wake.notified().await;
        }
        // The next one to look learns it as well.
        self.shared.wake.notify_one();
    }

    /// Says why the device did not open, and for how long it is left alone.
    fn not_opened(&mut self, error: DeviceError) -> Duration {
        let name = &self.shared.name;
        match error {
            DeviceError::Absent => {
                self.absent();
                self.shared.settings.probe
            }
            // What dies or hangs while it opens may do better the next time.
            DeviceError::Restarted | DeviceError::Timeout if self.deaths + 1 < MAX_DEATHS => {
                self.deaths += 1;
                warn!(device = name, "not opened, tried again: {error}");
                self.restarting();
                back_off(self.deaths).max(FIRST_PAUSE)
            }
            DeviceError::InUse => {
                self.in_use();
                self.shared.settings.probe
            }
            error => {
                self.failures = self.failures.saturating_add(1);
                self.failed(&error.to_string());
                back_off(self.failures).max(self.shared.settings.probe)
            }
        }
    }

    fn absent(&self) {
        if self.publish(|state| state.health = Health::Absent) {
            info!(device = self.shared.name, "absent");
        }
        self.shared.refuse(&DeviceError::Absent);
    }

    fn failed(&self, why: &str) {
        if self.publish(|state| state.health = Health::Failed(why.to_owned())) {
            warn!(device = self.shared.name, "failed, tried again in the background: {why}");
        }
        self.shared.refuse(&DeviceError::Failed(format!("the device has failed: {why}")));
    }

    fn in_use(&self) {
        let why = DeviceError::InUse.to_string();
        if self.publish(|state| state.health = Health::Failed(why.clone())) {
            info!(device = self.shared.name, "{why}");
        }
        self.shared.refuse(&DeviceError::InUse);
    }

    fn restarting(&self) {
        self.publish(|state| {
            state.health = if state.scan.is_some() { Health::Restarting } else { Health::Probing };
        });
    }

    /// Waits before the next attempt, unless told to look now or to end.
    async fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        loop {
            if self.shared.is_ending() || self.shared.take_probe() {
                return;
            }
            tokio::select! {
                biased;
                () = sleep_until(until) => return,
                () = self.shared.wake.notified() => {}
            }
        }
    }

    /// Serves with an open device until it ends; returns how long to wait before it is opened again.
    async fn serve(&mut self, session: E::Session) -> Duration {
        let born = Instant::now();
        self.failures = 0;
        let lanes = session.lanes().max(1);
        self.shared.lanes.store(lanes, Ordering::Relaxed);
        self.shared.admit();
        if self.publish(|state| state.health = Health::Ready) {
            info!(device = self.shared.name, lanes, "ready");
        }
        let ended = Lanes::new(&self.shared, &session, lanes).run().await;
        self.shared.lanes.store(0, Ordering::Relaxed);
        if let Ended::Died(_) = ended {
            self.restarting();
        }
        // One that hangs has had its time.
        let parting = if matches!(ended, Ended::Died(_)) { Duration::ZERO } else { PARTING };
        if timeout(END_PATIENCE, session.end(parting)).await.is_err() {
            warn!(device = self.shared.name, "the driver's process does not go away; it is left to itself");
        }
        match ended {
            Ended::Told => Duration::ZERO,
            Ended::Absent => {
                self.deaths = 0;
                self.absent();
                // It may have been put back already.
                FIRST_PAUSE
            }
            Ended::Died(why) => {
                self.shared.counts.restarts.fetch_add(1, Ordering::Relaxed);
                self.deaths = if born.elapsed() >= STABLE { 1 } else { self.deaths.saturating_add(1) };
                if self.deaths >= MAX_DEATHS {
                    self.failed(&format!("it keeps ending: {why}"));
                } else {
                    warn!(device = self.shared.name, "restarted: {why}");
                }
                back_off(self.deaths)
            }
        }
    }

    fn publish(&self, change: impl FnOnce(&mut DeviceState)) -> bool {
        publish(&self.shared, change)
    }
}

/// How long to wait after so many deaths or failures in a row.
fn back_off(times: u32) -> Duration {
    match times {
        0 | 1 => Duration::ZERO,
        n => FIRST_PAUSE.saturating_mul(1 << (n - 2).min(16)).min(LONGEST_PAUSE),
    }
}

/// Changes the published state; whether that made a difference.
fn publish(shared: &Shared, change: impl FnOnce(&mut DeviceState)) -> bool {
    shared.state.send_if_modified(|state| {
        let mut changed = DeviceState::clone(state);
        change(&mut changed);
        let differs = changed != **state;
        if differs {
            *state = Arc::new(changed);
        }
        differs
    })
}

/// The calls inside one open driver.
struct Lanes<'a, S> {
    shared: &'a Shared,
    session: &'a S,
    lanes: usize,
    running: Running,
    /// What is in the lanes, in the order of its start.
    active: BTreeMap<u64, Active>,
    /// What the driver has besides, in the order in which it begins.
    ahead: VecDeque<Ahead>,
    started: u64,
    /// Brisk operations in a row, and how many there must be.
    brisk: u32,
    run: u32,
    /// When the other lanes have had time enough to finish; set once a lane is stalled.
    drain_until: Option<Instant>,
    /// When an idle device is asked how it is.
    probe_at: Instant,
    /// Whether keys may have changed.
    rescan: bool,
    /// When it was looked for keys last.
    scanned: Instant,
    /// Whether we have changed some: what is published follows the change, and a scan comes when the device is idle, so
    /// that a key can be made, used and deleted without one in between.
    changed: bool,
}

struct Active {
    task: Task,
    kind: Kind,
    since: Instant,
    /// From then on it is stalled.
    limit: Instant,
    stalled: bool,
    /// Whether keys have changed since it began, or somebody has logged in or out: a scan may tell of what was there before, and
    /// of both.
    outdated: bool,
}

/// An operation that waits inside the driver until a lane has answered.
struct Ahead {
    id: u64,
    /// To be made anew if the driver ends before.
    job: Job,
    /// Whether it was taken back. The driver has not said yet whether it was in time.
    withdrawn: bool,
}

/// What a call is for.
enum Task {
    /// Somebody's.
    Job { reply: oneshot::Sender<Result<Reply, DeviceError>>, effect: Effect },
    /// The same, of an operation that was [`Ahead`].
    Ahead(Job),
    /// Our own, to see how the device is.
    Probe,
}

/// What a call has to do with the keys of a device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It looks for all of them.
    Look,
    /// It writes some.
    Change,
    /// It uses one.
    Operate,
    /// It decides which of them can be seen.
    Login,
    /// None of these.
    Other,
}

impl Kind {
    fn of(call: &Call) -> Self {
        match call {
            Call::Scan | Call::Health | Call::CardStatus => Self::Look,
            Call::Generate(_) | Call::Import(..) | Call::Rename(..) | Call::Delete(_) | Call::ChangeCard(_) => {
                Self::Change
            }
            Call::Operate(..) => Self::Operate,
            Call::Unlock(..) | Call::Lock => Self::Login,
            Call::Random(_) => Self::Other,
        }
    }
}

/// What a successful call changes on the device.
enum Effect {
    LogsIn,
    LogsOut,
    /// The answer is a key that is there from now on.
    Makes,
    Renames(Slot, String),
    Deletes(Slot),
    /// Anything about it may be different from now on.
    ChangesCard,
    None,
}

impl Effect {
    fn of(call: &Call) -> Self {
        match call {
            Call::Unlock(..) => Self::LogsIn,
            Call::Lock => Self::LogsOut,
            Call::Generate(_) | Call::Import(..) => Self::Makes,
            Call::Rename(slot, label) => Self::Renames(slot.clone(), label.clone()),
            Call::Delete(slot) => Self::Deletes(slot.clone()),
            Call::ChangeCard(_) => Self::ChangesCard,
            Call::Scan | Call::Health | Call::Random(_) | Call::Operate(..) | Call::CardStatus => Self::None,
        }
    }
}

impl<'a, S: Session> Lanes<'a, S> {
    fn new(shared: &'a Shared, session: &'a S, lanes: usize) -> Self {
        Self {
            shared,
            session,
            lanes,
            running: Running::default(),
            active: BTreeMap::new(),
            ahead: VecDeque::new(),
            started: 0,
            brisk: 0,
            run: BRISK_RUN,
            drain_until: None,
            probe_at: Instant::now() + shared.settings.probe,
            rescan: false,
            scanned: Instant::now(),
            changed: false,
        }
    }

    async fn run(mut self) -> Ended {
        let mut died = std::pin::pin!(self.session.died());
        let ended = loop {
            if self.shared.is_ending() {
                break Ended::Told;
            }
            self.fill();
            if self.drain_until.is_some() && self.active.values().all(|active| active.stalled) {
                break Ended::Died("an operation did not end".to_owned());
            }
            let limit = self.active.values().filter(|active| !active.stalled).map(|active| active.limit).min();
            let probe = self.active.is_empty().then_some(self.probe_at);
            tokio::select! {
                biased;
                (id, result) = self.running.next() => {
                    if let Some(ended) = self.done(id, result) {
                        break ended;
                    }
                }
                why = &mut died => break Ended::Died(why),
                id = given_up(&mut self.ahead) => self.withdraw(id),
                () = at(limit) => self.stall(),
                () = at(self.drain_until) => break Ended::Died("an operation did not end".to_owned()),
                () = at(probe), if self.changed => self.rescan = true,
                () = at(probe) => self.start(Call::Health, Task::Probe, self.shared.settings.timeout),
                () = self.shared.wake.notified() => {
                    if self.shared.take_probe() {
                        self.rescan = true;
                    }
                }
            }
        };
        self.give_up(match ended {
            Ended::Told => self.shared.end_reason(),
            // Whichever call noticed it first.
            Ended::Absent => DeviceError::Absent,
            Ended::Died(_) => DeviceError::Restarted,
        });
        ended
    }

    /// Gives free lanes work. A stalled lane keeps the others from beginning anything.
    fn fill(&mut self) {
        while self.drain_until.is_none() && self.active.len() < self.lanes {
            let underway = |kind| self.active.values().any(|active| active.kind == kind);
            // A token's keys are not changed while it is looked at: what is half written is taken for gone.
            // Nor is it looked at while it is logged in to or out of.
            let may_look = !underway(Kind::Change) && !underway(Kind::Login);
            let may_change = !underway(Kind::Look) && !self.rescan;
            // An operation that has the driver die would take the answer to a PIN with it: whether a try was spent.
            let may_log_in = !underway(Kind::Operate) && self.ahead.is_empty();
            let may_operate = self.shared.logins.load(Ordering::Relaxed) == 0;
            if self.rescan && may_look {
                (self.rescan, self.changed, self.scanned) = (false, false, Instant::now());
                self.start(Call::Scan, Task::Probe, self.shared.settings.open_timeout);
            } else if let Some(job) = self.shared.next_job(|call| match Kind::of(call) {
                Kind::Look => may_look,
                Kind::Change => may_change,
                Kind::Operate => may_operate,
                Kind::Login => may_log_in || matches!(call, Call::Lock),
                Kind::Other => true,
            }) {
                let effect = Effect::of(&job.call);
                self.start(job.call, Task::Job { reply: job.reply, effect }, job.limit);
            } else {
                break;
            }
        }
        self.fill_ahead();
        self.shared.active.store(self.active.len(), Ordering::Relaxed);
        self.shared.ahead.store(self.ahead.len(), Ordering::Relaxed);
    }

    /// Gives the driver operations for when its lanes come free. Anything else, a scan that is due included, waits for a
    /// lane, and then nothing goes before it. So does what wants a touch: it may keep its lane for long.
    fn fill_ahead(&mut self) {
        let limit = self.shared.settings.timeout;
        let may = |job: &Job| Kind::of(&job.call) == Kind::Operate && job.limit <= limit;
        while self.drain_until.is_none()
            && self.is_brisk()
            && !self.rescan
            && self.shared.logins.load(Ordering::Relaxed) == 0
            && self.active.len() >= self.lanes
            && self.ahead.len() < self.session.ahead()
            && let Some(job) = self.shared.next_job_ahead(may)
        {
            let id = self.send(job.call.clone());
            self.ahead.push_back(Ahead { id, job, withdrawn: false });
        }
    }

    fn start(&mut self, call: Call, task: Task, limit: Duration) {
        let kind = Kind::of(&call);
        let id = self.send(call);
        self.begun(id, kind, task, limit);
    }

    fn send(&mut self, call: Call) -> u64 {
        let id = self.started;
        self.started += 1;
        self.running.0.push((id, Box::pin(self.session.call(call))));
        id
    }

    fn begun(&mut self, id: u64, kind: Kind, task: Task, limit: Duration) {
        let since = Instant::now();
        let active = Active { task, kind, since, limit: since + limit, stalled: false, outdated: false };
        self.active.insert(id, active);
    }

    /// Knows of calls that the driver has begun because lanes have answered. One that was taken back it has begun, or it
    /// says right away that it has not.
    fn follow(&mut self) {
        while self.active.len() < self.lanes
            && let Some(Ahead { id, job, .. }) = self.ahead.pop_front()
        {
            self.has_begun(id, job);
        }
    }

    fn has_begun(&mut self, id: u64, job: Job) {
        let limit = job.limit;
        self.begun(id, Kind::of(&job.call), Task::Ahead(job), limit);
    }

    fn withdraw(&mut self, id: u64) {
        if let Some(ahead) = self.ahead.iter_mut().find(|ahead| ahead.id == id && !ahead.withdrawn) {
            ahead.withdrawn = true;
            self.running.withdraw(id);
        }
    }

    /// The driver gives back what it has not begun.
    fn take_back(&mut self) {
        for n in 0..self.ahead.len() {
            self.withdraw(self.ahead[n].id);
        }
    }

    fn stall(&mut self) {
        let now = Instant::now();
        for active in self.active.values_mut().filter(|active| active.limit <= now) {
            active.stalled = true;
        }
        self.drain_until.get_or_insert(now + self.shared.settings.grace);
        self.take_back();
        warn!(device = self.shared.name, "stalled: an operation has outlived its time");
        publish(self.shared, |state| state.health = Health::Stalled);
    }

    /// Passes on an answer. `Some` when the session is over.
    fn done(&mut self, id: u64, result: Result<Reply, DeviceError>) -> Option<Ended> {
        let Some(active) = self.active.remove(&id) else { return self.done_ahead(id, result) };
        self.probe_at = Instant::now();
        let turned_slow = self.note_pace(&active, &result);
        let is_login = matches!(active.task, Task::Job { effect: Effect::LogsIn, .. });
        // After a login that failed, people shall be told at once what tries are left.
        if !is_login || result.is_ok() {
            self.probe_at += self.shared.settings.probe;
        }
        let ended = match &result {
            Err(DeviceError::Absent) => Some(Ended::Absent),
            Err(DeviceError::Restarted) => Some(Ended::Died("the driver died".to_owned())),
            _ => None,
        };
        // A login does not wait for a look: what that finds is of before or after, and nobody knows which.
        let amid_login = self.active.values().any(|active| active.kind == Kind::Login);
        if active.kind == Kind::Login && !result.as_ref().is_err_and(DeviceError::is_of_no_login) {
            self.outdate();
        }
        // What it saw may be gone; the next one tells.
        let outdated = (active.outdated || amid_login) && matches!(result, Ok(Reply::Scan(_) | Reply::Status(_)));
        self.rescan |= outdated;
        match active.task {
            Task::Job { reply, effect } => {
                if !outdated {
                    self.learn(&result, effect);
                }
                // Whoever asked may have given up.
                let _ = reply.send(result);
            }
            Task::Ahead(job) if matches!(result, Ok(Reply::Withdrawn)) => self.shared.put_back(job),
            Task::Ahead(job) => {
                self.learn(&result, Effect::None);
                let _ = job.reply.send(result);
            }
            Task::Probe if outdated => {}
            Task::Probe => self.probed(result),
        }
        // A stalled lane came back before it was ended: its driver is as good as new.
        if ended.is_none() && self.drain_until.is_some() && !self.active.values().any(|active| active.stalled) {
            self.drain_until = None;
            publish(self.shared, |state| state.health = Health::Ready);
        }
        if ended.is_none() {
            self.follow();
            if turned_slow {
                self.take_back();
            }
        }
        ended
    }

    fn is_brisk(&self) -> bool {
        self.brisk >= self.run
    }

    /// Counts brisk operations. Whether the device was brisk and is no more.
    fn note_pace(&mut self, active: &Active, result: &Result<Reply, DeviceError>) -> bool {
        let was_brisk = self.is_brisk();
        match result {
            // It has not been made.
            Ok(Reply::Withdrawn) => {}
            // What waits for a touch says nothing of the device.
            _ if active.kind != Kind::Operate || active.limit - active.since > self.shared.settings.timeout => {}
            _ if active.since.elapsed() > BRISK => self.brisk = 0,
            Ok(_) => self.brisk = self.brisk.saturating_add(1),
            Err(_) => {}
        }
        let turned_slow = was_brisk && self.brisk == 0;
        if turned_slow {
            self.run = (2 * self.run).min(LONGEST_RUN);
        } else if self.brisk >= LONGEST_RUN {
            self.run = BRISK_RUN;
        }
        turned_slow
    }

    /// The same of a call that has not begun, as far as is known.
    fn done_ahead(&mut self, id: u64, result: Result<Reply, DeviceError>) -> Option<Ended> {
        let at = self.ahead.iter().position(|ahead| ahead.id == id)?;
        if matches!(result, Err(DeviceError::Restarted)) {
            // It stays what did not begin.
            return Some(Ended::Died("the driver died".to_owned()));
        }
        let Ahead { job, .. } = self.ahead.remove(at)?;
        if matches!(result, Ok(Reply::Withdrawn)) {
            self.shared.put_back(job);
            return None;
        }
        // It is ready before the answer that made room for it was looked at.
        self.has_begun(id, job);
        self.done(id, result)
    }

    /// What an answer to somebody else's call says about the device.
    fn learn(&mut self, result: &Result<Reply, DeviceError>, effect: Effect) {
        let status = |change: &dyn Fn(&mut Status)| {
            publish(self.shared, |state| {
                if let Some(status) = &mut state.status {
                    change(status);
                }
            });
        };
        match (result, effect) {
            (Ok(Reply::Key(key)), Effect::Makes) => self.keys_changed(|keys| {
                keys.retain(|other| other.slot != key.slot);
                keys.push(FoundKey::clone(key));
            }),
            (Ok(_), Effect::Renames(slot, label)) => self.keys_changed(|keys| {
                if let Some(key) = keys.iter_mut().find(|key| key.slot == slot) {
                    key.label = label;
                }
            }),
            (Ok(_), Effect::Deletes(slot)) => self.keys_changed(|keys| keys.retain(|key| key.slot != slot)),
            (Ok(_), Effect::ChangesCard) => {
                self.keys_changed(|_| {});
                self.rescan = true;
            }
            (Ok(_), Effect::LogsIn) => {
                status(&|status| status.locked = false);
                // Some tokens show their keys, and what tries are left, only now.
                self.rescan = true;
            }
            (Ok(_), Effect::LogsOut) => status(&|status| status.locked = true),
            // An administrator's: it says nothing of the user's.
            (Err(DeviceError::PinWrong { .. } | DeviceError::PinBlocked), Effect::Makes | Effect::ChangesCard) => {}
            (Err(DeviceError::PinRequired), _) => status(&|status| status.locked = true),
            (Err(DeviceError::PinWrong { left }), _) => status(&|status| status.tries_left = *left),
            (Err(DeviceError::PinBlocked), _) => status(&|status| status.tries_left = Some(0)),
            // Not for each request, where the scan shows the key all the same.
            (Err(DeviceError::NoSuchKey), _) if self.scanned.elapsed() >= self.shared.settings.probe => {
                self.rescan = true;
            }
            (Err(DeviceError::NoSuchKey), _) => self.changed = true,
            (Ok(Reply::Scan(scan)), _) => self.found(scan.clone()),
            _ => {}
        }
    }

    fn found(&self, scan: Scan) {
        let (status, scan) = (Some(scan.status.clone()), Some(Arc::new(scan)));
        // Told even where it found what was known: who waits for a scan learns that there was one.
        self.shared.state.send_modify(|state| {
            *state = Arc::new(DeviceState { health: state.health.clone(), status, scan });
        });
    }

    /// Has the published keys follow a change that was made through us, before its caller hears of it. What a scan makes
    /// of it comes later; one that began before may have missed it.
    fn keys_changed(&mut self, change: impl FnOnce(&mut Vec<FoundKey>)) {
        publish(self.shared, |state| {
            if let Some(scan) = &state.scan {
                let mut changed = Scan::clone(scan);
                change(&mut changed.keys);
                state.scan = Some(Arc::new(changed));
            }
        });
        self.outdate();
        self.changed = true;
    }

    /// What is being looked at is not what will be found.
    fn outdate(&mut self) {
        for active in self.active.values_mut() {
            active.outdated = true;
        }
    }

    fn probed(&mut self, result: Result<Reply, DeviceError>) {
        match result {
            Ok(Reply::Scan(scan)) => self.found(scan),
            Ok(Reply::Status(status)) => {
                // The new generation is known when a scan has found what is in it.
                let known = self.shared.state.borrow().status.as_ref().map(|known| known.generation);
                self.rescan |= known != Some(status.generation);
                let generation = known.unwrap_or(status.generation);
                publish(self.shared, |state| state.status = Some(Status { generation, ..status }));
            }
            Ok(_) => debug!(device = self.shared.name, "a probe was answered with nonsense"),
            Err(error) => debug!(device = self.shared.name, "a probe failed: {error}"),
        }
    }

    /// Answers for the calls that the driver takes with it.
    fn give_up(&mut self, why: DeviceError) {
        // Answers that have come already count.
        while let Poll::Ready((id, result)) = self.running.poll_next(&mut Context::from_waker(Waker::noop())) {
            let _ = self.done(id, result);
        }
        for Ahead { job, .. } in std::mem::take(&mut self.ahead) {
            self.shared.put_back(job);
        }
        for active in std::mem::take(&mut self.active).into_values() {
            if let Task::Job { reply, .. } | Task::Ahead(Job { reply, .. }) = active.task {
                let error = if active.stalled { DeviceError::Timeout } else { why.clone() };
                let _ = reply.send(Err(error));
            }
        }
        self.shared.active.store(0, Ordering::Relaxed);
        self.shared.ahead.store(0, Ordering::Relaxed);
    }
}

/// An operation ahead whose caller has given up, once there is one.
async fn given_up(ahead: &mut VecDeque<Ahead>) -> u64 {
    poll_fn(|cx| {
        let mut waiting = ahead.iter_mut().filter(|ahead| !ahead.withdrawn);
        match waiting.find_map(|ahead| ahead.job.reply.poll_closed(cx).is_ready().then_some(ahead.id)) {
            Some(id) => Poll::Ready(id),
            None => Poll::Pending,
        }
    })
    .await
}

/// Calls on their way: they only wait for answers, so that the worker polls them itself, without a task for each.
#[derive(Default)]
struct Running(Vec<(u64, Pin<Box<dyn Underway>>)>);

type Answer = Result<Reply, DeviceError>;

impl Running {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u64, Answer)> {
        for (at, (id, call)) in self.0.iter_mut().enumerate() {
            if let Poll::Ready(result) = call.as_mut().poll(cx) {
                let id = *id;
                drop(self.0.remove(at));
                return Poll::Ready((id, result));
            }
        }
        Poll::Pending
    }

    fn withdraw(&self, id: u64) {
        if let Some((_, call)) = self.0.iter().find(|(other, _)| *other == id) {
            call.withdraw();
        }
    }

    async fn next(&mut self) -> (u64, Answer) {
        poll_fn(|cx| self.poll_next(cx)).await
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests;
