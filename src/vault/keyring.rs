//! The identities in the order of their addition, found by their blobs. Knows no caller; the time is an argument.

use std::{
    borrow::Borrow,
    hash::{Hash, Hasher},
    sync::{Arc, OnceLock},
    time::Duration,
};

use indexmap::IndexSet;

use super::key::{Constraints, Hop, Identity, Place, PrivateKey};
use crate::public_key::{Blob, KeyType};

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

    /// The identities that are certificates of the key with this plain blob. Looks at all.
    pub fn certified<'a>(&'a self, plain: &'a [u8]) -> impl Iterator<Item = &'a Arc<Identity>> {
        self.iter().filter(move |identity| {
            // A certificate has the key in it. Most others need not be parsed.
            identity.blob.len() > plain.len()
                && matches!(Blob::parse(&identity.blob), Ok(Blob::Certificate(it)) if it.key.to_blob() == plain)
        })
    }

    /// Adds a place: of a new identity, at the end, or of the one with this blob, where it takes the place of the one on
    /// the same device, or of the one in memory.
    pub fn put(&mut self, blob: &[u8], key_type: KeyType, place: Place) -> Result<(), Full> {
        let (expires, identity) = (place.constraints.expires, self.joined(blob, key_type, place));
        // What is sealed is a little longer than it was.
        let is_full = self.find(blob).is_none() && self.set.len() >= MAX_IDENTITIES;
        if is_full || self.bytes_with(&identity) > MAX_BYTES {
            return Err(Full);
        }
        self.replace(identity, expires);
        Ok(())
    }

    /// Adds a place as [`put`](Self::put) does, of which [`check_room`](Self::check_room) said that there is room: what
    /// others have added since then does not turn it away.
    pub fn put_checked(&mut self, blob: &[u8], key_type: KeyType, place: Place) {
        let expires = place.constraints.expires;
        self.replace(self.joined(blob, key_type, place), expires);
    }

    /// Whether there is room for all these places. One in the place of another on the same device always has it.
    pub fn check_room(&self, places: impl IntoIterator<Item = (Box<[u8]>, Place)>) -> Result<(), Full> {
        let (mut count, mut bytes) = (self.set.len(), self.bytes);
        for (blob, place) in places {
            match self.find(&blob) {
                Some(old) if old.places.iter().any(|other| other.key.device() == place.key.device()) => continue,
                Some(_) => {}
                None => {
                    count += 1;
                    bytes += blob.len();
                }
            }
            bytes += place_size(&place);
        }
        if count > MAX_IDENTITIES || bytes > MAX_BYTES { Err(Full) } else { Ok(()) }
    }

    /// The identity with this blob, or a new one, with one more place.
    fn joined(&self, blob: &[u8], key_type: KeyType, place: Place) -> Identity {
        let mut identity = match self.find(blob) {
            Some(old) => Identity::clone(old),
            None => Identity::new(blob, key_type, Vec::with_capacity(1)),
        };
        match identity.places.iter_mut().find(|other| other.key.device() == place.key.device()) {
            // A name is the key's, however often it is added.
            Some(other) => {
                let name = std::mem::take(&mut other.name);
                *other = place;
                if other.name.is_empty() {
                    other.name = name;
                }
            }
            None => {
                let after = identity.places.partition_point(|other| other.rank <= place.rank);
                identity.places.insert(after, place);
            }
        }
        identity
    }

    /// What all take with this one in place of the one with its blob.
    fn bytes_with(&self, identity: &Identity) -> usize {
        let old_size = self.find(&identity.blob).map_or(0, |old| size(old));
        self.bytes.saturating_sub(old_size) + size(identity)
    }

    /// Puts an identity with a place that goes then in place of the one with its blob, or at the end.
    fn replace(&mut self, identity: Identity, expires: Option<Duration>) {
        self.bytes = self.bytes_with(&identity);
        self.listing = OnceLock::new();
        // Nothing else depends on all the others: ten thousand changes take ten thousand steps.
        match self.set.replace(ByBlob(Arc::new(identity))) {
            Some(ByBlob(old)) if old.places.iter().any(|place| self.is_next(place)) => self.changed(),
            _ => self.next_expiry = self.next_expiry.into_iter().chain(expires).min(),
        }
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

    /// Changes the places of the identities that `which` picks. What decides when one expires stays as it is.
    pub fn change_places(&mut self, which: impl Fn(&Identity) -> bool, change: impl Fn(&mut Place)) {
        let picked: Vec<_> = self.iter().filter(|identity| which(identity)).cloned().collect();
        for identity in picked {
            let mut changed = Identity::clone(&identity);
            changed.places.iter_mut().for_each(&change);
            self.bytes = self.bytes - size(&identity) + size(&changed);
            self.set.replace(ByBlob(Arc::new(changed)));
        }
        self.listing = OnceLock::new();
    }

    /// Puts a place in place of the one on the same device, its name too; `false` where the identity has none there.
    pub fn set_place(&mut self, blob: &[u8], place: &Place) -> bool {
        let Some(identity) = self.find(blob) else { return false };
        let mut changed = Identity::clone(identity);
        let Some(old) = changed.places.iter_mut().find(|other| other.key.device() == place.key.device()) else {
            return false;
        };
        *old = place.clone();
        self.set.replace(ByBlob(Arc::new(changed)));
        self.changed();
        true
    }

    /// Gives the places new ranks, by the names of their devices.
    pub fn rank(&mut self, rank: impl Fn(&str) -> Option<usize>) {
        let new = |place: &Place| place.key.device().and_then(&rank).filter(|rank| *rank != place.rank);
        let changed = |identity: &&Arc<Identity>| identity.places.iter().any(|place| new(place).is_some());
        let changed: Vec<_> = self.iter().filter(changed).cloned().collect();
        for identity in changed {
            let mut ranked = Identity::clone(&identity);
            for place in &mut ranked.places {
                place.rank = new(place).unwrap_or(place.rank);
            }
            ranked.places.sort_by_key(|place| place.rank);
            self.set.replace(ByBlob(Arc::new(ranked)));
        }
        self.listing = OnceLock::new();
    }

    /// Removes what has expired and returns how it was before. A stored key stays, and is not used.
    pub fn expire(&mut self, now: Duration) -> Vec<Arc<Identity>> {
        if self.next_expiry.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let expired = |place: &Place| place.constraints.expires.is_some_and(|at| at <= now);
        let gone: Vec<_> =
            self.identities().into_iter().filter(|identity| identity.places.iter().any(expired)).collect();
        let stays = |identity: &Identity, place: &Place| matches!(&place.key, PrivateKey::Stored(key) if key.metadata().blob == identity.blob);
        for identity in &gone {
            for place in identity.places.iter().filter(|place| expired(place) && stays(identity, place)) {
                let constraints = Constraints { expires: None, disabled: true, ..place.constraints.clone() };
                self.set_place(&identity.blob, &Place { constraints, ..place.clone() });
            }
        }
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

    fn is_next(&self, place: &Place) -> bool {
        place.constraints.expires.is_some() && place.constraints.expires == self.next_expiry
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
    identity.blob.len() + identity.places.iter().map(place_size).sum::<usize>()
}

fn place_size(place: &Place) -> usize {
    let hop = |hop: &Hop| hop.user.len() + hop.host.len() + hop.keys.iter().map(|key| key.blob.len()).sum::<usize>();
    let destinations = place.constraints.destinations.iter().map(|d| hop(&d.from) + hop(&d.to));
    let held = match &place.key {
        PrivateKey::Sk(key) => key.held(),
        PrivateKey::Stored(key) => key.held(),
        // These are no longer than a few of their blobs.
        PrivateKey::Soft(_) | PrivateKey::OnDevice(..) => 0,
    };
    place.comment.len() + place.name.len() + destinations.sum::<usize>() + held
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use crate::{
        devices::{
            sk::SkKey,
            soft::{SoftKey, SoftParts},
        },
        public_key::{Curve, KeyType, PublicKey},
        vault::key::{Constraints, Grants},
    };

    fn put(ring: &mut Keyring, blob: &[u8], comment: &str, expires: Option<u64>) {
        ring.put(blob, KeyType::Ecdsa(Curve::P256), place(comment, expires)).unwrap();
    }

    fn place(comment: &str, expires: Option<u64>) -> Place {
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
        Place {
            key: PrivateKey::Soft(Arc::new(key)),
            comment: comment.as_bytes().into(),
            constraints: Constraints { expires: expires.map(Duration::from_secs), ..Constraints::default() },
            grants: Grants::NONE,
            rank: 0,
            added: true,
            name: "".into(),
        }
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
    fn a_key_that_is_replaced_brings_its_own_time() {
        let mut ring = Keyring::default();
        let seconds = |ring: &Keyring| ring.next_expiry().map(|at| at.as_secs());
        put(&mut ring, b"a", "a", Some(5));
        put(&mut ring, b"b", "b", Some(7));
        put(&mut ring, b"a", "a", Some(9));
        assert_eq!(seconds(&ring), Some(7));
        put(&mut ring, b"a", "a", Some(3));
        assert_eq!(seconds(&ring), Some(3));
        put(&mut ring, b"b", "b", None);
        assert_eq!(seconds(&ring), Some(3));
        put(&mut ring, b"a", "a", None);
        assert_eq!(seconds(&ring), None);
        assert_eq!(ring.bytes, 4);
    }

    /// A device may rename all its keys at each scan, while everything waits for the keyring.
    #[test]
    fn replacing_many_keys_takes_as_many_steps() {
        const MANY: u32 = 20_000;
        let mut ring = Keyring::default();
        let place = place("", None);
        let begun = std::time::Instant::now();
        for n in (0..MANY).chain(0..MANY) {
            ring.put(&n.to_be_bytes(), KeyType::Ecdsa(Curve::P256), place.clone()).unwrap();
        }
        // Their square does not fit in it.
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_comes_with_a_security_key_counts() {
        let public = PublicKey::SkEd25519(&[1; 32], b"ssh:");
        let mut ring = Keyring::default();
        let mut put = |n: u32| {
            let handle = Zeroizing::new(vec![0; 200 << 10]);
            let key = SkKey::new(&public, b"ssh:", 1, handle, b"", "internal".into()).unwrap();
            let place = Place { key: PrivateKey::Sk(Arc::new(key)), ..place("", None) };
            ring.put(&n.to_be_bytes(), KeyType::SkEd25519, place)
        };
        assert_eq!((0..1000).position(|n| put(n).is_err()), Some(MAX_BYTES / (200 << 10)));
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
