//! The forms that signatures have in files: a scheme's own, SSH's, OpenSSL's DER. Knows which scheme has which.

use clap::{
    ValueEnum,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};

use super::CliError;
use crate::{
    agent::wire::{RSA_SHA2_512, put_signature_blob},
    der,
    devices::{Hash, Input, Scheme, Signature, scheme, verify::verify},
    public_key::{KeyType, PublicKey, ecdsa_fixed},
    rfc4251::Reader,
};

/// A signature's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// The scheme's own bytes: what OpenSSL takes of RSA and Ed25519; r ‖ s of ECDSA
    Raw,
    /// An SSH signature blob, as agents answer
    Ssh,
    /// An ECDSA-Sig-Value in DER: what OpenSSL takes of ECDSA
    Der,
    /// SSHSIG with its armour: what `ssh-keygen -Y verify` takes
    #[value(alias = "sshsig")]
    Pem,
}

impl Format {
    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Ssh => "ssh",
            Self::Der => "der",
            Self::Pem => "pem",
        }
    }
}

/// A scheme on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chosen {
    /// As a plain sign request.
    Ssh,
    /// One with a name of its own.
    Named(Scheme),
}

impl Chosen {
    /// Reads every name that the protocol has.
    pub(super) fn parser() -> impl TypedValueParser<Value = Self> {
        let names = std::iter::once(scheme::SSH).chain(scheme::sign_names()).map(PossibleValue::new);
        PossibleValuesParser::new(names).map(|name| scheme::sign_scheme(name.as_bytes()).map_or(Self::Ssh, Self::Named))
    }

    /// What such keys are usually asked for: what OpenSSL does by default.
    pub(super) fn default_for(key: &PublicKey<'_>) -> Self {
        match key.key_type() {
            KeyType::Ed25519 | KeyType::Ed25519Expanded => Self::Named(Scheme::Ed25519),
            KeyType::Ecdsa(curve) => Self::Named(Scheme::Ecdsa(Hash::of_curve(curve))),
            KeyType::Rsa => Self::Named(Scheme::RsaPkcs1v15(Hash::Sha256)),
            _ => Self::Ssh,
        }
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ssh => scheme::SSH,
            Self::Named(named) => scheme::sign_name(named).unwrap_or(scheme::SSH),
        }
    }

    /// The hash whose digest can be signed in place of the message.
    pub(super) fn hash(self) -> Option<Hash> {
        match self {
            Self::Ssh => None,
            Self::Named(named) => scheme::hash(named),
        }
    }
}

/// The flags of a plain sign request: SHA-512 for RSA, as OpenSSH's own tools ask.
pub(super) const SSH_FLAGS: u32 = RSA_SHA2_512;

/// Brings a signature as the daemon gave it into the form that is wanted.
pub(super) fn encode(key: &PublicKey<'_>, chosen: Chosen, format: Format, bytes: Vec<u8>) -> Result<Vec<u8>, CliError> {
    let none = |what: &str| CliError::Unsupported(format!("signatures of {} have no form {what}", chosen.name()));
    match (format, chosen) {
        (Format::Raw, _) | (Format::Ssh, Chosen::Ssh) => Ok(bytes),
        (Format::Der, Chosen::Named(Scheme::Ecdsa(_))) => Ok(der::ecdsa_signature(&bytes)),
        (Format::Der, _) => Err(none("der: only ECDSA has; OpenSSL takes the others' raw")),
        (Format::Ssh, Chosen::Named(scheme)) => {
            let signature = Signature::from_bytes(scheme, key.key_type(), bytes);
            let mut blob = Vec::new();
            put_signature_blob(&mut blob, &signature.filter(|s| is_ssh(key, scheme, s)).ok_or_else(|| none("ssh"))?);
            Ok(blob)
        }
        (Format::Pem, _) => Err(none("pem without being made for it")),
    }
}

/// Whether SSH has a name for it: ECDSA with the curve's own hash, RSA with SHA-1, SHA-256 and SHA-512.
fn is_ssh(key: &PublicKey<'_>, scheme: Scheme, signature: &Signature) -> bool {
    match (key.key_type(), scheme) {
        (KeyType::Ecdsa(curve), Scheme::Ecdsa(hash)) => Hash::of_curve(curve) == hash,
        _ => matches!(signature, Signature::Ed25519(_) | Signature::Rsa(..)),
    }
}

/// The form that a signature seems to have: whatever it turns out to be, it has to verify.
pub(super) fn guess(key: &PublicKey<'_>, chosen: Chosen, bytes: &[u8]) -> Format {
    let algorithm = Reader::new(bytes).string().ok();
    let is_blob = algorithm.is_some_and(|name| KeyType::from_name(name).is_some() || name.starts_with(b"rsa-sha2-"));
    match (chosen, key) {
        (Chosen::Ssh, _) => Format::Ssh,
        (Chosen::Named(Scheme::Ecdsa(_)), PublicKey::Ecdsa(curve, _)) if bytes.len() == 2 * curve.scalar_len() => {
            Format::Raw
        }
        (Chosen::Named(Scheme::Ecdsa(_)), _) if !is_blob => Format::Der,
        _ if is_blob => Format::Ssh,
        _ => Format::Raw,
    }
}

/// Whether it is a signature of this scheme over the input.
pub(super) fn is_valid(key: &PublicKey<'_>, chosen: Chosen, format: Format, input: &Input<'_>, bytes: &[u8]) -> bool {
    let scheme = match (chosen, input) {
        (Chosen::Named(scheme), _) => scheme,
        (Chosen::Ssh, Input::Message(data)) => return key.verify(data, bytes).is_ok(),
        (Chosen::Ssh, Input::Digest(_)) => return false,
    };
    let own_form = match (format, key) {
        (Format::Raw, _) => Some(bytes.to_vec()),
        (Format::Der, PublicKey::Ecdsa(curve, _)) => der::read_ecdsa_signature(bytes, curve.scalar_len()).ok(),
        (Format::Ssh, _) => out_of_ssh(key, scheme, bytes),
        (Format::Der | Format::Pem, _) => None,
    };
    let signature = own_form.and_then(|bytes| Signature::from_bytes(scheme, key.key_type(), bytes));
    signature.is_some_and(|signature| verify(&key.to_blob(), scheme, input, &signature))
}

/// The scheme's own form, out of an SSH signature blob by the scheme's algorithm.
fn out_of_ssh(key: &PublicKey<'_>, scheme: Scheme, blob: &[u8]) -> Option<Vec<u8>> {
    let mut r = Reader::new(blob);
    let (algorithm, body) = (r.string().ok()?, r.string().ok()?);
    r.finish().ok()?;
    let expected: &[u8] = match scheme {
        Scheme::RsaPkcs1v15(Hash::Sha1) => b"ssh-rsa",
        Scheme::RsaPkcs1v15(Hash::Sha256) => b"rsa-sha2-256",
        Scheme::RsaPkcs1v15(Hash::Sha512) => b"rsa-sha2-512",
        Scheme::Ed25519 | Scheme::Ecdsa(_) => key.key_type().name().as_bytes(),
        _ => return None,
    };
    match key {
        _ if algorithm != expected => None,
        PublicKey::Ecdsa(curve, _) => ecdsa_fixed(*curve, body).ok(),
        _ => Some(body.to_vec()),
    }
}
