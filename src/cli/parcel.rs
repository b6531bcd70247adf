//! Backups and wraps between files and the daemon: in pieces, and to the disk so that nothing is lost or overwritten. Knows
//! files and messages; not what is in them.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use zeroize::Zeroizing;

use super::CliError;
use crate::{
    agent::message::{CarryRequest, MAX_PART, Request},
    client::Client,
    vault::backup::MAX_BACKUP,
};

/// Sends the whole of it.
pub(super) async fn upload(client: &Client, bytes: &[u8]) -> Result<(), CliError> {
    let mut offset = 0;
    loop {
        let piece = &bytes[offset..bytes.len().min(offset + MAX_PART)];
        let request = Request::Carry(CarryRequest::Upload { offset: offset as u64, bytes: piece });
        client.request(&request).await?.read::<()>()?;
        offset += piece.len();
        if offset == bytes.len() {
            return Ok(());
        }
    }
}

/// Gets the whole of it.
pub(super) async fn fetch(client: &Client, length: u64) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < length {
        let reply = client.request(&Request::Carry(CarryRequest::Fetch(bytes.len() as u64))).await?;
        let piece: Zeroizing<Vec<u8>> = reply.read()?;
        if piece.is_empty() || bytes.len() + piece.len() > MAX_BACKUP {
            return Err(CliError::Unsupported("the daemon did not send all of it; try again".to_owned()));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

/// A file that may be longer than others that are read.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    let failed = |source| CliError::File { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(MAX_BACKUP as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > MAX_BACKUP {
        return Err(CliError::Usage(format!("{}: it is longer than any backup or wrap is", path.display())));
    }
    Ok(bytes)
}

/// Refuses a file that is there, before anybody has typed a passphrase for nothing.
pub(super) fn check_new(path: &Path, force: bool) -> Result<(), CliError> {
    match fs::symlink_metadata(path) {
        Ok(_) if !force => Err(exists(path)),
        _ => Ok(()),
    }
}

fn exists(path: &Path) -> CliError {
    CliError::Usage(format!("{}: there is such a file already; --force overwrites it", path.display()))
}

/// Writes a file that only its owner reads: whole and on the disk, as reading it back has shown, or not at all. One that is
/// there is overwritten with `force` only.
pub(super) fn write(path: &Path, bytes: &[u8], force: bool) -> Result<(), CliError> {
    let failed = |source| CliError::File { path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| CliError::Usage(format!("{}: it names no file", path.display())))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}", std::process::id()));
    let temporary = Temporary(directory.join(temporary));
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary.0).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    if fs::read(&temporary.0).map_err(failed)? != bytes {
        return Err(failed(io::Error::other("the disk does not give back what was written to it")));
    }
    let flags = if force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
    renameat_with(CWD, &temporary.0, CWD, path, flags).map_err(|error| match error {
        rustix::io::Errno::EXIST => exists(path),
        error => failed(error.into()),
    })?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

/// A file that goes unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_written_whole_and_not_over_others() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("backup");
        write(&path, b"one", false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(check_new(&path, false).is_err() && check_new(&path, true).is_ok());
        assert!(write(&path, b"two", false).is_err());
        assert_eq!(read(&path).unwrap(), b"one");
        write(&path, b"two", true).unwrap();
        assert_eq!(read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
