//! `strongroom card status`: what a card says of itself.

use clap::Args;
use serde_json::{Value, json};

use super::{Chosen, Common};
use crate::{
    cli::{
        CliError,
        output::{print, print_json, table},
    },
    devices::{
        CardPin, CardStatus,
        card::{SlotStatus, TouchPolicy},
    },
    prompt::harmless,
    public_key::{FingerprintHash, fingerprint},
};

/// Show what a card says of itself: its keys, holder, PIN tries and touch policies
///
/// No PIN is needed, and no try is spent.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {
    #[command(flatten)]
    pub(super) common: Common,
}

const EXAMPLES: &str = "Examples:
  strongroom card status
  strongroom card status --card 12345678 --json | jq .tries_left.user";

impl Status {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(
            async |card| {
                if self.common.connection.json { print_json(&json(&card)) } else { print(&text(&card)) }
            },
        )
    }
}

fn text(card: &Chosen) -> String {
    let status = &card.status;
    let maker =
        if status.manufacturer.is_empty() { String::new() } else { format!(" ({})", harmless(&status.manufacturer)) };
    let [major, minor] = status.version;
    let mut text = format!(
        "{}{maker}, OpenPGP card {major}.{minor}, device {}\n\n",
        capital(&card.label()),
        harmless(&card.device)
    );
    for (what, value) in [
        ("holder", holder(&status.name)),
        ("language", harmless(&status.language)),
        ("url", harmless(&status.url)),
        ("login", harmless(&status.login)),
        ("tries left", tries(status)),
        ("signatures", signatures(status)),
    ] {
        text.push_str(&format!("{what:12}{}\n", if value.is_empty() { "-" } else { &value }));
    }
    let rows: Vec<_> = status.slots.iter().map(row).collect();
    text.push_str(&format!("\n{}", table(&["SLOT", "KEY", "TOUCH", "OPENPGP FINGERPRINT", "SSH FINGERPRINT"], &rows)));
    let notes = notes(status);
    if !notes.is_empty() {
        text.push_str(&format!("\n{notes}"));
    }
    text
}

fn tries(status: &CardStatus) -> String {
    let [user, code, admin] = status.tries;
    let code = if code == 0 { String::new() } else { format!(", resetting code {code}") };
    format!("user PIN {user}{code}, admin PIN {admin}")
}

fn signatures(status: &CardStatus) -> String {
    let each = if status.pin_per_signature { "; each wants the user PIN anew" } else { "" };
    format!("{}{each}", status.signatures)
}

fn row(slot: &SlotStatus) -> Vec<String> {
    let has_key = has_key(slot);
    vec![
        slot.slot.as_str().to_owned(),
        if has_key { harmless(&slot.algorithm) } else { String::new() },
        slot.touch.map_or("", |touch| touch.as_str()).to_owned(),
        harmless(&slot.fingerprint),
        if slot.key.is_empty() { String::new() } else { fingerprint(&slot.key, FingerprintHash::Sha256) },
    ]
}

/// Whether there is a key in the slot.
pub(super) fn has_key(slot: &SlotStatus) -> bool {
    !slot.key.is_empty() || !slot.fingerprint.is_empty()
}

/// What the card's holder should do.
fn notes(status: &CardStatus) -> String {
    let mut notes = String::new();
    let [user, _, admin] = status.tries;
    if user == 0 {
        notes.push_str("The user PIN is blocked; `strongroom card reset-pin` gives it a new value.\n");
    }
    if admin == 0 {
        notes.push_str(
            "The admin PIN is blocked for good; only `strongroom card factory-reset` helps, which loses the keys.\n",
        );
    }
    for pin in &status.default_pins {
        notes.push_str(match pin {
            CardPin::Admin => {
                "The admin PIN is that of new cards, which everybody knows: `strongroom card set-pin admin`.\n"
            }
            _ => "The user PIN is that of new cards, which everybody knows: `strongroom card set-pin`.\n",
        });
    }
    if status.default_pins.is_empty() && !status.slots.iter().any(has_key) {
        notes.push_str("New cards have the user PIN 123456 and the admin PIN 12345678: set others with `strongroom card set-pin`.\n");
    }
    notes
}

/// docs/cli.md has its fields.
fn json(card: &Chosen) -> Value {
    let status = &card.status;
    let [user, code, admin] = status.tries;
    let slot = |slot: &SlotStatus| {
        json!({
            "slot": slot.slot.as_str(),
            "algorithm": slot.algorithm,
            "has_key": has_key(slot),
            "openpgp_fingerprint": slot.fingerprint,
            "ssh_fingerprint": (!slot.key.is_empty()).then(|| fingerprint(&slot.key, FingerprintHash::Sha256)),
            "created": (slot.created != 0).then_some(slot.created),
            "touch": slot.touch.map(TouchPolicy::as_str),
        })
    };
    json!({
        "device": card.device,
        "ident": status.ident,
        "serial": status.serial(),
        "manufacturer": status.manufacturer,
        "version": format!("{}.{}", status.version[0], status.version[1]),
        "name": status.name,
        "language": status.language,
        "url": status.url,
        "login": status.login,
        "tries_left": { "user": user, "reset_code": code, "admin": admin },
        "pin_per_signature": status.pin_per_signature,
        "signatures": status.signatures,
        "default_pins": status.default_pins.iter().map(|pin| pin.as_str()).collect::<Vec<_>>(),
        "slots": status.slots.iter().map(slot).collect::<Vec<_>>(),
    })
}

/// `Example<<Ann` is Ann Example (ISO/IEC 7501-1).
fn holder(name: &str) -> String {
    let (last, first) = name.split_once("<<").unwrap_or((name, ""));
    let words = first.split('<').chain(last.split('<')).map(str::trim).filter(|word| !word.is_empty());
    harmless(&words.collect::<Vec<_>>().join(" "))
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
