//! Questions to a person through askpass: confirmation, PIN, a notice to touch. Knows no key and no vault.
//!
//! Each question is a process of its own, in a process group of its own, and waits for nothing else. Whoever stops
//! waiting for an answer closes its question.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    fmt,
    path::Path,
    pin::Pin,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use secrecy::SecretString;
use thiserror::Error;
use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
    runtime::Handle,
    task::{AbortHandle, spawn_blocking},
    time::{sleep, timeout},
};
use zeroize::Zeroizing;

/// Questions that may be open at once for one uid, and notices besides, unless the settings say otherwise.
pub const MAX_OPEN: usize = 16;
/// The longest answer, in bytes. FIDO PINs end at 63.
const MAX_ANSWER: usize = 1024;
/// How long a dismissed askpass may take to restore its terminal or window before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How much longer than the askpass itself what it started may take.
const SETTLE: Duration = Duration::from_millis(100);
/// Where distributions put their default askpass; the first is Debian's.
const DEFAULT_PROGRAMS: [&str; 5] = [
    "/usr/bin/ssh-askpass",
    "/usr/lib/ssh/ssh-askpass",
    "/usr/libexec/openssh/ssh-askpass",
    "/usr/libexec/ssh-askpass",
    "/usr/X11R6/bin/ssh-askpass",
];

/// Why a question has no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PromptError {
    /// The person said no, said nothing, or the answer was not one (too long, not UTF-8). Do not ask again unasked.
    #[error("the request was denied at the prompt")]
    Denied,
    /// The question was not shown. The request must be refused; the reason says what makes prompts work.
    #[error("nobody could be asked: {0}")]
    Unavailable(#[from] Unavailable),
    /// Nobody answered; the question is closed. The caller may ask again.
    #[error("nobody answered the prompt in time")]
    TimedOut,
    /// This uid has too many questions open. Ask again when one is answered.
    #[error("too many prompts are open already; answer or close one of them first")]
    TooMany,
}

/// Why a question cannot be shown.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Unavailable {
    /// There is no sign of a desktop, and nothing says that askpass works without one.
    #[error(
        "neither DISPLAY nor WAYLAND_DISPLAY is set; start the agent in the desktop session, or set SSH_ASKPASS_REQUIRE=force if the askpass needs no display"
    )]
    NoDisplay,
    /// `SSH_ASKPASS_REQUIRE=never`.
    #[error("SSH_ASKPASS_REQUIRE=never forbids it; unset it for the agent to allow prompts")]
    Forbidden,
    /// No askpass is named, and none is where distributions install it.
    #[error("there is no askpass program; install ssh-askpass or set SSH_ASKPASS to the path of one")]
    NoProgram,
    /// The askpass is named but does not start.
    #[error("{program} does not start ({reason}); set SSH_ASKPASS to the path of an askpass program")]
    CannotStart {
        /// As it was named.
        program: String,
        /// What the system says.
        reason: String,
    },
}

/// Where prompts look for `SSH_ASKPASS`, `SSH_ASKPASS_REQUIRE`, `DISPLAY` and `WAYLAND_DISPLAY`, at each prompt anew.
#[derive(Clone, Debug, Default)]
pub enum Environment {
    /// This process's.
    #[default]
    Process,
    /// These variables and no others. The askpass gets exactly these, too.
    Only(BTreeMap<OsString, OsString>),
}

impl Environment {
    /// A variable's value. An empty one counts as absent, as it does for ssh.
    fn get(&self, name: &str) -> Option<OsString> {
        match self {
            Self::Process => std::env::var_os(name),
            Self::Only(variables) => variables.get(OsStr::new(name)).cloned(),
        }
        .filter(|value| !value.is_empty())
    }
}

/// How people are asked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The askpass program, in place of `$SSH_ASKPASS` and the system's default.
    pub askpass: Option<OsString>,
    /// How long a question stays open.
    pub timeout: Duration,
    /// Questions that may be open at once for one uid, and notices besides.
    pub max_per_uid: usize,
    /// Where variables come from.
    pub environment: Environment,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            askpass: None,
            timeout: Duration::from_secs(60),
            max_per_uid: MAX_OPEN,
            environment: Environment::Process,
        }
    }
}

/// Asks people in another way than through askpass. Dropping a future closes its question.
pub trait Asker: fmt::Debug + Send + Sync + 'static {
    /// Asks for a yes or no; no is [`PromptError::Denied`].
    fn confirm(&self, text: &str) -> Asking<Result<(), PromptError>>;
    /// Asks for a PIN that is not empty.
    fn pin(&self, text: &str) -> Asking<Result<SecretString, PromptError>>;
    /// Shows a message for as long as the future lives and does not complete.
    fn notice(&self, text: &str) -> Asking<()>;
}

/// A question that is open.
pub type Asking<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Asks people. Cheap to clone; clones share the limit on open questions.
#[derive(Clone, Debug)]
pub struct Prompter {
    settings: Arc<Settings>,
    /// Who asks in place of askpass.
    asker: Option<Arc<dyn Asker>>,
    questions: Arc<Open>,
    notices: Arc<Open>,
}

impl Prompter {
    /// A prompter with no question open.
    pub fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), asker: None, questions: Arc::default(), notices: Arc::default() }
    }

    /// A prompter that has `asker` ask, within the time and the number that the settings allow.
    pub fn through(settings: Settings, asker: impl Asker) -> Self {
        Self { asker: Some(Arc::new(asker)), ..Self::new(settings) }
    }

    /// Asks for a yes or no on behalf of `uid`. Dropping the future closes the question.
    ///
    /// Yes is an askpass that exits with 0 and prints nothing or `yes` (in any case).
    pub async fn confirm(&self, uid: u32, text: &str) -> Result<(), PromptError> {
        if let Some(asker) = &self.asker {
            return self.wait(uid, asker.confirm(&printable(text))).await;
        }
        let answer = self.ask(uid, text, Some("confirm")).await?;
        let line = first_line(&answer);
        if line.is_empty() || line.eq_ignore_ascii_case(b"yes") { Ok(()) } else { Err(PromptError::Denied) }
    }

    /// Asks for a PIN on behalf of `uid`: the first line that askpass prints. An empty one is [`PromptError::Denied`]:
    /// sent to a device, it could cost a try. Dropping the future closes the question.
    pub async fn pin(&self, uid: u32, text: &str) -> Result<SecretString, PromptError> {
        if let Some(asker) = &self.asker {
            return self.wait(uid, asker.pin(&printable(text))).await;
        }
        let answer = self.ask(uid, text, None).await?;
        match std::str::from_utf8(first_line(&answer)) {
            Ok("") | Err(_) => Err(PromptError::Denied),
            Ok(pin) => Ok(SecretString::from(Box::<str>::from(pin))),
        }
    }

    /// Shows a message until the returned [`Notice`] is dropped. `None` when it cannot be shown: a notice is a courtesy,
    /// so the caller goes on without it. Never blocks; needs a Tokio runtime around it.
    pub fn notice(&self, uid: u32, text: &str) -> Option<Notice> {
        let runtime = Handle::try_current().ok()?;
        if let Some(asker) = &self.asker {
            let slot = self.notices.take(uid, self.settings.max_per_uid)?;
            let shown = asker.notice(&printable(text));
            let task = runtime.spawn(async move {
                shown.await;
                drop(slot);
            });
            return Some(Notice(task.abort_handle()));
        }
        self.settings.permit().inspect_err(|reason| tracing::debug!("no notice: {reason}")).ok()?;
        let slot = self.notices.take(uid, self.settings.max_per_uid)?;
        let (settings, text) = (self.settings.clone(), printable(text));
        let task = runtime.spawn(async move {
            match Askpass::start(settings, text, Some("none"), slot).await {
                Ok(mut askpass) => askpass.ended().await,
                Err(error) => tracing::debug!("no notice: {error}"),
            }
        });
        Some(Notice(task.abort_handle()))
    }

    /// Waits for an [`Asker`]'s answer.
    async fn wait<T>(&self, uid: u32, asking: Asking<Result<T, PromptError>>) -> Result<T, PromptError> {
        let _slot = self.questions.take(uid, self.settings.max_per_uid).ok_or(PromptError::TooMany)?;
        timeout(self.settings.timeout, asking).await.unwrap_or(Err(PromptError::TimedOut))
    }

    async fn ask(&self, uid: u32, text: &str, hint: Option<&'static str>) -> Result<Zeroizing<Vec<u8>>, PromptError> {
        self.settings.permit()?;
        let slot = self.questions.take(uid, self.settings.max_per_uid).ok_or(PromptError::TooMany)?;
        let answer = async {
            let mut askpass = Askpass::start(self.settings.clone(), printable(text), hint, slot).await?;
            askpass.answer().await.ok_or(PromptError::Denied)
        };
        timeout(self.settings.timeout, answer).await.unwrap_or(Err(PromptError::TimedOut))
    }
}

/// A message on somebody's screen; it goes when this is dropped.
#[derive(Debug)]
#[must_use = "the message goes when the notice is dropped"]
pub struct Notice(AbortHandle);

impl Drop for Notice {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One line of text for a prompt from what a peer or a device wrote: characters that would break the line, reorder it
/// or hide become U+FFFD, and a long text ends in `…` so that it cannot push the rest out of sight.
pub fn harmless(text: &str) -> String {
    const LONGEST: usize = 256;
    let mut chars = text.chars();
    let mut out: String = chars.by_ref().take(LONGEST).map(visible).collect();
    if chars.next().is_some() {
        out.push('…');
    }
    out
}

/// Stands in for controls, bidi marks, separators and what takes no space.
fn visible(c: char) -> char {
    match c {
        '\u{ad}'
        | '\u{61c}'
        | '\u{115f}'..='\u{1160}'
        | '\u{180e}'
        | '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{3164}'
        | '\u{feff}'
        | '\u{ffa0}'
        | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e0fff}' => char::REPLACEMENT_CHARACTER,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

/// The whole prompt as it goes on askpass's command line: its own line breaks stay, nothing else invisible does.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c == '\n' { c } else { visible(c) }).collect()
}

fn first_line(answer: &[u8]) -> &[u8] {
    answer.split(|b| matches!(b, b'\r' | b'\n')).next().unwrap_or_default()
}

impl Settings {
    /// Whether askpass may be run at all (readpass.c of OpenSSH).
    fn permit(&self) -> Result<(), Unavailable> {
        let require = self.environment.get("SSH_ASKPASS_REQUIRE").unwrap_or_default();
        if require.eq_ignore_ascii_case("force") {
            return Ok(());
        }
        if require.eq_ignore_ascii_case("never") {
            return Err(Unavailable::Forbidden);
        }
        let display = ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| self.environment.get(name).is_some());
        if display { Ok(()) } else { Err(Unavailable::NoDisplay) }
    }

    fn program(&self) -> Result<OsString, Unavailable> {
        self.askpass
            .clone()
            .or_else(|| self.environment.get("SSH_ASKPASS"))
            .or_else(|| DEFAULT_PROGRAMS.iter().find(|path| Path::new(path).exists()).map(OsString::from))
            .ok_or(Unavailable::NoProgram)
    }
}

/// A running askpass.
struct Askpass {
    /// None only while it is being dropped.
    running: Option<(Child, Slot)>,
}

impl Askpass {
    /// Starts it on a thread that may block: the program can lie on a slow disk or a dead network.
    async fn start(
        settings: Arc<Settings>,
        text: String,
        hint: Option<&'static str>,
        slot: Slot,
    ) -> Result<Self, Unavailable> {
        let cannot_start = |program: &OsStr, reason: String| Unavailable::CannotStart {
            program: program.to_string_lossy().into_owned(),
            reason,
        };
        spawn_blocking(move || {
            let program = settings.program()?;
            let mut command = Command::new(&program);
            if let Environment::Only(variables) = &settings.environment {
                command.env_clear().envs(variables);
            }
            match hint {
                Some(hint) => command.env("SSH_ASKPASS_PROMPT", hint),
                None => command.env_remove("SSH_ASKPASS_PROMPT"),
            };
            // A notice has no answer that anybody would read.
            let stdout = if hint == Some("none") { Stdio::null() } else { Stdio::piped() };
            command.arg(text).stdin(Stdio::null()).stdout(stdout).process_group(0).kill_on_drop(true);
            let child = command.spawn().map_err(|error| cannot_start(&program, error.to_string()))?;
            Ok(Self { running: Some((child, slot)) })
        })
        .await
        .unwrap_or_else(|error| Err(cannot_start(OsStr::new("askpass"), error.to_string())))
    }

    /// What it prints before it ends; nothing unless it exits with 0 and prints no more than it may.
    async fn answer(&mut self) -> Option<Zeroizing<Vec<u8>>> {
        let (child, _) = self.running.as_mut()?;
        let mut stdout = child.stdout.take()?;
        let mut answer = Zeroizing::new(vec![0; MAX_ANSWER + 1]);
        let mut len = 0;
        loop {
            match stdout.read(&mut answer[len..]).await.ok()? {
                0 => break,
                n => len += n,
            }
            if len > MAX_ANSWER {
                return None;
            }
        }
        answer.truncate(len);
        child.wait().await.ok()?.success().then_some(answer)
    }

    /// Until it ends by itself.
    async fn ended(&mut self) {
        if let Some((child, _)) = &mut self.running {
            let _ = child.wait().await;
        }
    }
}

impl Drop for Askpass {
    /// Ends the askpass with all that it started: a script's own children share its group.
    fn drop(&mut self) {
        let Some((mut child, slot)) = self.running.take() else { return };
        // None once it was waited for; until then the number cannot belong to another group.
        let Some(group) = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) else { return };
        let _ = kill_process_group(group, Signal::TERM);
        // Without a runtime there is no time to be patient: kill_on_drop does the rest.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            if timeout(GRACE, exited(group)).await.is_ok() {
                sleep(SETTLE).await;
            }
            // Not yet reaped, so the number is still this group's: a signal can be lost between fork and exec.
            let _ = kill_process_group(group, Signal::KILL);
            let _ = child.wait().await;
            drop(slot);
        });
    }
}

/// Waits until a child has ended, without reaping it: Tokio's own wait would free its number.
async fn exited(child: Pid) {
    const TICK: Duration = Duration::from_millis(10);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while let Ok(None) = waitid(WaitId::Pid(child), options) {
        sleep(TICK).await;
    }
}

/// How many askpasses each uid has open.
#[derive(Debug, Default)]
struct Open(Mutex<HashMap<u32, usize>>);

impl Open {
    fn take(self: &Arc<Self>, uid: u32, max: usize) -> Option<Slot> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(uid).or_default();
        (*count < max).then(|| {
            *count += 1;
            Slot { uid, open: self.clone() }
        })
    }
}

/// One of a uid's places; it is given back when the askpass is gone.
struct Slot {
    uid: u32,
    open: Arc<Open>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.open.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_stays_on_one_visible_line() {
        assert_eq!(harmless("me@host"), "me@host");
        assert_eq!(
            harmless("a\nb\0c\u{202e}d\u{2066}e\u{85}f\u{200b}g"),
            "a\u{fffd}b\u{fffd}c\u{fffd}d\u{fffd}e\u{fffd}f\u{fffd}g"
        );
        assert_eq!(harmless("ключ 鍵"), "ключ 鍵");
        let long = harmless(&"x".repeat(100_000));
        assert_eq!((long.chars().count(), long.ends_with('…')), (257, true));
        assert_eq!(printable("a\nb\rc\u{1b}[2J"), "a\nb\u{fffd}c\u{fffd}[2J");
    }
}
