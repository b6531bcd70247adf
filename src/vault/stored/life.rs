//! The life of a key in the store: made, brought there from memory or a file, described anew, deleted. Knows who may, and
//! what takes the passphrase again.

use std::{future::Future, sync::Arc};

use secrecy::SecretString;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use super::{STORE, StoredKey, put, take_out};
use crate::{
    devices::{Algorithm, DeviceError, compute::Length, soft::SoftKey},
    public_key::{FingerprintHash, PublicKey, fingerprint},
    sys::clock,
    vault::{
        Vault,
        key::{Caller, Grants, Identity, PrivateKey},
        life::{is_of, plain_blob},
        policy::Refusal,
        store::{MasterKey, Metadata, SealError},
        unix_now,
    },
};

/// What a new key of the store may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewStored {
    /// Whether its private half may leave the store, sealed. Never turned on later.
    pub exportable: bool,
    /// What it does beyond plain ssh signatures.
    pub grants: Grants,
}

/// A key on its way into the store.
pub struct Brought {
    /// Makes or reads it, on a thread for slow arithmetic.
    pub key: Box<dyn FnOnce() -> Result<SoftKey, DeviceError> + Send>,
    /// What ssh shows of it.
    pub comment: Box<[u8]>,
    /// What it is called in this vault; may be empty.
    pub name: String,
    /// Whether a person confirms each use.
    pub confirm: bool,
    /// What it may do.
    pub terms: NewStored,
}

impl From<SealError> for Refusal {
    fn from(error: SealError) -> Self {
        Self::Store(error.to_string())
    }
}

impl Vault {
    /// Makes a key in the store, and returns its blob.
    pub(in crate::vault) async fn generate_stored(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        algorithm: Algorithm,
        label: &str,
        terms: NewStored,
        deadline: Option<Instant>,
    ) -> Result<Box<[u8]>, Refusal> {
        let key = Box::new(move || SoftKey::generate(algorithm));
        let brought = Brought { key, comment: label.as_bytes().into(), name: label.to_owned(), confirm: false, terms };
        let blob = within(deadline, self.seal_and_keep(caller, brought)).await?;
        info!(key = fingerprint(&blob, FingerprintHash::Sha256), "generated in the store");
        Ok(blob)
    }

    /// Puts a key that was read from a file into the store, and returns its blob.
    pub async fn import_stored(self: &Arc<Self>, caller: &Arc<Caller>, brought: Brought) -> Result<Box<[u8]>, Refusal> {
        self.check_owner(caller)?;
        let blob = self.seal_and_keep(caller, brought).await?;
        info!(key = fingerprint(&blob, FingerprintHash::Sha256), "brought into the store");
        Ok(blob)
    }

    /// Moves a key from memory into the store, with its certificates and under the conditions that it came with; returns its
    /// plain blob. When this completes memory has it no more.
    pub(in crate::vault) async fn keep_in_store(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        identity: &Identity,
        label: &str,
        terms: NewStored,
        deadline: Option<Instant>,
    ) -> Result<Box<[u8]>, Refusal> {
        within(deadline, self.open_store(caller)).await?;
        let (vault, plain, label) = (Arc::clone(self), plain_blob(&identity.blob), Box::<str>::from(label));
        let work = async move {
            let _turn = vault.changes().await?;
            // Read when its turn has come: the key may have been added under other conditions meanwhile, or removed.
            let (keys, mut metadata) = vault.in_memory_as_stored(&plain)?;
            let key = keys.first().ok_or(Refusal::NoSuchKey)?;
            metadata.exportable = terms.exportable;
            if terms.grants != Grants::NONE {
                metadata.grants = terms.grants;
            }
            check_grantable(&metadata, metadata.grants)?;
            if !label.is_empty() {
                metadata.name = label;
            }
            let blob = metadata.blob.clone();
            let seal = |master: &MasterKey| master.seal_key(metadata, &key.secret()?).map_err(Refusal::from);
            let stored = StoredKey::new(vault.access.with_master(seal)??).map_err(Refusal::Store)?;
            vault.keep_new(stored, &keys).await?;
            Ok(blob)
        };
        let blob = to_the_end(work).await?;
        info!(key = fingerprint(&blob, FingerprintHash::Sha256), "moved from memory into the store");
        Ok(blob)
    }

    /// A key in memory, once for each of its identities and at least once, and what would be kept of it: the conditions of
    /// all these together.
    fn in_memory_as_stored(&self, plain: &[u8]) -> Result<(Vec<Arc<SoftKey>>, Metadata), Refusal> {
        let state = self.read_current();
        let (now, boot) = (unix_now(), clock::now());
        let mut found = Vec::new();
        let mut metadata = Metadata { blob: plain.into(), created: now, enabled: true, ..Metadata::default() };
        for identity in state.ring.iter().filter(|identity| is_of(identity, plain)) {
            for place in &identity.places {
                let PrivateKey::Soft(key) = &place.key else { continue };
                found.push(Arc::clone(key));
                let constraints = &place.constraints;
                metadata.confirm |= constraints.confirm;
                if !constraints.destinations.is_empty() {
                    if !metadata.destinations.is_empty() && metadata.destinations != constraints.destinations {
                        return Err(Refusal::NotPermitted("its identities in memory have different destinations"));
                    }
                    metadata.destinations = constraints.destinations.clone();
                }
                if let Some(at) = constraints.expires {
                    let at = now.saturating_add(at.saturating_sub(boot).as_secs());
                    metadata.expires = Some(metadata.expires.map_or(at, |other| other.min(at)));
                }
                if metadata.comment.is_empty() || *identity.blob == *plain {
                    metadata.comment = place.comment.clone();
                    metadata.grants = place.grants;
                }
                if metadata.name.is_empty() {
                    metadata.name = place.name.clone();
                }
                if *identity.blob != *plain {
                    metadata.certificates.push(identity.blob.clone());
                }
            }
        }
        if found.is_empty() {
            let why = "only a key that `ssh-add` put into memory can be moved into the store";
            return Err(DeviceError::unsupported(why).into());
        }
        Ok((found, metadata))
    }

    /// Opens the store, has the key made, seals it and keeps it.
    async fn seal_and_keep(self: &Arc<Self>, caller: &Arc<Caller>, brought: Brought) -> Result<Box<[u8]>, Refusal> {
        let Brought { key, comment, name, confirm, terms } = brought;
        self.open_store(caller).await?;
        let key = self.compute.run(caller.connection, Length::Long, key).await?;
        let metadata = Metadata {
            blob: key.public_blob()?.into(),
            name: name.into(),
            comment,
            created: unix_now(),
            exportable: terms.exportable,
            enabled: true,
            grants: terms.grants,
            confirm,
            ..Metadata::default()
        };
        let blob = metadata.blob.clone();
        if PublicKey::parse(&blob).is_err() {
            return Err(Refusal::Store("the key's public half is not one that can be listed".to_owned()));
        }
        let secret = key.secret()?;
        drop(key);
        let sealed = loop {
            // Locked again while an RSA key was made: asked once more.
            self.open_store(caller).await?;
            match self.access.with_master(|master| master.seal_key(metadata.clone(), &secret)) {
                Ok(sealed) => break sealed?,
                Err(_) => continue,
            }
        };
        let (vault, key) = (Arc::clone(self), StoredKey::new(sealed).map_err(Refusal::Store)?);
        let work = async move {
            let _turn = vault.changes().await?;
            vault.keep_new(key, &[]).await
        };
        to_the_end(work).await?;
        Ok(blob)
    }

    /// Writes a new key to the disk and lists it, in the turn of the caller, who is a task of its own: one that hangs up
    /// leaves no half of that. What was sealed goes out of memory; what `ssh-add` brought meanwhile stays there.
    async fn keep_new(&self, key: StoredKey, from_memory: &[Arc<SoftKey>]) -> Result<(), Refusal> {
        if self.stored(&key.metadata().blob).is_some() {
            return Err(Refusal::StoredAlready);
        }
        self.check_open()?;
        let key = Arc::new(key);
        self.check_room([&key])?;
        self.store.put_key(key.sealed.clone()).await?;
        let mut state = self.write();
        put(&mut state.ring, &key);
        if !from_memory.is_empty() {
            let moved = |soft: &Arc<SoftKey>| from_memory.iter().any(|key| Arc::ptr_eq(key, soft));
            state.ring.remove_places(|_, place| matches!(&place.key, PrivateKey::Soft(soft) if moved(soft)));
        }
        drop(state);
        self.lifetimes.notify_one();
        Ok(())
    }

    /// Describes a stored key anew. `proof` is what came with the request; without one the store is opened first, which may
    /// ask a person.
    pub(in crate::vault) async fn describe(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        plain: &[u8],
        proof: Option<MasterKey>,
        change: impl FnOnce(&mut Metadata) -> Result<(), Refusal> + Send + 'static,
    ) -> Result<(), Refusal> {
        if proof.is_none() {
            self.open_store(caller).await?;
        }
        let (vault, plain) = (Arc::clone(self), plain.to_vec());
        let work = async move {
            let _turn = vault.changes().await?;
            let key = vault.stored(&plain).ok_or(Refusal::NoSuchKey)?;
            let mut metadata = key.metadata().clone();
            change(&mut metadata)?;
            let sealed = match &proof {
                Some(master) => master.reseal_key(&key.sealed, metadata)?,
                None => vault.access.with_master(|master| master.reseal_key(&key.sealed, metadata))??,
            };
            let described = Arc::new(key.described(sealed));
            vault.check_room([&described])?;
            vault.store.put_key(described.sealed.clone()).await?;
            let mut state = vault.write();
            // Certificates that it has no more.
            for blob in
                key.metadata().certificates.iter().filter(|old| !described.metadata().certificates.contains(old))
            {
                state.ring.remove_places_of(blob, |place| matches!(place.key, PrivateKey::Stored(_)));
            }
            put(&mut state.ring, &described);
            drop(state);
            vault.lifetimes.notify_one();
            Ok(())
        };
        to_the_end(work).await
    }

    /// Says what a stored key does beyond plain signatures. More than before takes a passphrase.
    pub(in crate::vault) async fn allow_stored(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        key: &StoredKey,
        grants: Grants,
        proof: Option<SecretString>,
    ) -> Result<(), Refusal> {
        check_grantable(key.metadata(), grants)?;
        let loosens = grants.without(key.metadata().grants) != Grants::NONE;
        let proof = self.proof(proof, loosens).await?;
        let proven = proof.is_some();
        let change = move |metadata: &mut Metadata| {
            check_grantable(metadata, grants)?;
            if !proven && grants.without(metadata.grants) != Grants::NONE {
                return Err(Refusal::ProofNeeded);
            }
            metadata.grants = grants;
            Ok(())
        };
        self.describe(caller, &key.metadata().blob, proof, change).await
    }

    /// Deletes a key from the store for good. Takes a passphrase each time.
    pub(in crate::vault) async fn delete_stored(
        self: &Arc<Self>,
        plain: &[u8],
        proof: Option<SecretString>,
    ) -> Result<(), Refusal> {
        self.stored(plain).ok_or(DeviceError::NoSuchKey)?;
        self.proof(proof, true).await?;
        let (vault, plain) = (Arc::clone(self), plain.to_vec());
        let work = async move {
            let _turn = vault.changes().await?;
            let key = vault.stored(&plain).ok_or(DeviceError::NoSuchKey)?;
            vault.store.remove_key(key.id()).await?;
            take_out(&mut vault.write().ring, &key);
            key.close();
            Ok(())
        };
        to_the_end(work).await?;
        info!(device = STORE, "deleted");
        Ok(())
    }

    /// The master key of a request that carries a passphrase, which is tried; [`ProofNeeded`](Refusal::ProofNeeded) where
    /// one is `needed` and none came.
    pub(in crate::vault) async fn proof(
        self: &Arc<Self>,
        proof: Option<SecretString>,
        needed: bool,
    ) -> Result<Option<MasterKey>, Refusal> {
        match proof {
            Some(secret) => Ok(Some(self.prove(secret).await?.0)),
            None if needed => Err(Refusal::ProofNeeded),
            None => Ok(None),
        }
    }
}

/// Does what a caller who hangs up must not leave half done.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    let died = || DeviceError::Failed("the change of the store died; `strongroom keys` shows what is there".into());
    tokio::spawn(work).await.unwrap_or_else(|_| Err(died().into()))
}

/// Whether a key under these conditions may be granted this.
pub(super) fn check_grantable(metadata: &Metadata, grants: Grants) -> Result<(), Refusal> {
    if grants != Grants::NONE && !metadata.destinations.is_empty() {
        return Err(Refusal::NotPermitted("a destination-constrained key makes plain ssh signatures only"));
    }
    Ok(())
}

async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    match deadline {
        Some(deadline) => timeout_at(deadline, work).await.unwrap_or(Err(Refusal::Timeout)),
        None => work.await,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{pin::pin, time::Duration};

    use tempfile::TempDir;

    use super::*;
    use crate::{
        devices::compute::Compute,
        prompt::{self, Prompter},
        public_key::KeyType,
        vault::{
            Candidate, Parts,
            audit::Audit,
            key::Place,
            keyring::MAX_BYTES,
            seal::Cost,
            store::{KeySlot, Store},
        },
    };

    /// A vault whose store is open, and where its file is.
    async fn vault() -> (Arc<Vault>, TempDir) {
        let place = TempDir::new().unwrap();
        let parts = Parts {
            prompter: Prompter::new(prompt::Settings::default()),
            store: Store::open(&place.path().join("state")).unwrap().store,
            audit: Audit::off(),
            compute: Compute::inline(),
            lock_cost: Cost::least(),
            slot_time: Duration::ZERO,
            reactor: None,
        };
        let vault = Vault::new(crate::vault::Settings::default(), parts);
        let master = MasterKey::generate().unwrap();
        let (slot, _) = KeySlot::recovery(0, "", 0, &master).unwrap();
        vault.store.initialise(vec![slot]).await.unwrap();
        vault.opened_with(master, 0, vault.access.locks()).unwrap();
        (vault, place)
    }

    fn owner(vault: &Vault) -> Arc<Caller> {
        Arc::new(Caller { uid: vault.owner, ..Caller::default() })
    }

    /// The same key each time, as `ssh-add` brings it.
    fn add(vault: &Vault, confirm: bool) -> (Arc<SoftKey>, Box<[u8]>) {
        let key = Arc::new(SoftKey::from_secret(KeyType::Ed25519, &[7; 32]).unwrap());
        let blob = key.public_blob().unwrap();
        let candidate = Candidate {
            blob: blob.clone(),
            key_type: KeyType::Ed25519,
            comment: (*b"key").into(),
            lifetime: None,
            confirm,
            destinations: [].into(),
        };
        vault.add(&owner(vault), candidate, PrivateKey::Soft(Arc::clone(&key))).unwrap();
        (key, blob.into())
    }

    /// Begins to move the key while another change has its turn, and does something before that ends.
    async fn moved(vault: &Arc<Vault>, blob: &[u8], meanwhile: impl FnOnce()) -> Result<Box<[u8]>, Refusal> {
        let (caller, identity) = (owner(vault), vault.find(&owner(vault), blob).unwrap());
        let turn = vault.changes().await.unwrap();
        let mut moving = pin!(vault.keep_in_store(&caller, &identity, "", NewStored::default(), None));
        tokio::select! {
            biased;
            _ = &mut moving => unreachable!(),
            () = std::future::ready(()) => {}
        }
        meanwhile();
        drop(turn);
        moving.await
    }

    #[tokio::test]
    async fn conditions_given_before_its_turn_go_with_the_key() {
        let (vault, _place) = vault().await;
        let (_, blob) = add(&vault, false);
        moved(&vault, &blob, || drop(add(&vault, true))).await.unwrap();
        assert!(vault.stored(&blob).unwrap().metadata().confirm);
        assert_eq!(vault.find(&owner(&vault), &blob).unwrap().places.len(), 1);
    }

    #[tokio::test]
    async fn a_key_that_is_removed_before_its_turn_is_not_kept() {
        let (vault, _place) = vault().await;
        let (_, blob) = add(&vault, false);
        assert!(moved(&vault, &blob, || vault.remove_all(&owner(&vault)).unwrap()).await.is_err());
        assert!(vault.stored(&blob).is_none());
        assert!(vault.find(&owner(&vault), &blob).is_err());
    }

    /// Fills the keyring.
    fn fill(vault: &Vault) {
        let (key, _) = add(vault, false);
        let place = vault.find(&owner(vault), &key.public_blob().unwrap()).unwrap().places[0].clone();
        let place = Place { comment: vec![0; MAX_BYTES - 200].into(), ..place };
        vault.write().ring.put(b"another", KeyType::Ed25519, place).unwrap();
    }

    #[tokio::test]
    async fn a_full_vault_writes_no_key_that_it_would_not_list() {
        let (vault, place) = vault().await;
        fill(&vault);
        let (caller, terms) = (owner(&vault), NewStored::default());
        let made = vault.generate_stored(&caller, Algorithm::Ed25519, &"n".repeat(200), terms, None).await;
        assert!(matches!(made, Err(Refusal::Full)));
        vault.store.close().await;
        assert!(Store::open(&place.path().join("state")).unwrap().keys.is_empty());
    }

    #[tokio::test]
    async fn stored_keys_that_are_not_listed_are_missing_from_backups_and_counted() {
        let (vault, _place) = vault().await;
        let blob = PublicKey::Ed25519(&[1; 32]).to_blob();
        let seal = |blob: &[u8]| {
            let metadata = Metadata { blob: blob.into(), ..Metadata::default() };
            vault.access.with_master(|master| master.seal_key(metadata, &[7; 32]).unwrap()).unwrap()
        };
        vault.hold_stored(vec![seal(b"no key"), seal(&blob)]);
        let (keys, unlisted) = vault.all_stored().await.unwrap();
        assert_eq!((keys.len(), unlisted), (1, 1));
    }

    #[tokio::test]
    async fn what_comes_while_the_key_is_written_stays_in_memory() {
        let (vault, _place) = vault().await;
        let (old, blob) = add(&vault, false);
        let (keys, metadata) = vault.in_memory_as_stored(&blob).unwrap();
        assert!(Arc::ptr_eq(&keys[0], &old));
        add(&vault, true);
        let seal = |master: &MasterKey| master.seal_key(metadata, &old.secret().unwrap()).unwrap();
        let stored = StoredKey::new(vault.access.with_master(seal).unwrap()).unwrap();
        vault.keep_new(stored, &keys).await.unwrap();
        let identity = vault.find(&owner(&vault), &blob).unwrap();
        assert_eq!((identity.places.len(), identity.is_confirmed()), (2, true));
    }
}
