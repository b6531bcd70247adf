//! The second copy of the state: a file that only grows, a snapshot first and then each change, so that damage to one place
//! costs that place. Knows records by their envelopes; neither redb nor what they mean.
//!
//! docs/store.md has the layout. Each frame has the hash of the one before and its own, so that a frame that is missing,
//! changed or moved shows.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use aws_lc_rs::digest::{SHA256, digest};

use super::{
    envelope::Envelope,
    tables::{Made, Records, StoreId},
};
use crate::rfc4251::{Put, Reader};

/// The file's name in its directory.
pub(super) const NAME: &str = "state.copy";
/// What each frame begins with.
pub(super) const MAGIC: [u8; 4] = *b"\x93SC1";
/// Envelopes of a snapshot are put together up to this size, in bytes.
const PART: usize = 64 * 1024;
/// The longest body of a frame, in bytes.
const MAX_BODY: usize = 128 << 20;
/// A copy that has this much more than twice its snapshot is written anew, in bytes.
const SLACK: u64 = 1 << 20;

type Hash = [u8; 32];

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Store's identity, `uint32` number of parts, `uint32` number of records: a snapshot begins.
    Begin = 1,
    /// Envelopes of the snapshot, by name.
    Part = 2,
    /// The envelopes of one change.
    Change = 3,
}

/// One frame of the file.
pub(super) struct Frame<'a> {
    pub(super) kind: Kind,
    /// The number of the change; in a snapshot, of the last one in it.
    pub(super) sequence: u64,
    previous: Hash,
    pub(super) body: &'a [u8],
    hash: Hash,
    /// Of the whole frame, in bytes.
    pub(super) len: usize,
}

impl<'a> Frame<'a> {
    fn encode(kind: Kind, sequence: u64, previous: &Hash, body: &[u8]) -> (Vec<u8>, Hash) {
        let mut out = Vec::with_capacity(MAGIC.len() + 1 + 8 + 32 + 4 + body.len() + 32);
        out.extend_from_slice(&MAGIC);
        out.push(kind as u8);
        out.put_u64(sequence);
        out.extend_from_slice(previous);
        out.put_string(body);
        let hash = sha256(&out);
        out.extend_from_slice(&hash);
        (out, hash)
    }

    /// The one at the beginning of `bytes`, if it is whole.
    pub(super) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        if r.take(MAGIC.len()).ok()? != MAGIC {
            return None;
        }
        let kind = match r.u8().ok()? {
            1 => Kind::Begin,
            2 => Kind::Part,
            3 => Kind::Change,
            _ => return None,
        };
        let sequence = r.u64().ok()?;
        let previous = r.take(32).ok()?.try_into().ok()?;
        let body = r.string().ok().filter(|body| body.len() <= MAX_BODY)?;
        let hashed = &bytes[..bytes.len() - r.rest().len()];
        let hash: Hash = r.take(32).ok()?.try_into().ok()?;
        (sha256(hashed) == hash).then_some(Self { kind, sequence, previous, body, hash, len: hashed.len() + 32 })
    }

    /// What a [`Kind::Begin`] says: whose snapshot, how many parts and records.
    pub(super) fn begin(&self) -> Option<(StoreId, usize, usize)> {
        let mut r = Reader::new(self.body);
        let id = r.take(16).ok()?.try_into().ok()?;
        let (parts, records) = (r.u32().ok()? as usize, r.u32().ok()? as usize);
        (self.kind == Kind::Begin).then_some((id, parts, records))
    }
}

/// What a copy holds, as far as it is whole from its beginning.
pub(super) struct Found {
    pub(super) id: StoreId,
    /// The number of the last change.
    pub(super) sequence: u64,
    pub(super) records: Records,
    /// Whether it is whole to its last byte.
    pub(super) complete: bool,
    snapshot: u64,
    length: u64,
    last: Hash,
}

/// Reads a copy. `None` when not even its snapshot is whole.
pub(super) fn read(bytes: &[u8]) -> Option<Found> {
    let begin = Frame::decode(bytes)?;
    let (id, parts, count) = begin.begin()?;
    let (mut at, mut last, mut sequence) = (begin.len, begin.hash, begin.sequence);
    let mut records = Records::new();
    for _ in 0..parts {
        let part = Frame::decode(&bytes[at..]).filter(|frame| frame.kind == Kind::Part && frame.previous == last)?;
        apply(&mut records, part.body)?;
        (at, last) = (at + part.len, part.hash);
    }
    if records.len() != count {
        return None;
    }
    let snapshot = at as u64;
    while let Some(change) = Frame::decode(&bytes[at..]) {
        let next = change.kind == Kind::Change && change.previous == last && change.sequence == sequence + 1;
        if !next || envelopes(change.body).is_none() {
            break;
        }
        apply(&mut records, change.body)?;
        (at, last, sequence) = (at + change.len, change.hash, change.sequence);
    }
    Some(Found { id, sequence, records, complete: at == bytes.len(), snapshot, length: at as u64, last })
}

/// All the envelopes in `body`; `None` when there is anything else.
pub(super) fn envelopes(body: &[u8]) -> Option<Vec<Envelope<'_>>> {
    let (mut at, mut found) = (0, Vec::new());
    while at < body.len() {
        let (envelope, len) = Envelope::decode(&body[at..])?;
        found.push(envelope);
        at += len;
    }
    Some(found)
}

fn apply(records: &mut Records, body: &[u8]) -> Option<()> {
    for Envelope { sequence, name, value } in envelopes(body)? {
        match value {
            Some(value) => records.insert(name.to_vec(), (sequence, value.to_vec())),
            None => records.remove(name),
        };
    }
    Some(())
}

/// The open copy, to which changes are appended.
pub(super) struct Copy {
    file: File,
    snapshot: u64,
    length: u64,
    sequence: u64,
    last: Hash,
}

impl Copy {
    /// Goes on with what was found complete in `file`.
    pub(super) fn resume(file: File, found: &Found) -> Self {
        let Found { snapshot, length, sequence, last, .. } = *found;
        Self { file, snapshot, length, sequence, last }
    }

    /// Writes a snapshot in place of whatever is at `path`. It is read back before it takes that name, and the old one is
    /// there until then.
    pub(super) fn create(path: &Path, id: &StoreId, sequence: u64, records: &Records) -> io::Result<Self> {
        let new = new_path(path);
        let (bytes, last) = snapshot(id, sequence, records);
        remove_if_there(&new)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all_at(&bytes, 0)?;
        file.sync_all()?;
        drop(bytes);
        let again = read(&fs::read(&new)?).filter(|found| {
            found.complete && found.id == *id && found.sequence == sequence && found.records == *records
        });
        let Some(found) = again else { return Err(misread()) };
        fs::rename(&new, path)?;
        sync_directory(path)?;
        Ok(Self { file, snapshot: found.length, length: found.length, sequence, last })
    }

    /// Appends a change and reads it back. With `durable`, it is on the disk when this returns; without, it is there after
    /// a crash of the program, and perhaps after one of the machine. After an error the copy must be written anew.
    pub(super) fn append(&mut self, made: &Made, durable: bool) -> io::Result<()> {
        if made.sequence != self.sequence + 1 {
            return Err(misread());
        }
        let (frame, hash) = Frame::encode(Kind::Change, made.sequence, &self.last, &made.envelopes);
        self.file.write_all_at(&frame, self.length)?;
        if durable {
            self.file.sync_data()?;
        }
        let mut again = vec![0; frame.len()];
        self.file.read_exact_at(&mut again, self.length)?;
        if again != frame {
            return Err(misread());
        }
        self.length += frame.len() as u64;
        (self.sequence, self.last) = (made.sequence, hash);
        Ok(())
    }

    /// Whether what it holds besides the latest state is worth writing it anew.
    pub(super) fn is_long(&self) -> bool {
        self.length > 2 * self.snapshot + SLACK
    }
}

fn snapshot(id: &StoreId, sequence: u64, records: &Records) -> (Vec<u8>, Hash) {
    let mut parts = vec![Vec::new()];
    for (name, (sequence, value)) in records {
        if parts.last().is_some_and(|part| part.len() >= PART) {
            parts.push(Vec::new());
        }
        if let Some(part) = parts.last_mut() {
            Envelope { sequence: *sequence, name, value: Some(value) }.encode(part);
        }
    }
    let mut body = id.to_vec();
    body.put_u32(parts.len() as u32);
    body.put_u32(records.len() as u32);
    let (mut out, mut last) = Frame::encode(Kind::Begin, sequence, &Hash::default(), &body);
    for part in parts {
        let (frame, hash) = Frame::encode(Kind::Part, sequence, &last, &part);
        out.extend_from_slice(&frame);
        last = hash;
    }
    (out, last)
}

fn misread() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what was written does not read back: the disk may be failing")
}

fn sha256(bytes: &[u8]) -> Hash {
    let mut hash = Hash::default();
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// Where a file is written before it takes its name.
pub(super) fn new_path(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    new.into()
}

/// Removes what a crash left under a name that is to be written.
pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// A file's name is on the disk when its directory is.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn made(sequence: u64, changes: &[(&[u8], Option<&[u8]>)]) -> Made {
        let mut envelopes = Vec::new();
        for &(name, value) in changes {
            Envelope { sequence, name, value }.encode(&mut envelopes);
        }
        Made { sequence, envelopes }
    }

    /// A copy of three changes upon a snapshot, and how long it was before each.
    fn grown() -> (Vec<u8>, Vec<usize>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let records = (0..2000u32).map(|n| (n.to_be_bytes().to_vec(), (3, vec![7; 100]))).collect();
        let mut copy = Copy::create(&path, &[9; 16], 5, &records).unwrap();
        let mut lengths = Vec::new();
        for (sequence, changes) in [
            (6, &[(&b"a"[..], Some(&b"1"[..])), (b"b", Some(b"2"))][..]),
            (7, &[(b"a", None)]),
            (8, &[(b"c", Some(b""))]),
        ] {
            lengths.push(copy.length as usize);
            copy.append(&made(sequence, changes), true).unwrap();
        }
        lengths.push(copy.length as usize);
        assert!(copy.append(&made(8, &[(b"d", None)]), true).is_err(), "the same number again");
        (fs::read(path).unwrap(), lengths)
    }

    #[test]
    fn a_copy_holds_what_was_appended_and_a_cut_one_what_came_before() {
        let (bytes, lengths) = grown();
        for (len, sequence, added) in [
            (lengths[3], 8, &[(&b"b"[..], 6, &b"2"[..]), (b"c", 8, b"")][..]),
            (lengths[2], 7, &[(b"b", 6, b"2")]),
            (lengths[1], 6, &[(b"a", 6, b"1"), (b"b", 6, b"2")]),
            (lengths[0], 5, &[]),
        ] {
            for cut in [0, 1] {
                let found = read(&bytes[..len + cut.min(bytes.len() - len)]).unwrap();
                assert_eq!((found.sequence, found.complete), (sequence, cut == 0 || len == bytes.len()));
                assert_eq!(found.records.len(), 2000 + added.len());
                for &(name, sequence, value) in added {
                    assert_eq!(found.records[name], (sequence, value.to_vec()));
                }
            }
        }
        assert!(read(&bytes[..lengths[0] - 1]).is_none(), "half a snapshot is none");
    }

    #[test]
    fn what_was_written_by_the_documentation_reads() {
        let found = read(include_bytes!("../../../fuzz/seeds/store/copy")).unwrap();
        assert_eq!((found.sequence, found.complete, found.id), (2, true, [0; 16]));
        assert_eq!(found.records, [(b"\x02usb".to_vec(), (2, vec![1]))].into());
    }

    #[test]
    fn a_frame_that_is_missing_or_moved_shows() {
        let (bytes, at) = grown();
        let without = [&bytes[..at[1]], &bytes[at[2]..]].concat();
        let swapped = [&bytes[..at[0]], &bytes[at[1]..at[2]], &bytes[at[0]..at[1]]].concat();
        for (bytes, sequence) in [(without, 6), (swapped, 5)] {
            let found = read(&bytes).unwrap();
            assert_eq!((found.sequence, found.complete), (sequence, false));
        }
    }

    #[test]
    fn it_is_written_anew_when_it_has_grown() {
        let dir = tempfile::tempdir().unwrap();
        let mut copy = Copy::create(&dir.path().join(NAME), &[9; 16], 0, &Records::new()).unwrap();
        let value = vec![1; 100_000];
        for sequence in 1..=10 {
            assert!(!copy.is_long());
            copy.append(&made(sequence, &[(b"a", Some(&value))]), false).unwrap();
        }
        copy.append(&made(11, &[(b"a", Some(&value))]), false).unwrap();
        assert!(copy.is_long());
    }

    proptest! {
        #[test]
        fn a_damaged_copy_is_cut_or_none(at: prop::sample::Index, bit in 0u8..8) {
            let (mut bytes, lengths) = grown();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let found = read(&bytes);
            prop_assert_eq!(found.is_some(), at >= lengths[0]);
            prop_assert!(found.is_none_or(|found| !found.complete));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = (read(&bytes), Frame::decode(&[&MAGIC[..], &[1], &bytes].concat()).map(|frame| frame.begin()));
        }
    }
}
