//! The vault: the only entrance to keys. Every use of a key goes through [`Vault::operate`]. Knows identities, policy and
//! prompts; never a socket or a byte of the wire.

pub mod budget;
pub mod destination;
pub mod key;
pub mod keyring;
mod lock;
pub mod pattern;
pub mod pins;
pub mod policy;
pub mod purpose;
pub mod registry;
pub mod seal;
mod sign;
pub mod store;
pub mod why;

pub use sign::{Answer, Asked, Use};

use std::{
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info};

use crate::{
    devices::{compute::Compute, soft::SoftKey},
    prompt::{PromptError, Prompter},
    public_key::KeyType,
    sys::clock,
};
use budget::Budget;
use destination::Route;
use key::{Caller, Grants, Identity, Place, PrivateKey};
use keyring::{Full, Keyring, Listing};
use pins::Pins;
use policy::{Refusal, Rules};
use registry::Member;
use seal::Lock;
use store::Store;
use why::Why;

/// How long the file system may take to resolve a path.
const PATH_PATIENCE: Duration = Duration::from_secs(5);
/// The expiry clock looks at least this often: timers stand still while the machine sleeps, lifetimes do not.
const EXPIRY_TICK: Duration = Duration::from_secs(30);

/// How the vault is set up. Everything in it can be replaced while it runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What policy decides by.
    pub rules: Rules,
    /// The lifetime of keys that come with none.
    pub default_lifetime: Option<Duration>,
    /// Which PKCS#11 and FIDO provider libraries may be loaded: OpenSSH's pattern list.
    pub allowed_providers: String,
    /// Whether a forwarded connection may name a provider.
    pub allow_remote_providers: bool,
    /// How long a request may wait for a person to confirm, touch or type a PIN.
    pub person_deadline: Duration,
}

impl Default for Settings {
    /// As ssh-agent decides without options, except that no provider may be loaded.
    fn default() -> Self {
        Self {
            rules: Rules::default(),
            default_lifetime: None,
            allowed_providers: String::new(),
            allow_remote_providers: false,
            person_deadline: Duration::from_secs(60),
        }
    }
}

/// What the vault works with.
pub struct Parts {
    /// Asks people.
    pub prompter: Prompter,
    /// Keeps what must survive a restart.
    pub store: Store,
    /// Does slow arithmetic.
    pub compute: Compute,
    /// What a guess at the lock password costs.
    pub lock_cost: seal::Cost,
}

impl Parts {
    /// As a daemon has them: threads for arithmetic, and a lock that is expensive to guess.
    pub fn new(prompter: Prompter, store: Store) -> Self {
        Self { prompter, store, compute: Compute::new(), lock_cost: seal::Cost::default() }
    }
}

/// A key that somebody wants to add.
pub struct Candidate {
    /// The identity's blob.
    pub blob: Vec<u8>,
    /// The key's type.
    pub key_type: KeyType,
    /// Comment, without NUL.
    pub comment: Box<[u8]>,
    /// Seconds to live; `None` for the default.
    pub lifetime: Option<u32>,
    /// Ask before each use.
    pub confirm: bool,
    /// Where it may be used.
    pub destinations: Box<[key::Destination]>,
}

/// All keys of one user, and the rules of their use.
pub struct Vault {
    state: RwLock<State>,
    settings: RwLock<Arc<Settings>>,
    compute: Compute,
    prompter: Prompter,
    store: Store,
    lock_cost: seal::Cost,
    /// Tells of each lock, and of the end of the vault, whoever waits for a device or a person: in the order of their
    /// waiting, so that simulations replay.
    locks: Arc<Notify>,
    /// Wakes the expiry clock when a lifetime begins.
    lifetimes: Notify,
    pins: Pins,
    why: Why,
    tickets: Arc<Budget>,
    /// One unlock attempt at a time.
    unlock_turn: Arc<Semaphore>,
}

#[derive(Default)]
struct State {
    ring: Keyring,
    devices: Vec<Member>,
    seal: Seal,
    /// The daemon is about to end: everything is refused.
    ending: bool,
    failures: u32,
    /// No unlock is tried before this.
    next_unlock: Option<Instant>,
}

impl State {
    fn check_open(&self) -> Result<(), Refusal> {
        match self.seal {
            _ if self.ending => Err(Refusal::Ending),
            Seal::Open => Ok(()),
            Seal::Changing | Seal::Sealed(_) => Err(Refusal::Locked),
        }
    }
}

/// Whether the vault as a whole is locked by `ssh-add -x`.
#[derive(Default)]
enum Seal {
    #[default]
    Open,
    /// A lock or unlock is at work; nothing else happens meanwhile.
    Changing,
    Sealed(Arc<Lock>),
}

impl Vault {
    /// An empty vault.
    pub fn new(settings: Settings, parts: Parts) -> Arc<Self> {
        let Parts { prompter, store, compute, lock_cost } = parts;
        Arc::new(Self {
            state: RwLock::default(),
            settings: RwLock::new(Arc::new(settings)),
            compute,
            prompter,
            store,
            lock_cost,
            locks: Arc::default(),
            lifetimes: Notify::new(),
            pins: Pins::default(),
            why: Why::default(),
            tickets: Arc::default(),
            unlock_turn: Arc::new(Semaphore::new(1)),
        })
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts other settings in force. Keys keep the constraints they came with.
    pub fn configure(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
    }

    /// The last refusals.
    pub fn why(&self) -> &Why {
        &self.why
    }

    /// What the tickets of each uid may take.
    pub fn ticket_budget(&self) -> &Arc<Budget> {
        &self.tickets
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open keyring, for a change.
    fn change<T>(&self, change: impl FnOnce(&mut Keyring) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let mut state = self.write();
        state.check_open()?;
        log_expired(&state.ring.expire(clock::now()));
        change(&mut state.ring)
    }

    fn find(&self, caller: &Caller, blob: &[u8]) -> Result<Arc<Identity>, Refusal> {
        let state = self.read_current();
        state.check_open()?;
        let identity = state.ring.find(blob).filter(|identity| policy::is_shown(identity, caller));
        identity.cloned().ok_or(Refusal::NoSuchKey)
    }

    /// The state, with nothing in it that has expired.
    fn read_current(&self) -> RwLockReadGuard<'_, State> {
        let state = self.read();
        // The clock is read only where a lifetime runs.
        if state.ring.next_expiry().is_none_or(|at| at > clock::now()) {
            return state;
        }
        drop(state);
        log_expired(&self.write().ring.expire(clock::now()));
        self.read()
    }

    /// Whether the vault still holds this very identity.
    fn check_same(&self, caller: &Caller, identity: &Arc<Identity>) -> Result<(), Refusal> {
        let held = self.find(caller, &identity.blob)?;
        if Arc::ptr_eq(identity, &held) { Ok(()) } else { Err(Refusal::NoSuchKey) }
    }

    /// What this caller may see, in the order of addition. A locked vault shows nothing.
    pub fn list(&self, caller: &Caller) -> Arc<Listing> {
        let state = self.read_current();
        if state.check_open().is_err() {
            return Arc::default();
        }
        let all = state.ring.listing();
        if !caller.bind_attempted && caller.keys.is_none() {
            // From this machine every key may be seen, wherever it may be used.
            return Arc::clone(all);
        }
        let route = Route::new(caller, unix_now());
        let seen: Vec<_> =
            all.identities.iter().filter(|identity| policy::may_list(identity, &route)).cloned().collect();
        if seen.len() == all.identities.len() { Arc::clone(all) } else { Arc::new(Listing::of(seen)) }
    }

    /// Adds a key, or replaces everything but the place of the one with the same blob.
    pub fn add(&self, caller: &Caller, candidate: Candidate, key: PrivateKey) -> Result<(), Refusal> {
        let lifetime = candidate.lifetime.map(|s| Duration::from_secs(s.into())).or(self.settings().default_lifetime);
        let place = Place {
            key,
            comment: candidate.comment,
            constraints: key::Constraints {
                expires: lifetime.map(|lifetime| clock::now() + lifetime),
                confirm: candidate.confirm,
                destinations: candidate.destinations,
            },
            grants: Grants::NONE,
        };
        let (blob, key_type) = (candidate.blob, candidate.key_type);
        let route = Route::new(caller, unix_now());
        let name = self.change(|ring| {
            if let Some(old) = ring.find(&blob)
                && !policy::may_change(old, &route)
            {
                return Err(Refusal::NotPermitted("this connection may not change it"));
            }
            ring.put(&blob, key_type, place).map_err(|Full| Refusal::Full)?;
            Ok(ring.find(&blob).map(|identity| identity.name()))
        })?;
        self.lifetimes.notify_one();
        info!(key = name, "added");
        Ok(())
    }

    /// Refuses everything from now on, what waits included.
    pub fn begin_end(&self) {
        self.write().ending = true;
        self.locks.notify_waiters();
        self.forget_pins();
    }

    /// Whether a soft key may be added at all now: asked before its parts are parsed.
    pub fn check_open(&self) -> Result<(), Refusal> {
        self.read().check_open()
    }

    /// Whether a provider library may be loaded for this caller; returns its real path. The file system may hang where
    /// a path leads, so that is looked at elsewhere and not for long.
    pub async fn approve_provider(&self, caller: &Caller, provider: &str) -> Result<String, Refusal> {
        self.check_remote_provider(caller)?;
        let refused = |why: &dyn std::fmt::Display| {
            Refusal::Provider(format!("{}: {why}", policy::harmless(provider.as_bytes())))
        };
        let real = match timeout(PATH_PATIENCE, tokio::fs::canonicalize(provider)).await {
            Ok(real) => real.map_err(|e| refused(&e))?,
            Err(_) => return Err(refused(&"the file system does not answer")),
        };
        let real = real.to_str().ok_or_else(|| refused(&"its path is not UTF-8"))?;
        let settings = self.settings();
        if !policy::provider_allowed(real, &settings.allowed_providers) {
            let allowed = &settings.allowed_providers;
            let why =
                format!("not among the allowed paths ({allowed}); `ssh-agent -P` or `allowed_providers` names others");
            return Err(refused(&why));
        }
        Ok(real.to_owned())
    }

    /// Whether the caller may name provider libraries at all.
    pub fn check_remote_provider(&self, caller: &Caller) -> Result<(), Refusal> {
        self.check_open()?;
        if caller.bind_attempted && !self.settings().allow_remote_providers {
            return Err(Refusal::NotForForwarded);
        }
        Ok(())
    }

    /// Removes one identity from memory. A key on a configured device stays.
    pub fn remove(&self, caller: &Caller, blob: &[u8]) -> Result<(), Refusal> {
        let route = Route::new(caller, unix_now());
        let removed = self.change(|ring| {
            let identity = Arc::clone(ring.find(blob).ok_or(Refusal::NoSuchKey)?);
            if !policy::may_change(&identity, &route) {
                return Err(Refusal::NoSuchKey);
            }
            if ring.remove_places_of(blob, in_memory) == 0 {
                let device = identity.places.iter().find_map(|place| place.key.device()).unwrap_or_default();
                return Err(Refusal::OnDevice(device.to_owned()));
            }
            Ok(identity)
        })?;
        info!(key = %removed.name(), "removed");
        Ok(())
    }

    /// Removes all identities from memory that the caller's door shows, whatever their constraints. Keys on configured
    /// devices stay.
    pub fn remove_all(&self, caller: &Caller) -> Result<(), Refusal> {
        let count = self.change(|ring| {
            Ok(ring.remove_places(|identity, place| in_memory(place) && policy::is_shown(identity, caller)))
        })?;
        info!(count, "removed all keys");
        Ok(())
    }

    /// Removes all secrets even while locked: what SIGUSR1 asks for. Keys on devices stay listed.
    pub fn wipe(&self) {
        self.forget_pins();
        let count = self.write().ring.remove_places(|_, place| in_memory(place));
        if count > 0 {
            info!(count, "removed all keys");
        }
    }

    /// Removes keys when their time has come, locked or not. Never returns.
    pub async fn expire(&self) {
        loop {
            let next = {
                let mut state = self.write();
                log_expired(&state.ring.expire(clock::now()));
                state.ring.next_expiry()
            };
            let wait = next.map(|at| at.saturating_sub(clock::now()).min(EXPIRY_TICK));
            tokio::select! {
                () = async { match wait { Some(wait) => sleep(wait).await, None => std::future::pending().await } } => {}
                () = self.lifetimes.notified() => {}
            }
        }
    }
}

/// Whether the private half came by `ssh-add`, and goes with the process.
fn in_memory(place: &Place) -> bool {
    place.key.device().is_none()
}

/// Seconds since 1970, for the validity of certificates.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn log_expired(identities: &[Arc<Identity>]) {
    for identity in identities {
        debug!(key = %identity.name(), "expired");
    }
}

/// Makes a soft key of its parts.
pub fn soft_key(parts: &crate::devices::soft::SoftParts<'_>) -> Result<PrivateKey, Refusal> {
    Ok(PrivateKey::Soft(Arc::new(SoftKey::new(parts)?)))
}

impl From<PromptError> for Refusal {
    fn from(error: PromptError) -> Self {
        match error {
            PromptError::Denied => Self::Denied,
            PromptError::TimedOut => Self::Timeout,
            PromptError::TooMany => Self::TooManyPrompts,
            PromptError::Unavailable(why) => Self::NoPrompt(why.to_string()),
        }
    }
}
