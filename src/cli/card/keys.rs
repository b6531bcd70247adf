//! `strongroom card generate` and `import`: keys that are made on a card, or brought to it from the daemon's memory.

use clap::Args;
use serde_json::json;

use super::{Chosen, Common, Pins, refused, status::has_key};
use crate::{
    agent::message::{Made, Request},
    cli::{
        CliError, key_name,
        output::{print, print_json},
    },
    devices::{Algorithm, CardPin, CardSlot, NewKey, Touch},
    public_key::{FingerprintHash, fingerprint},
    vault::{Move, stored::NewStored},
};

/// Make a key on a card
///
/// It never leaves the card, and there is no copy of it. Making an RSA key takes some cards minutes.
#[derive(Args)]
#[command(after_help = GENERATE_EXAMPLES)]
pub(super) struct Generate {
    #[command(flatten)]
    into: Into,
    /// The kind of key: ed25519, x25519, nistp256, nistp384, nistp521, rsa-2048, rsa-3072 or rsa-4096
    #[arg(long, value_name = "KIND", value_parser = algorithm, default_value = "ed25519")]
    algorithm: Algorithm,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const GENERATE_EXAMPLES: &str = "Examples:
  strongroom card generate --slot auth --touch on
  strongroom card generate --slot decrypt --algorithm x25519
  strongroom card generate --slot sign --algorithm rsa-4096 --serial 12345678";

/// Move a key that `ssh-add` brought to a card
///
/// Afterwards the card has it and the daemon's memory has not. The file it came from is left alone: keep it somewhere safe,
/// or destroy it.
#[derive(Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub(super) struct Import {
    /// The key, by its name, comment or fingerprint, or a file with its public half
    #[arg(value_name = "KEY")]
    key: String,
    #[command(flatten)]
    into: Into,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const IMPORT_EXAMPLES: &str = "Examples:
  ssh-add ~/.ssh/id_ed25519
  strongroom card import ~/.ssh/id_ed25519.pub --slot auth --touch fixed";

/// Where a key goes on the card.
#[derive(Args)]
struct Into {
    /// Its slot on the card; ssh uses auth
    #[arg(long, value_name = "sign|decrypt|auth", value_parser = slot)]
    slot: CardSlot,
    /// Whether its uses want a touch; fixed lasts as long as the key
    #[arg(long, value_name = "off|on|fixed", value_parser = touch)]
    touch: Option<Touch>,
    /// The card's serial number: that a key which is in the slot may be lost
    #[arg(long, value_name = "SERIAL")]
    serial: Option<String>,
}

fn algorithm(name: &str) -> Result<Algorithm, String> {
    Algorithm::from_name(name).ok_or_else(|| "no card has such keys".to_owned())
}

pub(super) fn slot(name: &str) -> Result<CardSlot, String> {
    CardSlot::from_name(name).ok_or_else(|| "a card has the slots sign, decrypt and auth".to_owned())
}

pub(super) fn touch(name: &str) -> Result<Touch, String> {
    Touch::from_name(name).ok_or_else(|| "a touch policy is off, on or fixed".to_owned())
}

impl Into {
    /// Asks before a key is lost.
    fn check(&self, card: &Chosen) -> Result<(), CliError> {
        let slot = self.slot.as_str();
        match card.status.slot(self.slot).filter(|status| has_key(status)) {
            Some(status) => {
                let name =
                    if status.fingerprint.is_empty() { String::new() } else { format!(", {}", status.fingerprint) };
                let loss = format!("The slot {slot} has a key{name}: it will be lost.");
                card.confirm(&loss, self.serial.as_deref())
            }
            None => Ok(()),
        }
    }
}

impl Generate {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            self.into.check(&card)?;
            let new = NewKey {
                slot: Some(self.into.slot),
                touch: self.into.touch,
                secret: Some(self.pins.known(&card, CardPin::Admin)?),
                ..NewKey::new("", self.algorithm)
            };
            let request = Request::Generate { deadline: None, device: &card.device, new, terms: NewStored::default() };
            self.common.made(&card, &request, self.into.slot, "made").await
        })
    }
}

impl Import {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            let key = key_name::resolve(&card.client, &self.key).await?;
            self.into.check(&card)?;
            let to = Move {
                device: card.device.clone(),
                label: String::new(),
                slot: Some(self.into.slot),
                touch: self.into.touch,
                secret: Some(self.pins.known(&card, CardPin::Admin)?),
                terms: NewStored::default(),
            };
            let request = Request::Import { deadline: None, key: &key.blob, to };
            self.common.made(&card, &request, self.into.slot, "moved").await
        })
    }
}

impl Common {
    /// Has the key made, and tells of it.
    async fn made(&self, card: &Chosen, request: &Request<'_>, slot: CardSlot, how: &str) -> Result<(), CliError> {
        let reply = card.client.request(request).await?;
        let made: Made<'_> = reply.read().map_err(refused)?;
        let name = fingerprint(made.blob, FingerprintHash::Sha256);
        if self.connection.json {
            return print_json(&json!({ "device": card.device, "slot": slot.as_str(), "fingerprint": name }));
        }
        print(&format!("The key {name} was {how}: it is in the slot {} of the {}.\n", slot.as_str(), card.label()))
    }
}
