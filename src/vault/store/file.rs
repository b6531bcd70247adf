//! The state file: where it is, who may reach it, and how it is opened and written. Knows its directory; neither what
//! records mean nor how redb keeps them.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tracing::warn;

use super::{
    Recovery, StoreError,
    contents::Contents,
    copy::{self, Copy},
    recover::{self, Sound},
    tables::{Change, Fault, Open, Tables},
};

/// The file's name in its directory.
pub(super) const NAME: &str = "state.redb";

/// The open file and its second copy. No other process, and no other value of this type, has their directory open.
pub(super) struct StateFile {
    /// The directory, locked.
    _locked: File,
    path: PathBuf,
    copy_path: PathBuf,
    /// The same open file as the tables': after a failed write redb wants to be opened again.
    file: File,
    /// `None` after a failed write.
    tables: Option<Tables>,
    /// `None` after a failed write of either: then it is written anew.
    copy: Option<Copy>,
}

impl StateFile {
    /// Opens the file in `directory`, or makes both. Reads and checks all of it.
    pub(super) fn open(directory: &Path) -> Result<(Self, Contents, Option<Recovery>), StoreError> {
        let failed = |source| StoreError::Io { path: directory.to_owned(), source };
        let directory = &std::path::absolute(directory).map_err(failed)?;
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        Self::open_in(directory, lock(directory)?)
    }

    /// What the file in `directory` holds if there is one, or its copy.
    pub(super) fn open_if_there(directory: &Path) -> Result<Option<Contents>, StoreError> {
        for name in [NAME, copy::NAME] {
            let path = directory.join(name);
            match fs::symlink_metadata(&path) {
                Ok(_) => return Self::open_in(directory, lock(directory)?).map(|(_, contents, _)| Some(contents)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(StoreError::Io { path, source }),
            }
        }
        Ok(None)
    }

    fn open_in(directory: &Path, locked: File) -> Result<(Self, Contents, Option<Recovery>), StoreError> {
        let (path, copy_path) = (directory.join(NAME), directory.join(copy::NAME));
        let Sound { file, tables, copy, records, recovery } = recover::open(&path, &copy_path)?;
        let contents = Contents::of(&records).map_err(|fault| fault.at(&path))?;
        let file = Self { _locked: locked, path, copy_path, file, tables: Some(tables), copy: Some(copy) };
        Ok((file, contents, recovery))
    }

    /// Has on the disk what opening the file changed in it. After an error the next change opens it again.
    pub(super) fn settle(&mut self) -> Result<(), StoreError> {
        self.tables().and_then(Tables::settle).map_err(|fault| {
            self.tables = None;
            fault.at(&self.path)
        })
    }

    /// Makes a change. It is on the disk when this returns, and with `twice` in the second copy, too, which else has it
    /// after the next; after an error it may be there or not, unless the change itself refused.
    pub(super) fn write(
        &mut self,
        twice: bool,
        change: impl FnOnce(&mut Change<'_>) -> Result<(), Fault>,
    ) -> Result<(), StoreError> {
        self.mend()?;
        let made = match self.tables().and_then(|tables| tables.write(change)) {
            Ok(made) => made,
            Err(fault) => {
                if !matches!(fault, Fault::Refused(_)) {
                    self.tables = None;
                }
                return Err(fault.at(&self.path));
            }
        };
        let (Some(made), Some(copy)) = (made, &mut self.copy) else { return Ok(()) };
        if let Err(source) = copy.append(&made, twice) {
            self.copy = None;
            return Err(StoreError::Io { path: self.copy_path.clone(), source });
        }
        if copy.is_long() {
            self.copy = None;
            // What was to be kept is kept. If this fails the next change tells.
            if let Err(error) = self.mend() {
                warn!("the second copy of the state could not be written anew: {error}");
            }
        }
        Ok(())
    }

    /// Makes sure that there is a second copy that changes can be appended to.
    fn mend(&mut self) -> Result<(), StoreError> {
        if self.tables.is_none() {
            self.copy = None;
        }
        if self.copy.is_some() {
            return Ok(());
        }
        let (id, sequence, records) = self.tables().and_then(Tables::read).map_err(|fault| fault.at(&self.path))?;
        let made = Copy::create(&self.copy_path, &id, sequence, &records);
        self.copy = Some(made.map_err(|source| StoreError::Io { path: self.copy_path.clone(), source })?);
        Ok(())
    }

    fn tables(&mut self) -> Result<&Tables, Fault> {
        match &mut self.tables {
            Some(tables) => Ok(tables),
            none => Ok(none.insert(Tables::open(&self.file, Open::There)?)),
        }
    }
}

/// Makes sure that nobody else reaches the directory or has it open. The lock is the open directory's, so it ends with the
/// process.
fn lock(directory: &Path) -> Result<File, StoreError> {
    let failed = |source| StoreError::Io { path: directory.to_owned(), source };
    private(directory, &fs::metadata(directory).map_err(failed)?, "700")?;
    let open = File::open(directory).map_err(failed)?;
    match flock(&open, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(open),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::InUse { path: directory.join(NAME) }),
        Err(error) => Err(failed(error.into())),
    }
}

/// Refuses what somebody else owns or can reach.
pub(in crate::vault) fn private(path: &Path, found: &fs::Metadata, mode: &str) -> Result<(), StoreError> {
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
