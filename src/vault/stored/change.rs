//! What becomes of a key that is in the store: its conditions, its certificates, a copy that leaves it, its successor. Knows
//! who may, and what takes the passphrase.

use std::sync::Arc;

use secrecy::SecretString;
use tracing::info;
use zeroize::Zeroizing;

use super::{STORE, StoredKey, life::to_the_end, put};
use crate::{
    devices::{Algorithm, DeviceError, compute::Length, soft::SoftKey},
    key_file::{KeyFile, KeyFileError, WriteError},
    public_key::{Blob, Certificate, FingerprintHash, PublicKey, fingerprint},
    vault::{
        Vault,
        key::{Caller, Destination},
        life::plain_blob,
        policy::Refusal,
        store::{MAX_CERTIFICATES, Metadata},
        unix_now,
    },
};

/// One change of what a stored key may be used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyChange {
    /// It is used again. Takes a passphrase.
    Enable,
    /// It is listed, and not used.
    Disable,
    /// Whether a person confirms each use. Less takes a passphrase.
    Confirm(bool),
    /// From when on it is not used, in seconds since 1970. Later than before takes a passphrase.
    Expires(Option<u64>),
    /// Where it may be used; empty for anywhere. Anything that was not among them takes a passphrase.
    Destinations(Box<[Destination]>),
    /// Its private half never leaves the store from now on.
    NotExportable,
    /// It is offered with this certificate no more.
    Detach(Box<[u8]>),
}

/// The form of a private key that leaves the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportForm {
    /// OpenSSH's own.
    OpenSsh,
    /// PKCS#8 in PEM.
    Pkcs8,
}

impl ExportForm {
    /// All there are.
    pub const ALL: &[Self] = &[Self::OpenSsh, Self::Pkcs8];

    /// `openssh` or `pkcs8`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OpenSsh => "openssh",
            Self::Pkcs8 => "pkcs8",
        }
    }

    /// The one with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|form| form.as_str() == name)
    }
}

impl KeyChange {
    /// Whether the key may do more afterwards.
    fn loosens(&self, now: &Metadata) -> bool {
        match self {
            Self::Enable => !now.enabled,
            Self::Confirm(confirm) => now.confirm && !confirm,
            Self::Expires(at) => now.expires.is_some_and(|before| at.is_none_or(|at| at > before)),
            Self::Destinations(to) => {
                let was_allowed = |to: &Destination| now.destinations.contains(to);
                !now.destinations.is_empty() && (to.is_empty() || !to.iter().all(was_allowed))
            }
            Self::Disable | Self::NotExportable | Self::Detach(_) => false,
        }
    }

    fn apply(self, to: &mut Metadata) -> Result<(), Refusal> {
        match self {
            Self::Enable => to.enabled = true,
            Self::Disable => to.enabled = false,
            Self::Confirm(confirm) => to.confirm = confirm,
            Self::Expires(at) => to.expires = at,
            Self::Destinations(destinations) => {
                to.destinations = destinations;
                super::life::check_grantable(to, to.grants)?;
            }
            Self::NotExportable => to.exportable = false,
            Self::Detach(blob) => {
                let before = to.certificates.len();
                to.certificates.retain(|certificate| *certificate != blob);
                if to.certificates.len() == before {
                    return Err(Refusal::NoSuchKey);
                }
            }
        }
        Ok(())
    }
}

impl From<KeyFileError> for Refusal {
    fn from(error: KeyFileError) -> Self {
        Self::Store(error.to_string())
    }
}

impl From<WriteError> for Refusal {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::EmptyPassphrase => Self::Slot(error.to_string()),
            WriteError::NoForm => DeviceError::Unsupported(error.to_string().into()).into(),
            WriteError::Failed => Self::Store(error.to_string()),
        }
    }
}

impl Vault {
    /// A stored key for its owner, by its own blob or a certificate's.
    fn stored_of(&self, caller: &Caller, blob: &[u8]) -> Result<Arc<StoredKey>, Refusal> {
        self.check_owner(caller)?;
        let not_here =
            || Refusal::from(DeviceError::unsupported("only a key of the encrypted store has this done to it"));
        match self.stored(&plain_blob(blob)) {
            Some(key) => Ok(key),
            None => self.find(caller, blob).and_then(|_| Err(not_here())),
        }
    }

    /// Changes what a stored key may be used for. What loosens it takes a passphrase as `proof`.
    pub async fn set_key(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        blob: &[u8],
        proof: Option<SecretString>,
        change: KeyChange,
    ) -> Result<(), Refusal> {
        let key = self.stored_of(caller, blob)?;
        let proof = self.proof(proof, change.loosens(key.metadata())).await?;
        let proven = proof.is_some();
        let plain = key.metadata().blob.clone();
        drop(key);
        let change = move |metadata: &mut Metadata| {
            // It may have been tightened meanwhile.
            if !proven && change.loosens(metadata) {
                return Err(Refusal::ProofNeeded);
            }
            change.apply(metadata)
        };
        self.describe(caller, &plain, proof, change).await?;
        info!(key = fingerprint(&plain, FingerprintHash::Sha256), "what the key may be used for is changed");
        Ok(())
    }

    /// Offers a stored key with this certificate, too, in place of what the same authority certified for the same names
    /// before.
    pub async fn attach(self: &Arc<Self>, caller: &Arc<Caller>, certificate: &[u8]) -> Result<(), Refusal> {
        let refuse = |why: &'static str| Err(Refusal::Slot(why.to_owned()));
        let parsed = match Blob::parse(certificate) {
            Ok(Blob::Certificate(parsed)) => parsed,
            _ => return refuse("that is no certificate of OpenSSH's"),
        };
        if parsed.verify().is_err() {
            return refuse("the certificate's signature is not its authority's");
        }
        if parsed.valid_before <= unix_now() {
            return refuse("the certificate has expired");
        }
        let key = self.stored_of(caller, &parsed.key.to_blob())?;
        let (plain, added) = (key.metadata().blob.clone(), Box::<[u8]>::from(certificate));
        let change = move |metadata: &mut Metadata| {
            let Ok(Blob::Certificate(new)) = Blob::parse(&added) else { return Err(Refusal::NoSuchKey) };
            let now = unix_now();
            metadata.certificates.retain(|old| match Blob::parse(old) {
                Ok(Blob::Certificate(old)) => old.valid_before > now && !replaces(&new, &old),
                _ => false,
            });
            if metadata.certificates.len() >= MAX_CERTIFICATES {
                return Err(Refusal::Full);
            }
            metadata.certificates.push(added);
            Ok(())
        };
        self.describe(caller, &plain, None, change).await?;
        info!(key = fingerprint(&plain, FingerprintHash::Sha256), "a certificate is attached");
        Ok(())
    }

    /// A copy of an exportable key's private half, sealed by `passphrase`. Takes a passphrase of the store as `proof`.
    pub async fn export(
        self: &Arc<Self>,
        caller: &Caller,
        blob: &[u8],
        proof: Option<SecretString>,
        form: ExportForm,
        passphrase: SecretString,
    ) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let exportable = || {
            let key = self.stored_of(caller, blob)?;
            if key.metadata().exportable { Ok(key) } else { Err(Refusal::NotExportable) }
        };
        exportable()?;
        let master = self.proof(proof, true).await?.ok_or(Refusal::ProofNeeded)?;
        // It may have been changed or deleted meanwhile.
        let key = exportable()?;
        let write = move || {
            let secret = master.open_key(&key.sealed)?;
            let file = KeyFile::from_secret(key.key_type, &key.metadata().blob, &secret)?;
            let file = file.with_comment(&String::from_utf8_lossy(&key.metadata().comment));
            Ok::<_, Refusal>(Zeroizing::new(match form {
                ExportForm::OpenSsh => file.to_openssh(&passphrase)?.into_bytes(),
                ExportForm::Pkcs8 => file.to_pkcs8(&passphrase)?.into_bytes(),
            }))
        };
        let died = || DeviceError::Failed("the export died; try again".into());
        let file = self.compute.apart("export", write).await.ok_or_else(died)??;
        info!(key = fingerprint(blob, FingerprintHash::Sha256), "exported");
        Ok(file)
    }

    /// Makes a successor with the same name and conditions, and returns its blob. The old key is called after its
    /// fingerprint from then on, signs by no named scheme any more, and is not used after `retires`, in seconds since 1970.
    pub async fn rotate(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        blob: &[u8],
        retires: Option<u64>,
    ) -> Result<Box<[u8]>, Refusal> {
        let old = self.stored_of(caller, blob)?;
        let algorithm = PublicKey::parse(&old.metadata().blob).ok().as_ref().and_then(Algorithm::of);
        let algorithm = algorithm.ok_or(DeviceError::unsupported("no key of this kind or size is made here"))?;
        self.open_store(caller).await?;
        let key = self.compute.run(caller.connection, Length::Long, move || SoftKey::generate(algorithm)).await?;
        let made = Box::<[u8]>::from(key.public_blob()?);
        self.open_store(caller).await?;
        let (vault, successor, id) = (Arc::clone(self), made.clone(), old.id());
        let work = async move {
            let _turn = vault.changes().await?;
            let old = vault.stored(&old.metadata().blob).ok_or(Refusal::NoSuchKey)?;
            let metadata = Metadata {
                blob: successor,
                created: unix_now(),
                certificates: Vec::new(),
                succeeds: Some(id),
                retires: None,
                ..old.metadata().clone()
            };
            let retired = retired(old.metadata(), retires);
            let secret = key.secret()?;
            drop(key);
            let sealed = vault.access.with_master(|master| {
                Ok::<_, Refusal>((master.seal_key(metadata, &secret)?, master.reseal_key(&old.sealed, retired)?))
            });
            let (new, retired) = sealed??;
            let both = [old.described(retired), StoredKey::new(new).map_err(Refusal::Store)?].map(Arc::new);
            vault.check_room(&both)?;
            vault.store.replace_keys(Vec::new(), both.iter().map(|key| key.sealed.clone()).collect()).await?;
            let mut state = vault.write();
            both.iter().for_each(|key| put(&mut state.ring, key));
            drop(state);
            vault.lifetimes.notify_one();
            Ok(())
        };
        to_the_end(work).await?;
        info!(device = STORE, key = fingerprint(&made, FingerprintHash::Sha256), "made in place of another");
        Ok(made)
    }
}

/// How a key is described that has a successor.
fn retired(of: &Metadata, retires: Option<u64>) -> Metadata {
    let mut retired = of.clone();
    // Its name is the successor's now.
    retired.name = "".into();
    retired.grants.sign = false;
    retired.retires = retires;
    if let Some(at) = retires {
        retired.expires = Some(retired.expires.map_or(at, |before| before.min(at)));
    }
    retired
}

/// Whether a certificate takes the place of another of the same key.
fn replaces(new: &Certificate<'_>, old: &Certificate<'_>) -> bool {
    new.signature_key == old.signature_key && new.kind == old.kind && new.principals == old.principals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::key::Hop;

    #[test]
    fn what_loosens_is_told_from_what_does_not() {
        let to = |host: &str| Destination {
            from: Hop::default(),
            to: Hop { host: host.as_bytes().into(), ..Hop::default() },
        };
        let free = Metadata { enabled: true, ..Metadata::default() };
        let bound = Metadata {
            enabled: false,
            confirm: true,
            expires: Some(100),
            destinations: [to("a"), to("b")].into(),
            ..Metadata::default()
        };
        for (change, of_free, of_bound) in [
            (KeyChange::Enable, false, true),
            (KeyChange::Disable, false, false),
            (KeyChange::Confirm(true), false, false),
            (KeyChange::Confirm(false), false, true),
            (KeyChange::Expires(Some(99)), false, false),
            (KeyChange::Expires(Some(101)), false, true),
            (KeyChange::Expires(None), false, true),
            (KeyChange::Destinations([to("a")].into()), false, false),
            (KeyChange::Destinations([to("a"), to("c")].into()), false, true),
            (KeyChange::Destinations([].into()), false, true),
            (KeyChange::NotExportable, false, false),
        ] {
            assert_eq!((change.loosens(&free), change.loosens(&bound)), (of_free, of_bound), "{change:?}");
        }
    }
}
