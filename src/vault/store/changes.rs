//! The changes that the store makes, each in one transaction. Knows what records mean; knows no file.

use std::collections::BTreeSet;

use tracing::warn;

use super::{
    KeyId, KeySlot, SealedKey, StoreError,
    contents::{MAX_STORED, shown},
    envelope::{Table, name, part_name, parts},
    marks::Digest,
    record::{self, DeviceRecord, MarkState, VERSION},
    slot::MAX_SLOTS,
    tables::{AUDIT_HEAD, Change, Fault, PINS_HELD},
};
use crate::{
    devices::{MAX_KEYS, Scan, Slot},
    vault::audit::Head,
};

/// When nothing but the time changed, it is written once in so many seconds.
const SEEN_STEP: u64 = 60 * 60;

/// Keeps what a scan found on a device: in place of what was known when the scan is complete, beside it otherwise.
pub(super) fn remember(change: &mut Change<'_>, device: &str, kind: &str, scan: &Scan, now: u64) -> Result<(), Fault> {
    let own = name(Table::Device, device.as_bytes());
    let before = change.get(&own)?.and_then(|old| DeviceRecord::decode(&old).ok());
    let places_changed = replace_places(change, device, scan)?;
    let after = DeviceRecord {
        kind: kind.to_owned(),
        serial: scan.status.serial.clone(),
        first_seen: before.as_ref().map_or(now, |old| old.first_seen),
        last_seen: now,
    };
    let same = |old: &DeviceRecord| {
        let lately = now.checked_sub(old.last_seen).is_some_and(|since| since < SEEN_STEP);
        lately && DeviceRecord { last_seen: old.last_seen, ..after.clone() } == *old
    };
    if places_changed || !before.as_ref().is_some_and(same) {
        change.put(&own, &after.encode())?;
    }
    Ok(())
}

/// Brings the places of `device` in line with a scan. Says whether anything changed.
fn replace_places(change: &mut Change<'_>, device: &str, scan: &Scan) -> Result<bool, Fault> {
    let mut changed = false;
    let mut known = 0;
    let found: BTreeSet<&[u8]> = scan.keys.iter().map(|key| &*key.slot.0).collect();
    for (place, _) in change.under(&part_name(Table::Place, device, &[]))? {
        let stays = !scan.complete || parts(&place[1..]).is_some_and(|(_, slot)| found.contains(slot));
        if stays {
            known += 1;
        } else {
            changed |= change.remove(&place)?;
        }
    }
    for key in &scan.keys {
        let (place, value) = (part_name(Table::Place, device, &key.slot.0), record::encode_key(key));
        let before = match change.get(&place)? {
            Some(old) if old == value => continue,
            before => before.is_some(),
        };
        let refused = record::decode_key(&key.slot.0, &value).err();
        if refused.is_some() || (!before && known >= MAX_KEYS) {
            let why = refused.map_or("the device has too many".to_owned(), |error| error.to_string());
            warn!(?device, slot = %shown(&key.slot.0), %why, "a key is not remembered");
            continue;
        }
        change.put(&place, &value)?;
        known += usize::from(!before);
        changed = true;
    }
    Ok(changed)
}

/// Drops a device and the places on it.
pub(super) fn forget_device(change: &mut Change<'_>, device: &str) -> Result<(), Fault> {
    change.remove(&name(Table::Device, device.as_bytes()))?;
    change.remove_under(&part_name(Table::Place, device, &[]))
}

/// Removes the place of one key.
pub(super) fn forget_key(change: &mut Change<'_>, device: &str, slot: &Slot) -> Result<(), Fault> {
    change.remove(&part_name(Table::Place, device, &slot.0)).map(drop)
}

/// Sets a PIN's mark, or with `None` removes it.
pub(super) fn mark(
    change: &mut Change<'_>,
    serial: &str,
    digest: &Digest,
    state: Option<MarkState>,
) -> Result<(), Fault> {
    let mark = part_name(Table::Mark, serial, digest);
    match state {
        Some(state) => change.put(&mark, &state.encode()),
        None => change.remove(&mark).map(drop),
    }
}

/// Removes all marks of a token. While PINs are held, releases this token's.
pub(super) fn clear_marks(change: &mut Change<'_>, serial: &str, held: bool) -> Result<(), Fault> {
    if held {
        change.put(&name(Table::Single, &[PINS_HELD, &[0], serial.as_bytes()].concat()), &[VERSION])?;
    }
    change.remove_under(&part_name(Table::Mark, serial, &[]))
}

/// Keeps how far the audit log is written.
pub(super) fn keep_audit_head(change: &mut Change<'_>, head: &Head) -> Result<(), Fault> {
    change.put(&name(Table::Single, AUDIT_HEAD), &record::encode_head(head))
}

/// The first slots, where there were none.
pub(super) fn initialise(change: &mut Change<'_>, slots: &[KeySlot]) -> Result<(), Fault> {
    if !change.under(&[Table::Slot as u8])?.is_empty() {
        return Err(Fault::Refused(StoreError::AlreadyInitialised));
    }
    let numbers: BTreeSet<u32> = slots.iter().map(KeySlot::number).collect();
    if slots.is_empty() || slots.len() > MAX_SLOTS || numbers.len() != slots.len() {
        return Err(Fault::Refused(StoreError::TooMany { what: "slots", max: MAX_SLOTS }));
    }
    slots.iter().try_for_each(|slot| change.put(&slot_name(slot.number()), &slot.encode()))
}

/// Adds a slot under a number that is free.
pub(super) fn add_slot(change: &mut Change<'_>, slot: &KeySlot) -> Result<(), Fault> {
    let count = initialised(change)?;
    if change.get(&slot_name(slot.number()))?.is_some() {
        return Err(Fault::Refused(StoreError::SlotTaken { number: slot.number() }));
    }
    if count >= MAX_SLOTS {
        return Err(Fault::Refused(StoreError::TooMany { what: "slots", max: MAX_SLOTS }));
    }
    change.put(&slot_name(slot.number()), &slot.encode())
}

/// Puts a slot in the place of the one with its number.
pub(super) fn replace_slot(change: &mut Change<'_>, slot: &KeySlot) -> Result<(), Fault> {
    if change.get(&slot_name(slot.number()))?.is_none() {
        return Err(Fault::Refused(StoreError::NoSuchSlot { number: slot.number() }));
    }
    change.put(&slot_name(slot.number()), &slot.encode())
}

/// Removes a slot that is not the last.
pub(super) fn remove_slot(change: &mut Change<'_>, number: u32) -> Result<(), Fault> {
    let count = initialised(change)?;
    if change.get(&slot_name(number))?.is_none() {
        return Err(Fault::Refused(StoreError::NoSuchSlot { number }));
    }
    if count == 1 {
        return Err(Fault::Refused(StoreError::LastSlot { number }));
    }
    change.remove(&slot_name(number)).map(drop)
}

/// Removes keys and puts others, or all or nothing. What is to be removed and is not there is no error.
pub(super) fn replace_keys(change: &mut Change<'_>, remove: &[KeyId], put: &[SealedKey]) -> Result<(), Fault> {
    initialised(change)?;
    for id in remove {
        change.remove(&name(Table::Key, &id.0))?;
    }
    for key in put {
        change.put(&name(Table::Key, &key.id().0), &key.encode())?;
    }
    if change.len()? > MAX_STORED as u64 && change.count(&[Table::Key as u8])? > MAX_STORED {
        return Err(Fault::Refused(StoreError::TooMany { what: "keys", max: MAX_STORED }));
    }
    Ok(())
}

fn slot_name(number: u32) -> Vec<u8> {
    name(Table::Slot, &number.to_be_bytes())
}

/// How many slots there are, at least one.
fn initialised(change: &Change<'_>) -> Result<usize, Fault> {
    match change.count(&[Table::Slot as u8])? {
        0 => Err(Fault::Refused(StoreError::NotInitialised)),
        count => Ok(count),
    }
}
