//! The configuration file: TOML into typed settings, each of them checked and bounded here. Opens no socket.
//!
//! No file is needed to start. `contrib/config.toml` shows every setting with its default.

mod audit;
mod client;
mod device;
pub mod edit;
mod store;

use std::{
    env, fs, io,
    ops::Range,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, de::Error as _};
use thiserror::Error;
use toml::Spanned;

pub use audit::AuditConfig;
pub use client::DoorClient;
pub use device::{DeviceConfig, DriverConfig};
pub use store::StoreConfig;

use crate::{prompt::MAX_OPEN, public_key::FingerprintHash};
use audit::AuditForm;
use client::ClientForm;
use device::DeviceForm;

/// A file longer than this is not a configuration, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The most doors, and the most entries in one of a door's lists.
const MAX_LIST: usize = 1024;
/// The provider libraries that may be loaded unless something else is said, as in OpenSSH.
pub const DEFAULT_PROVIDERS: &str = "/usr/lib*/*,/usr/local/lib*/*";
/// What `sockaddr_un` holds, less the NUL (unix(7)), in bytes.
const MAX_SOCKET_PATH: usize = 107;
/// The longest message name that RFC 4251, section 6, allows, in bytes.
const MAX_MESSAGE_NAME: usize = 64;

/// All settings of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The doors, in the file's order. Sockets that systemd hands over take the place of their paths, and keep the
    /// other settings of the first door of their kind.
    pub listen: Vec<Listen>,
    /// The devices that the vault holds, in the file's order.
    pub devices: Vec<DeviceConfig>,
    /// OpenPGP cards.
    pub openpgp: OpenPgpConfig,
    /// What keys may do.
    pub agent: AgentConfig,
    /// How people are asked.
    pub prompt: PromptConfig,
    /// What is written down of the daemon's doings.
    pub log: LogConfig,
    /// What is written down of the use of keys.
    pub audit: AuditConfig,
    /// When the encrypted store is locked by itself.
    pub store: StoreConfig,
    /// The directory of what must survive a restart: absolute. `None` when neither the settings nor the environment name
    /// one.
    pub state: Option<PathBuf>,
    /// Where all this was read from.
    pub origin: Origin,
}

/// What [`Config::load`] was given, so that a reload reads the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The file named on the command line; without one the default place is looked at.
    pub file: Option<PathBuf>,
    /// The sockets named on the command line.
    pub sockets: Vec<PathBuf>,
    /// The directory for the state named on the command line.
    pub state: Option<PathBuf>,
}

/// What kind of peer a door is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DoorKind {
    /// ssh and all that speaks like it: the standard messages and those configured by name.
    #[default]
    Ssh,
    /// Other daemons and our own command line: every message.
    Service,
}

impl DoorKind {
    /// Its name in the configuration and the audit log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ssh => "ssh",
            Self::Service => "service",
        }
    }

    /// The file name of its socket below `$XDG_RUNTIME_DIR/strongroom`.
    fn socket_name(self) -> &'static str {
        match self {
            Self::Ssh => "agent",
            Self::Service => "service",
        }
    }

    /// Where its socket is by default.
    pub fn default_path(self) -> PathBuf {
        System::read().default_door(self).path
    }
}

/// One listening socket and whom it admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// The kind of peer.
    pub door: DoorKind,
    /// The socket: absolute, and short enough for a socket's address.
    pub path: PathBuf,
    /// The socket's permission bits; read and write bits only, always with the owner's.
    pub mode: u32,
    /// The group that gets the socket. It existed when the file was read; [`group_id`] gives its number.
    pub group: Option<String>,
    /// The uids that are served; by default our own and root.
    pub uids: Vec<u32>,
    /// The fingerprints (`SHA256:…`) of the keys this door shows; `None` means all.
    pub keys: Option<Vec<String>>,
    /// The extension messages spoken here beyond those of the door's kind.
    pub messages: Vec<String>,
    /// What some of the uids get there in place of `keys`.
    pub clients: Vec<DoorClient>,
}

/// OpenPGP cards.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OpenPgpConfig {
    /// Whether cards that no `[[device]]` names become devices by themselves when they are put into a reader.
    pub find: bool,
}

impl Default for OpenPgpConfig {
    fn default() -> Self {
        Self { find: true }
    }
}

/// What keys may do: the options of ssh-agent(1).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// How long a key lives that is added without a lifetime (`-t`).
    #[serde(deserialize_with = "default_lifetime")]
    pub default_lifetime: Option<Duration>,
    /// The hash of fingerprints in prompts (`-E`).
    #[serde(deserialize_with = "fingerprint_hash")]
    pub fingerprint_hash: FingerprintHash,
    /// The provider libraries that may be loaded: patterns separated by commas, in which `*` also matches `/` (`-P`).
    pub allowed_providers: String,
    /// Whether a forwarded connection may load a PKCS#11 provider (`-O allow-remote-pkcs11`).
    pub allow_remote_pkcs11: bool,
    /// How long a PKCS#11 provider may take to say what its tokens hold, when it is added: 1 s to 5 min.
    #[serde(deserialize_with = "provider_timeout")]
    pub provider_timeout: Duration,
    /// Whether FIDO keys of web origins sign ssh's own messages only (off by `-O no-restrict-websafe`).
    pub restrict_websafe: bool,
    /// The FIDO applications that are free of that: patterns separated by commas (`-O websafe-allow`).
    pub websafe_allow: Option<String>,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            default_lifetime: None,
            fingerprint_hash: FingerprintHash::default(),
            allowed_providers: DEFAULT_PROVIDERS.to_owned(),
            allow_remote_pkcs11: false,
            provider_timeout: Duration::from_secs(30),
            restrict_websafe: true,
            websafe_allow: None,
        }
    }
}

/// How people are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptConfig {
    /// The program that asks; without one it is `$SSH_ASKPASS`, or else the system's.
    pub askpass: Option<PathBuf>,
    /// A pinentry that asks in place of `$SSH_ASKPASS` and the system's askpass. Where there is no askpass at all, the
    /// system's pinentry asks.
    pub pinentry: Option<PathBuf>,
    /// How long a prompt stays open: 5 s to 1 h. Nobody answering is a refusal.
    pub timeout: Duration,
    /// How many prompts one uid may have open: 1 to 64. A request that needs one more is refused.
    pub max_per_uid: usize,
    /// Whether `notify-send` shows what a person is to do at a device, where it can; else askpass does.
    pub notifications: bool,
}

impl Default for PromptConfig {
    fn default() -> Self {
        Self {
            askpass: None,
            pinentry: None,
            timeout: Duration::from_secs(60),
            max_per_uid: MAX_OPEN,
            notifications: true,
        }
    }
}

/// What is written down.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug` or `trace`. No level writes a secret.
    #[serde(deserialize_with = "log_level")]
    pub level: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned() }
    }
}

/// Why there are no settings.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read: make it readable, or name another one.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be written: make its directory writable, or name another one.
    #[error("{path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither the command line nor the environment says where the file is.
    #[error("there is no place for a configuration file")]
    NoPlace,
    /// Something in the file is wrong: correct that line. An older configuration may stay in force meanwhile.
    #[error("{path}:{line}: {message}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, for a person.
        message: String,
    },
    /// The directory for the state named on the command line cannot be one: name another.
    #[error("--state {path}: {source}", path = path.display())]
    State {
        /// As it was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A socket named on the command line cannot be one: name another.
    #[error("--socket {path}: {reason}", path = path.display())]
    Socket {
        /// As it was given.
        path: PathBuf,
        /// What is wrong, for a person.
        reason: String,
    },
}

impl ConfigError {
    /// What a person can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Read { .. } => "Make the file readable, or name another one with --config.",
            Self::Write { .. } => "Make its directory writable, or name another one with --config.",
            Self::NoPlace => "Set HOME, or name a file with --config.",
            Self::Invalid { .. } => "Correct that line, or remove it to get the default.",
            Self::State { .. } | Self::Socket { .. } => "Name another path.",
        }
    }
}

impl Config {
    /// Reads the file that `origin` names, which must exist, or else the file at the default place, which need not. What
    /// else `origin` names takes the place of what is configured; its sockets are ssh doors in place of all doors.
    pub fn load(origin: Origin) -> Result<Self, ConfigError> {
        let system = System::read();
        let text = match (&origin.file, system.default_file()) {
            (Some(path), _) => Some((path.clone(), read(path)?)),
            (None, Some(path)) => match read(&path) {
                Ok(text) => Some((path, text)),
                Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            },
            (None, None) => None,
        };
        let mut config = match text {
            Some((path, text)) => Self::parse(&text, &system).map_err(|fault| fault.at(&path, &text))?,
            None => Self::without_file(&system),
        };
        config.origin = origin;
        config.replace_doors()?;
        config.replace_state()?;
        Ok(config)
    }

    /// Reads the same file again, under the same command line.
    pub fn reload(&self) -> Result<Self, ConfigError> {
        Self::load(self.origin.clone())
    }

    /// The settings of a door whose socket is named elsewhere: those of the first door of its kind, or the defaults.
    pub fn door(&self, kind: DoorKind) -> Listen {
        let configured = self.listen.iter().find(|door| door.door == kind);
        configured.cloned().unwrap_or_else(|| System::read().default_door(kind))
    }

    fn without_file(system: &System) -> Self {
        let doors = [DoorKind::Ssh, DoorKind::Service];
        Self {
            listen: doors.map(|door| system.default_door(door)).into(),
            devices: Vec::new(),
            openpgp: OpenPgpConfig::default(),
            agent: AgentConfig::default(),
            prompt: PromptConfig::default(),
            log: LogConfig::default(),
            audit: AuditConfig::default(),
            store: StoreConfig::default(),
            state: system.state_home.clone(),
            origin: Origin::default(),
        }
    }

    fn parse(text: &str, system: &System) -> Result<Self, Fault> {
        let form: FileForm = toml::from_str(text)?;
        let defaults = Self::without_file(system);
        let listen = match form.listen {
            Some(forms) => doors(forms, system)?,
            None => defaults.listen,
        };
        let devices = device::devices(form.device, system)?;
        let state = form.state.map(|path| checked(&path, |path| system.expand(path))).transpose()?.or(defaults.state);
        Ok(Self {
            listen,
            devices,
            openpgp: form.openpgp,
            agent: form.agent,
            prompt: form.prompt.check(system)?,
            log: form.log,
            audit: form.audit.check(system)?,
            store: form.store,
            state,
            ..defaults
        })
    }

    /// Puts the command line's sockets in place of the configured doors. They keep what else is set for ssh doors.
    fn replace_doors(&mut self) -> Result<(), ConfigError> {
        if self.origin.sockets.is_empty() {
            return Ok(());
        }
        let model = self.door(DoorKind::Ssh);
        let place = |path: &PathBuf| {
            let failed = |reason| ConfigError::Socket { path: path.clone(), reason };
            let absolute = std::path::absolute(path).map_err(|e| failed(e.to_string()))?;
            let path = socket_path(absolute).map_err(failed)?;
            Ok(Listen { path, ..model.clone() })
        };
        self.listen = self.origin.sockets.iter().map(place).collect::<Result<_, _>>()?;
        Ok(())
    }

    fn replace_state(&mut self) -> Result<(), ConfigError> {
        if let Some(path) = &self.origin.state {
            let failed = |source| ConfigError::State { path: path.clone(), source };
            self.state = Some(std::path::absolute(path).map_err(failed)?);
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(failed(io::Error::other("the file is longer than 1 MiB")));
    }
    fs::read_to_string(path).map_err(failed)
}

/// What is wrong, and where in the file if that is known.
#[derive(Debug)]
struct Fault {
    span: Option<Range<usize>>,
    message: String,
}

impl Fault {
    fn new(span: Range<usize>, message: impl Into<String>) -> Self {
        Self { span: Some(span), message: message.into() }
    }

    fn at(self, path: &Path, text: &str) -> ConfigError {
        let start = self.span.map_or(0, |span| span.start);
        let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
        ConfigError::Invalid { path: path.to_owned(), line, message: self.message.replace('\n', "; ") }
    }
}

impl From<toml::de::Error> for Fault {
    fn from(error: toml::de::Error) -> Self {
        Self { span: error.span(), message: error.message().to_owned() }
    }
}

/// What the settings refer to on this machine. Taken once, so that the rest of this file is a function of its arguments.
#[derive(Default)]
struct System {
    config_home: Option<PathBuf>,
    state_home: Option<PathBuf>,
    home: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    uid: u32,
    passwd: String,
}

impl System {
    fn read() -> Self {
        // The base directory specification has relative paths ignored.
        let dir = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = dir("HOME");
        let user_config = dir("XDG_CONFIG_HOME").or_else(|| Some(home.clone()?.join(".config")));
        let user_state = dir("XDG_STATE_HOME").or_else(|| Some(home.clone()?.join(".local/state")));
        Self {
            // systemd names a system service's own directory here: ConfigurationDirectory=.
            config_home: dir("CONFIGURATION_DIRECTORY").or_else(|| Some(user_config?.join("strongroom"))),
            // And here: StateDirectory=.
            state_home: dir("STATE_DIRECTORY").or_else(|| Some(user_state?.join("strongroom"))),
            home,
            runtime_dir: dir("XDG_RUNTIME_DIR"),
            uid: rustix::process::getuid().as_raw(),
            passwd: fs::read_to_string("/etc/passwd").unwrap_or_default(),
        }
    }

    fn default_file(&self) -> Option<PathBuf> {
        Some(self.config_home.as_ref()?.join("config.toml"))
    }

    fn default_door(&self, door: DoorKind) -> Listen {
        // A system-wide vault has no user's runtime directory.
        let dir = self.runtime_dir.as_deref().unwrap_or(Path::new("/run"));
        Listen {
            door,
            path: dir.join("strongroom").join(door.socket_name()),
            mode: 0o600,
            group: None,
            uids: self.own_uids(),
            keys: None,
            messages: Vec::new(),
            clients: Vec::new(),
        }
    }

    fn own_uids(&self) -> Vec<u32> {
        if self.uid == 0 { vec![0] } else { vec![self.uid, 0] }
    }

    /// An absolute path from one that may begin with `~` or `$XDG_RUNTIME_DIR`.
    fn expand(&self, path: &str) -> Result<PathBuf, String> {
        let (first, rest) = path.split_once('/').unwrap_or((path, ""));
        let start = match first {
            "~" => self.home.as_ref().ok_or("HOME is not set")?,
            "$XDG_RUNTIME_DIR" => self.runtime_dir.as_ref().ok_or("XDG_RUNTIME_DIR is not set")?,
            "" if path.starts_with('/') => return Ok(PathBuf::from(path)),
            _ => return Err(format!("`{path}` must begin with `/`, `~/` or `$XDG_RUNTIME_DIR/`")),
        };
        Ok(start.join(rest))
    }

    fn uid(&self, user: &User) -> Result<u32, String> {
        match user {
            // The last one means "no user" to the system.
            User::Number(n) => u32::try_from(*n)
                .ok()
                .filter(|uid| *uid != u32::MAX)
                .ok_or_else(|| format!("{n} is not a uid: uids go from 0 to 4294967294")),
            User::Name(name) => number_in(&self.passwd, name)
                .ok_or_else(|| format!("no user `{name}` in /etc/passwd; give its number if it is known elsewhere")),
        }
    }
}

/// The number of a group: by its name in /etc/group, or the number itself.
pub fn group_id(name: &str) -> Option<u32> {
    name.parse().ok().or_else(|| number_in(&fs::read_to_string("/etc/group").ok()?, name))
}

/// The third field of the line that begins with `name`: a uid in passwd(5), a gid in group(5).
fn number_in(accounts: &str, name: &str) -> Option<u32> {
    let mut lines = accounts.lines().map(|line| line.split(':'));
    lines.find_map(|mut fields| (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten())
}

/// A time as OpenSSH writes it (sshd_config(5), TIME FORMATS): `90`, `15m`, `1h30m`, with the units s, m, h, d and w in
/// any case. `None` if it is not one, or longer than 2³¹ − 1 s.
pub fn parse_time(text: &str) -> Option<Duration> {
    let mut total = 0u32;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u32 = rest[..digits].parse().ok()?;
        let unit = rest[digits..].chars().next();
        let seconds = match unit.map(|c| c.to_ascii_lowercase()) {
            None | Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 24 * 3600,
            Some('w') => 7 * 24 * 3600,
            Some(_) => return None,
        };
        total = total.checked_add(number.checked_mul(seconds)?)?;
        rest = &rest[digits + unit.map_or(0, char::len_utf8)..];
    }
    (!text.is_empty() && total <= i32::MAX.unsigned_abs()).then(|| Duration::from_secs(total.into()))
}

// The file as it is written, before anything in it is resolved.

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct FileForm {
    state: Option<Spanned<String>>,
    listen: Option<Vec<Spanned<ListenForm>>>,
    device: Vec<Spanned<DeviceForm>>,
    openpgp: OpenPgpConfig,
    agent: AgentConfig,
    prompt: PromptForm,
    log: LogConfig,
    audit: AuditForm,
    store: StoreConfig,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenForm {
    #[serde(default)]
    door: DoorKind,
    path: Option<Spanned<String>>,
    mode: Option<Spanned<ModeForm>>,
    group: Option<Spanned<String>>,
    uids: Option<Vec<Spanned<User>>>,
    keys: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    messages: Vec<Spanned<String>>,
    #[serde(default)]
    client: Vec<Spanned<ClientForm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PromptForm {
    askpass: Option<Spanned<String>>,
    pinentry: Option<Spanned<String>>,
    #[serde(deserialize_with = "prompt_timeout")]
    timeout: Duration,
    #[serde(deserialize_with = "max_per_uid")]
    max_per_uid: usize,
    notifications: bool,
}

impl Default for PromptForm {
    fn default() -> Self {
        let PromptConfig { timeout, max_per_uid, notifications, .. } = PromptConfig::default();
        Self { askpass: None, pinentry: None, timeout, max_per_uid, notifications }
    }
}

impl PromptForm {
    fn check(self, system: &System) -> Result<PromptConfig, Fault> {
        let program =
            |path: Option<Spanned<String>>| path.map(|path| checked(&path, |path| system.expand(path))).transpose();
        let Self { askpass, pinentry, timeout, max_per_uid, notifications } = self;
        if let (Some(_), Some(pinentry)) = (&askpass, &pinentry) {
            return Err(Fault::new(pinentry.span(), "either `askpass` asks or `pinentry`: name one of them"));
        }
        Ok(PromptConfig {
            askpass: program(askpass)?,
            pinentry: program(pinentry)?,
            timeout,
            max_per_uid,
            notifications,
        })
    }
}

/// An octal string, or an integer, for which TOML has `0o600`.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a mode is written as \"0600\" or 0o600")]
enum ModeForm {
    Number(u32),
    Octal(String),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a user is a name or a number")]
enum User {
    Number(i64),
    Name(String),
}

fn doors(forms: Vec<Spanned<ListenForm>>, system: &System) -> Result<Vec<Listen>, Fault> {
    let mut doors: Vec<Listen> = Vec::with_capacity(forms.len());
    for form in forms {
        let span = form.span();
        let door = door(form.into_inner(), system)?;
        if doors.len() == MAX_LIST {
            return Err(Fault::new(span, format!("more than {MAX_LIST} doors")));
        }
        if doors.iter().any(|other| other.path == door.path) {
            return Err(Fault::new(span, format!("{} is another door's path already", door.path.display())));
        }
        doors.push(door);
    }
    if doors.is_empty() {
        return Err(Fault { span: None, message: "`listen` is empty: the vault would serve nobody".to_owned() });
    }
    Ok(doors)
}

fn door(form: ListenForm, system: &System) -> Result<Listen, Fault> {
    let defaults = system.default_door(form.door);
    let path = form.path.map(|path| checked(&path, |path| socket_path(system.expand(path)?))).transpose()?;
    let mode = form.mode.map(|mode| checked(&mode, socket_mode)).transpose()?;
    let group = form.group.map(|group| checked(&group, |group| group_exists(group))).transpose()?;
    let uids = form.uids.map(|users| checked_list(&users, |user| system.uid(user))).transpose()?;
    let keys = form.keys.map(|keys| checked_list(&keys, |key| sha256_fingerprint(key))).transpose()?;
    let messages = checked_list(&form.messages, |name| message_name(name))?;
    let uids = uids.unwrap_or(defaults.uids);
    let clients = client::clients(form.client, &uids, system)?;
    Ok(Listen {
        door: form.door,
        path: path.unwrap_or(defaults.path),
        mode: mode.unwrap_or(defaults.mode),
        group,
        uids,
        keys,
        messages,
        clients,
    })
}

fn checked<T, U>(value: &Spanned<T>, check: impl Fn(&T) -> Result<U, String>) -> Result<U, Fault> {
    check(value.as_ref()).map_err(|message| Fault::new(value.span(), message))
}

fn checked_list<T, U>(values: &[Spanned<T>], check: impl Fn(&T) -> Result<U, String>) -> Result<Vec<U>, Fault> {
    if let Some(value) = values.get(MAX_LIST) {
        return Err(Fault::new(value.span(), format!("more than {MAX_LIST} entries")));
    }
    values.iter().map(|value| checked(value, &check)).collect()
}

fn socket_path(path: PathBuf) -> Result<PathBuf, String> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_SOCKET_PATH {
        return Err(format!(
            "{} is longer than the {MAX_SOCKET_PATH} bytes that a socket's path may have",
            path.display()
        ));
    }
    if bytes.contains(&0)
        || bytes.ends_with(b"/")
        || !matches!(path.components().next_back(), Some(Component::Normal(_)))
    {
        return Err(format!("{} does not name a file", path.display()));
    }
    Ok(path)
}

fn socket_mode(form: &ModeForm) -> Result<u32, String> {
    let mode = match form {
        ModeForm::Number(mode) => Some(*mode),
        ModeForm::Octal(digits) if digits.bytes().all(|d| d.is_ascii_digit()) => u32::from_str_radix(digits, 8).ok(),
        ModeForm::Octal(_) => None,
    };
    // A decimal 660 would be 0o1224; the bits tell.
    mode.filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600)
        .ok_or_else(|| "a socket's mode is an octal string like \"0600\", \"0660\" or \"0666\"".to_owned())
}

fn group_exists(name: &str) -> Result<String, String> {
    match group_id(name) {
        Some(_) => Ok(name.to_owned()),
        None => Err(format!("no group `{name}` in /etc/group; create it, or give the number of one known elsewhere")),
    }
}

fn sha256_fingerprint(text: &str) -> Result<String, String> {
    use base64ct::{Base64Unpadded, Encoding};
    let digest = text.strip_prefix("SHA256:").and_then(|encoded| Base64Unpadded::decode_vec(encoded).ok());
    match digest {
        Some(digest) if digest.len() == 32 => Ok(text.to_owned()),
        _ => Err(format!("`{text}` is not a fingerprint as `ssh-add -l` shows it: SHA256: and 43 characters")),
    }
}

fn message_name(name: &str) -> Result<String, String> {
    let (local, domain) = name.split_once('@').unwrap_or((name, ""));
    let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b',');
    if plain && name.len() <= MAX_MESSAGE_NAME && !local.is_empty() && !domain.is_empty() && !domain.contains('@') {
        return Ok(name.to_owned());
    }
    Err(format!("`{name}` is not the name of a message, as in `ecdh@joyent.com`"))
}

fn default_lifetime<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    match time(from)? {
        Duration::ZERO => Err(D::Error::custom("a key that lives 0 s is of no use; leave this out for no limit")),
        lifetime => Ok(Some(lifetime)),
    }
}

fn prompt_timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let timeout = time(from)?;
    if (5..=3600).contains(&timeout.as_secs()) {
        return Ok(timeout);
    }
    Err(D::Error::custom("a prompt stays open for \"5s\" to \"1h\""))
}

fn provider_timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let timeout = time(from)?;
    if (1..=300).contains(&timeout.as_secs()) {
        return Ok(timeout);
    }
    Err(D::Error::custom("a provider is waited for for \"1s\" to \"5m\""))
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    parse_time(&text).ok_or_else(|| D::Error::custom(format!("`{text}` is not a time, as in \"90s\" or \"1h30m\"")))
}

fn max_per_uid<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    let count = usize::deserialize(from)?;
    if (1..=64).contains(&count) {
        return Ok(count);
    }
    Err(D::Error::custom("the number of prompts goes from 1 to 64"))
}

fn fingerprint_hash<'de, D: Deserializer<'de>>(from: D) -> Result<FingerprintHash, D::Error> {
    let name = String::deserialize(from)?;
    FingerprintHash::from_name(&name).ok_or_else(|| {
        D::Error::custom(format!("unknown hash `{name}`: it is one of md5, sha1, sha256, sha384, sha512"))
    })
}

fn log_level<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let level = String::deserialize(from)?;
    if ["error", "warn", "info", "debug", "trace"].contains(&level.as_str()) {
        return Ok(level);
    }
    Err(D::Error::custom(format!("unknown level `{level}`: it is one of error, warn, info, debug, trace")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::vault::key::Grants;

    fn system() -> System {
        System {
            config_home: Some("/home/ann/.config/strongroom".into()),
            state_home: Some("/home/ann/.local/state/strongroom".into()),
            home: Some("/home/ann".into()),
            runtime_dir: Some("/run/user/1000".into()),
            uid: 1000,
            passwd: "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\ntor:x:106:112::/:/bin/false\n"
                .into(),
        }
    }

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, &system()).map_err(|fault| fault.at(Path::new("c.toml"), text).to_string())
    }

    fn error(text: &str) -> String {
        parse(text).unwrap_err()
    }

    fn load(file: &Path, sockets: &[PathBuf]) -> Result<Config, ConfigError> {
        Config::load(Origin { file: Some(file.to_owned()), sockets: sockets.to_vec(), state: None })
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config, Config::without_file(&system()));
        let [ssh, service] = &config.listen[..] else { panic!("{:?}", config.listen) };
        assert_eq!((ssh.door, ssh.path.to_str().unwrap()), (DoorKind::Ssh, "/run/user/1000/strongroom/agent"));
        assert_eq!(
            (service.door, service.path.to_str().unwrap()),
            (DoorKind::Service, "/run/user/1000/strongroom/service")
        );
        assert!(config.listen.iter().all(|door| door.mode == 0o600 && door.uids == [1000, 0] && door.keys.is_none()));
        assert_eq!(config.prompt.timeout, Duration::from_secs(60));
        assert!(config.agent.restrict_websafe && !config.agent.allow_remote_pkcs11);
        assert_eq!(config.state.unwrap(), Path::new("/home/ann/.local/state/strongroom"));
    }

    #[test]
    fn without_a_runtime_directory_the_sockets_are_below_run() {
        let config = Config::without_file(&System::default());
        assert_eq!(config.listen[1].path, Path::new("/run/strongroom/service"));
    }

    #[test]
    fn the_example_shows_the_defaults_and_its_suggestions_are_valid() {
        let example = include_str!("../contrib/config.toml");
        assert_eq!(parse(example).unwrap(), parse("").unwrap());
        // Of the two that ask people, one is named.
        let without = |other: &str| {
            let lines = example.lines().filter(|line| !line.contains(&format!("#:{other} =")));
            let everything: Vec<_> = lines.map(|line| line.strip_prefix("#:").unwrap_or(line)).collect();
            parse(&everything.join("\n")).unwrap()
        };
        let config = without("pinentry");
        assert_eq!(config.agent.default_lifetime, Some(Duration::from_secs(9 * 3600 + 30 * 60)));
        assert!(config.prompt.askpass.is_some() && without("askpass").prompt.pinentry.is_some());
        let drivers: Vec<_> = config.devices.iter().map(|device| device.driver.kind()).collect();
        assert_eq!(drivers, ["pkcs11", "openpgp"]);
    }

    #[test]
    fn the_readme_and_the_pages_of_the_devices_show_valid_settings() {
        for page in [
            include_str!("../README.md"),
            include_str!("../docs/devices/openpgp-card.md"),
            include_str!("../docs/devices/pkcs11.md"),
        ] {
            let blocks: Vec<_> = page.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
            assert!(!blocks.is_empty());
            for block in blocks {
                parse(block).unwrap();
            }
        }
    }

    #[test]
    fn a_door_takes_every_setting() {
        let key = "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU";
        let config = parse(&format!(
            "[[listen]]\ndoor = \"service\"\npath = \"~/vault/tor\"\nmode = \"0660\"\ngroup = \"0\"\n\
             uids = [\"tor\", 0]\nkeys = [\"{key}\"]\nmessages = [\"ecdh@joyent.com\"]\n\
             [[listen.client]]\nuid = \"tor\"\nkeys = []\noperations = [\"sign\"]\n[[listen.client]]\nuid = 0\n"
        ));
        let tor = DoorClient { uid: 106, keys: Some(vec![]), operations: Grants { sign: true, ..Grants::NONE } };
        let root = DoorClient { uid: 0, keys: None, operations: Grants::ALL };
        let expected = Listen {
            door: DoorKind::Service,
            path: "/home/ann/vault/tor".into(),
            mode: 0o660,
            group: Some("0".to_owned()),
            uids: vec![106, 0],
            keys: Some(vec![key.to_owned()]),
            messages: vec!["ecdh@joyent.com".to_owned()],
            clients: vec![tor, root],
        };
        assert_eq!(config.unwrap().listen, [expected]);
    }

    #[test]
    fn errors_name_the_line() {
        let unknown = error("# settings\n[agent]\n\ndefault_lifetme = \"1h\"\n");
        assert!(unknown.starts_with("c.toml:4: unknown field `default_lifetme`, expected one of"), "{unknown}");
        assert!(error("[agnet]\n").starts_with("c.toml:1: unknown field `agnet`"));
        assert!(error("[log]\nlevel = \"info\n").starts_with("c.toml:2: "), "{}", error("[log]\nlevel = \"info\n"));
        assert!(error("[[listen]]\nport = 22\n").starts_with("c.toml:2: unknown field `port`"));
    }

    #[test]
    fn a_bad_value_is_refused_where_it_stands() {
        let cases = [
            ("state = \"here\"", "c.toml:1: `here` must begin with"),
            ("[[listen]]\nmode = \"0888\"", "c.toml:2: a socket's mode is an octal string"),
            ("[[listen]]\nmode = 660", "c.toml:2: a socket's mode is an octal string"),
            ("[[listen]]\nmode = \"0060\"", "c.toml:2: a socket's mode is an octal string"),
            ("[[listen]]\nmode = true", "c.toml:2: a mode is written as"),
            ("[[listen]]\nuids = [\n  0,\n  -1,\n]", "c.toml:4: -1 is not a uid"),
            ("[[listen]]\nuids = [4294967295]", "c.toml:2: 4294967295 is not a uid"),
            ("[[listen]]\nuids = [\"nobody-here\"]", "c.toml:2: no user `nobody-here` in /etc/passwd"),
            ("[[listen]]\ngroup = \"no-such-group\"", "c.toml:2: no group `no-such-group`"),
            ("[[listen]]\ndoor = \"back\"", "c.toml:2: unknown variant `back`"),
            ("[[listen]]\npath = \"agent\"", "c.toml:2: `agent` must begin with"),
            ("[[listen]]\npath = \"/run/\"", "c.toml:2: /run/ does not name a file"),
            ("[[listen]]\nkeys = [\"SHA256:abc\"]", "c.toml:2: `SHA256:abc` is not a fingerprint"),
            ("[[listen]]\nmessages = [\"session bind\"]", "c.toml:2: `session bind` is not the name of a message"),
            ("[[listen]]\n[[listen.client]]\nuid = 7", "c.toml:3: uid 7 is not among the door's `uids`"),
            ("[[listen]]\n[[listen.client]]\nuid = \"nobody-here\"", "c.toml:3: no user `nobody-here`"),
            ("[[listen]]\n[[listen.client]]\nkeys = []", "c.toml:2: missing field `uid`"),
            (
                "[[listen]]\n[[listen.client]]\nuid = 0\n[[listen.client]]\nuid = \"root\"",
                "c.toml:5: uid 0 is another client's already",
            ),
            ("[[listen]]\n[[listen.client]]\nuid = 0\nkeys = [\"x\"]", "c.toml:4: `x` is not a fingerprint"),
            ("[[listen]]\n[[listen.client]]\nuid = 0\noperations = [\"fly\"]", "c.toml:4: unknown variant `fly`"),
            ("[[listen]]\n[[listen.client]]\nuid = 0\nmode = 1", "c.toml:4: unknown field `mode`"),
            ("[[listen]]\n\n[[listen]]\n", "c.toml:3: /run/user/1000/strongroom/agent is another door's path"),
            ("listen = []", "c.toml:1: `listen` is empty"),
            ("\n[agent]\ndefault_lifetime = \"1y\"", "c.toml:3: `1y` is not a time"),
            ("[agent]\ndefault_lifetime = \"0\"", "c.toml:2: a key that lives 0 s"),
            ("[agent]\nfingerprint_hash = \"crc\"", "c.toml:2: unknown hash `crc`"),
            ("[agent]\nprovider_timeout = \"6m\"", "c.toml:2: a provider is waited for"),
            ("[prompt]\ntimeout = \"4s\"", "c.toml:2: a prompt stays open"),
            ("[prompt]\nmax_per_uid = 0", "c.toml:2: the number of prompts"),
            ("[prompt]\naskpass = \"/a\"\npinentry = \"/b\"", "c.toml:3: either `askpass` asks"),
            ("[prompt]\naskpass = \"ssh-askpass\"", "c.toml:2: `ssh-askpass` must begin with"),
            ("[audit]\nmax_size = \"1K\"", "c.toml:2: `1K` is no size for the audit log"),
            ("[audit]\nmax_size = \"2T\"", "c.toml:2: `2T` is no size for the audit log"),
            ("[audit]\non_full = \"stop\"", "c.toml:2: unknown choice `stop`"),
            ("[audit]\npath = \"audit\"", "c.toml:2: `audit` must begin with"),
            ("[log]\nlevel = \"loud\"", "c.toml:2: unknown level `loud`"),
        ];
        for (text, expected) in cases {
            let error = error(text);
            assert!(error.starts_with(expected), "{text:?} gave {error:?}");
        }
    }

    #[test]
    fn a_socket_path_is_bounded() {
        let longest = format!("[[listen]]\npath = \"/{}\"", "p".repeat(106));
        assert!(parse(&longest).is_ok());
        assert!(error(&longest.replace("/p", "/pp")).contains("longer than the 107 bytes"));
    }

    #[test]
    fn times_are_read_as_openssh_reads_them() {
        let seconds = |text| parse_time(text).map(|time| time.as_secs());
        assert_eq!(seconds("90"), Some(90));
        assert_eq!(seconds("1h30m"), Some(5400));
        assert_eq!(seconds("1W2D"), Some(9 * 24 * 3600));
        assert_eq!(seconds("1h30"), Some(3630));
        assert_eq!(seconds("2147483647"), Some(2_147_483_647));
        for bad in ["", "h", "1x", "-1", "1h ", "2147483648", "1h2147483647", "99999999999w", "1½"] {
            assert_eq!(seconds(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_named_file_is_needed_and_reloaded() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let missing = load(&file, &[]).unwrap_err();
        assert!(matches!(missing, ConfigError::Read { .. }), "{missing}");
        fs::write(&file, "[log]\nlevel = \"debug\"\n").unwrap();
        let config = load(&file, &[]).unwrap();
        assert_eq!(config.log.level, "debug");
        fs::write(&file, "[log]\nlevel = \"warn\"\n").unwrap();
        assert_eq!(config.reload().unwrap().log.level, "warn");
        fs::write(&file, "[log]\nlevel = 3\n").unwrap();
        assert!(matches!(config.reload(), Err(ConfigError::Invalid { line: 2, .. })));
    }

    #[test]
    fn sockets_of_the_command_line_replace_the_doors() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        fs::write(&file, "[[listen]]\ndoor = \"service\"\n[[listen]]\nmessages = [\"ecdh@joyent.com\"]\n").unwrap();
        let sockets = [dir.path().join("a"), dir.path().join("b")];
        let config = load(&file, &sockets).unwrap();
        assert_eq!(config.listen.iter().map(|door| &door.path).collect::<Vec<_>>(), sockets.iter().collect::<Vec<_>>());
        assert!(config.listen.iter().all(|door| door.door == DoorKind::Ssh && door.messages == ["ecdh@joyent.com"]));
        let long = PathBuf::from(format!("/{}", "p".repeat(200)));
        assert!(matches!(load(&file, &[long]), Err(ConfigError::Socket { .. })));
    }

    #[test]
    fn the_state_is_where_the_command_line_or_else_the_file_says() {
        assert_eq!(parse("state = \"~/vault\"").unwrap().state.unwrap(), Path::new("/home/ann/vault"));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        fs::write(&file, "state = \"/configured\"\n").unwrap();
        let origin = Origin { file: Some(file), state: Some("named".into()), ..Origin::default() };
        let config = Config::load(origin).unwrap();
        assert_eq!(config.state, Some(env::current_dir().unwrap().join("named")));
        assert_eq!(config.reload().unwrap().state, config.state);
        let config = Config::load(Origin { state: None, ..config.origin }).unwrap();
        assert_eq!(config.state.unwrap(), Path::new("/configured"));
    }
}
