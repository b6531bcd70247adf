//! The vault: the only entrance to keys. Every use of a key goes through [`Vault::operate`]. Knows identities, policy and
//! prompts; never a socket or a byte of the wire.

pub mod audit;
pub mod backup;
pub mod budget;
mod card;
pub mod carried;
mod check;
pub mod destination;
mod guess;
pub mod key;
pub mod keyring;
mod life;
mod lock;
pub mod pattern;
mod person;
pub mod pins;
pub mod policy;
pub mod provider;
pub mod purpose;
pub mod reason;
pub mod registry;
pub mod seal;
mod secret_file;
mod sign;
pub mod store;
pub mod stored;
pub mod transfer;
pub mod why;

pub use audit::MEMORY;
pub use check::Checked;
pub use life::Move;
pub use sign::{Answer, Asked, Use};
pub use stored::STORE;

use std::{
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use rustix::process::geteuid;
use tokio::{sync::Notify, time::sleep};
use tracing::{debug, info};

use crate::{
    devices::{compute::Compute, soft::SoftKey},
    prompt::{PromptError, Prompter},
    public_key::KeyType,
    reactor::Registry,
    sys::clock,
};
use audit::Audit;
use budget::Budget;
use destination::Route;
use guess::Guesses;
use key::{Caller, Grants, Identity, Place, PrivateKey};
use keyring::{Full, Keyring, Listing};
use pins::Pins;
use policy::{Refusal, Rules};
use provider::Providers;
use registry::Member;
use seal::Lock;
use store::{KeyId, Store};
use stored::{Access, AutoLock};
use why::Why;

/// The expiry clock looks at least this often: timers stand still while the machine sleeps, lifetimes do not.
const EXPIRY_TICK: Duration = Duration::from_secs(30);

/// How long a try at a passphrase of the store takes unless somebody says otherwise.
const SLOT_TIME: Duration = Duration::from_millis(500);

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
    /// How long a PKCS#11 provider may take to say what its tokens hold.
    pub provider_patience: Duration,
    /// How long a request may wait for a person to confirm, touch or type a PIN.
    pub person_deadline: Duration,
    /// When the encrypted store is locked by itself.
    pub auto_lock: AutoLock,
}

impl Default for Settings {
    /// As ssh-agent decides without options, except that no provider may be loaded.
    fn default() -> Self {
        Self {
            rules: Rules::default(),
            default_lifetime: None,
            allowed_providers: String::new(),
            allow_remote_providers: false,
            provider_patience: Duration::from_secs(30),
            person_deadline: Duration::from_secs(60),
            auto_lock: AutoLock::default(),
        }
    }
}

/// What the vault works with.
pub struct Parts {
    /// Asks people.
    pub prompter: Prompter,
    /// Keeps what must survive a restart.
    pub store: Store,
    /// Writes down what is done with keys.
    pub audit: Audit,
    /// Does slow arithmetic.
    pub compute: Compute,
    /// What a guess at the lock password costs.
    pub lock_cost: seal::Cost,
    /// How long a try at a new passphrase of the store is to take.
    pub slot_time: Duration,
    /// Where the sockets of tokens' processes are waited for. Without, no provider can be loaded.
    pub reactor: Option<Registry>,
}

impl Parts {
    /// As a daemon has them: threads for arithmetic, and a lock that is expensive to guess. Nothing is written down.
    pub fn new(prompter: Prompter, store: Store) -> Self {
        Self {
            prompter,
            store,
            audit: Audit::off(),
            compute: Compute::new(),
            lock_cost: seal::Cost::default(),
            slot_time: SLOT_TIME,
            reactor: None,
        }
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
    audit: Audit,
    lock_cost: seal::Cost,
    slot_time: Duration,
    reactor: Option<Registry>,
    /// Whose keys these are.
    owner: u32,
    /// Tells of each lock, and of the end of the vault, whoever waits for a device or a person: in the order of their
    /// waiting, so that simulations replay.
    locks: Arc<Notify>,
    /// Wakes the expiry clock when a lifetime begins.
    lifetimes: Notify,
    pins: Pins,
    providers: Providers,
    why: Why,
    tickets: Arc<Budget>,
    /// Attempts at the lock password.
    unlocks: Guesses,
    /// What opens the encrypted store.
    access: Access,
}

#[derive(Default)]
struct State {
    ring: Keyring,
    devices: Vec<Member>,
    /// Keys of the state file that could not be listed when the daemon started.
    unlisted: Vec<KeyId>,
    seal: Seal,
    /// The daemon is about to end: everything is refused.
    ending: bool,
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
        let Parts { prompter, store, audit, compute, lock_cost, slot_time, reactor } = parts;
        Arc::new(Self {
            state: RwLock::default(),
            settings: RwLock::new(Arc::new(settings)),
            compute,
            prompter,
            store,
            audit,
            lock_cost,
            slot_time,
            reactor,
            owner: geteuid().as_raw(),
            locks: Arc::default(),
            lifetimes: Notify::new(),
            pins: Pins::default(),
            providers: Providers::default(),
            why: Why::default(),
            tickets: Arc::default(),
            unlocks: Guesses::default(),
            access: Access::default(),
        })
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts other settings in force. Keys keep the constraints they came with.
    pub fn configure(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        self.access.settings_changed();
    }

    /// The audit log.
    pub fn audit(&self) -> &Audit {
        &self.audit
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
        drop(self.read_current());
        let mut state = self.write();
        state.check_open()?;
        change(&mut state.ring)
    }

    /// Removes what has expired.
    fn drop_expired(&self) {
        let (gone, of_devices) = {
            let mut state = self.write();
            let expired = state.ring.expire(clock::now());
            let of_devices =
                expired.iter().flat_map(|identity| &identity.places).any(|place| place.key.device().is_some());
            // They go under the lock: a secret is in memory no longer than its key is listed.
            let gone: Vec<_> = expired.into_iter().map(|identity| (identity.name(), identity.blob.clone())).collect();
            (gone, of_devices)
        };
        for (name, blob) in &gone {
            debug!(key = %name, "expired");
            self.audit.act("expire").blob(blob).end(Ok(())).ok();
        }
        if of_devices {
            self.end_unused();
        }
    }

    fn find(&self, caller: &Caller, blob: &[u8]) -> Result<Arc<Identity>, Refusal> {
        let state = self.read_current();
        state.check_open()?;
        let identity = state.ring.find(blob).filter(|identity| policy::is_shown(identity, caller));
        identity.cloned().ok_or(Refusal::NoSuchKey)
    }

    /// The same, for our own messages: these list a key under its plain blob, even one that is here with certificates only.
    fn find_key(&self, caller: &Caller, blob: &[u8]) -> Result<Arc<Identity>, Refusal> {
        let state = self.read_current();
        state.check_open()?;
        let plain = state.ring.find(blob).into_iter();
        let mut found = plain.chain(state.ring.certified(blob)).filter(|identity| policy::is_shown(identity, caller));
        found.next().cloned().ok_or(Refusal::NoSuchKey)
    }

    /// The state, with nothing in it that has expired.
    fn read_current(&self) -> RwLockReadGuard<'_, State> {
        let state = self.read();
        // The clock is read only where a lifetime runs.
        if state.ring.next_expiry().is_none_or(|at| at > clock::now()) {
            return state;
        }
        drop(state);
        self.drop_expired();
        self.read()
    }

    /// The identity as the vault holds it now, if its private halves and their conditions are still the same.
    fn check_same(&self, caller: &Caller, identity: &Arc<Identity>) -> Result<Arc<Identity>, Refusal> {
        let held = self.find(caller, &identity.blob)?;
        let known = |place: &Place| identity.places.iter().any(|old| old.is_same(place));
        if held.places.iter().all(known) { Ok(held) } else { Err(Refusal::NoSuchKey) }
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
                ..key::Constraints::default()
            },
            grants: Grants::NONE,
            rank: 0,
            added: true,
            name: "".into(),
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
        self.lock_store();
    }

    /// Whether a soft key may be added at all now: asked before its parts are parsed.
    pub fn check_open(&self) -> Result<(), Refusal> {
        self.read().check_open()
    }

    /// Removes one identity that came by `ssh-add`. A key on a configured device stays.
    pub fn remove(&self, caller: &Caller, blob: &[u8]) -> Result<(), Refusal> {
        let route = Route::new(caller, unix_now());
        let name = self.change(|ring| {
            let identity = Arc::clone(ring.find(blob).ok_or(Refusal::NoSuchKey)?);
            if !policy::may_change(&identity, &route) {
                return Err(Refusal::NoSuchKey);
            }
            if ring.remove_places_of(blob, |place| place.added) == 0 {
                if identity.is_stored() {
                    return Err(Refusal::InStore);
                }
                let device = identity.places.iter().find_map(|place| place.key.device()).unwrap_or_default();
                return Err(Refusal::OnDevice(device.to_owned()));
            }
            Ok(identity.name())
        })?;
        info!(key = %name, "removed");
        self.end_unused();
        Ok(())
    }

    /// Removes all identities that came by `ssh-add` and that the caller's door shows, whatever their constraints. Keys on
    /// configured devices stay.
    pub fn remove_all(&self, caller: &Caller) -> Result<(), Refusal> {
        let count = self.change(|ring| {
            Ok(ring.remove_places(|identity, place| place.added && policy::is_shown(identity, caller)))
        })?;
        self.end_unused();
        info!(count, "removed all keys");
        Ok(())
    }

    /// Removes all secrets, and all keys that came by `ssh-add`, even while locked: what SIGUSR1 asks for. Keys on
    /// configured devices stay listed.
    pub fn wipe(&self) {
        self.forget_pins();
        self.lock_store();
        let count = self.write().ring.remove_places(|_, place| place.added);
        self.end_unused();
        if count > 0 {
            info!(count, "removed all keys");
            self.audit.act("wipe").count(count).end(Ok(())).ok();
        }
    }

    /// Removes keys when their time has come, locked or not. Never returns.
    pub async fn expire(&self) {
        loop {
            self.drop_expired();
            let next = self.read().ring.next_expiry();
            let wait = next.map(|at| at.saturating_sub(clock::now()).min(EXPIRY_TICK));
            tokio::select! {
                () = async { match wait { Some(wait) => sleep(wait).await, None => std::future::pending().await } } => {}
                () = self.lifetimes.notified() => {}
            }
        }
    }
}

/// Whether the private half is in this process, or is a handle that is.
fn in_memory(place: &Place) -> bool {
    place.key.device().is_none()
}

/// Seconds since 1970, for the validity of certificates.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
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
