//! A device that hangs, crashes and lies as a script says, for tests. Knows scripts and soft keys.
//!
//! Its keys are real: their signatures verify. It reads no clock but tokio's and draws no random numbers for what it
//! does, so that a test under a paused clock goes the same way each time.

#[cfg(not(debug_assertions))]
compile_error!("the feature `scripted` is for tests: no release may have it");

pub mod control;
pub mod script;

use std::{
    fs,
    future::pending,
    io::{self, Write},
    process, str,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use aws_lc_rs::{
    agreement, digest,
    signature::{Ed25519KeyPair, KeyPair},
};
use base64ct::{Base64Unpadded, Encoding};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, getpid, kill_process, pidfd_getfd, pidfd_open};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::sleep;
use zeroize::Zeroizing;

pub use control::{Control, Counts};
pub use script::{Action, CallName, Crash, KeyKind, Pin, Rule, Script, ScriptKey};

use super::{
    DecryptScheme, DeriveScheme, DeviceError, Driver, FoundKey, Input, Operation, Outcome, Scan, Scheme, Slot, Status,
    host::child::Hosted,
    soft::{SoftKey, SoftParts},
};
use crate::{
    public_key::{Curve, PublicKey},
    rfc4251::{Reader, WireError},
    sys::rsa::RsaIntegers,
};
use control::Place;

/// `mpint n, e, d, iqmp, p, q`, as `ssh-add` sends them. Made for tests, and public.
const RSA: &str = include_str!("scripted/rsa-2048.b64");
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
    keys: Vec<Key>,
    locked: AtomicBool,
    /// Held while a PIN is tried: tries are counted one by one.
    login: Mutex<()>,
    /// What [`Action::Swapped`] answers with.
    last: Mutex<Option<Zeroizing<Vec<u8>>>>,
}

struct Key {
    script: ScriptKey,
    blob: Box<[u8]>,
    key: SoftKey,
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
        let keys = script.keys.iter().map(Key::new).collect::<Result<_, _>>()?;
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
        let there = |key: &&Key| key.is_there(status.generation);
        let keys: Vec<_> = self.keys.iter().filter(there).filter(|key| !(status.locked && key.script.hidden)).collect();
        let complete = keys.len() == self.keys.iter().filter(there).count();
        let scan = Scan { keys: keys.into_iter().map(Key::found).collect(), complete, status };
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

    async fn unlock(&self, pin: SecretString) -> Result<(), DeviceError> {
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
        let key = self.keys.iter().find(|key| key.script.slot == name && key.is_there(status.generation));
        let key = key.ok_or(DeviceError::NoSuchKey)?;
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

impl Key {
    fn new(script: &ScriptKey) -> Result<Self, DeviceError> {
        let broken = || DeviceError::Failed(format!("the key in slot {:?} cannot be made", script.slot));
        let seed = [format!("{:?}", script.kind).as_bytes(), &script.seed.to_be_bytes()].concat();
        let secret = digest::digest(&digest::SHA256, &seed);
        let secret = secret.as_ref();
        let (blob, key) = match script.kind {
            KeyKind::Ed25519 => {
                let pair = Ed25519KeyPair::from_seed_unchecked(secret).map_err(|_| broken())?;
                let public = pair.public_key().as_ref();
                let parts = SoftParts::Ed25519 { seed: secret, public };
                (PublicKey::Ed25519(public).to_blob(), SoftKey::new(&parts)?)
            }
            KeyKind::P256 => {
                let private = agreement::PrivateKey::from_private_key(&agreement::ECDH_P256, secret);
                let public = private.map_err(|_| broken())?.compute_public_key().map_err(|_| broken())?;
                let (curve, point) = (Curve::P256, public.as_ref());
                let parts = SoftParts::Ecdsa { curve, scalar: secret, point };
                (PublicKey::Ecdsa(curve, point).to_blob(), SoftKey::new(&parts)?)
            }
            KeyKind::Rsa => {
                let text: String = RSA.split_whitespace().collect();
                let integers = Base64Unpadded::decode_vec(&text).map_err(|_| broken())?;
                let parts = rsa(&integers).map_err(|_| broken())?;
                let blob = PublicKey::Rsa { e: parts.e, n: parts.n }.to_blob();
                (blob, SoftKey::new(&SoftParts::Rsa(parts))?)
            }
        };
        Ok(Self { script: script.clone(), blob: blob.into(), key })
    }

    fn is_there(&self, generation: u64) -> bool {
        self.script.appears <= generation && self.script.vanishes.is_none_or(|gone| generation < gone)
    }

    fn found(&self) -> FoundKey {
        FoundKey {
            slot: Slot(self.script.slot.as_bytes().into()),
            blob: self.blob.clone(),
            certificates: Vec::new(),
            label: self.script.label.clone(),
            schemes: self.key.schemes().to_vec(),
            decrypts: self.key.decrypts().to_vec(),
            derives: self.key.derives().to_vec(),
            touch: self.script.touch,
        }
    }
}

fn rsa(integers: &[u8]) -> Result<RsaIntegers<'_>, WireError> {
    let mut reader = Reader::new(integers);
    let mut next = || reader.mpint();
    Ok(RsaIntegers { n: next()?, e: next()?, d: next()?, iqmp: next()?, p: next()?, q: next()? })
}

#[cfg(test)]
mod tests;
