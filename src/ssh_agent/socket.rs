//! Where an agent's socket lives: names, modes, and which sockets are left over from agents that are gone.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest;
use rustix::fs::Mode;
use rustix::process::umask;
use rustix::rand::{GetRandomFlags, getrandom};

use super::Failure;
use crate::sys::socket_file::{SocketFile, nobody_listens};

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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_openssh_makes_them() {
        let prefix = host_prefix();
        assert_eq!((prefix.len(), &prefix[..2], &prefix[12..]), (13, "s.", "."));
        assert!(random_name::<10>().unwrap().bytes().all(|b| b.is_ascii_alphanumeric()));
    }
}
