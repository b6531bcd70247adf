//! What logind tells of this machine's sleep and of its owner's sessions, and that the encrypted store is locked then. Knows
//! logind's objects; not how a message looks.

use std::{collections::HashSet, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use rustix::process::geteuid;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::{
    dbus::{Bus, Kind, Message},
    vault::{STORE, Vault},
};

const LOGIND: &str = "org.freedesktop.login1";
const OBJECT: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const SESSION: &str = "org.freedesktop.login1.Session";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// The pause before a bus that went away is looked for again.
const PAUSE: Duration = Duration::from_secs(3);
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
    let mut delay = Delay::default();
    if on.sleep {
        delay.ask(&mut bus).await?;
    }
    let mut asked = HashSet::new();
    let heard = hear(&mut bus, vault, on, &mut asked, &mut delay).await;
    if !asked.is_empty() {
        lock_now(vault, UNKNOWN);
    }
    heard
}

/// The machine's sleep, which waits until the store is locked: an inhibitor lock of logind's in mode `delay`. For so long as
/// logind lets anybody delay it, which is five seconds (logind.conf(5), InhibitDelayMaxSec).
#[derive(Default)]
struct Delay {
    /// The call that asks for it, until it is answered.
    asked: Option<u32>,
    /// The lock itself: it ends when this is closed.
    held: Option<OwnedFd>,
    /// The unique name of who answered last.
    logind: String,
}

impl Delay {
    async fn ask(&mut self, bus: &mut Bus) -> io::Result<()> {
        let args = ["sleep", "Strongroom", "The store of keys is locked first", "delay"];
        self.asked = Some(bus.send(&Message::call(LOGIND, OBJECT, MANAGER, "Inhibit", &args)).await?);
        Ok(())
    }

    /// Whether this is the answer: then it has been taken.
    fn answered(&mut self, bus: &mut Bus, message: &Message) -> bool {
        let is_answer =
            matches!(message.kind, Some(Kind::Return | Kind::Error)) && self.asked == Some(message.reply_to);
        if is_answer {
            self.asked = None;
            self.held = bus.take_descriptor();
            if self.held.is_none() && self.logind.is_empty() {
                warn!("logind does not let sleep wait: the machine may sleep before the store is locked");
            }
            self.logind.clone_from(&message.sender);
        }
        is_answer
    }

    /// The store is locked, and the machine may sleep. Who told us that it will may be anybody: only logind wakes it, too.
    async fn end(&mut self, bus: &mut Bus, teller: &str) -> io::Result<()> {
        (self.asked, self.held) = (None, None);
        if teller == self.logind { Ok(()) } else { self.ask(bus).await }
    }
}

/// Hears what comes. Only a session that logind says is somebody else's leaves the store open: where it does not say whose,
/// it locks.
async fn hear(
    bus: &mut Bus,
    vault: &Vault,
    on: LockOn,
    asked: &mut HashSet<u32>,
    delay: &mut Delay,
) -> io::Result<std::convert::Infallible> {
    loop {
        let message = bus.next().await?;
        if delay.answered(bus, &message) {
            continue;
        }
        // Anybody may send us a signal. All that comes of it is a locked store. An answer comes from whom we asked: the bus
        // passes on no other.
        if on.sleep && message.is_signal(MANAGER, "PrepareForSleep") {
            if message.boolean() == Some(true) {
                lock_now(vault, "the machine goes to sleep");
                delay.end(bus, &message.sender).await?;
            } else {
                delay.ask(bus).await?;
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
