//! Small files with secrets, on disks that may not answer. Knows paths; not what is in them.

use std::{
    collections::BTreeMap,
    fs::OpenOptions,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

use rustix::fs::OFlags;
use tokio::{sync::oneshot, time::timeout};
use zeroize::Zeroizing;

/// How long a file may take to be read; a disk that was asleep is there by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many may read a file at a time. Where they do not come back, those after them need not try.
const MAX_READERS: usize = 64;
/// How many files may be read at a time.
const MAX_FILES: usize = 64;

type Contents = Result<Zeroizing<Vec<u8>>, String>;

/// The files that are being read, each by so many threads. One that is stuck stays until its disk answers.
static READERS: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

/// The contents of a regular file, of which no more than `longest` bytes are read; or, for a person, why there are none. Blocks for
/// ten seconds at most.
pub(super) fn read_blocking(path: &Path, longest: usize) -> Contents {
    let (sender, receiver) = mpsc::sync_channel(1);
    begin(path, longest, move |contents| drop(sender.send(contents)))
        .and_then(|()| receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(unanswered())))
        .map_err(|why| about(path, &why))
}

/// The same, which blocks nobody.
pub(super) async fn read(path: &Path, longest: usize) -> Contents {
    let (sender, receiver) = oneshot::channel();
    let contents = match begin(path, longest, move |contents| drop(sender.send(contents))) {
        Ok(()) => timeout(PATIENCE, receiver).await.ok().and_then(Result::ok).unwrap_or_else(|| Err(unanswered())),
        Err(why) => Err(why),
    };
    contents.map_err(|why| about(path, &why))
}

/// Where systemd has put the credential of this name (systemd.exec(5), CREDENTIALS).
pub(super) fn credential(name: &str) -> Result<PathBuf, String> {
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err(format!("`{}` is no name of a credential", name.escape_debug()));
    }
    match std::env::var_os("CREDENTIALS_DIRECTORY") {
        Some(directory) => Ok(Path::new(&directory).join(name)),
        None => {
            Err("systemd passed no credentials; name it with LoadCredential= or LoadCredentialEncrypted= in the unit"
                .to_owned())
        }
    }
}

fn about(path: &Path, why: &str) -> String {
    format!("{}: {why}", path.display())
}

fn unanswered() -> String {
    format!("it was not read within {} seconds; see whether its disk is there", PATIENCE.as_secs())
}

/// Reads in a thread of its own: those of a runtime are for others, too, and would be lost.
fn begin(path: &Path, longest: usize, done: impl FnOnce(Contents) + Send + 'static) -> Result<(), String> {
    let reader = Reader::new(path)?;
    let read = move || {
        let contents = reader.read(longest);
        drop(reader);
        done(contents);
    };
    thread::Builder::new().name("secret-file".to_owned()).spawn(read).map(drop).map_err(|error| error.to_string())
}

/// One of the threads that read a file.
struct Reader(PathBuf);

impl Reader {
    fn new(path: &Path) -> Result<Self, String> {
        let mut readers = readers();
        let of_file = readers.get(path).copied().unwrap_or_default();
        if of_file >= MAX_READERS || (of_file == 0 && readers.len() >= MAX_FILES) {
            return Err("others wait for its disk already; see whether that is there".to_owned());
        }
        readers.insert(path.to_owned(), of_file + 1);
        Ok(Self(path.to_owned()))
    }

    fn read(&self, longest: usize) -> Contents {
        // Never longer than it begins: a buffer that grows leaves copies behind.
        let mut contents = Zeroizing::new(Vec::with_capacity(longest + 1));
        // To open a pipe waits for whoever writes into it.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&self.0).map_err(|e| e.to_string())?;
        if !file.metadata().map_err(|e| e.to_string())?.is_file() {
            return Err("it is no regular file".to_owned());
        }
        file.take(longest as u64).read_to_end(&mut contents).map_err(|e| e.to_string())?;
        Ok(contents)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut readers = readers();
        if let Some(count) = readers.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.0);
            }
        }
    }
}

fn readers() -> MutexGuard<'static, BTreeMap<PathBuf, usize>> {
    READERS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_up_to_its_bound_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, b"0123456789").unwrap();
        assert_eq!(**read(&path, 4).await.unwrap(), *b"0123");
        assert_eq!(**read_blocking(&path, 100).unwrap(), *b"0123456789");
        assert!(read(dir.path(), 4).await.unwrap_err().ends_with("it is no regular file"));
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(read(&pipe, 4).await.unwrap_err().ends_with("it is no regular file"));
        assert!(!readers().contains_key(&path) && !readers().contains_key(&pipe));
    }

    #[test]
    fn those_who_wait_for_a_disk_are_few_and_hinder_no_other_file() {
        let path = Path::new("/nowhere/stuck");
        let mut stuck: Vec<_> = (0..MAX_READERS).map(|_| Reader::new(path).unwrap()).collect();
        assert!(Reader::new(path).is_err());
        assert!(Reader::new(Path::new("/nowhere/else")).is_ok());
        stuck.pop();
        assert!(Reader::new(path).is_ok());
    }
}
