//! Stored keys on their way out of the vault and into it: backups, and transfers between vaults. Knows who may, and that
//! each time takes a passphrase.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::{sync::OwnedSemaphorePermit, time::sleep};
use tracing::{info, warn};

use super::{StoredKey, life::to_the_end, put, slots::died};
use crate::{
    age::{Recipient, SecretKey},
    public_key::Blob,
    vault::{
        Vault,
        backup::{self, BackupError, Recipients},
        carried::CarriedKey,
        key::{Caller, PrivateKey},
        life::plain_blob,
        policy::Refusal,
        store::{MasterKey, SealedKey, SealedOffer, SlotKind},
        transfer::{Offer, OfferId, OfferKey, TransferError, VALID_FOR, Wrap},
        unix_now,
    },
};

/// What leaves the vault.
pub struct Packed {
    /// The backup or the wrap.
    pub bytes: Vec<u8>,
    /// How many keys are in it.
    pub keys: usize,
    /// How many are not, since they are not exportable.
    pub left_out: usize,
    /// How many are not, since their records are damaged, or since they could not be listed when the daemon started.
    pub damaged: usize,
    /// The fingerprint over offer and wrap; empty of a backup.
    pub fingerprint: String,
}

/// What became of keys that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakenIn {
    /// How many are new here.
    pub new: usize,
    /// How many were here before, and stay as they are.
    pub present: usize,
    /// How many are left out, since their halves do not belong together.
    pub damaged: usize,
}

impl From<BackupError> for Refusal {
    fn from(error: BackupError) -> Self {
        Self::Backup(error)
    }
}

impl From<TransferError> for Refusal {
    fn from(error: TransferError) -> Self {
        Self::Transfer(error)
    }
}

impl Vault {
    /// Room for something that is carried in pieces; `None` when there is too much of it already.
    pub fn room_for_parcel(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.access.parcels).try_acquire_owned().ok()
    }

    /// A backup of all keys, as they are at one moment. Under others than the recovery keys, those that are not exportable
    /// are left out.
    pub async fn back_up(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        others: Vec<Recipient>,
    ) -> Result<Packed, Refusal> {
        self.check_owner(caller)?;
        let (master, _) = self.prove(proof).await?;
        let slots = self.key_slots().await?;
        let recovery = slots.iter().filter_map(|slot| match slot.kind() {
            SlotKind::Recovery { recipient } if slot.is_of(&master) => Some(*recipient),
            // Whoever can write the state file could have everything encrypted to himself.
            SlotKind::Recovery { .. } => {
                warn!(slot = slot.number(), "a recovery slot that this store did not write gets no backup; remove it");
                None
            }
            _ => None,
        });
        let recipients = Recipients { recovery: recovery.collect(), others };
        let (sealed, unlisted) = self.all_stored().await?;
        let write = move || {
            let all = sealed.len();
            let sealed = sealed.into_iter().filter(|key| recipients.may_have(key.metadata()));
            let (keys, damaged) = opened(&master, sealed);
            let bytes = backup::write(&keys, &recipients, unix_now())?;
            let left_out = all - keys.len() - damaged;
            Ok(Packed { bytes, keys: keys.len(), left_out, damaged: damaged + unlisted, fingerprint: String::new() })
        };
        let packed: Result<_, Refusal> = self.compute.apart("backup", write).await.ok_or_else(died)?;
        packed.inspect(|packed| info!(keys = packed.keys, "a backup is made"))
    }

    /// Takes in the keys of a backup that `key` opens. Keys that are here stay as they are.
    pub async fn restore(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        key: SecretString,
        file: Arc<Vec<u8>>,
    ) -> Result<TakenIn, Refusal> {
        self.check_owner(caller)?;
        let (master, _) = self.prove(proof).await?;
        let read = move || {
            let key = SecretKey::parse(key.expose_secret()).map_err(BackupError::from)?;
            let (_, keys) = backup::read(&file, &key)?;
            sealed(&master, keys)
        };
        let (keys, damaged) = self.compute.apart("restore", read).await.ok_or_else(died)??;
        let taken = TakenIn { damaged, ..self.keep_all(keys, None).await? };
        info!(new = taken.new, present = taken.present, damaged, "a backup is restored");
        Ok(taken)
    }

    /// Makes a key pair for one transfer to this vault, and returns what the source gets.
    pub async fn offer_transfer(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        name: &str,
    ) -> Result<Offer, Refusal> {
        self.check_owner(caller)?;
        let (master, _) = self.prove(proof).await?;
        let (offer, key) = Offer::new(name, unix_now())?;
        let sealed = master.seal_offer(offer.id, &offer.encode(), key.bytes())?;
        let (_, old) = self.offers().await?;
        self.store.put_offer(sealed, old).await?;
        let (vault, id) = (Arc::downgrade(self), offer.id);
        tokio::spawn(async move {
            sleep(Duration::from_secs(VALID_FOR)).await;
            if let Some(vault) = vault.upgrade()
                && let Err(error) = vault.store.drop_offers(vec![id]).await
            {
                warn!("an old offer stays in the state file: {error}");
            }
        });
        info!(fingerprint = offer.fingerprint(), "offered a transfer");
        Ok(offer)
    }

    /// Wraps keys for an offer whose fingerprint a person has compared with the target's. All or none: a key that is not
    /// exportable is refused.
    pub async fn wrap_transfer(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        offer: &[u8],
        fingerprint: &str,
        keys: Vec<Vec<u8>>,
    ) -> Result<Packed, Refusal> {
        self.check_owner(caller)?;
        let offer = Offer::decode(offer)?;
        offer.check(unix_now())?;
        if offer.fingerprint() != fingerprint {
            return Err(TransferError::Changed.into());
        }
        let wanted = || {
            let sealed = |blob: &Vec<u8>| {
                let key = self.stored(&plain_blob(blob)).ok_or(Refusal::NoSuchKey)?;
                Ok::<_, Refusal>((key.id(), key.sealed.clone()))
            };
            keys.iter().map(sealed).collect::<Result<BTreeMap<_, _>, _>>()
        };
        wanted()?;
        let (master, _) = self.prove(proof).await?;
        // They may have been changed or deleted meanwhile.
        let wanted = wanted()?;
        let wrap = move || {
            let (keys, damaged) = opened(&master, wanted.into_values());
            if damaged > 0 {
                return Err(Refusal::Store(
                    "a key does not open: its record was changed; restore it from a backup".into(),
                ));
            }
            let wrap = Wrap::new(&offer, &keys, unix_now())?;
            let fingerprint = wrap.fingerprint(&offer);
            Ok(Packed { bytes: wrap.encode(), keys: keys.len(), left_out: 0, damaged: 0, fingerprint })
        };
        let packed = self.compute.apart("transfer", wrap).await.ok_or_else(died)?;
        packed.inspect(|packed| info!(keys = packed.keys, fingerprint = packed.fingerprint, "wrapped for a transfer"))
    }

    /// The offer that a wrap answers, and the fingerprint over both, for a person to compare with the source's.
    pub async fn look_at_wrap(&self, caller: &Caller, wrap: &[u8]) -> Result<(Offer, String), Refusal> {
        self.check_owner(caller)?;
        let wrap = Wrap::decode(wrap)?;
        let (_, offer) = self.open_offer(wrap.offer).await?;
        let fingerprint = wrap.fingerprint(&offer);
        Ok((offer, fingerprint))
    }

    /// Takes in the keys of a wrap whose fingerprint a person has compared with the source's, and destroys the offer's key in
    /// the same step. Keys that are here stay as they are.
    pub async fn accept_transfer(
        self: &Arc<Self>,
        caller: &Caller,
        proof: SecretString,
        wrap: &[u8],
        fingerprint: &str,
    ) -> Result<TakenIn, Refusal> {
        self.check_owner(caller)?;
        let wrap = Wrap::decode(wrap)?;
        let (kept, offer) = self.open_offer(wrap.offer).await?;
        if wrap.fingerprint(&offer) != fingerprint {
            return Err(TransferError::Changed.into());
        }
        let (master, _) = self.prove(proof).await?;
        let id = offer.id;
        let accept = move || {
            let key = OfferKey::from_bytes(&master.open_offer(&kept)?).ok_or(TransferError::Failed)?;
            sealed(&master, wrap.accept(&offer, &key, unix_now())?)
        };
        let (keys, damaged) = self.compute.apart("transfer", accept).await.ok_or_else(died)??;
        let taken = TakenIn { damaged, ..self.keep_all(keys, Some(id)).await? };
        info!(new = taken.new, present = taken.present, fingerprint, "accepted a transfer");
        Ok(taken)
    }

    /// All keys of the store, as they are at one moment, and how many more are on the disk that could not be listed.
    pub(super) async fn all_stored(&self) -> Result<(Vec<SealedKey>, usize), Refusal> {
        let _turn = self.changes().await?;
        let state = self.read();
        let places = state.ring.iter().flat_map(|identity| &identity.places);
        let keys: BTreeMap<_, _> = places
            .filter_map(|place| match &place.key {
                // Once, with however many certificates it is listed.
                PrivateKey::Stored(key) => Some((key.id(), key)),
                _ => None,
            })
            .collect();
        // One of them may have been restored since.
        let unlisted = state.unlisted.iter().filter(|id| !keys.contains_key(id)).count();
        Ok((keys.into_values().map(|key| key.sealed.clone()).collect(), unlisted))
    }

    /// The offers that are good, and the ids of others.
    async fn offers(&self) -> Result<(Vec<(SealedOffer, Offer)>, Vec<OfferId>), Refusal> {
        let now = unix_now();
        let (mut good, mut old) = (Vec::new(), Vec::new());
        for sealed in self.store.offers().await? {
            match Offer::decode(sealed.offer()) {
                Ok(offer) if offer.check(now) != Err(TransferError::Expired) => good.push((sealed, offer)),
                _ => old.push(sealed.id()),
            }
        }
        Ok((good, old))
    }

    /// An offer of this vault's that is good.
    async fn open_offer(&self, id: OfferId) -> Result<(SealedOffer, Offer), Refusal> {
        let (good, old) = self.offers().await?;
        if !old.is_empty() {
            self.store.drop_offers(old).await?;
        }
        let found = good.into_iter().find(|(sealed, _)| sealed.id() == id);
        Ok(found.ok_or(TransferError::UnknownOffer)?)
    }

    /// Keeps and lists the keys that are new, all in one step, in which an offer is used up. A task of its own: a caller
    /// that hangs up leaves no half of that.
    async fn keep_all(self: &Arc<Self>, keys: Vec<StoredKey>, offer: Option<OfferId>) -> Result<TakenIn, Refusal> {
        let vault = Arc::clone(self);
        let work = async move {
            let _turn = vault.changes().await?;
            let all = keys.len();
            let is_new = |key: &StoredKey| vault.stored(&key.metadata().blob).is_none();
            let new: Vec<_> = keys.into_iter().filter(is_new).map(Arc::new).collect();
            vault.check_open()?;
            vault.check_room(&new)?;
            let sealed = new.iter().map(|key| key.sealed.clone()).collect();
            match offer {
                None => vault.store.replace_keys(Vec::new(), sealed).await?,
                Some(id) if vault.store.accept_offer(id, sealed).await? => {}
                Some(_) => return Err(TransferError::UnknownOffer.into()),
            }
            let taken = TakenIn { new: new.len(), present: all - new.len(), damaged: 0 };
            let mut state = vault.write();
            new.iter().for_each(|key| put(&mut state.ring, key));
            drop(state);
            vault.lifetimes.notify_one();
            Ok(taken)
        };
        to_the_end(work).await
    }
}

/// The keys with their private halves, and how many do not open.
fn opened(master: &MasterKey, keys: impl Iterator<Item = SealedKey>) -> (Vec<CarriedKey>, usize) {
    let (mut carried, mut damaged) = (Vec::new(), 0);
    for key in keys {
        match master.open_key(&key) {
            Ok(secret) => carried.push(CarriedKey { metadata: key.metadata().clone(), secret }),
            Err(error) => {
                warn!(key = ?key.id(), "a key is left out: {error}");
                damaged += 1;
            }
        }
    }
    (carried, damaged)
}

/// The keys sealed for this store, and how many are none.
fn sealed(master: &MasterKey, keys: Vec<CarriedKey>) -> Result<(Vec<StoredKey>, usize), Refusal> {
    let (mut stored, mut damaged) = (Vec::with_capacity(keys.len()), 0);
    for key in keys {
        let whole = key.to_file().map_err(|error| error.to_string());
        let CarriedKey { mut metadata, secret } = key;
        // A certificate of another key would be offered with this one.
        let plain = metadata.blob.clone();
        metadata
            .certificates
            .retain(|blob| matches!(Blob::parse(blob), Ok(Blob::Certificate(it)) if it.key.to_blob() == *plain));
        let sealed = whole.map(|_| master.seal_key(metadata, &secret));
        match sealed.and_then(|sealed| StoredKey::new(sealed.map_err(|error| error.to_string())?)) {
            Ok(key) => stored.push(key),
            Err(why) => {
                warn!("a key is left out: {why}");
                damaged += 1;
            }
        }
    }
    Ok((stored, damaged))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use crate::{
        devices::soft::SoftKey,
        public_key::{KeyType, PublicKey},
        rfc4251::Put,
        vault::store::Metadata,
    };

    /// A certificate whose signature nobody looks at.
    fn certificate(public: &[u8]) -> Box<[u8]> {
        let mut blob = Vec::new();
        blob.put_string(b"ssh-ed25519-cert-v01@openssh.com");
        blob.put_string(&[0; 32]);
        blob.put_string(public);
        blob.put_u64(0);
        blob.put_u32(1);
        blob.put_string(b"id");
        blob.put_string(b"");
        blob.put_u64(0);
        blob.put_u64(u64::MAX);
        [b""; 3].into_iter().for_each(|empty| blob.put_string(empty));
        blob.put_string(&PublicKey::Ed25519(&[5; 32]).to_blob());
        blob.put_string(b"signature");
        blob.into()
    }

    #[test]
    fn certificates_of_other_keys_do_not_come_along() {
        let blob = SoftKey::from_secret(KeyType::Ed25519, &[7; 32]).unwrap().public_blob().unwrap();
        let [own, others] = [&blob[blob.len() - 32..], &[5; 32]].map(certificate);
        let metadata = Metadata { blob: blob.into(), certificates: vec![others, own.clone()], ..Metadata::default() };
        let carried = CarriedKey { metadata, secret: Zeroizing::new(vec![7; 32]) };
        let (keys, damaged) = sealed(&MasterKey::generate().unwrap(), vec![carried]).unwrap();
        assert_eq!((keys[0].metadata().certificates.as_slice(), damaged), ([own].as_slice(), 0));
    }
}
