//! The sockets that `strongroom agent` opens or is handed: their directories, modes and groups, and what to do with a
//! file that is there already.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::process::umask;
use thiserror::Error;

use crate::config::{Config, DoorKind, Listen, group_id};
use crate::sys::activation;
use crate::sys::socket_file::{SocketFile, is_left_over};

/// How long to wait for another agent that is just opening a socket in the same directory.
const TURN: Duration = Duration::from_secs(1);

/// Why a socket cannot be served.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("{path} is served by another agent already; stop that one, or choose another path with --socket", path = .0.display())]
    Live(PathBuf),
    /// Something that no agent made is there. It was not touched.
    #[error("{path} exists and is not a socket; move it away, or choose another path with --socket", path = .0.display())]
    NotASocket(PathBuf),
    /// The group is gone since the configuration was read.
    #[error("there is no group `{0}`; create it, or correct `group` in the configuration")]
    NoGroup(String),
    /// The group may not be given.
    #[error("cannot give {path} to group `{group}`: {source}; be a member of that group, or leave `group` out", path = path.display())]
    Group {
        /// The socket.
        path: PathBuf,
        /// As configured.
        group: String,
        /// What the system said.
        source: io::Error,
    },
    /// The directory cannot be made.
    #[error("cannot make the directory {path}: {source}; make it, or choose another path with --socket", path = path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot listen on {path}: {source}; choose a path in a directory of yours with --socket", path = path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What systemd passed is unusable.
    #[error(
        "cannot take over the sockets of systemd: {0}; pass listening Unix stream sockets (ListenStream=), or unset LISTEN_FDS"
    )]
    Activation(#[source] io::Error),
    /// A socket of systemd has no name that is a door's.
    #[error(
        "systemd passed a socket named `{0}`; write FileDescriptorName=ssh or FileDescriptorName=service into its socket unit"
    )]
    UnknownName(String),
}

/// Where a socket came from, by which a reload finds its settings again.
#[derive(Debug)]
pub(super) enum Source {
    /// Systemd passed it; its file, if it has one, is not ours.
    Passed,
    /// The configuration or the command line named it.
    Opened(#[expect(dead_code, reason = "held for its end, which removes the file")] SocketFile),
}

/// A listening socket and the settings of its door.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    pub(super) listen: Listen,
    pub(super) source: Source,
}

/// All sockets to serve: those that systemd passed, or else those of the configuration. For the start of `main`, while
/// there is one thread that makes files.
pub(super) fn all(config: &Config) -> Result<Vec<Socket>, SocketError> {
    let passed = activation::named_listeners().map_err(SocketError::Activation)?;
    if passed.is_empty() {
        return config.listen.iter().map(open).collect();
    }
    let door = |(name, listener): (String, UnixListener)| {
        let kind = match name.as_str() {
            "ssh" => DoorKind::Ssh,
            "service" => DoorKind::Service,
            _ => return Err(SocketError::UnknownName(name)),
        };
        Ok(Socket { listener, listen: config.door(kind), source: Source::Passed })
    };
    passed.into_iter().map(door).collect()
}

fn open(listen: &Listen) -> Result<Socket, SocketError> {
    let path = &listen.path;
    let failed = |source| SocketError::Listen { path: path.clone(), source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| SocketError::Directory { path: directory.to_owned(), source })?;
    let gid = match &listen.group {
        Some(group) => Some(group_id(group).ok_or_else(|| SocketError::NoGroup(group.clone()))?),
        None => None,
    };
    let _turn = take_turn(directory);
    make_way(path)?;
    // Until the group is the right one, the socket is its owner's alone.
    let first_mode = if gid.is_some() { 0o600 } else { listen.mode };
    let before = umask(Mode::from_raw_mode(0o777 & !first_mode));
    let listener = UnixListener::bind(path);
    umask(before);
    let listener = listener.map_err(failed)?;
    let file = SocketFile::new(path, false).map_err(failed)?;
    if let (Some(gid), Some(group)) = (gid, &listen.group) {
        lchown(path, None, Some(gid)).map_err(|source| SocketError::Group {
            path: path.clone(),
            group: group.clone(),
            source,
        })?;
        fs::set_permissions(path, Permissions::from_mode(listen.mode)).map_err(failed)?;
    }
    Ok(Socket { listener, listen: listen.clone(), source: Source::Opened(file) })
}

/// Removes what a dead agent left at `path`.
fn make_way(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed(e)),
        Ok(metadata) if !metadata.file_type().is_socket() => Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) if is_left_over(path) => fs::remove_file(path).map_err(failed),
        Ok(_) => Err(SocketError::Live(path.to_owned())),
    }
}

/// Holds other starting agents off: a socket that is bound but does not listen yet looks left over. Without effect
/// where the directory cannot be locked, so that nobody who may read it can keep an agent from starting.
fn take_turn(directory: &Path) -> Option<File> {
    let lock = File::open(directory).ok()?;
    let deadline = Instant::now() + TURN;
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() >= deadline {
            return None;
        }
        sleep(Duration::from_millis(5));
    }
    Some(lock)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn door(path: &Path, mode: u32, group: Option<&str>) -> Listen {
        Listen {
            door: DoorKind::Ssh,
            path: path.to_owned(),
            mode,
            group: group.map(str::to_owned),
            uids: vec![0],
            keys: None,
            messages: Vec::new(),
            clients: Vec::new(),
        }
    }

    #[test]
    fn a_socket_gets_directory_mode_and_group_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/agent");
        let group = rustix::process::getgid().as_raw().to_string();
        let socket = open(&door(&path, 0o660, Some(&group))).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o660, 0o700));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn only_a_left_over_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(open(&door(&path, 0o600, None)), Err(SocketError::Live(_))));
        // Not just closed: a child that another test starts may hold the socket for a moment.
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        let socket = open(&door(&path, 0o600, None)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        fs::write(&path, "a file").unwrap();
        assert!(matches!(open(&door(&path, 0o600, None)), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"a file");
    }
}
