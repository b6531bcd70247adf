//! `strongroom backup` and `restore`: the keys of the store in an age file, and back.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use secrecy::SecretString;
use serde_json::json;
use zeroize::Zeroizing;

use super::{
    CliError,
    connection::Connection,
    input,
    output::{keys_are, note, print, print_json},
    parcel,
    proof::{self, Proof},
};
use crate::agent::message::{CarryRequest, PackedEntry, Request, TakenInEntry};

/// Write the keys of the store to a file, encrypted to the recovery key
///
/// The file is an age file (age-encryption.org), made while the daemon runs and read back before it gets its name. The
/// recovery key opens it, here with `strongroom restore` and anywhere with `age -d`. A passphrase of the store is asked for.
#[derive(Args)]
#[command(after_help = BACKUP_EXAMPLES)]
pub(super) struct Backup {
    /// The file, which only you can read
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// Have this age recipient read it, too; keys that are not exportable are left out then
    #[arg(long, value_name = "AGE1…")]
    to: Vec<String>,
    /// Overwrite FILE
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const BACKUP_EXAMPLES: &str = "Examples:
  strongroom backup keys-2026-11-25.age
  strongroom backup keys.age --to age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";

impl Backup {
    pub(super) fn run(&self) -> Result<(), CliError> {
        parcel::check_new(&self.file, self.force)?;
        self.connection.run(async |client| {
            let recipients: Vec<_> = self.to.iter().map(String::as_str).collect();
            let request = |proof| Request::Carry(CarryRequest::Backup { proof, recipients: recipients.clone() });
            let reply = self.proof.give(&client, request).await?;
            let packed: PackedEntry<'_> = reply.read()?;
            let bytes = parcel::fetch(&client, packed.length).await?;
            parcel::write(&self.file, &bytes, self.force)?;
            let PackedEntry { keys, left_out, damaged, .. } = packed;
            if left_out > 0 {
                note(&format!("{} not exportable, and only in backups without --to", keys_are(left_out)));
            }
            if damaged > 0 {
                let missing = keys_are(damaged);
                note(&format!("{missing} missing: what does not open or could not be listed; the log says which"));
            }
            if self.connection.json {
                return print_json(&json!({ "keys": keys, "left_out": left_out, "damaged": damaged }));
            }
            print(&format!("{} in {}.\n", keys_are(keys), self.file.display()))
        })
    }
}

/// Put the keys of a backup into the store
///
/// The recovery key, or the other age key that the backup is encrypted to, is asked for, and a passphrase of this store.
/// Keys that are here stay as they are.
#[derive(Args)]
#[command(after_help = RESTORE_EXAMPLES)]
pub(super) struct Restore {
    /// The backup
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// Read the key from this file, as age-keygen writes them
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    identity: Option<PathBuf>,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const RESTORE_EXAMPLES: &str = "Examples:
  strongroom restore keys-2026-11-25.age
  strongroom init && strongroom restore keys.age --identity recovery.txt";

impl Restore {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let bytes = parcel::read(&self.file)?;
        self.connection.run(async |client| {
            let key = self.key()?;
            parcel::upload(&client, &bytes).await?;
            let request = |proof| Request::Carry(CarryRequest::Restore { proof, key: key.clone() });
            let reply = self.proof.give(&client, request).await?;
            told(reply.read()?, self.connection.json)
        })
    }

    fn key(&self) -> Result<SecretString, CliError> {
        let Some(path) = &self.identity else { return proof::typed("Recovery key: ") };
        let bytes = Zeroizing::new(input::read(path)?);
        let lines = bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let line = { lines }.find(|line| !line.is_empty() && !line.starts_with(b"#")).unwrap_or_default();
        super::unlock::line(line)
    }
}

/// Tells what became of keys that came.
pub(super) fn told(taken: TakenInEntry, as_json: bool) -> Result<(), CliError> {
    let TakenInEntry { new, present, damaged } = taken;
    if damaged > 0 {
        note(&format!("{} damaged and left out; the daemon's log says why", keys_are(damaged)));
    }
    if as_json {
        return print_json(&json!({ "new": new, "present": present, "damaged": damaged }));
    }
    let here = match present {
        0 => String::new(),
        1 => "; 1 was here and stays as it is".to_owned(),
        _ => format!("; {present} were here and stay as they are"),
    };
    print(&format!("{} new in the store{here}.\n", keys_are(new)))
}
