//! `strongroom lock`: makes the store want its passphrase again, or a device its PIN.

use clap::Args;
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    output::{print, print_json},
    target::Aim,
};
use crate::{agent::message::PinState, prompt::harmless};

/// Make the encrypted store want its passphrase again, or a device its PIN
///
/// Of a locked store neither its master key nor one of its private keys is in memory; the keys stay listed. To lock the whole vault under a password, use `ssh-add -x`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Lock {
    /// `store`, a device, or a key that is there; without it the store, or else the only device that is open
    #[arg(value_name = "store|DEVICE|KEY")]
    target: Option<String>,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom lock
  strongroom lock hsm";

impl Lock {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let aim = match &self.target {
                Some(name) => Aim::find(&client, name).await?,
                None => Aim::only(&client, PinState::Open).await?,
            };
            client.lock(aim.target()).await?;
            if self.connection.json {
                return print_json(&json!({ "locked": aim.label() }));
            }
            print(&format!("{} is locked.\n", harmless(aim.label())))
        })
    }
}
