//! `strongroom add`: puts private keys from files of any format into the agent's memory. Knows files and passphrases.

use std::{num::NonZeroU32, path::PathBuf};

use clap::{Args, ValueHint};
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    output::{note, print, print_json},
    private_key_file,
};
use crate::{
    client::Client,
    config::parse_time,
    key_file::{Contents, KeyFile},
    prompt::harmless,
    public_key::{FingerprintHash, fingerprint},
};

/// Put a private key from a file into the agent's memory
///
/// The file is OpenSSH's, PKCS#8, PKCS#1 or SEC1 in PEM or DER, PuTTY's, OpenPGP's or tor's, encrypted or not. The key
/// makes plain ssh signatures; `strongroom key allow` lets it do more. It goes when the agent ends. Of an OpenPGP file, all
/// keys are added, the subkeys too.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Add {
    /// The file with the private key; `-` is standard input
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// What the key is called, in place of what the file calls it
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// Forget the key after this time, such as 30m or 10h
    #[arg(long, value_name = "TIME", value_parser = lifetime)]
    lifetime: Option<NonZeroU32>,
    /// Have a person confirm each use
    #[arg(long)]
    confirm: bool,
    /// Read the passphrase from the first line of standard input
    #[arg(long)]
    stdin: bool,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom add ~/.putty/work.ppk --lifetime 10h
  gpg --export-secret-keys alice@example.org | strongroom add - --lifetime 10h
  strongroom add authority_identity_key --comment authority && strongroom key allow authority sign";

fn lifetime(text: &str) -> Result<NonZeroU32, String> {
    let seconds = parse_time(text).and_then(|time| u32::try_from(time.as_secs()).ok());
    seconds.and_then(NonZeroU32::new).ok_or_else(|| "a lifetime is a time of a second or more, such as 30m".to_owned())
}

impl Add {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let Contents { keys, left_out } = private_key_file::read(&self.file, self.stdin)?;
        for why in &left_out {
            note(&format!("{}: one key is left out: {why}", harmless(&self.file.display().to_string())));
        }
        self.connection.run(async |client| {
            let mut added = Vec::new();
            for key in &keys {
                let (sha256, comment) = self.add(&client, key).await?;
                if !self.connection.json {
                    print(&format!("{} is added: {sha256}\n", harmless(&comment)))?;
                }
                added.push(json!({ "key": sha256, "comment": comment }));
            }
            match &added[..] {
                [first, ..] if self.connection.json => {
                    print_json(&json!({ "key": first["key"], "comment": first["comment"], "keys": added }))
                }
                _ => Ok(()),
            }
        })
    }

    /// Adds one of them; its fingerprint, and what it is called.
    async fn add(&self, client: &Client, key: &KeyFile) -> Result<(String, String), CliError> {
        let comment = self.comment.clone().unwrap_or_else(|| private_key_file::comment(key, &self.file));
        client.add(key, &comment, self.lifetime, self.confirm).await?;
        Ok((fingerprint(key.blob(), FingerprintHash::Sha256), comment))
    }
}
