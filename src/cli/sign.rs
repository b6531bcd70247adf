//! `strongroom sign`: a signature in any scheme, in the form that whoever verifies it takes.

use std::{path::PathBuf, time::Duration};

use base64ct::{Base64, Encoding};
use clap::{Args, ValueHint};
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    input,
    key_name::{self, resolve, sha256},
    output::{Encoded, Kind, print, print_json},
    signature::{self, Chosen, Format, SSH_FLAGS},
    sshsig::{self, SshSig},
};
use crate::{
    agent::message::{Checked, How, KeyUse, Request},
    client::{Client, Key, through_ssh},
    devices::{Input, Operation, Scheme},
    prompt::harmless,
    public_key::PublicKey,
};

/// Sign a file or standard input
///
/// What a key is asked for by default: Ed25519 for Ed25519 keys, ECDSA with the curve's hash, RSA PKCS#1 v1.5 with SHA-256,
/// and for all others the scheme ssh. A long message is hashed here, where the scheme has a hash.
#[derive(Args)]
#[command(after_help = EXAMPLES, after_long_help = key_name::with_names(EXAMPLES))]
pub(super) struct Sign {
    /// Sign with this key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// What to sign; `-` is standard input
    #[arg(value_name = "FILE", default_value = "-", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// How to sign
    #[arg(long, value_name = "SCHEME", value_parser = Chosen::parser())]
    scheme: Option<Chosen>,
    /// The signature's form
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// The file has the digest, in bytes or hexadecimal digits, not the message
    #[arg(long)]
    prehashed: bool,
    /// What a signature with --format pem is for
    #[arg(long, value_name = "NAME", default_value = "file")]
    namespace: String,
    /// Do not sign; tell whether it would be allowed, and by which device
    #[arg(long)]
    check: bool,
    /// Give up after this time, such as 5s or 250ms
    #[arg(long, value_name = "TIME", value_parser = input::deadline)]
    deadline: Option<Duration>,
    #[command(flatten)]
    encoded: Encoded,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom sign authority vote --out vote.sig
  strongroom sign authority vote --format der --out vote.der
  sha256sum vote | strongroom sign authority --prehashed --scheme rsa-pss-sha256 --base64
  strongroom sign id_ed25519.pub release.tar --format pem --out release.tar.sig
  strongroom sign authority vote --check";

impl Sign {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let public = PublicKey::parse(&key.blob).map_err(|error| {
                CliError::Unsupported(format!("signatures of this key are not known here: {error}"))
            })?;
            if self.check {
                return self.check(&client, &key, &public).await;
            }
            let (chosen, bytes) = if self.format == Format::Pem {
                (Chosen::Ssh, self.sshsig(&client, &key).await?)
            } else {
                let chosen = self.scheme.unwrap_or_else(|| Chosen::default_for(&public));
                let bytes = self.sign(&client, &key, chosen).await?;
                (chosen, signature::encode(&public, chosen, self.format, bytes)?)
            };
            self.show(&key, chosen, &bytes)
        })
    }

    fn show(&self, key: &Key, chosen: Chosen, bytes: &[u8]) -> Result<(), CliError> {
        if self.connection.json {
            return print_json(&json!({
                "key": sha256(key),
                "scheme": chosen.name(),
                "format": self.format.name(),
                "signature": Base64::encode_string(bytes),
            }));
        }
        self.encoded.write(bytes, if self.format == Format::Pem { Kind::Text } else { Kind::Public })
    }

    /// The signature as the daemon gives it.
    async fn sign(&self, client: &Client, key: &Key, chosen: Chosen) -> Result<Vec<u8>, CliError> {
        let input = read_input(&self.file, chosen, self.prehashed)?;
        let scheme = match chosen {
            Chosen::Ssh => return Ok(client.sign_ssh(&key.blob, input.bytes(), SSH_FLAGS, self.deadline).await?),
            Chosen::Named(scheme) => scheme,
        };
        // A key that makes plain signatures only makes these all the same.
        if let Some(message) = input.message()
            && only_through_ssh(key, scheme)
        {
            return Ok(client.sign_through_ssh(&key.blob, scheme, message, self.deadline).await?);
        }
        Ok(client.sign(&key.blob, scheme, input, self.deadline).await?)
    }

    /// Tells what would become of it. What would be refused ends as if it had been.
    async fn check(&self, client: &Client, key: &Key, public: &PublicKey<'_>) -> Result<(), CliError> {
        let chosen = match self.format {
            Format::Pem => Chosen::Ssh,
            _ => self.scheme.unwrap_or_else(|| Chosen::default_for(public)),
        };
        let input = match self.format {
            Format::Pem => Input::Message(self.sshsig_data()?.1.into()),
            _ => read_input(&self.file, chosen, self.prehashed)?,
        };
        let how = match (chosen, input.message()) {
            (Chosen::Named(scheme), Some(message)) if only_through_ssh(key, scheme) => {
                How::Ssh { flags: SSH_FLAGS, data: message }
            }
            (Chosen::Ssh, _) => How::Ssh { flags: SSH_FLAGS, data: input.bytes() },
            (Chosen::Named(scheme), _) => How::Operation(Operation::Sign { scheme, input: input.clone() }),
        };
        let reply = client.request(&Request::Check(KeyUse { key: &key.blob, how })).await?;
        let Checked { verdict, device, note } = reply.read()?;
        if self.connection.json {
            let value = json!({ "key": sha256(key), "verdict": verdict, "device": device, "note": note });
            return print_json(&value);
        }
        let note: String = note.lines().map(|line| format!("  {}\n", harmless(line))).collect();
        print(&format!("{verdict}: {}\n{note}", harmless(device)))
    }

    async fn sshsig(&self, client: &Client, key: &Key) -> Result<Vec<u8>, CliError> {
        let (namespace, data) = self.sshsig_data()?;
        let signature = client.sign_ssh(&key.blob, &data, SSH_FLAGS, self.deadline).await?;
        Ok(SshSig { key: key.blob.clone(), namespace, hash: sshsig::HASH, signature }.to_text().into_bytes())
    }

    /// The namespace of an SSHSIG, and what it signs.
    fn sshsig_data(&self) -> Result<(Vec<u8>, Vec<u8>), CliError> {
        if self.scheme.is_some_and(|scheme| scheme != Chosen::Ssh) {
            return Err(CliError::Usage("--format pem is SSHSIG, which signs with --scheme ssh".to_owned()));
        }
        let hash = sshsig::HASH;
        let digest = if self.prehashed { input::digest(&self.file, hash)? } else { input::hashed(&self.file, hash)? };
        let namespace = self.namespace.clone().into_bytes();
        let data = sshsig::signed(&namespace, hash, &digest);
        Ok((namespace, data))
    }
}

/// Whether the key makes plain signatures only, of which the scheme's is a part.
fn only_through_ssh(key: &Key, scheme: Scheme) -> bool {
    !key.operations.iter().any(|operation| operation == "sign") && through_ssh(&key.blob, scheme)
}

/// What is signed: a message, or a digest that was made elsewhere, or here.
pub(super) fn read_input(file: &std::path::Path, chosen: Chosen, prehashed: bool) -> Result<Input<'static>, CliError> {
    match (prehashed, chosen.hash()) {
        (false, hash) => input::message(file, hash),
        (true, Some(hash)) => Ok(Input::Digest(input::digest(file, hash)?.into())),
        (true, None) => {
            Err(CliError::Usage(format!("the scheme {} signs no digests; leave out --prehashed", chosen.name())))
        }
    }
}
