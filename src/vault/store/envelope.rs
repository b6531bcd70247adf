//! A record with what proves it whole, wherever it is found: the same bytes in redb and in the second copy. Knows no file.
//!
//! Each has its name, the number of the change that wrote it and a checksum, so that it can be picked out of a damaged file
//! without anything around it.

use aws_lc_rs::digest::{SHA256, digest};

use super::record::MAX_RECORD;
use crate::rfc4251::{Put, Reader};

/// What kind of thing a record is: the first byte of its name. In files: none is ever given another meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Table {
    /// What there is one of.
    Single = 1,
    /// A device's name → [`DeviceRecord`](super::record::DeviceRecord).
    Device = 2,
    /// `string` device's name, slot → the key in it.
    Place = 3,
    /// `string` token's serial, digest → [`MarkState`](super::record::MarkState).
    Mark = 4,
    /// `uint32` number → [`KeySlot`](super::KeySlot).
    Slot = 5,
    /// [`KeyId`](super::KeyId) → [`SealedKey`](super::SealedKey).
    Key = 6,
    /// An offer's id → [`SealedOffer`](super::SealedOffer).
    Offer = 7,
}

/// A record's name: its table's byte, then its name there.
pub(super) type Name = Vec<u8>;

/// The name of what is called `name` in `table`.
pub(super) fn name(table: Table, name: &[u8]) -> Name {
    let mut out = Vec::with_capacity(1 + name.len());
    out.push(table as u8);
    out.extend_from_slice(name);
    out
}

/// The name of `part` of `whole`; with an empty part, what all names of its parts begin with.
pub(super) fn part_name(table: Table, whole: &str, part: &[u8]) -> Name {
    let mut out = vec![table as u8];
    out.put_string(whole.as_bytes());
    out.extend_from_slice(part);
    out
}

/// Undoes [`part_name`], the table's byte taken off.
pub(super) fn parts(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut r = Reader::new(name);
    let whole = r.string().ok()?;
    Some((whole, r.rest()))
}

/// What each begins with.
pub(super) const MAGIC: [u8; 4] = *b"\x93SR1";
/// The longest name, in bytes.
const MAX_NAME: usize = 1024;
const CHECKSUM: usize = 16;

/// What a change made of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Envelope<'a> {
    /// The change's number; a record's latest has the highest.
    pub(super) sequence: u64,
    pub(super) name: &'a [u8],
    /// `None`: it was removed.
    pub(super) value: Option<&'a [u8]>,
}

impl<'a> Envelope<'a> {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let from = out.len();
        out.extend_from_slice(&MAGIC);
        out.push(u8::from(self.value.is_some()));
        out.put_u64(self.sequence);
        out.put_string(self.name);
        out.put_string(self.value.unwrap_or_default());
        let sum = digest(&SHA256, &out[from..]);
        out.extend_from_slice(&sum.as_ref()[..CHECKSUM]);
    }

    /// The one at the beginning of `bytes`, and how long it is. `None` where there is none that is whole.
    pub(super) fn decode(bytes: &'a [u8]) -> Option<(Self, usize)> {
        let (envelope, len) = Self::unproved(bytes)?;
        let sum = bytes.get(len..len + CHECKSUM)?;
        (digest(&SHA256, &bytes[..len]).as_ref()[..CHECKSUM] == *sum).then_some((envelope, len + CHECKSUM))
    }

    /// The one that is exactly `bytes`.
    pub(super) fn decode_all(bytes: &'a [u8]) -> Option<Self> {
        Self::decode(bytes).filter(|(_, len)| *len == bytes.len()).map(|(envelope, _)| envelope)
    }

    /// What seems to be one at the beginning of `bytes`, and its length without the checksum: good for saying what was
    /// lost, and for nothing else.
    pub(super) fn unproved(bytes: &'a [u8]) -> Option<(Self, usize)> {
        let mut r = Reader::new(bytes);
        if r.take(MAGIC.len()).ok()? != MAGIC {
            return None;
        }
        let present = match r.u8().ok()? {
            0 => false,
            1 => true,
            _ => return None,
        };
        let sequence = r.u64().ok()?;
        let name = r.string().ok().filter(|name| (1..=MAX_NAME).contains(&name.len()))?;
        let value = r.string().ok().filter(|value| value.len() <= MAX_RECORD && (present || value.is_empty()))?;
        let envelope = Self { sequence, name, value: present.then_some(value) };
        Some((envelope, bytes.len() - r.rest().len()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_reads_back_as_it_was_written_and_not_when_changed(
            sequence: u64,
            name in prop::collection::vec(any::<u8>(), 1..50),
            value: Option<Vec<u8>>,
            at: prop::sample::Index,
            bit in 0u8..8,
            behind: Vec<u8>,
        ) {
            let envelope = Envelope { sequence, name: &name, value: value.as_deref() };
            let mut bytes = Vec::new();
            envelope.encode(&mut bytes);
            prop_assert_eq!(Envelope::decode_all(&bytes), Some(envelope));
            let whole = bytes.len();
            bytes.extend(&behind);
            prop_assert_eq!(Envelope::decode(&bytes), Some((envelope, whole)));
            let at = at.index(whole);
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Envelope::decode(&bytes), None);
            prop_assert_eq!(Envelope::decode(&bytes[..whole - 1]), None);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Envelope::decode(&[&MAGIC[..], &[1], &bytes].concat());
        }
    }

    #[test]
    fn names_of_parts_lead_back_and_do_not_mix() {
        let name = part_name(Table::Place, "hsm", b"slot");
        assert_eq!(parts(&name[1..]), Some((&b"hsm"[..], &b"slot"[..])));
        assert!(!part_name(Table::Place, "hsm2", b"").starts_with(&part_name(Table::Place, "hsm", b"")));
        assert_eq!(parts(b"\0\0\0\x04hsm"), None);
    }
}
