//! `strongroom` on a terminal of its own, as a person types at it.

use std::{
    io::{BufReader, Read, Write},
    process::{Child, ChildStdout, Command, Stdio},
};

use super::{command, daemon::Home};

/// A command on a terminal of its own.
pub struct Terminal {
    child: Child,
    output: BufReader<ChildStdout>,
    /// All that it has shown.
    pub seen: String,
}

impl Terminal {
    /// `strongroom` with these words, in the home's directory, where it finds the daemon.
    pub fn start(home: &Home, words: &str) -> Self {
        Self::start_with(home, words, |_| {})
    }

    /// The same, with an environment that `more` adds to.
    pub fn start_with(home: &Home, words: &str, more: impl FnOnce(&mut Command)) -> Self {
        let line = format!("exec {} {words}", env!("CARGO_BIN_EXE_strongroom"));
        let mut script = command("script", &home.path(""));
        script
            .env("STRONGROOM_SOCKET", home.path("service"))
            .env("SHELL", "/bin/sh")
            .args(["-q", "-e", "-c", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        more(&mut script);
        let mut child = script.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output, seen: String::new() }
    }

    /// Types.
    pub fn types(&mut self, keys: &str) {
        self.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// Reads on until this has been seen.
    #[track_caller]
    pub fn shows(&mut self, text: &str) {
        let mut byte = [0];
        while !self.seen.contains(text) {
            assert_eq!(self.output.read(&mut byte).unwrap(), 1, "it ended with {:?}", self.seen);
            self.seen.push(char::from(byte[0]));
        }
    }

    /// Its exit code, and all that it has shown.
    pub fn ends(mut self) -> (Option<i32>, String) {
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest).unwrap();
        self.seen.extend(rest.into_iter().map(char::from));
        (self.child.wait().unwrap().code(), self.seen)
    }
}
