//! `strongroom card`: administration of OpenPGP cards. One file for each part of it; which card is meant, and what a person is
//! asked for, is here.

mod keys;
mod pins;
mod settings;
mod status;

use std::io::{self, Read};

use clap::{Args, Subcommand};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{CliError, connection::Connection, terminal, unlock::line};
use crate::{
    agent::message::{Code, MAX_SECRET},
    client::{Client, ClientError, Device},
    devices::{CardChange, CardPin, CardStatus, card::MAX_CARD_PIN},
    prompt::harmless,
};

/// Look at an OpenPGP card, make and bring keys, set PINs and touch policies
///
/// YubiKeys, Nitrokeys, Gnuk and other cards. What changes a card wants its admin PIN, which is asked for on the terminal; a
/// refused PIN costs one of its tries, and is not sent a second time.
#[derive(Args)]
#[command(disable_help_subcommand = true, after_help = EXAMPLES)]
pub(super) struct Card {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  strongroom card status
  strongroom card generate --slot auth --touch on
  strongroom card set-pin";

#[derive(Subcommand)]
enum Command {
    Status(status::Status),
    Generate(keys::Generate),
    Import(keys::Import),
    SetPin(pins::SetPin),
    ResetPin(pins::ResetPin),
    SetTouch(settings::SetTouch),
    SetSignaturePin(settings::SetSignaturePin),
    SetName(settings::SetName),
    SetUrl(settings::SetUrl),
    SetLogin(settings::SetLogin),
    SetLanguage(settings::SetLanguage),
    FactoryReset(settings::FactoryReset),
}

/// What every command about a card takes.
#[derive(Args)]
struct Common {
    /// The card, by its device's name or its serial number; it can be left out where there is one
    #[arg(long, value_name = "CARD")]
    card: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

/// Where PINs come from.
#[derive(Args)]
struct Pins {
    /// Read the PINs from standard input, each on a line of its own, in the order in which they would be asked for
    #[arg(long)]
    stdin: bool,
}

impl Card {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.command {
            Command::Status(status) => status.run(),
            Command::Generate(generate) => generate.run(),
            Command::Import(import) => import.run(),
            Command::SetPin(set) => set.run(),
            Command::ResetPin(reset) => reset.run(),
            Command::SetTouch(set) => set.run(),
            Command::SetSignaturePin(set) => set.run(),
            Command::SetName(set) => set.run(),
            Command::SetUrl(set) => set.run(),
            Command::SetLogin(set) => set.run(),
            Command::SetLanguage(set) => set.run(),
            Command::FactoryReset(reset) => reset.run(),
        }
    }

    /// The daemon that it asks.
    pub(super) fn connection(&self) -> &Connection {
        let common = match &self.command {
            Command::Status(status) => &status.common,
            Command::Generate(generate) => &generate.common,
            Command::Import(import) => &import.common,
            Command::SetPin(set) => &set.common,
            Command::ResetPin(reset) => &reset.common,
            Command::SetTouch(set) => &set.common,
            Command::SetSignaturePin(set) => &set.common,
            Command::SetName(set) => &set.common,
            Command::SetUrl(set) => &set.common,
            Command::SetLogin(set) => &set.common,
            Command::SetLanguage(set) => &set.common,
            Command::FactoryReset(reset) => &reset.common,
        };
        &common.connection
    }
}

/// A card that the daemon has, and what it says of itself.
struct Chosen {
    client: Client,
    device: String,
    status: CardStatus,
}

impl Common {
    /// Connects, looks at the card that is meant, and does what is to be done with it.
    fn run(&self, work: impl AsyncFnOnce(Chosen) -> Result<(), CliError>) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let device = self.find(client.devices().await?)?;
            let status = client.card_status(&device.id).await?;
            work(Chosen { client, device: device.id, status }).await
        })
    }

    fn find(&self, mut devices: Vec<Device>) -> Result<Device, CliError> {
        devices.retain(|device| device.kind == "openpgp");
        if let Some(name) = &self.card {
            let found = devices.into_iter().find(|device| is_called(device, name));
            return found.ok_or_else(|| {
                CliError::Usage(format!("there is no card `{name}`; `strongroom status` lists the devices"))
            });
        }
        if devices.len() > 1 {
            devices.retain(|device| !matches!(device.state.as_str(), "absent" | "failed"));
        }
        match devices.len() {
            0 => Err(CliError::Usage(
                "there is no card; put one in, and see that pcscd, the smart card service, runs".to_owned(),
            )),
            1 => Ok(devices.swap_remove(0)),
            _ => {
                let ids: Vec<_> = devices.iter().map(|device| harmless(&device.id)).collect();
                Err(CliError::Usage(format!("several cards may be meant; say --card with one of {}", ids.join(", "))))
            }
        }
    }
}

/// By the device's name, the manufacturer and serial number, or the serial number alone.
fn is_called(device: &Device, name: &str) -> bool {
    let serial = device.serial.split_once(':').map_or("", |(_, serial)| serial);
    device.id == name || device.serial.eq_ignore_ascii_case(name) || serial.eq_ignore_ascii_case(name)
}

impl Chosen {
    /// What a person calls the card.
    fn label(&self) -> String {
        format!("card {}", harmless(&self.status.ident))
    }

    async fn change(&self, change: CardChange) -> Result<(), CliError> {
        self.client.change_card(&self.device, change).await.map_err(refused)
    }

    /// Sees to it that the person means this very card, before something is lost.
    fn confirm(&self, loss: &str, serial: Option<&str>) -> Result<(), CliError> {
        let own = self.status.serial();
        let typed = match serial {
            Some(serial) => serial.to_owned(),
            None => {
                let question = format!("{loss}\nType the serial number of the {} to go on: ", self.label());
                let line = terminal::ask_aloud(&question).map_err(CliError::NoTerminal)?;
                line.trim().to_owned()
            }
        };
        let means_it = typed.eq_ignore_ascii_case(own) || typed.eq_ignore_ascii_case(&self.status.ident);
        if means_it {
            return Ok(());
        }
        Err(CliError::Usage(format!("that is not the serial number of the {}; nothing was changed", self.label())))
    }

    /// The tries that are left of a PIN.
    fn tries(&self, pin: CardPin) -> u8 {
        let at = CardPin::ALL.iter().position(|other| *other == pin).unwrap_or_default();
        self.status.tries[at]
    }

    /// Says that a PIN is asked for, and how many tries it has.
    fn question(&self, pin: CardPin) -> String {
        let tries = match self.tries(pin) {
            1 => "1 try left, a wrong one blocks it".to_owned(),
            tries => format!("{tries} tries left"),
        };
        format!("{} of {} ({tries}): ", name_of(pin), self.label())
    }
}

/// What is refused about a card. The remedy for what keys cannot do is none for what cards cannot.
fn refused(error: ClientError) -> CliError {
    match error {
        ClientError::Refused(failure) if failure.code == Code::Unsupported => CliError::Unsupported(failure.message),
        error => error.into(),
    }
}

/// What a PIN is called.
fn name_of(pin: CardPin) -> &'static str {
    match pin {
        CardPin::User => "User PIN",
        CardPin::ResetCode => "Resetting code",
        CardPin::Admin => "Admin PIN",
    }
}

impl Pins {
    /// A PIN that the card has. It is not asked for where it would be of no use.
    fn known(&self, card: &Chosen, pin: CardPin) -> Result<SecretString, CliError> {
        if card.tries(pin) > 0 {
            return self.ask(&card.question(pin));
        }
        let label = card.label();
        Err(CliError::Blocked(match pin {
            CardPin::User => {
                format!("the user PIN of the {label} is blocked; `strongroom card reset-pin` gives it a new value")
            }
            CardPin::ResetCode => {
                format!(
                    "the {label} has no resetting code, or it is blocked; the admin PIN does the same without --code"
                )
            }
            CardPin::Admin => format!(
                "the admin PIN of the {label} is blocked for good; only `strongroom card factory-reset` helps, which \
                 loses the keys"
            ),
        }))
    }

    /// A PIN that it is to have: on a terminal typed twice.
    fn chosen(&self, pin: CardPin) -> Result<SecretString, CliError> {
        let first = self.ask(&format!("New {}: ", name_of(pin).to_lowercase().replace("pin", "PIN")))?;
        if !self.stdin {
            if !(pin.shortest()..=MAX_CARD_PIN).contains(&first.expose_secret().len()) {
                let why = format!("it has {} to {MAX_CARD_PIN} characters; nothing was changed", pin.shortest());
                return Err(CliError::Usage(why));
            }
            let again = self.ask("The same again: ")?;
            if first.expose_secret() != again.expose_secret() {
                return Err(CliError::Usage("the two differ; nothing was changed".to_owned()));
            }
        }
        Ok(first)
    }

    fn ask(&self, question: &str) -> Result<SecretString, CliError> {
        if self.stdin {
            return read_line();
        }
        line(&terminal::ask(question).map_err(CliError::NoTerminal)?)
    }
}

/// The next line of standard input, and nothing behind it.
fn read_line() -> Result<SecretString, CliError> {
    // It never grows, which would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    let mut byte = Zeroizing::new([0]);
    let mut input = io::stdin().lock();
    let failed = |source| CliError::File { path: "-".into(), source };
    while bytes.len() <= MAX_SECRET && input.read(&mut *byte).map_err(failed)? == 1 && byte[0] != b'\n' {
        bytes.push(byte[0]);
    }
    line(bytes.strip_suffix(b"\r").unwrap_or(&bytes))
}
