//! A file whose changes are held back at first, in their order: opening a database writes, and waits for the disk four
//! times, before anybody can be answered. Knows no database.
//!
//! Once it is settled, what was held is written, and waited for, just as it would have been; only later. A file that is
//! closed before, or whose process dies, is as it was.

use std::{
    collections::VecDeque,
    io, mem,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use redb::{BackendError, StorageBackend, backends::FileBackend};

/// The most that is held, in bytes. What is more is written at once, with all before it.
const MAX_HELD: usize = 1 << 20;

/// The file, as a database sees it.
#[derive(Clone, Debug)]
pub(super) struct HeldFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: FileBackend,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// So many bytes in these steps.
    Holding(VecDeque<Step>, usize),
    /// Nothing is held any more.
    Settled,
    /// A step failed, or none was to be made: what the database has seen is not what is in the file.
    Over,
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
        let state = if hold { State::Holding(VecDeque::new(), 0) } else { State::Settled };
        Self(Arc::new(Inner { file, state: Mutex::new(state) }))
    }

    /// Makes the changes that were held back, and holds no more. After an error nothing more is read or written: the database
    /// is to be opened again.
    pub(super) fn settle(&self) -> io::Result<()> {
        let state = &mut *self.state();
        if let State::Holding(steps, _) = state {
            let steps = mem::take(steps);
            *state = State::Over;
            // Whoever comes meanwhile waits: it must not overtake.
            for step in steps {
                match step {
                    Step::Write { offset, data } => self.0.file.write(offset, &data)?,
                    Step::Sync => self.0.file.sync_data()?,
                }
            }
            *state = State::Settled;
        }
        match state {
            State::Over => Err(over()),
            _ => Ok(()),
        }
    }

    /// Drops what is held back, if anything is, and has every further change refused.
    pub(super) fn discard(&self) {
        let state = &mut *self.state();
        if let State::Holding(..) = state {
            *state = State::Over;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn over() -> io::Error {
    io::Error::other("it could not be written when it was opened")
}

impl StorageBackend for HeldFile {
    fn len(&self) -> io::Result<u64> {
        self.0.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        self.0.file.read(offset, out)?;
        match &*state {
            State::Holding(steps, _) => {
                for step in steps {
                    if let Step::Write { offset: at, data } = step {
                        overlay(out, offset, data, *at);
                    }
                }
                Ok(())
            }
            State::Settled => Ok(()),
            State::Over => Err(over()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.settle()?;
        self.0.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        match &mut *self.state() {
            State::Holding(steps, _) => {
                steps.push_back(Step::Sync);
                Ok(())
            }
            State::Settled => self.0.file.sync_data(),
            State::Over => Err(over()),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if let State::Holding(steps, bytes) = &mut *self.state() {
            let end = offset.checked_add(data.len() as u64);
            let is_inside = end.is_some_and(|end| self.0.file.len().is_ok_and(|len| end <= len));
            if is_inside && *bytes + data.len() <= MAX_HELD {
                *bytes += data.len();
                steps.push_back(Step::Write { offset, data: data.into() });
                return Ok(());
            }
        }
        self.settle()?;
        self.0.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.discard();
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
        let changes = [(|held: &HeldFile| held.set_len(80)) as fn(&HeldFile) -> io::Result<()>, |held| {
            held.write(60, b"12345678")
        }];
        for change in changes {
            let file = file();
            let held = held(&file, true);
            held.write(1, b"a").unwrap();
            assert_eq!(content(&file), [0; LEN]);
            change(&held).unwrap();
            assert_eq!(content(&file)[..2], *b"\0a");
        }
    }

    #[test]
    fn what_is_closed_before_it_settles_is_as_it_was() {
        let file = file();
        let held = held(&file, true);
        held.write(1, b"a").unwrap();
        held.close().unwrap();
        assert!(held.settle().is_err() && held.write(2, b"b").is_err() && held.sync_data().is_err());
        assert_eq!(content(&file), [0; LEN]);
    }

    #[test]
    fn after_a_step_that_failed_none_follows() {
        let place = tempfile::NamedTempFile::new().unwrap();
        place.as_file().set_len(LEN as u64).unwrap();
        let held = held(&File::open(place.path()).unwrap(), true);
        held.write(1, b"a").unwrap();
        held.sync_data().unwrap();
        assert!(held.settle().is_err(), "it was opened for reading");
        assert!(held.settle().is_err() && held.sync_data().is_err() && held.read(0, &mut [0]).is_err());
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
