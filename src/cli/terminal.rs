//! Asking on the terminal, for secrets without echo. Knows keys and the terminal's modes; no daemon.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
};

use rustix::{
    process::{Signal, getpid, kill_process},
    termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr},
};
use zeroize::Zeroizing;

use crate::agent::message::MAX_SECRET;

/// The longest line that is typed aloud, in bytes.
const MAX_LINE: u64 = 4096;

const CTRL_C: u8 = 0x03;
const CTRL_D: u8 = 0x04;
const CTRL_H: u8 = 0x08;
const CTRL_U: u8 = 0x15;
const DELETE: u8 = 0x7f;

/// Asks on the controlling terminal, whatever standard input and output are, and returns the line. What was typed before
/// the question is dropped. Ctrl-C ends the program, with the terminal as it was.
pub(super) fn ask(question: &str) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = File::options().read(true).write(true).open("/dev/tty")?;
    let quiet = Quiet::new(&file)?;
    let mut tty = &file;
    tty.write_all(question.as_bytes())?;
    let typed = read(&mut tty);
    tty.write_all(b"\n")?;
    drop(quiet);
    match typed? {
        Typed::Line(line) => Ok(line),
        Typed::Interrupted => {
            kill_process(getpid(), Signal::INT)?;
            // Somebody has it ignored.
            Err(io::ErrorKind::Interrupted.into())
        }
    }
}

/// Says something on the controlling terminal.
pub(super) fn tell(text: &str) -> io::Result<()> {
    File::options().write(true).open("/dev/tty")?.write_all(text.as_bytes())
}

/// Asks on the controlling terminal for something that everybody may see.
pub(super) fn ask_aloud(question: &str) -> io::Result<String> {
    let mut tty = File::options().read(true).write(true).open("/dev/tty")?;
    tty.write_all(question.as_bytes())?;
    let mut line = String::new();
    BufReader::new(tty.take(MAX_LINE)).read_line(&mut line)?;
    match line.strip_suffix('\n') {
        Some(line) => Ok(line.to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

enum Typed {
    Line(Zeroizing<Vec<u8>>),
    Interrupted,
}

/// Reads a line key by key. A line that is too long comes out longer than a secret may be.
fn read(keys: &mut impl Read) -> io::Result<Typed> {
    // It never grows, which would leave copies behind.
    let mut line = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    let mut key = Zeroizing::new([0]);
    loop {
        if keys.read(&mut *key)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match key[0] {
            b'\n' | b'\r' => return Ok(Typed::Line(line)),
            CTRL_C => return Ok(Typed::Interrupted),
            CTRL_D if line.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            CTRL_U => line.clear(),
            // A character of several bytes goes as a whole.
            CTRL_H | DELETE => while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {},
            other if other < b' ' => {}
            other if line.len() <= MAX_SECRET => line.push(other),
            _ => {}
        }
    }
}

/// A terminal without echo, lines and signals of its own, until this is dropped.
struct Quiet<'a> {
    tty: &'a File,
    before: Termios,
}

impl<'a> Quiet<'a> {
    fn new(tty: &'a File) -> io::Result<Self> {
        let before = tcgetattr(tty)?;
        let mut modes = before.clone();
        modes.local_modes -= LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG;
        modes.special_codes[SpecialCodeIndex::VMIN] = 1;
        modes.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(tty, OptionalActions::Flush, &modes)?;
        Ok(Self { tty, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        // Nothing is left to try for a terminal that is gone.
        let _ = tcsetattr(self.tty, OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn typed(keys: &[u8]) -> Option<Vec<u8>> {
        match read(&mut &*keys).ok()? {
            Typed::Line(line) => Some(line.to_vec()),
            Typed::Interrupted => None,
        }
    }

    #[test]
    fn keys_make_a_line() {
        assert_eq!(typed(b"12\x7f34\r5"), Some(b"134".to_vec()));
        assert_eq!(typed("é\x08ü\n".as_bytes()), Some("ü".as_bytes().to_vec()));
        assert_eq!(typed(b"123\x15\x0045\n"), Some(b"45".to_vec()));
        assert_eq!(typed(b"\x7f\x7f\n"), Some(vec![]));
        assert_eq!(typed(&[&[b'1'; 5000][..], b"\n"].concat()).map(|line| line.len()), Some(MAX_SECRET + 1));
        for end in [&b"12\x03\n"[..], b"\x04", b"12"] {
            assert_eq!(typed(end), None);
        }
    }
}
