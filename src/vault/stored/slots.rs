//! The slots of the store: how it is made, and by what it is opened from then on. Knows who may; not what is stored.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use secrecy::SecretString;
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::{
    devices::DeviceError,
    vault::{
        Vault,
        key::Caller,
        policy::Refusal,
        seal::Cost,
        secret_file,
        store::{KEY_FILE_LENGTHS, KeySlot, MAX_SLOTS, MasterKey, SlotError, SlotKind, StoreError},
        unix_now,
    },
};

/// What is to open the store besides.
pub enum AddSlot {
    /// Another passphrase.
    Passphrase(SecretString),
    /// Another recovery key, which is made here.
    Recovery,
    /// A file that the daemon reads at its start: absolute, 32 bytes to 64 KiB.
    KeyFile(PathBuf),
    /// A credential of systemd's with this name, which the daemon has.
    Credential(String),
}

/// What there is of the store.
#[derive(Clone, Debug)]
pub struct StoreView {
    /// Whether it can be used.
    pub state: StoreState,
    /// What opens it.
    pub slots: Vec<KeySlot>,
    /// What became of a damaged state file when the daemon started; empty where nothing did.
    pub report: String,
}

/// Whether there is a store that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreState {
    /// There is none.
    None,
    /// Its keys are listed, and a use of one asks for the passphrase.
    Locked,
    /// Its keys are used without a question.
    Open,
}

impl StoreState {
    /// `none`, `locked` or `open`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Locked => "locked",
            Self::Open => "open",
        }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

impl From<SlotError> for Refusal {
    fn from(error: SlotError) -> Self {
        Self::Slot(error.to_string())
    }
}

impl Vault {
    /// What there is of the store, for its owner.
    pub async fn store_view(&self, caller: &Caller) -> Result<StoreView, Refusal> {
        self.check_owner(caller)?;
        let slots = self.store.slots().await?;
        let state = match (slots.is_empty(), self.store_is_open()) {
            (true, _) => StoreState::None,
            (false, false) => StoreState::Locked,
            (false, true) => StoreState::Open,
        };
        Ok(StoreView { state, slots, report: self.store.recovery().map_or(String::new(), ToString::to_string) })
    }

    /// Makes the store, which is open from then on, and returns its recovery key where one is wanted. A passphrase costs
    /// whoever guesses about half a second a try.
    pub async fn init_store(
        self: &Arc<Self>,
        caller: &Caller,
        passphrase: SecretString,
        recovery: bool,
    ) -> Result<Option<SecretString>, Refusal> {
        self.check_owner(caller)?;
        if !self.store.is_durable() {
            return Err(Refusal::Store(
                "the daemon keeps nothing for the next start; start it with --state and a directory of its own".into(),
            ));
        }
        let _turn = self.changes().await?;
        if !self.store.slots().await?.is_empty() {
            return Err(Refusal::StoreExists);
        }
        let (time, locks) = (self.slot_time, self.access.locks());
        let make = move || {
            let (master, now) = (MasterKey::generate()?, unix_now());
            let mut slots = vec![KeySlot::passphrase(0, "", now, &master, &passphrase, Cost::calibrated(time))?];
            let mut key = None;
            if recovery {
                let (slot, text) = KeySlot::recovery(1, "", now, &master)?;
                slots.push(slot);
                key = Some(text);
            }
            Ok::<_, Refusal>((master, slots, key))
        };
        let (master, slots, key) = self.compute.apart("store", make).await.ok_or_else(died)??;
        let vault = Arc::clone(self);
        // A task of its own: a caller that hangs up leaves no half of it.
        let begin = tokio::spawn(async move {
            vault.store.initialise(slots).await?;
            info!("the encrypted store is made");
            // The recovery key is told all the same: it is nowhere else.
            if let Err(refusal) = vault.opened_with(master, 0, locks) {
                warn!("the new store stays locked: {refusal}");
            }
            Ok::<_, Refusal>(key)
        });
        begin.await.map_err(|_| died())?
    }

    /// Adds a slot, and returns its number, and the recovery key where it is one's.
    pub async fn add_slot(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        label: &str,
        add: AddSlot,
    ) -> Result<(u32, Option<SecretString>), Refusal> {
        self.check_owner(caller)?;
        let (master, _) = self.prove(proof).await?;
        // A file that does not answer keeps no other change waiting.
        let read = move || contents_of(&add).map(|contents| (add, contents)).map_err(Refusal::Slot);
        let (add, contents) = self.compute.apart("store", read).await.ok_or_else(died)??;
        let _turn = self.changes().await?;
        let slots = self.store.slots().await?;
        let taken = |number: &u32| slots.iter().any(|slot| slot.number() == *number);
        let number = (0..).find(|number| !taken(number)).filter(|_| slots.len() < MAX_SLOTS);
        let number =
            number.ok_or_else(|| Refusal::Slot(format!("a store has at most {MAX_SLOTS} slots; remove one")))?;
        let (time, label) = (self.slot_time, label.to_owned());
        let make = move || {
            let now = unix_now();
            let made = match add {
                AddSlot::Passphrase(passphrase) => {
                    KeySlot::passphrase(number, &label, now, &master, &passphrase, Cost::calibrated(time))
                }
                AddSlot::Recovery => {
                    let (slot, key) = KeySlot::recovery(number, &label, now, &master)?;
                    return Ok((slot, Some(key)));
                }
                AddSlot::KeyFile(path) => KeySlot::key_file(number, &label, now, &master, &path, &contents),
                AddSlot::Credential(name) => KeySlot::credential(number, &label, now, &master, &name, &contents),
            };
            Ok::<_, Refusal>((made?, None))
        };
        let (slot, key) = self.compute.apart("store", make).await.ok_or_else(died)??;
        let kind = slot.kind().word();
        self.store.add_slot(slot).await?;
        info!(slot = number, kind, "a slot is added");
        Ok((number, key))
    }

    /// Removes a slot; the last one stays.
    pub async fn remove_slot(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        number: u32,
    ) -> Result<(), Refusal> {
        self.check_owner(caller)?;
        self.prove(proof).await?;
        let _turn = self.changes().await?;
        let slots = self.store.slots().await?;
        if !slots.iter().any(|slot| slot.number() == number) {
            return Err(Refusal::NoSuchSlot);
        }
        if slots.len() == 1 {
            return Err(Refusal::LastSlot);
        }
        self.store.remove_slot(number).await?;
        if !slots.iter().any(|slot| slot.number() != number && slot.kind().is_for_people()) {
            warn!("no passphrase and no recovery key opens the store any more; if its files are lost, so are the keys");
        }
        info!(slot = number, "a slot is removed");
        Ok(())
    }

    /// Puts another passphrase in place of one, and returns the number of its slot. With the recovery key it is the only
    /// passphrase that is replaced.
    pub async fn change_passphrase(
        self: &Arc<Self>,
        caller: &Caller,
        old: SecretString,
        new: SecretString,
    ) -> Result<u32, Refusal> {
        self.check_owner(caller)?;
        let (master, opened) = self.prove(old).await?;
        let _turn = self.changes().await?;
        let slots = self.store.slots().await?;
        let is_passphrase = |slot: &&KeySlot| matches!(slot.kind(), SlotKind::Passphrase { .. });
        let of_number = slots.iter().find(|slot| slot.number() == opened).filter(is_passphrase);
        let mut passphrases = slots.iter().filter(is_passphrase);
        let slot = match (of_number, passphrases.next(), passphrases.next()) {
            (Some(slot), ..) | (None, Some(slot), None) => slot,
            (None, None, _) => {
                return Err(Refusal::Slot("no slot has a passphrase; `strongroom slot add` makes one".to_owned()));
            }
            (None, Some(_), Some(_)) => {
                return Err(Refusal::Slot(
                    "the store has several passphrases; change the one that you know, or remove its slot".to_owned(),
                ));
            }
        };
        let (number, label, time) = (slot.number(), slot.label().to_owned(), self.slot_time);
        let make = move || KeySlot::passphrase(number, &label, unix_now(), &master, &new, Cost::calibrated(time));
        let made = self.compute.apart("store", make).await.ok_or_else(died)??;
        self.store.replace_slot(made).await?;
        info!(slot = number, "the passphrase of a slot is changed");
        Ok(number)
    }

    /// What opens the store: [`NoStore`](Refusal::NoStore) where there is none.
    pub(super) async fn key_slots(&self) -> Result<Vec<KeySlot>, Refusal> {
        let slots = self.store.slots().await?;
        if slots.is_empty() { Err(Refusal::NoStore) } else { Ok(slots) }
    }

    /// Waits until no other change of what is stored is under way.
    pub(super) async fn changes(&self) -> Result<tokio::sync::SemaphorePermit<'_>, Refusal> {
        self.access.changes.acquire().await.map_err(|_| Refusal::Ending)
    }
}

pub(super) fn died() -> Refusal {
    DeviceError::Failed("the arithmetic of the slot died; try again".into()).into()
}

/// What the daemon reads of a slot that is added: nothing of one for people.
fn contents_of(add: &AddSlot) -> Result<Zeroizing<Vec<u8>>, String> {
    match add {
        AddSlot::KeyFile(path) => read_key_file(path),
        AddSlot::Credential(name) => read_credential(name),
        AddSlot::Passphrase(_) | AddSlot::Recovery => Ok(Zeroizing::default()),
    }
}

/// The contents of a key file, with the reason for a person when there are none. Blocks for ten seconds at most.
pub(super) fn read_key_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    let contents = secret_file::read_blocking(path, KEY_FILE_LENGTHS.end() + 1)?;
    if !KEY_FILE_LENGTHS.contains(&contents.len()) {
        return Err(format!("{}: {}", path.display(), SlotError::Length(contents.len())));
    }
    Ok(contents)
}

/// The same of a credential of systemd's.
pub(super) fn read_credential(name: &str) -> Result<Zeroizing<Vec<u8>>, String> {
    read_key_file(&secret_file::credential(name)?)
}
