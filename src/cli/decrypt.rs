//! `strongroom decrypt`: what was encrypted to a key.

use std::{path::PathBuf, time::Duration};

use base64ct::{Base64, Encoding};
use clap::{
    Args, ValueHint,
    builder::{PossibleValuesParser, TypedValueParser},
};
use secrecy::ExposeSecret;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{
    CliError,
    connection::Connection,
    input,
    key_name::{self, resolve, sha256},
    output::{Encoded, Kind, print_json_of},
};
use crate::devices::{DecryptScheme, Hash, scheme};

/// Decrypt a file or standard input
///
/// The plaintext is a secret: it goes to a terminal only with --hex or --base64, or as it is with `--out /dev/tty`.
#[derive(Args)]
#[command(after_help = EXAMPLES, after_long_help = key_name::with_names(EXAMPLES))]
pub(super) struct Decrypt {
    /// Decrypt with this key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// The ciphertext; `-` is standard input
    #[arg(value_name = "FILE", default_value = "-", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// How it was encrypted
    #[arg(long, value_name = "SCHEME", default_value = "rsa-oaep-sha256", value_parser = parser())]
    scheme: DecryptScheme,
    /// OAEP's label
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    label: String,
    /// Give up after this time, such as 5s or 250ms
    #[arg(long, value_name = "TIME", value_parser = input::deadline)]
    deadline: Option<Duration>,
    #[command(flatten)]
    encoded: Encoded,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom decrypt backup key.enc --out key
  strongroom decrypt backup key.enc --scheme rsa-oaep-sha1 --label box --hex";

fn parser() -> impl TypedValueParser<Value = DecryptScheme> {
    PossibleValuesParser::new(scheme::decrypt_names())
        .map(|name| scheme::decrypt_scheme(name.as_bytes()).unwrap_or(DecryptScheme::RsaOaep(Hash::Sha256)))
}

/// As `--json` has it.
#[derive(Serialize)]
struct Decrypted<'a> {
    key: String,
    scheme: Option<&'static str>,
    plaintext: &'a str,
}

impl Decrypt {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let ciphertext = input::read(&self.file)?;
            let label = self.label.as_bytes();
            let plaintext = client.decrypt(&key.blob, self.scheme, label, &ciphertext, self.deadline).await?;
            if self.connection.json {
                let plaintext = Zeroizing::new(Base64::encode_string(plaintext.expose_secret()));
                let scheme = scheme::decrypt_name(self.scheme);
                return print_json_of(&Decrypted { key: sha256(&key), scheme, plaintext: &plaintext }, plaintext.len());
            }
            self.encoded.write(plaintext.expose_secret(), Kind::Secret)
        })
    }
}
