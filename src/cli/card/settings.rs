//! `strongroom card set-touch`, `set-signature-pin`, `set-name`, `set-url`, `set-login`, `set-language` and `factory-reset`.

use clap::{ArgAction, Args};
use serde_json::json;

use super::{Common, Pins, keys};
use crate::{
    cli::{
        CliError,
        output::{print, print_json},
    },
    devices::{CardChange, CardPin, CardSlot, CardText, Touch},
};

/// Set whether the uses of a slot's key want a touch
#[derive(Args)]
#[command(after_help = TOUCH_EXAMPLES)]
pub(super) struct SetTouch {
    /// The slot
    #[arg(value_name = "sign|decrypt|auth", value_parser = keys::slot)]
    slot: CardSlot,
    /// Whether uses want a touch; fixed lasts as long as the key
    #[arg(value_name = "off|on|fixed", value_parser = keys::touch)]
    touch: Touch,
    /// The card's serial number, for fixed: that it cannot be undone
    #[arg(long, value_name = "SERIAL")]
    serial: Option<String>,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const TOUCH_EXAMPLES: &str = "Examples:
  strongroom card set-touch auth on
  strongroom card set-touch sign fixed --serial 12345678";

/// Set whether each signature of the slot sign wants the user PIN anew
///
/// New cards want it so. With `once` a PIN serves until the card is pulled or locked, as it does in the other slots.
#[derive(Args)]
#[command(after_help = SIGNATURE_PIN_EXAMPLES)]
pub(super) struct SetSignaturePin {
    /// each or once
    #[arg(value_name = "each|once", value_parser = each, action = ArgAction::Set)]
    each: bool,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const SIGNATURE_PIN_EXAMPLES: &str = "Examples:
  strongroom card set-signature-pin once";

/// Whether a word means each signature.
fn each(word: &str) -> Result<bool, String> {
    match word {
        "each" => Ok(true),
        "once" => Ok(false),
        _ => Err("the user PIN is wanted for each signature, or once".to_owned()),
    }
}

/// Set the holder's name on a card
#[derive(Args)]
#[command(after_help = NAME_EXAMPLES)]
pub(super) struct SetName {
    /// Given names, then the surname; or as the card has it, `Surname<<Given<Names`; empty to remove it
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const NAME_EXAMPLES: &str = "Examples:
  strongroom card set-name 'Ann Example'
  strongroom card set-name 'van Example<<Ann<Mary'";

/// Set where the public keys are to be found
#[derive(Args)]
#[command(after_help = URL_EXAMPLES)]
pub(super) struct SetUrl {
    /// The URL; empty to remove it
    #[arg(value_name = "URL")]
    url: String,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const URL_EXAMPLES: &str = "Examples:
  strongroom card set-url https://example.org/ann.asc";

/// Set the login data on a card: by custom the name of an account
#[derive(Args)]
#[command(after_help = LOGIN_EXAMPLES)]
pub(super) struct SetLogin {
    /// The name; empty to remove it
    #[arg(value_name = "NAME")]
    login: String,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const LOGIN_EXAMPLES: &str = "Examples:
  strongroom card set-login ann";

/// Set the holder's languages on a card
#[derive(Args)]
#[command(after_help = LANGUAGE_EXAMPLES)]
pub(super) struct SetLanguage {
    /// One to four languages of two letters each, the preferred one first
    #[arg(value_name = "LANGUAGES")]
    language: String,
    #[command(flatten)]
    pins: Pins,
    #[command(flatten)]
    pub(super) common: Common,
}

const LANGUAGE_EXAMPLES: &str = "Examples:
  strongroom card set-language deen";

/// Delete all keys and data of a card, and set its PINs to those of new cards
///
/// Nothing brings the keys back. No PIN is needed: this is also for a card whose PINs are blocked.
#[derive(Args)]
#[command(after_help = RESET_EXAMPLES)]
pub(super) struct FactoryReset {
    /// The card's serial number: that this very card is meant
    #[arg(long, value_name = "SERIAL")]
    serial: Option<String>,
    #[command(flatten)]
    pub(super) common: Common,
}

const RESET_EXAMPLES: &str = "Examples:
  strongroom card factory-reset
  strongroom card factory-reset --serial 12345678";

impl SetTouch {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            if self.touch == Touch::Fixed {
                let loss = "A fixed touch policy lasts until the key is replaced or the card reset.";
                card.confirm(loss, self.serial.as_deref())?;
            }
            let secret = self.pins.known(&card, CardPin::Admin)?;
            card.change(CardChange::SetTouch { slot: self.slot, touch: self.touch, secret }).await?;
            let (slot, touch) = (self.slot.as_str(), self.touch.as_str());
            if self.common.connection.json {
                return print_json(&json!({ "device": card.device, "slot": slot, "touch": touch }));
            }
            print(&format!("The touch policy of the slot {slot} of the {} is {touch}.\n", card.label()))
        })
    }
}

impl SetSignaturePin {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            let secret = self.pins.known(&card, CardPin::Admin)?;
            card.change(CardChange::SetSignaturePin { each: self.each, secret }).await?;
            if self.common.connection.json {
                return print_json(&json!({ "device": card.device, "pin_per_signature": self.each }));
            }
            let when = if self.each { "for each signature" } else { "once, and again when it was pulled or locked" };
            print(&format!("The {} wants its user PIN {when}.\n", card.label()))
        })
    }
}

impl SetName {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.set_text(&self.pins, CardText::Name, as_card_has_it(&self.name))
    }
}

impl SetUrl {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.set_text(&self.pins, CardText::Url, self.url.clone())
    }
}

impl SetLogin {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.set_text(&self.pins, CardText::Login, self.login.clone())
    }
}

impl SetLanguage {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.set_text(&self.pins, CardText::Language, self.language.clone())
    }
}

impl FactoryReset {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.common.run(async |card| {
            let loss = "All keys and data on the card will be lost, and nothing brings them back.";
            card.confirm(loss, self.serial.as_deref())?;
            card.change(CardChange::FactoryReset { serial: card.status.serial().to_owned() }).await?;
            if self.common.connection.json {
                return print_json(&json!({ "device": card.device, "reset": true }));
            }
            print(&format!(
                "The {} is as new. Its user PIN is 123456 and its admin PIN 12345678: set others with `strongroom card \
                 set-pin`.\n",
                card.label()
            ))
        })
    }
}

impl Common {
    fn set_text(&self, pins: &Pins, text: CardText, value: String) -> Result<(), CliError> {
        self.run(async |card| {
            let secret = pins.known(&card, CardPin::Admin)?;
            card.change(CardChange::SetText { text, value: value.clone(), secret }).await?;
            if self.connection.json {
                return print_json(&json!({ "device": card.device, "text": text.as_str(), "value": value }));
            }
            let what = if text == CardText::Url { "URL" } else { text.as_str() };
            let done = if value.is_empty() { "removed" } else { "set" };
            print(&format!("The {what} on the {} is {done}.\n", card.label()))
        })
    }
}

/// The last word is the surname, which stands first (ISO/IEC 7501-1).
fn as_card_has_it(name: &str) -> String {
    if name.contains('<') {
        return name.to_owned();
    }
    let mut words: Vec<_> = name.split_whitespace().collect();
    match (words.pop(), words.is_empty()) {
        (Some(last), false) => format!("{last}<<{}", words.join("<")),
        (last, _) => last.unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_written_as_cards_have_it() {
        assert_eq!(as_card_has_it("Ann Mary Example"), "Example<<Ann<Mary");
        assert_eq!(as_card_has_it("van Example<<Ann"), "van Example<<Ann");
        assert_eq!(as_card_has_it("Cher"), "Cher");
        assert_eq!(as_card_has_it(""), "");
    }
}
