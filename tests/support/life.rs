//! Whether a program that a test does not start itself is alive: it holds a FIFO open.

use std::{fs::File, future::Future, path::Path, process::Command, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::unix::pipe,
    time::timeout,
};

/// The reading end of a FIFO that scripts hold open: a line says that one has started, the end that all are gone.
pub struct Life {
    lines: BufReader<pipe::Receiver>,
    /// A FIFO that was never open for writing has no end, and a script may be killed before it opens it.
    held: File,
}

impl Life {
    /// Of this FIFO, which is made where there is none. Needs a Tokio runtime around it.
    pub fn of(fifo: &Path) -> Self {
        if !fifo.exists() {
            assert!(Command::new("mkfifo").arg(fifo).status().expect("mkfifo").success());
        }
        let lines = BufReader::new(pipe::OpenOptions::new().open_receiver(fifo).expect("a FIFO"));
        Self { lines, held: File::options().write(true).open(fifo).expect("a FIFO") }
    }

    /// Waits for the next line that a script writes.
    pub async fn line(&mut self) -> String {
        let mut line = String::new();
        soon(self.lines.read_line(&mut line)).await.expect("a line");
        line
    }

    /// Waits for the next script to start, which says `up`.
    pub async fn started(&mut self) {
        assert_eq!(self.line().await, "up\n");
    }

    /// Waits until no script, and nothing that one started, is alive.
    pub async fn gone(self) {
        let Self { mut lines, held } = self;
        drop(held);
        soon(lines.read_to_end(&mut Vec::new())).await.expect("the end");
    }
}

/// What happens, though nobody knows when.
pub async fn soon<T>(event: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), event).await.expect("it happens soon")
}
