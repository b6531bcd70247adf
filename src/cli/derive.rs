//! `strongroom derive`: the secret that a key shares with a peer's.

use std::{path::Path, time::Duration};

use base64ct::{Base64, Encoding};
use clap::Args;
use secrecy::ExposeSecret;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{
    CliError,
    connection::Connection,
    input,
    key_name::{self, is_file, resolve, sha256},
    output::{Encoded, Kind, print_json_of, unhex},
    public_key_file::PublicKeyFile,
};
use crate::{
    devices::{DeriveScheme, scheme},
    public_key::PublicKey,
};

/// Agree on a secret with a peer: ECDH with ECDSA keys, X25519 with X25519 keys
///
/// The secret goes to a terminal only with --hex or --base64. It is the bare result, the x coordinate for ECDH: hash it
/// before you use it as a key.
#[derive(Args)]
#[command(after_help = EXAMPLES, after_long_help = key_name::with_names(EXAMPLES))]
pub(super) struct Derive {
    /// Our key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// The peer's public key: a file, or the hexadecimal digits of an uncompressed point or of X25519's 32 bytes
    #[arg(value_name = "PEER")]
    peer: String,
    /// Give up after this time, such as 5s or 250ms
    #[arg(long, value_name = "TIME", value_parser = input::deadline)]
    deadline: Option<Duration>,
    #[command(flatten)]
    encoded: Encoded,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom derive exchange peer.pem --hex
  strongroom derive exchange ./peer.pub | openssl dgst -sha256 -binary > shared.key";

/// As `--json` has it.
#[derive(Serialize)]
struct Derived<'a> {
    key: String,
    scheme: Option<&'static str>,
    secret: &'a str,
}

impl Derive {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let scheme = match PublicKey::parse(&key.blob) {
                Ok(PublicKey::X25519(_)) => DeriveScheme::X25519,
                _ => DeriveScheme::Ecdh,
            };
            let peer = self.peer(scheme)?;
            let secret = client.derive(&key.blob, scheme, &peer, self.deadline).await?;
            if self.connection.json {
                let secret = Zeroizing::new(Base64::encode_string(secret.expose_secret()));
                let scheme = scheme::derive_name(scheme);
                return print_json_of(&Derived { key: sha256(&key), scheme, secret: &secret }, secret.len());
            }
            self.encoded.write(secret.expose_secret(), Kind::Secret)
        })
    }

    /// In the form that the scheme has.
    fn peer(&self, scheme: DeriveScheme) -> Result<Vec<u8>, CliError> {
        if !is_file(&self.peer) {
            return unhex(&self.peer)
                .filter(|bytes| !bytes.is_empty())
                .ok_or_else(|| CliError::Usage(format!("`{}` is neither a file nor hexadecimal digits", self.peer)));
        }
        let blob = PublicKeyFile::read(Path::new(&self.peer))?.blob;
        match (PublicKey::parse(&blob), scheme) {
            (Ok(PublicKey::X25519(point)), DeriveScheme::X25519) => Ok(point.to_vec()),
            (Ok(PublicKey::Ecdsa(_, point)), DeriveScheme::Ecdh) => Ok(point.to_vec()),
            _ => Err(CliError::Usage(format!("{}: the peer's key is not of the same kind as ours", self.peer))),
        }
    }
}
