//! What is made at the start of the state file and its second copy, each of which may be missing, behind or damaged. Knows both
//! by what they hold, not what records mean.

use std::{
    collections::btree_map::Entry,
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use aws_lc_rs::rand;
use rustix::fs::OFlags;
use tracing::{error, warn};

use super::{
    StoreError,
    copy::{self, Copy, Found, new_path, remove_if_there, sync_directory},
    envelope::{Table, name},
    file::private,
    record::{MarkSecret, VERSION},
    salvage::{self, Salvaged},
    tables::{Fault, MARK_SECRET, MAX_READ, Open, PINS_HELD, Records, StoreId, Tables},
};

/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 4 * MAX_READ as u64;
/// The most things that are named as lost in one sentence.
const MAX_TOLD: usize = 10;
/// The most damaged files of one name that are kept.
const MAX_ASIDE: u32 = 99;

/// What had to be mended when the store was opened. Displayed, it is a sentence or two for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovery {
    /// What was wrong.
    pub why: String,
    /// Whether everything that was ever acknowledged is there.
    pub complete: bool,
    /// Where the damaged files are now.
    pub moved: Vec<PathBuf>,
    /// What is known to be missing, by name; there may be more, unless it is complete.
    pub lost: Vec<String>,
}

impl Recovery {
    /// Writes it to the log.
    pub(super) fn log(&self) {
        if self.complete {
            return warn!("{self}");
        }
        error!("{self}");
        for lost in self.lost.iter().skip(MAX_TOLD) {
            error!("lost: {lost}");
        }
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; ", self.why)?;
        if self.complete {
            f.write_str("nothing was lost")?;
        } else {
            f.write_str(
                "what could be read was kept, and what was removed lately may be back. Look through strongroom keys and \
                 strongroom slot list, and restore what is missing from a backup; PINs from the configuration are not \
                 sent until strongroom unlock allows it",
            )?;
        }
        for (n, lost) in self.lost.iter().take(MAX_TOLD).enumerate() {
            write!(f, "{}{lost}", if n == 0 { ". Lost: " } else { ", " })?;
        }
        if self.lost.len() > MAX_TOLD {
            write!(f, " and {} more, which the log names", self.lost.len() - MAX_TOLD)?;
        }
        for moved in &self.moved {
            write!(f, ". The damaged file is {}", moved.display())?;
        }
        Ok(())
    }
}

/// Both files, the same and whole.
pub(super) struct Sound {
    pub(super) file: File,
    pub(super) tables: Tables,
    pub(super) copy: Copy,
    pub(super) records: Records,
    /// What had to be done for that.
    pub(super) recovery: Option<Recovery>,
}

/// What the state file turned out to be.
enum Main {
    Missing,
    Good { file: File, tables: Tables, state: State },
    Damaged(String),
}

/// Everything as of one change.
struct State {
    id: StoreId,
    sequence: u64,
    records: Records,
}

/// Opens the state file and its copy, mends what has to be mended, or makes both. What opening changes in a state file that
/// needs no mending is held back until it is settled.
pub(super) fn open(path: &Path, copy_path: &Path) -> Result<Sound, StoreError> {
    let main = open_main(path)?;
    let copy_file = open_existing(copy_path)?;
    let bytes = copy_file.as_ref().map(|_| read_all(copy_path)).transpose()?;
    let found = bytes.as_deref().and_then(copy::read);
    let paths = Paths { path, copy_path };
    match (main, copy_file, found) {
        (Main::Good { file, tables, state }, Some(copy_file), Some(found)) if state.is_in(&found) => {
            let copy = Copy::resume(copy_file, &found);
            Ok(Sound { file, tables, copy, records: state.records, recovery: None })
        }
        (Main::Good { file, tables, state }, _, found) => match paths.newer(&state, found, bytes.as_deref()) {
            Some((newer, complete)) => {
                drop((tables, file));
                let why = format!("{} was behind its second copy and was brought up to date", path.display());
                paths.restore(newer, Recovery { why, complete, moved: Vec::new(), lost: Vec::new() })
            }
            None => paths.renew_copy(file, tables, state, bytes.as_deref()),
        },
        (Main::Missing, None, _) => {
            let (file, tables) = create(path, None).map_err(|fault| fault.at(path))?;
            let state = read_state(&tables).map_err(|fault| fault.at(path))?;
            paths.renew_copy(file, tables, state, None)
        }
        (main, _, found) => {
            let why = match main {
                Main::Damaged(why) => format!("{} was damaged ({why})", path.display()),
                _ => format!("{} was missing", path.display()),
            };
            match found.filter(|found| found.complete) {
                Some(Found { id, sequence, records, .. }) => {
                    let why = format!("{why} and was restored from its second copy");
                    let recovery = Recovery { why, complete: true, moved: Vec::new(), lost: Vec::new() };
                    paths.restore(State { id, sequence, records }, recovery)
                }
                None => paths.salvage(why, &bytes.unwrap_or_default()),
            }
        }
    }
}

/// Where the two files are.
struct Paths<'a> {
    path: &'a Path,
    copy_path: &'a Path,
}

impl Paths<'_> {
    /// What the copy knows that the state file, which is whole, does not: redb goes back to the change before when the last
    /// is damaged. Says as well whether nothing is missing in between.
    fn newer(&self, state: &State, found: Option<Found>, bytes: Option<&[u8]>) -> Option<(State, bool)> {
        match found {
            Some(found) if found.id != state.id => None,
            Some(found) if found.complete => (found.sequence > state.sequence)
                .then_some((State { id: found.id, sequence: found.sequence, records: found.records }, true)),
            _ => {
                let (records, sequence, complete) = salvage::later(&state.id, &state.records, state.sequence, bytes?)?;
                Some((State { id: state.id, sequence, records }, complete))
            }
        }
    }

    /// Writes the copy from the state file, which is whole.
    fn renew_copy(&self, file: File, tables: Tables, state: State, old: Option<&[u8]>) -> Result<Sound, StoreError> {
        tables.settle().map_err(|fault| fault.at(self.path))?;
        let State { id, sequence, records } = state;
        let (mut moved, mut why) = (Vec::new(), None);
        match old.map(copy::read) {
            // The first that there is.
            None if sequence <= 1 => {}
            None => why = Some(format!("{} was missing and was written anew", self.copy_path.display())),
            Some(Some(found)) if found.id == id && found.sequence <= sequence => {
                // The change before a crash was not appended, or not wholly.
                if !found.complete {
                    let path = self.copy_path.display();
                    warn!("{path} was whole up to change {} of {sequence} and was written anew", found.sequence);
                }
            }
            Some(_) => {
                moved.extend(aside(self.copy_path).map_err(|e| io_error(self.copy_path, e))?);
                why = Some(format!("{} was damaged and was written anew", self.copy_path.display()));
            }
        }
        let copy = Copy::create(self.copy_path, &id, sequence, &records).map_err(|e| io_error(self.copy_path, e))?;
        let recovery = why.map(|why| Recovery { why, complete: true, moved, lost: Vec::new() });
        Ok(Sound { file, tables, copy, records, recovery })
    }

    /// Keeps what can be read of both. With nothing at all the damaged files stay where they are.
    fn salvage(&self, why: String, copy: &[u8]) -> Result<Sound, StoreError> {
        let main = if self.path.exists() { read_all(self.path)? } else { Vec::new() };
        let Salvaged { mut records, sequence, lost } = salvage::salvage(&main, copy);
        if records.is_empty() {
            let path = if self.path.exists() { self.path } else { self.copy_path };
            return Err(StoreError::Damaged { path: path.to_owned(), why });
        }
        let mut id = StoreId::default();
        rand::fill(&mut id).map_err(|_| StoreError::NoRandom)?;
        let sequence = sequence + 1;
        if let Entry::Vacant(secret) = records.entry(name(Table::Single, MARK_SECRET)) {
            let new = MarkSecret::generate().map_err(|_| StoreError::NoRandom)?;
            secret.insert((sequence, new.encode().to_vec()));
        }
        let why = format!("{why}, and so was its second copy");
        self.restore(State { id, sequence, records }, Recovery { why, complete: false, moved: Vec::new(), lost })
    }

    /// Writes both files from `state`. At each moment the old ones are there, or the new ones.
    fn restore(&self, mut state: State, mut recovery: Recovery) -> Result<Sound, StoreError> {
        if !recovery.complete {
            state.records.insert(name(Table::Single, PINS_HELD), (state.sequence, vec![VERSION]));
        }
        for path in [self.path, self.copy_path] {
            let is_copy_whole = path == self.copy_path && recovery.complete;
            if !is_copy_whole {
                recovery.moved.extend(aside(path).map_err(|e| io_error(path, e))?);
            }
        }
        let (file, tables) = create(self.path, Some(&state)).map_err(|fault| fault.at(self.path))?;
        let State { id, sequence, records } = state;
        let copy = Copy::create(self.copy_path, &id, sequence, &records).map_err(|e| io_error(self.copy_path, e))?;
        Ok(Sound { file, tables, copy, records, recovery: Some(recovery) })
    }
}

impl State {
    fn is_in(&self, found: &Found) -> bool {
        found.complete && found.id == self.id && found.sequence == self.sequence && found.records == self.records
    }
}

fn open_main(path: &Path) -> Result<Main, StoreError> {
    let Some(file) = open_existing(path)? else { return Ok(Main::Missing) };
    // To redb an empty file is a new one. Here it is one that lost everything.
    if file.metadata().map_err(|e| io_error(path, e))?.len() == 0 {
        return Ok(Main::Damaged("it is empty".to_owned()));
    }
    let opened = Tables::open(&file, Open::Held).and_then(|tables| Ok((read_state(&tables)?, tables)));
    match opened.map_err(|fault| fault.at(path)) {
        Ok((state, tables)) => Ok(Main::Good { file, tables, state }),
        Err(StoreError::Damaged { why, .. }) => Ok(Main::Damaged(why)),
        Err(error) => Err(error),
    }
}

fn read_state(tables: &Tables) -> Result<State, Fault> {
    let (id, sequence, records) = tables.read()?;
    Ok(State { id, sequence, records })
}

/// Opens what is at `path`, if it is a file that only its owner reaches.
fn open_existing(path: &Path) -> Result<Option<File>, StoreError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(path, error)),
        Ok(found) if !found.is_file() => {
            return Err(StoreError::Damaged { path: path.to_owned(), why: "it is not a file".to_owned() });
        }
        Ok(found) => private(path, &found, "600")?,
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options.open(path).map(Some).map_err(|source| io_error(path, source))
}

fn read_all(path: &Path) -> Result<Vec<u8>, StoreError> {
    let length = fs::metadata(path).map_err(|e| io_error(path, e))?.len();
    if length > MAX_FILE {
        return Err(StoreError::Damaged { path: path.to_owned(), why: "it is longer than 1 GiB".to_owned() });
    }
    fs::read(path).map_err(|e| io_error(path, e))
}

/// Makes the state file under another name, and gives it the right one when it is complete and has been read back.
fn create(path: &Path, state: Option<&State>) -> Result<(File, Tables), Fault> {
    let new = new_path(path);
    remove_if_there(&new)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
    let tables = Tables::open(&file, Open::New)?;
    if let Some(State { id, sequence, records }) = state {
        tables.fill(id, *sequence, records)?;
        if tables.read()? != (*id, *sequence, records.clone()) {
            return Err(Fault::Damaged("what was written does not read back: the disk may be failing".to_owned()));
        }
    }
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_directory(path)?;
    // The directory itself may be new.
    path.parent().map_or(Ok(()), sync_directory)?;
    Ok((file, tables))
}

/// Gives a damaged file a second name that stays: `NAME.damaged-N`. `None` where there is no file.
fn aside(path: &Path) -> io::Result<Option<PathBuf>> {
    if !path.exists() {
        return Ok(None);
    }
    for n in 1..=MAX_ASIDE {
        let mut to = path.as_os_str().to_owned();
        to.push(format!(".damaged-{n}"));
        match fs::hard_link(path, &to) {
            Ok(()) => return Ok(Some(to.into())),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

fn io_error(path: &Path, source: io::Error) -> StoreError {
    StoreError::Io { path: path.to_owned(), source }
}
