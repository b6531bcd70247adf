//! The messages about the encrypted store. Knows fields and vault calls; decides nothing.

use std::sync::Arc;

use secrecy::{ExposeSecret, SecretString};

use super::{Handled, Service, about, recorded, refused, reply, told};
use crate::{
    agent::message::{Name, NewSlot, SlotEntry, SlotMade, StoreRequest, StoreStatus, Target},
    vault::{
        STORE, Vault,
        audit::Note,
        policy::{self, Refusal},
        store::{KeySlot, SlotKind},
    },
};

impl Service<'_> {
    pub(super) fn store(&self, request: StoreRequest<'_>) -> Handled {
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        match request {
            StoreRequest::Status => self.store_status(),
            StoreRequest::Init { passphrase, recovery } => self.slot_made(Name::Init, async move {
                vault.init_store(&caller, passphrase, recovery).await.map(|key| (0, key))
            }),
            StoreRequest::AddSlot { proof, label, add } => {
                let (label, add) = (label.to_owned(), NewSlot::to_add(&add));
                let work = async move { vault.add_slot(&caller, proof, &label, add).await };
                self.slot_made(Name::AddSlot, work)
            }
            StoreRequest::RemoveSlot { proof, number } => {
                let work = async move { vault.remove_slot(&caller, proof, number).await };
                self.act(Name::RemoveSlot, "", self.store_note(Name::RemoveSlot), work)
            }
            StoreRequest::ChangePassphrase { old, new } => self.slot_made(Name::ChangePassphrase, async move {
                vault.change_passphrase(&caller, old, new).await.map(|number| (number, None))
            }),
        }
    }

    /// Whether an unlock, lock or forget is about the store: by its name, or by a key that is there and on no device.
    pub(super) fn is_store(&self, target: &Target<'_>) -> bool {
        match target {
            Target::Store => true,
            Target::Key(blob) => self.vault.is_stored_only(self.caller, blob),
            Target::Device(_) | Target::Everything => false,
        }
    }

    pub(super) fn unlock_store(&self, target: &Target<'_>, secret: SecretString) -> Handled {
        let note = self.vault.audit().admit(self.caller, "unlock").map(|note| about(note, target).device(STORE));
        let (vault, allowed) = (Arc::clone(self.vault), self.may_lock());
        self.act(Name::Unlock, "", note, async move {
            allowed?;
            vault.unlock_store(secret).await
        })
    }

    /// Locks the store: what `lock` and `forget` do there.
    pub(super) fn lock_store(&self, name: Name, target: &Target<'_>) -> Handled {
        let note = about(self.note(name), target).device(STORE);
        let (vault, allowed) = (Arc::clone(self.vault), self.may_lock());
        self.act(name, "", Ok(note), async move {
            allowed?;
            vault.lock_store();
            Ok(())
        })
    }

    fn may_lock(&self) -> Result<(), Refusal> {
        if policy::may_lock(self.caller) { Ok(()) } else { Err(Refusal::NotForForwarded) }
    }

    pub(super) fn store_note(&self, name: Name) -> Result<Note, Refusal> {
        self.vault.audit().admit(self.caller, name.short()).map(|note| note.device(STORE))
    }

    fn store_status(&self) -> Handled {
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let view = vault.store_view(&caller).await;
            let view = view.map_err(|refusal| refused(&vault, &caller, Name::Store, "", refusal));
            let what: Vec<_> = view.iter().flat_map(|view| &view.slots).map(what).collect();
            let status = view.as_ref().map(|view| StoreStatus {
                state: view.state.name(),
                slots: view.slots.iter().zip(&what).map(|(slot, what)| slot_entry(slot, what)).collect(),
                report: told(&view.report),
            });
            reply(Name::Store, status.as_ref().map_err(|failure| *failure))
        }))
    }

    /// The reply with a slot's number and its recovery key, once the audit log has it.
    fn slot_made(
        &self,
        name: Name,
        work: impl Future<Output = Result<(u32, Option<SecretString>), Refusal>> + Send + 'static,
    ) -> Handled {
        let note = self.store_note(name);
        let (vault, caller): (Arc<Vault>, _) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let made = recorded(&vault, note, work, |note, _| note).await;
            let made = made.map_err(|refusal| refused(&vault, &caller, name, "", refusal));
            let made = made.as_ref().map(|(number, recovery)| {
                let recovery = recovery.as_ref().map_or("", |key| key.expose_secret());
                SlotMade { number: *number, recovery }
            });
            reply(name, made.as_ref().map_err(|failure| *failure))
        }))
    }
}

/// What is known of a slot besides, for people.
fn what(slot: &KeySlot) -> String {
    match slot.kind() {
        SlotKind::Passphrase { .. } => String::new(),
        SlotKind::Recovery { recipient } => recipient.to_string(),
        SlotKind::KeyFile { path, .. } => path.display().to_string(),
        SlotKind::Credential { name, .. } => name.to_string(),
    }
}

fn slot_entry<'a>(slot: &'a KeySlot, what: &'a str) -> SlotEntry<'a> {
    SlotEntry { number: slot.number(), kind: slot.kind().word(), label: slot.label(), created: slot.created(), what }
}
