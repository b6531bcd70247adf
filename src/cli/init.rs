//! `strongroom init`: makes the encrypted store.

use clap::Args;
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    output::{print, print_json},
    proof,
};
use crate::agent::message::{Request, SlotMade, StoreRequest};

/// Make the encrypted store, in which keys outlive the daemon
///
/// The passphrase is asked for twice. It opens the store when a key of it is first used, and is asked for again before
/// anything that could carry keys away. The recovery key does the same for whoever has lost the passphrase; it is shown
/// once, here, and kept nowhere.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Init {
    /// Make no recovery key: with the passphrase, the keys are lost
    #[arg(long)]
    no_recovery: bool,
    /// Read the passphrase from the first line of standard input
    #[arg(long)]
    stdin: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom init
  strongroom init && strongroom key generate store ed25519 --label work";

impl Init {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            // Before anybody thinks of a passphrase for nothing.
            if client.store().await?.state != "none" {
                return Err(CliError::Unsupported("there is an encrypted store already".to_owned()));
            }
            let passphrase = proof::new_passphrase(self.stdin)?;
            let request = Request::Store(StoreRequest::Init { passphrase, recovery: !self.no_recovery });
            let reply = client.request(&request).await?;
            let made: SlotMade<'_> = reply.read()?;
            if self.connection.json {
                let recovery = Some(made.recovery).filter(|key| !key.is_empty());
                return print_json(&json!({ "store": "open", "recovery_key": recovery }));
            }
            print("The store is made, and open until the daemon ends or it is locked.\n")?;
            show_recovery(made.recovery)
        })
    }
}

/// Shows a recovery key, where there is one.
pub(super) fn show_recovery(key: &str) -> Result<(), CliError> {
    if key.is_empty() {
        return Ok(());
    }
    print(&format!(
        "\nThe recovery key opens the store without the passphrase. Write it down and keep it away from this machine;\n\
         it is not shown again.\n\n  {key}\n"
    ))
}
