//! Logins to devices: where a PIN comes from, one login at a time for a device, no PIN twice. Knows devices, prompts and
//! marks; never which key the login is for.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use secrecy::SecretString;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, broadcast},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Vault,
    card::marks_of,
    key::Caller,
    policy::{self, Refusal},
    secret_file,
    store::{MarkError, PinTurn},
};
use crate::{
    devices::{CardPin, Device, DeviceError, DeviceState, Health, Slot, Status, device::LoginError},
    sys::clock,
};

/// The longest PIN, in bytes.
const MAX_PIN: usize = 1024;

/// For how long a PIN that may not be sent is not looked for again.
const WITHHELD: Duration = Duration::from_secs(1);

/// Where a device's PIN comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PinSource {
    /// A person is asked when it is first needed.
    #[default]
    Prompt,
    /// The first line of a file.
    File(PathBuf),
    /// A credential of systemd's, by its name (systemd.exec(5), CREDENTIALS).
    Credential(String),
}

/// Which PIN a login is to send.
#[derive(Clone)]
pub(super) enum WantedPin {
    /// What the token accepted before, or else what its source gives.
    Any,
    /// What its source gives now: a person, where there is no other, is asked for each use.
    GivenNow,
    /// This one, which a person has just given; and whether they can have known what tries are left.
    This(SecretString, bool),
}

impl WantedPin {
    /// This; what is left wants no PIN of long ago either, and has none.
    fn take(&mut self) -> Self {
        let left = if matches!(self, Self::GivenNow) { Self::GivenNow } else { Self::Any };
        std::mem::replace(self, left)
    }
}

/// Logins under way and PINs that were accepted, by device.
#[derive(Default)]
pub(super) struct Pins(Mutex<BTreeMap<String, Entry>>);

#[derive(Default)]
struct Entry {
    source: PinSource,
    /// A login under way: its outcome, for everybody who waits for it.
    login: Option<Arc<Outcome>>,
    /// The PIN that the token with this serial last accepted: the device is logged in to again with it when its driver
    /// was restarted.
    accepted: Option<(String, SecretString)>,
    /// How many were accepted so far.
    logins: u64,
    /// How often it was locked, or its PIN forgotten, for somebody who wanted that.
    locks: u64,
    /// When a PIN was last found to be one that may not be sent by itself, and why.
    withheld: Option<(Instant, Refusal)>,
    /// How long one is kept; `None`: until the token goes or somebody locks it or the vault.
    lifetime: Option<Duration>,
    /// Whose turn it is to use a key that wants the PIN given for each use: what is given for one must not serve another.
    turns: BTreeMap<Slot, Arc<Turns>>,
    /// Tells those who cannot use what a login under way will give that it is over.
    login_over: Arc<Notify>,
}

/// The uses of a key, one after the other.
struct Turns {
    place: Arc<Semaphore>,
    /// Whether the device may have a PIN that was given for another use, and that nothing came of.
    is_left: AtomicBool,
}

/// The turn of one use. Dropping it ends it.
pub(super) struct Turn {
    turns: Arc<Turns>,
    _place: OwnedSemaphorePermit,
}

impl Turn {
    /// Whether the device may have a PIN that was given for another use, and would take it for this one.
    pub(super) fn has_leftover(&self) -> bool {
        self.turns.is_left.load(Ordering::Relaxed)
    }

    /// A PIN is given now.
    pub(super) fn gives(&self) {
        self.turns.is_left.store(true, Ordering::Relaxed);
    }

    /// The key was used, and with it what was given.
    pub(super) fn used(&self) {
        self.turns.is_left.store(false, Ordering::Relaxed);
    }
}

impl Entry {
    /// Why a PIN need not be looked for now: it was a moment ago, and to find out costs the store's thread tens of milliseconds,
    /// for which the logins of others would wait.
    fn is_withheld(&self) -> Option<Refusal> {
        self.withheld.as_ref().filter(|(when, _)| when.elapsed() < WITHHELD).map(|(_, refusal)| refusal.clone())
    }

    /// Wipes the PIN. One that is on its way is not kept either.
    fn lock(&mut self) {
        self.accepted = None;
        self.locks += 1;
    }

    fn end_login(&mut self) {
        self.login = None;
        self.login_over.notify_waiters();
    }
}

/// Those who wait are told in the order of their waiting, so that simulations replay.
type Outcome = broadcast::Sender<Result<(), Refusal>>;

/// A PIN to try, for the token with this serial.
struct Candidate {
    pin: SecretString,
    serial: String,
    /// Whether a person has just typed it…
    typed: bool,
    /// …and what tries were left then, as far as was known.
    told: Option<u8>,
}

impl Pins {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the uses of a key take turns from now on, each with a PIN of its own.
    pub(super) fn take_turns(&self, device: &Device, slot: &Slot) {
        let turns = || Arc::new(Turns { place: Arc::new(Semaphore::new(1)), is_left: AtomicBool::new(false) });
        self.with(device, |entry| _ = entry.turns.entry(slot.clone()).or_insert_with(turns));
    }

    /// Whether the device may have a PIN that was not given for the next use of a key whose uses take turns.
    fn note_leftover(&self, device: &Device, is_left: bool) {
        self.with(device, |entry| {
            entry.turns.values().for_each(|turns| turns.is_left.store(is_left, Ordering::Relaxed));
        });
    }

    /// Waits for its turn. `None` for a key whose uses take none, and when the device is of no use any more.
    pub(super) async fn turn(&self, device: &Device, slot: &Slot) -> Option<Turn> {
        let turns = self.entries().get(device.name())?.turns.get(slot).cloned()?;
        let mut states = device.watch();
        let is_gone = |state: &Arc<DeviceState>| matches!(state.health, Health::Absent | Health::Failed(_));
        let place = tokio::select! {
            biased;
            place = Arc::clone(&turns.place).acquire_owned() => place.ok()?,
            _ = states.wait_for(is_gone) => return None,
        };
        Some(Turn { turns, _place: place })
    }

    fn with<T>(&self, device: &Device, act: impl FnOnce(&mut Entry) -> T) -> T {
        act(self.entries().entry(device.name().to_owned()).or_default())
    }
}

impl Vault {
    /// Says where the PIN of a device comes from, and how long an accepted one is kept: `None` for as long as the token is
    /// there and nobody locks it or the vault.
    pub fn set_pin_source(&self, device: &Device, source: PinSource, lifetime: Option<Duration>) {
        self.pins.with(device, |entry| (entry.source, entry.lifetime) = (source, lifetime));
    }

    /// Wipes what is known of a device that goes.
    pub(super) fn drop_pins_of(&self, device: &Device) {
        if let Some(mut entry) = self.pins.entries().remove(device.name()) {
            entry.end_login();
        }
    }

    /// `prompt`, `file` or `credential`.
    pub fn password_source(&self, device: &Device) -> &'static str {
        self.pins.with(device, |entry| match entry.source {
            PinSource::Prompt => "prompt",
            PinSource::File(_) => "file",
            PinSource::Credential(_) => "credential",
        })
    }

    /// Wipes the PIN that a device accepted: it is to have another.
    pub(super) fn forget_accepted_pin(&self, device: &Device) {
        self.pins.with(device, |entry| entry.accepted = None);
    }

    /// Wipes the PIN of a device and has it ask for it again.
    pub async fn lock_device(&self, device: &Device) -> Result<(), Refusal> {
        self.pins.with(device, Entry::lock);
        Ok(device.lock().await?)
    }

    /// Wipes the PINs of these devices, and allows those that were refused or whose outcome is not known to be sent again.
    /// [`Absent`](DeviceError::Absent) for one that has never said which token it has: its marks are not known by its name.
    pub async fn forget_pins_of(&self, devices: &[Device]) -> Result<(), Refusal> {
        for device in devices {
            self.pins.with(device, Entry::lock);
        }
        let mut result = Ok(());
        for device in devices {
            let forgotten = match &device.state().status {
                Some(status) => {
                    let mut forgotten = Ok(());
                    for pin in CardPin::ALL {
                        forgotten = forgotten.and(self.store.forget_pins(&marks_of(&status.serial, *pin)).await);
                    }
                    forgotten.map_err(|error| Refusal::NoPin(error.to_string()))
                }
                None => Err(DeviceError::Absent.into()),
            };
            result = result.and(forgotten);
        }
        for device in devices {
            self.pins.with(device, |entry| entry.withheld = None);
        }
        // A device that is away has nothing to forget, and one that hangs holds up no other.
        let mut locking: JoinSet<_> =
            devices.iter().cloned().map(|device| async move { device.lock().await }).collect();
        while locking.join_next().await.is_some() {}
        result
    }

    /// Wipes all PINs and has the devices ask for them again.
    pub(super) fn forget_pins(&self) {
        for entry in self.pins.entries().values_mut() {
            entry.accepted = None;
        }
        let unlocked = |device: &Device| device.state().status.as_ref().is_some_and(|status| !status.locked);
        for device in self.devices().into_iter().filter(unlocked) {
            // A device that does not take the time to log out is not used while the vault is locked all the same.
            let lock = async move { drop(device.lock().await) };
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(lock);
            }
        }
    }

    /// Logs in to a device, or waits for the login that is under way: a hundred callers make one prompt. Dropping the
    /// future gives up; when nobody waits any more, an open prompt closes, but a PIN that was sent runs its course.
    pub(super) async fn login(
        self: &Arc<Self>,
        device: &Device,
        caller: &Arc<Caller>,
        wanted: WantedPin,
    ) -> Result<(), Refusal> {
        let for_all = matches!(wanted, WantedPin::Any);
        self.join_login(device, caller, wanted).await?;
        if for_all {
            // The device may take it for a use that wants one of its own.
            self.pins.note_leftover(device, true);
        }
        Ok(())
    }

    /// Logs in to a device with a PIN that a person has just given.
    pub async fn unlock_device(
        self: &Arc<Self>,
        device: &Device,
        caller: &Arc<Caller>,
        pin: SecretString,
    ) -> Result<(), Refusal> {
        self.unlock_knowing(device, caller, pin, true).await
    }

    /// The same of somebody who knows, or does not know, what tries are left.
    pub(super) async fn unlock_knowing(
        self: &Arc<Self>,
        device: &Device,
        caller: &Arc<Caller>,
        pin: SecretString,
        knows: bool,
    ) -> Result<(), Refusal> {
        self.check_open()?;
        self.join_login(device, caller, WantedPin::This(pin, knows)).await?;
        // It is meant for whatever comes.
        self.pins.note_leftover(device, false);
        Ok(())
    }

    async fn join_login(
        self: &Arc<Self>,
        device: &Device,
        caller: &Arc<Caller>,
        wanted: WantedPin,
    ) -> Result<(), Refusal> {
        loop {
            let joined = self.pins.with(device, |entry| match (&entry.login, &wanted) {
                // Its PIN may be another one than the one that is being tried.
                (Some(_), WantedPin::This(..)) => Err(Refusal::from(DeviceError::Busy)),
                // What is given for something else is not meant for this use.
                (Some(_), WantedPin::GivenNow) => Ok(Err(Arc::clone(&entry.login_over).notified_owned())),
                (Some(login), WantedPin::Any) => Ok(Ok(login.subscribe())),
                (None, WantedPin::Any) if let Some(refusal) = entry.is_withheld() => Err(refusal),
                (None, _) => {
                    let login = Arc::new(Outcome::new(1));
                    let outcome = login.subscribe();
                    entry.login = Some(Arc::clone(&login));
                    let wanted = wanted.clone();
                    tokio::spawn(Arc::clone(self).log_in(device.clone(), Arc::clone(caller), wanted, login));
                    Ok(Ok(outcome))
                }
            })?;
            match joined {
                Ok(mut outcome) => return outcome.recv().await.unwrap_or(Err(Refusal::Timeout)),
                Err(over) => over.await,
            }
        }
    }

    /// Locks a device when its PIN has been kept for long enough, unless it was logged in to again.
    async fn lock_later(self: Arc<Self>, device: Device, login: u64, lifetime: Duration) {
        let until = clock::now() + lifetime;
        // Timers stand still while the machine sleeps; a PIN's time does not.
        while let Some(left) = until.checked_sub(clock::now()).filter(|left| !left.is_zero()) {
            tokio::select! {
                () = sleep(left.min(super::EXPIRY_TICK)) => {}
                () = device.ended() => return,
            }
        }
        let is_last = self.pins.with(&device, |entry| entry.logins == login && entry.accepted.is_some());
        if is_last {
            info!(device = device.name(), "its PIN was kept for long enough");
            let _ = self.lock_device(&device).await;
        }
    }

    /// Takes note that a device has refused what it had accepted before: nobody sends it again by itself.
    pub(super) async fn accepted_pin_refused(&self, device: &Device) {
        let Some((serial, pin)) = self.pins.with(device, |entry| entry.accepted.take()) else { return };
        warn!(device = device.name(), "it does not take its PIN any more");
        let (store, name) = (self.store.clone(), device.name().to_owned());
        let mark = async move {
            let marked = match store.begin(&serial, &pin, true).await {
                Ok(attempt) => attempt.refused().await.map_err(|error| error.to_string()),
                // It is marked already.
                Err(MarkError::Refused | MarkError::Pending) => Ok(()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = marked {
                warn!(device = name, "that could not be written down: {error}");
            }
        };
        // A task of its own: whose request it was may hang up.
        let _ = tokio::spawn(mark).await;
    }

    /// Waits until no other PIN is on its way to the token with this serial: for as long as an operation of this device may take.
    pub(super) async fn pin_turn(&self, device: &Device, serial: &str) -> Result<PinTurn, Refusal> {
        match timeout(device.settings().timeout, self.store.turn(serial)).await {
            Ok(turn) => turn.map_err(|error| Refusal::NoPin(error.to_string())),
            Err(_) => Err(DeviceError::Busy.into()),
        }
    }

    /// Wipes the PIN of a device that has gone.
    pub(super) fn forget_absent(&self, device: &Device) {
        self.pins.with(device, |entry| entry.accepted = None);
    }

    /// The login itself: a task of its own, so that a caller that hangs up leaves no PIN half tried.
    async fn log_in(
        self: Arc<Self>,
        device: Device,
        caller: Arc<Caller>,
        mut wanted: WantedPin,
        outcome: Arc<Outcome>,
    ) {
        let mut locks = pin!(self.locks.notified());
        let candidate = loop {
            tokio::select! {
                biased;
                () = &mut locks => break Err(self.check_open().err().unwrap_or(Refusal::Locked)),
                candidate = self.candidate(&device, &caller, wanted.take()) => break candidate,
                () = outcome.closed() => {}
            }
            let nobody_came_back = self.pins.with(&device, |entry| {
                let nobody = outcome.receiver_count() == 0;
                if nobody {
                    entry.end_login();
                }
                nobody
            });
            if nobody_came_back {
                return;
            }
        };
        let by_itself = candidate.as_ref().is_ok_and(|candidate| !candidate.typed);
        let result = match (candidate, self.check_open()) {
            (Ok(candidate), Ok(())) => self.try_pin(&device, &caller, candidate).await,
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
        };
        self.pins.with(&device, |entry| {
            let withheld = match &result {
                Err(refusal @ (Refusal::PinRefusedBefore(_) | Refusal::PinUncertain(_) | Refusal::LastTry(_))) => {
                    Some(refusal.clone())
                }
                _ => None,
            };
            entry.withheld = withheld.filter(|_| by_itself).map(|refusal| (Instant::now(), refusal));
            entry.end_login();
        });
        let _ = outcome.send(result);
    }

    /// The PIN to try: what was given, else what the token accepted before if that is wanted, else what the configuration
    /// says.
    async fn candidate(&self, device: &Device, caller: &Arc<Caller>, wanted: WantedPin) -> Result<Candidate, Refusal> {
        // A lock that came before this login was waited for.
        self.check_open()?;
        let status = present(device).await?;
        let candidate = |pin, typed| Candidate { pin, serial: status.serial.clone(), typed, told: status.tries_left };
        if status.tries_left == Some(0) {
            return Err(DeviceError::PinBlocked.into());
        }
        let may_be_kept = match wanted {
            WantedPin::This(pin, true) => return Ok(candidate(pin, true)),
            WantedPin::This(pin, false) => return Ok(Candidate { told: None, ..candidate(pin, true) }),
            WantedPin::GivenNow => false,
            WantedPin::Any => true,
        };
        let (source, accepted) = self.pins.with(device, |entry| {
            let accepted = entry.accepted.as_ref().filter(|(serial, _)| may_be_kept && *serial == status.serial);
            (entry.source.clone(), accepted.map(|(_, pin)| pin.clone()))
        });
        let pin = match (accepted, source) {
            (Some(pin), _) => pin,
            (None, PinSource::Prompt) => {
                caller.program();
                let question = policy::device_pin_question(device, &status, caller, !may_be_kept);
                let pin = self.prompter.pin(caller.uid, &question).await?;
                return Ok(candidate(pin, true));
            }
            (None, PinSource::File(path)) => read_pin(&path).await.map_err(Refusal::NoPin)?,
            (None, PinSource::Credential(name)) => {
                let path = secret_file::credential(&name).map_err(Refusal::NoPin)?;
                read_pin(&path).await.map_err(Refusal::NoPin)?
            }
        };
        Ok(candidate(pin, false))
    }

    /// Sends a PIN, and writes down that it was.
    async fn try_pin(self: &Arc<Self>, device: &Device, caller: &Caller, candidate: Candidate) -> Result<(), Refusal> {
        let note = self.audit.admit(caller, "login")?.device(device.name());
        note.end(self.send_pin(device, candidate).await)
    }

    /// Sends a PIN, once. Unless the device says that it is right, it is never sent again by itself.
    async fn send_pin(self: &Arc<Self>, device: &Device, candidate: Candidate) -> Result<(), Refusal> {
        let Candidate { pin, serial, typed, told } = candidate;
        let mut locked = pin!(self.locks.notified());
        let locks = self.pins.with(device, |entry| entry.locks);
        let turn = self.pin_turn(device, &serial).await?;
        // Meanwhile another token may have been put in, and another device have spent tries of this one.
        let status = present(device).await?;
        if status.serial != serial {
            return Err(DeviceError::Absent.into());
        }
        let last_try = || Refusal::LastTry(device.name().to_owned());
        let even_last = typed && told == Some(1);
        match status.tries_left {
            Some(0) => return Err(DeviceError::PinBlocked.into()),
            Some(1) if !even_last => return Err(last_try()),
            _ => {}
        }
        self.check_open()?;
        if locked.as_mut().enable() {
            return Err(Refusal::Locked);
        }
        let attempt = match turn.begin(&pin, typed).await {
            Ok(attempt) => attempt,
            Err(MarkError::Refused) => return Err(Refusal::PinRefusedBefore(device.name().to_owned())),
            Err(MarkError::Pending) => return Err(Refusal::PinUncertain(device.name().to_owned())),
            Err(error) => return Err(Refusal::NoPin(error.to_string())),
        };
        let result = device
            .log_in(pin.clone(), even_last)
            .await
            .map_err(|failed| LoginError { sent: failed.sent && !failed.error.is_of_no_login(), error: failed.error });
        match result {
            Ok(()) => {
                if let Err(error) = attempt.accepted().await {
                    warn!(device = device.name(), "the PIN was right, but that could not be written down: {error}");
                }
                info!(device = device.name(), "logged in");
                // A lock forgets the PINs that it finds and no later one; that it was undone meanwhile changes nothing.
                let kept = self.pins.with(device, |entry| {
                    let keep = !locked.as_mut().enable() && self.check_open().is_ok() && entry.locks == locks;
                    if keep {
                        entry.accepted = Some((serial, pin));
                        entry.logins += 1;
                    }
                    keep.then_some((entry.logins, entry.lifetime))
                });
                match kept {
                    None => _ = device.lock().await,
                    Some((_, None)) => {}
                    Some((login, Some(lifetime))) => {
                        tokio::spawn(Arc::clone(self).lock_later(device.clone(), login, lifetime));
                    }
                }
                Ok(())
            }
            Err(LoginError { error, sent: false }) => {
                warn!(device = device.name(), "there was no login, and the PIN was not tried: {error}");
                if let Err(error) = attempt.withdrawn().await {
                    warn!(device = device.name(), "the PIN stays marked as uncertain: {error}");
                }
                Err(if error == DeviceError::PinRequired { last_try() } else { error.into() })
            }
            Err(LoginError { error, sent: true }) => {
                warn!(device = device.name(), "the login failed: {error}");
                self.pins.with(device, |entry| entry.accepted = None);
                // What else went wrong leaves open whether a try was spent: the mark stays.
                if let DeviceError::PinWrong { .. } | DeviceError::PinBlocked = error
                    && let Err(error) = attempt.refused().await
                {
                    warn!(device = device.name(), "the refused PIN stays marked as uncertain: {error}");
                }
                Err(error.into())
            }
        }
    }
}

/// How the token is that a PIN would go to. A device that is being opened may hold another one than before: PINs belong to
/// serials, so none is chosen or sent until it has said which it has.
pub(super) async fn present(device: &Device) -> Result<Status, DeviceError> {
    let mut states = device.watch();
    let settled = |state: &Arc<DeviceState>| {
        matches!(state.health, Health::Ready | Health::Busy | Health::Absent | Health::Failed(_))
    };
    let state = match timeout(device.settings().timeout, states.wait_for(settled)).await {
        Ok(Ok(state)) => Arc::clone(&state),
        Ok(Err(_)) => return Err(DeviceError::Absent),
        Err(_) => return Err(DeviceError::Timeout),
    };
    match (&state.health, &state.status) {
        (Health::Failed(why), _) => Err(DeviceError::Failed(format!("the device has failed: {why}"))),
        (Health::Absent, _) | (_, None) => Err(DeviceError::Absent),
        (_, Some(status)) => Ok(status.clone()),
    }
}

/// The first line of a file, with the reason for a person when there is none.
async fn read_pin(path: &Path) -> Result<SecretString, String> {
    let contents = secret_file::read(path, MAX_PIN + 2).await?;
    let line = contents.split(|byte| matches!(byte, b'\n' | b'\r')).next().unwrap_or_default();
    let failed = |why| format!("{}: {why}", path.display());
    if line.is_empty() || line.len() > MAX_PIN {
        return Err(failed("its first line is no PIN"));
    }
    let pin = std::str::from_utf8(line).map_err(|_| failed("the PIN is not UTF-8"))?;
    Ok(SecretString::from(pin))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use secrecy::ExposeSecret;
    use tokio::{sync::Notify, task::JoinHandle};
    use zeroize::Zeroizing;

    use super::*;
    use crate::{
        devices::{Driver, Input, Scan, Scheme, Settings, Slot, compute::Compute, in_process::InProcess},
        prompt::{self, Prompter},
        vault::{Parts, audit::Audit, registry::Terms, seal::Cost, store::Store},
    };

    /// At this PIN the token belongs to another program.
    const IN_USE: &str = "in use";
    /// At this one a single try is left, which nobody was told.
    const LAST: &str = "last";

    /// A token that takes every PIN when it is told to.
    struct Token(Arc<Gate>);

    #[derive(Default)]
    struct Gate {
        asked: Notify,
        answer: Notify,
        logouts: Notify,
    }

    impl Driver for Token {
        type Config = Arc<Gate>;
        const KIND: &'static str = "token";

        async fn open(gate: Arc<Gate>) -> Result<Self, DeviceError> {
            Ok(Self(gate))
        }

        fn lanes(&self) -> usize {
            2
        }

        async fn scan(&self) -> Result<Scan, DeviceError> {
            Ok(Scan { complete: true, status: self.health().await?, ..Scan::default() })
        }

        async fn sign(&self, _: &Slot, _: Scheme, _: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
            Err(DeviceError::NoSuchKey)
        }

        async fn unlock(&self, pin: SecretString, _: bool) -> Result<(), DeviceError> {
            if pin.expose_secret() == IN_USE {
                return Err(DeviceError::InUse);
            }
            if pin.expose_secret() == LAST {
                return Err(DeviceError::PinRequired);
            }
            self.0.asked.notify_one();
            self.0.answer.notified().await;
            Ok(())
        }

        async fn lock(&self) -> Result<(), DeviceError> {
            self.0.logouts.notify_one();
            Ok(())
        }

        async fn health(&self) -> Result<Status, DeviceError> {
            Ok(Status { serial: "T".into(), locked: true, ..Status::default() })
        }
    }

    fn vault() -> Arc<Vault> {
        let parts = Parts {
            prompter: Prompter::new(prompt::Settings::default()),
            store: Store::in_memory().unwrap(),
            audit: Audit::off(),
            compute: Compute::inline(),
            lock_cost: Cost::least(),
            slot_time: std::time::Duration::ZERO,
            reactor: None,
        };
        Vault::new(crate::vault::Settings::default(), parts)
    }

    fn token(vault: &Arc<Vault>, settings: Settings) -> (Device, Arc<Gate>) {
        device_with_token(vault, "token", settings)
    }

    fn device_with_token(vault: &Arc<Vault>, name: &str, settings: Settings) -> (Device, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        let config = Arc::clone(&gate);
        let engine = InProcess::<Token>::new(move || Arc::clone(&config));
        let device = Device::start(name, Token::KIND, settings, engine);
        vault.add_device(device.clone(), Terms::default(), &[]).unwrap();
        (device, gate)
    }

    /// Logs in with the right PIN, in a task of its own.
    fn unlock(vault: &Arc<Vault>, device: &Device) -> JoinHandle<Result<(), Refusal>> {
        let (vault, device) = (Arc::clone(vault), device.clone());
        tokio::spawn(async move { vault.unlock_device(&device, &Arc::new(Caller::default()), "1234".into()).await })
    }

    #[tokio::test]
    async fn a_pin_that_is_on_its_way_during_a_lock_is_not_kept() {
        let vault = vault();
        let (device, gate) = token(&vault, Settings::default());
        let caller = Arc::new(Caller::default());
        let password = || Zeroizing::new(b"password".to_vec());
        let login = unlock(&vault, &device);
        gate.asked.notified().await;
        Arc::clone(&vault).lock(Arc::clone(&caller), password()).await.unwrap();
        Arc::clone(&vault).unlock(caller, password()).await.unwrap();
        gate.answer.notify_one();
        login.await.unwrap().unwrap();
        assert!(vault.pins.with(&device, |entry| entry.accepted.is_none()));
        gate.logouts.notified().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_pin_that_never_left_the_queue_is_not_uncertain() {
        let vault = vault();
        let (device, gate) = token(&vault, Settings { queue: 1, ..Settings::default() });
        // Two inside the driver and one that waits: the queue is full.
        let mut others = JoinSet::new();
        for n in 0..3 {
            let device = device.clone();
            others.spawn(async move { device.unlock("other".into()).await });
            if n < 2 {
                gate.asked.notified().await;
            }
        }
        while device.load() != (1, 2) {
            tokio::task::yield_now().await;
        }
        let caller = Arc::new(Caller::default());
        let refused = vault.unlock_device(&device, &caller, "1234".into()).await;
        assert_eq!(refused, Err(Refusal::Timeout), "it waits for its place, and does not get it");
        assert!(vault.store.begin("T", &"1234".into(), false).await.is_ok());
    }

    #[tokio::test]
    async fn a_pin_that_another_program_kept_away_is_not_uncertain() {
        let vault = vault();
        let (device, _) = token(&vault, Settings::default());
        let refused = vault.unlock_device(&device, &Arc::new(Caller::default()), IN_USE.into()).await;
        assert_eq!(refused, Err(DeviceError::InUse.into()));
        assert!(vault.store.begin("T", &IN_USE.into(), false).await.is_ok());
    }

    #[tokio::test]
    async fn a_last_try_that_was_spared_is_not_uncertain() {
        let vault = vault();
        let (device, _) = token(&vault, Settings::default());
        let refused = vault.unlock_device(&device, &Arc::new(Caller::default()), LAST.into()).await;
        assert_eq!(refused, Err(Refusal::LastTry("token".into())));
        assert!(vault.store.begin("T", &LAST.into(), false).await.is_ok());
    }

    /// Two devices that have one token, the first of which has been sent a PIN; and a login to the second, which waits for what
    /// becomes of that.
    async fn one_after_the_other(vault: &Arc<Vault>) -> (Arc<Gate>, Arc<Gate>, JoinHandle<Result<(), Refusal>>) {
        let (first, one) = device_with_token(vault, "first", Settings::default());
        let (second, other) = device_with_token(vault, "second", Settings::default());
        unlock(vault, &first);
        one.asked.notified().await;
        let waits = unlock(vault, &second);
        present(&second).await.unwrap();
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!waits.is_finished());
        (one, other, waits)
    }

    #[tokio::test(start_paused = true)]
    async fn devices_with_one_token_are_logged_in_to_one_after_the_other() {
        let vault = vault();
        let (one, other, waits) = one_after_the_other(&vault).await;
        assert!(timeout(Duration::from_secs(1), other.asked.notified()).await.is_err());
        one.answer.notify_one();
        other.asked.notified().await;
        other.answer.notify_one();
        assert_eq!(waits.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_login_that_does_not_end_has_the_next_one_told_that_the_token_is_busy() {
        let vault = vault();
        let (_one, _, waits) = one_after_the_other(&vault).await;
        assert_eq!(waits.await.unwrap(), Err(DeviceError::Busy.into()));
    }

    #[tokio::test]
    async fn a_device_that_was_locked_before_its_login_ended_stays_locked() {
        let vault = vault();
        let (device, gate) = token(&vault, Settings::default());
        let login = unlock(&vault, &device);
        gate.asked.notified().await;
        vault.lock_device(&device).await.unwrap();
        gate.logouts.notified().await;
        gate.answer.notify_one();
        login.await.unwrap().unwrap();
        gate.logouts.notified().await;
        assert!(vault.pins.with(&device, |entry| entry.accepted.is_none()));
    }

    #[tokio::test]
    async fn a_pin_that_waited_during_a_lock_is_not_sent() {
        let vault = vault();
        let (one, _, waits) = one_after_the_other(&vault).await;
        let (caller, password) = (Arc::new(Caller::default()), || Zeroizing::new(b"password".to_vec()));
        Arc::clone(&vault).lock(Arc::clone(&caller), password()).await.unwrap();
        Arc::clone(&vault).unlock(caller, password()).await.unwrap();
        one.answer.notify_one();
        assert_eq!(waits.await.unwrap(), Err(Refusal::Locked));
    }

    #[tokio::test]
    async fn what_is_not_known_of_a_device_is_not_forgotten_for_another() {
        let vault = vault();
        vault.store.begin("", &"1234".into(), false).await.unwrap().refused().await.unwrap();
        let (device, _) = token(&vault, Settings::default());
        // It has not said its serial yet: the task that asks has not had its turn.
        assert_eq!(vault.forget_pins_of(std::slice::from_ref(&device)).await, Err(DeviceError::Absent.into()));
        assert!(matches!(vault.store.begin("", &"1234".into(), false).await, Err(MarkError::Refused)));
        present(&device).await.unwrap();
        assert_eq!(vault.forget_pins_of(&[device]).await, Ok(()));
    }
}
