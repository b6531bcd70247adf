//! What can be read of damaged files, record by record. Knows envelopes and frames; opens no file.
//!
//! Each record is picked out by its envelope wherever it is, and the one with the highest number counts. A redb file also
//! holds what was overwritten or removed long ago: such a record is believed only where the second copy does not say
//! otherwise, that is, where what the copy would say of it is damaged too.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    copy::{self, Frame, Kind, envelopes},
    envelope::{self, Envelope, Name, Table},
    sealed::{KeyId, Metadata},
    tables::{Records, StoreId},
};
use crate::rfc4251::Reader;

/// The most things that are named as lost.
const MAX_LOST: usize = 1000;

/// What was read.
pub(super) struct Salvaged {
    pub(super) records: Records,
    /// The highest number of a change.
    pub(super) sequence: u64,
    /// What is known to be missing, for people.
    pub(super) lost: Vec<String>,
}

/// The latest that is known of each record; `None` for one that was removed.
type Latest = BTreeMap<Name, (u64, Option<Vec<u8>>)>;

/// Reads what is whole in the bytes of both files.
pub(super) fn salvage(main: &[u8], copy: &[u8]) -> Salvaged {
    let mut scan = Scan::of(copy);
    let mut torn = std::mem::take(&mut scan.torn);
    let mut found = std::mem::take(&mut scan.latest);
    each(main, &envelope::MAGIC, |bytes| match Envelope::decode(bytes) {
        Some((envelope, len)) => {
            if envelope.value.is_some() && !scan.speaks_of(&envelope) {
                take(&mut found, &envelope);
            }
            len
        }
        None => {
            torn.extend(Envelope::unproved(bytes).map(|(envelope, _)| owned(&envelope)));
            1
        }
    });
    let mut lost = BTreeSet::new();
    for (name, sequence, value) in torn {
        let known = found.get(&name).is_some_and(|(known, _)| *known >= sequence);
        let old = scan.speaks_of(&Envelope { sequence, name: &name, value: Some(&[]) });
        if !known && !old && lost.len() < MAX_LOST {
            lost.extend(described(&name, &value));
        }
    }
    let sequence = found.values().map(|(sequence, _)| *sequence).max().unwrap_or_default();
    let records = found.into_iter().filter_map(|(name, (sequence, value))| Some((name, (sequence, value?)))).collect();
    Salvaged { records, sequence, lost: lost.into_iter().collect() }
}

/// Brings `records`, all those of store `id` as of change `sequence`, up to date with what a damaged copy holds of later ones. `None`
/// when it holds none. Says as well whether none is missing in between.
pub(super) fn later(id: &StoreId, records: &Records, sequence: u64, copy: &[u8]) -> Option<(Records, u64, bool)> {
    let scan = Scan::of(copy);
    if scan.id.is_some_and(|other| other != *id) {
        return None;
    }
    let last = scan.changes.range(sequence + 1..).next_back().copied()?;
    let complete = (sequence + 1..=last).all(|n| scan.changes.contains(&n));
    let mut records = records.clone();
    for (name, (at, value)) in scan.latest.into_iter().filter(|(_, (at, _))| *at > sequence) {
        match value {
            Some(value) => records.insert(name, (at, value)),
            None => records.remove(&name),
        };
    }
    Some((records, last, complete))
}

/// What a damaged copy holds, and of what it does not speak.
#[derive(Default)]
struct Scan {
    latest: Latest,
    /// Whose it is, where its first frame is whole.
    id: Option<StoreId>,
    /// The change up to which the snapshot goes, where its first frame is whole.
    snapshot: Option<u64>,
    /// The changes whose frames are whole.
    changes: BTreeSet<u64>,
    /// Between which names the snapshot has a hole; `None` for its beginning or end.
    holes: Vec<(Option<Name>, Option<Name>)>,
    /// What seems to have been a record.
    torn: Vec<(Name, u64, Vec<u8>)>,
}

impl Scan {
    fn of(bytes: &[u8]) -> Self {
        let mut scan = Self::default();
        let (mut parts, mut whole_parts) = (None, 0);
        let mut before: Option<Name> = None;
        let mut damaged = true;
        let mut expected = 0;
        each(bytes, &copy::MAGIC[..2], |rest| {
            let at = bytes.len() - rest.len();
            damaged |= at != expected;
            let len = match Frame::decode(rest) {
                Some(frame) => {
                    let body = envelopes(frame.body).unwrap_or_default();
                    match frame.kind {
                        Kind::Begin => {
                            scan.snapshot = Some(frame.sequence);
                            (scan.id, parts) = frame.begin().map(|(id, parts, _)| (id, parts)).unzip();
                            damaged = false;
                        }
                        Kind::Part => {
                            whole_parts += 1;
                            let first = body.first().map(|envelope| envelope.name.to_vec());
                            if std::mem::take(&mut damaged) {
                                scan.holes.push((before.take(), first));
                            }
                            before = body.last().map(|envelope| envelope.name.to_vec());
                        }
                        Kind::Change => {
                            // What is damaged right before the first change may have been the snapshot's end.
                            if scan.changes.is_empty() && damaged && parts != Some(whole_parts) {
                                scan.holes.push((before.take(), None));
                            }
                            scan.changes.insert(frame.sequence);
                        }
                    }
                    body.iter().for_each(|envelope| take(&mut scan.latest, envelope));
                    frame.len
                }
                None => {
                    damaged = true;
                    match Envelope::decode(rest) {
                        Some((envelope, len)) => {
                            take(&mut scan.latest, &envelope);
                            len
                        }
                        None => {
                            scan.torn.extend(Envelope::unproved(rest).map(|(envelope, _)| owned(&envelope)));
                            1
                        }
                    }
                }
            };
            expected = at + len;
            len
        });
        if scan.changes.is_empty() && parts != Some(whole_parts) {
            scan.holes.push((before, None));
        }
        scan
    }

    /// Whether the copy says all that there is to say of a record as it was at some change: if it does not hold it, it is
    /// gone, or was never acknowledged.
    fn speaks_of(&self, envelope: &Envelope<'_>) -> bool {
        match self.snapshot {
            Some(snapshot) if envelope.sequence > snapshot => self.changes.contains(&envelope.sequence),
            Some(_) => !self.holes.iter().any(|(from, to)| {
                from.as_deref().is_none_or(|from| from < envelope.name)
                    && to.as_deref().is_none_or(|to| envelope.name < to)
            }),
            None => false,
        }
    }
}

/// Calls `take` wherever `magic` is; it says how far to go on.
fn each(bytes: &[u8], magic: &[u8], mut take: impl FnMut(&[u8]) -> usize) {
    let mut at = 0;
    while let Some(next) = bytes[at..].windows(magic.len()).position(|window| window == magic) {
        at += next;
        at += take(&bytes[at..]).max(1);
        if at >= bytes.len() {
            break;
        }
    }
}

fn take(latest: &mut Latest, envelope: &Envelope<'_>) {
    if latest.get(envelope.name).is_none_or(|(known, _)| *known < envelope.sequence) {
        let value = envelope.value.map(<[u8]>::to_vec);
        latest.insert(envelope.name.to_vec(), (envelope.sequence, value));
    }
}

fn owned(envelope: &Envelope<'_>) -> (Name, u64, Vec<u8>) {
    (envelope.name.to_vec(), envelope.sequence, envelope.value.unwrap_or_default().to_vec())
}

/// What a record was, for people, as far as its name tells. `None` when it is none of ours.
fn described(name: &[u8], value: &[u8]) -> Option<String> {
    let (&table, name) = name.split_first()?;
    let text = |bytes: &[u8]| super::contents::shown(bytes).to_string();
    let of_parts =
        |what: &str| envelope::parts(name).map(|(whole, part)| (text(whole), format!("{what} {}", text(part))));
    Some(match table {
        t if t == Table::Single as u8 => format!("the record {}", text(name)),
        t if t == Table::Device as u8 => format!("device {}", text(name)),
        t if t == Table::Place as u8 => of_parts("key").map(|(device, key)| format!("{key} on device {device}"))?,
        t if t == Table::Mark as u8 => of_parts("").map(|(serial, _)| format!("a refused PIN of token {serial}"))?,
        t if t == Table::Slot as u8 => format!("slot {}", u32::from_be_bytes(name.try_into().ok()?)),
        t if t == Table::Key as u8 => {
            let id: [u8; 32] = name.try_into().ok()?;
            let mut r = Reader::new(value);
            let metadata = r.u8().and_then(|_| r.string()).ok().and_then(|bytes| Metadata::decode(bytes).ok());
            let called = metadata.map_or(String::new(), |metadata| format!(" {:?}", metadata.name));
            format!("key{called} {}", KeyId(id))
        }
        t if t == Table::Offer as u8 => "the offer of a transfer".to_owned(),
        _ => return None,
    })
}
