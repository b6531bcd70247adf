//! The messages about keys in the encrypted store. Knows fields and vault calls; decides nothing.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::{Handled, Service, key_name, recorded, refused, reply};
use crate::{
    agent::{
        message::{Name, StoredRequest},
        wire::read_soft,
    },
    devices::{DeviceError, soft::SoftKey},
    vault::{STORE, stored::Brought},
};

impl Service<'_> {
    pub(super) fn stored(&self, request: StoredRequest<'_>) -> Handled {
        let name = request.name();
        let note = self.vault.audit().admit(self.caller, name.short()).map(|note| note.device(STORE));
        let note = match request.key() {
            Some(key) => note.map(|note| note.blob(key)),
            None => note,
        };
        let key = request.key().map(key_name).unwrap_or_default();
        let blob = request.key().unwrap_or_default().to_vec();
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        match request {
            StoredRequest::Import { key: fields, comment, label, confirm, terms } => {
                let fields = Zeroizing::new(fields.to_vec());
                let read = move || {
                    let parts = read_soft(&fields).map_err(|_| DeviceError::unsupported("that is no private key"))?;
                    SoftKey::new(&parts)
                };
                let brought =
                    Brought { key: Box::new(read), comment: comment.into(), name: label.to_owned(), confirm, terms };
                self.made(name, &key, note, async move { vault.import_stored(&caller, brought).await })
            }
            StoredRequest::Set { proof, change, .. } => {
                self.act(name, &key, note, async move { vault.set_key(&caller, &blob, proof, change).await })
            }
            StoredRequest::Attach(_) => self.act(name, &key, note, async move { vault.attach(&caller, &blob).await }),
            StoredRequest::Rotate { retires, .. } => {
                self.made(name, &key, note, async move { vault.rotate(&caller, &blob, retires).await })
            }
            StoredRequest::Export { proof, form, passphrase, .. } => Handled::Later(Box::pin(async move {
                let work = vault.export(&caller, &blob, proof, form, passphrase);
                let file = recorded(&vault, note, work, |note, _| note).await;
                let file = file.map_err(|refusal| refused(&vault, &caller, Name::Export, &key, refusal));
                reply(Name::Export, file.as_ref())
            })),
        }
    }
}
