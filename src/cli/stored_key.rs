//! `strongroom key show`, `set`, `enable`, `disable`, `attach`, `detach`, `export` and `rotate`: what becomes of keys in the
//! encrypted store. Knows our messages and files of keys.

use std::{
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::{Args, ValueHint, builder::PossibleValuesParser, builder::TypedValueParser};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{
    CliError,
    connection::Connection,
    input,
    key_name::{self, label, resolve, sha256},
    keys::{description, value},
    output::{Encoded, Kind, print, print_json},
    proof::{self, Proof},
    public_key_file,
};
use crate::{
    agent::message::{Made, Request, StoredRequest},
    client::{Client, Key},
    config::parse_time,
    prompt::harmless,
    public_key::{Blob, FingerprintHash, fingerprint},
    vault::{
        audit::date,
        stored::{ExportForm, KeyChange},
    },
};

/// Show everything about a key
#[derive(Args)]
#[command(after_help = SHOW, after_long_help = key_name::with_names(SHOW))]
pub(super) struct Show {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const SHOW: &str = "Examples:\n  strongroom key show work";

impl Show {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            if self.connection.json { print_json(&value(&key)) } else { print(&description(&key)) }
        })
    }
}

/// Change the conditions of a key in the encrypted store, one at a time
///
/// What loosens a condition takes the store's passphrase.
#[derive(Args)]
#[command(after_help = SET, after_long_help = key_name::with_names(SET))]
pub(super) struct Set {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    #[command(flatten)]
    condition: Condition,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    pub(super) connection: Connection,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Condition {
    /// Whether a person confirms each use
    #[arg(long, value_name = "YES|NO", value_parser = ["yes", "no"])]
    confirm: Option<String>,
    /// From when on the key is not used: a day such as 2027-12-31, a time from now such as 90d, or never
    #[arg(long, value_name = "WHEN", value_parser = when)]
    expires: Option<When>,
    /// Let the key be used for any host again, where `ssh-add -h` limited it to some
    #[arg(long)]
    anywhere: bool,
    /// Never let the private half leave the store; this cannot be undone
    #[arg(long)]
    not_exportable: bool,
}

const SET: &str = "Examples:
  strongroom key set work --confirm yes
  strongroom key set work --expires 90d";

/// A moment, in seconds since 1970, or none.
#[derive(Clone, Copy)]
struct When(Option<u64>);

fn when(text: &str) -> Result<When, String> {
    if text == "never" {
        return Ok(When(None));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let from_now = parse_time(text).and_then(|time| now.as_secs().checked_add(time.as_secs()));
    let at = from_now.or_else(|| midnight(text)).filter(|at| *at > now.as_secs());
    at.map(|at| When(Some(at))).ok_or_else(|| {
        "that is neither a day to come, such as 2027-12-31, nor a time such as 90d, nor never".to_owned()
    })
}

/// The beginning of a day, UTC.
fn midnight(text: &str) -> Option<u64> {
    let mut parts = text.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let known = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if parts.next().is_some() || !known {
        return None;
    }
    // Years begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    // The thirty-first of a shorter month is another day, and no day.
    Some(days * 86_400).filter(|at| date(*at).starts_with(text))
}

impl Set {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let Condition { confirm, expires, anywhere, .. } = &self.condition;
        let change = match (confirm, expires) {
            (Some(confirm), _) => KeyChange::Confirm(confirm == "yes"),
            (_, Some(When(at))) => KeyChange::Expires(*at),
            _ if *anywhere => KeyChange::Destinations([].into()),
            _ => KeyChange::NotExportable,
        };
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            changed(&client, &key, &self.proof, &change, self.connection.json).await
        })
    }
}

/// Changes a key, and tells.
async fn changed(client: &Client, key: &Key, proof: &Proof, change: &KeyChange, as_json: bool) -> Result<(), CliError> {
    let request = |proof| Request::Stored(StoredRequest::Set { key: &key.blob, proof, change: change.clone() });
    proof.ask(client, request).await?.read::<()>()?;
    let said = match change {
        KeyChange::Enable => "is used again".to_owned(),
        KeyChange::Disable => "is not used any more; `strongroom key enable` has it used again".to_owned(),
        KeyChange::Confirm(true) => "asks a person before each use".to_owned(),
        KeyChange::Confirm(false) => "asks nobody before it is used".to_owned(),
        KeyChange::Expires(Some(at)) => format!("is used until {} UTC", date(*at)),
        KeyChange::Expires(None) => "does not expire".to_owned(),
        KeyChange::Destinations(_) => "may be used for any host".to_owned(),
        KeyChange::NotExportable => "never leaves the store".to_owned(),
        KeyChange::Detach(_) => "is offered with that certificate no more".to_owned(),
    };
    if as_json {
        return print_json(&json!({ "key": sha256(key), "change": said }));
    }
    print(&format!("{} {said}.\n", harmless(label(key))))
}

macro_rules! one_change {
    ($(#[$doc:meta])* $name:ident, $change:expr) => {
        #[derive(Args)]
        $(#[$doc])*
        pub(super) struct $name {
            /// The key; by name, fingerprint, comment or file
            #[arg(value_name = "KEY")]
            key: String,
            #[command(flatten)]
            proof: Proof,
            #[command(flatten)]
            pub(super) connection: Connection,
        }

        impl $name {
            pub(super) fn run(&self) -> Result<(), CliError> {
                self.connection.run(async |client| {
                    let key = resolve(&client, &self.key).await?;
                    changed(&client, &key, &self.proof, &$change, self.connection.json).await
                })
            }
        }
    };
}

one_change! {
    /// Have a key of the encrypted store used no more; it stays listed
    #[command(after_help = "Examples:\n  strongroom key disable work")]
    Disable, KeyChange::Disable
}
one_change! {
    /// Have a disabled key of the encrypted store used again, which takes the store's passphrase
    #[command(after_help = "Examples:\n  strongroom key enable work")]
    Enable, KeyChange::Enable
}

/// Offer a key of the encrypted store with a certificate, too
///
/// It takes the place of one by the same authority for the same names. An expired certificate is not offered any more.
#[derive(Args)]
#[command(after_help = "Examples:\n  strongroom key attach id_ed25519-cert.pub")]
pub(super) struct Attach {
    /// The certificate, as ssh-keygen -s writes it
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    #[command(flatten)]
    pub(super) connection: Connection,
}

impl Attach {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let certificate = certificate(&self.file)?;
        self.connection.run(async |client| {
            client.request(&Request::Stored(StoredRequest::Attach(&certificate))).await?.read::<()>()?;
            let key = fingerprint(&certificate, FingerprintHash::Sha256);
            if self.connection.json {
                return print_json(&json!({ "key": key }));
            }
            print(&format!("{key} is offered with the certificate, too.\n"))
        })
    }
}

/// Offer a key of the encrypted store with a certificate no more
#[derive(Args)]
#[command(after_help = "Examples:\n  strongroom key detach id_ed25519-cert.pub")]
pub(super) struct Detach {
    /// The certificate
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    #[command(flatten)]
    pub(super) connection: Connection,
}

impl Detach {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let certificate = certificate(&self.file)?;
        self.connection.run(async |client| {
            let change = KeyChange::Detach(certificate.as_slice().into());
            let request = Request::Stored(StoredRequest::Set { key: &certificate, proof: None, change });
            client.request(&request).await?.read::<()>()?;
            let key = fingerprint(&certificate, FingerprintHash::Sha256);
            if self.connection.json {
                return print_json(&json!({ "key": key }));
            }
            print(&format!("{key} is offered with that certificate no more.\n"))
        })
    }
}

/// The blob in a certificate's file.
fn certificate(path: &std::path::Path) -> Result<Vec<u8>, CliError> {
    let none = || CliError::NotAKey { path: path.to_owned(), why: "this is no certificate of OpenSSH's".to_owned() };
    let bytes = input::read(path)?;
    let text = String::from_utf8_lossy(&bytes);
    let word = text.split_whitespace().nth(1).ok_or_else(none)?;
    let blob = <base64ct::Base64 as base64ct::Encoding>::decode_vec(word).map_err(|_| none())?;
    match Blob::parse(&blob) {
        Ok(Blob::Certificate(_)) => Ok(blob),
        _ => Err(none()),
    }
}

/// Write the private half of an exportable key to a file, sealed by a passphrase
///
/// The store's passphrase is asked for, then the file's, twice. Public halves come from `strongroom keys --format`.
#[derive(Args)]
#[command(after_help = EXPORT, after_long_help = key_name::with_names(EXPORT))]
pub(super) struct Export {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// openssh, for ssh-keygen and ssh-add; pkcs8, for OpenSSL
    #[arg(long, value_name = "FORM", default_value = "openssh", value_parser = forms())]
    format: ExportForm,
    /// Read the store's passphrase from the first line of standard input, and the file's from the second
    #[arg(long)]
    stdin: bool,
    #[command(flatten)]
    encoded: Encoded,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXPORT: &str = "Examples:
  strongroom key export work --out id_work && ssh-keygen -y -f id_work";

fn forms() -> impl TypedValueParser<Value = ExportForm> {
    let names = ExportForm::ALL.iter().map(|form| form.as_str());
    PossibleValuesParser::new(names).try_map(|name| ExportForm::from_name(&name).ok_or("no such form"))
}

impl Export {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let (proof, passphrase) = if self.stdin {
                let (proof, passphrase) = proof::two_lines()?;
                (Some(proof), passphrase)
            } else {
                (None, proof::new_passphrase_of("the file")?)
            };
            let request = |proof| {
                let (form, passphrase) = (self.format, passphrase.clone());
                Request::Stored(StoredRequest::Export { key: &key.blob, proof, form, passphrase })
            };
            let reply = match proof {
                Some(proof) => client.request(&request(Some(proof))).await?,
                None => Proof::typed().ask(&client, request).await?,
            };
            let file: Zeroizing<Vec<u8>> = reply.read()?;
            if self.connection.json {
                let text = String::from_utf8_lossy(&file);
                return print_json(&json!({ "key": sha256(&key), "format": self.format.as_str(), "file": text }));
            }
            self.encoded.write(&file, Kind::Secret)
        })
    }
}

/// Make a successor of a key in the encrypted store, with the same name and conditions
///
/// The old key is known by its fingerprint from then on. It makes plain ssh signatures, decrypts and derives as before, so that
/// nobody is locked out while its public half is replaced elsewhere; it makes no other signatures. What is to be replaced is
/// told.
#[derive(Args)]
#[command(after_help = ROTATE, after_long_help = key_name::with_names(ROTATE))]
pub(super) struct Rotate {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// Have the old key used no more from then on: a day such as 2027-12-31, or a time from now such as 30d
    #[arg(long, value_name = "WHEN", value_parser = when, default_value = "never")]
    retire: When,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const ROTATE: &str = "Examples:
  strongroom key rotate work --retire 30d";

impl Rotate {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let old = resolve(&client, &self.key).await?;
            let When(retires) = self.retire;
            let request = Request::Stored(StoredRequest::Rotate { key: &old.blob, retires });
            let reply = client.request(&request).await?;
            let made: Made<'_> = reply.read()?;
            let line = public_key_file::line(made.blob, &harmless(label(&old)));
            let before = public_key_file::line(&old.blob, &harmless(label(&old)));
            if self.connection.json {
                return print_json(&rotated_json(&old, &made, &line, retires));
            }
            print(&rotated(&old, &made, &line, &before, retires))
        })
    }
}

fn rotated_json(old: &Key, made: &Made<'_>, line: &str, retires: Option<u64>) -> Value {
    json!({
        "key": fingerprint(made.blob, FingerprintHash::Sha256),
        "public_key": line,
        "before": sha256(old),
        "retires": retires,
        "certificates": old.certificates.len(),
    })
}

/// What is to be done now.
fn rotated(old: &Key, made: &Made<'_>, line: &str, before: &str, retires: Option<u64>) -> String {
    let until = match retires {
        Some(at) => format!("is used until {} UTC", date(at)),
        None => "is used until `strongroom key disable` or `delete`".to_owned(),
    };
    let bare = line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    let mut text = format!(
        "{} is {} from now on. The old key, {}, {until}.\n\n\
         In authorized_keys on the servers, put\n  {line}\nbeside, and later in place of\n  {before}\n\n\
         For git:\n  git config --global user.signingkey 'key::{bare}'\n\n\
         In allowed_signers, below the line with the old key and with the same principals:\n  PRINCIPALS {bare}\n",
        harmless(label(old)),
        fingerprint(made.blob, FingerprintHash::Sha256),
        sha256(old),
    );
    if !old.certificates.is_empty() {
        text.push_str(
            "\nThe certificates are for the old key only: have the new one certified, and `strongroom key attach` them.\n",
        );
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn days_are_days_of_the_calendar() {
        assert_eq!(midnight("1970-01-01"), Some(0));
        assert_eq!(midnight("2024-02-29"), Some(1_709_164_800));
        assert_eq!(midnight("2026-11-25"), Some(1_795_564_800));
        for none in
            ["2026-02-29", "2026-13-01", "2026-00-10", "2026-1-1", "2026-11", "2026-11-25-1", "soon", "1969-12-31"]
        {
            assert_eq!(midnight(none), None, "{none}");
        }
        assert!(when("never").unwrap().0.is_none());
        assert!(when("1d").unwrap().0.is_some());
        assert!(when("1970-01-01").is_err());
    }
}
