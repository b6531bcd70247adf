//! Where an agent's socket lives: names, modes, and which sockets are left over from agents that are gone.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::umask;
use rustix::rand::{GetRandomFlags, getrandom};

use super::Failure;

/// Where the command line wants the socket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// `~/.ssh/agent`, swept before unless `-U` was given.
    Home { clean: bool },
    /// A directory of its own below $TMPDIR (`-T`).
    Private,
    /// This path (`-a`).
    At(PathBuf),
}

/// A younger socket may belong to an agent that does not listen yet.
const STALE_AFTER: Duration = Duration::from_secs(60 * 60);
/// With 62^10 names a second try is rare and a tenth is a bug.
const TRIES: u32 = 10;
const ALPHABET: &[u8; 62] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";

/// A socket file that is removed when this value goes, with its directory if that was made for it.
pub(super) struct SocketFile {
    /// Absolute: the daemon's working directory is `/`.
    path: PathBuf,
    /// Device and inode. What somebody else puts at the path later is not ours to remove.
    identity: Option<(u64, u64)>,
    own_directory: bool,
}

impl SocketFile {
    /// The socket at `path`, alone in its directory if `own_directory`.
    pub(super) fn new(path: &Path, own_directory: bool) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        Ok(Self { identity: Some(identity(&path)?), path, own_directory })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn own_directory(&self) -> bool {
        self.own_directory
    }

    /// Leaves the file to another process.
    pub(super) fn leave(mut self) {
        self.identity = None;
    }
}

impl Drop for SocketFile {
    /// Errors have nobody left to tell; a socket that stays behind is swept by a later agent.
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

/// A listening socket, its file, and its path in the words of the command line.
pub(super) struct Bound {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
    pub(super) path: PathBuf,
}

impl Place {
    /// Makes the socket (0600) and the directories that it needs (0700), and listens.
    pub(super) fn bind(&self) -> Result<Bound, Failure> {
        match self {
            Place::Home { clean } => in_home(*clean),
            Place::Private => private(),
            Place::At(path) => listen(path, false).map_err(|e| Failure::bind(path, e)),
        }
    }
}

/// Removes the sockets in `~/.ssh/agent` that no agent listens on: this host's only, or with `any_name` all.
pub(super) fn remove_stale(any_name: bool) -> Result<(), Failure> {
    let directory = home()?.join(".ssh/agent");
    sweep(&directory, any_name).map_err(|e| Failure::Sweep(directory, e))
}

fn in_home(clean: bool) -> Result<Bound, Failure> {
    let mut directory = home()?;
    for name in [".ssh", "agent"] {
        directory.push(name);
        make_directory(&directory)
            .or_else(|e| if e.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
            .map_err(|e| Failure::Home(directory.clone(), e))?;
    }
    if clean {
        // What cannot be swept now does not stand in the way of a new agent.
        let _ = sweep(&directory, false);
    }
    for _ in 0..TRIES {
        let name = random_name::<10>().map_err(|e| Failure::Home(directory.clone(), e))?;
        let path = directory.join(format!("{}agent.{name}", host_prefix()));
        match listen(&path, false) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {}
            bound => return bound.map_err(|e| Failure::Home(path, e)),
        }
    }
    Err(Failure::Home(directory, ErrorKind::AlreadyExists.into()))
}

fn private() -> Result<Bound, Failure> {
    let parent = PathBuf::from(env::var_os("TMPDIR").filter(|d| !d.is_empty()).unwrap_or("/tmp".into()));
    for _ in 0..TRIES {
        let name = random_name::<12>().map_err(|e| Failure::bind(&parent, e))?;
        let directory = parent.join(format!("ssh-{name}"));
        match make_directory(&directory) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            made => made.map_err(|e| Failure::bind(&directory, e))?,
        }
        let path = directory.join(format!("agent.{}", std::process::id()));
        return listen(&path, true).map_err(|e| {
            let _ = fs::remove_dir(&directory);
            Failure::bind(&path, e)
        });
    }
    Err(Failure::bind(&parent, ErrorKind::AlreadyExists.into()))
}

fn listen(path: &Path, own_directory: bool) -> io::Result<Bound> {
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    Ok(Bound { listener: listener?, file: SocketFile::new(path, own_directory)?, path: path.to_owned() })
}

fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

fn home() -> Result<PathBuf, Failure> {
    env::home_dir().filter(|h| h != Path::new("")).ok_or(Failure::NoHome)
}

/// What this host's sockets begin with: a home directory may be shared by many hosts, and only this one knows which
/// of its agents live.
fn host_prefix() -> String {
    let hash = digest::digest(&digest::SHA512, rustix::system::uname().nodename().to_bytes());
    let hash: String = hash.as_ref().iter().take(10).map(|&b| letter(b)).collect();
    format!("s.{hash}.")
}

fn random_name<const N: usize>() -> io::Result<String> {
    let mut bytes = [0; N];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|&b| letter(b)).collect())
}

fn letter(byte: u8) -> char {
    char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])
}

fn sweep(directory: &Path, any_name: bool) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let prefix = OsString::from(host_prefix());
    let limit = SystemTime::now().checked_sub(STALE_AFTER);
    for entry in entries {
        let entry = entry?;
        let ours = any_name || entry.file_name().as_bytes().starts_with(prefix.as_bytes());
        // An entry that is gone by now needs no removal. Symbolic links are not followed.
        let Ok(metadata) = entry.metadata() else { continue };
        let old = metadata.modified().is_ok_and(|modified| limit.is_some_and(|limit| modified <= limit));
        if ours && old && metadata.file_type().is_socket() && nobody_listens(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Whether a connection to the socket is refused. Everything else, a full backlog above all, may be a live agent.
fn nobody_listens(path: &Path) -> bool {
    let attempt = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        connect(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?, &SocketAddrUnix::new(path)?)
    };
    attempt() == Err(rustix::io::Errno::CONNREFUSED)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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

    #[test]
    fn names_are_as_openssh_makes_them() {
        let prefix = host_prefix();
        assert_eq!((prefix.len(), &prefix[..2], &prefix[12..]), (13, "s.", "."));
        assert!(random_name::<10>().unwrap().bytes().all(|b| b.is_ascii_alphanumeric()));
    }
}
