//! `strongroom device`: which devices there are, which the configuration names, and what else is plugged in. Knows the
//! configuration file and modules; no key.

mod add;
mod list;
mod modules;
mod remove;
mod scan;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand, ValueHint};

use super::{CliError, input::deadline};
use crate::config::edit::Editor;

/// List the devices, find tokens, add and remove devices
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Device {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  strongroom device list
  strongroom device scan
  strongroom device add pkcs11 /usr/lib/softhsm/libsofthsm2.so
  strongroom device remove hsm";

#[derive(Subcommand)]
enum Command {
    List(list::List),
    Scan(scan::Scan),
    Add(add::Add),
    Remove(remove::Remove),
}

impl Device {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.command {
            Command::List(list) => list.run(),
            Command::Scan(scan) => scan.run(),
            Command::Add(add) => add.run(),
            Command::Remove(remove) => remove.run(),
        }
    }

    pub(super) fn json(&self) -> bool {
        match &self.command {
            Command::List(list) => list.json(),
            Command::Scan(scan) => scan.json(),
            Command::Add(add) => add.json(),
            Command::Remove(remove) => remove.json(),
        }
    }
}

/// What the commands take that work on the configuration file.
#[derive(Args)]
#[command(next_help_heading = "Common options")]
struct File {
    /// The configuration file [default: $XDG_CONFIG_HOME/strongroom/config.toml]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// Print JSON, errors too
    #[arg(long)]
    json: bool,
}

impl File {
    fn open(&self) -> Result<Editor, CliError> {
        Ok(Editor::open(self.config.clone())?)
    }
}

/// How long a module may take.
#[derive(Args)]
struct Patience {
    /// How long a module may take to say what its tokens are
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = deadline)]
    deadline: Duration,
}

/// How a running daemon is made to read this file.
fn how_to_reload(file: &Path) -> String {
    let systemctl = if file.starts_with("/etc") { "sudo systemctl" } else { "systemctl --user" };
    format!("A running daemon takes it by `{systemctl} reload strongroom`, or by SIGHUP.\n")
}
