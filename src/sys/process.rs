//! What this process is and holds: its descriptors, its group, whether others may look into it, who its parent is.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, Resource, Rlimit, Signal, getgid, getppid, pidfd_open, set_dumpable_behavior,
    set_parent_process_death_signal, setrlimit,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{set_no_new_privs, set_thread_res_gid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The first descriptor that systemd passes (`sd_listen_fds(3)`).
const FIRST_PASSED: RawFd = 3;

/// Keeps other processes of the same user out: no ptrace, no core, no way back to a set-group-id group.
///
/// For the start of `main`, where there is one thread: the group is a thread's, and later threads inherit it.
pub fn harden() -> io::Result<()> {
    let gid = getgid();
    set_thread_res_gid(gid, gid, gid)?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// No core file, not even through a handler that ignores `PR_SET_DUMPABLE`. Children inherit it.
pub fn deny_core_files() -> io::Result<()> {
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?)
}

/// For a process that runs foreign code: [`harden`], no core file, no program with more rights than this one, and the end
/// when the parent's thread that started this process ends.
///
/// For the start of `main`. A parent that is gone already sends no signal: its end of a socket says so.
pub fn confine() -> io::Result<()> {
    harden()?;
    deny_core_files()?;
    set_no_new_privs(true)?;
    // Last: a change of groups clears it.
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

/// Ends this process at once, whatever its threads do: no handler of a foreign library runs, no buffer is flushed.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor that the caller of this program left open, except standard input, output and error.
///
/// For the start of `main`, before this program opens anything of its own.
pub fn close_inherited() {
    close_from(3);
}

/// Takes over the listening socket that systemd, or whoever speaks its protocol, passed as descriptor 3, and closes
/// all others but the standard ones.
///
/// For the start of `main`, before this program opens anything of its own, and once. Fails if the descriptor is
/// closed or is not a listening Unix stream socket.
pub fn inherited_listener() -> io::Result<UnixListener> {
    close_from(FIRST_PASSED + 1);
    // SAFETY: the borrow ends in this statement, and the call fails if the descriptor is not open.
    fcntl_getfd(unsafe { BorrowedFd::borrow_raw(FIRST_PASSED) })?;
    // SAFETY: the descriptor is open, and nothing else in this program owns it: it came from outside, for us.
    let fd = unsafe { OwnedFd::from_raw_fd(FIRST_PASSED) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    listener(fd)
}

/// Takes over the connected socket that is standard input, where `/dev/null` takes its place.
pub fn stream_from_stdin() -> io::Result<UnixStream> {
    let fd = fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    if sockopt::socket_domain(&fd)? != AddressFamily::UNIX || sockopt::socket_type(&fd)? != SocketType::STREAM {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input is not a Unix stream socket"));
    }
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(UnixStream::from(fd))
}

/// Takes over the listening socket that is standard input, where `/dev/null` takes its place.
pub fn listener_from_stdin() -> io::Result<UnixListener> {
    let listener = listener(fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?)?;
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(listener)
}

/// Points standard input, output and error at `/dev/null`.
pub fn silence_standard_streams() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(dup2_stderr(&null)?)
}

/// Completes when the parent process, which had the number `pid`, has ended; at once if it has already.
///
/// Needs a tokio runtime with I/O enabled. Fails if the process cannot be watched, as where a sandbox forbids
/// `pidfd_open(2)`.
pub async fn parent_gone(pid: i32) -> io::Result<()> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        opened => opened?,
    };
    // The order matters: a parent that is ours after the opening is the process that was opened, not one that got
    // its number later.
    if getppid() != Some(pid) {
        return Ok(());
    }
    // SAFETY: `OwnedFd` yields one descriptor all its life, and closes it only when dropped, by `AsyncFd` itself.
    let process = unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) }?;
    process.readable().await.map(drop)
}

/// The name and version of the cryptographic library in this process.
pub fn crypto_library() -> String {
    let version = CStr::from_bytes_with_nul(aws_lc_sys::AWSLC_VERSION_NUMBER_STRING).unwrap_or_default();
    format!("AWS-LC {}", version.to_string_lossy())
}

/// The socket, if it is a listening Unix stream socket.
pub(super) fn listener(fd: OwnedFd) -> io::Result<UnixListener> {
    let fits = sockopt::socket_domain(&fd)? == AddressFamily::UNIX
        && sockopt::socket_type(&fd)? == SocketType::STREAM
        && sockopt::socket_acceptconn(&fd)?;
    if fits {
        Ok(UnixListener::from(fd))
    } else {
        let why = format!("descriptor {} is not a listening Unix stream socket", fd.as_raw_fd());
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    }
}

fn close_from(first: RawFd) {
    // SAFETY: the callers' contract is that this program has opened nothing yet, so that no owner of a descriptor
    // exists that could be closed under it. The system call takes numbers only.
    unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    // Linux before 5.9 has no such call. What stays open there is what the caller left open for every program.
}
