//! The lists' entries, owned. Knows what docs/protocol.md, sections 7 and 9, has in them.

use super::{ClientError, Reply};
use crate::agent::message::{Code, DeviceEntry, KeyEntry, Page, PinState, RefusalEntry, SlotEntry, StoreStatus};

/// A key, as `keys` lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Key {
    /// The public key's blob.
    pub blob: Vec<u8>,
    /// Its certificates' blobs.
    pub certificates: Vec<Vec<u8>>,
    /// Its name in the vault; empty where it has none.
    pub name: String,
    /// For people; of somebody's choice, so not to be shown as it is.
    pub comment: String,
    /// Where the private key is, the preferred place first.
    pub places: Vec<Place>,
    /// What this caller may do with it: `sign`, `decrypt`, `derive`.
    pub operations: Vec<String>,
    /// The schemes in which it signs.
    pub signs: Vec<String>,
    /// The schemes in which it decrypts.
    pub decrypts: Vec<String>,
    /// The schemes in which it agrees on secrets.
    pub derives: Vec<String>,
    /// Where its device's PIN comes from: `none`, `prompt`, `file`, `credential`.
    pub password: String,
    /// Under what conditions it is used: `confirm`, `destination`, `lifetime`, `touch`.
    pub constraints: Vec<String>,
    /// For people: a card's slot, OpenPGP fingerprint and creation time; may be empty.
    pub note: String,
    /// When it came into the encrypted store, in seconds since 1970; 0 for a key that is not there.
    pub created: u64,
    /// From when on it is not used, in seconds since 1970; 0: nothing says so.
    pub not_after: u64,
    /// What is true of a key of the store: `exportable`, `retired`.
    pub traits: Vec<String>,
}

/// A device that holds a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The device's id.
    pub device: String,
    /// The device's state, as in [`Device::state`].
    pub state: String,
}

impl Key {
    fn of(entry: &KeyEntry<'_>) -> Self {
        let place = |place: &crate::agent::message::Place<'_>| Place {
            device: place.device.to_owned(),
            state: place.state.to_owned(),
        };
        Self {
            blob: entry.blob.to_vec(),
            certificates: entry.certificates.iter().map(|blob| blob.to_vec()).collect(),
            name: entry.name.to_owned(),
            comment: String::from_utf8_lossy(entry.comment).into_owned(),
            places: entry.places.iter().map(place).collect(),
            operations: owned(&entry.operations),
            signs: owned(&entry.signs),
            decrypts: owned(&entry.decrypts),
            derives: owned(&entry.derives),
            password: entry.password.to_owned(),
            constraints: owned(&entry.constraints),
            note: entry.note.to_owned(),
            created: entry.created,
            not_after: entry.not_after,
            traits: owned(&entry.traits),
        }
    }
}

/// A device, as `devices` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its id: the name in the configuration.
    pub id: String,
    /// Its driver: `soft`, `pkcs11`, …
    pub kind: String,
    /// What tells this token from others of its kind; empty where it has nothing.
    pub serial: String,
    /// `probing`, `ready`, `busy`, `stalled`, `restarting`, `absent` or `failed`.
    pub state: String,
    /// Why it failed; empty in every other state.
    pub reason: String,
    /// How many operations it does at once.
    pub lanes: u32,
    /// How many it is doing.
    pub running: u32,
    /// How many wait.
    pub waiting: u32,
    /// Whether it wants a PIN.
    pub pin: PinState,
    /// PIN tries that are left, where it says.
    pub tries_left: Option<u32>,
    /// Operations that ended well since the daemon started.
    pub done: u64,
    /// Operations that failed, those below included.
    pub failed: u64,
    /// Operations whose deadline passed.
    pub timed_out: u64,
    /// How often it was restarted.
    pub restarts: u64,
    /// What people should know of it: keys that are left out, and why.
    pub notes: Vec<String>,
    /// What a person is to do at it now: `touch`, `insert`, or nothing.
    pub wants: String,
    /// For which request, where it is one of this uid.
    pub wanted_for: String,
}

impl Device {
    fn of(entry: &DeviceEntry<'_>) -> Self {
        Self {
            id: entry.id.to_owned(),
            kind: entry.kind.to_owned(),
            serial: entry.serial.to_owned(),
            state: entry.state.to_owned(),
            reason: entry.reason.to_owned(),
            lanes: entry.lanes,
            running: entry.running,
            waiting: entry.waiting,
            pin: entry.pin,
            tries_left: entry.tries_left,
            done: entry.done,
            failed: entry.failed,
            timed_out: entry.timed_out,
            restarts: entry.restarts,
            notes: entry.notes.iter().map(|note| (*note).to_owned()).collect(),
            wants: entry.wants.to_owned(),
            wanted_for: entry.wanted_for.to_owned(),
        }
    }
}

/// A request that was refused, as `why` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// When, in milliseconds since 1970 (UTC).
    pub unix_ms: u64,
    /// What was asked: `sign`, `add`, `lock`, …
    pub message: String,
    /// The key's fingerprint; empty when it was about none.
    pub key: String,
    /// Who asked, for people.
    pub caller: String,
    /// The reason, for programs.
    pub code: Code,
    /// The reason, for people.
    pub reason: String,
}

/// The entries of a page, and where the next page begins; empty when this was the last.
pub(super) type Part<T> = (Vec<T>, Vec<u8>);

/// A page's keys, and where the next page begins.
pub(super) fn keys(reply: &Reply) -> Result<Part<Key>, ClientError> {
    let page: Page<KeyEntry<'_>> = reply.read()?;
    Ok((page.entries.iter().map(Key::of).collect(), page.next))
}

/// A page's devices, and where the next page begins.
pub(super) fn devices(reply: &Reply) -> Result<Part<Device>, ClientError> {
    let page: Page<DeviceEntry<'_>> = reply.read()?;
    Ok((page.entries.iter().map(Device::of).collect(), page.next))
}

pub(super) fn refusals(reply: &Reply) -> Result<Vec<Refusal>, ClientError> {
    let entries: Vec<RefusalEntry<'_>> = reply.read()?;
    let of = |entry: &RefusalEntry<'_>| Refusal {
        unix_ms: entry.unix_ms,
        message: entry.message.to_owned(),
        key: entry.key.to_owned(),
        caller: entry.caller.to_owned(),
        code: entry.code,
        reason: entry.reason.to_owned(),
    };
    Ok(entries.iter().map(of).collect())
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// What there is of the encrypted store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Store {
    /// `none`, `locked` or `open`.
    pub state: String,
    /// What opens it.
    pub slots: Vec<Slot>,
    /// What became of a damaged state file when the daemon started; empty where nothing did.
    pub report: String,
}

/// What opens the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// By which it is named.
    pub number: u32,
    /// `passphrase`, `recovery`, `key-file` or `credential`.
    pub kind: String,
    /// What it is for, in its owner's words; may be empty.
    pub label: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The recovery key's age recipient, the key file's path or the credential's name.
    pub what: String,
}

pub(super) fn store(reply: &Reply) -> Result<Store, ClientError> {
    let StoreStatus { state, slots, report } = reply.read()?;
    let slot = |slot: &SlotEntry<'_>| Slot {
        number: slot.number,
        kind: slot.kind.to_owned(),
        label: slot.label.to_owned(),
        created: slot.created,
        what: slot.what.to_owned(),
    };
    Ok(Store { state: state.to_owned(), slots: slots.iter().map(slot).collect(), report: report.to_owned() })
}
