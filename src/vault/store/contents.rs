//! What the records say, all of them together. Knows no file.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{error, warn};

use super::{
    KeySlot, KnownDevice, SealedKey,
    envelope::{Table, name, parts},
    marks::{Digest, MAX_MARKS},
    record::{self, DeviceRecord, MarkSecret, MarkState},
    slot::MAX_SLOTS,
    tables::{AUDIT_HEAD, Fault, MARK_SECRET, PINS_HELD, Records},
};
use crate::{
    devices::{MAX_KEYS, MAX_LABEL},
    vault::audit::Head,
};

/// The most devices that are remembered: as many as a configuration may have.
const MAX_DEVICES: usize = 1024;
/// The most keys that a store takes.
pub(super) const MAX_STORED: usize = 65_536;

/// What was in the file.
pub(super) struct Contents {
    pub(super) devices: Vec<KnownDevice>,
    pub(super) secret: MarkSecret,
    pub(super) marks: Vec<(String, Digest, MarkState)>,
    /// While PINs are held, the serials of the tokens whose PINs were released again.
    pub(super) held: Option<BTreeSet<String>>,
    pub(super) slots: Vec<KeySlot>,
    pub(super) keys: Vec<SealedKey>,
    /// How far the audit log was written.
    pub(super) audit_head: Option<Head>,
}

impl Contents {
    /// Reads the records. One that does not parse is skipped, and the log names it.
    pub(super) fn of(records: &Records) -> Result<Self, Fault> {
        let (_, secret) = records
            .get(&name(Table::Single, MARK_SECRET))
            .ok_or_else(|| Fault::Damaged("it has no key for PIN marks".to_owned()))?;
        let secret = MarkSecret::decode(secret)
            .map_err(|error| Fault::Damaged(format!("its key for PIN marks is unusable: {error}")))?;
        let mut devices = devices(records);
        places(records, &mut devices);
        Ok(Self {
            devices: devices.into_values().collect(),
            secret,
            marks: marks(records)?,
            held: held(records),
            slots: all(records, Table::Slot, MAX_SLOTS, "slot of the store", KeySlot::decode),
            keys: all(records, Table::Key, MAX_STORED, "stored key", SealedKey::decode),
            audit_head: audit_head(records),
        })
    }
}

fn audit_head(records: &Records) -> Option<Head> {
    let (_, head) = records.get(&name(Table::Single, AUDIT_HEAD))?;
    let unknown = |why: &_| error!(%why, "how far the audit log was written is not known: the record is damaged");
    record::decode_head(head).inspect_err(unknown).ok()
}

/// The records of a table, each with its name there.
fn of(records: &Records, table: Table) -> impl Iterator<Item = (&[u8], &[u8])> {
    let bytes = [vec![table as u8], vec![table as u8 + 1]];
    let [from, to] = bytes;
    records.range(from..to).map(|(name, (_, value))| (&name[1..], &**value))
}

fn all<T>(
    records: &Records,
    table: Table,
    max: usize,
    what: &str,
    decode: impl Fn(&[u8], &[u8]) -> Result<T, record::RecordError>,
) -> Vec<T> {
    let mut found = Vec::new();
    for (name, value) in of(records, table) {
        match decode(name, value) {
            Ok(_) if found.len() == max => error!(name = %shown(name), "more than {max} of the kind {what}; skipped"),
            Ok(one) => found.push(one),
            Err(why) => error!(name = %shown(name), %why, "the record of a {what} was skipped"),
        }
    }
    found
}

fn devices(records: &Records) -> BTreeMap<String, KnownDevice> {
    let mut devices = BTreeMap::new();
    for (device, value) in of(records, Table::Device) {
        match record::label(device).and_then(|name| Ok((name, DeviceRecord::decode(value)?))) {
            Ok(_) if devices.len() == MAX_DEVICES => {
                warn!(device = %shown(device), "more than {MAX_DEVICES} devices are remembered; skipped");
            }
            Ok((name, DeviceRecord { kind, serial, first_seen, last_seen })) => {
                let device = KnownDevice { name: name.clone(), kind, serial, first_seen, last_seen, keys: Vec::new() };
                devices.insert(name, device);
            }
            Err(why) => warn!(device = %shown(device), %why, "the record of a device was skipped"),
        }
    }
    devices
}

fn places(records: &Records, devices: &mut BTreeMap<String, KnownDevice>) {
    for (place, value) in of(records, Table::Place) {
        let Some((device, slot)) = parts(place) else { continue };
        let keys = std::str::from_utf8(device).ok().and_then(|device| devices.get_mut(device)).map(|d| &mut d.keys);
        match (keys, record::decode_key(slot, value)) {
            (Some(keys), Ok(key)) if keys.len() < MAX_KEYS => keys.push(key),
            (Some(_), Ok(_)) => {
                warn!(device = %shown(device), slot = %shown(slot), "more keys than a device can have; skipped");
            }
            (None, _) => {
                warn!(device = %shown(device), slot = %shown(slot), "the place is on no known device; skipped");
            }
            (_, Err(why)) => {
                warn!(device = %shown(device), slot = %shown(slot), %why, "the record of a key was skipped");
            }
        }
    }
}

fn marks(records: &Records) -> Result<Vec<(String, Digest, MarkState)>, Fault> {
    let mut marks = Vec::new();
    for (mark, value) in of(records, Table::Mark) {
        let Some((serial, digest)) = parts(mark) else { continue };
        if marks.len() == MAX_MARKS {
            return Err(Fault::Damaged(format!("it holds more than {MAX_MARKS} PIN marks")));
        }
        match (record::label(serial), Digest::try_from(digest), MarkState::decode(value)) {
            (Ok(serial), Ok(digest), Ok(state)) => marks.push((serial, digest, state)),
            // Whatever it was, that PIN was not accepted.
            (Ok(serial), Ok(digest), Err(_)) => marks.push((serial, digest, MarkState::Refused)),
            _ => warn!(serial = %shown(serial), "a PIN's mark was skipped"),
        }
    }
    Ok(marks)
}

fn held(records: &Records) -> Option<BTreeSet<String>> {
    let held = name(Table::Single, PINS_HELD);
    records.get(&held)?;
    let released = of(records, Table::Single).filter_map(|(name, _)| {
        name.strip_prefix(PINS_HELD)?.strip_prefix(&[0]).and_then(|serial| record::label(serial).ok())
    });
    Some(released.take(MAX_MARKS).collect())
}

/// Bytes of a name, for the log.
pub(super) fn shown(bytes: &[u8]) -> impl std::fmt::Display {
    bytes[..bytes.len().min(MAX_LABEL)].escape_ascii().to_string()
}
