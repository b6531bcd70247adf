//! Files with private keys, as commands are given them: read with their passphrase, which is asked for. Knows no daemon.

use std::path::Path;

use secrecy::SecretString;
use zeroize::Zeroizing;

use super::{CliError, input, terminal, unlock};
use crate::{
    key_file::{Contents, KeyFile, KeyFileError},
    prompt::harmless,
};

/// How often a passphrase is asked for.
const ATTEMPTS: usize = 3;

/// The keys in a file, with their passphrase where there is one: from the first line of standard input, or asked for on the
/// terminal, a few times.
pub(super) fn read(path: &Path, from_stdin: bool) -> Result<Contents, CliError> {
    if from_stdin && path == Path::new("-") {
        return Err(CliError::Usage("standard input has either the key or its passphrase".to_owned()));
    }
    let bytes = Zeroizing::new(input::read(path)?);
    let failed = |error| CliError::KeyFile { path: path.to_owned(), error };
    match KeyFile::read_all(&bytes, None) {
        Err(KeyFileError::PassphraseNeeded) => {}
        read => return read.map_err(failed),
    }
    if from_stdin {
        return KeyFile::read_all(&bytes, Some(&unlock::read_line()?)).map_err(failed);
    }
    let mut outcome = Err(failed(KeyFileError::PassphraseNeeded));
    for attempt in 0..ATTEMPTS {
        let again = if attempt == 0 { "" } else { "That is not it. " };
        let question = format!("{again}Passphrase of {}: ", harmless(&path.display().to_string()));
        let typed = terminal::ask(&question).map_err(CliError::NoTerminal)?;
        let text = std::str::from_utf8(&typed).unwrap_or_default();
        outcome = KeyFile::read_all(&bytes, Some(&SecretString::from(text))).map_err(failed);
        if !matches!(outcome, Err(CliError::KeyFile { error: KeyFileError::WrongPassphrase, .. })) {
            break;
        }
    }
    outcome
}

/// What a key from a file is called where the file does not say: formats without a place for a comment leave people with
/// nothing but a fingerprint.
pub(super) fn comment(key: &KeyFile, path: &Path) -> String {
    match key.comment() {
        "" => path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        comment => comment.to_owned(),
    }
}
