//! The state file's tables: the records under their names, in transactions, and the migrations between versions. Knows redb;
//! knows neither what records mean nor where the file is.
//!
//! redb promises an error, and may still panic, on a file that was damaged. So everything that touches one runs where a
//! panic is caught.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use aws_lc_rs::rand;
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageError,
    TableDefinition, WriteTransaction, backends::FileBackend,
};

use super::{
    StoreError,
    envelope::{Envelope, Name, Table, name, part_name},
    held::HeldFile,
    record::{MAX_RECORD, MarkSecret},
};

type Bytes = &'static [u8];
type Migration = fn(&WriteTransaction) -> Result<(), Fault>;

/// [`SCHEMA_VERSION`], [`SEQUENCE`] and [`STORE_ID`].
const META: TableDefinition<'_, Bytes, Bytes> = TableDefinition::new("meta");
/// Every record's name → its [`Envelope`].
const RECORDS: TableDefinition<'_, Bytes, Bytes> = TableDefinition::new("records");

/// `uint32`
const SCHEMA_VERSION: Bytes = b"schema-version";
/// `uint64`: the number of the last change.
const SEQUENCE: Bytes = b"sequence";
/// 16 random bytes, so that copies of different stores are told apart.
const STORE_ID: Bytes = b"store-id";

/// The key and salt of PIN marks.
pub(super) const MARK_SECRET: &[u8] = b"pin-mark-secret";
/// Once records were lost that may have been PIN marks: no PIN from the configuration is sent until a person allows it, token
/// by token.
pub(super) const PINS_HELD: &[u8] = b"pins-held";
/// How far the audit log was written; missing as long as there is none.
pub(super) const AUDIT_HEAD: &[u8] = b"audit-head";

/// What takes a file of each version to the next; an empty one has version 0. None is ever changed once it is released.
const MIGRATIONS: [Migration; 2] = [first_tables, one_table];

/// The most that is read, in bytes of names and values.
pub(super) const MAX_READ: usize = 256 << 20;
/// The most that one change writes, in bytes.
const MAX_CHANGE: usize = 64 << 20;
/// redb would take a gigabyte for its cache. Everything here is read once.
const CACHE: usize = 1 << 20;

/// Tells copies of different stores apart.
pub(super) type StoreId = [u8; 16];

/// All records: each with the number of the change that wrote it.
pub(super) type Records = BTreeMap<Name, (u64, Vec<u8>)>;

/// What went wrong inside a transaction.
#[derive(Debug)]
pub(super) enum Fault {
    Redb(redb::Error),
    Newer(u32),
    Damaged(String),
    /// Refused by the change itself.
    Refused(StoreError),
    NoRandom,
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

impl Fault {
    pub(super) fn at(self, path: &Path) -> StoreError {
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
            Self::Refused(error) => error,
            Self::NoRandom => StoreError::NoRandom,
        }
    }
}

fn latest() -> u32 {
    MIGRATIONS.len() as u32
}

/// The open tables.
pub(super) struct Tables {
    database: Option<Database>,
    file: HeldFile,
}

/// How tables are opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Open {
    /// In an empty file.
    New,
    /// In one that has some.
    There,
    /// The same, and what opening them changes in the file is held back until [`Tables::settle`] or the first change. Dropped
    /// before, they leave the file as it was.
    Held,
}

/// A change that is being made.
pub(super) struct Change<'t> {
    records: redb::Table<'t, Bytes, Bytes>,
    sequence: u64,
    /// The envelopes of what was changed, for the second copy.
    made: Vec<u8>,
}

/// A change that was made: what the second copy takes.
pub(super) struct Made {
    pub(super) sequence: u64,
    pub(super) envelopes: Vec<u8>,
}

impl Tables {
    /// Opens what is in `file` and checks all of it.
    pub(super) fn open(file: &File, how: Open) -> Result<Self, Fault> {
        let file = HeldFile::new(FileBackend::new(file.try_clone()?)?, how == Open::Held);
        guarded(|| {
            let mut builder = Builder::new();
            builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
            let database = match builder.create_with_backend(file.clone()) {
                // Something else than a database is not an error of the disk.
                Err(DatabaseError::Storage(StorageError::Io(e))) if e.kind() == io::ErrorKind::InvalidData => {
                    return Err(Fault::Damaged(e.to_string()));
                }
                opened => opened?,
            };
            let tables = Self { database: Some(database), file };
            migrate(tables.database()?, how == Open::New)?;
            Ok(tables)
        })
    }

    /// Has on the disk what opening them changed. After an error they are to be opened again.
    pub(super) fn settle(&self) -> Result<(), Fault> {
        Ok(self.file.settle()?)
    }

    /// Everything, and the number of the last change.
    pub(super) fn read(&self) -> Result<(StoreId, u64, Records), Fault> {
        let database = self.database()?;
        guarded(|| {
            let transaction = database.begin_read()?;
            let meta = transaction.open_table(META)?;
            let no = |what| Fault::Damaged(format!("it has no {what}"));
            let id = meta.get(STORE_ID)?.and_then(|id| id.value().try_into().ok()).ok_or_else(|| no("identity"))?;
            let sequence = sequence(&meta)?;
            let (mut records, mut read) = (Records::new(), 0);
            for entry in transaction.open_table(RECORDS)?.iter()? {
                let (name, value) = entry?;
                read += name.value().len() + value.value().len();
                if read > MAX_READ {
                    return Err(Fault::Damaged("it holds more than 256 MiB".to_owned()));
                }
                let envelope = Envelope::decode_all(value.value()).filter(|envelope| envelope.name == name.value());
                let Some(Envelope { sequence, value: Some(value), .. }) = envelope else {
                    return Err(Fault::Damaged("a record in it is not the one that was written".to_owned()));
                };
                records.insert(name.value().to_vec(), (sequence, value.to_vec()));
            }
            Ok((id, sequence, records))
        })
    }

    /// Makes a change, in one transaction; `None` when it changed nothing. It is on the disk when this returns; after an
    /// error it may be or not, and the tables are to be opened again.
    pub(super) fn write(
        &self,
        change: impl FnOnce(&mut Change<'_>) -> Result<(), Fault>,
    ) -> Result<Option<Made>, Fault> {
        self.settle()?;
        let database = self.database()?;
        guarded(|| {
            let transaction = begin(database)?;
            let sequence = sequence(&transaction.open_table(META)?)? + 1;
            let envelopes = {
                let mut made = Change { records: transaction.open_table(RECORDS)?, sequence, made: Vec::new() };
                change(&mut made)?;
                made.made
            };
            if envelopes.is_empty() {
                transaction.abort()?;
                return Ok(None);
            }
            transaction.open_table(META)?.insert(SEQUENCE, &sequence.to_be_bytes()[..])?;
            transaction.commit()?;
            Ok(Some(Made { sequence, envelopes }))
        })
    }

    /// Puts what a copy held in the place of everything, in one transaction.
    pub(super) fn fill(&self, id: &StoreId, sequence: u64, records: &Records) -> Result<(), Fault> {
        let database = self.database()?;
        guarded(|| {
            let transaction = begin(database)?;
            {
                let mut meta = transaction.open_table(META)?;
                meta.insert(STORE_ID, &id[..])?;
                meta.insert(SEQUENCE, &sequence.to_be_bytes()[..])?;
                let mut table = transaction.open_table(RECORDS)?;
                table.retain(|_, _| false)?;
                let mut bytes = Vec::new();
                for (name, (sequence, value)) in records {
                    bytes.clear();
                    Envelope { sequence: *sequence, name, value: Some(value) }.encode(&mut bytes);
                    table.insert(&**name, &*bytes)?;
                }
            }
            Ok(transaction.commit()?)
        })
    }

    fn database(&self) -> Result<&Database, Fault> {
        self.database.as_ref().ok_or_else(|| Fault::Damaged("it is closed".to_owned()))
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let database = self.database.take();
        // What redb writes when it closes its file is for one that it opened.
        self.file.discard();
        let _ = guarded(|| {
            drop(database);
            Ok(())
        });
    }
}

impl Change<'_> {
    pub(super) fn get(&self, name: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
        read_one(&self.records, name)
    }

    /// The records whose names begin with `prefix`, by name.
    pub(super) fn under(&self, prefix: &[u8]) -> Result<Vec<(Name, Vec<u8>)>, Fault> {
        let mut found = Vec::new();
        for entry in self.records.range(prefix..)? {
            let (name, value) = entry?;
            if !name.value().starts_with(prefix) {
                break;
            }
            found.push((name.value().to_vec(), unwrap(name.value(), value.value())?));
        }
        Ok(found)
    }

    /// How many names begin with `prefix`.
    pub(super) fn count(&self, prefix: &[u8]) -> Result<usize, Fault> {
        let mut count = 0;
        for entry in self.records.range(prefix..)? {
            if !entry?.0.value().starts_with(prefix) {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// How many records there are.
    pub(super) fn len(&self) -> Result<u64, Fault> {
        Ok(self.records.len()?)
    }

    pub(super) fn put(&mut self, name: &[u8], value: &[u8]) -> Result<(), Fault> {
        let from = self.made.len();
        Envelope { sequence: self.sequence, name, value: Some(value) }.encode(&mut self.made);
        if self.made.len() > MAX_CHANGE {
            return Err(Fault::Refused(StoreError::TooMany { what: "keys at once", max: MAX_CHANGE / MAX_RECORD }));
        }
        self.records.insert(name, &self.made[from..])?;
        Ok(())
    }

    /// Says whether it was there.
    pub(super) fn remove(&mut self, name: &[u8]) -> Result<bool, Fault> {
        let there = self.records.remove(name)?.is_some();
        if there {
            Envelope { sequence: self.sequence, name, value: None }.encode(&mut self.made);
        }
        Ok(there)
    }

    /// Removes all whose names begin with `prefix`.
    pub(super) fn remove_under(&mut self, prefix: &[u8]) -> Result<(), Fault> {
        for (name, _) in self.under(prefix)? {
            self.remove(&name)?;
        }
        Ok(())
    }
}

/// Runs what touches the database; a panic in it means that the file is damaged.
fn guarded<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    let panicked = |_| Err(Fault::Damaged("reading it failed in an unforeseen way".to_owned()));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

fn read_one(records: &impl ReadableTable<Bytes, Bytes>, name: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
    let found = records.get(name)?;
    found.map(|value| unwrap(name, value.value())).transpose()
}

fn unwrap(name: &[u8], bytes: &[u8]) -> Result<Vec<u8>, Fault> {
    match Envelope::decode_all(bytes) {
        Some(Envelope { name: own, value: Some(value), .. }) if own == name => Ok(value.to_vec()),
        _ => Err(Fault::Damaged("a record in it is not the one that was written".to_owned())),
    }
}

fn sequence(meta: &impl ReadableTable<Bytes, Bytes>) -> Result<u64, Fault> {
    let found = meta.get(SEQUENCE)?.and_then(|value| value.value().try_into().ok());
    found.map(u64::from_be_bytes).ok_or_else(|| Fault::Damaged("its changes are not numbered".to_owned()))
}

/// A transaction that is on the disk once it is committed. Labels in it are a stranger's words: two phases leave nothing
/// to the strength of redb's checksums.
fn begin(database: &Database) -> Result<WriteTransaction, Fault> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    transaction.set_two_phase_commit(true);
    Ok(transaction)
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

/// The tables of version 1, under names that version 2 does not use.
const DEVICES_1: TableDefinition<'_, Bytes, Bytes> = TableDefinition::new("devices");
const PLACES_1: TableDefinition<'_, (Bytes, Bytes), Bytes> = TableDefinition::new("places");
const MARKS_1: TableDefinition<'_, (Bytes, Bytes), Bytes> = TableDefinition::new("pin-marks");

/// Version 1.
fn first_tables(transaction: &WriteTransaction) -> Result<(), Fault> {
    let secret = MarkSecret::generate().map_err(|_| Fault::NoRandom)?;
    transaction.open_table(META)?.insert(MARK_SECRET, &**secret.encode())?;
    transaction.open_table(DEVICES_1)?;
    transaction.open_table(PLACES_1)?;
    transaction.open_table(MARKS_1)?;
    Ok(())
}

/// Version 2: all records in one table, each in its envelope, and changes have numbers.
fn one_table(transaction: &WriteTransaction) -> Result<(), Fault> {
    let mut id = StoreId::default();
    rand::fill(&mut id).map_err(|_| Fault::NoRandom)?;
    let mut meta = transaction.open_table(META)?;
    let mut change = Change { records: transaction.open_table(RECORDS)?, sequence: 1, made: Vec::new() };
    for single in [MARK_SECRET, AUDIT_HEAD] {
        if let Some(value) = meta.remove(single)? {
            change.put(&name(Table::Single, single), value.value())?;
        }
    }
    meta.insert(SEQUENCE, &1u64.to_be_bytes()[..])?;
    meta.insert(STORE_ID, &id[..])?;
    for entry in transaction.open_table(DEVICES_1)?.iter()? {
        let (device, value) = entry?;
        change.put(&name(Table::Device, device.value()), value.value())?;
    }
    for (old, table) in [(PLACES_1, Table::Place), (MARKS_1, Table::Mark)] {
        for entry in transaction.open_table(old)?.iter()? {
            let (parts, value) = entry?;
            let (whole, part) = parts.value();
            // A name that is no text is no record of ours.
            let Ok(whole) = std::str::from_utf8(whole) else { continue };
            change.put(&part_name(table, whole, part), value.value())?;
        }
        transaction.delete_table(old)?;
    }
    transaction.delete_table(DEVICES_1)?;
    Ok(())
}
