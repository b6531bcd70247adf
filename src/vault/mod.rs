//! The vault: the only entrance to keys. Every use of a key goes through [`Vault::sign`]. Knows identities, policy and
//! prompts; never a socket or a byte of the wire.

pub mod destination;
pub mod key;
pub mod keyring;
pub mod pattern;
pub mod policy;
pub mod purpose;
pub mod seal;
pub mod store;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, Semaphore, oneshot, watch},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tracing::{debug, error, info, warn};
use zeroize::Zeroizing;

use crate::{
    devices::{
        DeviceError, Hash, Scheme, Signature,
        compute::Compute,
        sk::SkKey,
        soft::{SoftKey, curve_hash},
    },
    prompt::{PromptError, Prompter},
    public_key::KeyType,
    sys::{clock, peer},
};
use destination::Route;
use key::{Caller, Identity, PrivateKey};
use keyring::{Full, Keyring, Listing};
use policy::{Refusal, Rules};
use seal::{Lock, SealKey};

/// How long a signature may take when nobody has to be asked.
const SIGN_DEADLINE: Duration = Duration::from_secs(30);
/// A wrong unlock delays the next by this much more than the one before…
const UNLOCK_DELAY: Duration = Duration::from_millis(100);
/// …up to this.
const UNLOCK_DELAY_MAX: Duration = Duration::from_secs(10);
/// How long the file system may take to resolve a path.
const PATH_PATIENCE: Duration = Duration::from_secs(5);
/// How long an unlock may wait for its turn.
const UNLOCK_PATIENCE: Duration = Duration::from_secs(60);
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

/// What a request becomes: most are answered where they were read, the others by a future. Dropping the future cancels.
pub enum Answer<T> {
    /// Here it is.
    Now(T),
    /// It waits for arithmetic, a device or a person.
    Later(Pin<Box<dyn Future<Output = T> + Send>>),
}

/// A key to sign with, what to sign, and the flags of a sign request (RFC 9987, section 3.6).
#[derive(Clone, Copy)]
pub struct Signing<'a> {
    /// The identity's blob.
    pub blob: &'a [u8],
    /// What is signed.
    pub data: &'a [u8],
    /// For RSA: the hash to use.
    pub rsa_hash: Hash,
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
    compute: Arc<Compute>,
    prompter: Prompter,
    /// Counts the locks; whoever waits for a person watches it.
    locks: watch::Sender<u64>,
    /// Wakes the expiry clock when a lifetime begins.
    lifetimes: Notify,
    /// One unlock attempt at a time.
    unlock_turn: Arc<Semaphore>,
}

#[derive(Default)]
struct State {
    ring: Keyring,
    seal: Seal,
    failures: u32,
    /// No unlock is tried before this.
    next_unlock: Option<Instant>,
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
    pub fn new(settings: Settings, prompter: Prompter) -> Arc<Self> {
        Arc::new(Self {
            state: RwLock::default(),
            settings: RwLock::new(Arc::new(settings)),
            compute: Arc::new(Compute::new()),
            prompter,
            locks: watch::Sender::new(0),
            lifetimes: Notify::new(),
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

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open keyring, for a change.
    fn change<T>(&self, change: impl FnOnce(&mut Keyring) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let mut state = self.write();
        match state.seal {
            Seal::Open => {
                log_expired(&state.ring.expire(clock::now()));
                change(&mut state.ring)
            }
            _ => Err(Refusal::Locked),
        }
    }

    fn find(&self, caller: &Caller, blob: &[u8]) -> Result<Arc<Identity>, Refusal> {
        let state = self.read();
        match state.seal {
            Seal::Open => {}
            _ => return Err(Refusal::Locked),
        }
        // The clock is read only where a lifetime runs.
        let now = state.ring.next_expiry().map_or(Duration::ZERO, |_| clock::now());
        let identity = state.ring.find(blob, now).filter(|identity| policy::is_shown(identity, caller));
        identity.cloned().ok_or(Refusal::NoSuchKey)
    }

    /// Whether the vault still holds this very identity.
    fn check_same(&self, caller: &Caller, identity: &Arc<Identity>) -> Result<(), Refusal> {
        let held = self.find(caller, &identity.blob)?;
        if Arc::ptr_eq(identity, &held) { Ok(()) } else { Err(Refusal::NoSuchKey) }
    }

    /// Signs, after policy has agreed and whoever must be asked has. The one path for the use of a key.
    pub fn sign(self: &Arc<Self>, caller: &Arc<Caller>, signing: Signing<'_>) -> Answer<Result<Signature, Refusal>> {
        let identity = match self.find(caller, signing.blob) {
            Ok(identity) => identity,
            Err(refusal) => return Answer::Now(Err(refusal)),
        };
        let scheme = scheme_of(identity.key_type, signing.rsa_hash);
        if let PrivateKey::Soft(key) = &identity.key
            && identity.is_unconstrained()
            && key.is_fast()
        {
            return Answer::Now(key.sign(scheme, signing.data).map_err(Refusal::from));
        }
        // From here on a lock is noticed; one that came first is found by looking again.
        let locks = self.locks.subscribe();
        if let Err(refusal) = self.check_open() {
            return Answer::Now(Err(refusal));
        }
        let caller = if identity.is_unconstrained() { Arc::clone(caller) } else { identified(caller) };
        match policy::decide(&identity, &caller, signing.data, &self.settings().rules, unix_now()) {
            Ok(verdict) => Answer::Later(Box::pin(Arc::clone(self).sign_later(
                identity,
                caller,
                scheme,
                signing.data.to_vec(),
                verdict,
                locks,
            ))),
            Err(refusal) => Answer::Now(Err(refusal)),
        }
    }

    async fn sign_later(
        self: Arc<Self>,
        identity: Arc<Identity>,
        caller: Arc<Caller>,
        scheme: Scheme,
        data: Vec<u8>,
        verdict: policy::Verdict,
        mut locks: watch::Receiver<u64>,
    ) -> Result<Signature, Refusal> {
        let human = verdict.confirm.is_some() || matches!(identity.key, PrivateKey::Sk(_));
        let patience = if human { self.settings().person_deadline } else { SIGN_DEADLINE };
        let deadline = Instant::now() + patience;
        let work = async {
            let identity = match &verdict.confirm {
                Some(question) => {
                    // Not held while a person thinks: a key that is removed meanwhile is wiped at once.
                    let asked_for = Arc::downgrade(&identity);
                    drop(identity);
                    self.prompter.confirm(caller.uid, question).await?;
                    let identity = asked_for.upgrade().ok_or(Refusal::NoSuchKey)?;
                    // Nor is one used that was replaced, perhaps under other constraints, or that has expired.
                    self.check_same(&caller, &identity)?;
                    identity
                }
                None => identity,
            };
            match &identity.key {
                PrivateKey::Soft(key) => {
                    let key = Arc::clone(key);
                    Ok(self.compute.run(caller.connection, move || key.sign(scheme, &data)).await?)
                }
                PrivateKey::Sk(key) => self.sign_sk(&identity, key, &caller, &data, deadline).await,
            }
        };
        tokio::select! {
            result = timeout_at(deadline, work) => result.unwrap_or(Err(Refusal::Timeout)),
            _ = locks.changed() => Err(Refusal::Locked),
        }
    }

    /// Signs with an authenticator: a notice while it waits for a touch, a PIN when it asks for one, once.
    async fn sign_sk(
        &self,
        identity: &Arc<Identity>,
        key: &SkKey,
        caller: &Caller,
        data: &[u8],
        deadline: Instant,
    ) -> Result<Signature, Refusal> {
        let rules = &self.settings().rules;
        let notice = || {
            key.wants_touch()
                .then(|| self.prompter.notice(caller.uid, &policy::touch_notice(identity, caller, data, rules)))
                .flatten()
        };
        let shown = notice();
        match key.sign(data, None, deadline).await {
            Err(DeviceError::PinRequired) => {
                drop(shown);
                let question = policy::pin_question(identity, caller, rules, key.wants_touch());
                let pin = self.prompter.pin(caller.uid, &question).await?;
                self.check_same(caller, identity)?;
                let _shown = notice();
                Ok(key.sign(data, Some(&pin), deadline).await?)
            }
            result => Ok(result?),
        }
    }

    /// What this caller may see, in the order of addition. A locked vault shows nothing.
    pub fn list(&self, caller: &Caller) -> Arc<Listing> {
        let expired = self.read().ring.next_expiry().is_some_and(|at| at <= clock::now());
        if expired {
            log_expired(&self.write().ring.expire(clock::now()));
        }
        let state = self.read();
        if !matches!(state.seal, Seal::Open) {
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
        let identity = Arc::new(Identity {
            key_type: candidate.key_type,
            key,
            comment: candidate.comment,
            constraints: key::Constraints {
                expires: lifetime.map(|lifetime| clock::now() + lifetime),
                confirm: candidate.confirm,
                destinations: candidate.destinations,
            },
            blob: candidate.blob.into_boxed_slice(),
        });
        let route = Route::new(caller, unix_now());
        self.change(|ring| {
            if let Some(old) = ring.find(&identity.blob, Duration::ZERO)
                && !policy::may_change(old, &route)
            {
                return Err(Refusal::NotPermitted("this connection may not change it"));
            }
            ring.insert(Arc::clone(&identity)).map_err(|Full| Refusal::Full)
        })?;
        self.lifetimes.notify_one();
        info!(key = %identity.name(), "added");
        Ok(())
    }

    /// Whether a soft key may be added at all now: asked before its parts are parsed.
    pub fn check_open(&self) -> Result<(), Refusal> {
        match self.read().seal {
            Seal::Open => Ok(()),
            _ => Err(Refusal::Locked),
        }
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

    /// Removes one identity.
    pub fn remove(&self, caller: &Caller, blob: &[u8]) -> Result<(), Refusal> {
        let route = Route::new(caller, unix_now());
        let removed = self.change(|ring| {
            let identity = ring.find(blob, Duration::ZERO).ok_or(Refusal::NoSuchKey)?;
            if !policy::may_change(identity, &route) {
                return Err(Refusal::NoSuchKey);
            }
            ring.remove(blob).ok_or(Refusal::NoSuchKey)
        })?;
        info!(key = %removed.name(), "removed");
        Ok(())
    }

    /// Removes all identities that the caller's door shows, whatever their constraints.
    pub fn remove_all(&self, caller: &Caller) -> Result<(), Refusal> {
        let count = self.change(|ring| Ok(ring.remove_where(|identity| policy::is_shown(identity, caller))))?;
        info!(count, "removed all keys");
        Ok(())
    }

    /// Removes all identities even while locked: what SIGUSR1 asks for.
    pub fn wipe(&self) {
        let count = self.write().ring.clear();
        if count > 0 {
            info!(count, "removed all keys");
        }
    }

    /// Locks: from the first moment nothing is signed and open prompts close; when it returns, no plaintext key is in
    /// memory.
    pub async fn lock(self: Arc<Self>, caller: Arc<Caller>, password: Zeroizing<Vec<u8>>) -> Result<(), Refusal> {
        if !policy::may_lock(&caller) {
            return Err(Refusal::NotForForwarded);
        }
        if password.is_empty() {
            return Err(Refusal::EmptyPassword);
        }
        {
            let mut state = self.write();
            if !matches!(state.seal, Seal::Open) {
                return Err(Refusal::Locked);
            }
            state.seal = Seal::Changing;
        }
        self.locks.send_modify(|count| *count += 1);
        // A task of its own: a caller that hangs up does not leave the vault half locked.
        let vault = Arc::clone(&self);
        let done = on_thread(move || {
            let sealed = Lock::new(&password).and_then(|(lock, key)| self.seal_all(key).map(|()| lock));
            let mut state = self.write();
            match sealed {
                Ok(lock) => {
                    state.seal = Seal::Sealed(Arc::new(lock));
                    state.failures = 0;
                    info!("locked");
                    Ok(())
                }
                Err(e) => {
                    // What is sealed already cannot be opened again: it is removed rather than kept for nothing.
                    warn!("locking failed, all keys are removed: {e}");
                    state.ring.clear();
                    state.seal = Seal::Open;
                    Err(Refusal::from(e))
                }
            }
        });
        done.await.unwrap_or_else(|| Err(vault.give_up()))
    }

    /// After a lock or unlock that died half-way: which keys are sealed under what is not known any more.
    fn give_up(&self) -> Refusal {
        let mut state = self.write();
        state.ring.clear();
        state.seal = Seal::Open;
        error!("a lock or unlock died half-way; all keys are removed");
        Refusal::Device(DeviceError::Failed("the lock died half-way; add the keys again".into()))
    }

    fn identities(&self) -> Vec<Arc<Identity>> {
        self.read().ring.iter().cloned().collect()
    }

    fn seal_all(&self, mut key: SealKey) -> Result<(), DeviceError> {
        let mut seal = |secret: &[u8]| key.seal(secret);
        for identity in self.identities() {
            match &identity.key {
                PrivateKey::Soft(soft) => soft.seal(&mut seal)?,
                PrivateKey::Sk(sk) => sk.seal(&mut seal)?,
            }
        }
        Ok(())
    }

    /// Unlocks. Attempts take turns, and a wrong one makes itself and the next wait; nothing else does.
    pub async fn unlock(self: Arc<Self>, caller: Arc<Caller>, password: Zeroizing<Vec<u8>>) -> Result<(), Refusal> {
        if !policy::may_lock(&caller) {
            return Err(Refusal::NotForForwarded);
        }
        let turn = timeout_at(Instant::now() + UNLOCK_PATIENCE, Arc::clone(&self.unlock_turn).acquire_owned());
        let turn = turn.await.map_err(|_| Refusal::Timeout)?.map_err(|_| Refusal::Locked)?;
        // The delay is the vault's, not the caller's, and the turn ends with the attempt: hanging up shortens neither.
        let next_unlock = self.read().next_unlock;
        if let Some(at) = next_unlock {
            sleep_until(at).await;
        }
        let vault = Arc::clone(&self);
        let opened = on_thread(move || {
            let result = vault.try_unlock(&password);
            drop(turn);
            result
        });
        match opened.await.unwrap_or_else(|| Err(self.give_up())) {
            Err(Refusal::WrongPassword) => {
                let at = self.read().next_unlock;
                if let Some(at) = at {
                    sleep_until(at).await;
                }
                Err(Refusal::WrongPassword)
            }
            result => result,
        }
    }

    fn try_unlock(&self, password: &[u8]) -> Result<(), Refusal> {
        let lock = match &self.read().seal {
            Seal::Sealed(lock) => Arc::clone(lock),
            _ => return Err(Refusal::NotLocked),
        };
        let Some(key) = lock.open(password)? else {
            let mut state = self.write();
            state.failures = state.failures.saturating_add(1);
            let delay = UNLOCK_DELAY.saturating_mul(state.failures).min(UNLOCK_DELAY_MAX);
            state.next_unlock = Some(Instant::now() + delay);
            warn!(failures = state.failures, "a wrong unlock password");
            return Err(Refusal::WrongPassword);
        };
        self.write().seal = Seal::Changing;
        for identity in self.identities() {
            let mut open = |sealed: &[u8]| key.open(sealed);
            let opened = match &identity.key {
                PrivateKey::Soft(soft) => soft.unseal(&mut open),
                PrivateKey::Sk(sk) => sk.unseal(&mut open),
            };
            if let Err(e) = opened {
                warn!(key = %identity.name(), "the key did not survive the lock and is removed: {e}");
                self.write().ring.remove(&identity.blob);
            }
        }
        let mut state = self.write();
        state.seal = Seal::Open;
        state.failures = 0;
        state.next_unlock = None;
        info!("unlocked");
        Ok(())
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

/// Runs `work` on a thread of its own, which no other work can keep waiting and which ends by itself even when nobody
/// waits for it any more. `None` when it died, or could not start.
fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = Option<T>> {
    let (sender, receiver) = oneshot::channel();
    let started = thread::Builder::new().name("lock".into()).spawn(move || drop(sender.send(work())));
    async move { if started.is_ok() { receiver.await.ok() } else { None } }
}

/// The caller with its program's name, for a question to a person.
fn identified(caller: &Arc<Caller>) -> Arc<Caller> {
    match (&caller.program, caller.pid) {
        (None, Some(pid)) => Arc::new(Caller { program: peer::program(pid), ..Caller::clone(caller) }),
        _ => Arc::clone(caller),
    }
}

fn scheme_of(key_type: KeyType, rsa_hash: Hash) -> Scheme {
    match key_type {
        KeyType::Ed25519 => Scheme::Ed25519,
        KeyType::Ecdsa(curve) => Scheme::Ecdsa(curve_hash(curve)),
        KeyType::Rsa => Scheme::RsaPkcs1v15(rsa_hash),
        KeyType::MlDsa44Ed25519 => Scheme::MlDsa44Ed25519,
        KeyType::SkEd25519 | KeyType::SkEcdsa => Scheme::Sk,
    }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn vault() -> Arc<Vault> {
        Vault::new(Settings::default(), Prompter::new(crate::prompt::Settings::default()))
    }

    fn password(text: &str) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(text.into())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_hangs_up_gets_no_second_try_beside_the_first() {
        let (vault, caller) = (vault(), Arc::new(Caller::default()));
        Arc::clone(&vault).lock(Arc::clone(&caller), password("right")).await.unwrap();
        let attempt = tokio::spawn(Arc::clone(&vault).unlock(Arc::clone(&caller), password("wrong")));
        while vault.unlock_turn.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        attempt.abort();
        // The turn comes when the attempt is over and counted, not when its caller has gone.
        let turn = vault.unlock_turn.acquire().await.unwrap();
        assert_eq!(vault.read().failures, 1);
        assert!(vault.read().next_unlock.is_some());
        drop(turn);
        assert_eq!(Arc::clone(&vault).unlock(caller, password("right")).await, Ok(()));
    }
}
