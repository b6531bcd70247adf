//! What logind tells of this machine's sleep and of its owner's sessions, and that the encrypted store is locked then. Knows
//! logind's objects; not how a message looks.

use std::{
    collections::HashSet,
    io::{self, PipeWriter, pipe},
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::process::{Signal, geteuid};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::{
    dbus::{Bus, Kind, Message},
    sys::spawn::{self, Child},
    vault::{STORE, Vault},
};

const LOGIND: &str = "org.freedesktop.login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const SESSION: &str = "org.freedesktop.login1.Session";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// The pause before a bus that went away is looked for again.
const PAUSE: Duration = Duration::from_secs(3);
/// How long systemd-inhibit may take to start: nothing is heard meanwhile.
const START: Duration = Duration::from_secs(2);
/// Questions about sessions that may be open at a time. With so many of them, the next locked session is taken for ours.
const MAX_ASKED: usize = 64;
/// Why the store is locked when logind does not say whose session is.
const UNKNOWN: &str = "a session is locked, and logind does not say whose";

/// When the store is locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LockOn {
    /// When the machine goes to sleep.
    pub(super) sleep: bool,
    /// When a session of this user is locked.
    pub(super) session: bool,
}

impl LockOn {
    pub(super) fn anything(self) -> bool {
        self.sleep || self.session
    }
}

/// Locks the store whenever logind says so. Never returns.
pub(super) async fn lock(vault: Arc<Vault>, on: LockOn) {
    let mut told = false;
    loop {
        let Err(error) = listen(&vault, on, &mut told).await;
        if told {
            debug!("logind cannot be heard: {error}");
        } else {
            told = true;
            warn!("logind cannot be heard, so that the store is not locked with the session or for sleep: {error}");
        }
        sleep(PAUSE).await;
    }
}

async fn listen(vault: &Vault, on: LockOn, told: &mut bool) -> io::Result<std::convert::Infallible> {
    let mut bus = Bus::system().await?;
    if on.sleep {
        bus.watch(&format!("type='signal',sender='{LOGIND}',interface='{MANAGER}',member='PrepareForSleep'")).await?;
    }
    if on.session {
        bus.watch(&format!("type='signal',sender='{LOGIND}',interface='{SESSION}',member='Lock'")).await?;
    }
    *told = false;
    info!("the store is locked when logind says so");
    let mut delay = None;
    if on.sleep {
        delay = Delay::begin().await;
    }
    let mut asked = HashSet::new();
    let heard = hear(&mut bus, vault, on, &mut asked, &mut delay).await;
    if !asked.is_empty() {
        lock_now(vault, UNKNOWN);
    }
    heard
}

/// That the machine's sleep waits until the store is locked: `systemd-inhibit` with a lock of mode `delay`, for as long as
/// this lives. A program of its own, since logind's lock is a descriptor: on a connection that takes any, everybody on the
/// bus could have us close one that blocks. logind waits no longer than it lets anybody delay it (logind.conf(5),
/// InhibitDelayMaxSec), which is five seconds.
struct Delay {
    _program: Child,
    /// What the program runs reads this to its end: it ends with us, however that is.
    _alive: PipeWriter,
}

impl Delay {
    async fn begin() -> Option<Self> {
        match timeout(START, Self::start()).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(delay) => Some(delay),
            Err(error) => {
                unguarded(&format!("systemd-inhibit cannot be run: {error}"));
                None
            }
        }
    }

    async fn start() -> io::Result<Self> {
        let (stdin, alive) = pipe()?;
        let mut command = Command::new("systemd-inhibit");
        command
            .args([
                "--what=sleep",
                "--mode=delay",
                "--who=Strongroom",
                "--why=The store of keys is locked first",
                "cat",
            ])
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let program = spawn::spawn(command).await?;
        let exited = program.exited();
        tokio::spawn(async move {
            let status = exited.await;
            // By our own hand it ends by a signal or with the pipe, and by systemd's together with us.
            let signals = [Signal::KILL, Signal::TERM].map(|signal| Some(signal.as_raw()));
            let is_meant = status.is_none_or(|status| status.success() || signals.contains(&status.signal()));
            if !is_meant {
                unguarded("logind lets nobody delay it, or systemd-inhibit was ended");
            }
        });
        Ok(Self { _program: program, _alive: alive })
    }
}

fn unguarded(why: &str) {
    warn!("the machine may sleep before the store is locked: {why}");
}

/// Hears what comes. Only a session that logind says is somebody else's leaves the store open: where it does not say whose,
/// it locks.
async fn hear(
    bus: &mut Bus,
    vault: &Vault,
    on: LockOn,
    asked: &mut HashSet<u32>,
    delay: &mut Option<Delay>,
) -> io::Result<std::convert::Infallible> {
    loop {
        let message = bus.next().await?;
        // logind tells everybody; who tells us alone is somebody else. An answer comes from whom we asked: the bus passes on
        // no other.
        if message.kind == Some(Kind::Signal) && !message.destination.is_empty() {
            debug!(sender = message.sender, "a signal that is not logind's");
        } else if on.sleep && message.is_signal(MANAGER, "PrepareForSleep") {
            if message.boolean() == Some(true) {
                lock_now(vault, "the machine goes to sleep");
                *delay = None;
            } else {
                *delay = Delay::begin().await;
            }
        } else if on.session && message.is_signal(SESSION, "Lock") {
            if asked.len() >= MAX_ASKED {
                lock_now(vault, UNKNOWN);
                continue;
            }
            // Whose session it is, it does not say.
            let whose = Message::call(LOGIND, &message.path, PROPERTIES, "Get", &[SESSION, "User"]);
            asked.insert(bus.send(&whose).await.inspect_err(|_| lock_now(vault, UNKNOWN))?);
        } else if matches!(message.kind, Some(Kind::Return | Kind::Error)) && asked.remove(&message.reply_to) {
            match message.first_of_pair().filter(|_| message.kind == Some(Kind::Return)) {
                Some(uid) if uid == geteuid().as_raw() => lock_now(vault, "the session is locked"),
                Some(_) => {}
                None => lock_now(vault, UNKNOWN),
            }
        }
    }
}

fn lock_now(vault: &Vault, why: &str) {
    info!("{why}");
    vault.audit().act("lock").device(STORE).end(Ok(())).ok();
    vault.lock_store();
}
