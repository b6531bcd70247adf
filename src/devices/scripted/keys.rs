//! The keys of a scripted device: those of its script, and what became of them since. Knows soft keys; no rules.

use std::sync::Arc;

use aws_lc_rs::{
    agreement, digest,
    signature::{Ed25519KeyPair, KeyPair},
};
use base64ct::{Base64Unpadded, Encoding};
use zeroize::Zeroizing;

use super::script::{KeyKind, ScriptKey};
use crate::{
    devices::{
        Algorithm, CardSlot, DeviceError, FoundKey, NewKey, PrivateHalf, Slot, Touch,
        soft::{SoftKey, SoftParts},
    },
    public_key::{Curve, PublicKey},
    rfc4251::{Reader, WireError},
    sys::rsa::RsaIntegers,
};

/// `mpint n, e, d, iqmp, p, q`, as `ssh-add` sends them. Made for tests, and public.
const RSA: &str = include_str!("rsa-2048.b64");

pub(super) struct Key {
    pub(super) script: ScriptKey,
    blob: Box<[u8]>,
    pub(super) key: SoftKey,
}

fn broken(slot: &str) -> DeviceError {
    DeviceError::Failed(format!("the key in slot {slot:?} cannot be made"))
}

/// The script's keys, after what the journal's lines say of them. A key that was made stands last.
pub(super) fn load(script: &[ScriptKey], journal: &str) -> Result<Vec<Arc<Key>>, DeviceError> {
    let mut keys = script.iter().map(|key| Key::new(key).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    for line in journal.lines() {
        let unreadable = || DeviceError::Failed(format!("the journal cannot be read: {line:?}"));
        let fields: Vec<_> = line.split('\t').collect();
        match fields[..] {
            ["delete", slot] => keys.retain(|key| key.script.slot != slot),
            ["rename", slot, label] => {
                for key in keys.iter_mut().filter(|key| key.script.slot == slot) {
                    *key = Arc::new(Key::new(&ScriptKey { label: label.to_owned(), ..key.script.clone() })?);
                }
            }
            ["made", slot, kind, touch, label] => {
                let mut script = ScriptKey {
                    slot: slot.to_owned(),
                    kind: KeyKind::Ed25519,
                    seed: 0,
                    label: label.to_owned(),
                    touch: touch == "true",
                    hidden: false,
                    appears: 0,
                    vanishes: None,
                    private: None,
                };
                match kind.split_once(' ') {
                    Some(("private", text)) => script.private = Some(text.to_owned()),
                    Some(("ed25519", seed)) => script.seed = seed.parse().map_err(|_| unreadable())?,
                    Some(("p256", seed)) => {
                        (script.kind, script.seed) = (KeyKind::P256, seed.parse().map_err(|_| unreadable())?);
                    }
                    Some(("rsa", _)) => script.kind = KeyKind::Rsa,
                    _ => return Err(unreadable()),
                }
                keys.retain(|key| key.script.slot != slot);
                keys.push(Arc::new(Key::new(&script)?));
            }
            _ => return Err(unreadable()),
        }
    }
    Ok(keys)
}

/// The journal's line for a key that is made, or taken over; the `n`-th line.
pub(super) fn line(new: &NewKey, n: usize, private: Option<&PrivateHalf>) -> Result<String, DeviceError> {
    // Far from the seeds that stand in scripts.
    let seed = 1_000_000 + n;
    let kind = match (private, new.algorithm) {
        (Some(private), _) => format!("private {}", Base64Unpadded::encode_string(private.as_bytes())),
        (None, Algorithm::Ed25519) => format!("ed25519 {seed}"),
        (None, Algorithm::Ecdsa(Curve::P256)) => format!("p256 {seed}"),
        (None, Algorithm::Rsa(2048)) => format!("rsa {seed}"),
        _ => return Err(DeviceError::unsupported("a scripted device makes rsa-2048, nistp256 and ed25519 keys")),
    };
    let slot = new.slot.map_or_else(|| format!("made-{n}"), |slot| CardSlot::as_str(slot).to_owned());
    let touch = matches!(new.touch, Some(Touch::On | Touch::Fixed));
    Ok(format!("made\t{slot}\t{kind}\t{touch}\t{}", one_field(&new.label)))
}

/// A label as the journal can have it.
pub(super) fn one_field(label: &str) -> String {
    label.replace(['\t', '\n', '\r'], " ")
}

impl Key {
    fn new(script: &ScriptKey) -> Result<Self, DeviceError> {
        let broken = || broken(&script.slot);
        if let Some(text) = &script.private {
            let bytes = Zeroizing::new(Base64Unpadded::decode_vec(text).map_err(|_| broken())?);
            let private = PrivateHalf::read(&bytes).ok_or_else(broken)?;
            let parts = private.parts()?;
            let blob = parts.public().to_blob().into();
            return Ok(Self { script: script.clone(), blob, key: SoftKey::new(&parts)? });
        }
        let seed = [format!("{:?}", script.kind).as_bytes(), &script.seed.to_be_bytes()].concat();
        let secret = digest::digest(&digest::SHA256, &seed);
        let secret = secret.as_ref();
        let (blob, key) = match script.kind {
            KeyKind::Ed25519 => {
                let pair = Ed25519KeyPair::from_seed_unchecked(secret).map_err(|_| broken())?;
                let public = pair.public_key().as_ref();
                let parts = SoftParts::Ed25519 { seed: secret, public };
                (PublicKey::Ed25519(public).to_blob(), SoftKey::new(&parts)?)
            }
            KeyKind::P256 => {
                let private = agreement::PrivateKey::from_private_key(&agreement::ECDH_P256, secret);
                let public = private.map_err(|_| broken())?.compute_public_key().map_err(|_| broken())?;
                let (curve, point) = (Curve::P256, public.as_ref());
                let parts = SoftParts::Ecdsa { curve, scalar: secret, point };
                (PublicKey::Ecdsa(curve, point).to_blob(), SoftKey::new(&parts)?)
            }
            KeyKind::Rsa => {
                let text: String = RSA.split_whitespace().collect();
                let integers = Base64Unpadded::decode_vec(&text).map_err(|_| broken())?;
                let parts = rsa(&integers).map_err(|_| broken())?;
                let blob = PublicKey::Rsa { e: parts.e, n: parts.n }.to_blob();
                (blob, SoftKey::new(&SoftParts::Rsa(parts))?)
            }
        };
        Ok(Self { script: script.clone(), blob: blob.into(), key })
    }

    pub(super) fn is_there(&self, generation: u64) -> bool {
        self.script.appears <= generation && self.script.vanishes.is_none_or(|gone| generation < gone)
    }

    pub(super) fn found(&self) -> FoundKey {
        FoundKey {
            slot: Slot(self.script.slot.as_bytes().into()),
            blob: self.blob.clone(),
            certificates: Vec::new(),
            label: self.script.label.clone(),
            schemes: self.key.schemes().to_vec(),
            decrypts: self.key.decrypts().to_vec(),
            derives: self.key.derives().to_vec(),
            touch: self.script.touch,
            ssh: true,
            note: String::new(),
        }
    }
}

fn rsa(integers: &[u8]) -> Result<RsaIntegers<'_>, WireError> {
    let mut reader = Reader::new(integers);
    let mut next = || reader.mpint();
    Ok(RsaIntegers { n: next()?, e: next()?, d: next()?, iqmp: next()?, p: next()?, q: next()? })
}
