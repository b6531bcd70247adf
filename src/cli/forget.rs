//! `strongroom forget`: has cached secrets wiped.

use clap::Args;
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    output::{print, print_json},
    target::Aim,
};
use crate::{agent::message::Target, prompt::harmless};

/// Wipe the PINs that the daemon keeps, and lock the encrypted store; keys stay listed
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Forget {
    /// `store`, a device, or a key that is there
    #[arg(value_name = "store|DEVICE|KEY", required_unless_present = "all")]
    target: Option<String>,
    /// The store and all devices
    #[arg(long, conflicts_with = "target")]
    all: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom forget hsm
  strongroom forget --all";

impl Forget {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let label = match &self.target {
                Some(name) => {
                    let aim = Aim::find(&client, name).await?;
                    client.forget(aim.target()).await?;
                    aim.label().to_owned()
                }
                None => {
                    client.forget(Target::Everything).await?;
                    "everything".to_owned()
                }
            };
            if self.connection.json {
                return print_json(&json!({ "forgotten": label }));
            }
            print(&format!("The secrets of {} are forgotten.\n", harmless(&label)))
        })
    }
}
