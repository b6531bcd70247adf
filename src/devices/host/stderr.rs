//! What a device's process writes to standard error, line by line into the log. Bounded in length and rate, and read
//! without end, so that the process never waits for us.

use std::{future::Future, io, os::fd::OwnedFd, process::ChildStderr, time::Duration};

use tokio::{net::unix::pipe::Receiver, time::Instant};

use crate::prompt::harmless;

/// What is kept of a line, in bytes.
const MAX_LINE: usize = 512;
/// Lines that are logged within a [`WINDOW`].
const MAX_LINES: u32 = 50;
const WINDOW: Duration = Duration::from_secs(1);
/// What is still read once the process has ended: as much as a pipe holds.
const LAST: usize = 64 * 1024;

/// Logs what comes, until the pipe ends or `exited` completes: what the process has left behind may hold the pipe open.
pub(super) async fn log(stderr: ChildStderr, device: &str, exited: impl Future) -> io::Result<()> {
    let pipe = Receiver::from_owned_fd(OwnedFd::from(stderr))?;
    let mut lines = Lines::new(Instant::now(), |line: &str| tracing::info!(device, "{line}"));
    tokio::select! {
        ended = read(&pipe, &mut lines) => ended?,
        _ = exited => {
            let (mut buffer, mut left) = ([0; 4096], LAST);
            while let Ok(n @ 1..) = pipe.try_read(&mut buffer) && left > 0 {
                lines.push(&buffer[..n], Instant::now());
                left = left.saturating_sub(n);
            }
        }
    }
    lines.finish();
    Ok(())
}

async fn read(pipe: &Receiver, lines: &mut Lines<impl FnMut(&str)>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        pipe.readable().await?;
        match pipe.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => lines.push(&buffer[..n], Instant::now()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

/// Makes lines of pieces, and gives them on up to a rate.
struct Lines<F> {
    line: Vec<u8>,
    window: Instant,
    given: u32,
    dropped: u64,
    give: F,
}

impl<F: FnMut(&str)> Lines<F> {
    fn new(now: Instant, give: F) -> Self {
        Self { line: Vec::new(), window: now, given: 0, dropped: 0, give }
    }

    fn push(&mut self, bytes: &[u8], now: Instant) {
        if now.duration_since(self.window) >= WINDOW {
            self.window = now;
            self.given = 0;
            self.tell_dropped();
        }
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let text = piece.strip_suffix(b"\n").unwrap_or(piece);
            self.line.extend(text.iter().take(MAX_LINE - self.line.len()));
            if text.len() < piece.len() {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = harmless(String::from_utf8_lossy(&self.line).trim_end());
        self.line.clear();
        if line.is_empty() {
            return;
        }
        if self.given == MAX_LINES {
            self.dropped += 1;
        } else {
            self.given += 1;
            (self.give)(&line);
        }
    }

    fn tell_dropped(&mut self) {
        if self.dropped > 0 {
            (self.give)(&format!("({} more lines were dropped)", self.dropped));
            self.dropped = 0;
        }
    }

    fn finish(mut self) {
        self.end_line();
        self.tell_dropped();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(work: impl FnOnce(&mut Lines<&mut dyn FnMut(&str)>, Instant)) -> Vec<String> {
        let (mut seen, now) = (Vec::new(), Instant::now());
        let mut give = |line: &str| seen.push(line.to_owned());
        let mut lines = Lines::new(now, &mut give as &mut dyn FnMut(&str));
        work(&mut lines, now);
        lines.finish();
        seen
    }

    #[test]
    fn pieces_make_lines_that_are_harmless_and_bounded() {
        let seen = collect(|lines, now| {
            for piece in [&b"one\ntw"[..], b"o\r\n\n\x1b[2J\xff\n", &[b'x'; 5000], &[b'x'; 5000], b"\nlast"] {
                lines.push(piece, now);
            }
        });
        assert_eq!(seen[..3], ["one", "two", "\u{fffd}[2J\u{fffd}"]);
        assert!(seen[3].len() <= MAX_LINE && seen[3].starts_with("xxx"), "{}", seen[3]);
        assert_eq!(seen[4], "last");
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let seen = collect(|lines, now| {
            for _ in 0..1000 {
                lines.push(b"noise\n", now);
            }
            lines.push(b"later\n", now + WINDOW);
        });
        assert_eq!(seen.len(), 52);
        assert_eq!(seen[50..], ["(950 more lines were dropped)", "later"]);
    }
}
