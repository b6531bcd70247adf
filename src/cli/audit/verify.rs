//! `strongroom audit verify`: whether the audit log is what was written.

use clap::Args;
use serde_json::{Value, json};

use super::{Found, Log};
use crate::{
    cli::{
        CliError,
        output::{hex, print, print_json, unhex},
    },
    vault::audit::{
        Position,
        verify::{Fault, Report, verify},
    },
};

/// How often the files are looked at again when the daemon removed an old one in between.
const ATTEMPTS: usize = 3;

/// Follow the hashes from line to line, and hold them against what the state file knows
///
/// Whatever was changed, removed, moved, put in or cut off is named with its file and line. The last line says how far
/// the log goes: keep it elsewhere, and name it later with --known.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Verify {
    /// The line number COUNT had this HASH when it was last looked at
    #[arg(long, value_name = "COUNT:HASH", value_parser = known)]
    known: Vec<Position>,
    #[command(flatten)]
    pub(super) log: Log,
}

const EXAMPLES: &str = "Examples:
  strongroom audit verify
  strongroom audit verify --files /backup/audit --known 1234:9f86…";

impl Verify {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.log.run(async |mut found| {
            let mut attempt = 0;
            loop {
                attempt += 1;
                found.numbers()?;
                match verify(&found.directory, found.head.as_ref(), &self.known) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound && attempt < ATTEMPTS => {
                        found = self.log.find().await?;
                    }
                    Err(source) => return Err(found.failed(&found.directory, source)),
                    Ok(report) => return self.tell(&found, &report),
                }
            }
        })
    }

    fn tell(&self, found: &Found, report: &Report) -> Result<(), CliError> {
        let (value, json) = (value(found, report), self.log.connection.json);
        if !json {
            print(&text(found, report))?;
        }
        match report.fault_count() {
            0 if json => print_json(&json!({ "audit": value })),
            0 => Ok(()),
            faults => Err(CliError::Altered { faults, report: value }),
        }
    }
}

fn value(found: &Found, report: &Report) -> Value {
    let fault = |fault: &Fault| json!({ "file": fault.file.display().to_string(), "line": fault.line, "what": fault.kind.to_string() });
    json!({
        "whole": report.faults.is_empty(),
        "directory": found.directory.display().to_string(),
        "files": report.files,
        "lines": report.lines,
        "first": report.first,
        "last": { "count": report.last.seq, "hash": hex(&report.last.hash) },
        "head_known": found.head.is_some(),
        "unfinished_bytes": report.unfinished,
        "unrelated_files": report.unrelated,
        "faults": report.faults.iter().map(fault).collect::<Vec<_>>(),
        "more_faults": report.more_faults,
    })
}

fn known(text: &str) -> Result<Position, String> {
    let read = || {
        let (seq, hash) = text.split_once(':')?;
        Some(Position { seq: seq.parse().ok()?, hash: unhex(hash)?.try_into().ok()? })
    };
    read().ok_or_else(|| "it is a line's number, a colon and 64 hexadecimal digits, as `verify` prints them".to_owned())
}

fn text(found: &Found, report: &Report) -> String {
    let mut text = String::new();
    for Fault { file, line, kind } in &report.faults {
        text.push_str(&format!("{}:{line}: {kind}\n", file.display()));
    }
    if report.more_faults > 0 {
        text.push_str(&format!("… and more: {}\n", report.more_faults));
    }
    if report.unfinished > 0 {
        text.push_str("The last line is not finished: the daemon is writing it, or was killed.\n");
    }
    if report.unrelated > 0 {
        text.push_str(&format!("Files of an earlier log, which were not looked at: {}\n", report.unrelated));
    }
    if found.head.is_none() {
        text.push_str("How far the log was written is not known: lines that were cut off its end do not show.\n");
    }
    if report.faults.is_empty() {
        text.push_str("The audit log is whole.\n");
    }
    let Report { lines, files, first, last, .. } = report;
    text.push_str(&format!("Lines: {lines}, from number {first} on; files: {files}. The last line is\n"));
    text.push_str(&format!("{}:{}\n", last.seq, hex(&last.hash)));
    text
}
