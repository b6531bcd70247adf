//! PIN marks: which PINs were sent to which tokens and not accepted. Knows neither file nor thread.
//!
//! A mark is a keyed hash. Where marks are in a file it is stretched by Argon2id besides, because a PIN has few values
//! and the key lies beside the marks: whoever reads the file can try them all, and each try shall cost.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::hmac;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{MarkError, record::MarkState};
use crate::vault::seal::{self, Cost};

/// The most marks of one serial: so many different PINs were refused by one token.
pub(super) const MAX_OF_SERIAL: usize = 64;
/// The most marks of all.
pub(super) const MAX_MARKS: usize = 4096;

/// A serial and a PIN, as a mark knows them.
pub(super) type Digest = [u8; 32];

/// The hash of a serial and a PIN under the store's key. Still a secret: unlike a [`Digest`] it is quickly guessed.
pub(super) fn tag(key: &hmac::Key, serial: &str, pin: &SecretString) -> Zeroizing<Digest> {
    let mut context = hmac::Context::with_key(key);
    // The length keeps `1`, `23` and `12`, `3` apart.
    context.update(&serial.len().to_be_bytes());
    context.update(serial.as_bytes());
    context.update(pin.expose_secret().as_bytes());
    let mut tag = Zeroizing::new([0; 32]);
    tag.copy_from_slice(context.sign().as_ref());
    tag
}

/// The marks that are known now.
#[derive(Default)]
pub(super) struct Marks {
    /// Argon2id's salt, where marks go to a file.
    salt: Option<[u8; 16]>,
    known: BTreeMap<String, BTreeMap<Digest, MarkState>>,
    /// After marks may have been lost: the serials whose PINs a person allowed again. All others' are held.
    released: Option<BTreeSet<String>>,
}

impl Marks {
    pub(super) fn stretched(salt: [u8; 16]) -> Self {
        Self { salt: Some(salt), ..Self::default() }
    }

    /// Holds all PINs but those of the tokens in `released`: whether they were refused is not known any more.
    pub(super) fn hold(&mut self, released: Option<BTreeSet<String>>) {
        self.released = released;
    }

    pub(super) fn is_held(&self) -> bool {
        self.released.is_some()
    }

    /// The mark of a tag. Takes some 50 ms and 24 MiB where marks are stretched.
    pub(super) fn digest(&self, tag: &Digest) -> Result<Digest, MarkError> {
        match &self.salt {
            Some(salt) => seal::stretch(tag, salt, Cost::default()).map(|digest| *digest).map_err(|_| MarkError::Hash),
            None => Ok(*tag),
        }
    }

    /// Whether the PIN may be sent and its mark kept. A person who types it again allows it when its outcome is not known:
    /// that it is so is told.
    pub(super) fn check(&self, serial: &str, digest: &Digest, typed: bool) -> Result<bool, MarkError> {
        let of_serial = self.known.get(serial);
        match of_serial.and_then(|marks| marks.get(digest)) {
            Some(MarkState::Pending) if typed => return Ok(true),
            Some(MarkState::Pending) => return Err(MarkError::Pending),
            Some(MarkState::Refused) => return Err(MarkError::Refused),
            None if !typed && self.released.as_ref().is_some_and(|released| !released.contains(serial)) => {
                return Err(MarkError::Pending);
            }
            None => {}
        }
        if of_serial.is_some_and(|marks| marks.len() >= MAX_OF_SERIAL) || self.len() >= MAX_MARKS {
            return Err(MarkError::TooMany);
        }
        Ok(false)
    }

    pub(super) fn set(&mut self, serial: &str, digest: Digest, state: MarkState) {
        self.known.entry(serial.to_owned()).or_default().insert(digest, state);
    }

    pub(super) fn clear(&mut self, serial: &str, digest: &Digest) {
        if let Some(marks) = self.known.get_mut(serial) {
            marks.remove(digest);
            if marks.is_empty() {
                self.known.remove(serial);
            }
        }
    }

    pub(super) fn clear_serial(&mut self, serial: &str) {
        self.known.remove(serial);
        self.released.as_mut().map(|released| released.insert(serial.to_owned()));
    }

    fn len(&self) -> usize {
        self.known.values().map(BTreeMap::len).sum()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_tells_serials_and_pins_apart() {
        let [key, other] = [[1; 32], [2; 32]].map(|bytes| hmac::Key::new(hmac::HMAC_SHA256, &bytes));
        let tag = |key, serial, pin: &str| *tag(key, serial, &SecretString::from(pin));
        assert_eq!(tag(&key, "1", "23"), tag(&key, "1", "23"));
        assert_ne!(tag(&key, "1", "23"), tag(&key, "12", "3"));
        assert_ne!(tag(&key, "1", "23"), tag(&key, "1", "24"));
        assert_ne!(tag(&key, "1", "23"), tag(&other, "1", "23"));
    }

    #[test]
    fn marks_in_a_file_cost_a_guess_argon2id() {
        let marks = Marks::stretched([5; 16]);
        let digest = marks.digest(&[3; 32]).unwrap();
        assert_eq!(digest, *seal::stretch(&[3; 32], &[5; 16], Cost::default()).unwrap());
        assert_ne!(digest, Marks::stretched([6; 16]).digest(&[3; 32]).unwrap());
        assert_eq!(Marks::default().digest(&[3; 32]).unwrap(), [3; 32]);
    }

    #[test]
    fn the_number_of_marks_is_bounded() {
        let mut marks = Marks::default();
        for n in 0..MAX_MARKS {
            let (serial, digest) = (format!("{}", n / MAX_OF_SERIAL), digest(n));
            marks.check(&serial, &digest, false).unwrap();
            marks.set(&serial, digest, MarkState::Refused);
        }
        assert!(matches!(marks.check("0", &digest(MAX_MARKS), false), Err(MarkError::TooMany)));
        assert!(matches!(marks.check("new", &digest(MAX_MARKS), false), Err(MarkError::TooMany)));
        assert!(
            matches!(marks.check("0", &digest(0), false), Err(MarkError::Refused)),
            "known ones are told apart still"
        );
        marks.clear_serial("0");
        marks.check("0", &digest(0), false).unwrap();
        marks.clear("1", &digest(MAX_OF_SERIAL));
        marks.check("1", &digest(MAX_OF_SERIAL), false).unwrap();
    }

    fn digest(n: usize) -> Digest {
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&n.to_be_bytes());
        digest
    }
}
