//! Keys in memory behind the machinery of devices: a driver that never waits and does many things at once.

use std::sync::Arc;

use ssh_key::private::{EcdsaKeypair, Ed25519Keypair, KeypairData};
use strongroom::{
    devices::{
        Device, DeviceError, Driver, FoundKey, Input, Operation, Scan, Scheme, Settings, Slot, Status,
        in_process::InProcess,
        soft::{SoftKey, SoftParts},
    },
    public_key::Curve,
};

use crate::subject::Subject;

pub(crate) struct Soft(Device);

/// The keys, by the number that is their slot.
struct Keys(Arc<[(Box<[u8]>, SoftKey)]>);

impl Driver for Keys {
    type Config = Arc<[(Box<[u8]>, SoftKey)]>;
    const KIND: &'static str = "soft";

    async fn open(keys: Self::Config) -> Result<Self, DeviceError> {
        Ok(Self(keys))
    }

    fn lanes(&self) -> usize {
        16
    }

    async fn scan(&self) -> Result<Scan, DeviceError> {
        let found = |(n, (blob, key)): (u8, &(Box<[u8]>, SoftKey))| FoundKey {
            slot: Slot([n].into()),
            blob: blob.clone(),
            certificates: Vec::new(),
            label: String::new(),
            schemes: key.schemes().to_vec(),
            decrypts: key.decrypts().to_vec(),
            derives: key.derives().to_vec(),
            touch: false,
            ssh: true,
            note: String::new(),
        };
        let keys = (0..).zip(&*self.0).map(found).collect();
        Ok(Scan { keys, complete: true, ..Scan::default() })
    }

    async fn sign(&self, slot: &Slot, scheme: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        let [n] = *slot.0 else { return Err(DeviceError::NoSuchKey) };
        let (_, key) = self.0.get(usize::from(n)).ok_or(DeviceError::NoSuchKey)?;
        let operation = Operation::Sign { scheme, input: input.clone() };
        Ok(key.operate(&operation)?.signature().map(|signature| signature.as_bytes().to_vec()).unwrap())
    }

    async fn health(&self) -> Result<Status, DeviceError> {
        Ok(Status::default())
    }
}

impl Subject for Soft {
    /// Two of Ed25519 and three of ECDSA.
    const SCHEMES: usize = 5;

    async fn start(settings: Settings) -> Self {
        let ed25519 = Ed25519Keypair::from_seed(&[7; 32]);
        let parts = SoftParts::Ed25519 { seed: &[7; 32], public: ed25519.public.as_ref() };
        let mut keys = vec![(blob(ed25519.clone().into()), SoftKey::new(&parts).unwrap())];
        for (curve, other) in [
            (Curve::P256, ssh_key::EcdsaCurve::NistP256),
            (Curve::P384, ssh_key::EcdsaCurve::NistP384),
            (Curve::P521, ssh_key::EcdsaCurve::NistP521),
        ] {
            let pair = EcdsaKeypair::random(&mut ssh_key::rand_core::OsRng, other).unwrap();
            let parts = SoftParts::Ecdsa { curve, scalar: pair.private_key_bytes(), point: pair.public_key_bytes() };
            let key = SoftKey::new(&parts).unwrap();
            keys.push((blob(pair.into()), key));
        }
        let keys: Arc<[_]> = keys.into();
        let engine = InProcess::<Keys>::new(move || Arc::clone(&keys));
        let subject = Self(Device::start("soft", Keys::KIND, settings, engine));
        subject.ready().await;
        subject
    }

    fn device(&self) -> &Device {
        &self.0
    }
}

fn blob(pair: KeypairData) -> Box<[u8]> {
    let key = ssh_key::PrivateKey::new(pair, "").unwrap();
    key.public_key().to_bytes().unwrap().into()
}
