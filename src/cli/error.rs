//! What a subcommand could not do: its words, what to do about it, its exit code. Knows no socket.

use std::{borrow::Cow, io, path::PathBuf, process::ExitCode};

use serde_json::{Value, json};
use thiserror::Error;

use crate::{
    agent::message::Code,
    client::ClientError,
    config::ConfigError,
    daemon::DaemonError,
    devices::{DeviceError, host::child::ChildError},
    key_file::KeyFileError,
    prompt::printable,
    vault::store::StoreError,
};

/// How a command ends. The list is closed: scripts may rely on each number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Failed = 1,
    Usage = 2,
    Refused = 3,
    NoSuchKey = 4,
    Locked = 5,
    PinRefused = 6,
    Timeout = 7,
    NotNow = 8,
    NoDaemon = 9,
    Unsupported = 10,
    BadSignature = 11,
    Altered = 12,
}

impl Exit {
    /// Every code but 0, with its meaning.
    pub(super) const ALL: [(Self, &'static str); 12] = [
        (Self::Failed, "Something else failed; the message says what."),
        (Self::Usage, "The command line was not understood, or an input is not what it says."),
        (Self::Refused, "A person, the key's constraints or the rules are against it."),
        (Self::NoSuchKey, "There is no such key or device, or a name fits several."),
        (Self::Locked, "A PIN or the vault's password is needed first, or a person who cannot be asked."),
        (Self::PinRefused, "A PIN or password was refused, or the PIN is blocked."),
        (Self::Timeout, "There was no answer, or no touch, in time."),
        (Self::NotNow, "The device is absent, busy or restarted: try again."),
        (Self::NoDaemon, "No daemon listens at the socket, or it went away."),
        (Self::Unsupported, "The key, the device or this version cannot do it."),
        (Self::BadSignature, "The signature is not valid."),
        (Self::Altered, "The audit log is not what was written."),
    ];
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl From<Code> for Exit {
    fn from(code: Code) -> Self {
        match code {
            Code::Denied | Code::NotPermitted => Self::Refused,
            Code::NoSuchKey => Self::NoSuchKey,
            Code::Locked | Code::PinRequired | Code::NoPrompt | Code::ProofRequired => Self::Locked,
            Code::PinWrong | Code::PinBlocked | Code::WrongPassword => Self::PinRefused,
            Code::Timeout | Code::NotTouched => Self::Timeout,
            Code::Absent | Code::Busy | Code::Restarted | Code::Cancelled | Code::Full => Self::NotNow,
            Code::Unsupported | Code::TooLong => Self::Unsupported,
            Code::BadRequest => Self::Usage,
            Code::NotLocked | Code::Failed => Self::Failed,
        }
    }
}

/// What a subcommand could not do. The message says what happened; the remedy is the line below it.
#[derive(Debug, Error)]
pub(super) enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    DeviceHost(#[from] ChildError),
    #[error("{path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("standard output: {0}")]
    Output(io::Error),
    #[error("{0}")]
    Client(#[from] ClientError),
    #[error("no key has the name `{0}`")]
    NoSuchKey(String),
    #[error("`{name}` is the name of several keys:\n{}", candidates.join("\n"))]
    Ambiguous { name: String, candidates: Vec<String> },
    #[error("{path}: {why}", path = path.display())]
    NotAKey { path: PathBuf, why: String },
    #[error("{path}: {error}", path = path.display())]
    KeyFile { path: PathBuf, error: KeyFileError },
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Unsupported(String),
    /// No try of a PIN is left, so that it is not asked for; the message says what helps.
    #[error("{0}")]
    Blocked(String),
    #[error("this is binary, and standard output is a terminal")]
    Binary,
    #[error("nothing can be asked on a terminal: {0}")]
    NoTerminal(io::Error),
    #[error("the signature is not valid")]
    BadSignature,
    #[error("the runtime cannot start: {0}")]
    Runtime(io::Error),
    #[error("{file} has no device `{name}`{}", listed(names), file = file.display())]
    NoSuchDevice { name: String, file: PathBuf, names: Vec<String> },
    #[error("{module}: {error}", module = module.display())]
    Module { module: PathBuf, error: DeviceError },
    #[error("{module} has no token to add{}", because(why), module = module.display())]
    NoToken { module: PathBuf, why: Vec<String> },
    #[error("{module} has several tokens:\n{}", uris.join("\n"), module = module.display())]
    SeveralTokens { module: PathBuf, uris: Vec<String> },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the audit log is not what was written; places where it is not: {faults}")]
    Altered { faults: u64, report: Value },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; it has {}", names.join(", ")) }
}

fn because(why: &[String]) -> String {
    if why.is_empty() { String::new() } else { format!(":\n{}", why.join("\n")) }
}

impl CliError {
    /// What the person can do about it; `None` where the message says so itself.
    pub(super) fn remedy(&self) -> Option<Cow<'static, str>> {
        let words = match self {
            Self::Config(error) => error.remedy(),
            Self::Daemon(_) | Self::Usage(_) | Self::Unsupported(_) | Self::Blocked(_) | Self::Store(_) => return None,
            Self::DeviceHost(_) => "Only the daemon starts this; look into its log.",
            Self::File { .. } => "Name a file or directory that is there and that you may use.",
            Self::Output(_) => "Send the output to a file or a program that takes it.",
            Self::Client(error) => return of_client(error).map(Cow::Borrowed),
            Self::NoSuchKey(_) => "`strongroom keys` lists the names, comments and fingerprints that there are.",
            Self::Ambiguous { .. } => "Name the one that you mean by its fingerprint.",
            Self::NotAKey { .. } => "Name a `.pub` file, a PEM or DER file with a public key, or a certificate.",
            Self::KeyFile { error: KeyFileError::PassphraseNeeded | KeyFileError::WrongPassphrase, .. } => {
                "Type it on the terminal, or give it on standard input with --stdin."
            }
            Self::KeyFile { .. } => "Name a file with a private key.",
            Self::Binary => "Say --hex or --base64, or name a file with --out.",
            Self::NoTerminal(_) => {
                "Run it in a terminal, or answer in advance: a PIN with --stdin, a name with --name, a card with --serial."
            }
            Self::BadSignature => "Check that key, scheme, signature and data belong together.",
            Self::Altered { .. } => "Keep the files as they are, and find out who could write to them.",
            Self::Runtime(_) => "Free some memory or file descriptors, and try again.",
            Self::NoSuchDevice { .. } => "Name one of its devices, or another file with --config.",
            Self::Module { error: DeviceError::Timeout, .. } => {
                "Give it more time with --deadline, or see what it waits for."
            }
            Self::Module { .. } => "Name a PKCS#11 module; `strongroom device scan` finds those that are installed.",
            Self::NoToken { .. } => "Put the token in, or initialise it with its own tools.",
            Self::SeveralTokens { .. } => "Say which one with --token.",
        };
        Some(Cow::Borrowed(words))
    }

    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::KeyFile { error: KeyFileError::WrongPassphrase, .. } | Self::Blocked(_) => Exit::PinRefused,
            Self::KeyFile { error: KeyFileError::PassphraseNeeded, .. } => Exit::Locked,
            Self::KeyFile { .. } | Self::Usage(_) | Self::NotAKey { .. } | Self::Binary => Exit::Usage,
            Self::NoSuchKey(_)
            | Self::Ambiguous { .. }
            | Self::NoSuchDevice { .. }
            | Self::NoToken { .. }
            | Self::SeveralTokens { .. } => Exit::NoSuchKey,
            Self::Module { error, .. } => Exit::from(Code::from(error)),
            Self::NoTerminal(_) => Exit::Locked,
            Self::BadSignature => Exit::BadSignature,
            Self::Altered { .. } => Exit::Altered,
            Self::Unsupported(_) => Exit::Unsupported,
            Self::Client(ClientError::Unreachable { .. } | ClientError::Lost) => Exit::NoDaemon,
            Self::Client(error) => error.code().map_or(Exit::Failed, Exit::from),
            Self::Config(_)
            | Self::Daemon(_)
            | Self::DeviceHost(_)
            | Self::File { .. }
            | Self::Output(_)
            | Self::Store(_)
            | Self::Runtime(_) => Exit::Failed,
        }
    }

    /// The reason, for programs: a code of the protocol's, or one of the command line's own.
    fn code(&self) -> &'static str {
        match self {
            Self::Client(error) => match (error.code(), error) {
                (Some(code), _) => code.as_str(),
                (None, ClientError::Unreachable { .. }) => "unreachable",
                (None, ClientError::Lost) => "lost",
                (None, _) => Code::Failed.as_str(),
            },
            Self::NoSuchKey(_) => Code::NoSuchKey.as_str(),
            Self::Ambiguous { .. } | Self::SeveralTokens { .. } => "ambiguous",
            Self::NoSuchDevice { .. } | Self::NoToken { .. } => Code::NoSuchKey.as_str(),
            Self::Module { error, .. } => Code::from(error).as_str(),
            Self::KeyFile { error: KeyFileError::WrongPassphrase, .. } => "wrong_passphrase",
            Self::KeyFile { error: KeyFileError::PassphraseNeeded, .. } => "passphrase_needed",
            Self::Usage(_) | Self::NotAKey { .. } | Self::KeyFile { .. } | Self::Binary => "usage",
            Self::NoTerminal(_) => "no_terminal",
            Self::BadSignature => "bad_signature",
            Self::Altered { .. } => "altered",
            Self::Unsupported(_) => Code::Unsupported.as_str(),
            Self::Blocked(_) => Code::PinBlocked.as_str(),
            _ => Code::Failed.as_str(),
        }
    }

    /// Whether it is about a reader who has had enough, and nobody is there to be told.
    pub(super) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// For standard error: message and remedy. What others wrote in it does no harm to a terminal.
    pub(super) fn text(&self) -> String {
        let mut text = format!("strongroom: {}\n", printable(&self.to_string()));
        if let Some(remedy) = self.remedy() {
            text.push_str(&format!("  {remedy}\n"));
        }
        text
    }

    /// For `--json`: docs/cli.md has its fields.
    pub(super) fn json(&self) -> Value {
        let client = match self {
            Self::Client(error) => Some(error),
            _ => None,
        };
        let mut value = json!({ "error": {
            "code": self.code(),
            "exit": self.exit() as u8,
            "message": self.to_string(),
            "remedy": self.remedy(),
            "tries_left": client.and_then(ClientError::tries_left),
            "retry_after_ms": client.and_then(ClientError::retry_after).map(|time| time.as_millis()),
        }});
        if let Self::Altered { report, .. } = self {
            value["audit"] = report.clone();
        }
        value
    }
}

fn of_client(error: &ClientError) -> Option<&'static str> {
    Some(match error {
        // A reason that names a command says itself what to do.
        ClientError::Refused(failure) if failure.message.contains("`strongroom ") => return None,
        ClientError::Refused(failure) => return of_code(failure.code),
        ClientError::Unreachable { .. } => {
            "Start it with `strongroom agent`, or name its service door with --socket or STRONGROOM_SOCKET."
        }
        ClientError::Lost => "See whether the daemon runs, and what its log says; then try again.",
        ClientError::NoAnswer => "`strongroom status` shows what keeps the devices; --deadline gives more time.",
        ClientError::Unsupported(_) => "Name the service door with --socket or STRONGROOM_SOCKET.",
        ClientError::TooLong(_) => "Give the digest with --prehashed, where the scheme has a hash.",
        ClientError::Protocol(_) => "Name the socket of an agent with --socket or STRONGROOM_SOCKET.",
        ClientError::Ended => return None,
    })
}

/// The codes' "what the caller can do" of docs/protocol.md, in terms of the command line.
fn of_code(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::Locked => "Unlock the vault with `ssh-add -X`, the store with `strongroom unlock`; then try again.",
        Code::ProofRequired => "Type the passphrase on the terminal, or give it with --passphrase-stdin.",
        Code::WrongPassword => "Ask its owner; each attempt waits longer.",
        Code::NoSuchKey => "`strongroom keys` and `strongroom status` list what there is.",
        Code::PinRequired => "Give the PIN with `strongroom unlock`, then try again.",
        Code::PinWrong => "Ask its owner for the PIN; `strongroom status` shows the tries that are left.",
        Code::NotTouched => "Try again, and touch the device when it blinks.",
        Code::Absent => "Connect the device; its keys stay registered.",
        Code::Busy => "Try again in a moment; `strongroom status` shows what is waiting.",
        Code::Timeout => "`strongroom status` shows what keeps the device; --deadline gives more time.",
        Code::Restarted => "Try again.",
        Code::Unsupported => "`strongroom keys KEY` lists what the key can do.",
        Code::TooLong => "Give the digest with --prehashed, where the scheme has a hash.",
        Code::Denied => "Ask whoever said no; `strongroom why` has the reason.",
        Code::Cancelled => "Try again once the daemon is up; `strongroom status` tells.",
        Code::NotPermitted => {
            "`strongroom keys KEY` lists what the key may do; `strongroom key allow` lets it do more."
        }
        Code::NoPrompt => "Give the PIN with `strongroom unlock`, or give the daemon an askpass program.",
        Code::Full => "Remove a key with `ssh-add -d`.",
        // The message says it.
        Code::PinBlocked | Code::NotLocked | Code::BadRequest | Code::Failed => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::message::Failure;

    fn refused(code: Code) -> CliError {
        CliError::Client(ClientError::Refused(Failure::new(code, "no")))
    }

    #[test]
    fn the_exit_codes_are_a_closed_list_without_gaps() {
        let numbers: Vec<_> = Exit::ALL.iter().map(|(exit, _)| *exit as u8).collect();
        assert_eq!(numbers, (1..=12).collect::<Vec<u8>>());
        for code in Code::ALL {
            assert!(Exit::ALL.iter().any(|(exit, _)| *exit == refused(*code).exit()));
        }
    }

    #[test]
    fn what_others_wrote_does_not_reach_the_terminal_as_it_is() {
        let error = CliError::Client(ClientError::Refused(Failure::new(Code::Failed, "a\u{1b}[2J\u{202e}b")));
        assert_eq!(error.text(), "strongroom: a\u{fffd}[2J\u{fffd}b\n");
    }

    #[test]
    fn a_reason_that_names_a_command_has_no_other_remedy() {
        let failure = Failure::new(Code::Unsupported, "there is no store yet; `strongroom init` makes one");
        assert_eq!(CliError::Client(ClientError::Refused(failure)).remedy(), None);
        assert!(refused(Code::Unsupported).remedy().is_some());
    }

    #[test]
    fn every_remedy_is_a_sentence() {
        let file = CliError::File { path: "/x".into(), source: io::ErrorKind::PermissionDenied.into() };
        let others =
            [file, CliError::Output(io::ErrorKind::BrokenPipe.into()), CliError::Binary, CliError::BadSignature];
        assert!(others.iter().all(|error| error.remedy().is_some()));
        for error in Code::ALL.iter().map(|code| refused(*code)).chain(others) {
            assert!(error.remedy().is_none_or(|remedy| remedy.ends_with('.')), "{error}");
        }
    }
}
