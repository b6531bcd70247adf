//! Who is at the other end of a socket, and what SO_PEERCRED does not say of it.

#![allow(unsafe_code)]

use std::{
    fs, io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
};

/// Who is at the other end of a socket, as the system told when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The effective uid.
    pub uid: u32,
    /// The process that made the other end listen or connect; `None` where it is in no namespace that is seen from here.
    pub pid: Option<i32>,
}

/// Those of a socket's peer, by SO_PEERCRED. rustix's own call takes a process that is not seen from here for impossible.
pub fn credentials(socket: impl AsFd) -> io::Result<Credentials> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the socket is open while it is borrowed, and the system writes at most `len` bytes to where `peer` is: plain
    // integers, for which every value is one.
    let failed = unsafe {
        let at = (&raw mut peer).cast();
        libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut len)
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Credentials { uid: peer.uid, pid: Some(peer.pid).filter(|pid| *pid > 0) })
}

/// The program that a process runs, where it can be read. The process may end and its number be taken by another, so
/// this is good for telling a person, and for refusing, never for allowing.
pub fn program(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// The short name of a process, which every user can read and which the process can change.
pub fn short_name(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}
