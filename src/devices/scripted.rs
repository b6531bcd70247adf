//! A device that hangs, crashes and lies as a script says, for tests. Knows scripts and soft keys.
//!
//! Its keys are real: their signatures verify. It reads no clock but tokio's and draws no random numbers for what it
//! does, so that a test under a paused clock goes the same way each time.

#[cfg(not(debug_assertions))]
compile_error!("the feature `scripted` is for tests: no release may have it");

pub mod control;
mod keys;
pub mod script;

use std::{
    fs,
    future::pending,
    io::{self, Write},
    process, str,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, getpid, kill_process, pidfd_getfd, pidfd_open};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::sleep;
use zeroize::Zeroizing;

pub use control::{Control, Counts};
pub use script::{Action, CallName, Crash, KeyKind, Pin, Rule, Script, ScriptKey};

use super::{
    DecryptScheme, DeriveScheme, DeviceError, Driver, FoundKey, Input, NewKey, Operation, Outcome, PrivateHalf, Scan,
    Scheme, Slot, Status, host::child::Hosted,
};
use control::Place;
use keys::Key;

/// More than any frame is long, where a frame's length stands.
const GARBAGE: [u8; 64] = [0xff; 64];

/// The control that sets a device absent.
const ABSENT: &str = "absent";
/// The control that counts changes of its keys.
const GENERATION: &str = "generation";
/// The control that has the PIN tries which are left.
const TRIES: &str = "tries";

/// The driver.
pub struct Scripted {
    control: Arc<Control>,
    keys: Mutex<Vec<Arc<Key>>>,
    locked: AtomicBool,
    /// Held while a PIN is tried: tries are counted one by one.
    login: Mutex<()>,
    /// What [`Action::Swapped`] answers with.
    last: Mutex<Option<Zeroizing<Vec<u8>>>>,
}

/// What is to become of a call's answer.
#[derive(Default)]
struct After {
    late: Duration,
    wrong: bool,
    swapped: bool,
    garbage: bool,
}

impl Driver for Scripted {
    type Config = Arc<Control>;
    const KIND: &'static str = "scripted";

    async fn open(control: Arc<Control>) -> Result<Self, DeviceError> {
        let after = before(&control, CallName::Open, None).await?;
        let script = control.script();
        let keys = Mutex::new(keys::load(&script.keys, &control.journal()?)?);
        let locked = AtomicBool::new(script.locked);
        sleep(after.late).await;
        Ok(Self { control, keys, locked, login: Mutex::default(), last: Mutex::default() })
    }

    fn lanes(&self) -> usize {
        self.control.script().lanes
    }

    async fn scan(&self) -> Result<Scan, DeviceError> {
        let after = before(&self.control, CallName::Scan, None).await?;
        let status = self.status()?;
        let (mut keys, mut complete) = (Vec::new(), true);
        for key in self.keys().iter().filter(|key| key.is_there(status.generation)) {
            if status.locked && key.script.hidden {
                complete = false;
            } else {
                keys.push(key.found());
            }
        }
        let scan = Scan { keys, complete, status, ..Scan::default() };
        sleep(after.late).await;
        Ok(scan)
    }

    async fn sign(&self, slot: &Slot, scheme: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        let operation = Operation::Sign { scheme, input: input.clone() };
        Ok(std::mem::take(&mut *self.operate(CallName::Sign, slot, operation).await?))
    }

    async fn decrypt(
        &self,
        slot: &Slot,
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let operation = Operation::Decrypt { scheme, label: label.into(), ciphertext: ciphertext.into() };
        self.operate(CallName::Decrypt, slot, operation).await
    }

    async fn derive(&self, slot: &Slot, scheme: DeriveScheme, peer: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        self.operate(CallName::Derive, slot, Operation::Derive { scheme, peer: peer.into() }).await
    }

    async fn generate(&self, new: &NewKey) -> Result<FoundKey, DeviceError> {
        self.put(CallName::Generate, new, None).await
    }

    async fn import(&self, new: &NewKey, private: &PrivateHalf) -> Result<FoundKey, DeviceError> {
        self.put(CallName::Import, new, Some(private)).await
    }

    async fn rename(&self, slot: &Slot, label: &str) -> Result<(), DeviceError> {
        self.change(CallName::Rename, slot, |slot| format!("rename\t{slot}\t{}", keys::one_field(label))).await
    }

    async fn delete(&self, slot: &Slot) -> Result<(), DeviceError> {
        self.change(CallName::Delete, slot, |slot| format!("delete\t{slot}")).await
    }

    async fn unlock(&self, pin: SecretString, _: bool) -> Result<(), DeviceError> {
        let after = before(&self.control, CallName::Unlock, None).await?;
        let result = self.log_in(pin.expose_secret());
        sleep(after.late).await;
        result
    }

    async fn lock(&self) -> Result<(), DeviceError> {
        let after = before(&self.control, CallName::Lock, None).await?;
        self.locked.store(self.control.script().pin.is_some(), Ordering::Relaxed);
        sleep(after.late).await;
        Ok(())
    }

    async fn health(&self) -> Result<Status, DeviceError> {
        let after = before(&self.control, CallName::Health, None).await?;
        let status = self.status();
        sleep(after.late).await;
        status
    }
}

impl Hosted for Scripted {
    /// Reads a script.
    fn config(bytes: &[u8]) -> Result<Arc<Control>, DeviceError> {
        let text = str::from_utf8(bytes).map_err(|e| DeviceError::Failed(format!("the script is no text: {e}")))?;
        Script::parse(text).map(Control::of_child)
    }
}

impl Scripted {
    /// Uses a key, and does to the answer what the rules say.
    async fn operate(
        &self,
        call: CallName,
        slot: &Slot,
        operation: Operation<'_>,
    ) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let name = str::from_utf8(&slot.0).map_err(|_| DeviceError::NoSuchKey)?;
        let after = before(&self.control, call, Some(name)).await?;
        let status = self.status()?;
        let key = self.find(name, status.generation)?;
        if status.locked {
            return Err(DeviceError::PinRequired);
        }
        let mut answer = match key.key.operate(&operation)? {
            Outcome::Signature(signature) => Zeroizing::new(signature.as_bytes().to_vec()),
            Outcome::Secret(secret) => secret,
        };
        if call == CallName::Sign {
            self.control.count(|counts| *counts.signs.entry(name.to_owned()).or_default() += 1);
        }
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).replace(answer.clone());
        if after.swapped {
            // The first has none before it: it gets nothing of its own either.
            answer = last.unwrap_or_default();
        }
        if after.wrong
            && let Some(last) = answer.last_mut()
        {
            *last ^= 1;
        }
        if after.garbage {
            match self.control.place() {
                Place::InProcess => answer = Zeroizing::new(GARBAGE[..7].to_vec()),
                Place::Child => write_garbage().map_err(|e| DeviceError::Failed(format!("no garbage: {e}")))?,
            }
        }
        sleep(after.late).await;
        Ok(answer)
    }

    /// Makes a key or takes one over.
    async fn put(&self, call: CallName, new: &NewKey, private: Option<&PrivateHalf>) -> Result<FoundKey, DeviceError> {
        let after = before(&self.control, call, None).await?;
        if self.status()?.locked {
            return Err(DeviceError::PinRequired);
        }
        let secret = new.secret.as_ref().map(ExposeSecret::expose_secret);
        if self.control.script().admin.as_deref().is_some_and(|admin| secret != Some(admin)) {
            return Err(DeviceError::PinWrong { left: None });
        }
        let n = self.control.journal()?.lines().count();
        self.control.record(&keys::line(new, n, private)?)?;
        self.reload()?;
        let found = self.keys().last().map(|key| key.found()).ok_or(DeviceError::NoSuchKey)?;
        sleep(after.late).await;
        Ok(found)
    }

    async fn change(&self, call: CallName, slot: &Slot, line: impl FnOnce(&str) -> String) -> Result<(), DeviceError> {
        let name = str::from_utf8(&slot.0).map_err(|_| DeviceError::NoSuchKey)?;
        let after = before(&self.control, call, Some(name)).await?;
        let status = self.status()?;
        self.find(name, status.generation)?;
        if status.locked {
            return Err(DeviceError::PinRequired);
        }
        self.control.record(&line(name))?;
        self.reload()?;
        sleep(after.late).await;
        Ok(())
    }

    fn reload(&self) -> Result<(), DeviceError> {
        *self.keys() = keys::load(&self.control.script().keys, &self.control.journal()?)?;
        Ok(())
    }

    fn keys(&self) -> MutexGuard<'_, Vec<Arc<Key>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, slot: &str, generation: u64) -> Result<Arc<Key>, DeviceError> {
        let keys = self.keys();
        let key = keys.iter().find(|key| key.script.slot == slot && key.is_there(generation));
        key.cloned().ok_or(DeviceError::NoSuchKey)
    }

    fn status(&self) -> Result<Status, DeviceError> {
        Ok(Status {
            serial: self.control.script().serial.clone(),
            locked: self.locked.load(Ordering::Relaxed),
            tries_left: self.control.script().pin.as_ref().map(|pin| self.tries(pin)).transpose()?,
            generation: self.control.get(GENERATION)?.unwrap_or(0),
        })
    }

    fn tries(&self, pin: &Pin) -> Result<u8, DeviceError> {
        Ok(self.control.get(TRIES)?.map_or(pin.tries, |tries| u8::try_from(tries).unwrap_or(u8::MAX)))
    }

    fn log_in(&self, pin: &str) -> Result<(), DeviceError> {
        let Some(right) = &self.control.script().pin else {
            return Err(DeviceError::unsupported("this token has no PIN"));
        };
        let _one_at_a_time = self.login.lock().unwrap_or_else(PoisonError::into_inner);
        self.control.count(|counts| counts.logins.push(pin.to_owned()));
        let Some(left) = self.tries(right)?.checked_sub(1) else { return Err(DeviceError::PinBlocked) };
        if pin == right.value {
            self.control.set(TRIES, right.tries.into())?;
            self.locked.store(false, Ordering::Relaxed);
            return Ok(());
        }
        self.control.set(TRIES, left.into())?;
        Err(DeviceError::PinWrong { left: Some(left) })
    }
}

/// Counts a call and does all that its rules say comes before the work.
async fn before(control: &Control, call: CallName, slot: Option<&str>) -> Result<After, DeviceError> {
    control.count(|counts| *counts.calls.entry(call).or_default() += 1);
    let mut after = After::default();
    for rule in control.matching(call, slot)? {
        match rule.action {
            Action::Sleep(time) => sleep(time).await,
            Action::Late(time) => after.late += time,
            Action::Hang => match control.place() {
                Place::InProcess => pending().await,
                // Like foreign code, which no future can be made to leave.
                Place::Child => loop {
                    thread::park();
                },
            },
            Action::Crash(how) => return Err(crash(control.place(), how)),
            Action::Wrong => after.wrong = true,
            Action::Swapped => after.swapped = true,
            Action::Garbage => after.garbage = true,
            Action::Absent => return Err(DeviceError::Absent),
            Action::Busy => return Err(DeviceError::Busy),
            Action::NotTouched(time) => {
                sleep(time).await;
                return Err(DeviceError::NotTouched);
            }
            Action::Fail(why) => return Err(DeviceError::Failed(why)),
            Action::Stderr(lines) => {
                let mut stderr = io::stderr().lock();
                for n in 0..lines {
                    // Nobody may be reading it.
                    let _ = writeln!(stderr, "scripted noise {n}");
                }
            }
        }
    }
    sleep(control.script().latency).await;
    // Last: it may have gone meanwhile.
    if control.get(ABSENT)?.is_some() { Err(DeviceError::Absent) } else { Ok(after) }
}

#[allow(clippy::panic, reason = "that is what was asked for")]
fn crash(place: Place, how: Crash) -> DeviceError {
    match (place, how) {
        (_, Crash::Panic) => panic!("the script says so"),
        (Place::InProcess, _) => DeviceError::Restarted,
        (Place::Child, Crash::Abort) => process::abort(),
        (Place::Child, Crash::Exit(code)) => process::exit(code),
        (Place::Child, Crash::Segv) => loop {
            // Rust's own handler takes the first to be a fault, and waits for the fault to come again.
            let _ = kill_process(getpid(), Signal::SEGV);
            thread::yield_now();
        },
    }
}

/// Writes what is no frame to the sockets of this process: one of them is the daemon's.
fn write_garbage() -> io::Result<()> {
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let is_socket = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        if is_socket && let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            rustix::io::write(pidfd_getfd(&this, fd, PidfdGetfdFlags::empty())?, &GARBAGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
