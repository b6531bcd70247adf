//! `strongroom status`: the devices, what each is doing, and what keeps those that wait.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::{
    CliError,
    connection::Connection,
    input,
    output::{print, print_json, table},
    watch,
};
use crate::{
    agent::message::{Code, PinState},
    client::{Client, ClientError, Device, Key, Store},
    prompt::harmless,
    vault::STORE,
};

/// Show the devices, their keys and queues, and what waits for whom
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {
    /// Show it again and again, until Ctrl-C; with --json an object in a line each time
    #[arg(long)]
    watch: bool,
    /// How often
    #[arg(long, value_name = "TIME", default_value = "1s", requires = "watch", value_parser = input::deadline)]
    interval: Duration,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom status
  strongroom status --watch --interval 250ms
  strongroom status --json | jq '.devices[] | select(.state != \"ready\")'";

impl Status {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let socket = self.connection.path().display().to_string();
        self.connection.run(async |client| {
            if !self.watch {
                let seen = Seen::look(&client).await?;
                return if self.connection.json { print_json(&seen.json(&socket)) } else { print(&seen.text(&socket)) };
            }
            let look = async || match Seen::look(&client).await {
                Ok(seen) if self.connection.json => Ok(seen.json(&socket).to_string() + "\n"),
                Ok(seen) => Ok(seen.text(&socket)),
                Err(error) if !self.connection.json && may_return(&error) => {
                    Ok(format!("No daemon at {socket}; waiting for one.\n"))
                }
                Err(error) => Err(error.into()),
            };
            if self.connection.json {
                watch::lines(self.interval, look).await
            } else {
                watch::screen(self.interval, look).await
            }
        })
    }
}

/// Whether there is no daemon now, or none for long, and another may follow: one that is restarted refuses what comes
/// while it ends.
fn may_return(error: &ClientError) -> bool {
    matches!(error, ClientError::Lost | ClientError::Unreachable { .. }) || error.code() == Some(Code::Cancelled)
}

/// What the daemon shows at one moment.
struct Seen {
    /// Locked as a whole by `ssh-add -x`: then it shows nothing else.
    sealed: bool,
    devices: Vec<Device>,
    keys: Vec<Key>,
    /// `None` where it is not told: to others than its owner, and by other agents.
    store: Option<Store>,
}

impl Seen {
    async fn look(client: &Client) -> Result<Self, ClientError> {
        let seen = async {
            let (devices, keys, store) = (client.devices().await?, client.keys().await?, client.store().await.ok());
            Ok(Self { sealed: false, devices, keys, store })
        };
        match seen.await {
            Err(ClientError::Refused(failure)) if failure.code == Code::Locked => {
                Ok(Self { sealed: true, devices: Vec::new(), keys: Vec::new(), store: None })
            }
            other => other,
        }
    }

    fn keys_of(&self, device: &str) -> usize {
        self.keys.iter().filter(|key| key.places.iter().any(|place| place.device == device)).count()
    }

    fn text(&self, socket: &str) -> String {
        if self.sealed {
            return format!("The vault at {socket} is locked; `ssh-add -X` unlocks it.\n");
        }
        let mut text =
            format!("{} and {} at {socket}\n", count(self.devices.len(), "device"), count(self.keys.len(), "key"));
        text.extend(self.store.iter().map(|store| self.store_text(store)));
        let rows: Vec<_> = self.devices.iter().map(|device| self.row(device)).collect();
        if !rows.is_empty() {
            let heading =
                ["DEVICE", "KIND", "STATE", "PIN", "KEYS", "RUNNING", "WAITING", "DONE", "FAILED", "LATE", "RESTARTS"];
            text.push_str(&format!("\n{}", table(&heading, &rows)));
        }
        let notes: String = self.devices.iter().flat_map(notes).map(|note| format!("{note}\n")).collect();
        if !notes.is_empty() {
            text.push_str(&format!("\n{notes}"));
        }
        text
    }

    /// A line about the store, and one about what became of its file.
    fn store_text(&self, store: &Store) -> String {
        let slots = count(store.slots.len(), "slot");
        let keys = count(self.keys_of(STORE), "key");
        let mut text = match store.state.as_str() {
            "none" => "No encrypted store; `strongroom init` makes one.\n".to_owned(),
            "open" => format!("The encrypted store is open: {keys}, {slots}.\n"),
            _ => format!("The encrypted store is locked: {keys}, {slots}; `strongroom unlock` unlocks it.\n"),
        };
        if !store.report.is_empty() {
            text.push_str(&format!("{}\n", store.report.lines().map(harmless).collect::<Vec<_>>().join("\n")));
        }
        text
    }

    fn row(&self, device: &Device) -> Vec<String> {
        let pin = match (device.pin, device.tries_left) {
            (PinState::None, _) => String::new(),
            (PinState::Needed, Some(tries)) => format!("needed ({tries} left)"),
            (state, _) => state.as_str().to_owned(),
        };
        vec![
            harmless(&device.id),
            harmless(&device.kind),
            harmless(&device.state),
            pin,
            self.keys_of(&device.id).to_string(),
            format!("{}/{}", device.running, device.lanes),
            device.waiting.to_string(),
            device.done.to_string(),
            device.failed.to_string(),
            device.timed_out.to_string(),
            device.restarts.to_string(),
        ]
    }

    /// docs/cli.md has its fields.
    fn json(&self, socket: &str) -> Value {
        let device = |device: &Device| {
            json!({
                "id": device.id,
                "kind": device.kind,
                "serial": device.serial,
                "state": device.state,
                "reason": device.reason,
                "pin": device.pin.as_str(),
                "tries_left": device.tries_left,
                "wants": device.wants,
                "wanted_for": device.wanted_for,
                "notes": device.notes,
                "keys": self.keys_of(&device.id),
                "lanes": device.lanes,
                "running": device.running,
                "waiting": device.waiting,
                "done": device.done,
                "failed": device.failed,
                "timed_out": device.timed_out,
                "restarts": device.restarts,
            })
        };
        json!({
            "socket": socket,
            "sealed": self.sealed,
            "keys": self.keys.len(),
            "store": self.store.as_ref().map(|store| json!({
                "state": store.state,
                "slots": store.slots.len(),
                "keys": self.keys_of(STORE),
                "report": store.report,
            })),
            "devices": self.devices.iter().map(device).collect::<Vec<_>>(),
        })
    }
}

/// `1 key`, `2 keys`.
fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

/// What a person should know of a device, each in a line.
fn notes(device: &Device) -> Vec<String> {
    let id = harmless(&device.id);
    let about = |fact: String| format!("{id}: {}.", fact.trim_end_matches('.'));
    let left_out = device.notes.iter().map(|note| harmless(note));
    wanted(device).or_else(|| waiting(device, &id)).into_iter().chain(left_out).map(about).collect()
}

/// What somebody is to do there now, and for which request where that is ours.
fn wanted(device: &Device) -> Option<String> {
    match device.wants.as_str() {
        _ if !device.wanted_for.is_empty() => Some(harmless(&device.wanted_for)),
        "" => None,
        "touch" => Some("it is to be touched, for another user's request".to_owned()),
        "insert" => Some("it is to be connected, for another user's request".to_owned()),
        other => Some(format!("it wants {}", harmless(other))),
    }
}

/// Whom its requests wait for, and what to do about it.
fn waiting(device: &Device, id: &str) -> Option<String> {
    let queued = device.waiting as usize;
    let waits = |whom: &str| match queued {
        0 => None,
        1 => Some(format!("1 request waits for {whom}")),
        n => Some(format!("{n} requests wait for {whom}")),
    };
    let needs_pin = device.pin == PinState::Needed;
    match device.state.as_str() {
        "failed" => Some(format!("it failed: {}", harmless(&device.reason))),
        "absent" => {
            waits("it to be connected").or_else(|| Some("it is not connected; its keys stay listed".to_owned()))
        }
        "stalled" => Some(format!(
            "{} in it has not come back in time; it is about to be restarted",
            count(device.running as usize, "call")
        )),
        "restarting" | "probing" => waits("it to start"),
        _ if device.pin == PinState::Blocked => Some("its PIN is blocked; unblock it with its own tools".to_owned()),
        _ if needs_pin => {
            let unlock = format!("`strongroom unlock {id}` gives it");
            Some(
                waits("its PIN")
                    .map_or_else(|| format!("it wants its PIN; {unlock}"), |waits| format!("{waits}; {unlock}")),
            )
        }
        _ => waits(&format!("their turn behind {}", count(device.running as usize, "other"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::message::Failure;

    #[test]
    fn a_watch_goes_on_while_the_daemon_is_restarted() {
        let refused = |code| ClientError::Refused(Failure::new(code, "no"));
        assert!(may_return(&ClientError::Lost) && may_return(&refused(Code::Cancelled)));
        assert!(!may_return(&refused(Code::Denied)) && !may_return(&ClientError::Unsupported("devices")));
    }
}
