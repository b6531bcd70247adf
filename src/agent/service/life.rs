//! The messages for the life of a key, and the one that asks what would become of a use. Knows fields and vault calls;
//! decides nothing.

use std::{future::Future, sync::Arc, time::Duration};

use secrecy::SecretString;

use super::{Handled, Service, asked, done, key_name, recorded, refused, reply};
use crate::{
    agent::message::{Checked, KeyUse, Made, Name},
    devices::NewKey,
    public_key::PublicKey,
    spki,
    vault::{Move, audit::Note, key::Grants, policy::Refusal, stored::NewStored},
};

impl Service<'_> {
    /// What would become of a use.
    pub(super) fn check(&self, task: &KeyUse<'_>, out: &mut Vec<u8>) -> Handled {
        match self.vault.check(self.caller, task.key, &asked(&task.how)) {
            Ok(checked) => {
                let verdict = if checked.confirm { "confirm" } else { "allow" };
                done(out, Name::Check, Ok(Checked { verdict, device: &checked.device, note: &checked.note }))
            }
            // Nothing was refused: somebody wanted to know whether it would be.
            Err(refusal) => done::<()>(out, Name::Check, Err((&refusal).into())),
        }
    }

    pub(super) fn generate(&self, deadline: Option<Duration>, device: &str, new: NewKey, terms: NewStored) -> Handled {
        let note = self.vault.audit().admit(self.caller, "generate").map(|note| note.device(device));
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        let (device, deadline) = (device.to_owned(), deadline.map(|deadline| self.arrived + deadline));
        self.made(Name::Generate, "", note, async move { vault.generate(&caller, &device, new, terms, deadline).await })
    }

    pub(super) fn import(&self, deadline: Option<Duration>, key: &[u8], to: Move) -> Handled {
        let note = self.vault.audit().admit(self.caller, "import").map(|note| note.blob(key).device(&to.device));
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        let (blob, deadline) = (key.to_vec(), deadline.map(|deadline| self.arrived + deadline));
        self.made(Name::Import, &key_name(key), note, async move { vault.import(&caller, &blob, to, deadline).await })
    }

    pub(super) fn rename(&self, key: &[u8], name: &str) -> Handled {
        let note = self.note(Name::Rename).blob(key);
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        let (blob, name) = (key.to_vec(), name.to_owned());
        self.act(Name::Rename, &key_name(key), Ok(note), async move { vault.rename(&caller, &blob, &name).await })
    }

    pub(super) fn allow(&self, key: &[u8], operations: Grants, proof: Option<SecretString>) -> Handled {
        let note = self.vault.audit().admit(self.caller, "allow").map(|note| note.blob(key));
        let (vault, caller, blob) = (Arc::clone(self.vault), Arc::clone(self.caller), key.to_vec());
        self.act(Name::Allow, &key_name(key), note, async move { vault.allow(&caller, &blob, operations, proof).await })
    }

    pub(super) fn delete(&self, key: &[u8], device: &str, name: &str, proof: Option<SecretString>) -> Handled {
        let note = self.vault.audit().admit(self.caller, "delete").map(|note| note.blob(key).device(device));
        let (vault, caller, blob) = (Arc::clone(self.vault), Arc::clone(self.caller), key.to_vec());
        let (device, name) = (device.to_owned(), name.to_owned());
        let work = async move { vault.delete(&caller, &blob, &device, &name, proof).await };
        self.act(Name::Delete, &key_name(key), note, work)
    }

    /// The reply with the public half of a key, once it is there and the audit log has it.
    pub(super) fn made(
        &self,
        name: Name,
        key: &str,
        note: Result<Note, Refusal>,
        work: impl Future<Output = Result<Box<[u8]>, Refusal>> + Send + 'static,
    ) -> Handled {
        let (vault, caller, key) = (Arc::clone(self.vault), Arc::clone(self.caller), key.to_owned());
        Handled::Later(Box::pin(async move {
            let blob = recorded(&vault, note, work, |note, blob| note.blob(blob)).await;
            let blob = blob.map_err(|refusal| refused(&vault, &caller, name, &key, refusal));
            let public = blob.as_ref().ok().and_then(|blob| PublicKey::parse(blob).ok());
            // Every kind of key that a device makes has both.
            let spki = public.as_ref().and_then(spki::encode).unwrap_or_default();
            let identifier = public.as_ref().and_then(spki::key_identifier).unwrap_or_default();
            let made = blob.as_ref().map(|blob| Made { blob, spki: &spki, identifier: &identifier });
            reply(name, made.as_ref().map_err(|failure| *failure))
        }))
    }
}
