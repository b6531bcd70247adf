//! Questions to a person through askpass or pinentry: confirmation, PIN, a notice to touch. Knows no key and no vault.
//!
//! Each question is a process of its own, in a process group of its own, and waits for nothing else. Whoever stops
//! waiting for an answer closes its question.

mod askpass;
mod notify;
mod pinentry;
mod program;

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    ffi::{OsStr, OsString},
    fmt,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use secrecy::SecretString;
use thiserror::Error;
use tokio::{runtime::Handle, sync::oneshot, time::timeout};
use zeroize::Zeroizing;

use program::Program;

/// Questions that may be open at once for one uid, and notices besides, unless the settings say otherwise.
pub const MAX_OPEN: usize = 16;
/// The longest answer, in bytes. FIDO PINs end at 63.
const MAX_ANSWER: usize = 1024;
/// Where distributions put their default askpass; the first is Debian's.
const DEFAULT_PROGRAMS: [&str; 5] = [
    "/usr/bin/ssh-askpass",
    "/usr/lib/ssh/ssh-askpass",
    "/usr/libexec/openssh/ssh-askpass",
    "/usr/libexec/ssh-askpass",
    "/usr/X11R6/bin/ssh-askpass",
];
/// What asks where there is no askpass: GnuPG's.
const DEFAULT_PINENTRY: &str = "/usr/bin/pinentry";

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
        "neither DISPLAY nor WAYLAND_DISPLAY is set; start the agent in the desktop session, or set \
         SSH_ASKPASS_REQUIRE=force if the askpass needs no display, or GPG_TTY to the terminal of a pinentry"
    )]
    NoDisplay,
    /// `SSH_ASKPASS_REQUIRE=never`.
    #[error("SSH_ASKPASS_REQUIRE=never forbids it; unset it for the agent to allow prompts")]
    Forbidden,
    /// Neither askpass nor pinentry is named, and none is where distributions install them.
    #[error(
        "there is no askpass program; install ssh-askpass or pinentry, or set SSH_ASKPASS to the path of an askpass"
    )]
    NoProgram,
    /// The program is named but does not start, or is no pinentry.
    #[error(
        "{program} does not start ({reason}); name another with `askpass` or `pinentry` in [prompt], or SSH_ASKPASS"
    )]
    CannotStart {
        /// As it was named.
        program: String,
        /// What the system says.
        reason: String,
    },
}

/// Where prompts look for `SSH_ASKPASS`, `SSH_ASKPASS_REQUIRE`, `DISPLAY`, `WAYLAND_DISPLAY` and `GPG_TTY`, at each prompt
/// anew.
#[derive(Clone, Debug, Default)]
pub enum Environment {
    /// This process's.
    #[default]
    Process,
    /// These variables and no others. The program gets exactly these, too.
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
    /// A pinentry in place of every askpass but the one above.
    pub pinentry: Option<OsString>,
    /// How long a question stays open.
    pub timeout: Duration,
    /// Questions that may be open at once for one uid, and notices besides.
    pub max_per_uid: usize,
    /// Where variables come from.
    pub environment: Environment,
    /// Whether notices go to the desktop, by `notify-send`, and to askpass only where that does not show them.
    pub notifications: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            askpass: None,
            pinentry: None,
            timeout: Duration::from_secs(60),
            max_per_uid: MAX_OPEN,
            environment: Environment::Process,
            notifications: false,
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
    /// Yes is an askpass that exits with 0 and prints nothing or `yes` (in any case), or pinentry's button for it.
    pub async fn confirm(&self, uid: u32, text: &str) -> Result<(), PromptError> {
        if let Some(asker) = &self.asker {
            return self.wait(uid, asker.confirm(&printable(text))).await;
        }
        let answer = self.ask(uid, text, Kind::Confirm).await?;
        if answer.is_empty() || answer.eq_ignore_ascii_case(b"yes") { Ok(()) } else { Err(PromptError::Denied) }
    }

    /// Asks for a PIN on behalf of `uid`: the first line that askpass prints, or what is typed into pinentry. An empty one is [`PromptError::Denied`]:
    /// sent to a device, it could cost a try. Dropping the future closes the question.
    pub async fn pin(&self, uid: u32, text: &str) -> Result<SecretString, PromptError> {
        if let Some(asker) = &self.asker {
            return self.wait(uid, asker.pin(&printable(text))).await;
        }
        self.secret(uid, text, "PIN:").await
    }

    /// Asks for a passphrase, as [`pin`](Self::pin) does for a PIN.
    pub async fn passphrase(&self, uid: u32, text: &str) -> Result<SecretString, PromptError> {
        match &self.asker {
            Some(asker) => self.wait(uid, asker.pin(&printable(text))).await,
            None => self.secret(uid, text, "Passphrase:").await,
        }
    }

    async fn secret(&self, uid: u32, text: &str, label: &'static str) -> Result<SecretString, PromptError> {
        let answer = self.ask(uid, text, Kind::Secret(label)).await?;
        match std::str::from_utf8(&answer) {
            Ok("") | Err(_) => Err(PromptError::Denied),
            Ok(pin) => Ok(SecretString::from(Box::<str>::from(pin))),
        }
    }

    /// Shows a message until the returned [`Notice`] is dropped. `None` when it cannot be shown: a notice is a courtesy,
    /// so the caller goes on without it. Never blocks; needs a Tokio runtime around it.
    pub fn notice(&self, uid: u32, text: &str) -> Option<Notice> {
        let runtime = Handle::try_current().ok()?;
        let (notice, mut dropped) = oneshot::channel();
        if let Some(asker) = &self.asker {
            let slot = self.notices.take(uid, self.settings.max_per_uid)?;
            let shown = asker.notice(&printable(text));
            runtime.spawn(async move {
                until(dropped, shown).await;
                drop(slot);
            });
            return Some(Notice(notice));
        }
        let settings = &self.settings;
        let desktop = settings.notifications.then(|| notify::program(&settings.environment)).flatten();
        let permitted = settings.permit();
        if let (None, Err(reason)) = (&desktop, &permitted) {
            tracing::debug!("no notice: {reason}");
            return None;
        }
        let slot = self.notices.take(uid, self.settings.max_per_uid)?;
        let (settings, text) = (self.settings.clone(), printable(text));
        runtime.spawn(async move {
            if let Some(program) = desktop
                && let Some(shown) = notify::show(&settings.environment, &program, &text).await
            {
                let _ = (&mut dropped).await;
                shown.withdraw(&settings.environment).await;
                drop(slot);
                return;
            }
            if permitted.is_err() {
                return;
            }
            let asked = async {
                if let Err(error) = ask(settings, text, Kind::Notice, slot).await {
                    tracing::debug!("no notice: {error}");
                }
            };
            until(dropped, asked).await;
        });
        Some(Notice(notice))
    }

    /// Waits for an [`Asker`]'s answer.
    async fn wait<T>(&self, uid: u32, asking: Asking<Result<T, PromptError>>) -> Result<T, PromptError> {
        let _slot = self.questions.take(uid, self.settings.max_per_uid).ok_or(PromptError::TooMany)?;
        timeout(self.settings.timeout, asking).await.unwrap_or(Err(PromptError::TimedOut))
    }

    async fn ask(&self, uid: u32, text: &str, kind: Kind) -> Result<Zeroizing<Vec<u8>>, PromptError> {
        self.settings.permit()?;
        let slot = self.questions.take(uid, self.settings.max_per_uid).ok_or(PromptError::TooMany)?;
        // In a place of its own: all that may have to ask would be as large.
        let answer = Box::pin(ask(self.settings.clone(), printable(text), kind, slot));
        timeout(self.settings.timeout, answer).await.unwrap_or(Err(PromptError::TimedOut))
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Confirm,
    /// With what stands before the field, where there is one.
    Secret(&'static str),
    Notice,
}

/// A program that asks, and how it is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Tool {
    Askpass(OsString),
    Pinentry(OsString),
}

impl Tool {
    /// As the program was named.
    fn name(&self) -> &OsStr {
        match self {
            Self::Askpass(name) | Self::Pinentry(name) => name,
        }
    }
}

/// Has a program ask, and gives what it answered: one line, empty for a plain yes. The program ends with the future.
async fn ask(settings: Arc<Settings>, text: String, kind: Kind, slot: Slot) -> Result<Zeroizing<Vec<u8>>, PromptError> {
    let program = Program::start(settings, text.clone(), kind, slot).await?;
    match program.tool() {
        Tool::Askpass(_) => askpass::converse(program, kind).await,
        Tool::Pinentry(_) => pinentry::converse(program, &text, kind).await,
    }
}

/// A message on somebody's screen; it goes when this is dropped.
#[derive(Debug)]
#[must_use = "the message goes when the notice is dropped"]
pub struct Notice(#[expect(dead_code, reason = "its end is what is told")] oneshot::Sender<Infallible>);

/// Has something done for as long as a notice lives.
async fn until(dropped: oneshot::Receiver<Infallible>, shown: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        _ = dropped => {}
        () = shown => {}
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
pub fn visible(c: char) -> char {
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

/// A text of several lines, such as a whole prompt: its line breaks stay, nothing else invisible does.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c == '\n' { c } else { visible(c) }).collect()
}

impl Settings {
    /// Whether a program may ask at all, and on what it could (for askpass as in readpass.c of OpenSSH).
    fn permit(&self) -> Result<(), Unavailable> {
        let require = self.environment.get("SSH_ASKPASS_REQUIRE").unwrap_or_default();
        if require.eq_ignore_ascii_case("never") {
            return Err(Unavailable::Forbidden);
        }
        let any = |names: &[&str]| names.iter().any(|name| self.environment.get(name).is_some());
        // A pinentry may draw into a terminal, when it knows which.
        let terminal =
            self.askpass.is_none() && any(&["GPG_TTY"]) && (self.pinentry.is_some() || !any(&["SSH_ASKPASS"]));
        let screen = terminal || any(&["DISPLAY", "WAYLAND_DISPLAY"]);
        if screen || require.eq_ignore_ascii_case("force") { Ok(()) } else { Err(Unavailable::NoDisplay) }
    }

    /// The program that asks. Looks into the file system, which may take its time.
    fn tool(&self) -> Result<Tool, Unavailable> {
        let installed = |path: &&str| Path::new(path).exists();
        let askpass = self.askpass.clone().map(Tool::Askpass);
        askpass
            .or_else(|| self.pinentry.clone().map(Tool::Pinentry))
            .or_else(|| self.environment.get("SSH_ASKPASS").map(Tool::Askpass))
            .or_else(|| DEFAULT_PROGRAMS.iter().find(|path| installed(path)).map(|path| Tool::Askpass(path.into())))
            .or_else(|| Some(DEFAULT_PINENTRY).filter(installed).map(|path| Tool::Pinentry(path.into())))
            .ok_or(Unavailable::NoProgram)
    }
}

/// How many programs each uid has open.
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

/// One of a uid's places; it is given back when the program is gone.
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
