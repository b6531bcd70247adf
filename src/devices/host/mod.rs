//! A driver in a process of its own: what foreign code does there harms the calls inside it and nothing else. Knows how
//! the process is started; `session` what passes between, `child` what happens there.

pub mod child;
mod incoming;
pub mod session;
mod stderr;
pub mod wire;

use std::{
    env,
    ffi::{OsStr, OsString},
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream, unix::process::CommandExt},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{net::UnixStream, task::JoinHandle, time::timeout};
use zeroize::Zeroizing;

pub use session::HostSession;

use super::{DeviceError, call::Engine};
use crate::{
    reactor::Registry,
    sys::spawn::{self, Child},
};

/// This program, even when its file has been replaced or removed since it started.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// The variables that the process gets where we have them; a `*` stands for any end.
const VARIABLES: [&str; 5] = ["HOME", "PATH", "LANG", "LC_*", "XDG_*"];
/// Those by which the vendors' libraries find their tokens.
const VENDORS: [&str; 5] = ["SOFTHSM2_CONF", "OPENSC_CONF", "TPM2_PKCS11_*", "P11_KIT_*", "KRYOPTIC_CONF"];

/// A child process, and what it is to do.
pub struct Host {
    kind: &'static str,
    config: Zeroizing<Vec<u8>>,
    settings: HostSettings,
}

/// How a driver's process is started.
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// The device's name: the log has it, and whoever lists processes sees it.
    pub name: String,
    /// Variables besides those that every such process has.
    pub env: Vec<(OsString, OsString)>,
    /// How long the process may take to open its device.
    pub open_timeout: Duration,
    /// The program; this one, unless a test names another.
    pub program: PathBuf,
}

impl HostSettings {
    /// For the device of this name, with half a minute to open it.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            env: Vec::new(),
            open_timeout: Duration::from_secs(30),
            program: PathBuf::from(OWN_PROGRAM),
        }
    }
}

impl Host {
    /// Will run the driver of this kind, which reads `config` by [`Hosted::config`](child::Hosted::config); or
    /// [`ask`](Self::ask) the [`Question`](child::Question) `config`.
    pub fn new(kind: &'static str, config: Vec<u8>, settings: HostSettings) -> Self {
        Self { kind, config: Zeroizing::new(config), settings }
    }

    /// Starts a process that answers one question and ends. Whatever it does, the answer or the reason comes within the
    /// time to open a device; then nothing of it is left.
    pub async fn ask(&self) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let asking = async {
            // Dropped at the end of the block, and with it the process.
            let (mut socket, child, _log) = self.start().await.map_err(|e| not_started(&e))?;
            match session::ask(&mut socket, &self.config).await {
                Ok(answer) => answer,
                Err(broken) => Err(DeviceError::Failed(broken.reason(session::end_of(&child).await))),
            }
        };
        timeout(self.settings.open_timeout, asking).await.unwrap_or(Err(DeviceError::Timeout))
    }

    /// Starts a process that tells things by itself, and hands them on until it ends or tells nonsense: then `heard` returns
    /// `None`. Returns why that was; nothing of the process is left. Dropping the future ends it, too.
    #[cfg_attr(not(feature = "openpgp"), allow(dead_code, reason = "cards are all that is watched for"))]
    pub async fn listen(&self, mut heard: impl FnMut(&[u8]) -> Option<()>) -> String {
        let (mut socket, child, _log) = match self.start().await {
            Ok(started) => started,
            Err(error) => return error.to_string(),
        };
        let mut news = session::ask(&mut socket, &self.config).await.map(Result::unwrap_or_default);
        loop {
            match news {
                Ok(bytes) if heard(&bytes).is_some() => news = session::told(&mut socket).await,
                Ok(_) => return "the process sent nonsense".to_owned(),
                Err(broken) => return broken.reason(session::end_of(&child).await),
            }
        }
    }

    fn command(&self, stdin: OwnedFd) -> Command {
        let mut command = Command::new(&self.settings.program);
        command
            // Its name decides what this program is, and may be `ssh-agent` here.
            .arg0("strongroom")
            .arg("device-host")
            .arg(self.kind)
            .arg(&self.settings.name)
            .env_clear()
            .envs(env::vars_os().filter(|(name, _)| passes(name)))
            .envs(self.settings.env.iter().map(|(name, value)| (name, value)))
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    async fn start(&self) -> std::io::Result<(UnixStream, Child, Option<JoinHandle<()>>)> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let socket = UnixStream::from_std(ours)?;
        let mut child = spawn::spawn(self.command(theirs.into())).await?;
        let log = child.stderr.take().map(|stderr| {
            let (name, exited) = (self.settings.name.clone(), child.exited());
            tokio::spawn(async move {
                if let Err(e) = stderr::log(stderr, &name, exited).await {
                    tracing::warn!(device = name, "cannot read what its process writes: {e}");
                }
            })
        });
        Ok((socket, child, log))
    }
}

/// Runs a driver in a child process, whose answers a reactor waits for.
pub struct HostEngine {
    /// The process.
    pub host: Host,
    /// Where its socket is waited for.
    pub reactor: Registry,
}

impl Engine for HostEngine {
    type Session = HostSession;

    async fn open(&self) -> Result<HostSession, DeviceError> {
        let host = &self.host;
        let opening = async {
            let (mut socket, child, log) = host.start().await.map_err(|e| not_started(&e))?;
            match session::open(&mut socket, &host.config).await {
                Ok(lanes) => {
                    let lanes = lanes?;
                    HostSession::start(&self.reactor, socket, child, lanes, log).map_err(|e| not_started(&e))
                }
                Err(broken) => Err(DeviceError::Failed(broken.reason(session::end_of(&child).await))),
            }
        };
        timeout(host.settings.open_timeout, opening).await.unwrap_or(Err(DeviceError::Timeout))
    }

    fn spawn(&self, worker: impl Future<Output = ()> + Send + 'static) {
        self.reactor.spawn(worker);
    }
}

fn not_started(error: &std::io::Error) -> DeviceError {
    DeviceError::Failed(format!("cannot start the device's process: {error}"))
}

/// The variables of ours by which a vendor's library finds its tokens.
pub fn vendor_variables() -> impl Iterator<Item = (OsString, OsString)> {
    env::vars_os().filter(|(name, _)| is_among(&VENDORS, name))
}

/// Whether a variable of ours goes to the process.
fn passes(name: &OsStr) -> bool {
    is_among(&VARIABLES, name) || is_among(&VENDORS, name)
}

fn is_among(patterns: &[&str], name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start.as_bytes()),
        None => name == pattern.as_bytes(),
    })
}
