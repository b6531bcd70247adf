//! The agent behind a shell or a command: a process of its own, started anew rather than forked, that has the
//! listening socket as its standard input.
//!
//! The starter waits for one byte on the new process's standard output. It comes when the agent can be ended cleanly,
//! so that a SIGTERM right after the printed lines leaves nothing behind.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use rustix::process::{Pid, chdir, setsid};

use super::options::CommandLine;
use super::{ENDED_BY_SIGNAL, Failure};
use crate::daemon::{self, Foreground};
use crate::sys::process;
use crate::sys::socket_file::SocketFile;

/// The first argument of a process that [`start`] started. Nothing that a person types: with a terminal or a file
/// as standard input it ends at once.
pub(super) const SERVE: &str = "--serve-from-stdin";

/// Starts an agent on `listener` and waits until it is ready. With `parent`, it ends when that process does.
///
/// The agent removes `file` when it ends; the caller, still holding it, does if no agent comes of it.
pub(super) fn start(
    listener: UnixListener,
    file: &SocketFile,
    parent: Option<u32>,
    agent_args: &[OsString],
) -> Result<Pid, Failure> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("ssh-agent")
        .arg(SERVE)
        .arg(parent.unwrap_or(0).to_string())
        .arg(if file.own_directory() { "own" } else { "shared" })
        .arg(file.path())
        .args(agent_args)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Failure::Spawn)?;
    let ready = child.stdout.take().is_some_and(|mut pipe| pipe.read_exact(&mut [0]).is_ok());
    if ready {
        return Ok(Pid::from_child(&child));
    }
    match child.wait() {
        Ok(status) => Err(Failure::NotReady(status)),
        Err(e) => Err(Failure::Spawn(e)),
    }
}

/// The other side of [`start`]: serves until told to end. `args` follow [`SERVE`].
pub(super) fn serve(mut args: impl Iterator<Item = OsString>) -> Result<ExitCode, Failure> {
    process::close_inherited();
    let listener = process::listener_from_stdin().map_err(Failure::Activation)?;
    let misuse = || Failure::Usage(format!("{SERVE} is not for people"));
    let (Some(parent), Some(owned), Some(path)) = (args.next(), args.next(), args.next()) else {
        return Err(misuse());
    };
    let parent: i32 = parent.to_str().and_then(|p| p.parse().ok()).ok_or_else(misuse)?;
    let file = SocketFile::new(Path::new(&path), owned == OsStr::new("own")).map_err(Failure::Serve)?;
    let options = CommandLine::parse(args, None)?.agent;

    detach().map_err(Failure::Serve)?;
    let foreground = Foreground { interactive: false, debug: false, parent: (parent != 0).then_some(parent) };
    let ready = || {
        // Fails if the starter is gone: nobody knows of this agent then, and it ends.
        io::stdout().write_all(b"1")?;
        io::stdout().flush()?;
        process::silence_standard_streams()
    };
    let ended = daemon::serve_ssh_agent(listener, options, foreground, ready);
    drop(file);
    ended.map(|_| ExitCode::from(ENDED_BY_SIGNAL)).map_err(Failure::Serve)
}

/// Leaves the starter's session and directory, and takes the name that `pgrep ssh-agent` looks for.
fn detach() -> io::Result<()> {
    setsid()?;
    chdir("/")?;
    process::deny_core_files()?;
    Ok(rustix::thread::set_name(c"ssh-agent")?)
}
