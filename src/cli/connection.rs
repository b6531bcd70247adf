//! Which daemon a command talks to, and how it runs while it does.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use tokio::runtime;

use super::CliError;
use crate::client::{self, Client};

/// What every command that asks the daemon takes.
#[derive(Args)]
#[command(next_help_heading = "Common options")]
pub(super) struct Connection {
    /// Ask the daemon at PATH [default: $XDG_RUNTIME_DIR/strongroom/service]
    #[arg(long, env = "STRONGROOM_SOCKET", hide_env_values = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    socket: Option<PathBuf>,
    /// Print JSON, errors too
    #[arg(long)]
    pub(super) json: bool,
}

impl Connection {
    /// The daemon's socket.
    pub(super) fn path(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(client::default_path)
    }

    /// Connects, and does what is to be done there.
    pub(super) fn run<T>(&self, work: impl AsyncFnOnce(Client) -> Result<T, CliError>) -> Result<T, CliError> {
        in_runtime(async || work(Client::connect(self.path()).await?).await)
    }
}

/// Does what waits for something.
pub(super) fn in_runtime<T>(work: impl AsyncFnOnce() -> Result<T, CliError>) -> Result<T, CliError> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    runtime.block_on(work())
}
