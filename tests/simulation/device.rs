//! Devices that do what their mood says. Knows drivers and the run's invariants; no vault.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::{Future, pending},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use strongroom::devices::{
    DeviceError, Driver, Input, Scan, Scheme, Slot, Status,
    call::{Call, Engine, Reply, Session, Underway},
    in_process::{Here, InProcess},
};
use tokio::{
    sync::{Notify, Semaphore},
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    keys,
    plan::{DevicePlan, Mood},
    random::Random,
    world::{Deed, World},
};

pub const RIGHT_PIN: &str = "right";
/// Few, so that people repeat themselves.
pub const WRONG_PINS: [&str; 4] = ["wrong 1", "wrong 2", "wrong 3", "wrong 4"];
const TRIES: u8 = 3;
/// A call that takes as long, in milliseconds, may outlive its time and have the driver restarted.
const OUTLIVES: u64 = 400;

/// A device as such: what stays when its driver is restarted.
pub struct Token {
    number: usize,
    of: usize,
    lanes: usize,
    ahead: usize,
    is_brisk: bool,
    has_pin: bool,
    world: Arc<World>,
    state: Mutex<TokenState>,
    /// Kills the driver that runs.
    death: Notify,
}

struct TokenState {
    random: Random,
    mood: Mood,
    tries: u8,
    /// PINs whose refusal the daemon was told in time.
    refused: BTreeSet<String>,
    /// How often people gave each PIN, less how often it came here.
    typed: BTreeMap<String, u32>,
    /// The PIN that was accepted last, and how many locks there had been: it may come again untyped until the next.
    accepted: Option<(String, u64)>,
    /// When a call last ended, or the driver began: a call that begins in this very moment may have waited before.
    last_change: Instant,
}

/// What becomes of one call.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// So many milliseconds.
    Well(u64),
    Lie(u64),
    Hang,
    Panic(u64),
    Restarted(u64),
    Absent,
    Busy,
    NotTouched,
    Failed,
    LoggedOut,
}

impl Token {
    pub fn new(seed: u64, number: usize, of: usize, plan: &DevicePlan, world: Arc<World>) -> Arc<Self> {
        let state = TokenState {
            random: Random::part(seed, 1 + number as u64),
            mood: Mood::Well,
            tries: TRIES,
            refused: BTreeSet::new(),
            typed: BTreeMap::new(),
            accepted: None,
            last_change: Instant::now(),
        };
        let DevicePlan { lanes, ahead, is_brisk, has_pin, .. } = *plan;
        Arc::new(Self {
            number,
            of,
            lanes,
            ahead,
            is_brisk,
            has_pin,
            world,
            state: Mutex::new(state),
            death: Notify::new(),
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut TokenState) -> T) -> T {
        act(&mut self.state.lock().unwrap())
    }

    fn event(&self, event: &str) {
        self.world.event(&format!("device {} {event}", self.number));
    }

    pub fn set_mood(&self, mood: Mood) {
        self.with(|state| state.mood = mood);
        self.event(&format!("is {mood:?}"));
    }

    pub fn die(&self) {
        self.event("dies");
        self.excuse(Deed::Died);
        self.death.notify_waiters();
    }

    /// Somebody gives this PIN to the daemon.
    pub fn typed(&self, pin: &str) {
        self.event(&format!("a person gives the PIN {pin}"));
        self.with(|state| *state.typed.entry(pin.to_owned()).or_default() += 1);
    }

    fn excuse(&self, deed: Deed) {
        self.world.excuse(self.number, deed);
    }

    fn fate(&self, what: &str) -> Fate {
        let fate = self.with(|state| {
            let random = &mut state.random;
            match state.mood {
                Mood::Well => Fate::Well(random.between(1, if self.is_brisk { 5 } else { 30 })),
                Mood::Slow => Fate::Well(random.between(300, 9_000)),
                Mood::Hung => Fate::Hang,
                Mood::Lying => Fate::Lie(random.between(1, 30)),
                Mood::Gone => Fate::Absent,
                Mood::Crashing => Fate::Panic(random.between(1, 30)),
                Mood::Flaky => match random.between(0, 100) {
                    0..40 => Fate::Well(random.between(1, 200)),
                    40..52 => Fate::Well(random.between(200, 9_000)),
                    52..58 => Fate::Hang,
                    58..64 => Fate::Panic(random.between(1, 100)),
                    64..70 => Fate::Restarted(random.between(1, 100)),
                    70..75 => Fate::Absent,
                    75..83 => Fate::Lie(random.between(1, 100)),
                    83..88 => Fate::Busy,
                    88..92 => Fate::NotTouched,
                    92..97 => Fate::Failed,
                    _ => Fate::LoggedOut,
                },
            }
        });
        self.event(&format!("begins {what}: {fate:?}"));
        fate
    }

    /// Lets a fate happen, but for lies and logouts, which are for the caller.
    async fn meet(&self, fate: Fate) -> Result<(), DeviceError> {
        let (after, error) = match fate {
            Fate::Well(ms) | Fate::Lie(ms) => {
                if ms >= OUTLIVES {
                    self.excuse(Deed::Died);
                }
                (ms, None)
            }
            Fate::LoggedOut => (1, None),
            Fate::Hang => {
                self.excuse(Deed::Died);
                return pending().await;
            }
            Fate::Panic(ms) => {
                self.excuse(Deed::Died);
                sleep(Duration::from_millis(ms)).await;
                // Says nothing on stderr, unlike `panic!`.
                std::panic::resume_unwind(Box::new("the device crashes"));
            }
            Fate::Restarted(ms) => (ms, Some((Deed::Died, DeviceError::Restarted))),
            Fate::Absent => (0, Some((Deed::Absent, DeviceError::Absent))),
            Fate::Busy => (1, Some((Deed::Busy, DeviceError::Busy))),
            Fate::NotTouched => (1, Some((Deed::NotTouched, DeviceError::NotTouched))),
            Fate::Failed => (1, Some((Deed::Failed, DeviceError::Failed("so it is".to_owned())))),
        };
        if after > 0 {
            sleep(Duration::from_millis(after)).await;
        }
        match error {
            Some((deed, error)) => {
                self.excuse(deed);
                Err(error)
            }
            None => Ok(()),
        }
    }
}

/// The driver of a [`Token`].
pub struct Card {
    token: Arc<Token>,
    logged_in: AtomicBool,
    inside: AtomicUsize,
}

/// A call inside the driver.
struct Inside<'a>(&'a Card);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::Relaxed);
        self.0.token.with(|state| state.last_change = Instant::now());
    }
}

impl Card {
    fn enter(&self) -> Inside<'_> {
        let inside = 1 + self.inside.fetch_add(1, Ordering::Relaxed);
        if inside > self.token.lanes {
            self.token.world.violation(&format!("device {} has {inside} calls at once", self.token.number));
        }
        Inside(self)
    }

    fn status(&self) -> Status {
        let locked = self.token.has_pin && !self.logged_in.load(Ordering::Relaxed);
        let tries = self.token.with(|state| state.tries);
        Status {
            serial: format!("serial {}", self.token.number),
            locked,
            tries_left: self.token.has_pin.then_some(tries),
            generation: 0,
        }
    }

    /// What must hold whenever a PIN comes.
    fn check_pin(&self, pin: &str, in_time: bool) {
        let token = &self.token;
        let locks = token.world.locks();
        let wrong = token.with(|state| {
            let typed = state.typed.get_mut(pin).filter(|count| **count > 0).map(|count| *count -= 1).is_some();
            let known = state.accepted.as_ref().is_some_and(|(accepted, at)| accepted == pin && *at == locks);
            if state.refused.contains(pin) {
                Some("a PIN that it refused comes again")
            } else if !typed && !known {
                Some("a PIN comes that nobody gave")
            } else {
                None
            }
        });
        token.event(&format!("is sent the PIN {pin}, in time: {in_time}"));
        if let Some(wrong) = wrong {
            token.world.violation(&format!("device {}: {wrong}: {pin}", token.number));
        }
    }
}

impl Driver for Card {
    type Config = Arc<Token>;
    const KIND: &'static str = "simulated";

    async fn open(token: Arc<Token>) -> Result<Self, DeviceError> {
        token.meet(token.fate("to open")).await?;
        token.with(|state| state.last_change = Instant::now());
        Ok(Self { token, logged_in: AtomicBool::new(false), inside: AtomicUsize::new(0) })
    }

    fn lanes(&self) -> usize {
        self.token.lanes
    }

    async fn scan(&self) -> Result<Scan, DeviceError> {
        let _inside = self.enter();
        let fate = self.token.fate("a scan");
        self.token.meet(fate).await?;
        let keys = keys::on_device(self.token.number, self.token.of).into_iter();
        let complete = !matches!(fate, Fate::Lie(_));
        // What a scan that is not complete leaves out is not gone.
        let keys = keys.map(|key| keys::found(self.token.number, key)).skip(usize::from(!complete)).collect();
        Ok(Scan { keys, complete, status: self.status(), ..Scan::default() })
    }

    async fn sign(&self, slot: &Slot, _: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        let _inside = self.enter();
        self.token.world.device_signs(self.token.number);
        if self.status().locked {
            self.token.event("wants a PIN");
            return Err(DeviceError::PinRequired);
        }
        let fate = self.token.fate(&format!("to sign {}", String::from_utf8_lossy(input.bytes())));
        self.token.meet(fate).await?;
        let key = &keys::all()[usize::from(slot.0[0])];
        match fate {
            Fate::Lie(ms) => {
                self.token.excuse(Deed::Lied);
                let mut signature = key.sign(input.bytes());
                match ms % 3 {
                    0 => signature[7] ^= 1,
                    1 => signature.truncate(63),
                    _ => signature = key.sign(b"something else"),
                }
                Ok(signature)
            }
            Fate::LoggedOut if self.token.has_pin => {
                self.logged_in.store(false, Ordering::Relaxed);
                Err(DeviceError::PinRequired)
            }
            _ => Ok(key.sign(input.bytes())),
        }
    }

    async fn unlock(&self, pin: SecretString, _: bool) -> Result<(), DeviceError> {
        let token = &self.token;
        let waited = token.with(|state| state.last_change) == Instant::now();
        let _inside = self.enter();
        let fate = token.fate("a login");
        let in_time = !waited && matches!(fate, Fate::Well(..30) | Fate::Lie(..30));
        let pin = pin.expose_secret();
        self.check_pin(pin, in_time);
        token.meet(fate).await?;
        if !token.has_pin {
            return Err(DeviceError::unsupported("it has no PIN"));
        }
        token.with(|state| {
            if state.tries == 0 {
                return Err(DeviceError::PinBlocked);
            }
            if pin == RIGHT_PIN {
                state.tries = TRIES;
                self.logged_in.store(true, Ordering::Relaxed);
                state.accepted = Some((pin.to_owned(), token.world.locks()));
                return Ok(());
            }
            state.tries -= 1;
            state.accepted = None;
            if in_time {
                state.refused.insert(pin.to_owned());
            }
            if state.tries == 0 {
                Err(DeviceError::PinBlocked)
            } else {
                Err(DeviceError::PinWrong { left: Some(state.tries) })
            }
        })
    }

    async fn lock(&self) -> Result<(), DeviceError> {
        let _inside = self.enter();
        self.token.meet(self.token.fate("a logout")).await?;
        self.logged_in.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn health(&self) -> Result<Status, DeviceError> {
        let _inside = self.enter();
        self.token.meet(self.token.fate("a question for its health")).await?;
        Ok(self.status())
    }
}

/// Runs a [`Card`] in this process, and lets it die of itself.
pub struct Mortal {
    token: Arc<Token>,
    engine: InProcess<Card>,
}

impl Mortal {
    pub fn new(token: &Arc<Token>) -> Self {
        let config = Arc::clone(token);
        Self { token: Arc::clone(token), engine: InProcess::new(move || Arc::clone(&config)) }
    }
}

impl Engine for Mortal {
    type Session = Alive;

    async fn open(&self) -> Result<Alive, DeviceError> {
        let session = Arc::new(self.engine.open().await?);
        let lanes = Arc::new(Semaphore::new(session.lanes()));
        Ok(Alive { token: Arc::clone(&self.token), session, lanes })
    }
}

/// Takes calls ahead, as a process does.
pub struct Alive {
    token: Arc<Token>,
    session: Arc<Here<Card>>,
    /// In the order in which they are asked for.
    lanes: Arc<Semaphore>,
}

struct OnItsWay {
    task: JoinSet<Result<Reply, DeviceError>>,
    withdrawn: Arc<Notify>,
}

impl Future for OnItsWay {
    type Output = Result<Reply, DeviceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.task.poll_join_next(cx).map(|done| match done {
            Some(Ok(answer)) => answer,
            _ => Err(DeviceError::Restarted),
        })
    }
}

impl Underway for OnItsWay {
    fn withdraw(&self) {
        self.withdrawn.notify_one();
    }
}

impl Session for Alive {
    fn lanes(&self) -> usize {
        self.session.lanes()
    }

    fn ahead(&self) -> usize {
        self.token.ahead
    }

    fn call(&self, call: Call) -> impl Underway {
        let (session, lanes) = (Arc::clone(&self.session), Arc::clone(&self.lanes));
        let withdrawn = Arc::new(Notify::new());
        let told = Arc::clone(&withdrawn);
        // A task of its own: it begins when a lane is free, whether or not the worker looks.
        let mut task = JoinSet::new();
        task.spawn(async move {
            let lane = tokio::select! {
                biased;
                () = told.notified() => return Ok(Reply::Withdrawn),
                lane = lanes.acquire_owned() => lane,
            };
            let answer = session.call(call).await;
            drop(lane);
            answer
        });
        OnItsWay { task, withdrawn }
    }

    fn died(&self) -> impl Future<Output = String> + Send + 'static {
        let token = Arc::clone(&self.token);
        async move {
            token.death.notified().await;
            "it was killed".to_owned()
        }
    }

    async fn end(self, parting: Duration) {
        // Calls that are left are dropped with the worker's; none outlives it.
        if let Some(session) = Arc::into_inner(self.session) {
            session.end(parting).await;
        }
    }
}
