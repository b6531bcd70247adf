//! `strongroom device-host`: the inside of a device's process. The daemon starts it; nobody types it.

use clap::Args;

use super::CliError;
use crate::{devices::host::child, sys::process::close_inherited};

/// Run one device's driver for the daemon
#[derive(Args)]
#[command(hide = true)]
pub(super) struct DeviceHost {
    /// The kind of driver
    kind: String,
    /// The device's name, for whoever looks at the list of processes
    #[arg(allow_hyphen_values = true)]
    name: String,
}

impl DeviceHost {
    pub(super) fn run(self) -> Result<(), CliError> {
        close_inherited();
        match child::main(&self.kind)? {}
    }
}
