//! `strongroom verify`: whether a signature is one. It asks the daemon for nothing but a key that has no file.

use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    input,
    key_name::{self, is_file, resolve},
    output::{print, print_json},
    public_key_file::PublicKeyFile,
    sign::read_input,
    signature::{self, Chosen, Format},
    sshsig::{self, SshSig},
};
use crate::public_key::{Blob, FingerprintHash, PublicKey, fingerprint};

/// Verify a signature
///
/// Exits 0 when it is valid, 11 when it is not. With a KEY from a file no daemon is needed. The form is found out where
/// --format does not say; the scheme is by default the one that `strongroom sign` takes by default.
#[derive(Args)]
#[command(after_help = EXAMPLES, after_long_help = key_name::with_names(EXAMPLES))]
pub(super) struct Verify {
    /// Whose signature it should be; by file, name, fingerprint or comment
    #[arg(value_name = "KEY")]
    key: String,
    /// The signature
    #[arg(value_name = "SIGNATURE", value_hint = ValueHint::FilePath)]
    signature: PathBuf,
    /// What was signed; `-` is standard input
    #[arg(value_name = "FILE", default_value = "-", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// How it was signed
    #[arg(long, value_name = "SCHEME", value_parser = Chosen::parser())]
    scheme: Option<Chosen>,
    /// The signature's form
    #[arg(long, value_name = "FORMAT", value_enum)]
    format: Option<Format>,
    /// The file has the digest, in bytes or hexadecimal digits, not the message
    #[arg(long)]
    prehashed: bool,
    /// What a signature in the form pem should be for
    #[arg(long, value_name = "NAME", default_value = "file")]
    namespace: String,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom verify authority.pem vote.sig vote
  strongroom verify id_ed25519.pub release.tar.sig release.tar
  strongroom verify SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU vote.sig vote --scheme rsa-pss-sha256";

impl Verify {
    pub(super) fn run(&self) -> Result<(), CliError> {
        if self.signature == Path::new("-") && self.file == Path::new("-") {
            return Err(CliError::Usage("signature and data cannot both come from standard input".to_owned()));
        }
        let blob = if is_file(&self.key) {
            PublicKeyFile::read(Path::new(&self.key))?.blob
        } else {
            self.connection.run(async |client| Ok(resolve(&client, &self.key).await?.blob))?
        };
        let key = PublicKey::parse(&blob)
            .map_err(|error| CliError::Unsupported(format!("signatures of this key are not known here: {error}")))?;
        let bytes = input::read(&self.signature)?;
        let is_sshsig = self.format.map_or_else(|| SshSig::is_one(&bytes), |format| format == Format::Pem);
        let (chosen, format, valid) = if is_sshsig {
            (Chosen::Ssh, Format::Pem, self.is_valid_sshsig(&key, &bytes)?)
        } else {
            let chosen = self.scheme.unwrap_or_else(|| Chosen::default_for(&key));
            let format = self.format.unwrap_or_else(|| signature::guess(&key, chosen, &bytes));
            let input = read_input(&self.file, chosen, self.prehashed)?;
            (chosen, format, signature::is_valid(&key, chosen, format, &input, &bytes))
        };
        if !valid {
            return Err(CliError::BadSignature);
        }
        let print256 = fingerprint(&blob, FingerprintHash::Sha256);
        if self.connection.json {
            let fields = json!({ "key": print256, "scheme": chosen.name(), "format": format.name(), "valid": true });
            return print_json(&fields);
        }
        print(&format!("The signature is valid: {} by {print256}.\n", chosen.name()))
    }

    fn is_valid_sshsig(&self, key: &PublicKey<'_>, bytes: &[u8]) -> Result<bool, CliError> {
        let Some(sshsig) = SshSig::parse(bytes) else { return Ok(false) };
        let is_ours = Blob::parse(&sshsig.key).is_ok_and(|blob| blob.key() == key);
        if !is_ours || sshsig.namespace != self.namespace.as_bytes() {
            return Ok(false);
        }
        let digest = if self.prehashed {
            input::digest(&self.file, sshsig.hash)?
        } else {
            input::hashed(&self.file, sshsig.hash)?
        };
        let data = sshsig::signed(&sshsig.namespace, sshsig.hash, &digest);
        // SHA-1 is no SSHSIG.
        Ok(key.verify(&data, &sshsig.signature).is_ok_and(|algorithm| algorithm != b"ssh-rsa"))
    }
}
