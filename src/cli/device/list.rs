//! `strongroom device list`: the devices of the running daemon.

use clap::Args;
use serde_json::{Value, json};

use super::super::{
    CliError,
    connection::Connection,
    output::{print, print_json, table},
};
use crate::{agent::message::PinState, client::Device, prompt::harmless};

/// List the daemon's devices
///
/// Those of the configuration come first, those that came by `ssh-add -s` behind them.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct List {
    #[command(flatten)]
    connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom device list
  strongroom device list --json | jq -r '.devices[] | select(.state == \"failed\") | .reason'";

impl List {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let devices = self.connection.run(async |client| Ok(client.devices().await?))?;
        if self.connection.json {
            return print_json(&json!({ "devices": devices.iter().map(value).collect::<Vec<_>>() }));
        }
        if devices.is_empty() {
            return print(
                "There are no devices. `strongroom device scan` finds tokens, `strongroom device add` adds one.\n",
            );
        }
        let rows: Vec<_> = devices.iter().map(row).collect();
        let mut text = table(&["DEVICE", "DRIVER", "SERIAL", "STATE", "PIN", "REASON"], &rows);
        for device in &devices {
            for note in &device.notes {
                text.push_str(&format!("{}: {}\n", harmless(&device.id), harmless(note)));
            }
        }
        print(&text)
    }

    pub(super) fn json(&self) -> bool {
        self.connection.json
    }
}

fn row(device: &Device) -> Vec<String> {
    let fields = [&device.id, &device.kind, &device.serial, &device.state, &pin(device), &device.reason];
    fields.map(|field| harmless(field)).to_vec()
}

fn pin(device: &Device) -> String {
    match (device.pin, device.tries_left) {
        (PinState::None, _) => String::new(),
        (state, Some(1)) => format!("{}, last try", state.as_str()),
        (state, Some(left)) => format!("{}, {left} tries left", state.as_str()),
        (state, None) => state.as_str().to_owned(),
    }
}

/// docs/cli.md has its fields.
fn value(device: &Device) -> Value {
    json!({
        "id": device.id,
        "kind": device.kind,
        "serial": device.serial,
        "state": device.state,
        "reason": device.reason,
        "pin": device.pin.as_str(),
        "tries_left": device.tries_left,
        "notes": device.notes,
    })
}
