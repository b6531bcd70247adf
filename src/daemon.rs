//! Builds the vault, listens, and serves until a signal: what `strongroom agent` and the drop-in have in common.

#[cfg(feature = "openpgp")]
mod cards;
#[cfg(not(feature = "openpgp"))]
#[path = "daemon/no_cards.rs"]
mod cards;
mod devices;
mod logind;
mod server;
mod sockets;

use std::collections::BTreeSet;
use std::future::pending;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};
use tracing::level_filters::LevelFilter;
use tracing::{error, info, warn};

pub use self::sockets::SocketError;

use self::cards::Cards;
use self::logind::LockOn;
use self::server::Server;
use self::sockets::{Socket, Source};
use crate::agent::door::Door;
use crate::config::{AuditConfig, Config, PromptConfig};
use crate::log::{self, Log, Target};
use crate::prompt;
use crate::public_key::FingerprintHash;
use crate::sys::process;
use crate::vault::{
    self,
    audit::{self, Audit, AuditError, OnFull},
    policy::Rules,
    store::{Opened, Store, StoreError},
    stored::{AutoLock, STORE},
};

/// What keys may do, by the drop-in's command line.
pub struct AgentOptions {
    /// The lifetime of keys that come with none (`-t`).
    pub default_lifetime: Option<Duration>,
    /// The hash of fingerprints in prompts (`-E`).
    pub fingerprint_hash: FingerprintHash,
    /// The provider libraries that may be loaded (`-P`).
    pub allowed_providers: String,
    /// Whether a forwarded connection may load a PKCS#11 provider (`-O allow-remote-pkcs11`).
    pub allow_remote_pkcs11: bool,
    /// Whether FIDO keys of web origins sign ssh's own messages only (off by `-O no-restrict-websafe`).
    pub restrict_websafe: bool,
    /// The FIDO applications that are free of that (`-O websafe-allow`).
    pub websafe_allow: Option<String>,
}

/// How a drop-in agent stands to who started it.
pub struct Foreground {
    /// A person started it in the foreground: SIGINT ends it, and its log is on standard error.
    pub interactive: bool,
    /// Its log tells everything.
    pub debug: bool,
    /// The process with which it ends.
    pub parent: Option<i32>,
}

/// Why an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// SIGTERM.
    Terminated,
    /// SIGHUP.
    HungUp,
    /// SIGINT.
    Interrupted,
    /// The process that it was to end with is gone.
    ParentGone,
}

/// Why `strongroom agent` does not serve. The messages say what to do.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The process cannot be shielded from others of the same user.
    #[error("cannot protect the process from being read by others: {0}; allow prctl and setrlimit in its sandbox")]
    Harden(#[source] io::Error),
    /// A socket cannot be served.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The state cannot be read or kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The audit log cannot be kept, and nothing may be done without it.
    #[error(
        "the audit log needs a state directory, and `on_full = \"refuse\"` in [audit] wants it; name one with --state that \
         no other strongroom uses"
    )]
    NoStateForAudit,
    /// The audit log cannot be begun.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// There is no directory for the state.
    #[error("the devices need a place for their state; set HOME, or name a directory with --state")]
    NoStateDirectory,
    /// Threads, descriptors or memory are missing.
    #[error("cannot start: {0}; look at the limits on processes and open files (ulimit -u, ulimit -n)")]
    Start(#[source] io::Error),
}

/// Serves `listener` as ssh-agent does, until told to end. `ready` is called when signals are handled and connections
/// accepted; if it fails, so does this.
pub fn serve_ssh_agent(
    listener: UnixListener,
    options: AgentOptions,
    foreground: Foreground,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<Ended> {
    process::deny_core_files()?;
    let target = if foreground.interactive { Target::Stderr } else { Target::Syslog };
    // As quiet as ssh-agent, which without -d logs what went wrong and nothing else.
    let _log = Log::start(target, if foreground.debug { LevelFilter::DEBUG } else { LevelFilter::WARN });
    let store = Store::in_memory().map_err(io::Error::other)?;
    let server = Server::new(options.into(), prompt::Settings::default(), store, Audit::off())?;
    let (_door, door) = watch::channel(Arc::new(Door::ssh_agent()));
    let mut signals = {
        let _runtime = server.runtime().enter();
        Signals::new()?
    };
    server.listen(listener, door)?;
    server.warm_up();
    ready()?;
    let parent_gone = async {
        match foreground.parent {
            Some(pid) => process::parent_gone(pid).await,
            None => pending().await,
        }
    };
    let ended = server.runtime().block_on(async {
        tokio::pin!(parent_gone);
        loop {
            tokio::select! {
                gone = &mut parent_gone => return gone.map(|()| Ended::ParentGone),
                told = signals.next() => match told {
                    Told::Terminate => return Ok(Ended::Terminated),
                    Told::HangUp => return Ok(Ended::HungUp),
                    Told::Interrupt if foreground.interactive => return Ok(Ended::Interrupted),
                    Told::Interrupt => {}
                    Told::Wipe => server.vault().wipe(),
                    // It has no store.
                    Told::LockStore => {}
                },
            }
        }
    });
    server.end();
    ended
}

/// Serves the doors of `config`, or the sockets that systemd passed, until SIGTERM or SIGINT. For the start of the
/// program: it takes over descriptors.
pub fn run_agent(config: Config) -> Result<(), DaemonError> {
    process::harden().map_err(DaemonError::Harden)?;
    process::deny_core_files().map_err(DaemonError::Harden)?;
    let sockets = sockets::all(&config)?;
    let log = Log::start(Target::Stderr, log::level(&config.log.level));
    let mut opened = open_store(&config)?;
    let audit = start_audit(&config, opened.audit_head.take(), &opened.store)?;
    let agent = Agent::start(config, sockets, log, opened, audit).map_err(DaemonError::Start)?;
    agent.run();
    Ok(())
}

/// What the devices left behind when they were last seen, and what `ssh-add -s` did. Without devices the vault also runs
/// without: then nothing outlives it, and no device can be added until it is started again.
fn open_store(config: &Config) -> Result<Opened, DaemonError> {
    let without = |why: &dyn std::fmt::Display| {
        warn!("nothing is kept for the next start: {why}");
        Ok(Opened { store: Store::in_memory()?, devices: Vec::new(), keys: Vec::new(), audit_head: None })
    };
    match config.state.as_deref().map(Store::open) {
        None if config.devices.is_empty() => without(&DaemonError::NoStateDirectory),
        None => Err(DaemonError::NoStateDirectory),
        Some(Err(error @ (StoreError::Io { .. } | StoreError::InUse { .. }))) if config.devices.is_empty() => {
            without(&error)
        }
        Some(opened) => Ok(opened?),
    }
}

/// The audit log of the configuration. It needs the state, which knows how far it was written. Where keys may be used
/// without a log, the vault also runs without one; it has no stored keys where it has no state.
fn start_audit(config: &Config, head: Option<audit::Head>, store: &Store) -> Result<Audit, DaemonError> {
    let Some(settings) = audit_settings(config) else { return Ok(Audit::off()) };
    let must = settings.on_full == OnFull::Refuse;
    if !store.is_durable() {
        if must {
            return Err(DaemonError::NoStateForAudit);
        }
        warn!("nothing is written down of the use of keys, because nothing is kept for the next start");
        return Ok(Audit::off());
    }
    match Audit::start(&settings, head, store) {
        Err(error @ AuditError::Io { .. }) if !must => {
            let refused = if settings.on_full == OnFull::Warn { "" } else { ", and uses of stored keys are refused" };
            error!("nothing is written down of the use of keys until this is started again{refused}: {error}");
            Ok(Audit::broken(&settings))
        }
        started => Ok(started?),
    }
}

/// How the audit log is to be kept; `None` for not at all.
fn audit_settings(config: &Config) -> Option<audit::Settings> {
    let AuditConfig { enabled, path, max_size, on_full } = &config.audit;
    let directory = path.clone().or_else(|| Some(config.state.as_ref()?.join("audit")))?;
    enabled.then_some(audit::Settings { directory, max_size: *max_size, on_full: *on_full })
}

/// `strongroom agent` at work.
struct Agent {
    cards: Cards,
    server: Server,
    signals: Signals,
    doors: Vec<OpenDoor>,
    /// What locks the store when logind says so.
    logind: Option<AbortHandle>,
    config: Config,
    // Last, so that the end of everything else is logged.
    log: Log,
}

/// A socket that is served, and the settings of its door.
struct OpenDoor {
    door: watch::Sender<Arc<Door>>,
    listen: crate::config::Listen,
    /// Removes the socket's file in the end, where it is ours.
    source: Source,
}

impl Agent {
    fn start(config: Config, sockets: Vec<Socket>, log: Log, opened: Opened, audit: Audit) -> io::Result<Self> {
        let Opened { store, devices: known, keys, .. } = opened;
        let server = Server::new((&config).into(), (&config.prompt).into(), store, audit)?;
        server.vault().hold_stored(keys);
        let signals = {
            let _runtime = server.runtime().enter();
            Signals::new()?
        };
        let cards = Cards::new(server.vault(), server.registry());
        {
            let _runtime = server.runtime().enter();
            devices::add_all(server.vault(), server.registry(), &cards, &config.devices, &known);
            cards.find(&config, &known);
        }
        let mut doors = Vec::with_capacity(sockets.len());
        for Socket { listener, listen, source } in sockets {
            let (sender, door) = watch::channel(Arc::new(Door::new(&listen)));
            server.listen(listener, door)?;
            match source {
                Source::Passed => info!(door = ?listen.door, "listening on a socket of systemd"),
                Source::Opened(_) => info!(door = ?listen.door, path = %listen.path.display(), "listening"),
            }
            doors.push(OpenDoor { door: sender, listen, source });
        }
        server.warm_up();
        let vault = Arc::clone(server.vault());
        server.runtime().spawn(async move { vault.unlock_unattended().await });
        let logind = follow_logind(&server, &config);
        if let Some(every) = sd_notify::watchdog_enabled().filter(|every| !every.is_zero()) {
            let pulse = server.pulse()?;
            server.runtime().spawn(feed_watchdog(every / 2, pulse));
        }
        Ok(Self { cards, server, signals, doors, logind, config, log })
    }

    /// Serves until told to end.
    fn run(mut self) {
        tell_systemd(&[NotifyState::Ready]);
        let signal = loop {
            match self.server.runtime().block_on(self.signals.next()) {
                Told::Terminate => break "SIGTERM",
                Told::Interrupt => break "SIGINT",
                Told::HangUp => self.reload(),
                Told::LockStore => self.lock_store(),
                Told::Wipe => {
                    // It logs out of devices, which a task of its own does.
                    let _runtime = self.server.runtime().enter();
                    self.server.vault().wipe();
                }
            }
        };
        tell_systemd(&[NotifyState::Stopping]);
        info!(signal, "ending");
        // The files first: a client that finds no socket knows at once that nobody is there.
        self.doors.clear();
        self.server.end();
    }

    /// Locks the encrypted store, as SIGUSR2 asks.
    fn lock_store(&self) {
        let vault = self.server.vault();
        vault.audit().act("lock").device(STORE).end(Ok(())).ok();
        vault.lock_store();
    }

    /// Reads the configuration again. If it has an error, the old one stays in force as a whole.
    fn reload(&mut self) {
        let mut reloading = vec![NotifyState::Reloading];
        reloading.extend(NotifyState::monotonic_usec_now());
        tell_systemd(&reloading);
        match self.config.reload() {
            Ok(config) => self.put_in_force(config),
            Err(error) => {
                error!("the configuration was not reloaded, the old one stays in force: {error}. {}", error.remedy());
            }
        }
        tell_systemd(&[NotifyState::Ready]);
    }

    fn put_in_force(&mut self, mut config: Config) {
        self.log.set_level(log::level(&config.log.level));
        let mut settings = vault::Settings::from(&config);
        // As long as the prompts themselves keep their old settings, so does what waits for them.
        settings.person_deadline = self.server.vault().settings().person_deadline;
        self.server.vault().configure(settings);
        for open in &mut self.doors {
            open.put_in_force(&config);
        }
        if config.prompt != self.config.prompt {
            warn!("the settings of [prompt] changed; they take effect when the agent is started again");
        }
        if config.state != self.config.state {
            warn!("the directory of the state changed; it takes effect when the agent is started again");
        }
        if let Some(settings) = audit_settings(&config) {
            self.server.vault().audit().configure(&settings);
        }
        let place = |config: &Config| audit_settings(config).map(|settings| settings.directory);
        if place(&config) != place(&self.config) {
            warn!(
                "whether there is an audit log, or its directory, changed; it takes effect when the agent is started again"
            );
        }
        let opened = |door: &OpenDoor| matches!(door.source, Source::Opened(_));
        if self.doors.iter().any(opened) && paths(&config) != paths(&self.config) {
            warn!("the paths of [[listen]] changed; start the agent again to open and close sockets");
        }
        if lock_on(&config) != lock_on(&self.config) {
            if let Some(before) = self.logind.take() {
                before.abort();
            }
            self.logind = follow_logind(&self.server, &config);
        }
        self.change_devices(&mut config);
        self.config = config;
        info!("the configuration was reloaded");
    }
}

impl Agent {
    /// Starts the devices that are new, and ends those that are there no more.
    fn change_devices(&mut self, config: &mut Config) {
        let before = &self.config.devices;
        if before.is_empty() && !config.devices.is_empty() && !self.server.vault().keeps_state() {
            error!("the new devices need a place for their state; start the agent again to have them");
            config.devices.clear();
        }
        let change = devices::change(self.server.vault(), self.server.registry(), &self.cards, before, &config.devices);
        self.server.runtime().block_on(change);
        let _runtime = self.server.runtime().enter();
        self.cards.find(config, &[]);
    }
}

impl OpenDoor {
    /// Gives new connections the door of the new settings. A door that is in them no more keeps its old ones.
    fn put_in_force(&mut self, config: &Config) {
        let listen = match self.source {
            Source::Passed => config.door(self.listen.door),
            Source::Opened(_) => match config.listen.iter().find(|listen| listen.path == self.listen.path) {
                Some(listen) => listen.clone(),
                None => return,
            },
        };
        let file = |listen: &crate::config::Listen| (listen.mode, listen.group.clone());
        if matches!(self.source, Source::Opened(_)) && file(&listen) != file(&self.listen) {
            warn!(path = %listen.path.display(), "mode or group changed; start the agent again to apply it");
        }
        self.door.send_replace(Arc::new(Door::new(&listen)));
        self.listen = listen;
    }
}

fn lock_on(config: &Config) -> LockOn {
    LockOn { sleep: config.store.lock_on_sleep, session: config.store.lock_on_session_lock }
}

/// Has the store locked when logind says so, where that is wanted.
fn follow_logind(server: &Server, config: &Config) -> Option<AbortHandle> {
    let on = lock_on(config);
    let lock = logind::lock(Arc::clone(server.vault()), on);
    on.anything().then(|| server.runtime().spawn(lock).abort_handle())
}

fn paths(config: &Config) -> BTreeSet<&Path> {
    config.listen.iter().map(|listen| listen.path.as_path()).collect()
}

/// What a signal asks for.
enum Told {
    Terminate,
    HangUp,
    Interrupt,
    Wipe,
    LockStore,
}

/// The signals that an agent handles, from the making of this value on.
struct Signals {
    terminate: Signal,
    hang_up: Signal,
    interrupt: Signal,
    wipe: Signal,
    lock_store: Signal,
    /// A file beyond the limit on its size is an error for whoever writes it, and not the end of the process.
    _too_large: Signal,
}

impl Signals {
    /// Needs a runtime around it.
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            wipe: signal(SignalKind::user_defined1())?,
            lock_store: signal(SignalKind::user_defined2())?,
            _too_large: signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?,
        })
    }

    /// The next one. Dropping the future loses none.
    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Terminate,
            _ = self.hang_up.recv() => Told::HangUp,
            _ = self.interrupt.recv() => Told::Interrupt,
            _ = self.wipe.recv() => Told::Wipe,
            _ = self.lock_store.recv() => Told::LockStore,
        }
    }
}

/// From within the runtime and through the threads that serve connections, so that it is noticed when the runtime or all of
/// these stand still. Ends with an error, which systemd then notices.
async fn feed_watchdog(every: Duration, pulse: UnixStream) -> io::Result<()> {
    let mut pulse = tokio::net::UnixStream::from_std(pulse)?;
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        pulse.write_u8(0).await?;
        pulse.read_u8().await?;
        tell_systemd(&[NotifyState::Watchdog]);
    }
}

/// Tells systemd, where it listens.
fn tell_systemd(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("systemd cannot be told: {error}");
    }
}

impl From<AgentOptions> for vault::Settings {
    fn from(options: AgentOptions) -> Self {
        Self {
            rules: Rules {
                restrict_websafe: options.restrict_websafe,
                websafe_allow: options.websafe_allow,
                fingerprint_hash: options.fingerprint_hash,
            },
            default_lifetime: options.default_lifetime,
            allowed_providers: options.allowed_providers,
            allow_remote_providers: options.allow_remote_pkcs11,
            provider_patience: vault::Settings::default().provider_patience,
            person_deadline: prompt::Settings::default().timeout,
            auto_lock: AutoLock::default(),
        }
    }
}

impl From<&Config> for vault::Settings {
    fn from(Config { agent: config, prompt, store, .. }: &Config) -> Self {
        Self {
            rules: Rules {
                restrict_websafe: config.restrict_websafe,
                websafe_allow: config.websafe_allow.clone(),
                fingerprint_hash: config.fingerprint_hash,
            },
            default_lifetime: config.default_lifetime,
            allowed_providers: config.allowed_providers.clone(),
            allow_remote_providers: config.allow_remote_pkcs11,
            provider_patience: config.provider_timeout,
            person_deadline: prompt.timeout,
            auto_lock: AutoLock { after_idle: store.lock_after_idle, after: store.lock_after },
        }
    }
}

impl From<&PromptConfig> for prompt::Settings {
    fn from(config: &PromptConfig) -> Self {
        Self {
            askpass: config.askpass.clone().map(Into::into),
            pinentry: config.pinentry.clone().map(Into::into),
            timeout: config.timeout,
            max_per_uid: config.max_per_uid,
            environment: prompt::Environment::Process,
            notifications: config.notifications,
        }
    }
}
