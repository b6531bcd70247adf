//! Offers of transfers as they are stored: what the source gets in the open, its private key sealed. Knows neither what an
//! offer says nor how long it is good.

use zeroize::Zeroizing;

use super::{
    MasterKey, SealError, SealedKey, Store, StoreError, changes,
    envelope::{Table, name},
    master::{open as open_sealed, seal},
    record::{RecordError, VERSION, open},
    sealed::{NONCE, TAG},
    tables::{Change, Fault},
};
use crate::rfc4251::{Put, Reader};

/// What the associated data begins with.
const OFFER: &[u8] = b"strongroom offer key 1";
/// The most offers at a time.
pub const MAX_OFFERS: usize = 16;
/// The longest offer, in bytes.
const MAX_OFFER: usize = 1024;
/// The longest private key of one, in bytes.
const MAX_KEY: usize = 64;

/// An offer with its private key sealed. Made by [`MasterKey::seal_offer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedOffer {
    id: [u8; 16],
    offer: Box<[u8]>,
    nonce: [u8; NONCE],
    /// With the tag at its end.
    ciphertext: Box<[u8]>,
}

impl SealedOffer {
    /// What it is known by.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// The offer, as the source has it.
    pub fn offer(&self) -> &[u8] {
        &self.offer
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.put_string(&self.offer);
        out.extend_from_slice(&self.nonce);
        out.put_string(&self.ciphertext);
        out
    }

    fn decode(id: &[u8], bytes: &[u8]) -> Result<Self, RecordError> {
        const INVALID: RecordError = RecordError::Invalid("an offer is too long, or its name is none");
        let id = id.try_into().map_err(|_| INVALID)?;
        let mut r: Reader<'_> = open(bytes)?;
        let offer = r.string()?;
        let mut nonce = [0; NONCE];
        nonce.copy_from_slice(r.take(NONCE)?);
        let ciphertext = r.string()?;
        r.finish()?;
        if offer.len() > MAX_OFFER || !(TAG..=MAX_KEY + TAG).contains(&ciphertext.len()) {
            return Err(INVALID);
        }
        Ok(Self { id, offer: offer.into(), nonce, ciphertext: ciphertext.into() })
    }

    fn associated(id: &[u8; 16], offer: &[u8]) -> Vec<u8> {
        [OFFER, id, offer].concat()
    }
}

impl MasterKey {
    /// Seals the private key of an offer, at most 64 bytes, under the offer, at most 1024 bytes.
    pub fn seal_offer(&self, id: [u8; 16], offer: &[u8], key: &[u8]) -> Result<SealedOffer, SealError> {
        if offer.len() > MAX_OFFER || key.len() > MAX_KEY {
            return Err(SealError::TooLong("the offer is too long"));
        }
        let (nonce, ciphertext) = seal(self.bytes(), &SealedOffer::associated(&id, offer), key)?;
        Ok(SealedOffer { id, offer: offer.into(), nonce, ciphertext })
    }

    /// The private key again.
    pub fn open_offer(&self, sealed: &SealedOffer) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let associated = SealedOffer::associated(&sealed.id, &sealed.offer);
        open_sealed(self.bytes(), &associated, &sealed.nonce, &sealed.ciphertext).ok_or(SealError::Damaged)
    }
}

impl Store {
    /// The offers that are open. One whose record is damaged is none.
    pub async fn offers(&self) -> Result<Vec<SealedOffer>, StoreError> {
        self.run(|ledger| {
            let mut offers = Vec::new();
            // A change that changes nothing.
            ledger.keep(|change| {
                let records = change.under(&[Table::Offer as u8])?;
                offers.extend(records.iter().filter_map(|(name, value)| SealedOffer::decode(&name[1..], value).ok()));
                Ok(())
            })?;
            Ok(offers)
        })
        .await?
    }

    /// Keeps an offer, and drops those that are not good any more. [`TooMany`](StoreError::TooMany) above [`MAX_OFFERS`].
    pub async fn put_offer(&self, offer: SealedOffer, drop: Vec<[u8; 16]>) -> Result<(), StoreError> {
        self.run(move |ledger| {
            ledger.keep_stored(|change| {
                drop_all(change, &drop)?;
                if change.count(&[Table::Offer as u8])? >= MAX_OFFERS {
                    return Err(Fault::Refused(StoreError::TooMany { what: "offers", max: MAX_OFFERS }));
                }
                change.put(&name(Table::Offer, &offer.id), &offer.encode())
            })
        })
        .await?
    }

    /// Drops offers.
    pub async fn drop_offers(&self, drop: Vec<[u8; 16]>) -> Result<(), StoreError> {
        self.run(move |ledger| ledger.keep_stored(|change| drop_all(change, &drop))).await?
    }

    /// Keeps the keys that came for an offer and drops it, in one step. `false` when it is not open, and nothing was kept.
    pub async fn accept_offer(&self, id: [u8; 16], keys: Vec<SealedKey>) -> Result<bool, StoreError> {
        self.run(move |ledger| {
            let mut open = false;
            ledger.keep_stored(|change| {
                open = change.remove(&name(Table::Offer, &id))?;
                if open { changes::replace_keys(change, &[], &keys) } else { Ok(()) }
            })?;
            Ok(open)
        })
        .await?
    }
}

fn drop_all(change: &mut Change<'_>, ids: &[[u8; 16]]) -> Result<(), Fault> {
    ids.iter().try_for_each(|id| change.remove(&name(Table::Offer, id)).map(drop))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_offers_key_opens_under_its_master_key_and_offer_only() {
        let [master, other] = [(); 2].map(|()| MasterKey::generate().unwrap());
        let sealed = master.seal_offer([7; 16], b"offer", &[9; 32]).unwrap();
        assert_eq!(SealedOffer::decode(&[7; 16], &sealed.encode()).unwrap(), sealed);
        assert_eq!(**master.open_offer(&sealed).unwrap(), [9; 32]);
        assert_eq!(other.open_offer(&sealed).unwrap_err(), SealError::Damaged);
        for changed in
            [SealedOffer { id: [8; 16], ..sealed.clone() }, SealedOffer { offer: (*b"other").into(), ..sealed.clone() }]
        {
            assert_eq!(master.open_offer(&changed).unwrap_err(), SealError::Damaged);
        }
        assert!(master.seal_offer([7; 16], &[0; MAX_OFFER + 1], &[9; 32]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = SealedOffer::decode(&[7; 16], &bytes);
            let _ = SealedOffer::decode(&[7; 16], &[&[VERSION], &bytes[..]].concat());
        }
    }
}
