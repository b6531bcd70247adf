//! The files of the audit log: their directory, their numbers, where writing goes on after a start, and which are removed
//! when they outgrow their bound. Knows lines by their ends only.
//!
//! Files are numbered upwards and never renamed; lines go into the last. How far the log was written is known to the
//! state file, as its [`Head`], which is written after the lines. So a file that ends before the head was cut, and one
//! that goes on behind it was not finished when the daemon was killed.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, OFlags, flock};
use thiserror::Error;
use tracing::{error, info, warn};

use super::line::{Link, MAX_LINE, Position};
use crate::vault::store::{StoreError, private};

/// The least that all files together may be bounded to, in bytes.
pub const MIN_SIZE: u64 = 1 << 20;
/// The most, in bytes.
pub const MAX_SIZE: u64 = 1 << 40;
/// A file has this part of what all may take.
const PARTS: u64 = 8;
/// What the names of the files end with, behind their number.
const SUFFIX: &str = ".jsonl";

/// Why there is no audit log. The messages say what to do.
#[derive(Debug, Error)]
pub enum AuditError {
    /// The system refused: make room or mend the directory, or name another.
    #[error(
        "the audit log in {path}: {source}; mend that, name another directory with `path` in [audit], or switch it off \
         with `enabled = false`",
        path = path.display()
    )]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others can reach it, or own it.
    #[error("the audit log: {0}")]
    Access(StoreError),
    /// Another process writes into this directory.
    #[error("the audit log in {path} is written by another strongroom; name another directory with `path` in [audit]", path = path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Where the log ends cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No thread can be started.
    #[error("no thread can be started: {0}; look at the limit on processes (ulimit -u)")]
    Thread(#[source] io::Error),
}

/// What the state file knows of the log: how far it was written, and where what is kept of it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The directory of the files.
    pub directory: PathBuf,
    /// The last line that was written; its number is how many there ever were.
    pub last: Position,
    /// The number of the file in which lines go on…
    pub file: u64,
    /// …behind so many bytes.
    pub length: u64,
    /// The number of the oldest file that is kept…
    pub oldest_file: u64,
    /// …and the line before its first, which is gone.
    pub before_oldest: Position,
}

/// The file with this number.
pub fn path_of(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}{SUFFIX}"))
}

/// The numbers of the files that are there, in order.
pub fn numbers(directory: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)?.parse().ok());
        numbers.extend(number.filter(|number| path_of(directory, *number).file_name() == Some(&*name)));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads a file line by line, never more than a line at a time.
pub struct Lines {
    reader: BufReader<File>,
    line: Vec<u8>,
    /// Where the next line begins.
    pub offset: u64,
}

/// What comes next in a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A line, without its end.
    Line(&'a [u8]),
    /// More bytes without the end of a line than a line has.
    TooLong,
    /// So many bytes that no end of a line follows: the last ones.
    Incomplete(usize),
    /// Nothing.
    End,
}

impl Lines {
    /// The lines from a place in the file on.
    pub fn open(path: &Path, offset: u64) -> io::Result<Self> {
        let mut file = open(path, OpenOptions::new().read(true))?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(Self { reader: BufReader::with_capacity(64 << 10, file), line: Vec::with_capacity(MAX_LINE), offset })
    }

    /// What comes next.
    pub fn next_piece(&mut self) -> io::Result<Piece<'_>> {
        self.line.clear();
        let read = (&mut self.reader).take(MAX_LINE as u64).read_until(b'\n', &mut self.line)?;
        self.offset += read as u64;
        Ok(match self.line.strip_suffix(b"\n") {
            Some(line) => Piece::Line(line),
            None if read == 0 => Piece::End,
            None if read == MAX_LINE => Piece::TooLong,
            None => Piece::Incomplete(read),
        })
    }
}

fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)
}

/// The files of a log that is written.
pub(super) struct Files {
    directory: PathBuf,
    max_size: u64,
    /// Those that are full, the oldest first.
    older: VecDeque<Older>,
    /// Where lines go; `None` between two files.
    current: Option<Current>,
    /// The number of the file behind the last.
    next: u64,
    /// The oldest file of the chain that the head knows, and the line before its first.
    oldest: (u64, Position),
    /// Files that are to go once the head does not know them any more.
    doomed: Vec<u64>,
    /// Nobody else writes here while this is open.
    _lock: File,
}

struct Older {
    number: u64,
    size: u64,
    /// The line before its first.
    before: Position,
}

struct Current {
    number: u64,
    file: File,
    length: u64,
    before: Position,
}

/// Where writing goes on.
#[derive(Clone, Copy)]
struct Tail {
    number: u64,
    length: u64,
    last: Position,
}

impl Files {
    /// Opens the log in `directory`, or begins one, and gives the last line in it. What is there and fits the head goes
    /// on. What does not is left as it is, for `verify` to name, and the log goes on behind it in a new file.
    pub(super) fn open(directory: &Path, max_size: u64, head: Option<&Head>) -> Result<(Self, Position), AuditError> {
        let failed = |source| AuditError::Io { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        let found = fs::metadata(directory).map_err(failed)?;
        private(directory, &found, "700").map_err(AuditError::Access)?;
        let lock = File::open(directory).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(AuditError::InUse { path: directory.to_owned() }),
            locked => locked.map_err(|errno| failed(errno.into()))?,
        }
        Self::resume(directory, max_size, head, lock).map_err(failed)
    }

    fn resume(directory: &Path, max_size: u64, head: Option<&Head>, lock: File) -> io::Result<(Self, Position)> {
        let numbers = numbers(directory)?;
        let next = numbers.last().map_or(1, |last| last.saturating_add(1)).max(head.map_or(1, |head| head.file));
        let (tail, goes_on) = match head {
            Some(head) if head.directory == directory => find_end(head)?,
            Some(head) => {
                warn!(from = %head.directory.display(), to = %directory.display(), "the audit log moves; its earlier \
                      lines stay where they are");
                (Tail { number: next, length: 0, last: head.last }, false)
            }
            None => adopt(directory, &numbers)?,
        };
        let mut files = Self {
            directory: directory.to_owned(),
            max_size,
            older: VecDeque::new(),
            current: None,
            next,
            oldest: (next, tail.last),
            doomed: Vec::new(),
            _lock: lock,
        };
        for number in numbers {
            files.older.push_back(Older {
                number,
                size: fs::metadata(path_of(directory, number))?.len(),
                before: before(&path_of(directory, number))?,
            });
        }
        match (head, files.older.front()) {
            (Some(head), _) if head.directory == directory => files.oldest = (head.oldest_file, head.before_oldest),
            (None, Some(oldest)) => files.oldest = (oldest.number, oldest.before),
            _ => {}
        }
        // The next file may have been made already, and be the one in which lines go on.
        if goes_on && files.older.back().is_some_and(|last| last.number == tail.number) {
            files.continue_in(tail)?;
        }
        Ok((files, tail.last))
    }

    fn continue_in(&mut self, tail: Tail) -> io::Result<()> {
        let Some(last) = self.older.pop_back() else { return Ok(()) };
        let file = open(&path_of(&self.directory, tail.number), OpenOptions::new().write(true))?;
        if last.size > tail.length {
            info!(
                bytes = last.size - tail.length,
                "the audit log ended in a line that was not finished; it is cut off"
            );
            file.set_len(tail.length)?;
            file.sync_all()?;
        }
        self.current = Some(Current { number: tail.number, file, length: tail.length, before: last.before });
        self.next = tail.number.saturating_add(1);
        Ok(())
    }

    /// Bounds the size of all files together, in bytes. What is too much goes when the next file begins.
    pub(super) fn set_max_size(&mut self, max_size: u64) {
        self.max_size = max_size;
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the state file is to know when `last` is the last line.
    pub(super) fn head(&self, last: Position) -> Head {
        let (file, length) = self.current.as_ref().map_or((self.next, 0), |current| (current.number, current.length));
        let (oldest_file, before_oldest) = self.oldest;
        Head { directory: self.directory.clone(), last, file, length, oldest_file, before_oldest }
    }

    /// Whether there is a file to write into.
    pub(super) fn is_open(&self) -> bool {
        self.current.is_some()
    }

    /// Whether a line of so many bytes has room in the file, behind those that wait to be written. One always has.
    pub(super) fn fits(&self, waiting: usize, line: usize) -> bool {
        let fits = |current: &Current| {
            let before = current.length + waiting as u64;
            before == 0 || before + line as u64 <= self.max_size / PARTS
        };
        self.current.as_ref().is_some_and(fits)
    }

    /// Writes whole lines behind the last. They are on the disk when this returns; after an error none of them counts.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        let Some(current) = &mut self.current else { return Err(io::ErrorKind::NotFound.into()) };
        let written = current.file.write_all_at(lines, current.length).and_then(|()| current.file.sync_data());
        if written.is_err() {
            // What is left of them is written over, or cut off at the next start.
            let _ = current.file.set_len(current.length);
        }
        written?;
        current.length += lines.len() as u64;
        Ok(())
    }

    /// Ends the file, and dooms the oldest so that there is room for another.
    pub(super) fn end_file(&mut self, last: Position) {
        let Some(Current { number, length, before, .. }) = self.current.take() else { return };
        self.older.push_back(Older { number, size: length, before });
        let mut size: u64 = self.older.iter().map(|older| older.size).sum();
        while size + self.max_size / PARTS > self.max_size
            && let Some(gone) = self.older.pop_front()
        {
            size -= gone.size;
            self.doomed.push(gone.number);
        }
        let first = self.older.front().map_or((self.next, last), |older| (older.number, older.before));
        if first.0 > self.oldest.0 {
            self.oldest = first;
        }
    }

    /// Removes the doomed files. For when the head that knows them no more is kept.
    pub(super) fn remove_doomed(&mut self) {
        for number in self.doomed.drain(..) {
            let path = path_of(&self.directory, number);
            if let Err(error) = fs::remove_file(&path) {
                warn!(path = %path.display(), "an old file of the audit log cannot be removed: {error}");
            }
        }
    }

    /// Begins the next file, behind the line `last`.
    pub(super) fn begin_file(&mut self, last: Position) -> io::Result<()> {
        let path = path_of(&self.directory, self.next);
        let file = open(&path, OpenOptions::new().write(true).create_new(true).mode(0o600));
        let file = match file {
            // Made by an attempt that did not come to its end; there is nothing in it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && fs::metadata(&path)?.len() == 0 => {
                open(&path, OpenOptions::new().write(true))?
            }
            made => made?,
        };
        File::open(&self.directory)?.sync_all()?;
        self.current = Some(Current { number: self.next, file, length: 0, before: last });
        self.next = self.next.saturating_add(1);
        Ok(())
    }
}

/// Follows the lines behind the head to the last that holds, and says whether writing goes on right there.
fn find_end(head: &Head) -> io::Result<(Tail, bool)> {
    let mut tail = Tail { number: head.file, length: head.length, last: head.last };
    if !ends_with(head)? {
        error!("the audit log was changed or cut behind the vault's back; `strongroom audit verify` says where");
        return Ok((tail, false));
    }
    loop {
        let path = path_of(&head.directory, tail.number);
        let next = path_of(&head.directory, tail.number.saturating_add(1));
        let mut lines = match Lines::open(&path, tail.length) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((tail, true)),
            lines => lines?,
        };
        match follow(&mut lines, &mut tail)? {
            Rest::Nothing if next.exists() => tail = Tail { number: tail.number + 1, length: 0, ..tail },
            // Bytes without the end of a line are no line that anybody was told of.
            Rest::Nothing | Rest::Unfinished if !next.exists() => return Ok((tail, true)),
            _ => {
                error!(file = %path.display(), "the audit log goes on with what is no line of it; `strongroom audit \
                       verify` says where");
                return Ok((tail, false));
            }
        }
    }
}

/// What is behind the last line that holds.
enum Rest {
    Nothing,
    Unfinished,
    Foreign,
}

/// Goes on from `tail` as long as line follows line.
fn follow(lines: &mut Lines, tail: &mut Tail) -> io::Result<Rest> {
    loop {
        let link = match lines.next_piece()? {
            Piece::End => return Ok(Rest::Nothing),
            Piece::Incomplete(_) => return Ok(Rest::Unfinished),
            // A crash of the whole machine may leave a stretch of zeros.
            Piece::TooLong => return if has_line_end(lines)? { Ok(Rest::Foreign) } else { Ok(Rest::Unfinished) },
            Piece::Line(line) => Link::read(line),
        };
        match link.filter(|link| link.follows(tail.last)) {
            Some(link) => (tail.last, tail.length) = (link.position, lines.offset),
            None => return Ok(Rest::Foreign),
        }
    }
}

fn has_line_end(lines: &mut Lines) -> io::Result<bool> {
    loop {
        match lines.next_piece()? {
            Piece::Line(_) => return Ok(true),
            Piece::TooLong => {}
            Piece::Incomplete(_) | Piece::End => return Ok(false),
        }
    }
}

/// Whether the head's last line stands where the head says.
fn ends_with(head: &Head) -> io::Result<bool> {
    if head.length == 0 {
        return Ok(true);
    }
    let path = path_of(&head.directory, head.file);
    let end = match last_line(&path, head.length) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        end => end?,
    };
    Ok(end.is_some_and(|(link, end)| link.position == head.last && end == head.length))
}

/// Where to go on in files of which the state file knows nothing.
fn adopt(directory: &Path, numbers: &[u64]) -> io::Result<(Tail, bool)> {
    if numbers.is_empty() {
        return Ok((Tail { number: 1, length: 0, last: Position::default() }, true));
    }
    warn!("the state file does not know the audit log that is here; it goes on behind its last line");
    for (nth, &number) in numbers.iter().rev().enumerate() {
        let path = path_of(directory, number);
        let size = fs::metadata(&path)?.len();
        if let Some((link, end)) = last_line(&path, size)? {
            return Ok((Tail { number, length: end, last: link.position }, nth == 0));
        }
    }
    Ok((Tail { number: 0, length: 0, last: Position::default() }, false))
}

/// The last complete line within the first `length` bytes of a file, and where it ends.
fn last_line(path: &Path, length: u64) -> io::Result<Option<(Link, u64)>> {
    let file = open(path, OpenOptions::new().read(true))?;
    let start = length.saturating_sub(2 * MAX_LINE as u64);
    let mut bytes = vec![0; usize::try_from(length - start).unwrap_or_default()];
    match file.read_exact_at(&mut bytes, start) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let Some(end) = bytes.iter().rposition(|byte| *byte == b'\n') else { return Ok(None) };
    let line = bytes[..end].rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(Link::read(line).map(|link| (link, start + end as u64 + 1)))
}

/// The line before a file's first, as the first has it.
fn before(path: &Path) -> io::Result<Position> {
    Ok(match Lines::open(path, 0)?.next_piece()? {
        Piece::Line(line) => Link::read(line)
            .map(|link| Position { seq: link.position.seq - 1, hash: link.previous })
            .unwrap_or_default(),
        _ => Position::default(),
    })
}
