//! A listening socket's file: whose it is, whether anybody still listens on it, and its removal.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::peer;

/// How long a dead agent's descriptors may live on in a process that it was starting.
const AFTERLIFE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// A socket file that is removed when this value goes, with its directory if that was made for it.
#[derive(Debug)]
pub struct SocketFile {
    /// Absolute: the daemon's working directory is `/`.
    path: PathBuf,
    /// Device and inode. What somebody else puts at the path later is not ours to remove.
    identity: Option<(u64, u64)>,
    own_directory: bool,
}

impl SocketFile {
    /// The socket at `path`, alone in its directory if `own_directory`. Fails if nothing is there.
    pub fn new(path: &Path, own_directory: bool) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        Ok(Self { identity: Some(identity(&path)?), path, own_directory })
    }

    /// Where it is; absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its directory goes with it.
    pub fn own_directory(&self) -> bool {
        self.own_directory
    }

    /// Leaves the file to another process.
    pub fn leave(mut self) {
        self.identity = None;
    }
}

impl Drop for SocketFile {
    /// Errors have nobody left to tell; a socket that stays behind is swept or replaced by a later agent.
    fn drop(&mut self) {
        if self.identity.is_none() || identity(&self.path).ok() != self.identity {
            return;
        }
        let _ = fs::remove_file(&self.path);
        if let (true, Some(directory)) = (self.own_directory, self.path.parent()) {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Whether a connection to the socket is refused. Everything else, a full backlog above all, may be a live agent.
pub fn nobody_listens(path: &Path) -> bool {
    connected(path).err() == Some(Errno::CONNREFUSED)
}

/// The same, for a socket whose agent may have died this moment: a process that it was just starting has its descriptors
/// until it runs its own program, and is given that time. Blocks for it, up to a second.
pub fn is_left_over(path: &Path) -> bool {
    if let Ok(socket) = connected(path) {
        let is_gone = |pid| fs::read_link(format!("/proc/{pid}/exe")).is_err_and(|e| e.kind() == ErrorKind::NotFound);
        if peer::credentials(&socket).is_ok_and(|peer| peer.pid.is_some_and(is_gone)) {
            // Nobody accepts the connection; it ends with the last who could.
            let _ = poll(&mut [PollFd::new(&socket, PollFlags::empty())], Some(&AFTERLIFE));
        }
    }
    nobody_listens(path)
}

fn connected(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_file_takes_only_itself_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let file = SocketFile::new(&path, false).unwrap();
        fs::remove_file(&path).unwrap();
        // The listener still holds the old inode, so that the new file gets another.
        let _other = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
        let file = SocketFile::new(&path, false).unwrap();
        file.leave();
        assert!(path.exists());
        drop(SocketFile::new(&path, true));
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_full_backlog_is_not_stale() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        assert!(nobody_listens(&path), "bound, not listening");
        rustix::net::listen(&socket, 0).unwrap();
        let mut waiting = Vec::new();
        loop {
            let one = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
            if connect(&one, &SocketAddrUnix::new(&path).unwrap()).is_err() {
                break;
            }
            waiting.push(one);
        }
        assert!(!nobody_listens(&path));
        // Not just closed: a child that another test starts may hold the socket for a moment.
        rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).unwrap();
        assert!(nobody_listens(&path));
    }
}
