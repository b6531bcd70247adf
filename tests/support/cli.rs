//! `strongroom`'s own commands, typed in a home's directory, where they find its daemon.

use std::{
    ffi::OsStr,
    fs::{self, File},
    process::Command,
};

use serde_json::Value;

use super::{Outcome, command, daemon::Home, run};

/// `strongroom`, without words yet.
pub fn strongroom(home: &Home) -> Command {
    let mut command = command(env!("CARGO_BIN_EXE_strongroom"), &home.path(""));
    command.env("STRONGROOM_SOCKET", home.path("service"));
    command
}

/// Runs it to its end with these words, and this on its standard input.
pub fn fed(home: &Home, words: impl IntoIterator<Item: AsRef<OsStr>>, input: impl AsRef<[u8]>) -> Outcome {
    fs::write(home.path("stdin"), input).expect("its input");
    let stdin = File::open(home.path("stdin")).expect("its input");
    run(strongroom(home).args(words).stdin(stdin))
}

/// The JSON that it printed before it succeeded.
#[track_caller]
pub fn json(outcome: Outcome) -> Value {
    serde_json::from_str(&outcome.ok()).expect("JSON")
}
