//! The messages for the administration of OpenPGP cards. Knows fields and vault calls; decides nothing.

use std::sync::Arc;

use super::{Handled, Service, refused, reply};
use crate::{agent::message::Name, devices::CardChange};

impl Service<'_> {
    pub(super) fn card_status(&self, device: &str) -> Handled {
        let (vault, caller, device) = (Arc::clone(self.vault), Arc::clone(self.caller), device.to_owned());
        Handled::Later(Box::pin(async move {
            let status = vault.card_status(&caller, &device).await;
            let status = status.map_err(|refusal| refused(&vault, &caller, Name::CardStatus, "", refusal));
            reply(Name::CardStatus, status.as_ref())
        }))
    }

    pub(super) fn change_card(&self, device: &str, change: CardChange) -> Handled {
        let note = self.vault.audit().admit(self.caller, change.name()).map(|note| note.device(device));
        let (vault, caller, device) = (Arc::clone(self.vault), Arc::clone(self.caller), device.to_owned());
        self.act(Name::ChangeCard, "", note, async move { vault.change_card(&caller, &device, change).await })
    }
}
