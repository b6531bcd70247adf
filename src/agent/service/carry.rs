//! The messages about backups and transfers. Knows fields and vault calls; decides nothing.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::{Handled, Service, done, recorded, refused, reply};
use crate::{
    age::Recipient,
    agent::{
        message::{CarryRequest, Code, Failure, Name, OfferEntry, PackedEntry, TakenInEntry},
        parcel::Misfit,
    },
    vault::{
        backup::BackupError,
        policy::Refusal,
        stored::{Packed, TakenIn},
        transfer::Offer,
    },
};

impl Service<'_> {
    pub(super) fn carry(&self, request: CarryRequest<'_>, out: &mut Vec<u8>) -> Handled {
        let (vault, caller, parcel) = (Arc::clone(self.vault), Arc::clone(self.caller), Arc::clone(self.parcel));
        let name = request.name();
        match request {
            CarryRequest::Backup { proof, recipients } => {
                let recipients: Result<Vec<Recipient>, _> = recipients.iter().map(|text| text.parse()).collect();
                self.packed(name, async move {
                    let recipients = recipients.map_err(|error| Refusal::from(BackupError::from(error)))?;
                    vault.back_up(&caller, proof, recipients).await
                })
            }
            CarryRequest::Fetch(offset) => done(out, name, Ok(Zeroizing::new(parcel.part(offset)))),
            CarryRequest::Upload { offset, bytes } => done(out, name, self.upload(offset, bytes)),
            CarryRequest::Restore { proof, key } => {
                self.taken_in(name, async move { vault.restore(&caller, proof, key, parcel.bytes()).await })
            }
            CarryRequest::TransferOffer { proof, name: own } => {
                let own = own.to_owned();
                self.offered(name, async move {
                    let offer = vault.offer_transfer(&caller, proof, &own).await?;
                    let fingerprint = offer.fingerprint();
                    Ok((offer, fingerprint))
                })
            }
            CarryRequest::TransferWrap { proof, offer, fingerprint, keys } => {
                let (offer, fingerprint) = (offer.to_vec(), fingerprint.to_owned());
                let keys = keys.into_iter().map(<[u8]>::to_vec).collect();
                self.packed(name, async move { vault.wrap_transfer(&caller, proof, &offer, &fingerprint, keys).await })
            }
            CarryRequest::TransferLook => {
                self.offered(name, async move { vault.look_at_wrap(&caller, &parcel.bytes()).await })
            }
            CarryRequest::TransferAccept { proof, fingerprint } => {
                let fingerprint = fingerprint.to_owned();
                self.taken_in(name, async move {
                    vault.accept_transfer(&caller, proof, &parcel.bytes(), &fingerprint).await
                })
            }
        }
    }

    fn upload(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.vault.check_owner(self.caller).map_err(|refusal| self.refused(Name::Upload, "", refusal))?;
        self.parcel.append(offset, bytes, || self.vault.room_for_parcel()).map_err(|misfit| match misfit {
            Misfit::NoRoom => no_room(),
            Misfit::TooLong => Failure::new(Code::TooLong, "it is longer than any backup or wrap is"),
            Misfit::OutOfOrder => Failure::new(Code::BadRequest, "the piece does not follow the one before"),
        })
    }

    /// The reply about what is to be fetched, which this connection then holds.
    fn packed(&self, name: Name, work: impl Future<Output = Result<Packed, Refusal>> + Send + 'static) -> Handled {
        // What it held before makes room.
        self.parcel.clear();
        let Some(room) = self.vault.room_for_parcel() else {
            return Handled::Later(Box::pin(async move { reply::<()>(name, Err(&no_room())) }));
        };
        let (note, parcel) = (self.store_note(name), Arc::clone(self.parcel));
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let packed = recorded(&vault, note, work, |note, packed| note.count(packed.keys)).await;
            let packed = packed.map_err(|refusal| refused(&vault, &caller, name, "", refusal));
            let answer = packed.as_ref().map(|packed| PackedEntry {
                length: packed.bytes.len() as u64,
                keys: count(packed.keys),
                left_out: count(packed.left_out),
                damaged: count(packed.damaged),
                fingerprint: &packed.fingerprint,
            });
            let reply = reply(name, answer.as_ref().map_err(|failure| *failure));
            if let Ok(packed) = packed {
                parcel.put(packed.bytes, room);
            }
            reply
        }))
    }

    fn taken_in(&self, name: Name, work: impl Future<Output = Result<TakenIn, Refusal>> + Send + 'static) -> Handled {
        let (note, parcel) = (self.store_note(name), Arc::clone(self.parcel));
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let taken = recorded(&vault, note, work, |note, taken| note.count(taken.new)).await;
            let taken = taken.map_err(|refusal| refused(&vault, &caller, name, "", refusal));
            if taken.is_ok() {
                // What is refused, as for a wrong passphrase, is there for the next attempt.
                parcel.clear();
            }
            let answer = taken.map(|taken| TakenInEntry {
                new: count(taken.new),
                present: count(taken.present),
                damaged: count(taken.damaged),
            });
            reply(name, answer.as_ref())
        }))
    }

    fn offered(
        &self,
        name: Name,
        work: impl Future<Output = Result<(Offer, String), Refusal>> + Send + 'static,
    ) -> Handled {
        let note = self.store_note(name);
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let made = recorded(&vault, note, work, |note, _| note).await;
            let made = made.map_err(|refusal| refused(&vault, &caller, name, "", refusal));
            let made = made.map(|(offer, fingerprint)| (offer.encode(), fingerprint));
            let answer = made.as_ref().map(|(offer, fingerprint)| OfferEntry { offer, fingerprint });
            reply(name, answer.as_ref().map_err(|failure| *failure))
        }))
    }
}

fn no_room() -> Failure {
    Failure::new(Code::Busy, "too many backups and transfers are under way; try again when they are done")
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
