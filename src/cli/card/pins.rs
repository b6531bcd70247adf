//! `strongroom card set-pin` and `reset-pin`.

use clap::Args;
use serde_json::json;

use super::{Chosen, Common, Pins, name_of};
use crate::{
    cli::{
        CliError,
        output::{print, print_json},
    },
    devices::{CardChange, CardPin},
};

/// Set a PIN of a card
///
/// The PIN as it was is asked for first; for the resetting code it is the admin PIN. The daemon forgets the PIN that it kept.
#[derive(Args)]
#[command(after_help = SET_EXAMPLES)]
pub(super) struct SetPin {
    /// Which: user, for the use of keys; admin, for everything else; reset-code, which lets its holder reset the user PIN
    #[arg(value_name = "WHICH", value_parser = pin, default_value = "user")]
    which: CardPin,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const SET_EXAMPLES: &str = "Examples:
  strongroom card set-pin
  strongroom card set-pin admin --card 12345678";

/// Give the user a new PIN, when the old one is blocked or forgotten
///
/// It has all its tries again. The admin PIN allows it, or the resetting code.
#[derive(Args)]
#[command(after_help = RESET_EXAMPLES)]
pub(super) struct ResetPin {
    /// Use the resetting code in place of the admin PIN
    #[arg(long)]
    code: bool,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const RESET_EXAMPLES: &str = "Examples:
  strongroom card reset-pin
  strongroom card reset-pin --code";

fn pin(name: &str) -> Result<CardPin, String> {
    CardPin::from_name(name).ok_or_else(|| "a card has the PINs user, admin and reset-code".to_owned())
}

impl SetPin {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            let authority = if self.which == CardPin::ResetCode { CardPin::Admin } else { self.which };
            let secret = self.pins.known(&card, authority)?;
            let new = self.pins.chosen(self.which)?;
            card.change(CardChange::SetPin { pin: self.which, secret, new }).await?;
            self.common.tell(&card, self.which)
        })
    }
}

impl ResetPin {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            let by = if self.code { CardPin::ResetCode } else { CardPin::Admin };
            let secret = self.pins.known(&card, by)?;
            let new = self.pins.chosen(CardPin::User)?;
            card.change(CardChange::ResetPin { by, secret, new }).await?;
            self.common.tell(&card, CardPin::User)
        })
    }
}

impl Common {
    fn tell(&self, card: &Chosen, which: CardPin) -> Result<(), CliError> {
        if self.connection.json {
            return print_json(&json!({ "device": card.device, "pin_set": which.as_str() }));
        }
        print(&format!("{} of {} is set.\n", name_of(which), card.label()))
    }
}
