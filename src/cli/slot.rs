//! `strongroom slot` and `strongroom passphrase`: what opens the encrypted store.

use std::path::Path;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    init::show_recovery,
    output::{print, print_json, table},
    proof::{self, Proof},
    terminal,
};
use crate::{
    agent::message::{NewSlot, Request, SlotMade, StoreRequest},
    client::Slot as Listed,
    prompt::harmless,
    vault::audit::date,
};

/// List, add and remove what opens the encrypted store
///
/// Each slot alone opens it: a passphrase, the recovery key, or a file that the daemon reads at its start.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Slot {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  strongroom slot list
  strongroom slot add credential strongroom-store --label boot
  strongroom slot remove 1";

#[derive(Subcommand)]
enum Command {
    List(List),
    Add(Add),
    Remove(Remove),
}

impl Slot {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.command {
            Command::List(list) => list.run(),
            Command::Add(add) => add.run(),
            Command::Remove(remove) => remove.run(),
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        match &self.command {
            Command::List(list) => &list.connection,
            Command::Add(add) => &add.connection,
            Command::Remove(remove) => &remove.connection,
        }
    }
}

/// List the slots
#[derive(Args)]
struct List {
    #[command(flatten)]
    connection: Connection,
}

impl List {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let store = client.store().await?;
            if self.connection.json {
                let slot = |slot: &Listed| {
                    json!({ "number": slot.number, "kind": slot.kind, "label": slot.label, "created": slot.created,
                            "what": slot.what })
                };
                let slots: Vec<_> = store.slots.iter().map(slot).collect();
                return print_json(&json!({ "store": store.state, "slots": slots }));
            }
            if store.slots.is_empty() {
                return print("There is no store yet; `strongroom init` makes one.\n");
            }
            let row = |slot: &Listed| {
                vec![
                    slot.number.to_string(),
                    harmless(&slot.kind),
                    date(slot.created),
                    harmless(&slot.label),
                    harmless(&slot.what),
                ]
            };
            let rows: Vec<_> = store.slots.iter().map(row).collect();
            print(&table(&["SLOT", "KIND", "MADE", "LABEL", "WHAT"], &rows))
        })
    }
}

/// Add another passphrase, recovery key, key file or credential
///
/// A passphrase that the store has already, or its recovery key, is asked for. A key file holds 32 bytes or more by chance,
/// as `head -c 32 /dev/urandom` gives them; the daemon reads it at its start, and so does whoever can read it. A credential
/// is passed by systemd (LoadCredentialEncrypted= in the unit), and must be there when it is added.
#[derive(Args)]
#[command(after_help = ADD)]
struct Add {
    /// What is to open the store
    #[arg(value_name = "KIND")]
    kind: What,
    /// The key file, or the credential's name
    #[arg(value_name = "FILE|NAME", value_hint = ValueHint::FilePath)]
    value: Option<String>,
    /// What the slot is for
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    label: String,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

const ADD: &str = "Examples:
  strongroom slot add passphrase --label laptop
  strongroom slot add key-file /etc/strongroom.key
  strongroom slot add credential strongroom-store --label boot";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Another passphrase, which is asked for twice
    Passphrase,
    /// A recovery key, which is shown once
    Recovery,
    /// A file that the daemon reads
    KeyFile,
    /// A credential that systemd passes to the daemon
    Credential,
}

impl Add {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let path;
            let add = match (self.kind, &self.value) {
                (What::Passphrase, None) => NewSlot::Passphrase(proof::new_passphrase(false)?),
                (What::Recovery, None) => NewSlot::Recovery,
                (What::KeyFile, Some(file)) => {
                    path = absolute(Path::new(file))?;
                    NewSlot::KeyFile(&path)
                }
                (What::Credential, Some(name)) => NewSlot::Credential(name),
                (What::Passphrase | What::Recovery, Some(_)) => {
                    return Err(CliError::Usage("a passphrase is asked for, and a recovery key is made".to_owned()));
                }
                (What::KeyFile, None) => return Err(CliError::Usage("name the key file".to_owned())),
                (What::Credential, None) => return Err(CliError::Usage("name the credential".to_owned())),
            };
            let request = |proof| {
                let (label, add) = (self.label.as_str(), add.clone());
                Request::Store(StoreRequest::AddSlot { proof, label, add })
            };
            let reply = self.proof.give(&client, request).await?;
            let made: SlotMade<'_> = reply.read()?;
            if self.connection.json {
                let recovery = Some(made.recovery).filter(|key| !key.is_empty());
                return print_json(&json!({ "slot": made.number, "recovery_key": recovery }));
            }
            print(&format!("Slot {} opens the store, too.\n", made.number))?;
            show_recovery(made.recovery)
        })
    }
}

/// The daemon may run elsewhere.
fn absolute(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::File { path: path.to_owned(), source };
    let absolute = std::path::absolute(path).map_err(failed)?;
    absolute.into_os_string().into_string().map_err(|_| CliError::Usage("the path is not UTF-8 text".to_owned()))
}

/// Remove a slot; the last one stays
///
/// Who has an old copy of the state file and what opened the slot can still open that copy.
#[derive(Args)]
struct Remove {
    /// Its number, as `strongroom slot list` shows it
    #[arg(value_name = "SLOT")]
    number: u32,
    /// Remove the last passphrase or recovery key, too, without a question
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

impl Remove {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let slots = client.store().await?.slots;
            let by_people = |slot: &Listed| matches!(slot.kind.as_str(), "passphrase" | "recovery");
            let others = slots.iter().any(|slot| slot.number != self.number && by_people(slot));
            if slots.len() > 1 && !others && !self.yes {
                self.warn()?;
            }
            let number = self.number;
            let request = |proof| Request::Store(StoreRequest::RemoveSlot { proof, number });
            self.proof.give(&client, request).await?.read::<()>()?;
            if self.connection.json {
                return print_json(&json!({ "removed": number }));
            }
            print(&format!("Slot {number} is removed.\n"))
        })
    }

    fn warn(&self) -> Result<(), CliError> {
        let question = "No passphrase and no recovery key will open the store any more: whoever loses the daemon's files loses \
                        the keys.\nRemove it all the same? (yes) ";
        match terminal::ask_aloud(question).map_err(CliError::NoTerminal)?.as_str() {
            "yes" => Ok(()),
            _ => Err(CliError::Usage("nothing was removed".to_owned())),
        }
    }
}

/// Change a passphrase of the encrypted store
///
/// The recovery key may be given in place of the passphrase as it was. Who has an old copy of the state file can still open
/// that copy with the old passphrase.
#[derive(Args)]
#[command(after_help = "Examples:\n  strongroom passphrase")]
pub(super) struct Passphrase {
    /// Read both from standard input: the old one from the first line, the new one from the second
    #[arg(long)]
    stdin: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

impl Passphrase {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let (old, new) = if self.stdin {
                proof::two_lines()?
            } else {
                (proof::typed("Passphrase of the store, or its recovery key: ")?, proof::new_passphrase(false)?)
            };
            let request = Request::Store(StoreRequest::ChangePassphrase { old, new });
            let reply = client.request(&request).await?;
            let made: SlotMade<'_> = reply.read()?;
            if self.connection.json {
                return print_json(&json!({ "slot": made.number }));
            }
            print("The passphrase is changed.\n")
        })
    }
}
