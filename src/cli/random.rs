//! `strongroom random`: random bytes, of the daemon or of a device.

use base64ct::{Base64, Encoding};
use clap::Args;
use secrecy::ExposeSecret;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{
    CliError,
    connection::Connection,
    output::{Encoded, Kind, print_json_of},
};
use crate::agent::message::MAX_RANDOM;

/// The most bytes that are given at once.
const MAX: i64 = 1 << 20;

/// Give random bytes
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Random {
    /// How many bytes, at most 1048576
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX))]
    n: u32,
    /// Take them from this device instead of the daemon's own generator
    #[arg(long, value_name = "ID")]
    device: Option<String>,
    #[command(flatten)]
    encoded: Encoded,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom random 32 --hex
  strongroom random 32 --device hsm --out seed";

/// As `--json` has it.
#[derive(Serialize)]
struct Given<'a> {
    random: &'a str,
}

impl Random {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let mut bytes = Zeroizing::new(Vec::with_capacity(self.n as usize));
            while bytes.len() < self.n as usize {
                let len = (self.n - bytes.len() as u32).min(MAX_RANDOM);
                let some = client.random(len, self.device.as_deref()).await?;
                if some.expose_secret().is_empty() {
                    return Err(CliError::Unsupported("the device gives no random bytes".to_owned()));
                }
                bytes.extend_from_slice(some.expose_secret());
            }
            if self.connection.json {
                let random = Zeroizing::new(Base64::encode_string(&bytes));
                return print_json_of(&Given { random: &random }, random.len());
            }
            self.encoded.write(&bytes, Kind::Secret)
        })
    }
}
