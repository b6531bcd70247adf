//! The audit log's own thread: takes what was recorded, in groups, and has it on the disk before anybody is told that it
//! is. Knows the files and how the queue is shared; never a caller.

use std::{collections::VecDeque, sync::Arc, thread, time::Duration};

use tracing::{error, info};

use super::{
    AuditError, Settings, Shared, UNRECORDED,
    files::{Files, Head},
    line::{Formatter, Position, Record},
    lost,
};
use crate::vault::store::{Store, StoreError};

/// How long lines are gathered before they are written together: with the disk's own time they are there within 100 ms.
const GATHER: Duration = Duration::from_millis(50);
/// Lines are written when they are so long together, in bytes, however many wait: the head behind them costs as much as a
/// thousand lines.
const CHUNK: usize = 2 << 20;
/// Records whose memory is kept for the next ones, however few these are.
const FEW: usize = 256;
/// How long to wait after a failed attempt to write.
const RETRY: Duration = Duration::from_secs(1);

/// Has the head on the disk when it returns.
pub(super) trait KeepHead: Send + 'static {
    /// Keeps this head in place of the last.
    fn keep(&mut self, head: &Head) -> Result<(), StoreError>;
}

impl KeepHead for Store {
    fn keep(&mut self, head: &Head) -> Result<(), StoreError> {
        self.keep_audit_head(head.clone())
    }
}

pub(super) struct Writer<K> {
    shared: Arc<Shared>,
    files: Files,
    keep: K,
    formatter: Formatter,
    /// Records without a line yet.
    batch: VecDeque<Record>,
    /// Lines that are not in the file yet…
    chunk: Vec<u8>,
    /// …how many they are, and the last of them.
    lines: usize,
    next: Position,
    /// The last line in the file.
    written: Position,
    /// Whether the state file does not know `written` yet.
    head_due: bool,
    /// Whether the file has no room for the next line.
    is_full: bool,
    /// Whether the last attempt to write failed.
    failing: bool,
    line: Vec<u8>,
}

impl<K: KeepHead> Writer<K> {
    /// Opens the log and starts its thread.
    pub(super) fn start(settings: &Settings, head: Option<Head>, keep: K) -> Result<Arc<Shared>, AuditError> {
        let (files, last) = Files::open(&settings.directory, settings.max_size, head.as_ref())?;
        let shared = Arc::new(Shared::new(settings));
        let writer = Self {
            shared: Arc::clone(&shared),
            files,
            keep,
            formatter: Formatter::default(),
            batch: VecDeque::new(),
            chunk: Vec::new(),
            lines: 0,
            next: last,
            written: last,
            head_due: head.is_none_or(|head| head.last != last),
            is_full: false,
            failing: false,
            line: Vec::new(),
        };
        thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run()).map_err(AuditError::Thread)?;
        Ok(shared)
    }

    fn run(mut self) {
        let mut spare = Vec::new();
        loop {
            let taken = self.shared.wait(self.failing.then_some(RETRY), GATHER, std::mem::take(&mut spare));
            self.files.set_max_size(taken.max_size);
            let count = taken.records.len();
            match self.batch.is_empty() {
                true => self.batch = taken.records.into(),
                false => self.batch.extend(taken.records),
            }
            match self.batch.back_mut() {
                _ if taken.lost == 0 => {}
                // One line for all that were lost while nothing could be written.
                Some(Record { operation: UNRECORDED, count: Some(count), .. }) => {
                    *count += taken.lost;
                    self.shared.has_room(1);
                }
                _ => self.batch.push_back(lost(taken.lost)),
            }
            match self.drive() {
                Ok(()) => {
                    self.shared.is_written(taken.upto, self.files.head(self.written));
                    // Whoever reads this is not refused any more.
                    if std::mem::take(&mut self.failing) {
                        info!("the audit log is written again");
                    }
                    // The memory of so many records serves the next as many, unless that is a lot for so few.
                    if self.batch.capacity() <= FEW.max(4 * count) {
                        spare = std::mem::take(&mut self.batch).into();
                    }
                }
                Err(why) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        error!("the audit log cannot be written: {why}. Make room or mend the disk; it is tried again");
                    }
                    self.shared.is_failing();
                }
            }
            if taken.closing {
                let shared = Arc::clone(&self.shared);
                // The directory is free for another before anybody hears of the end.
                drop(self);
                return shared.is_closed();
            }
        }
    }

    /// Has everything on the disk, the head behind it. After an error it goes on where it stopped.
    fn drive(&mut self) -> Result<(), String> {
        loop {
            self.settle()?;
            if self.batch.is_empty() {
                return Ok(());
            }
            if !self.files.is_open() {
                let directory = self.files.directory().display().to_string();
                self.files.begin_file(self.written).map_err(|e| format!("{directory}: {e}"))?;
            }
            self.fill();
        }
    }

    /// Makes lines of records, as many as the file takes.
    fn fill(&mut self) {
        while let Some(record) = self.batch.front()
            && self.chunk.len() < CHUNK
        {
            self.line.clear();
            let position = self.formatter.put(&mut self.line, record, self.next);
            if !self.files.fits(self.chunk.len(), self.line.len()) {
                self.is_full = true;
                return;
            }
            self.chunk.extend_from_slice(&self.line);
            self.lines += 1;
            self.next = position;
            self.batch.pop_front();
        }
    }

    /// Brings to the disk what has lines: first these, then the head; then goes what the head knows no more.
    fn settle(&mut self) -> Result<(), String> {
        if !self.chunk.is_empty() {
            let directory = self.files.directory().display().to_string();
            self.files.append(&self.chunk).map_err(|e| format!("{directory}: {e}"))?;
            let len = self.chunk.len();
            self.chunk.clear();
            // What a flood of lines took goes back with it.
            self.chunk.shrink_to(2 * len);
            self.shared.has_room(std::mem::take(&mut self.lines));
            self.written = self.next;
            self.head_due = true;
        }
        if std::mem::take(&mut self.is_full) {
            self.files.end_file(self.written);
            self.head_due = true;
        }
        if self.head_due {
            self.keep.keep(&self.files.head(self.written)).map_err(|e| e.to_string())?;
            self.head_due = false;
        }
        self.files.remove_doomed();
        Ok(())
    }
}
