//! Transfers of keys between vaults, as between HSMs: the target offers a public key, the source wraps keys for it, the
//! target accepts them. Knows what the two send each other, and HPKE (RFC 9180); neither a store nor a file system.
//!
//! A person carries the two, over whatever may change them, and compares fingerprints. That of the offer comes before the
//! source wraps anything: an offer that was exchanged would have the keys wrapped for somebody else. That of both together,
//! which source and target show, tells that what is accepted is what was wrapped.
//!
//! The key schedule's `info` is the offer's hash, the associated data is all of the wrap that is not encrypted: nothing of
//! either can be changed without the keys failing to open.

use aws_lc_rs::{
    digest::{self, SHA256, digest},
    rand,
};
use base64ct::{Base64Unpadded, Encoding};
use hpke::{
    Deserializable, Kem, OpModeR, OpModeS, Serializable, aead::ChaCha20Poly1305, kdf::HkdfSha256,
    kem::X25519HkdfSha256 as X25519, rand_core,
};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{
    carried::{self, CarriedError, CarriedKey, MAX_CARRIED},
    store::KeyId,
};
use crate::rfc4251::{Put, Reader, WireError};

/// How long an offer is good for, in seconds.
pub const VALID_FOR: u64 = 24 * 60 * 60;
/// By how much the clocks of the two may differ, in seconds.
const SKEW: u64 = 10 * 60;
/// The longest name of a vault in an offer, in bytes.
pub const MAX_NAME: usize = 128;
/// The longest offer, in bytes.
pub const MAX_OFFER: usize = 512;
/// The longest wrap, in bytes.
pub const MAX_WRAP: usize = MAX_CARRIED + 512;

const OFFER: &[u8] = b"strongroom offer 1\n";
const WRAP: &[u8] = b"strongroom wrap 1\n";
const INFO: &[u8] = b"strongroom transfer 1";
const FINGERPRINT: &[u8] = b"strongroom transfer fingerprint 1";

/// Why a transfer comes to nothing.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TransferError {
    /// The bytes are no offer.
    #[error("this is no offer that this version knows; the target's `strongroom transfer offer` makes one")]
    NoOffer,
    /// The bytes are no wrap.
    #[error("this is no wrap that this version knows; the source's `strongroom transfer wrap` makes one")]
    NoWrap,
    /// The offer is older than a day.
    #[error("the offer is older than 24 hours: have the target make another")]
    Expired,
    /// The offer is from the future.
    #[error("the offer is from the future: set the clock of this machine, or of the target")]
    FromTheFuture,
    /// The wrap answers another offer, one that was accepted, or none of this vault's.
    #[error("the wrap answers none of this vault's offers: each is good for one wrap and 24 hours")]
    UnknownOffer,
    /// These keys may not leave their store.
    #[error("{} of these keys cannot leave the store: only keys made with `--exportable` can", .0.len())]
    NotExportable(Vec<KeyId>),
    /// No key was chosen.
    #[error("there is no key to transfer")]
    Nothing,
    /// The offer or the wrap was changed on its way, or a fingerprint was not that of both.
    #[error("the offer or the wrap was changed on its way: nothing was accepted")]
    Changed,
    /// What was wrapped are no keys.
    #[error(transparent)]
    Carried(#[from] CarriedError),
    /// The system gives no random numbers, or the arithmetic failed.
    #[error("the keys could not be wrapped")]
    Failed,
}

/// What an offer is known by.
pub type OfferId = [u8; 16];

/// What the target gives to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// 16 random bytes.
    pub id: OfferId,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// What the target calls itself, at most [`MAX_NAME`] bytes. Anybody can write any name.
    pub name: String,
    public: [u8; 32],
}

/// The private key of an offer, which the target keeps: sealed, until it is accepted or too old. Wiped when it is dropped;
/// it has no `Debug`.
pub struct OfferKey(Zeroizing<[u8; 32]>);

impl OfferKey {
    /// The key itself, to be sealed.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// What [`bytes`](Self::bytes) gave.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(|bytes| Self(Zeroizing::new(bytes)))
    }
}

impl Offer {
    /// A new offer and its key. A name that is too long is cut.
    pub fn new(name: &str, now: u64) -> Result<(Self, OfferKey), TransferError> {
        let (mut id, mut seed) = (OfferId::default(), Zeroizing::new([0; 32]));
        rand::fill(&mut id).and_then(|()| rand::fill(&mut *seed)).map_err(|_| TransferError::Failed)?;
        let (private, public) = X25519::derive_keypair(&*seed);
        let mut key = Zeroizing::new([0; 32]);
        private.write_exact(&mut *key);
        let name = name[..name.floor_char_boundary(MAX_NAME)].to_owned();
        Ok((Self { id, created: now, name, public: public.to_bytes().into() }, OfferKey(key)))
    }

    /// The offer as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = OFFER.to_vec();
        out.extend_from_slice(&self.id);
        out.put_u64(self.created);
        out.put_string(self.name.as_bytes());
        out.extend_from_slice(&self.public);
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, TransferError> {
        let read = |bytes: &[u8]| {
            let mut r = Reader::new(bytes);
            let (id, created) = (array(&mut r)?, r.u64()?);
            let name = std::str::from_utf8(r.string()?).map_err(|_| WireError::NotText)?;
            let offer = Self { id, created, name: name.to_owned(), public: array(&mut r)? };
            r.finish()?;
            Ok::<_, WireError>(offer)
        };
        if bytes.len() > MAX_OFFER {
            return Err(TransferError::NoOffer);
        }
        let offer = bytes.strip_prefix(OFFER).and_then(|rest| read(rest).ok());
        offer.filter(|offer| offer.name.len() <= MAX_NAME).ok_or(TransferError::NoOffer)
    }

    /// Whether it is good at this time.
    pub fn check(&self, now: u64) -> Result<(), TransferError> {
        if self.created > now.saturating_add(SKEW) {
            return Err(TransferError::FromTheFuture);
        }
        if self.created.saturating_add(VALID_FOR) < now { Err(TransferError::Expired) } else { Ok(()) }
    }

    /// What both sides show of the offer, before keys are wrapped for it.
    pub fn fingerprint(&self) -> String {
        fingerprint(&[&self.encode()])
    }

    fn info(&self) -> Vec<u8> {
        [INFO, digest(&SHA256, &self.encode()).as_ref()].concat()
    }
}

/// What the source gives to the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrap {
    /// The offer that it answers.
    pub offer: OfferId,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The source's public key, made for this wrap alone.
    encapsulated: [u8; 32],
    ciphertext: Vec<u8>,
}

impl Wrap {
    /// Wraps keys for an offer whose fingerprint a person has compared. All of them must be exportable.
    pub fn new(offer: &Offer, keys: &[CarriedKey], now: u64) -> Result<Self, TransferError> {
        offer.check(now)?;
        if keys.is_empty() {
            return Err(TransferError::Nothing);
        }
        let kept: Vec<_> = keys.iter().filter(|key| !key.metadata.exportable).collect();
        if !kept.is_empty() {
            return Err(TransferError::NotExportable(kept.iter().map(|key| KeyId::of(&key.metadata.blob)).collect()));
        }
        let mut plain = carried::encode(keys, now)?;
        let public = <X25519 as Kem>::PublicKey::from_bytes(&offer.public).map_err(|_| TransferError::NoOffer)?;
        let (encapsulated, mut context) = hpke::setup_sender::<ChaCha20Poly1305, HkdfSha256, X25519, _>(
            &OpModeS::Base,
            &public,
            &offer.info(),
            &mut Random,
        )
        .map_err(|_| TransferError::NoOffer)?;
        let encapsulated = encapsulated.to_bytes().into();
        let mut wrap = Self { offer: offer.id, created: now, encapsulated, ciphertext: Vec::new() };
        let tag = context.seal_in_place_detached(&mut plain, &wrap.head()).map_err(|_| TransferError::Failed)?;
        wrap.ciphertext = [&plain[..], &tag.to_bytes()].concat();
        Ok(wrap)
    }

    /// What is not encrypted.
    fn head(&self) -> Vec<u8> {
        let mut out = WRAP.to_vec();
        out.extend_from_slice(&self.offer);
        out.put_u64(self.created);
        out.extend_from_slice(&self.encapsulated);
        out
    }

    /// The wrap as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.head();
        out.put_string(&self.ciphertext);
        out
    }

    /// Reads what [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, TransferError> {
        let read = |bytes: &[u8]| {
            let mut r = Reader::new(bytes);
            let (offer, created, encapsulated) = (array(&mut r)?, r.u64()?, array(&mut r)?);
            let ciphertext = r.string()?.to_vec();
            r.finish()?;
            Ok::<_, WireError>(Self { offer, created, encapsulated, ciphertext })
        };
        if bytes.len() > MAX_WRAP {
            return Err(TransferError::NoWrap);
        }
        bytes.strip_prefix(WRAP).and_then(|rest| read(rest).ok()).ok_or(TransferError::NoWrap)
    }

    /// The one fingerprint over offer and wrap, which source and target show.
    pub fn fingerprint(&self, offer: &Offer) -> String {
        fingerprint(&[&offer.encode(), &self.encode()])
    }

    /// The keys, for the vault that made the offer. Whoever calls it forgets the offer's key afterwards, and has had a
    /// person compare the fingerprint before.
    pub fn accept(&self, offer: &Offer, key: &OfferKey, now: u64) -> Result<Vec<CarriedKey>, TransferError> {
        if self.offer != offer.id {
            return Err(TransferError::UnknownOffer);
        }
        offer.check(now)?;
        let encapsulated =
            <X25519 as Kem>::EncappedKey::from_bytes(&self.encapsulated).map_err(|_| TransferError::Changed)?;
        let private = <X25519 as Kem>::PrivateKey::from_bytes(&*key.0).map_err(|_| TransferError::Failed)?;
        let mut context = hpke::setup_receiver::<ChaCha20Poly1305, HkdfSha256, X25519>(
            &OpModeR::Base,
            &private,
            &encapsulated,
            &offer.info(),
        )
        .map_err(|_| TransferError::Changed)?;
        let plain = context.open(&self.ciphertext, &self.head()).map_err(|_| TransferError::Changed)?;
        let (_, keys) = carried::decode(&Zeroizing::new(plain))?;
        // The source does not wrap such keys; whatever wrapped them here was no vault of ours.
        if keys.is_empty() || keys.iter().any(|key| !key.metadata.exportable || key.to_file().is_err()) {
            return Err(TransferError::Changed);
        }
        Ok(keys)
    }
}

fn array<const N: usize>(r: &mut Reader<'_>) -> Result<[u8; N], WireError> {
    r.take(N)?.try_into().map_err(|_| WireError::Truncated)
}

/// `SHA256:` and base64, as of keys. Each part's length is hashed with it, so that nothing can move from one to the other.
fn fingerprint(parts: &[&[u8]]) -> String {
    let mut context = digest::Context::new(&SHA256);
    context.update(FINGERPRINT);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    format!("SHA256:{}", Base64Unpadded::encode_string(context.finish().as_ref()))
}

/// aws-lc's random numbers, for HPKE.
struct Random;

impl rand_core::RngCore for Random {
    fn next_u32(&mut self) -> u32 {
        rand_core::impls::next_u32_via_fill(self)
    }

    fn next_u64(&mut self) -> u64 {
        rand_core::impls::next_u64_via_fill(self)
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        // aws-lc does the same where the system gives no random numbers, rather than to go on without them.
        if rand::fill(bytes).is_err() {
            std::process::abort();
        }
    }
}

impl rand_core::CryptoRng for Random {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{super::carried::tests::key, *};
    use proptest::prelude::*;

    const NOW: u64 = 1_700_000_000;

    /// An offer as the target keeps it, and a wrap of two keys for it.
    fn transfer() -> (Offer, OfferKey, Wrap) {
        let (offer, own) = Offer::new("target", NOW).unwrap();
        let wrap = Wrap::new(&offer, &[key(1, true), key(2, true)], NOW).unwrap();
        (offer, own, wrap)
    }

    #[test]
    fn keys_go_from_one_vault_to_the_other() {
        let (offer, own, wrap) = transfer();
        // Both travel as bytes.
        let at_source = Offer::decode(&offer.encode()).unwrap();
        assert_eq!((&at_source, at_source.fingerprint()), (&offer, offer.fingerprint()));
        let at_target = Wrap::decode(&wrap.encode()).unwrap();
        assert_eq!(at_target, wrap);
        assert_eq!(at_target.fingerprint(&offer), wrap.fingerprint(&at_source));
        let own = OfferKey::from_bytes(own.bytes()).unwrap();
        let keys = at_target.accept(&offer, &own, NOW).unwrap();
        assert_eq!(keys.len(), 2);
        assert_eq!((&keys[1].metadata, &keys[1].secret), (&key(2, true).metadata, &key(2, true).secret));
        // Nothing of the keys is to be seen in between, and no two wraps are the same.
        assert!(!wrap.encode().windows(8).any(|window| window == [1; 8]));
        assert_ne!(Wrap::new(&offer, &[key(1, true)], NOW).unwrap(), Wrap::new(&offer, &[key(1, true)], NOW).unwrap());
    }

    #[test]
    fn what_is_not_exportable_stays() {
        let (offer, _) = Offer::new("target", NOW).unwrap();
        let refused = Wrap::new(&offer, &[key(1, true), key(2, false)], NOW).unwrap_err();
        assert_eq!(refused, TransferError::NotExportable(vec![KeyId::of(&key(2, false).metadata.blob)]));
        assert_eq!(Wrap::new(&offer, &[], NOW).unwrap_err(), TransferError::Nothing);
    }

    #[test]
    fn an_offer_has_its_time() {
        let (offer, own, wrap) = transfer();
        let at = |now| {
            (offer.check(now), Wrap::new(&offer, &[key(1, true)], now).err(), wrap.accept(&offer, &own, now).err())
        };
        assert_eq!(at(NOW + VALID_FOR), (Ok(()), None, None));
        assert_eq!(at(NOW - SKEW), (Ok(()), None, None));
        let late = TransferError::Expired;
        assert_eq!(at(NOW + VALID_FOR + 1), (Err(late.clone()), Some(late.clone()), Some(late)));
        let early = TransferError::FromTheFuture;
        assert_eq!(at(NOW - SKEW - 1), (Err(early.clone()), Some(early.clone()), Some(early)));
    }

    #[test]
    fn an_exchanged_offer_shows() {
        let (offer, own, _) = transfer();
        // Somebody in between offers a key of his own under the same name and number.
        let (his, his_key) = Offer::new("target", NOW).unwrap();
        let his = Offer { id: offer.id, ..his };
        assert_ne!(his.fingerprint(), offer.fingerprint());
        let wrap = Wrap::new(&his, &[key(1, true)], NOW).unwrap();
        assert!(wrap.accept(&his, &his_key, NOW).is_ok());
        assert_eq!(wrap.accept(&offer, &own, NOW).unwrap_err(), TransferError::Changed);
        assert_ne!(wrap.fingerprint(&his), wrap.fingerprint(&offer));
    }

    #[test]
    fn an_exchanged_wrap_shows() {
        let (offer, own, wrap) = transfer();
        // The offer is public: anybody can wrap keys for it. The fingerprint tells.
        let other = Wrap::new(&offer, &[key(9, true)], NOW).unwrap();
        assert!(other.accept(&offer, &own, NOW).is_ok());
        assert_ne!(other.fingerprint(&offer), wrap.fingerprint(&offer));
        // A wrap for another offer, or one whose number was changed.
        let (another, _, for_another) = transfer();
        assert_eq!(for_another.accept(&offer, &own, NOW).unwrap_err(), TransferError::UnknownOffer);
        let moved = Wrap { offer: offer.id, ..for_another };
        assert_eq!(moved.accept(&offer, &own, NOW).unwrap_err(), TransferError::Changed);
        assert_ne!(another.fingerprint(), offer.fingerprint());
    }

    #[test]
    fn wrapped_by_somebody_who_minds_no_rules() {
        let (offer, own, wrap) = transfer();
        let sealed = |keys: &[CarriedKey]| {
            let mut wrap = Wrap { ciphertext: Vec::new(), ..wrap.clone() };
            let public = <X25519 as Kem>::PublicKey::from_bytes(&offer.public).unwrap();
            let (encapsulated, mut context) = hpke::setup_sender::<ChaCha20Poly1305, HkdfSha256, X25519, _>(
                &OpModeS::Base,
                &public,
                &offer.info(),
                &mut Random,
            )
            .unwrap();
            wrap.encapsulated = encapsulated.to_bytes().into();
            wrap.ciphertext = context.seal(&carried::encode(keys, NOW).unwrap(), &wrap.head()).unwrap();
            wrap
        };
        assert!(sealed(&[key(1, true)]).accept(&offer, &own, NOW).is_ok());
        let mismatched = CarriedKey { secret: Zeroizing::new(vec![2; 32]), ..key(1, true) };
        for keys in [&[][..], &[key(1, false)], &[mismatched]] {
            assert_eq!(sealed(keys).accept(&offer, &own, NOW).unwrap_err(), TransferError::Changed);
        }
    }

    #[test]
    fn a_name_is_cut_where_it_is_too_long() {
        let (offer, _) = Offer::new(&"ü".repeat(100), NOW).unwrap();
        assert_eq!(offer.name.len(), MAX_NAME);
        assert_eq!(Offer::decode(&offer.encode()).unwrap(), offer);
        let long = Offer { name: "x".repeat(MAX_NAME + 1), ..offer };
        assert_eq!(Offer::decode(&long.encode()).unwrap_err(), TransferError::NoOffer);
    }

    proptest! {
        #[test]
        fn a_changed_wrap_is_not_accepted(at: prop::sample::Index, bit in 0u8..8) {
            let (offer, own, wrap) = transfer();
            let mut bytes = wrap.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(changed) = Wrap::decode(&bytes) {
                prop_assert!(changed.accept(&offer, &own, NOW).is_err());
                prop_assert_ne!(changed.fingerprint(&offer), wrap.fingerprint(&offer));
            }
            prop_assert!(Wrap::decode(&bytes[..at]).is_err());
        }

        #[test]
        fn a_changed_offer_is_wrapped_for_nobody(at: prop::sample::Index, bit in 0u8..8) {
            let (offer, own, _) = transfer();
            let mut bytes = offer.encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Offer::decode(&bytes[..at]).is_err());
            let Ok(changed) = Offer::decode(&bytes) else { return Ok(()) };
            prop_assert_ne!(changed.fingerprint(), offer.fingerprint());
            if let Ok(wrap) = Wrap::new(&changed, &[key(1, true)], NOW) {
                prop_assert!(wrap.accept(&offer, &own, NOW).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            for magic in [&[][..], OFFER, WRAP] {
                let bytes = [magic, &bytes].concat();
                let _ = Offer::decode(&bytes);
                let _ = Wrap::decode(&bytes);
            }
        }
    }
}
