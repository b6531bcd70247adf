//! Whether the audit log is what was written: follows the chain from file to file and holds it against the head. Reads
//! files only; needs no daemon.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use super::{
    files::{Head, Lines, Piece, numbers, path_of},
    line::{Link, Position},
};

/// Faults that a report names; further ones are counted.
const MAX_FAULTS: usize = 100;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many lines there are.
    pub lines: u64,
    /// In how many files.
    pub files: usize,
    /// The number of the first line that is kept.
    pub first: u64,
    /// The last line.
    pub last: Position,
    /// Bytes behind the last line without its end: what the daemon was writing when it was killed, or is writing now.
    pub unfinished: usize,
    /// Files that are no part of the chain that the head knows: those of an earlier one.
    pub unrelated: usize,
    /// What is wrong, in the order of the files.
    pub faults: Vec<Fault>,
    /// Faults beyond those that are named.
    pub more_faults: u64,
}

impl Report {
    /// How many faults there are, named or not.
    pub fn fault_count(&self) -> u64 {
        self.faults.len() as u64 + self.more_faults
    }
}

/// Something wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file.
    pub file: PathBuf,
    /// The line in it, counted from 1.
    pub line: u64,
    /// What it is.
    pub kind: FaultKind,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It was changed: the line behind it has another hash of it.
    Changed,
    /// It, or the line before it, was changed: they do not fit together.
    Unchained,
    /// It is no line of this log.
    Foreign,
    /// Lines before it were removed, or stand elsewhere.
    Missing {
        /// The first that should be here.
        from: u64,
        /// The last that should be here.
        to: u64,
    },
    /// It stands behind lines that were written later.
    Misplaced {
        /// Its number.
        seq: u64,
    },
    /// It is not the line that the state file has as its last, or that was known before: this or something before it was
    /// changed, and the hashes behind the change were made anew.
    NotAsKnown,
    /// The log ends with it, although more was written.
    Cut {
        /// How many lines are missing from the end.
        missing: u64,
    },
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Changed => f.write_str("the line was changed"),
            Self::Unchained => f.write_str("the line or the one before it was changed: they do not fit together"),
            Self::Foreign => f.write_str("this is no line of the log"),
            Self::Missing { from, to } if from == to => {
                write!(f, "line number {from} is missing before this one: it was removed or moved")
            }
            Self::Missing { from, to } => {
                write!(f, "lines number {from} to {to} are missing before this one: they were removed or moved")
            }
            Self::Misplaced { seq } => write!(f, "the line has the number {seq}, which does not belong here"),
            Self::NotAsKnown => f.write_str(
                "the line is not the one that is known: it or one before it was changed, and the chain made anew",
            ),
            Self::Cut { missing } => write!(f, "the log ends here, and its last lines are missing: {missing}"),
        }
    }
}

/// Reads all that is kept of the log in `directory`. Without a head a cut end cannot be told. `known` are lines as they
/// were seen before.
pub fn verify(directory: &Path, head: Option<&Head>, known: &[Position]) -> io::Result<Report> {
    let all = numbers(directory)?;
    let kept: Vec<u64> = all.iter().copied().filter(|n| head.is_none_or(|head| *n >= head.oldest_file)).collect();
    let mut walk = Walk {
        head,
        known,
        report: Report { files: kept.len(), unrelated: all.len() - kept.len(), ..Report::default() },
        last: head.map(|head| head.before_oldest),
        place: Place { file: path_of(directory, head.map_or(1, |head| head.oldest_file)), line: 0 },
        before: Before::Fits,
        unfinished: None,
    };
    for number in kept {
        walk.file(path_of(directory, number))?;
    }
    Ok(walk.end())
}

/// A file, and a line in it counted from 1.
#[derive(Clone)]
struct Place {
    file: PathBuf,
    line: u64,
}

/// How the line before stood to what was before it: only the next line tells what that means.
enum Before {
    Fits,
    /// Its number was right, the hash in it was not that of the line at this place.
    Unchained(Place),
    /// It came too early behind this position; the fault has this place in the report.
    Early(Position, usize),
    /// It came too late; the fault has this place in the report.
    Late(usize),
    /// It was no line, nor were those before it: so many.
    Foreign(u64),
}

struct Walk<'a> {
    head: Option<&'a Head>,
    known: &'a [Position],
    report: Report,
    /// The last line in the chain; `None` where it is not known.
    last: Option<Position>,
    place: Place,
    before: Before,
    /// Where bytes without the end of a line are.
    unfinished: Option<Place>,
}

impl Walk<'_> {
    fn file(&mut self, file: PathBuf) -> io::Result<()> {
        let mut lines = Lines::open(&file, 0)?;
        for line in 1.. {
            let here = Place { file: file.clone(), line };
            let link = match lines.next_piece()? {
                Piece::End => break,
                Piece::Incomplete(bytes) => {
                    self.report.unfinished = bytes;
                    self.unfinished = Some(here);
                    break;
                }
                Piece::TooLong => None,
                Piece::Line(line) => Link::read(line),
            };
            if let Some(unfinished) = self.unfinished.take() {
                // Lines came behind it, so it was no last one.
                self.report.unfinished = 0;
                self.fault(unfinished, FaultKind::Foreign);
            }
            match link {
                Some(link) => self.line(link, here),
                None => self.foreign(here),
            }
        }
        Ok(())
    }

    fn foreign(&mut self, here: Place) {
        let before = match std::mem::replace(&mut self.before, Before::Fits) {
            Before::Foreign(n) => n,
            other => {
                self.settle(other, None);
                0
            }
        };
        self.fault(here, FaultKind::Foreign);
        self.before = Before::Foreign(before + 1);
    }

    fn line(&mut self, link: Link, here: Place) {
        self.report.lines += 1;
        if self.report.lines == 1 {
            self.report.first = link.position.seq;
        }
        let before = std::mem::replace(&mut self.before, Before::Fits);
        let seq = link.position.seq;
        let Some(last) = self.last else { return self.accept(link, here) };
        let expected = last.seq.saturating_add(1);
        match before {
            // Lines that became something else; or, the number being right, something that was put between.
            Before::Foreign(n) if seq == expected.saturating_add(n) => return self.accept(link, here),
            // Both have the number of the line before wrong: it was that which was changed.
            Before::Early(behind, fault) if seq == behind.seq.saturating_add(2) => {
                self.rename(fault, FaultKind::Changed);
                return self.accept(link, here);
            }
            Before::Late(fault) if seq == expected.saturating_add(1) => {
                self.rename(fault, FaultKind::Changed);
                return self.accept(link, here);
            }
            Before::Unchained(place) => {
                let changed = self.settle(Before::Unchained(place), Some(link));
                if changed && seq == expected {
                    return self.accept(link, here);
                }
            }
            _ => {}
        }
        if seq < expected {
            let fault = self.fault(here, FaultKind::Misplaced { seq });
            self.before = Before::Late(fault);
        } else if seq > expected {
            let fault = self.fault(here.clone(), FaultKind::Missing { from: expected, to: seq - 1 });
            self.accept(link, here);
            self.before = Before::Early(last, fault);
        } else {
            let doubted = self.place.clone();
            self.accept(link, here);
            if link.previous != last.hash {
                self.before = Before::Unchained(doubted);
            }
        }
    }

    /// Takes the line as the next in the chain.
    fn accept(&mut self, link: Link, here: Place) {
        let Position { seq, hash } = link.position;
        let head = self.head.map(|head| &head.last);
        if head.into_iter().chain(self.known).any(|known| known.seq == seq && known.hash != hash) {
            self.fault(here.clone(), FaultKind::NotAsKnown);
        }
        (self.last, self.place) = (Some(link.position), here);
    }

    /// Says which of two lines that do not fit together was changed, by the one behind them, and whether it was the second.
    fn settle(&mut self, before: Before, next: Option<Link>) -> bool {
        let Before::Unchained(first) = before else { return false };
        let second = self.place.clone();
        let is_head = self.head.is_some_and(|head| Some(head.last) == self.last);
        let fits = match (next, self.last) {
            (Some(next), Some(last)) => Some(next.follows(last)),
            _ => is_head.then_some(true),
        };
        match fits {
            Some(true) if first.line > 0 => self.fault(first, FaultKind::Changed),
            Some(false) => self.fault(second, FaultKind::Changed),
            _ => self.fault(second, FaultKind::Unchained),
        };
        fits == Some(false)
    }

    /// Adds a fault to the report, and gives its place there.
    fn fault(&mut self, Place { file, line }: Place, kind: FaultKind) -> usize {
        if self.report.faults.len() < MAX_FAULTS {
            self.report.faults.push(Fault { file, line, kind });
        } else {
            self.report.more_faults += 1;
        }
        self.report.faults.len() - 1
    }

    fn rename(&mut self, fault: usize, kind: FaultKind) {
        if let Some(fault) = self.report.faults.get_mut(fault) {
            fault.kind = kind;
        }
    }

    fn end(mut self) -> Report {
        let before = std::mem::replace(&mut self.before, Before::Fits);
        self.settle(before, None);
        let last = self.last.unwrap_or_default();
        let known = self.head.map(|head| &head.last).into_iter().chain(self.known).map(|known| known.seq).max();
        if let Some(known) = known.filter(|known| last.seq < *known) {
            let place = self.place.clone();
            self.fault(place, FaultKind::Cut { missing: known - last.seq });
        }
        self.report.last = last;
        self.report
    }
}
