//! A file whose changes are held back at first, in their order: opening a database writes, and waits for the disk four
//! times, before anybody can be answered. Knows no database.
//!
//! What is held is written, and waited for, just as it would have been; only later. A process that dies before has not
//! opened the file at all.

use std::{
    collections::VecDeque,
    io,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use redb::{BackendError, StorageBackend, backends::FileBackend};

/// The most that is held, in bytes. What is more is written at once.
const MAX_HELD: usize = 1 << 20;

/// The file, as a database sees it.
#[derive(Clone, Debug)]
pub(super) struct HeldFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: FileBackend,
    /// `None` once nothing is held any more.
    held: Mutex<Option<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    steps: VecDeque<Step>,
    bytes: usize,
}

#[derive(Debug)]
enum Step {
    /// Within the length that the file has.
    Write {
        offset: u64,
        data: Box<[u8]>,
    },
    Sync,
}

impl HeldFile {
    /// Holds changes back from now on, where `hold` says so.
    pub(super) fn new(file: FileBackend, hold: bool) -> Self {
        Self(Arc::new(Inner { file, held: Mutex::new(hold.then(Held::default)) }))
    }

    /// Makes the changes that were held back, and holds no more. After an error the database is to be opened again.
    pub(super) fn settle(&self) -> io::Result<()> {
        let mut held = self.held();
        // Whoever comes meanwhile waits: it must not overtake.
        while let Some(step) = held.as_ref().and_then(|held| held.steps.front()) {
            match step {
                Step::Write { offset, data } => self.0.file.write(*offset, data)?,
                Step::Sync => self.0.file.sync_data()?,
            }
            held.as_mut().map(|held| held.steps.pop_front());
        }
        *held = None;
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StorageBackend for HeldFile {
    fn len(&self) -> io::Result<u64> {
        self.0.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let held = self.held();
        self.0.file.read(offset, out)?;
        for step in held.iter().flat_map(|held| &held.steps) {
            if let Step::Write { offset: at, data } = step {
                overlay(out, offset, data, *at);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.settle()?;
        self.0.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        if let Some(held) = &mut *self.held() {
            held.steps.push_back(Step::Sync);
            return Ok(());
        }
        self.0.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        {
            let mut held = self.held();
            let len = self.0.file.len()?;
            let fits = |held: &&mut Held| {
                held.bytes + data.len() <= MAX_HELD
                    && offset.checked_add(data.len() as u64).is_some_and(|end| end <= len)
            };
            if let Some(held) = held.as_mut().filter(fits) {
                held.bytes += data.len();
                held.steps.push_back(Step::Write { offset, data: data.into() });
                return Ok(());
            }
        }
        self.settle()?;
        self.0.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.settle()?;
        self.0.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.file.query_lock_range(start, end)
    }
}

/// Has `out`, which begins at `offset`, show what of `data`, which begins at `at`, is in it.
fn overlay(out: &mut [u8], offset: u64, data: &[u8], at: u64) {
    let from = offset.max(at);
    let to = offset.saturating_add(out.len() as u64).min(at.saturating_add(data.len() as u64));
    if from < to {
        let (to_out, to_data) = ((from - offset) as usize, (from - at) as usize);
        let len = (to - from) as usize;
        out[to_out..to_out + len].copy_from_slice(&data[to_data..to_data + len]);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs::File, io::Write, os::unix::fs::FileExt};

    use proptest::prelude::*;
    use tempfile::tempfile;

    use super::*;

    const LEN: usize = 64;

    fn held(file: &File, hold: bool) -> HeldFile {
        HeldFile::new(FileBackend::new(file.try_clone().unwrap()).unwrap(), hold)
    }

    fn file() -> File {
        let mut file = tempfile().unwrap();
        file.write_all(&[0; LEN]).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        content
    }

    #[test]
    fn what_is_held_is_seen_at_once_and_in_the_file_once_it_settles() {
        let file = file();
        let held = held(&file, true);
        held.write(10, b"abc").unwrap();
        held.sync_data().unwrap();
        held.write(11, b"x").unwrap();
        let mut seen = [0; 4];
        held.read(9, &mut seen).unwrap();
        assert_eq!(seen, *b"\0axc");
        assert_eq!(content(&file), [0; LEN]);
        held.settle().unwrap();
        assert_eq!(content(&file)[9..13], *b"\0axc");
        held.write(0, b"at once").unwrap();
        assert_eq!(content(&file)[..7], *b"at once");
    }

    #[test]
    fn what_would_change_its_length_settles_it() {
        for change in [
            (|held: &HeldFile| held.set_len(80)) as fn(&HeldFile) -> io::Result<()>,
            |held| held.write(60, b"12345678"),
            |held| held.close(),
        ] {
            let file = file();
            let held = held(&file, true);
            held.write(1, b"a").unwrap();
            assert_eq!(content(&file), [0; LEN]);
            change(&held).unwrap();
            assert_eq!(content(&file)[..2], *b"\0a");
        }
    }

    #[test]
    fn no_more_is_held_than_is_allowed() {
        let file = file();
        file.set_len(4 << 20).unwrap();
        let held = held(&file, true);
        held.write(0, &vec![1; MAX_HELD]).unwrap();
        assert_eq!(content(&file)[0], 0);
        held.write(0, &[2]).unwrap();
        assert_eq!(content(&file)[..2], [2, 1]);
    }

    proptest! {
        #[test]
        fn a_file_that_holds_reads_like_one_that_does_not(
            writes in prop::collection::vec((0..LEN as u64, prop::collection::vec(any::<u8>(), 0..20)), 0..12),
            settles in 0..12usize,
        ) {
            let (one, other) = (file(), file());
            let (holds, plain) = (held(&one, true), held(&other, false));
            for (n, (offset, data)) in writes.iter().enumerate() {
                for file in [&holds, &plain] {
                    file.write(*offset, data).unwrap();
                }
                if n == settles {
                    holds.settle().unwrap();
                }
                let len = plain.len().unwrap() as usize;
                prop_assert_eq!(holds.len().unwrap() as usize, len);
                let (mut a, mut b) = (vec![0; len], vec![0; len]);
                holds.read(0, &mut a).unwrap();
                plain.read(0, &mut b).unwrap();
                prop_assert_eq!(a, b);
            }
            holds.settle().unwrap();
            prop_assert_eq!(content(&one), content(&other));
        }
    }
}
