//! What a command is given: files and standard input, digests, deadlines. Knows how long each may be.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    time::Duration,
};

use aws_lc_rs::digest::Context;

use super::{CliError, output::unhex};
use crate::{
    agent::message::MAX_WAIT_MS,
    config::parse_time,
    devices::{Hash, Input},
};

/// The longest message that is sent as it is, in bytes; of a longer one its digest is, where the scheme has a hash.
const MAX_MESSAGE: usize = 192 * 1024;
/// The longest file that is read as a whole.
const MAX_FILE: usize = 1 << 20;
/// What names standard input.
const STDIN: &str = "-";

/// A deadline such as `5s`, `250ms` or `1m30s`, up to an hour.
pub(super) fn deadline(text: &str) -> Result<Duration, String> {
    let time = match text.strip_suffix("ms") {
        Some(number) => number.parse().ok().map(Duration::from_millis),
        None => parse_time(text),
    };
    let longest = Duration::from_millis(MAX_WAIT_MS.into());
    time.filter(|time| !time.is_zero() && *time <= longest)
        .ok_or_else(|| "a deadline is a time up to an hour, such as 5s, 250ms or 1m30s".to_owned())
}

/// A whole file, or standard input.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    let (bytes, more) = open(path)?.take_up_to(MAX_FILE)?;
    if more {
        return Err(CliError::Usage(format!("{}: it is longer than a megabyte", path.display())));
    }
    Ok(bytes)
}

/// What is to be signed: as it is, or hashed here where it is long and the scheme has a hash.
pub(super) fn message(path: &Path, hash: Option<Hash>) -> Result<Input<'static>, CliError> {
    let mut source = open(path)?;
    let (bytes, more) = source.take_up_to(MAX_MESSAGE)?;
    match (more, hash) {
        (false, _) => Ok(Input::Message(bytes.into())),
        (true, Some(hash)) => Ok(Input::Digest(source.hash_on(bytes, hash)?.into())),
        (true, None) => Err(CliError::Unsupported(format!(
            "{}: it is longer than 192 KiB, and the scheme signs no digests; choose one with a hash",
            path.display()
        ))),
    }
}

/// The digest of a file of any length.
pub(super) fn hashed(path: &Path, hash: Hash) -> Result<Vec<u8>, CliError> {
    open(path)?.hash_on(Vec::new(), hash)
}

/// A digest that was made elsewhere: its bytes, or their hexadecimal digits, which may be followed by a name as the
/// `sha256sum` family prints it.
pub(super) fn digest(path: &Path, hash: Hash) -> Result<Vec<u8>, CliError> {
    let bytes = read(path)?;
    let len = hash.digest_len();
    if bytes.len() == len {
        return Ok(bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let digits = text.split_whitespace().next().and_then(unhex);
    digits.filter(|digest| digest.len() == len).ok_or_else(|| {
        CliError::Usage(format!(
            "{}: the scheme's digest has {len} bytes, or {} hexadecimal digits",
            path.display(),
            2 * len
        ))
    })
}

/// Something to read, with the name for errors.
struct Source<'a> {
    path: &'a Path,
    reader: Box<dyn Read>,
}

fn open(path: &Path) -> Result<Source<'_>, CliError> {
    let failed = |source| CliError::File { path: path.to_owned(), source };
    let reader: Box<dyn Read> =
        if path == Path::new(STDIN) { Box::new(io::stdin()) } else { Box::new(File::open(path).map_err(failed)?) };
    Ok(Source { path, reader })
}

impl Source<'_> {
    fn failed(&self, source: io::Error) -> CliError {
        CliError::File { path: self.path.to_owned(), source }
    }

    /// At most `max` bytes and, where there are more, one of those; and whether there are.
    fn take_up_to(&mut self, max: usize) -> Result<(Vec<u8>, bool), CliError> {
        let mut bytes = Vec::new();
        let taken = self.reader.by_ref().take(max as u64 + 1).read_to_end(&mut bytes);
        taken.map_err(|error| self.failed(error))?;
        let more = bytes.len() > max;
        Ok((bytes, more))
    }

    /// The digest of these bytes and of all that follow.
    fn hash_on(mut self, bytes: Vec<u8>, hash: Hash) -> Result<Vec<u8>, CliError> {
        let mut context = Context::new(hash.algorithm());
        let mut buffer = bytes;
        loop {
            context.update(&buffer);
            buffer.resize(64 * 1024, 0);
            match self.reader.read(&mut buffer) {
                Ok(0) => return Ok(context.finish().as_ref().to_vec()),
                Ok(n) => buffer.truncate(n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => buffer.clear(),
                Err(error) => return Err(self.failed(error)),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn deadlines_have_units_and_an_end() {
        assert_eq!(deadline("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(deadline("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(deadline("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["0s", "0ms", "1h1s", "-1s", "soon", ""] {
            assert!(deadline(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_long_message_is_hashed_on_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        let bytes = vec![7; 3 * MAX_MESSAGE + 11];
        fs::write(&path, &bytes).unwrap();
        let expected = Input::Message((&bytes).into()).digest(Hash::Sha384).unwrap().as_ref().to_vec();
        assert_eq!(message(&path, Some(Hash::Sha384)).unwrap(), Input::Digest(expected.clone().into()));
        assert_eq!(hashed(&path, Hash::Sha384).unwrap(), expected);
        assert!(matches!(message(&path, None), Err(CliError::Unsupported(_))));
        fs::write(&path, &bytes[..MAX_MESSAGE]).unwrap();
        assert!(matches!(message(&path, Some(Hash::Sha384)), Ok(Input::Message(_))));
    }

    #[test]
    fn a_digest_is_bytes_or_digits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("digest");
        let digits = "5a".repeat(20);
        for text in [&[0x5a; 20][..], digits.as_bytes(), format!("{digits}  a file\n").as_bytes()] {
            fs::write(&path, text).unwrap();
            assert_eq!(digest(&path, Hash::Sha1).unwrap(), [0x5a; 20]);
        }
        for text in [&[0x5a; 21][..], b"", b"5a5a", b"zz"] {
            fs::write(&path, text).unwrap();
            assert!(matches!(digest(&path, Hash::Sha1), Err(CliError::Usage(_))));
        }
    }
}
