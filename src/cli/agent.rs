//! `strongroom agent`: the vault in the foreground.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::CliError;
use crate::{
    config::{Config, Origin},
    daemon,
};

/// Serve ssh and other programs in the foreground, until SIGTERM or SIGINT
///
/// Sockets handed over by systemd replace the configured ones: the one named `ssh` is the ssh door, the one named
/// `service` the service door. SIGHUP reads the configuration again; if it has an error, the old one stays in force and
/// the log says why.
#[derive(Args)]
pub(super) struct Agent {
    /// Read the settings from FILE instead of the default place
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) config: Option<PathBuf>,
    /// Listen at PATH only, as an ssh door, in place of all configured sockets; may be given more than once
    #[arg(long = "socket", value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(super) sockets: Vec<PathBuf>,
    /// Keep in DIR what must survive a restart, instead of in $XDG_STATE_HOME/strongroom
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(super) state: Option<PathBuf>,
}

impl Agent {
    pub(super) fn run(self) -> Result<(), CliError> {
        let config = Config::load(Origin { file: self.config, sockets: self.sockets, state: self.state })?;
        Ok(daemon::run_agent(config)?)
    }
}
