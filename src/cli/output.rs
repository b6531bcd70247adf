//! Where results go: bytes to a file, a pipe or, encoded, to a terminal; tables and JSON to standard output.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use base64ct::{Base64, Encoding};
use clap::{Args, ValueHint};
use serde::Serialize;
use tokio::time::interval;
use zeroize::Zeroizing;

use super::CliError;

/// How bytes are written.
#[derive(Args)]
pub(super) struct Encoded {
    /// Write hexadecimal digits and a line break
    #[arg(long, conflicts_with_all = ["base64", "json"])]
    hex: bool,
    /// Write base64 and a line break
    #[arg(long, conflicts_with = "json")]
    base64: bool,
    /// Write to FILE instead of standard output; a secret's file is readable by you only
    #[arg(short, long, value_name = "FILE", conflicts_with = "json", value_hint = ValueHint::FilePath)]
    out: Option<PathBuf>,
}

/// `1 key is`, `2 keys are`.
pub(super) fn keys_are(count: u32) -> String {
    if count == 1 { "1 key is".to_owned() } else { format!("{count} keys are") }
}

/// A line on standard error, beside the result.
pub(super) fn note(text: &str) {
    // Who does not read it does not miss it.
    let _ = writeln!(io::stderr(), "strongroom: {text}");
}

/// Waits for something that takes seconds, with a sign of life on a terminal: what is done, and a dot each half second.
pub(super) async fn with_dots<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut stderr = io::stderr();
    if !stderr.is_terminal() {
        return work.await;
    }
    let _ = write!(stderr, "{what} ");
    let mut work = pin!(work);
    let mut dots = interval(Duration::from_millis(500));
    loop {
        tokio::select! {
            done = &mut work => {
                let _ = writeln!(stderr);
                return done;
            }
            _ = dots.tick() => {
                let _ = write!(stderr, ".");
            }
        }
    }
}

/// Who may see what is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text: a terminal may have it as it is.
    Text,
    /// Bytes that anybody may see.
    Public,
    /// Bytes for this user only.
    Secret,
}

impl Encoded {
    /// Writes them as the options say. Bytes do not go to a terminal as they are.
    pub(super) fn write(&self, bytes: &[u8], kind: Kind) -> Result<(), CliError> {
        let encoded = match (self.hex, self.base64) {
            (true, _) => Some(Zeroizing::new(hex(bytes))),
            (_, true) => Some(Zeroizing::new(Base64::encode_string(bytes))),
            _ => None,
        };
        let parts = match &encoded {
            Some(text) => [text.as_bytes(), b"\n"],
            None => [bytes, b""],
        };
        match self.out.as_deref().filter(|path| *path != Path::new("-")) {
            Some(path) => write_file(path, parts, kind == Kind::Secret)
                .map_err(|source| CliError::File { path: path.to_owned(), source }),
            None if kind != Kind::Text && encoded.is_none() && io::stdout().is_terminal() => Err(CliError::Binary),
            None => parts.into_iter().try_for_each(stdout),
        }
    }
}

fn write_file(path: &Path, parts: [&[u8]; 2], secret: bool) -> io::Result<()> {
    let mode = if secret { 0o600 } else { 0o666 };
    let mut file = fs::File::options().write(true).create(true).truncate(true).mode(mode).open(path)?;
    if secret && file.metadata()?.is_file() {
        // One that was there before may have been open to others.
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    }
    parts.into_iter().try_for_each(|part| file.write_all(part))
}

/// Writes to standard output.
pub(super) fn stdout(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(CliError::Output)
}

/// Writes text for people to standard output.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    stdout(text.as_bytes())
}

/// Writes a value as JSON to standard output.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    print_json_of(value, 0)
}

/// The same with a secret of at most this length in it, in base64: it is wiped afterwards.
pub(super) fn print_json_of(value: &impl Serialize, secret: usize) -> Result<(), CliError> {
    // It does not grow with the secret inside, which would leave copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(2 * secret + 1024));
    serde_json::to_writer_pretty(&mut *text, value).map_err(|error| CliError::Output(error.into()))?;
    text.push(b'\n');
    stdout(&text)
}

/// Lower-case digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len() + 1), |mut text, byte| {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(digit.into(), 16).unwrap_or_default());
        }
        text
    })
}

/// The bytes that hexadecimal digits stand for; `None` for anything else.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| Some(c.to_digit(16)? as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// Rows under a heading, each column as wide as its widest cell.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = heading.iter().map(|&cell| cell.to_owned()).collect();
    let lines = || std::iter::once(&heading).chain(rows);
    let width = |column: usize| {
        lines().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    for row in lines() {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let shown = if cell.is_empty() { "-" } else { cell };
            line.push_str(&format!("{shown:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_goes_both_ways() {
        assert_eq!(hex(&[0, 0x5a, 0xff]), "005aff");
        assert_eq!(unhex("005AfF"), Some(vec![0, 0x5a, 0xff]));
        assert_eq!((unhex("0"), unhex("0g"), unhex("")), (None, None, Some(vec![])));
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".to_owned(), String::new()], vec!["long".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["ID", "B"], &rows), "ID    B\na     -\nlong  x\n");
    }
}
