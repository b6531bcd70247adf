//! `strongroom unlock`: gives the store its passphrase, or a device its PIN. Neither is ever on a command line, where other
//! users could read it.

use std::io::{self, Read};

use clap::Args;
use secrecy::SecretString;
use serde_json::json;
use zeroize::Zeroizing;

use super::{
    CliError,
    connection::Connection,
    output::{print, print_json},
    proof::Proof,
    target::Aim,
    terminal,
};
use crate::{
    agent::message::{MAX_SECRET, PinState, Request},
    devices::DeviceError,
    prompt::harmless,
};

/// Give the encrypted store its passphrase, or a device its PIN
///
/// It is asked for on the terminal. The recovery key opens the store, too. A refused PIN costs one of the device's tries, and
/// is not sent a second time.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Unlock {
    /// `store`, a device, or a key that is there; without it the store, or else the only device that wants its PIN
    #[arg(value_name = "store|DEVICE|KEY")]
    target: Option<String>,
    /// Read the passphrase or PIN from the first line of standard input
    #[arg(long)]
    stdin: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom unlock
  strongroom unlock hsm
  systemd-ask-password --emoji=no PIN: | strongroom unlock hsm --stdin";

impl Unlock {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let aim = match &self.target {
                Some(name) => Aim::find(&client, name).await?,
                None => Aim::only(&client, PinState::Needed).await?,
            };
            let label = harmless(aim.label());
            if aim.tries_left() == Some(0) {
                return Err(CliError::Blocked(format!("{label}: {}", DeviceError::PinBlocked)));
            }
            if aim.is_store() {
                let proof = if self.stdin { Proof::stdin() } else { Proof::typed() };
                let unlock = |secret| Request::Unlock(aim.target(), secret);
                proof.give(&client, unlock).await?.read::<()>()?;
            } else {
                let secret = if self.stdin { read_line()? } else { ask(&label, aim.tries_left())? };
                client.unlock(aim.target(), secret).await?;
            }
            if self.connection.json {
                return print_json(&json!({ "unlocked": aim.label() }));
            }
            print(&format!("{label} is unlocked.\n"))
        })
    }
}

/// Asks on the terminal, without echo. Nothing else goes on meanwhile: the connection has nothing to do.
fn ask(label: &str, tries_left: Option<u32>) -> Result<SecretString, CliError> {
    let tries = match tries_left {
        Some(1) => " (1 try left, a wrong one blocks it)".to_owned(),
        Some(tries) => format!(" ({tries} tries left)"),
        None => String::new(),
    };
    let typed = terminal::ask(&format!("PIN of {label}{tries}: ")).map_err(CliError::NoTerminal)?;
    line(&typed)
}

/// The first line of standard input, as a secret.
pub(super) fn read_line() -> Result<SecretString, CliError> {
    // A longer one is none; its buffer must not grow, which would leave parts of it behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 3));
    let failed = |source| CliError::File { path: "-".into(), source };
    io::stdin().lock().take(MAX_SECRET as u64 + 2).read_to_end(&mut bytes).map_err(failed)?;
    let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    line(first.strip_suffix(b"\r").unwrap_or(first))
}

/// A line that was typed, as a secret.
pub(super) fn line(bytes: &[u8]) -> Result<SecretString, CliError> {
    let text = std::str::from_utf8(bytes).map_err(|_| CliError::Usage("that is not UTF-8 text".to_owned()))?;
    if text.is_empty() || text.len() > MAX_SECRET {
        return Err(CliError::Usage("a PIN or passphrase has 1 to 1024 bytes; nothing was sent".to_owned()));
    }
    Ok(text.into())
}
