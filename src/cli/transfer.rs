//! `strongroom transfer`: keys go from one vault to another, which has a key pair of its own for that. Knows files and the
//! questions to people.

use std::path::{Path, PathBuf};

use base64ct::{Base64, Encoding};
use clap::{Args, Subcommand, ValueHint};
use serde_json::json;

use super::{
    CliError, backup,
    connection::Connection,
    key_name,
    output::{print, print_json},
    parcel,
    proof::Proof,
    terminal,
};
use crate::{
    agent::message::{CarryRequest, OfferEntry, PackedEntry, Request},
    key_file::pem::armour,
    prompt::harmless,
    vault::transfer::Offer,
};

const OFFER: &str = "STRONGROOM TRANSFER OFFER";
const WRAP: &str = "STRONGROOM TRANSFER WRAP";
/// Characters in a line of base64.
const WIDTH: usize = 64;

/// Move keys to another vault
///
/// The target makes an offer, the source wraps keys for it, the target accepts them. Both files may go any way: what is in
/// them is encrypted, and fingerprints, which a person compares on both sides, tell whether they are the right ones.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Transfer {
    #[command(subcommand)]
    action: Action,
}

const EXAMPLES: &str = "Examples:
  target$ strongroom transfer offer offer.txt
  source$ strongroom transfer wrap offer.txt wrap.txt deploy signing
  target$ strongroom transfer accept wrap.txt";

#[derive(Subcommand)]
enum Action {
    Offer(MakeOffer),
    Wrap(MakeWrap),
    Accept(Accept),
}

impl Transfer {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.action {
            Action::Offer(offer) => offer.run(),
            Action::Wrap(wrap) => wrap.run(),
            Action::Accept(accept) => accept.run(),
        }
    }

    /// How it reaches the daemon.
    pub(super) fn connection(&self) -> &Connection {
        match &self.action {
            Action::Offer(offer) => &offer.connection,
            Action::Wrap(wrap) => &wrap.connection,
            Action::Accept(accept) => &accept.connection,
        }
    }
}

/// Offer to take keys in: the target's first step
///
/// The offer is good for one wrap, and for 24 hours. Its private key stays in this store and is destroyed when the wrap is
/// accepted.
#[derive(Args)]
struct MakeOffer {
    /// Where the offer is written
    #[arg(value_name = "OFFER", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// What the source is told that this vault is called; the machine's name by default
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Overwrite OFFER
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

impl MakeOffer {
    fn run(&self) -> Result<(), CliError> {
        parcel::check_new(&self.file, self.force)?;
        let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let name = self.name.as_deref().unwrap_or(&machine);
        self.connection.run(async |client| {
            let request = |proof| Request::Carry(CarryRequest::TransferOffer { proof, name });
            let reply = self.proof.give(&client, request).await?;
            let OfferEntry { offer, fingerprint } = reply.read()?;
            parcel::write(&self.file, armour(OFFER, offer, WIDTH).as_bytes(), self.force)?;
            if self.connection.json {
                return print_json(&json!({ "fingerprint": fingerprint }));
            }
            print(&format!(
                "The offer is in {}. Its fingerprint, which the source must show, too:\n\n  {}\n",
                self.file.display(),
                harmless(fingerprint)
            ))
        })
    }
}

/// Wrap keys for an offer: the source's step
///
/// Whoever made the offer gets the keys. So the offer's fingerprint comes first: compare it with what the target showed.
/// Keys that are not exportable are refused.
#[derive(Args)]
struct MakeWrap {
    /// The target's offer
    #[arg(value_name = "OFFER", value_hint = ValueHint::FilePath)]
    offer: PathBuf,
    /// Where the wrap is written
    #[arg(value_name = "WRAP", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// The keys; by name, fingerprint, comment or file
    #[arg(value_name = "KEY", required = true)]
    keys: Vec<String>,
    /// The offer's fingerprint as the target shows it, instead of a question
    #[arg(long, value_name = "SHA256:…")]
    fingerprint: Option<String>,
    /// Overwrite WRAP
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

impl MakeWrap {
    fn run(&self) -> Result<(), CliError> {
        parcel::check_new(&self.file, self.force)?;
        let bytes = read(&self.offer, OFFER)?;
        let offer = Offer::decode(&bytes).map_err(|error| not_usable(&self.offer, &error))?;
        let fingerprint = offer.fingerprint();
        let about = format!("The offer is of the vault that calls itself `{}`.", harmless(&offer.name));
        confirm(self.fingerprint.as_deref(), &fingerprint, &format!("{about} Does the target show this fingerprint?"))?;
        self.connection.run(async |client| {
            let all = client.keys().await?;
            let found = self.keys.iter().map(|name| key_name::find(all.clone(), name));
            let found = found.collect::<Result<Vec<_>, _>>()?;
            let request = |proof| {
                let keys = found.iter().map(|key| &key.blob[..]).collect();
                Request::Carry(CarryRequest::TransferWrap { proof, offer: &bytes, fingerprint: &fingerprint, keys })
            };
            let reply = self.proof.give(&client, request).await?;
            let packed: PackedEntry<'_> = reply.read()?;
            let wrap = parcel::fetch(&client, packed.length).await?;
            parcel::write(&self.file, armour(WRAP, &wrap, WIDTH).as_bytes(), self.force)?;
            if self.connection.json {
                return print_json(&json!({ "keys": packed.keys, "fingerprint": packed.fingerprint }));
            }
            print(&format!(
                "{} keys are wrapped in {}. The fingerprint, which the target must show, too:\n\n  {}\n",
                packed.keys,
                self.file.display(),
                harmless(packed.fingerprint)
            ))
        })
    }
}

/// Take the wrapped keys in: the target's last step
///
/// Compare the fingerprint with what the source showed. The keys come with their names and conditions; those that are here
/// stay as they are. The offer's key is destroyed.
#[derive(Args)]
struct Accept {
    /// The source's wrap
    #[arg(value_name = "WRAP", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// The fingerprint as the source shows it, instead of a question
    #[arg(long, value_name = "SHA256:…")]
    fingerprint: Option<String>,
    #[command(flatten)]
    proof: Proof,
    #[command(flatten)]
    connection: Connection,
}

impl Accept {
    fn run(&self) -> Result<(), CliError> {
        let bytes = read(&self.file, WRAP)?;
        self.connection.run(async |client| {
            parcel::upload(&client, &bytes).await?;
            let reply = client.request(&Request::Carry(CarryRequest::TransferLook)).await?;
            let OfferEntry { fingerprint, .. } = reply.read()?;
            confirm(self.fingerprint.as_deref(), fingerprint, "Does the source show this fingerprint?")?;
            let request = |proof| Request::Carry(CarryRequest::TransferAccept { proof, fingerprint });
            let reply = self.proof.give(&client, request).await?;
            backup::told(reply.read()?, self.connection.json)
        })
    }
}

/// Compares with what a person has given, or asks.
fn confirm(given: Option<&str>, fingerprint: &str, question: &str) -> Result<(), CliError> {
    let shown = harmless(fingerprint);
    let same = match given {
        Some(given) => given.trim() == fingerprint,
        None => {
            let question = format!("{question}\n\n  {shown}\n\n(yes) ");
            terminal::ask_aloud(&question).map_err(CliError::NoTerminal)? == "yes"
        }
    };
    if same { Ok(()) } else { Err(CliError::Usage(format!("nothing was transferred: the fingerprint is {shown}"))) }
}

/// What stands between BEGIN and END.
fn read(path: &Path, label: &str) -> Result<Vec<u8>, CliError> {
    let bytes = parcel::read(path)?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default();
    let inside = text.split_once(&format!("-----BEGIN {label}-----"));
    let inside = inside.and_then(|(_, rest)| rest.split_once(&format!("-----END {label}-----")));
    let base64: String = inside.map_or("", |(inside, _)| inside).split_whitespace().collect();
    Base64::decode_vec(&base64)
        .ok()
        .filter(|bytes| !bytes.is_empty())
        .ok_or_else(|| not_usable(path, &format!("this is no {}", label.to_lowercase())))
}

fn not_usable(path: &Path, why: &dyn std::fmt::Display) -> CliError {
    CliError::Usage(format!("{}: {why}", path.display()))
}
