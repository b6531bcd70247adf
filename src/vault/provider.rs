//! Provider libraries: which may be loaded for whom, and the keys of PKCS#11 modules that `ssh-add -s` adds and `ssh-add -e` removes (RFC 9987, section 3.2.6, and OpenSSH's
//! PROTOCOL.agent). Knows modules, their tokens and logins; not what is on the wire.
//!
//! Each token gets a device of its own, in a process of its own, which ends with the last of its keys. One PIN comes with
//! a module. It is sent once to each token that wants one, and to none whose serial has refused it: `pins` sees to that,
//! across restarts as well.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tracing::{debug, info, warn};

use super::{
    State, Vault,
    key::{Caller, Constraints, Destination, Grants, Place, PrivateKey},
    keyring::{Full, Keyring},
    policy::{self, Refusal},
    registry::{Member, Origin, comment},
};
use crate::{
    devices::{
        self, Device, DeviceError, Driver, FoundKey, Health, Scan,
        host::{Host, HostEngine, HostSettings},
        pkcs11::{self, Module, Pkcs11, Token, TokenUri},
    },
    public_key::{Blob, KeyType},
    reactor::Registry,
    sys::clock,
};

/// The kind of device that is a card.
const CARD: &str = "openpgp";
/// How long the file system may take to resolve a path.
const PATH_PATIENCE: Duration = Duration::from_secs(5);
/// Modules that are being added at once; one more is refused.
const MAX_ADDING: usize = 16;
/// Devices that came so: each has a process.
const MAX_LOADED: usize = 64;
/// A module's file name in the names of its devices, in bytes.
const MAX_FILE_NAME: usize = 200;

/// What `ssh-add -s` asks for.
pub struct NewProvider {
    /// The module's path, as it was given.
    pub path: String,
    /// For every token that wants one; empty when there is none.
    pub pin: SecretString,
    /// Seconds to live, for every key; `None` for the default.
    pub lifetime: Option<u32>,
    /// Ask before each use of any of the keys.
    pub confirm: bool,
    /// Where the keys may be used.
    pub destinations: Box<[Destination]>,
    /// Certificates for keys on the tokens.
    pub certificates: Vec<Box<[u8]>>,
    /// Whether keys are added with these certificates only.
    pub certificates_only: bool,
}

impl NewProvider {
    /// Whether it asks for what the keys of a configured device cannot get by it.
    fn is_conditional(&self) -> bool {
        self.lifetime.is_some() || self.confirm || !self.destinations.is_empty() || !self.certificates.is_empty()
    }

    /// The certificates with their keys. One that is none, or is not what its authority signed, refuses all.
    fn certificates(&self) -> Result<Vec<Certified<'_>>, Refusal> {
        let mut certificates = Vec::with_capacity(self.certificates.len());
        for blob in &self.certificates {
            match Blob::parse(blob) {
                Ok(Blob::Certificate(certificate)) if certificate.verify().is_ok() => {
                    certificates.push(Certified { key: certificate.key.to_blob(), blob });
                }
                _ => return Err(Refusal::Constraint("associated-certs")),
            }
        }
        Ok(certificates)
    }
}

/// A certificate, and the blob of the key that it is for.
struct Certified<'a> {
    key: Vec<u8>,
    blob: &'a [u8],
}

/// The modules that are being added.
pub(super) struct Providers {
    room: Arc<Semaphore>,
    /// One at a time for each module, or the same token would be opened twice.
    turns: Mutex<BTreeMap<String, Arc<Semaphore>>>,
    /// Devices that have been made.
    made: AtomicU64,
}

impl Default for Providers {
    fn default() -> Self {
        let room = Arc::new(Semaphore::new(MAX_ADDING));
        Self { room, turns: Mutex::default(), made: AtomicU64::new(0) }
    }
}

impl Providers {
    async fn turn(&self, module: &str, deadline: Instant) -> Result<[OwnedSemaphorePermit; 2], Refusal> {
        let busy = |_| Refusal::from(DeviceError::Busy);
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(busy)?;
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody waits for these or has them.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(module.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        let turn = timeout_at(deadline, turn.acquire_owned()).await.map_err(|_| Refusal::Timeout)?;
        turn.map(|turn| [room, turn]).map_err(|_| Refusal::Timeout)
    }

    /// For a new device. None of the configuration has a colon in its name.
    fn device_name(&self, module: &str) -> String {
        format!("{}:{}", file_name(module), self.made.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// A token of the module, and who is to speak with it.
struct Candidate {
    token: Token,
    uri: TokenUri,
    reached: Reached,
}

enum Reached {
    /// By a device that was made for it and is not in the vault.
    New(Device),
    /// By one that came with an earlier `ssh-add -s`.
    Loaded(Device),
    /// By one of the configuration.
    Configured(Device),
}

impl Candidate {
    fn device(&self) -> &Device {
        match &self.reached {
            Reached::New(device) | Reached::Loaded(device) | Reached::Configured(device) => device,
        }
    }

    fn refusal(&self, refusal: Refusal) -> Refusal {
        Refusal::At(format!("token `{}`", policy::harmless(self.token.label.as_bytes())), Box::new(refusal))
    }
}

impl Vault {
    /// Whether a provider library may be loaded for this caller; returns its real path.
    pub async fn approve_provider(&self, caller: &Caller, provider: &str) -> Result<String, Refusal> {
        self.check_remote_provider(caller)?;
        let real = real_path(provider).await?;
        let allowed = &self.settings().allowed_providers;
        if policy::provider_allowed(&real, allowed) {
            return Ok(real);
        }
        Err(Refusal::Provider(format!(
            "{}: not among the allowed paths ({allowed}); `ssh-agent -P` or `allowed_providers` names others",
            policy::harmless(provider.as_bytes())
        )))
    }

    /// Whether the caller may name provider libraries at all.
    pub fn check_remote_provider(&self, caller: &Caller) -> Result<(), Refusal> {
        self.check_open()?;
        if caller.bind_attempted && !self.settings().allow_remote_providers {
            return Err(Refusal::NotForForwarded);
        }
        Ok(())
    }

    /// Adds the keys of a module's tokens, and says whether there was anything to add: a new key or certificate, or a
    /// login to a device of the configuration. What a device of the configuration holds stays there, under its own
    /// conditions; it is not opened twice.
    ///
    /// Whatever the module does, this ends within [`Settings::provider_patience`](super::Settings::provider_patience) and
    /// the time of a login. A caller that gives up does not undo it.
    pub async fn add_provider(self: &Arc<Self>, caller: Arc<Caller>, wanted: NewProvider) -> Result<(), Refusal> {
        if let Some(card) = self.card(&wanted.path) {
            return self.unlock_card(&card, &caller, wanted).await;
        }
        let deadline = Instant::now() + self.settings().provider_patience;
        let module = self.approve_provider(&caller, &wanted.path).await?;
        let vault = Arc::clone(self);
        // A task of its own: a caller that hangs up leaves no PIN half tried and no device that nobody ends.
        let added = tokio::spawn(async move { vault.load(&caller, wanted, &module, deadline).await });
        added.await.unwrap_or(Err(Refusal::Timeout))
    }

    /// The card of this manufacturer and serial, `0006:12345678`: as clients of openpgp-card-ssh-agent name it.
    fn card(&self, name: &str) -> Option<Device> {
        let is_it = |device: &Device| {
            let state = device.state();
            device.kind() == CARD
                && state.status.as_ref().is_some_and(|status| status.serial.eq_ignore_ascii_case(name))
        };
        self.devices().into_iter().find(is_it)
    }

    /// Logs in to a card. Its keys are here already, under its own conditions.
    async fn unlock_card(
        self: &Arc<Self>,
        card: &Device,
        caller: &Arc<Caller>,
        wanted: NewProvider,
    ) -> Result<(), Refusal> {
        self.check_remote_provider(caller)?;
        if !policy::may_lock(caller) {
            return Err(Refusal::NotForForwarded);
        }
        if wanted.is_conditional() {
            return Err(Refusal::Constraint("lifetime, confirm, destination or certificate"));
        }
        self.log_in_once(caller, &wanted, card, &mut None).await
    }

    async fn load(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        wanted: NewProvider,
        module: &str,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        wanted.certificates()?;
        let _turn = self.providers.turn(module, deadline).await?;
        let (groups, mut refused) = self.tokens_of(module, deadline).await?;
        let (wanted, mut ready) = (Arc::new(wanted), JoinSet::new());
        for group in groups.into_values() {
            let (vault, caller, wanted) = (Arc::clone(self), Arc::clone(caller), Arc::clone(&wanted));
            ready.spawn(async move { vault.get_ready(&caller, &wanted, group, deadline).await });
        }
        let mut outcomes: Vec<_> = ready.join_all().await.into_iter().flatten().collect();
        // As the slots are, so that a listing is the same each time.
        outcomes.sort_by_key(|(candidate, _)| candidate.token.slot_id);
        let mut added = 0;
        for (candidate, outcome) in outcomes {
            let outcome = outcome.and_then(|scan| match scan {
                Some(scan) => self.take_in(&wanted, module, &candidate, &scan),
                None => Ok(1),
            });
            match outcome {
                Ok(new) => added += new,
                Err(refusal) => {
                    refused = candidate.refusal(refusal);
                    warn!(module, "not added: {refused}");
                }
            }
            self.end_if_new(&candidate);
        }
        if added == 0 {
            return Err(refused);
        }
        info!(module, added, "added the provider's keys");
        self.lifetimes.notify_one();
        Ok(())
    }

    /// The tokens of a module, by serial, and why there is no other one.
    async fn tokens_of(
        &self,
        module: &str,
        deadline: Instant,
    ) -> Result<(BTreeMap<String, Vec<Candidate>>, Refusal), Refusal> {
        let of_module = |refusal| Refusal::At(module.to_owned(), Box::new(refusal));
        let nowhere = || of_module(Refusal::NothingNew("no device's process can be served here"));
        let reactor = self.reactor.as_ref().ok_or_else(nowhere)?;
        let mut settings = HostSettings::new(file_name(module));
        settings.open_timeout = deadline.saturating_duration_since(Instant::now());
        let tokens = pkcs11::tokens(&Module::new(module), settings).await.map_err(|e| of_module(e.into()))?;
        let configured = self.configured_at(module).await;
        let mut missing = of_module(Refusal::NothingNew("it has no token that is initialised"));
        let mut groups: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
        for token in tokens {
            match token {
                Ok(token) if token.initialized => {
                    let candidate = self.candidate_for(token, module, &configured, reactor);
                    groups.entry(candidate.token.serial.clone()).or_default().push(candidate);
                }
                Ok(_) => {}
                Err(bad) => {
                    let reason = format!("the token in slot {} cannot be used: {}", bad.slot_id, bad.reason);
                    warn!(module, "{reason}");
                    missing = of_module(DeviceError::Failed(reason).into());
                }
            }
        }
        Ok((groups, missing))
    }

    /// The devices of the configuration that are reached by this module, with what their tokens are like.
    async fn configured_at(&self, module: &str) -> Vec<(TokenUri, Device)> {
        let mut found: Vec<_> = {
            let state = self.read();
            let at = |member: &Member| match &member.origin {
                Origin::Configured(terms) => terms.token.clone().map(|token| (token, member.device.clone())),
                Origin::Loaded(..) => None,
            };
            state.devices.iter().filter_map(at).collect()
        };
        let mut same: BTreeMap<PathBuf, bool> = BTreeMap::new();
        for ((path, _), _) in &found {
            if !same.contains_key(path) {
                let real = timeout(PATH_PATIENCE, tokio::fs::canonicalize(path)).await;
                same.insert(path.clone(), real.is_ok_and(|real| real.is_ok_and(|real| real == Path::new(module))));
            }
        }
        found.retain(|((path, _), _)| same.get(path) == Some(&true));
        found.into_iter().map(|((_, uri), device)| (uri, device)).collect()
    }

    /// Who speaks with this token: whoever does already, or a new device.
    fn candidate_for(
        &self,
        token: Token,
        module: &str,
        configured: &[(TokenUri, Device)],
        reactor: &Registry,
    ) -> Candidate {
        let uri = TokenUri::of(&token);
        if let Some((_, device)) = configured.iter().find(|(its, _)| its.matches(&token)) {
            return Candidate { reached: Reached::Configured(device.clone()), token, uri };
        }
        let here = |member: &&Member| match &member.origin {
            Origin::Loaded(path, its) => **path == *module && *its == uri,
            Origin::Configured(_) => false,
        };
        let loaded = self.read().devices.iter().find(here).map(|member| member.device.clone());
        if let Some(device) = loaded {
            return Candidate { token, uri, reached: Reached::Loaded(device) };
        }
        let config = pkcs11::Config {
            module: Module::new(module),
            token: uri.clone(),
            sessions: pkcs11::default_sessions(),
            pkcs1_decrypt: false,
        };
        let mut host = HostSettings::new(self.providers.device_name(module));
        let settings = devices::Settings::default();
        host.open_timeout = settings.open_timeout;
        let name = host.name.clone();
        let host = Host::new(Pkcs11::KIND, config.encode(), host);
        let engine = HostEngine { host, reactor: reactor.clone() };
        Candidate { token, uri, reached: Reached::New(Device::start(name, Pkcs11::KIND, settings, engine)) }
    }

    /// Opens tokens that share a serial one by one, and logs in where it takes that. After one that did not take the PIN
    /// the others are not asked: their tries may be the same ones. What there is, or `None` of a configured device.
    async fn get_ready(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        wanted: &NewProvider,
        group: Vec<Candidate>,
        deadline: Instant,
    ) -> Vec<(Candidate, Result<Option<Arc<Scan>>, Refusal>)> {
        let mut outcomes = Vec::new();
        let mut refused = None;
        for candidate in group {
            let outcome = match (&candidate.reached, &refused) {
                (_, Some(refusal)) => Err(Refusal::clone(refusal)),
                (Reached::Configured(device), None) => {
                    self.log_in_to_configured(caller, wanted, device, &mut refused).await.map(|()| None)
                }
                (Reached::New(device) | Reached::Loaded(device), None) => {
                    self.open(caller, wanted, device, deadline, &mut refused).await.map(Some)
                }
            };
            outcomes.push((candidate, outcome));
        }
        outcomes
    }

    /// A device of the configuration keeps its keys under its own conditions: there is only a PIN to give it.
    async fn log_in_to_configured(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        wanted: &NewProvider,
        device: &Device,
        refused: &mut Option<Refusal>,
    ) -> Result<(), Refusal> {
        if wanted.is_conditional() {
            return Err(Refusal::Configured(device.name().to_owned()));
        }
        if !policy::may_lock(caller) {
            return Err(Refusal::NotForForwarded);
        }
        if !device.is_locked() || wanted.pin.expose_secret().is_empty() {
            return Err(Refusal::NothingNew("it is a device of the configuration, and its keys are here"));
        }
        self.log_in_once(caller, wanted, device, refused).await
    }

    async fn open(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        wanted: &NewProvider,
        device: &Device,
        deadline: Instant,
        refused: &mut Option<Refusal>,
    ) -> Result<Arc<Scan>, Refusal> {
        let mut states = device.watch();
        let opened =
            states.wait_for(|state| matches!(state.health, Health::Ready | Health::Absent | Health::Failed(_)));
        let state = timeout_at(deadline, opened).await.map_err(|_| Refusal::Timeout)?;
        let state = Arc::clone(&*state.map_err(|_| DeviceError::Gone)?);
        let scan = match (&state.health, &state.scan) {
            (Health::Failed(why), _) => return Err(DeviceError::Failed(why.clone()).into()),
            (Health::Absent, _) | (_, None) => return Err(DeviceError::Absent.into()),
            (_, Some(scan)) => Arc::clone(scan),
        };
        let locked = state.status.as_ref().is_some_and(|status| status.locked);
        // Without a PIN there are the keys that show all the same; whoever uses one is asked for it.
        if !locked || wanted.pin.expose_secret().is_empty() {
            return Ok(scan);
        }
        self.log_in_once(caller, wanted, device, refused).await?;
        // The login has had its own time.
        let until = deadline.max(Instant::now() + device.settings().timeout);
        Ok(timeout_at(until, device.scan()).await.map_err(|_| Refusal::Timeout)??)
    }

    /// Tries the PIN once.
    async fn log_in_once(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        wanted: &NewProvider,
        device: &Device,
        refused: &mut Option<Refusal>,
    ) -> Result<(), Refusal> {
        // Nobody has been told that it is the last.
        let last = device.state().status.as_ref().is_some_and(|status| status.tries_left == Some(1));
        let result = match last {
            true => Err(Refusal::LastTry(device.name().to_owned())),
            false => self.unlock_knowing(device, caller, wanted.pin.clone(), false).await,
        };
        result.inspect_err(|refusal| *refused = Some(refusal.clone()))
    }

    /// Puts what is new on a token into the keyring, and its device into the vault; returns how much that was.
    fn take_in(
        self: &Arc<Self>,
        wanted: &NewProvider,
        module: &str,
        candidate: &Candidate,
        scan: &Scan,
    ) -> Result<usize, Refusal> {
        let lifetime = wanted.lifetime.map(|s| Duration::from_secs(s.into()));
        let lifetime = lifetime.or(self.settings().default_lifetime);
        let constraints = Constraints {
            expires: lifetime.map(|lifetime| clock::now() + lifetime),
            confirm: wanted.confirm,
            destinations: wanted.destinations.clone(),
            ..Constraints::default()
        };
        let device = candidate.device();
        let mut state = self.write();
        state.check_open()?;
        let rank = match state.devices.iter().find(|member| member.device.is(device)) {
            Some(member) => member.rank,
            None if state.devices.iter().filter(|member| member.is_loaded()).count() >= MAX_LOADED => {
                return Err(Refusal::Full);
            }
            None => {
                let origin = Origin::Loaded(module.into(), candidate.uri.clone());
                self.insert(&mut state, device, origin).map_err(|_| Refusal::Full)?
            }
        };
        let place = |key: &Arc<FoundKey>| Place {
            key: PrivateKey::OnDevice(device.clone(), Arc::clone(key)),
            comment: Some(comment(key)).filter(|label| !label.is_empty()).unwrap_or_else(|| module.as_bytes().into()),
            constraints: constraints.clone(),
            grants: Grants::NONE,
            rank,
            added: true,
            name: "".into(),
        };
        let mut added = 0;
        let certificates = wanted.certificates()?;
        for key in scan.keys.iter().filter(|key| key.ssh && key.key_type().is_some_and(KeyType::is_ssh)) {
            let key = Arc::new(key.clone());
            let with_it =
                certificates.iter().filter(|certified| *certified.key == *key.blob).map(|certified| certified.blob);
            let itself = std::iter::once(&key.blob).chain(&key.certificates).map(|blob| &**blob);
            let itself = itself.filter(|_| !wanted.certificates_only);
            for blob in with_it.chain(itself) {
                match put_new(&mut state.ring, blob, || place(&key)) {
                    Ok(new) => added += usize::from(new),
                    Err(Full) if added == 0 => return Err(Refusal::Full),
                    Err(Full) => warn!(device = device.name(), "a key is left out: the vault is full"),
                }
            }
        }
        if added > 0 {
            return Ok(added);
        }
        Err(Refusal::NothingNew("it has no key that is not here already, or that a certificate belongs to"))
    }

    /// A device that was made and is not in the vault has nothing to live for.
    fn end_if_new(&self, candidate: &Candidate) {
        let Reached::New(device) = &candidate.reached else { return };
        self.end_unused();
        if !self.devices().iter().any(|member| member.is(device)) {
            debug!(device = device.name(), "ended: it has no keys here");
            device.begin_end(DeviceError::Gone);
            self.drop_pins_of(device);
        }
    }

    /// Removes the keys that a module brought. A device of the configuration that is reached by it keeps its keys and
    /// forgets its PIN. A module that was never added is as good as removed.
    pub async fn remove_provider(&self, caller: &Caller, provider: &str) -> Result<(), Refusal> {
        self.check_remote_provider(caller)?;
        if let Some(card) = self.card(provider) {
            return if policy::may_lock(caller) {
                self.lock_device(&card).await
            } else {
                Err(Refusal::NotForForwarded)
            };
        }
        let module = real_path(provider).await?;
        let count = {
            let mut state = self.write();
            state.check_open()?;
            let State { ring, devices, .. } = &mut *state;
            let brought = |member: &&Member| matches!(&member.origin, Origin::Loaded(path, _) if **path == *module);
            let devices: BTreeSet<&str> = devices.iter().filter(brought).map(|member| member.device.name()).collect();
            let here = |place: &Place| place.key.device().is_some_and(|device| devices.contains(device));
            ring.remove_places(|identity, place| here(place) && policy::is_shown(identity, caller))
        };
        info!(module, count, "removed the provider's keys");
        self.end_unused();
        if policy::may_lock(caller) {
            for (_, device) in self.configured_at(&module).await {
                // One that is away has no PIN to forget.
                let _ = self.lock_device(&device).await;
            }
        }
        Ok(())
    }
}

/// What a module's processes are called.
fn file_name(module: &str) -> String {
    let file = policy::harmless(module.rsplit('/').next().unwrap_or_default().as_bytes());
    file[..file.floor_char_boundary(MAX_FILE_NAME)].to_owned()
}

/// The path without symbolic links. The file system may hang where it leads, so that is looked at elsewhere and not for
/// long.
async fn real_path(provider: &str) -> Result<String, Refusal> {
    let refused =
        |why: &dyn std::fmt::Display| Refusal::Provider(format!("{}: {why}", policy::harmless(provider.as_bytes())));
    let real = match timeout(PATH_PATIENCE, tokio::fs::canonicalize(provider)).await {
        Ok(real) => real.map_err(|e| refused(&e))?,
        Err(_) => return Err(refused(&"the file system does not answer")),
    };
    real.into_os_string().into_string().map_err(|_| refused(&"its path is not UTF-8"))
}

/// Adds an identity that is not there; whether it was not.
fn put_new(ring: &mut Keyring, blob: &[u8], place: impl FnOnce() -> Place) -> Result<bool, Full> {
    if ring.find(blob).is_some() {
        return Ok(false);
    }
    let Ok(parsed) = Blob::parse(blob) else { return Ok(false) };
    ring.put(blob, parsed.key().key_type(), place()).map(|()| true)
}
