//! `strongroom keys`: which keys there are, what each may do, and its public half.

use base64ct::{Base64, Encoding};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    CliError,
    connection::Connection,
    key_name::{self, find, sha256},
    output::{Encoded, Kind, hex, print, print_json, table},
    public_key_file,
};
use crate::{
    client::{Client, Key},
    prompt::harmless,
    public_key::{FingerprintHash, PublicKey, fingerprint},
    spki,
    vault::audit::date,
};

/// List the keys, describe some of them, or print their public halves
///
/// Without KEY all keys are listed, one in a line; with KEY each is described.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Keys {
    /// Only these keys; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
    /// Print the public keys instead
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    format: Option<Format>,
    #[command(flatten)]
    encoded: Encoded,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom keys
  strongroom keys SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU
  strongroom keys --format ssh >> ~/.ssh/authorized_keys
  strongroom keys work --format ssh --out ~/.ssh/work.pub && echo 'IdentityFile ~/.ssh/work.pub' >> ~/.ssh/config
  strongroom keys --format pem authority > authority.pem";

/// A public key's form.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A line as in a `.pub` file
    Ssh,
    /// SubjectPublicKeyInfo in PEM, which OpenSSL reads
    Pem,
    /// The same in DER; of one key
    Der,
    /// A JSON Web Key; a JSON Web Key Set of several, or of all
    Jwk,
}

impl Keys {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| self.list(&client).await)
    }

    async fn list(&self, client: &Client) -> Result<(), CliError> {
        let all = client.keys().await?;
        let keys = match &self.keys[..] {
            [] => all,
            names => names.iter().map(|name| find(all.clone(), name)).collect::<Result<_, _>>()?,
        };
        match self.format {
            Some(format) => self.encoded.write(&public(&keys, format, self.keys.is_empty())?, format.kind()),
            None if self.connection.json => print_json(&json!({ "keys": keys.iter().map(value).collect::<Vec<_>>() })),
            None if self.keys.is_empty() => print(&listing(&keys)),
            None => print(&keys.iter().map(description).collect::<Vec<_>>().join("\n")),
        }
    }
}

impl Format {
    fn kind(self) -> Kind {
        if self == Self::Der { Kind::Public } else { Kind::Text }
    }
}

fn public(keys: &[Key], format: Format, all: bool) -> Result<Vec<u8>, CliError> {
    let mut text = String::new();
    if format == Format::Jwk {
        return public_key_file::jwk(keys.iter().map(|key| &key.blob[..]), all).map(String::into_bytes);
    }
    for key in keys {
        match format {
            Format::Ssh => {
                text.push_str(&public_key_file::line(&key.blob, &harmless(key_name::label(key))));
                text.push('\n');
            }
            Format::Pem => text.push_str(&public_key_file::pem(&key.blob)?),
            Format::Der if keys.len() == 1 => return public_key_file::der(&key.blob),
            Format::Der | Format::Jwk => {
                return Err(CliError::Usage("--format der is for one KEY; name it".to_owned()));
            }
        }
    }
    Ok(text.into_bytes())
}

/// `ED25519 256`, as ssh-keygen has it the other way round.
pub(super) fn kind(blob: &[u8]) -> String {
    let Ok(key) = PublicKey::parse(blob) else { return "unknown".to_owned() };
    let label = key.key_type().label();
    match key {
        PublicKey::Rsa { n, .. } => {
            format!("{label} {}", n.len() * 8 - n.first().map_or(0, |first| first.leading_zeros() as usize))
        }
        PublicKey::Ecdsa(curve, _) => format!("{label} {}", curve.name().trim_start_matches("nistp")),
        _ => label.to_owned(),
    }
}

fn listing(keys: &[Key]) -> String {
    if keys.is_empty() {
        return "There are no keys. `ssh-add` adds one; devices are named in the configuration.\n".to_owned();
    }
    let row = |key: &Key| {
        let devices: Vec<_> = key.places.iter().map(place).collect();
        let fields = [key_name::label(key), &kind(&key.blob), &sha256(key), &devices.join(", "), &uses(key)];
        fields.map(harmless).to_vec()
    };
    table(&["NAME", "TYPE", "FINGERPRINT", "DEVICE", "USES"], &keys.iter().map(row).collect::<Vec<_>>())
}

fn place(place: &crate::client::Place) -> String {
    match place.state.as_str() {
        "ready" | "busy" => place.device.clone(),
        state => format!("{} ({state})", place.device),
    }
}

/// What it may be used for: `ssh` stands for plain signatures, which most keys make.
fn uses(key: &Key) -> String {
    let ssh = key.signs.iter().any(|scheme| scheme == crate::devices::scheme::SSH);
    let uses = ssh.then_some("ssh").into_iter().chain(key.operations.iter().map(String::as_str));
    uses.collect::<Vec<_>>().join(", ")
}

/// Everything about a key, one fact in a line.
pub(super) fn description(key: &Key) -> String {
    let public = PublicKey::parse(&key.blob).ok();
    let identifier = public.as_ref().and_then(spki::key_identifier).map(|id| hex(&id)).unwrap_or_default();
    let devices: Vec<_> = key.places.iter().map(|place| format!("{} ({})", place.device, place.state)).collect();
    let certificates = if key.certificates.is_empty() { String::new() } else { key.certificates.len().to_string() };
    let facts = [
        ("name", key.name.clone()),
        ("comment", key.comment.clone()),
        ("type", kind(&key.blob)),
        ("md5", fingerprint(&key.blob, FingerprintHash::Md5).trim_start_matches("MD5:").to_owned()),
        ("identifier", identifier),
        ("certificates", certificates),
        ("devices", devices.join(", ")),
        ("note", key.note.clone()),
        ("may", uses(key)),
        ("signs", key.signs.join(" ")),
        ("decrypts", key.decrypts.join(" ")),
        ("derives", key.derives.join(" ")),
        ("PIN from", key.password.clone()),
        ("wants", key.constraints.join(", ")),
        ("stored", if key.created == 0 { String::new() } else { date(key.created) }),
        ("used until", if key.not_after == 0 { String::new() } else { date(key.not_after) }),
        ("is", key.traits.join(", ")),
    ];
    let mut text = sha256(key) + "\n";
    for (name, fact) in facts.iter().filter(|(_, fact)| !fact.is_empty()) {
        text.push_str(&format!("  {name:12}  {}\n", harmless(fact)));
    }
    text
}

/// A key as `--json` has it.
pub(super) fn value(key: &Key) -> Value {
    let public = PublicKey::parse(&key.blob).ok();
    let place = |place: &crate::client::Place| json!({ "device": place.device, "state": place.state });
    json!({
        "name": key.name,
        "comment": key.comment,
        "type": kind(&key.blob),
        "public_key": public_key_file::line(&key.blob, ""),
        "sha256": sha256(key),
        "md5": fingerprint(&key.blob, FingerprintHash::Md5),
        "identifier": public.as_ref().and_then(spki::key_identifier).map(|id| hex(&id)),
        "certificates": key.certificates.iter().map(|blob| Base64::encode_string(blob)).collect::<Vec<_>>(),
        "devices": key.places.iter().map(place).collect::<Vec<_>>(),
        "operations": key.operations,
        "signs": key.signs,
        "decrypts": key.decrypts,
        "derives": key.derives,
        "pin_from": key.password,
        "constraints": key.constraints,
        "note": key.note,
        "created": Some(key.created).filter(|at| *at != 0),
        "not_after": Some(key.not_after).filter(|at| *at != 0),
        "traits": key.traits,
    })
}
