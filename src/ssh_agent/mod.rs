//! The drop-in `ssh-agent`: its command line, its output, its socket and its exit codes. Knows ssh-agent(1), and of
//! the agent itself only that [`daemon::serve_ssh_agent`] serves a listener.

mod options;
mod shell;
mod socket;
mod spawn;

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

use self::options::{Action, CommandLine, USAGE};
use self::shell::Shell;
use self::socket::Place;
use crate::daemon::{self, Ended, Foreground};
use crate::sys::process;
use crate::sys::socket_file::SocketFile;

const SOCKET_VARIABLE: &str = "SSH_AUTH_SOCK";
const PID_VARIABLE: &str = "SSH_AGENT_PID";
/// The exit code of an agent that was told to end.
const ENDED_BY_SIGNAL: u8 = 2;

/// Runs the command line that follows the program's name. For the start of the program: it closes descriptors.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    run(args).unwrap_or_else(|failure| {
        let message = match failure {
            Failure::Usage(_) => failure.to_string(),
            _ => format!("ssh-agent: {failure}"),
        };
        let _ = writeln!(io::stderr(), "{message}");
        failure.exit_code()
    })
}

fn run(args: impl Iterator<Item = OsString>) -> Result<ExitCode, Failure> {
    process::harden().map_err(Failure::Serve)?;
    let mut args = args.peekable();
    if args.next_if(|first| first == spawn::SERVE).is_some() {
        return spawn::serve(args);
    }
    let line = CommandLine::parse(args, env::var_os("SHELL").as_deref())?;
    match &line.action {
        Action::Version => {
            let _ = writeln!(io::stderr(), "strongroom {}, {}", env!("CARGO_PKG_VERSION"), process::crypto_library());
            Ok(ExitCode::SUCCESS)
        }
        Action::Kill => kill(line.shell),
        Action::Clean { any_name } => {
            socket::remove_stale(*any_name)?;
            print(b"Deleted stale agent sockets in ~/.ssh/agent\n")?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Foreground { debug } => {
            let debug = *debug;
            foreground(line, debug)
        }
        Action::Daemon => behind_shell(&line),
        Action::Run(program, arguments) => behind_command(&line, program, arguments),
    }
}

/// `-k`: ends the agent that the environment names.
fn kill(shell: Shell) -> Result<ExitCode, Failure> {
    let text = env::var_os(PID_VARIABLE).ok_or(Failure::NoPid)?;
    let pid = text.to_str().and_then(|t| t.parse().ok()).filter(|&pid: &i32| pid >= 2).and_then(Pid::from_raw);
    let pid = pid.ok_or(Failure::BadPid(text))?;
    kill_process(pid, Signal::TERM).map_err(|e| Failure::Kill(pid, e.into()))?;
    let lines = format!("{}{}echo Agent pid {pid} killed;\n", shell.unset(SOCKET_VARIABLE), shell.unset(PID_VARIABLE));
    print(lines.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// `-D` and `-d`: this process is the agent.
fn foreground(line: CommandLine, debug: bool) -> Result<ExitCode, Failure> {
    let (listener, file, lines) = match activated(&line.place)? {
        Some(listener) => (listener, None, Vec::new()),
        None => {
            process::close_inherited();
            let bound = line.place.bind()?;
            let mut lines = line.shell.set(SOCKET_VARIABLE, &line.shell.quote(&bound.path));
            lines.extend_from_slice(format!("echo Agent pid {};\n", std::process::id()).as_bytes());
            (bound.listener, Some(bound.file), lines)
        }
    };
    let ready = || {
        // Whoever starts an agent in the foreground may know the path already, and not read.
        let _ = print(&lines);
        Ok(())
    };
    let foreground = Foreground { interactive: true, debug, parent: None };
    let ended = daemon::serve_ssh_agent(listener, line.agent, foreground, ready).map_err(Failure::Serve)?;
    match (ended, file) {
        (Ended::Terminated, None) => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::from(ENDED_BY_SIGNAL)),
    }
}

/// The socket that systemd passed, if the environment says that it did and `-a` does not say otherwise.
fn activated(place: &Place) -> Result<Option<UnixListener>, Failure> {
    let (Some(pid), Some(count)) = (env::var_os("LISTEN_PID"), env::var_os("LISTEN_FDS")) else { return Ok(None) };
    if matches!(place, Place::At(_)) {
        return Ok(None);
    }
    let refused = |why: String| Err(Failure::Activation(io::Error::new(ErrorKind::InvalidInput, why)));
    let own = std::process::id();
    if count != "1" {
        return refused(format!("LISTEN_FDS is {}: pass exactly one socket", count.display()));
    }
    if pid != *own.to_string() {
        return refused(format!("LISTEN_PID is {}, and this is process {own}: unset LISTEN_PID", pid.display()));
    }
    process::inherited_listener().map(Some).map_err(Failure::Activation)
}

/// No command: a process in the background is the agent, and the shell is told of it.
fn behind_shell(line: &CommandLine) -> Result<ExitCode, Failure> {
    let (pid, file, path) = start(line, None)?;
    file.leave();
    let mut lines = line.shell.set(SOCKET_VARIABLE, &line.shell.quote(&path));
    lines.extend(line.shell.set(PID_VARIABLE, pid.to_string().as_bytes()));
    lines.extend_from_slice(format!("echo Agent pid {pid};\n").as_bytes());
    print(&lines).inspect_err(|_| {
        // An agent that nobody can find is of no use.
        let _ = kill_process(pid, Signal::TERM);
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A command: this process becomes it, and the agent ends with it.
fn behind_command(line: &CommandLine, program: &OsStr, arguments: &[OsString]) -> Result<ExitCode, Failure> {
    let (pid, file, path) = start(line, Some(std::process::id()))?;
    file.leave();
    let error =
        Command::new(program).args(arguments).env(SOCKET_VARIABLE, path).env(PID_VARIABLE, pid.to_string()).exec();
    Err(Failure::Exec(program.to_owned(), error))
}

fn start(line: &CommandLine, parent: Option<u32>) -> Result<(Pid, SocketFile, PathBuf), Failure> {
    let bound = line.place.bind()?;
    let pid = spawn::start(bound.listener, &bound.file, parent, &line.agent_args)?;
    Ok((pid, bound.file, bound.path))
}

fn print(lines: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(lines).and_then(|()| out.flush()).map_err(Failure::Print)
}

/// Why there is no agent, or nothing done.
#[derive(Debug, Error)]
enum Failure {
    /// The command line is wrong.
    #[error("{0}\n{USAGE}")]
    Usage(String),
    /// An option's value is wrong.
    #[error("{0}")]
    Value(String),
    #[error("SSH_AGENT_PID is not set, so no agent is known to end; `kill PID` ends one")]
    NoPid,
    #[error("SSH_AGENT_PID is {pid}, which is no agent's process id; set or unset it", pid = .0.display())]
    BadPid(OsString),
    #[error("cannot end process {0}: {1}; is it still there, and yours?")]
    Kill(Pid, #[source] io::Error),
    #[error("HOME is not set; -T or -a PATH needs none")]
    NoHome,
    #[error("cannot make {path}: {1}; -T or -a PATH puts the socket elsewhere", path = .0.display())]
    Home(PathBuf, #[source] io::Error),
    #[error("cannot look into {path}: {1}", path = .0.display())]
    Sweep(PathBuf, #[source] io::Error),
    #[error("cannot listen on {path}: {1}{hint}", path = .0.display(), hint = bind_hint(.1))]
    Bind(PathBuf, #[source] io::Error),
    #[error("no socket was passed that an agent can serve: {0}")]
    Activation(#[source] io::Error),
    #[error("cannot start the agent's process: {0}")]
    Spawn(#[source] io::Error),
    #[error("the agent ended before it was ready ({0}); its own message stands above")]
    NotReady(ExitStatus),
    #[error("cannot print the agent's variables, so the agent was ended: {0}")]
    Print(#[source] io::Error),
    #[error("{program}: {1}", program = .0.display())]
    Exec(OsString, #[source] io::Error),
    #[error("the agent cannot run: {0}")]
    Serve(#[source] io::Error),
}

impl Failure {
    fn bind(path: &Path, error: io::Error) -> Self {
        Failure::Bind(path.to_owned(), error)
    }

    /// OpenSSH's: 255 where it calls something fatal, 1 otherwise.
    fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Value(_) | Failure::NoHome | Failure::Home(..) | Failure::Activation(_) => ExitCode::from(255),
            _ => ExitCode::FAILURE,
        }
    }
}

fn bind_hint(error: &io::Error) -> &'static str {
    if error.kind() == ErrorKind::AddrInUse { "; remove it if no agent uses it, or choose another path" } else { "" }
}
