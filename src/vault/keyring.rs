//! The identities in the order of their addition, found by their blobs. Knows no caller; the time is an argument.

use std::{
    borrow::Borrow,
    hash::{Hash, Hasher},
    sync::{Arc, OnceLock},
    time::Duration,
};

use indexmap::IndexSet;

use super::key::{Hop, Identity};

/// Identities a keyring holds at most: a bound on the memory that adding can cost.
pub const MAX_IDENTITIES: usize = 65_536;
/// Bytes of blobs, comments and destinations that it holds at most.
pub const MAX_BYTES: usize = 64 << 20;

/// All identities. Whatever has expired by the `now` of a call is gone before the call does anything.
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
    /// The identity with this blob.
    pub fn find(&self, blob: &[u8], now: Duration) -> Option<&Arc<Identity>> {
        let identity = &self.set.get(blob)?.0;
        identity.constraints.expires.is_none_or(|at| at > now).then_some(identity)
    }

    /// Adds an identity at the end, or puts it in the place of the one with the same blob.
    pub fn insert(&mut self, identity: Arc<Identity>) -> Result<(), Full> {
        let old = self.set.get(&*identity.blob).map_or(0, |old| size(&old.0));
        let bytes = self.bytes - old + size(&identity);
        if bytes > MAX_BYTES || (old == 0 && self.set.len() >= MAX_IDENTITIES) {
            return Err(Full);
        }
        self.bytes = bytes;
        let expires = identity.constraints.expires;
        match self.set.replace(ByBlob(identity)) {
            // Nothing else depends on all the others: ten thousand additions take ten thousand steps.
            None => {
                self.next_expiry = self.next_expiry.into_iter().chain(expires).min();
                self.listing = OnceLock::new();
            }
            Some(_) => self.changed(),
        }
        Ok(())
    }

    /// Removes and returns the identity with this blob.
    pub fn remove(&mut self, blob: &[u8]) -> Option<Arc<Identity>> {
        let removed = self.set.shift_take(blob)?;
        self.changed();
        Some(removed.0)
    }

    /// Removes all identities and returns how many there were.
    pub fn clear(&mut self) -> usize {
        let count = self.set.len();
        self.set = IndexSet::new();
        self.changed();
        count
    }

    /// Removes the identities that `which` picks and returns how many there were.
    pub fn remove_where(&mut self, which: impl Fn(&Identity) -> bool) -> usize {
        let before = self.set.len();
        self.set.retain(|entry| !which(&entry.0));
        self.changed();
        before - self.set.len()
    }

    /// Removes what has expired and returns it.
    pub fn expire(&mut self, now: Duration) -> Vec<Arc<Identity>> {
        if self.next_expiry.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let mut gone = Vec::new();
        self.set.retain(|entry| {
            let expired = entry.0.constraints.expires.is_some_and(|at| at <= now);
            if expired {
                gone.push(Arc::clone(&entry.0));
            }
            !expired
        });
        self.changed();
        gone
    }

    /// When the next identity expires.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.next_expiry
    }

    /// All identities, with their cached listing.
    pub fn listing(&self) -> &Arc<Listing> {
        self.listing.get_or_init(|| Arc::new(Listing::of(self.iter().cloned().collect())))
    }

    /// All identities, in the order of their addition.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Identity>> {
        self.set.iter().map(|entry| &entry.0)
    }

    fn changed(&mut self) {
        self.listing = OnceLock::new();
        self.next_expiry = self.iter().filter_map(|identity| identity.constraints.expires).min();
        self.bytes = self.iter().map(|identity| size(identity)).sum();
    }
}

/// What an identity's sender decided the size of.
fn size(identity: &Identity) -> usize {
    let hop = |hop: &Hop| hop.user.len() + hop.host.len() + hop.keys.iter().map(|key| key.blob.len()).sum::<usize>();
    let destinations = identity.constraints.destinations.iter();
    identity.blob.len() + identity.comment.len() + destinations.map(|d| hop(&d.from) + hop(&d.to)).sum::<usize>()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        devices::soft::{SoftKey, SoftParts},
        public_key::{Curve, KeyType},
        vault::key::{Constraints, PrivateKey},
    };

    fn identity(blob: &[u8], comment: &str, expires: Option<u64>) -> Arc<Identity> {
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
        Arc::new(Identity {
            blob: blob.into(),
            key_type: KeyType::Ecdsa(Curve::P256),
            key: PrivateKey::Soft(Arc::new(key)),
            comment: comment.as_bytes().into(),
            constraints: Constraints { expires: expires.map(Duration::from_secs), ..Constraints::default() },
        })
    }

    fn comments(ring: &Keyring) -> Vec<String> {
        ring.listing().identities.iter().map(|i| String::from_utf8_lossy(&i.comment).into_owned()).collect()
    }

    #[test]
    fn adding_again_keeps_the_place_and_replaces_the_rest() {
        let mut ring = Keyring::default();
        for (blob, comment) in [(b"a", "a"), (b"b", "b"), (b"c", "c")] {
            ring.insert(identity(blob, comment, Some(5))).unwrap();
        }
        ring.insert(identity(b"b", "new", None)).unwrap();
        assert_eq!(comments(&ring), ["a", "new", "c"]);
        assert_eq!(ring.find(b"b", Duration::from_secs(9)).unwrap().constraints.expires, None);
        ring.remove(b"a").unwrap();
        assert_eq!(comments(&ring), ["new", "c"]);
    }

    #[test]
    fn what_has_expired_is_not_found_and_goes() {
        let mut ring = Keyring::default();
        ring.insert(identity(b"a", "a", Some(5))).unwrap();
        ring.insert(identity(b"b", "b", Some(7))).unwrap();
        assert_eq!(ring.next_expiry(), Some(Duration::from_secs(5)));
        assert!(ring.find(b"a", Duration::from_secs(4)).is_some());
        assert!(ring.find(b"a", Duration::from_secs(5)).is_none());
        assert_eq!(ring.expire(Duration::from_secs(4)).len(), 0);
        assert_eq!(ring.expire(Duration::from_secs(5)).len(), 1);
        assert_eq!((comments(&ring), ring.next_expiry()), (vec!["b".into()], Some(Duration::from_secs(7))));
        assert_eq!((ring.clear(), ring.next_expiry()), (1, None));
    }

    #[test]
    fn the_listing_is_encoded_once() {
        let mut ring = Keyring::default();
        ring.insert(identity(b"a", "a", None)).unwrap();
        assert_eq!(ring.listing().encoded(|ids| vec![u8::try_from(ids.len()).unwrap()]), [1]);
        assert_eq!(ring.listing().encoded(|_| vec![9]), [1]);
        ring.insert(identity(b"b", "b", None)).unwrap();
        assert_eq!(ring.listing().encoded(|ids| vec![u8::try_from(ids.len()).unwrap()]), [2]);
    }
}
