//! The identities in the order of their addition, found by their blobs. Knows no caller; the time is an argument.

use std::{
    borrow::Borrow,
    hash::{Hash, Hasher},
    sync::{Arc, OnceLock},
    time::Duration,
};

use indexmap::IndexSet;

use super::key::{Hop, Identity, Place};
use crate::public_key::KeyType;

/// Identities a keyring holds at most: a bound on the memory that adding can cost.
pub const MAX_IDENTITIES: usize = 65_536;
/// Bytes of blobs, comments and destinations that it holds at most.
pub const MAX_BYTES: usize = 64 << 20;

/// All identities.
#[derive(Default)]
pub struct Keyring {
    set: IndexSet<ByBlob>,
    bytes: usize,
    next_expiry: Option<Duration>,
    listing: OnceLock<Arc<Listing>>,
}

/// The identities as one listing shows them, and a place for its encoded form: ten thousand keys are encoded once.
#[derive(Debug, Default)]
pub struct Listing {
    /// In the order of their addition.
    pub identities: Vec<Arc<Identity>>,
    encoded: OnceLock<Box<[u8]>>,
}

impl Listing {
    /// A listing of these.
    pub fn of(identities: Vec<Arc<Identity>>) -> Self {
        Self { identities, encoded: OnceLock::new() }
    }

    /// What `encode` made of the identities when it was first asked.
    pub fn encoded(&self, encode: impl FnOnce(&[Arc<Identity>]) -> Vec<u8>) -> &[u8] {
        self.encoded.get_or_init(|| encode(&self.identities).into_boxed_slice())
    }
}

/// An identity that is equal to another when their blobs are.
struct ByBlob(Arc<Identity>);

impl Borrow<[u8]> for ByBlob {
    fn borrow(&self) -> &[u8] {
        &self.0.blob
    }
}

impl PartialEq for ByBlob {
    fn eq(&self, other: &Self) -> bool {
        self.0.blob == other.0.blob
    }
}

impl Eq for ByBlob {}

impl Hash for ByBlob {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.blob.hash(state);
    }
}

/// The keyring holds [`MAX_IDENTITIES`] or [`MAX_BYTES`] already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Keyring {
    /// The identity with this blob. What has expired is found until [`Keyring::expire`] removes it.
    pub fn find(&self, blob: &[u8]) -> Option<&Arc<Identity>> {
        Some(&self.set.get(blob)?.0)
    }

    /// Adds a place: of a new identity, at the end, or of the one with this blob, where it takes the place of the one on
    /// the same device, or of the one in memory.
    pub fn put(&mut self, blob: &[u8], key_type: KeyType, place: Place) -> Result<(), Full> {
        let old = self.set.get(blob).map(|entry| &entry.0);
        let mut identity = match old {
            Some(old) => Identity::clone(old),
            None => Identity { blob: blob.into(), key_type, places: Vec::with_capacity(1) },
        };
        let expires = place.constraints.expires;
        match identity.places.iter_mut().find(|other| other.key.device() == place.key.device()) {
            Some(other) => *other = place,
            None => identity.places.push(place),
        }
        let old_size = old.map_or(0, |old| size(old));
        let bytes = self.bytes - old_size + size(&identity);
        if bytes > MAX_BYTES || (old.is_none() && self.set.len() >= MAX_IDENTITIES) {
            return Err(Full);
        }
        self.bytes = bytes;
        match self.set.replace(ByBlob(Arc::new(identity))) {
            // Nothing else depends on all the others: ten thousand additions take ten thousand steps.
            None => {
                self.next_expiry = self.next_expiry.into_iter().chain(expires).min();
                self.listing = OnceLock::new();
            }
            Some(_) => self.changed(),
        }
        Ok(())
    }

    /// Removes the places that `which` picks, with the identities that have no other, and returns how many there were.
    pub fn remove_places(&mut self, which: impl Fn(&Identity, &Place) -> bool) -> usize {
        let mut count = 0;
        for ByBlob(identity) in std::mem::take(&mut self.set) {
            if !identity.places.iter().any(|place| which(&identity, place)) {
                self.set.insert(ByBlob(identity));
                continue;
            }
            let mut kept = Identity::clone(&identity);
            kept.places.retain(|place| !which(&identity, place));
            count += identity.places.len() - kept.places.len();
            if !kept.places.is_empty() {
                self.set.insert(ByBlob(Arc::new(kept)));
            }
        }
        self.changed();
        count
    }

    /// Removes the places of one identity that `which` picks, and it too when it has no other.
    pub fn remove_places_of(&mut self, blob: &[u8], which: impl Fn(&Place) -> bool) -> usize {
        let Some(identity) = self.find(blob) else { return 0 };
        let mut kept = Identity::clone(identity);
        kept.places.retain(|place| !which(place));
        let count = identity.places.len() - kept.places.len();
        if count == 0 {
            return 0;
        }
        if kept.places.is_empty() {
            self.set.shift_remove(blob);
        } else {
            self.set.replace(ByBlob(Arc::new(kept)));
        }
        self.changed();
        count
    }

    /// Removes what has expired and returns how it was before.
    pub fn expire(&mut self, now: Duration) -> Vec<Arc<Identity>> {
        if self.next_expiry.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let expired = |place: &Place| place.constraints.expires.is_some_and(|at| at <= now);
        let gone = self.identities().into_iter().filter(|identity| identity.places.iter().any(expired)).collect();
        self.remove_places(|_, place| expired(place));
        gone
    }

    /// When the next identity expires.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.next_expiry
    }

    /// All identities, with their cached listing.
    pub fn listing(&self) -> &Arc<Listing> {
        self.listing.get_or_init(|| Arc::new(Listing::of(self.identities())))
    }

    /// All identities as they are now.
    pub fn identities(&self) -> Vec<Arc<Identity>> {
        self.iter().cloned().collect()
    }

    /// All identities, in the order of their addition.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Identity>> {
        self.set.iter().map(|entry| &entry.0)
    }

    fn changed(&mut self) {
        self.listing = OnceLock::new();
        let places = self.iter().flat_map(|identity| &identity.places);
        self.next_expiry = places.filter_map(|place| place.constraints.expires).min();
        self.bytes = self.iter().map(|identity| size(identity)).sum();
    }
}

/// What an identity's sender decided the size of.
fn size(identity: &Identity) -> usize {
    let hop = |hop: &Hop| hop.user.len() + hop.host.len() + hop.keys.iter().map(|key| key.blob.len()).sum::<usize>();
    let place = |place: &Place| {
        let destinations = place.constraints.destinations.iter().map(|d| hop(&d.from) + hop(&d.to));
        place.comment.len() + destinations.sum::<usize>()
    };
    identity.blob.len() + identity.places.iter().map(place).sum::<usize>()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        devices::soft::{SoftKey, SoftParts},
        public_key::{Curve, KeyType},
        vault::key::{Constraints, Grants, PrivateKey},
    };

    fn put(ring: &mut Keyring, blob: &[u8], comment: &str, expires: Option<u64>) {
        // Any key will do: the keyring looks at blobs only.
        let scalar = [1];
        let point: Vec<u8> = [
            "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
            "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
        ]
        .concat()
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
        let key = SoftKey::new(&SoftParts::Ecdsa { curve: Curve::P256, scalar: &scalar, point: &point }).unwrap();
        let place = Place {
            key: PrivateKey::Soft(Arc::new(key)),
            comment: comment.as_bytes().into(),
            constraints: Constraints { expires: expires.map(Duration::from_secs), ..Constraints::default() },
            grants: Grants::NONE,
        };
        ring.put(blob, KeyType::Ecdsa(Curve::P256), place).unwrap();
    }

    fn comments(ring: &Keyring) -> Vec<String> {
        ring.listing().identities.iter().map(|i| String::from_utf8_lossy(i.comment()).into_owned()).collect()
    }

    #[test]
    fn adding_again_keeps_the_place_and_replaces_the_rest() {
        let mut ring = Keyring::default();
        for (blob, comment) in [(b"a", "a"), (b"b", "b"), (b"c", "c")] {
            put(&mut ring, blob, comment, Some(5));
        }
        put(&mut ring, b"b", "new", None);
        assert_eq!(comments(&ring), ["a", "new", "c"]);
        assert_eq!(ring.find(b"b").unwrap().places[0].constraints.expires, None);
        assert_eq!(ring.remove_places_of(b"a", |_| true), 1);
        assert_eq!(comments(&ring), ["new", "c"]);
    }

    #[test]
    fn what_has_expired_goes() {
        let mut ring = Keyring::default();
        put(&mut ring, b"a", "a", Some(5));
        put(&mut ring, b"b", "b", Some(7));
        assert_eq!(ring.next_expiry(), Some(Duration::from_secs(5)));
        assert_eq!(ring.expire(Duration::from_secs(4)).len(), 0);
        assert_eq!(ring.expire(Duration::from_secs(5)).len(), 1);
        assert_eq!((comments(&ring), ring.next_expiry()), (vec!["b".into()], Some(Duration::from_secs(7))));
        assert_eq!((ring.remove_places(|_, _| true), ring.next_expiry()), (1, None));
    }

    #[test]
    fn the_listing_is_encoded_once() {
        let mut ring = Keyring::default();
        put(&mut ring, b"a", "a", None);
        assert_eq!(ring.listing().encoded(|ids| vec![u8::try_from(ids.len()).unwrap()]), [1]);
        assert_eq!(ring.listing().encoded(|_| vec![9]), [1]);
        put(&mut ring, b"b", "b", None);
        assert_eq!(ring.listing().encoded(|ids| vec![u8::try_from(ids.len()).unwrap()]), [2]);
    }
}
