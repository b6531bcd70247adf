//! `strongroom key`: the life of a key, from the device that makes it to its end. Knows our messages; no file but keys'.

use std::{path::Path, time::Duration};

use base64ct::{Base64, Encoding};
use clap::{Args, Subcommand, builder::PossibleValuesParser, builder::TypedValueParser};
use secrecy::SecretString;
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    input,
    key_name::{self, label, resolve, sha256},
    output::{hex, note, print, print_json, with_dots},
    private_key_file,
    proof::Proof,
    public_key_file,
    stored_key::{Attach, Detach, Disable, Enable, Export, Rotate, Set, Show},
    terminal, unlock,
};
use crate::{
    agent::message::{Made, Request, StoredRequest},
    client::{Client, Key as Listed, Reply},
    devices::{Algorithm, CardSlot, NewKey, Touch},
    key_file::Contents,
    prompt::harmless,
    public_key::{FingerprintHash, fingerprint},
    vault::{MEMORY, Move, STORE, key::Grants, stored::NewStored},
};

/// Make keys on devices and in the encrypted store, move, name and delete keys, and say what they may do
///
/// For the vault's own user and root.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Key {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  strongroom key generate store ed25519 --label work
  strongroom key keep work
  strongroom key generate hsm rsa-3072 --label authority
  strongroom key allow authority sign
  strongroom key delete authority";

#[derive(Subcommand)]
enum Command {
    Generate(Generate),
    Import(Import),
    Keep(Keep),
    Show(Show),
    Set(Set),
    Disable(Disable),
    Enable(Enable),
    Attach(Attach),
    Detach(Detach),
    Export(Export),
    Rotate(Rotate),
    Rename(Rename),
    Allow(Allow),
    Delete(Delete),
}

impl Key {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.command {
            Command::Generate(generate) => generate.run(),
            Command::Import(import) => import.run(),
            Command::Keep(keep) => keep.run(),
            Command::Show(show) => show.run(),
            Command::Set(set) => set.run(),
            Command::Disable(disable) => disable.run(),
            Command::Enable(enable) => enable.run(),
            Command::Attach(attach) => attach.run(),
            Command::Detach(detach) => detach.run(),
            Command::Export(export) => export.run(),
            Command::Rotate(rotate) => rotate.run(),
            Command::Rename(rename) => rename.run(),
            Command::Allow(allow) => allow.run(),
            Command::Delete(delete) => delete.run(),
        }
    }

    pub(super) fn json(&self) -> bool {
        match &self.command {
            Command::Generate(generate) => generate.connection.json,
            Command::Import(import) => import.connection.json,
            Command::Keep(keep) => keep.connection.json,
            Command::Show(show) => show.connection.json,
            Command::Set(set) => set.connection.json,
            Command::Disable(disable) => disable.connection.json,
            Command::Enable(enable) => enable.connection.json,
            Command::Attach(attach) => attach.connection.json,
            Command::Detach(detach) => detach.connection.json,
            Command::Export(export) => export.connection.json,
            Command::Rotate(rotate) => rotate.connection.json,
            Command::Rename(rename) => rename.connection.json,
            Command::Allow(allow) => allow.connection.json,
            Command::Delete(delete) => delete.connection.json,
        }
    }
}

/// What a key may be told that a device is to have.
#[derive(Args)]
struct New {
    /// What the device is to call it
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    label: String,
    /// On an OpenPGP card: the slot, whose key it replaces
    #[arg(long, value_name = "SLOT", value_parser = slots())]
    slot: Option<CardSlot>,
    /// Whether uses want a touch
    #[arg(long, value_name = "POLICY", value_parser = touches())]
    touch: Option<Touch>,
    /// Ask for the secret that the device wants of an administrator, as a card its admin PIN
    #[arg(long, conflicts_with = "admin_stdin")]
    admin: bool,
    /// Read it from the first line of standard input
    #[arg(long)]
    admin_stdin: bool,
    /// Give up after this time, such as 30s
    #[arg(long, value_name = "TIME", value_parser = input::deadline)]
    deadline: Option<Duration>,
}

fn slots() -> impl TypedValueParser<Value = CardSlot> {
    let names = CardSlot::ALL.iter().map(|slot| slot.as_str());
    PossibleValuesParser::new(names).try_map(|name| CardSlot::from_name(&name).ok_or("no such slot"))
}

fn touches() -> impl TypedValueParser<Value = Touch> {
    let names = Touch::ALL.iter().map(|touch| touch.as_str());
    PossibleValuesParser::new(names).try_map(|name| Touch::from_name(&name).ok_or("no such policy"))
}

fn algorithm(name: &str) -> Result<Algorithm, String> {
    let known = "rsa-2048 to rsa-4096, nistp256, nistp384, nistp521, ed25519, x25519 and mldsa44-ed25519";
    Algorithm::from_name(name).ok_or_else(|| format!("there are {known}"))
}

impl New {
    fn secret(&self, device: &str) -> Result<Option<SecretString>, CliError> {
        if self.admin_stdin {
            return unlock::read_line().map(Some);
        }
        if !self.admin {
            return Ok(None);
        }
        let question = format!("Admin PIN of {}: ", harmless(device));
        let typed = terminal::ask(&question).map_err(CliError::NoTerminal)?;
        unlock::line(&typed).map(Some)
    }
}

/// Have a device or the encrypted store make a key
///
/// The key is registered: it is listed from now on, while its device is away or the store locked, too.
#[derive(Args)]
#[command(after_help = GENERATE)]
struct Generate {
    /// `store`, or a device's id as `strongroom status` lists it
    #[arg(value_name = "store|DEVICE")]
    device: String,
    /// rsa-2048 to rsa-4096, nistp256, nistp384, nistp521, ed25519 or x25519; in the store mldsa44-ed25519, too
    #[arg(value_name = "ALGORITHM", value_parser = algorithm)]
    algorithm: Algorithm,
    #[command(flatten)]
    new: New,
    #[command(flatten)]
    terms: Terms,
    #[command(flatten)]
    connection: Connection,
}

const GENERATE: &str = "Examples:
  strongroom key generate store ed25519 --label work
  strongroom key generate store rsa-3072 --label authority --allow sign
  strongroom key generate hsm rsa-3072 --label authority
  strongroom key generate card ed25519 --slot auth --touch on --admin";

impl Generate {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let New { label, slot, touch, deadline, .. } = &self.new;
            let secret = self.new.secret(&self.device)?;
            let new = NewKey { label: label.clone(), algorithm: self.algorithm, slot: *slot, touch: *touch, secret };
            let terms = self.terms.read()?;
            let request = Request::Generate { deadline: *deadline, device: &self.device, new, terms };
            let made = ask(&client, &request, *deadline);
            // The others take no time, or a person at the device.
            let reply = match self.algorithm {
                Algorithm::Rsa(bits) => with_dots(&format!("Making an RSA key with {bits} bits"), made).await?,
                _ => made.await?,
            };
            show_made(&reply, &self.device, label, self.connection.json)
        })
    }
}

/// What a key may do in the store.
#[derive(Args)]
struct Terms {
    /// In the store: let the private half leave it later, sealed by a passphrase; this cannot be turned on afterwards
    #[arg(long)]
    exportable: bool,
    /// In the store: what the key does beyond ssh's signatures
    #[arg(long, value_name = "OPERATION", value_delimiter = ',', value_parser = ["sign", "decrypt", "derive"])]
    allow: Vec<String>,
}

impl Terms {
    fn read(&self) -> Result<NewStored, CliError> {
        let grants = Grants::from_names(self.allow.iter().map(String::as_str));
        let grants = grants.ok_or_else(|| CliError::Usage("no such operation".to_owned()))?;
        Ok(NewStored { exportable: self.exportable, grants })
    }
}

/// Move a key from memory into the encrypted store, where it outlives the daemon
///
/// Its lifetime, its destinations and its confirmation go with it, and so do its certificates. Afterwards memory has neither.
#[derive(Args)]
#[command(after_help = KEEP, after_long_help = key_name::with_names(KEEP))]
struct Keep {
    /// A key that ssh-add put into the vault; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// What it is called from now on
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    label: String,
    #[command(flatten)]
    terms: Terms,
    #[command(flatten)]
    connection: Connection,
}

const KEEP: &str = "Examples:
  ssh-add ~/.ssh/id_ed25519 && strongroom key keep me@home --label work";

impl Keep {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let (device, label, terms) = (STORE.to_owned(), self.label.clone(), self.terms.read()?);
            let to = Move { device, label, slot: None, touch: None, secret: None, terms };
            let request = Request::Import { deadline: None, key: &key.blob, to };
            let reply = ask(&client, &request, None).await?;
            show_made(&reply, STORE, key_name::label(&key), self.connection.json)
        })
    }
}

/// Move a key from memory to a device, or bring one from a file into the encrypted store
///
/// The file is in any format that `strongroom add` takes; it stays as it is. Else a key with a lifetime, with destinations or to be confirmed stays where it is: no device would keep these. Afterwards
/// memory has neither the key nor its certificates.
#[derive(Args)]
#[command(after_help = IMPORT, after_long_help = key_name::with_names(IMPORT))]
struct Import {
    /// A key that ssh-add put into the vault, by name, fingerprint, comment or file; or for the store a private key's file
    #[arg(value_name = "KEY|FILE")]
    key: String,
    /// `store`, or a device's id as `strongroom status` lists it
    #[arg(value_name = "store|DEVICE")]
    device: String,
    #[command(flatten)]
    new: New,
    #[command(flatten)]
    terms: Terms,
    /// In the store: have a person confirm each use
    #[arg(long)]
    confirm: bool,
    /// Read the file's passphrase from the first line of standard input
    #[arg(long)]
    stdin: bool,
    #[command(flatten)]
    connection: Connection,
}

const IMPORT: &str = "Examples:
  strongroom key import ~/.ssh/id_ed25519 store --label work
  strongroom key import work hsm --label work
  strongroom key import me@home card --slot auth --admin";

impl Import {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = match resolve(&client, &self.key).await {
                // It is no key's name, nor a file with a public half.
                Err(_) if self.device == STORE && key_name::is_file(&self.key) => {
                    return self.bring_file(&client).await;
                }
                found => found?,
            };
            let New { label, slot, touch, deadline, .. } = &self.new;
            let secret = self.new.secret(&self.device)?;
            let (device, label) = (self.device.clone(), label.clone());
            let terms = self.terms.read()?;
            let to = Move { device, label, slot: *slot, touch: *touch, secret, terms };
            let request = Request::Import { deadline: *deadline, key: &key.blob, to };
            let reply = ask(&client, &request, *deadline).await?;
            show_made(&reply, &self.device, key_name::label(&key), self.connection.json)
        })
    }

    /// Brings the keys of a file into the store.
    async fn bring_file(&self, client: &Client) -> Result<(), CliError> {
        let path = Path::new(&self.key);
        if self.new.slot.is_some() || self.new.touch.is_some() || self.new.admin || self.new.admin_stdin {
            return Err(CliError::Usage(
                "the store has no slots for keys, no touch and no administrator's PIN".to_owned(),
            ));
        }
        let Contents { keys, left_out } = private_key_file::read(path, self.stdin)?;
        for why in &left_out {
            note(&format!("{}: one key is left out: {why}", harmless(&self.key)));
        }
        let (terms, confirm, label) = (self.terms.read()?, self.confirm, self.new.label.as_str());
        for key in &keys {
            let comment = private_key_file::comment(key, path);
            let comment = comment.as_bytes();
            let request = StoredRequest::Import { key: key.fields(), comment, label, confirm, terms };
            let reply = client.request(&Request::Stored(request)).await?;
            show_made(&reply, STORE, if label.is_empty() { &self.key } else { label }, self.connection.json)?;
        }
        Ok(())
    }
}

/// Name a key; devices that keep labels keep the name
#[derive(Args)]
#[command(after_help = RENAME, after_long_help = key_name::with_names(RENAME))]
struct Rename {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// Its new name; an empty one takes the name away
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    connection: Connection,
}

const RENAME: &str = "Examples:
  strongroom key rename SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU authority";

impl Rename {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            client.request(&Request::Rename { key: &key.blob, name: &self.name }).await?.read::<()>()?;
            if self.connection.json {
                return print_json(&json!({ "key": sha256(&key), "name": self.name }));
            }
            print(&format!("{} is called {:?}.\n", sha256(&key), harmless(&self.name)))
        })
    }
}

/// Say what a key may do beyond ssh's signatures: exactly these operations, from now on
///
/// What is not named is not allowed any more. A key on a device is allowed no more than the device's `operations` in the
/// configuration. It lasts as long as the key is in memory, or the daemon runs; in the encrypted store it lasts, and more than
/// before takes the store's passphrase.
#[derive(Args)]
#[command(after_help = ALLOW, after_long_help = key_name::with_names(ALLOW))]
struct Allow {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// What it may do; nothing of it without any
    #[arg(value_name = "OPERATION", value_parser = ["sign", "decrypt", "derive"], required_unless_present = "none")]
    operations: Vec<String>,
    /// Allow plain ssh signatures only
    #[arg(long, conflicts_with = "operations")]
    none: bool,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

const ALLOW: &str = "Examples:
  strongroom key allow authority sign
  strongroom key allow mail sign decrypt
  strongroom key allow authority --none";

impl Allow {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let names = self.operations.iter().map(String::as_str);
            let operations =
                Grants::from_names(names).ok_or_else(|| CliError::Usage("no such operation".to_owned()))?;
            let request = |proof| Request::Allow { key: &key.blob, operations, proof };
            self.proof.ask(&client, request).await?.read::<()>()?;
            let allowed: Vec<_> = operations.names().collect();
            if self.connection.json {
                return print_json(&json!({ "key": sha256(&key), "operations": allowed }));
            }
            let allowed = if allowed.is_empty() { "plain ssh signatures only".to_owned() } else { allowed.join(", ") };
            print(&format!("{} may do this: {allowed}.\n", harmless(label(&key))))
        })
    }
}

/// Delete a key from a device or the encrypted store for good, or from memory
///
/// The key's name is asked for again on the terminal, unless --name gives it; from the store the passphrase, too.
#[derive(Args)]
#[command(after_help = DELETE, after_long_help = key_name::with_names(DELETE))]
struct Delete {
    /// The key; by name, fingerprint, comment or file
    #[arg(value_name = "KEY")]
    key: String,
    /// Delete it there: a device's id, `store` or `memory`; needed where it is in several places
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// The key's name, label, comment or fingerprint once more; nothing is asked then
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

const DELETE: &str = "Examples:
  strongroom key delete authority
  strongroom key delete authority --device hsm --name authority";

impl Delete {
    fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let key = resolve(&client, &self.key).await?;
            let device = self.place(&key)?;
            let name = match &self.name {
                Some(name) => name.clone(),
                None => ask_name(&key, &device)?,
            };
            let request = |proof| Request::Delete { key: &key.blob, device: &device, name: &name, proof };
            self.proof.ask(&client, request).await?.read::<()>()?;
            if self.connection.json {
                return print_json(&json!({ "deleted": sha256(&key), "device": device }));
            }
            print(&format!("{} is deleted from {}.\n", harmless(label(&key)), harmless(&device)))
        })
    }

    /// Where it is deleted: where it was said, or where alone the key is.
    fn place(&self, key: &Listed) -> Result<String, CliError> {
        let places: Vec<_> = key.places.iter().map(|place| place.device.as_str()).collect();
        match (&self.device, &places[..]) {
            (Some(device), _) => Ok(device.clone()),
            // The vault keeps handles of FIDO keys beside the keys in memory.
            (None, [] | ["fido"]) => Ok(MEMORY.to_owned()),
            (None, [only]) => Ok((*only).to_owned()),
            (None, several) => Err(CliError::Usage(format!(
                "the key is in several places; name one of {} with --device",
                several.join(", ")
            ))),
        }
    }
}

fn ask_name(key: &Listed, device: &str) -> Result<String, CliError> {
    let question = format!(
        "{} will be gone from {} for good.\nIts name again, or its fingerprint: ",
        harmless(label(key)),
        harmless(device)
    );
    terminal::ask_aloud(&question).map_err(CliError::NoTerminal)
}

/// Waits for as long as the device may take, and a little for the way.
async fn ask(client: &Client, request: &Request<'_>, deadline: Option<Duration>) -> Result<Reply, CliError> {
    /// The device's own time ends before: an hour at most, and as much for a person.
    const LONGEST: Duration = Duration::from_secs(2 * 3600);
    let time = deadline.map_or(LONGEST, |deadline| deadline + Duration::from_secs(60));
    Ok(client.request_within(request, time).await?)
}

/// Tells of a key that is on a device now.
fn show_made(reply: &Reply, device: &str, label: &str, as_json: bool) -> Result<(), CliError> {
    let made: Made<'_> = reply.read()?;
    let line = public_key_file::line(made.blob, &harmless(label));
    if as_json {
        return print_json(&json!({
            "device": device,
            "sha256": fingerprint(made.blob, FingerprintHash::Sha256),
            "identifier": hex(made.identifier),
            "public_key": line,
            "spki": Base64::encode_string(made.spki),
        }));
    }
    print(&format!("{line}\n"))
}
