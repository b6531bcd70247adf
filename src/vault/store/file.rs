//! The state file: where it is and who may reach it, its tables and their versions, and how it is opened and written.
//! Knows redb; decides nothing about devices or PINs.
//!
//! redb promises an error, and may still panic, on a file that was damaged. So everything that touches one runs where a
//! panic is caught.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use aws_lc_rs::rand;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError, TableDefinition,
    WriteTransaction, backends::FileBackend,
};
use rustix::fs::OFlags;
use tracing::warn;
use zeroize::Zeroizing;

use super::{
    KnownDevice, StoreError,
    marks::{Digest, MAX_MARKS},
    record::{self, DeviceRecord, MarkSecret, MarkState, RecordError},
};
use crate::devices::{MAX_KEYS, MAX_LABEL, Scan};

type Bytes = &'static [u8];
type Migration = fn(&WriteTransaction) -> Result<(), Fault>;

/// What concerns the file as a whole: [`SCHEMA_VERSION`] and [`MARK_SECRET`].
const META: TableDefinition<'_, Bytes, Bytes> = TableDefinition::new("meta");
/// A device's name → [`DeviceRecord`].
const DEVICES: TableDefinition<'_, Bytes, Bytes> = TableDefinition::new("devices");
/// A device's name and a slot there → the key in it.
const PLACES: TableDefinition<'_, (Bytes, Bytes), Bytes> = TableDefinition::new("places");
/// A token's serial and a [`Digest`] → [`MarkState`].
const MARKS: TableDefinition<'_, (Bytes, Bytes), Bytes> = TableDefinition::new("pin-marks");

/// `uint32`
const SCHEMA_VERSION: Bytes = b"schema-version";
/// [`MarkSecret`]
const MARK_SECRET: Bytes = b"pin-mark-secret";

/// What takes a file of each version to the next; an empty one has version 0. None is ever changed once it is released.
const MIGRATIONS: [Migration; 1] = [first_tables];

/// The file's name in its directory.
const NAME: &str = "state.redb";
/// The most devices that are remembered: as many as a configuration may have.
const MAX_DEVICES: usize = 1024;
/// The most that is read of devices and places, in bytes.
const MAX_READ: usize = 64 << 20;
/// redb would take a gigabyte for its cache. Everything here is read once.
const CACHE: usize = 1 << 20;
/// When nothing but the time changed, it is written once in so many seconds.
const SEEN_STEP: u64 = 60 * 60;

/// The open file. No other process, and no other value of this type, has it open.
pub(super) struct StateFile {
    path: PathBuf,
    /// The same open file as the database's: after a failed write redb wants to be opened again.
    file: File,
    /// `None` after a failed write.
    database: Option<Database>,
}

/// What was in the file.
pub(super) struct Contents {
    pub(super) devices: Vec<KnownDevice>,
    pub(super) secret: MarkSecret,
    pub(super) marks: Vec<(String, Digest, MarkState)>,
}

/// What went wrong inside a transaction.
#[derive(Debug)]
enum Fault {
    Redb(redb::Error),
    Newer(u32),
    Damaged(String),
    NoRandom,
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

impl Fault {
    fn at(self, path: &Path) -> StoreError {
        let path = path.to_owned();
        match self {
            Self::Redb(redb::Error::Io(source))
                if !matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                StoreError::Io { path, source }
            }
            Self::Redb(redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch) => {
                StoreError::InUse { path }
            }
            Self::Redb(error) => StoreError::Damaged { path, why: error.to_string() },
            Self::Newer(version) => StoreError::Newer { path, version, known: latest() },
            Self::Damaged(why) => StoreError::Damaged { path, why },
            Self::NoRandom => StoreError::NoRandom,
        }
    }
}

fn latest() -> u32 {
    MIGRATIONS.len() as u32
}

/// Runs what touches the database; a panic in it means that the file is damaged.
fn guarded<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    let panicked = |_| Err(Fault::Damaged("reading it failed in an unforeseen way".to_owned()));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

impl StateFile {
    /// Opens the file in `directory`, or makes both. Reads and checks all of it.
    pub(super) fn open(directory: &Path) -> Result<(Self, Contents), StoreError> {
        let failed = |source| StoreError::Io { path: directory.to_owned(), source };
        let directory = &std::path::absolute(directory).map_err(failed)?;
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        private(directory, &fs::metadata(directory).map_err(failed)?, "700")?;
        let path = directory.join(NAME);
        loop {
            match fs::symlink_metadata(&path) {
                Ok(found) => return Self::open_existing(path, &found),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(StoreError::Io { path, source }),
            }
            if let Some(made) = Self::create(&path)? {
                return Ok(made);
            }
        }
    }

    fn open_existing(path: PathBuf, found: &fs::Metadata) -> Result<(Self, Contents), StoreError> {
        if !found.is_file() {
            return Err(StoreError::Damaged { path, why: "it is not a file".to_owned() });
        }
        private(&path, found, "600")?;
        // To redb an empty file is a new one. Here it is one that lost its PIN marks.
        if found.len() == 0 {
            return Err(StoreError::Damaged { path, why: "it is empty".to_owned() });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let opened = options.open(&path).map_err(Fault::from).and_then(|file| {
            let database = open_database(&file)?;
            let contents = guarded(|| {
                migrate(&database, false)?;
                load(&database)
            })?;
            Ok((file, database, contents))
        });
        let (file, database, contents) = opened.map_err(|fault| fault.at(&path))?;
        Ok((Self { path, file, database: Some(database) }, contents))
    }

    /// Makes the file under a name of its own and gives it the right one when it is complete, so that a crash leaves no
    /// half a file. `None` when somebody else was faster.
    fn create(path: &Path) -> Result<Option<(Self, Contents)>, StoreError> {
        let new = path.with_extension(format!("redb.{}", std::process::id()));
        let made = Self::create_at(&new).map_err(|fault| fault.at(&new));
        let linked = made.and_then(|made| match fs::hard_link(&new, path) {
            Ok(()) => Ok(Some(made)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(source) => Err(StoreError::Io { path: path.to_owned(), source }),
        });
        // The other name is of no use, whatever came of it.
        let _ = fs::remove_file(&new);
        let Some((mut file, contents)) = linked? else { return Ok(None) };
        file.path = path.to_owned();
        sync_directories(path).map_err(|source| StoreError::Io { path: path.to_owned(), source })?;
        Ok(Some((file, contents)))
    }

    fn create_at(new: &Path) -> Result<(Self, Contents), Fault> {
        match fs::remove_file(new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(new)?;
        let database = open_database(&file)?;
        let contents = guarded(|| {
            migrate(&database, true)?;
            load(&database)
        })?;
        file.sync_all()?;
        Ok((Self { path: new.to_owned(), file, database: Some(database) }, contents))
    }

    /// Keeps what a scan found on a device: in place of what was known when the scan is complete, beside it otherwise.
    pub(super) fn remember(&mut self, device: &str, kind: &str, scan: &Scan, now: u64) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut devices = transaction.open_table(DEVICES)?;
            let before = devices.get(device.as_bytes())?.and_then(|old| DeviceRecord::decode(old.value()).ok());
            let places_changed = replace_places(transaction, device, scan)?;
            let after = DeviceRecord {
                kind: kind.to_owned(),
                serial: scan.status.serial.clone(),
                first_seen: before.as_ref().map_or(now, |old| old.first_seen),
                last_seen: now,
            };
            let same = |old: &DeviceRecord| {
                let lately = now.checked_sub(old.last_seen).is_some_and(|since| since < SEEN_STEP);
                lately && DeviceRecord { last_seen: old.last_seen, ..after.clone() } == *old
            };
            if !places_changed && before.as_ref().is_some_and(same) {
                return Ok(false);
            }
            devices.insert(device.as_bytes(), &*after.encode())?;
            Ok(true)
        })
    }

    /// Drops a device and the places on it.
    pub(super) fn forget_device(&mut self, device: &str) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.open_table(DEVICES)?.remove(device.as_bytes())?;
            let [from, to] = all_of(device);
            transaction.open_table(PLACES)?.retain_in((&*from, &[][..])..(&*to, &[][..]), |_, _| false)?;
            Ok(true)
        })
    }

    /// Sets a PIN's mark, or with `None` removes it.
    pub(super) fn mark(&mut self, serial: &str, digest: &Digest, state: Option<MarkState>) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut marks = transaction.open_table(MARKS)?;
            let name = (serial.as_bytes(), &digest[..]);
            match state {
                Some(state) => marks.insert(name, &*state.encode())?,
                None => marks.remove(name)?,
            };
            Ok(true)
        })
    }

    /// Removes all marks of a token.
    pub(super) fn clear_marks(&mut self, serial: &str) -> Result<(), StoreError> {
        self.write(|transaction| {
            let [from, to] = all_of(serial);
            transaction.open_table(MARKS)?.retain_in((&*from, &[][..])..(&*to, &[][..]), |_, _| false)?;
            Ok(true)
        })
    }

    /// Makes a change, which says whether there is anything to commit. It is on the disk when this returns; after an
    /// error it may be or not.
    fn write(&mut self, change: impl FnOnce(&WriteTransaction) -> Result<bool, Fault>) -> Result<(), StoreError> {
        let written = self.try_write(change);
        if written.is_err()
            && let Some(broken) = self.database.take()
        {
            let _ = guarded(|| {
                drop(broken);
                Ok(())
            });
        }
        written.map_err(|fault| fault.at(&self.path))
    }

    fn try_write(&mut self, change: impl FnOnce(&WriteTransaction) -> Result<bool, Fault>) -> Result<(), Fault> {
        let database = match &mut self.database {
            Some(database) => database,
            none => none.insert(open_database(&self.file)?),
        };
        guarded(|| {
            let transaction = begin(database)?;
            if change(&transaction)? {
                transaction.commit()?;
            } else {
                transaction.abort()?;
            }
            Ok(())
        })
    }
}

/// The names that begin with exactly `name`: from the first, to the second that no longer does.
fn all_of(name: &str) -> [Vec<u8>; 2] {
    [name.into(), [name.as_bytes(), &[0]].concat()]
}

/// A transaction that is on the disk once it is committed. Labels in it are a stranger's words: two phases leave nothing
/// to the strength of redb's checksums.
fn begin(database: &Database) -> Result<WriteTransaction, Fault> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    transaction.set_two_phase_commit(true);
    Ok(transaction)
}

fn open_database(file: &File) -> Result<Database, Fault> {
    let file = file.try_clone()?;
    guarded(|| {
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
        match builder.create_with_backend(FileBackend::new(file)?) {
            // Something else than a database is not an error of the disk.
            Err(DatabaseError::Storage(StorageError::Io(e))) if e.kind() == io::ErrorKind::InvalidData => {
                Err(Fault::Damaged(e.to_string()))
            }
            opened => Ok(opened?),
        }
    })
}

/// Brings the tables to the newest version, in one transaction.
fn migrate(database: &Database, new: bool) -> Result<(), Fault> {
    let transaction = begin(database)?;
    let version = schema_version(&transaction)?;
    let steps = match version {
        None if new => &MIGRATIONS[..],
        None => return Err(Fault::Damaged("it has no schema version".to_owned())),
        Some(version) => MIGRATIONS.get(version as usize..).ok_or(Fault::Newer(version))?,
    };
    if steps.is_empty() {
        return Ok(transaction.abort()?);
    }
    for step in steps {
        step(&transaction)?;
    }
    transaction.open_table(META)?.insert(SCHEMA_VERSION, &latest().to_be_bytes()[..])?;
    Ok(transaction.commit()?)
}

fn schema_version(transaction: &WriteTransaction) -> Result<Option<u32>, Fault> {
    let meta = transaction.open_table(META)?;
    let Some(version) = meta.get(SCHEMA_VERSION)? else { return Ok(None) };
    let bytes = version.value().try_into();
    Ok(Some(u32::from_be_bytes(bytes.map_err(|_| Fault::Damaged("its schema version is none".to_owned()))?)))
}

/// Version 1.
fn first_tables(transaction: &WriteTransaction) -> Result<(), Fault> {
    let mut secret = MarkSecret { key: Zeroizing::new([0; 32]), salt: [0; 16] };
    rand::fill(&mut *secret.key).map_err(|_| Fault::NoRandom)?;
    rand::fill(&mut secret.salt).map_err(|_| Fault::NoRandom)?;
    transaction.open_table(META)?.insert(MARK_SECRET, &**secret.encode())?;
    transaction.open_table(DEVICES)?;
    transaction.open_table(PLACES)?;
    transaction.open_table(MARKS)?;
    Ok(())
}

fn load(database: &Database) -> Result<Contents, Fault> {
    let transaction = database.begin_read()?;
    let unusable = |error: RecordError| Fault::Damaged(format!("its key for PIN marks is unusable: {error}"));
    let meta = transaction.open_table(META)?;
    let secret = meta.get(MARK_SECRET)?.ok_or_else(|| Fault::Damaged("it has no key for PIN marks".to_owned()))?;
    let secret = MarkSecret::decode(secret.value()).map_err(unusable)?;

    let mut read = 0;
    let mut count = |name: &[u8], value: &[u8]| {
        read += name.len() + value.len();
        if read <= MAX_READ { Ok(()) } else { Err(Fault::Damaged("it holds more than 64 MiB".to_owned())) }
    };
    let mut devices = BTreeMap::new();
    for entry in transaction.open_table(DEVICES)?.iter()? {
        let (name, value) = entry?;
        count(name.value(), value.value())?;
        match record::label(name.value()).and_then(|name| Ok((name, DeviceRecord::decode(value.value())?))) {
            Ok(_) if devices.len() == MAX_DEVICES => {
                warn!(device = %shown(name.value()), "more than {MAX_DEVICES} devices are remembered; skipped");
            }
            Ok((name, record)) => {
                let DeviceRecord { kind, serial, first_seen, last_seen } = record;
                let device = KnownDevice { name: name.clone(), kind, serial, first_seen, last_seen, keys: Vec::new() };
                devices.insert(name, device);
            }
            Err(why) => warn!(device = %shown(name.value()), %why, "the record of a device was skipped"),
        }
    }
    for entry in transaction.open_table(PLACES)?.iter()? {
        let (name, value) = entry?;
        let (device, slot) = name.value();
        count(slot, value.value())?;
        let keys = std::str::from_utf8(device).ok().and_then(|device| devices.get_mut(device)).map(|d| &mut d.keys);
        match (keys, record::decode_key(slot, value.value())) {
            (Some(keys), Ok(key)) if keys.len() < MAX_KEYS => keys.push(key),
            (Some(_), Ok(_)) => {
                warn!(device = %shown(device), slot = %shown(slot), "more keys than a device can have; skipped");
            }
            (None, _) => {
                warn!(device = %shown(device), slot = %shown(slot), "the place is on no known device; skipped");
            }
            (_, Err(why)) => {
                warn!(device = %shown(device), slot = %shown(slot), %why, "the record of a key was skipped");
            }
        }
    }
    let mut marks = Vec::new();
    for entry in transaction.open_table(MARKS)?.iter()? {
        let (name, value) = entry?;
        let (serial, digest) = name.value();
        if marks.len() == MAX_MARKS {
            return Err(Fault::Damaged(format!("it holds more than {MAX_MARKS} PIN marks")));
        }
        match (record::label(serial), Digest::try_from(digest), MarkState::decode(value.value())) {
            (Ok(serial), Ok(digest), Ok(state)) => marks.push((serial, digest, state)),
            // Whatever it was, that PIN was not accepted.
            (Ok(serial), Ok(digest), Err(_)) => marks.push((serial, digest, MarkState::Refused)),
            _ => warn!(serial = %shown(serial), "a PIN's mark was skipped"),
        }
    }
    Ok(Contents { devices: devices.into_values().collect(), secret, marks })
}

/// Brings the places of `device` in line with a scan. Says whether anything changed.
fn replace_places(transaction: &WriteTransaction, device: &str, scan: &Scan) -> Result<bool, Fault> {
    let mut places = transaction.open_table(PLACES)?;
    let [from, to] = all_of(device);
    let whole = || (&*from, &[][..])..(&*to, &[][..]);
    let mut changed = false;
    if scan.complete {
        let found: BTreeSet<&[u8]> = scan.keys.iter().map(|key| &*key.slot.0).collect();
        places.retain_in(whole(), |(_, slot), _| {
            let stays = found.contains(slot);
            changed |= !stays;
            stays
        })?;
    }
    let mut known = places.range(whole())?.count();
    for key in &scan.keys {
        let (name, value) = ((device.as_bytes(), &*key.slot.0), record::encode_key(key));
        let before = match places.get(name)? {
            Some(old) if old.value() == value => continue,
            before => before.is_some(),
        };
        let refused = record::decode_key(&key.slot.0, &value).err();
        if refused.is_some() || (!before && known >= MAX_KEYS) {
            let why = refused.map_or("the device has too many".to_owned(), |error| error.to_string());
            warn!(?device, slot = %shown(&key.slot.0), %why, "a key is not remembered");
            continue;
        }
        places.insert(name, &*value)?;
        known += usize::from(!before);
        changed = true;
    }
    Ok(changed)
}

/// Bytes of a name, for the log.
fn shown(bytes: &[u8]) -> impl std::fmt::Display {
    bytes[..bytes.len().min(MAX_LABEL)].escape_ascii().to_string()
}

/// Refuses what somebody else owns or can reach.
fn private(path: &Path, found: &fs::Metadata, mode: &str) -> Result<(), StoreError> {
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own {
        let command = format!("chown {own} {}", quoted(path));
        return Err(StoreError::Owner { path: path.to_owned(), uid: found.uid(), command });
    }
    if found.mode() & 0o077 != 0 {
        let command = format!("chmod {mode} {}", quoted(path));
        return Err(StoreError::Exposed { path: path.to_owned(), mode: found.mode() & 0o7777, command });
    }
    Ok(())
}

/// A path as a shell reads it back.
pub(super) fn quoted(path: &Path) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+,:@%".contains(b);
    let text = path.to_string_lossy();
    if path.as_os_str().as_bytes().iter().all(plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A file's name is on the disk when its directory is; the directory's own when its parent is.
fn sync_directories(path: &Path) -> io::Result<()> {
    path.ancestors().skip(1).take(2).try_for_each(|directory| File::open(directory)?.sync_all())
}
