//! The answers. Knows their fields and how many of them one frame holds; no request.

use std::fmt;

use zeroize::Zeroizing;

use super::{Code, Failure, put_outcome};
use crate::{
    agent::frame::MAX_FRAME,
    devices::{CardStatus, card::CardFormError},
    rfc4251::{Put, Reader, WireError},
};

/// What a page of entries may take, in bytes: a frame, less what stands around the entries.
const MAX_PAGE: usize = MAX_FRAME - 512;

/// What a message is answered with when it was done.
pub trait Answer<'a>: Sized {
    /// Appends it.
    fn put(&self, out: &mut Vec<u8>);
    /// Reads it. Bytes behind it are left alone.
    fn read(r: &mut Reader<'a>) -> Result<Self, WireError>;

    /// How many bytes [`put`](Self::put) appends. Answers with secrets tell it without being written.
    fn encoded_len(&self) -> usize {
        let mut out = Vec::new();
        self.put(&mut out);
        out.len()
    }
}

/// One of many in an answer, at most [`MAX_FRAME`] less 512 bytes long.
pub trait Entry<'a>: Answer<'a> {}

/// Takes entries as long as one frame holds them, and `max` at most where that is not 0. Then tells whether more are
/// left.
pub fn fitting<'a, T: Entry<'a>>(entries: impl IntoIterator<Item = T>, max: u32) -> (Vec<T>, bool) {
    let max = if max == 0 { usize::MAX } else { max as usize };
    let (mut taken, mut room) = (Vec::new(), MAX_PAGE);
    for entry in entries {
        let len = 4 + entry.encoded_len();
        if taken.len() == max || len > room {
            return (taken, true);
        }
        room -= len;
        taken.push(entry);
    }
    (taken, false)
}

/// Appends `uint32 n` and `n` times `string entry`: whoever knows fewer fields of an entry skips the rest.
pub(super) fn put_entries<'a, T: Entry<'a>>(out: &mut Vec<u8>, entries: &[T]) {
    out.put_u32(count(entries.len()));
    for entry in entries {
        out.put_u32(count(entry.encoded_len()));
        entry.put(out);
    }
}

fn entries_len<'a, T: Entry<'a>>(entries: &[T]) -> usize {
    4 + entries.iter().map(|entry| 4 + entry.encoded_len()).sum::<usize>()
}

pub(super) fn read_entries<'a, T: Entry<'a>>(r: &mut Reader<'a>) -> Result<Vec<T>, WireError> {
    read_list(r, |r| T::read(&mut Reader::new(r.string()?)))
}

/// `uint32 n` and `n` items. Memory grows with the items that are there, not with the number that is claimed.
fn read_list<'a, T>(
    r: &mut Reader<'a>,
    mut item: impl FnMut(&mut Reader<'a>) -> Result<T, WireError>,
) -> Result<Vec<T>, WireError> {
    let mut list = Vec::new();
    for _ in 0..r.u32()? {
        list.push(item(r)?);
    }
    Ok(list)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Done, and nothing to say: `unlock`, `lock`, `forget`, `submit`.
impl Answer<'_> for () {
    fn put(&self, _: &mut Vec<u8>) {}

    fn read(_: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(())
    }
}

/// A signature, a plaintext, a shared secret, random bytes.
impl Answer<'_> for Zeroizing<Vec<u8>> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(r.string()?.to_vec().into())
    }

    fn encoded_len(&self) -> usize {
        4 + self.len()
    }
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The entries.
    pub entries: Vec<T>,
    /// Where the next page begins, at most [`MAX_CURSOR`](super::MAX_CURSOR) bytes; empty when this was the last.
    pub next: Vec<u8>,
}

impl<'a, T: Entry<'a>> Answer<'a> for Page<T> {
    fn put(&self, out: &mut Vec<u8>) {
        put_entries(out, &self.entries);
        out.put_string(&self.next);
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self { entries: read_entries(r)?, next: r.string()?.to_vec() })
    }

    fn encoded_len(&self) -> usize {
        entries_len(&self.entries) + 4 + self.next.len()
    }
}

/// A list that has one page: of `why`.
impl<'a> Answer<'a> for Vec<RefusalEntry<'a>> {
    fn put(&self, out: &mut Vec<u8>) {
        put_entries(out, self);
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        read_entries(r)
    }
}

/// A key, as `keys` lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyEntry<'a> {
    /// The public key's blob.
    pub blob: &'a [u8],
    /// Its certificates' blobs, at most 8 of 16 KiB.
    pub certificates: Vec<&'a [u8]>,
    /// Its name in this vault; empty where it has none.
    pub name: &'a str,
    /// Any bytes, for people.
    pub comment: &'a [u8],
    /// Where the private key is, the preferred place first.
    pub places: Vec<Place<'a>>,
    /// What it is allowed to do for this caller: `sign`, `decrypt`, `derive`.
    pub operations: Vec<&'a str>,
    /// How it signs.
    pub signs: Vec<&'a str>,
    /// How it decrypts.
    pub decrypts: Vec<&'a str>,
    /// How it agrees on secrets.
    pub derives: Vec<&'a str>,
    /// Where its device's PIN comes from: `none`, `prompt`, `file` or `credential`.
    pub password: &'a str,
    /// Under what conditions it is used: `confirm`, `destination`, `lifetime`, `touch`.
    pub constraints: Vec<&'a str>,
    /// What else people may want to know of it.
    pub note: &'a str,
    /// When it came into the store, in seconds since 1970; 0 for a key that is not there.
    pub created: u64,
    /// From when on it is not used, in seconds since 1970; 0: nothing says so.
    pub not_after: u64,
    /// What is true of a key of the store: `exportable`, `retired`.
    pub traits: Vec<&'a str>,
}

/// A device that has the key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place<'a> {
    /// The device's id.
    pub device: &'a str,
    /// The device's state, as `devices` shows it.
    pub state: &'a str,
}

impl<'a> Answer<'a> for KeyEntry<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.blob);
        out.put_u32(count(self.certificates.len()));
        self.certificates.iter().for_each(|blob| out.put_string(blob));
        out.put_string(self.name.as_bytes());
        out.put_string(self.comment);
        out.put_u32(count(self.places.len()));
        for place in &self.places {
            out.put_string(place.device.as_bytes());
            out.put_string(place.state.as_bytes());
        }
        for names in [&self.operations, &self.signs, &self.decrypts, &self.derives] {
            put_names(out, names);
        }
        out.put_string(self.password.as_bytes());
        put_names(out, &self.constraints);
        out.put_string(self.note.as_bytes());
        [self.created, self.not_after].into_iter().for_each(|time| out.put_u64(time));
        put_names(out, &self.traits);
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self {
            blob: r.string()?,
            certificates: read_list(r, Reader::string)?,
            name: read_text(r)?,
            comment: r.string()?,
            places: read_list(r, |r| Ok(Place { device: read_text(r)?, state: read_text(r)? }))?,
            operations: read_names(r)?,
            signs: read_names(r)?,
            decrypts: read_names(r)?,
            derives: read_names(r)?,
            password: read_text(r)?,
            constraints: read_names(r)?,
            note: read_text(r)?,
            // An older daemon's entry ends here.
            created: if r.is_empty() { 0 } else { r.u64()? },
            not_after: if r.is_empty() { 0 } else { r.u64()? },
            traits: if r.is_empty() { Vec::new() } else { read_names(r)? },
        })
    }
}

impl<'a> Entry<'a> for KeyEntry<'a> {}

/// `name-list` of RFC 4251: names joined by commas.
fn put_names(out: &mut Vec<u8>, names: &[&str]) {
    out.put_string(names.join(",").as_bytes());
}

fn read_names<'a>(r: &mut Reader<'a>) -> Result<Vec<&'a str>, WireError> {
    Ok(read_text(r)?.split(',').filter(|name| !name.is_empty()).collect())
}

pub(super) fn read_text<'a>(r: &mut Reader<'a>) -> Result<&'a str, WireError> {
    std::str::from_utf8(r.string()?).map_err(|_| WireError::NotText)
}

/// Whether a device wants a PIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinState {
    /// It has none, or does not say.
    None,
    /// It wants one before keys can be used.
    Needed,
    /// It has been given.
    Open,
    /// No try is left.
    Blocked,
}

impl PinState {
    const ALL: [Self; 4] = [Self::None, Self::Needed, Self::Open, Self::Blocked];

    /// `none`, `needed`, `open` or `blocked`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Needed => "needed",
            Self::Open => "open",
            Self::Blocked => "blocked",
        }
    }

    /// The state with this name; [`None`](Self::None) for one of a newer daemon.
    fn from_name(name: &[u8]) -> Self {
        Self::ALL.into_iter().find(|state| state.as_str().as_bytes() == name).unwrap_or(Self::None)
    }
}

/// A device, as `devices` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceEntry<'a> {
    /// Its id: the name in the configuration.
    pub id: &'a str,
    /// Its driver: `soft`, `pkcs11`, …
    pub kind: &'a str,
    /// What tells this token from others of its kind; empty where it has nothing.
    pub serial: &'a str,
    /// [`Health::name`](crate::devices::Health::name).
    pub state: &'a str,
    /// Why it failed; empty in every other state.
    pub reason: &'a str,
    /// How many operations it does at once.
    pub lanes: u32,
    /// How many it is doing.
    pub running: u32,
    /// How many wait.
    pub waiting: u32,
    /// Whether it wants a PIN.
    pub pin: PinState,
    /// PIN tries that are left, where it says.
    pub tries_left: Option<u32>,
    /// Operations that ended well since the daemon started.
    pub done: u64,
    /// Operations that failed, those below included.
    pub failed: u64,
    /// Operations whose deadline passed.
    pub timed_out: u64,
    /// How often it was restarted.
    pub restarts: u64,
    /// What people should know of it: keys that are left out, and why; at most 32.
    pub notes: Vec<&'a str>,
    /// What a person is to do at it now: `touch`, `insert`, or nothing.
    pub wants: &'a str,
    /// For which request, where it is this caller's.
    pub wanted_for: &'a str,
}

/// `tries_left` where the device does not say.
const UNKNOWN: u32 = u32::MAX;

impl<'a> Answer<'a> for DeviceEntry<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        for text in [self.id, self.kind, self.serial, self.state, self.reason] {
            out.put_string(text.as_bytes());
        }
        [self.lanes, self.running, self.waiting].into_iter().for_each(|n| out.put_u32(n));
        out.put_string(self.pin.as_str().as_bytes());
        out.put_u32(self.tries_left.unwrap_or(UNKNOWN));
        [self.done, self.failed, self.timed_out, self.restarts].into_iter().for_each(|n| out.put_u64(n));
        out.put_u32(count(self.notes.len()));
        self.notes.iter().for_each(|note| out.put_string(note.as_bytes()));
        out.put_string(self.wants.as_bytes());
        out.put_string(self.wanted_for.as_bytes());
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self {
            id: read_text(r)?,
            kind: read_text(r)?,
            serial: read_text(r)?,
            state: read_text(r)?,
            reason: read_text(r)?,
            lanes: r.u32()?,
            running: r.u32()?,
            waiting: r.u32()?,
            pin: PinState::from_name(r.string()?),
            tries_left: Some(r.u32()?).filter(|&tries| tries != UNKNOWN),
            done: r.u64()?,
            failed: r.u64()?,
            timed_out: r.u64()?,
            restarts: r.u64()?,
            notes: read_list(r, read_text)?,
            wants: read_text(r)?,
            wanted_for: read_text(r)?,
        })
    }
}

impl<'a> Entry<'a> for DeviceEntry<'a> {}

/// A request that was refused, as `why` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalEntry<'a> {
    /// When, in milliseconds since 1970 (UTC).
    pub unix_ms: u64,
    /// What was asked: a message's short name, of ours or of the standard's (`sign`, `add`, `lock`, …).
    pub message: &'a str,
    /// The key's fingerprint (`SHA256:…`); empty when it was about none.
    pub key: &'a str,
    /// Who asked, for people: the program and its process.
    pub caller: &'a str,
    /// The reason, for programs.
    pub code: Code,
    /// The reason, for people.
    pub reason: &'a str,
}

impl<'a> Answer<'a> for RefusalEntry<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_u64(self.unix_ms);
        for text in [self.message, self.key, self.caller, self.code.as_str(), self.reason] {
            out.put_string(text.as_bytes());
        }
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self {
            unix_ms: r.u64()?,
            message: read_text(r)?,
            key: read_text(r)?,
            caller: read_text(r)?,
            code: Code::from_name(r.string()?).unwrap_or(Code::Failed),
            reason: read_text(r)?,
        })
    }
}

impl<'a> Entry<'a> for RefusalEntry<'a> {}

/// What a `collect` found.
#[derive(Clone, PartialEq, Eq)]
pub struct Collected {
    /// In the order in which they finished.
    pub finished: Vec<Finished>,
    /// Whether more have finished already: collect again.
    pub more: bool,
}

impl Answer<'_> for Collected {
    fn put(&self, out: &mut Vec<u8>) {
        put_entries(out, &self.finished);
        out.push(self.more.into());
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self { finished: read_entries(r)?, more: r.bool()? })
    }

    fn encoded_len(&self) -> usize {
        entries_len(&self.finished) + 1
    }
}

/// A ticket that is finished. It does not print: it may hold a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Finished {
    /// The caller's number for it.
    pub id: u64,
    /// The operation's reply.
    pub reply: Result<Zeroizing<Vec<u8>>, Failure>,
}

impl fmt::Debug for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ticket {} ({})", self.id, if self.reply.is_ok() { "done" } else { "failed" })
    }
}

impl Answer<'_> for Finished {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_u64(self.id);
        put_outcome(out, self.reply.as_ref());
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let id = r.u64()?;
        let reply = match r.u8()? {
            0 => Ok(Zeroizing::<Vec<u8>>::read(r)?),
            _ => Err(Failure::read(r)?),
        };
        Ok(Self { id, reply })
    }

    fn encoded_len(&self) -> usize {
        Self::len_with(&self.reply) - 4
    }
}

impl Finished {
    /// How many bytes of a collection a ticket with this outcome takes.
    pub fn len_with(outcome: &Result<Zeroizing<Vec<u8>>, Failure>) -> usize {
        4 + 8 + 1 + outcome.as_ref().map_or_else(Failure::encoded_len, Answer::encoded_len)
    }
}

impl Entry<'_> for Finished {}

/// What a `cancel` did. In every case the ticket is gone afterwards and its id is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// It was given up. A device that was at work on it may finish it; nobody learns the result.
    Abandoned,
    /// It had finished; its result is thrown away.
    Finished,
    /// There was no such ticket: it was collected, or never submitted.
    Unknown,
}

impl Cancelled {
    const ALL: [Self; 3] = [Self::Abandoned, Self::Finished, Self::Unknown];

    /// `abandoned`, `finished` or `unknown`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Abandoned => "abandoned",
            Self::Finished => "finished",
            Self::Unknown => "unknown",
        }
    }
}

impl Answer<'_> for Cancelled {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.as_str().as_bytes());
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let name = r.string()?;
        Ok(Self::ALL.into_iter().find(|what| what.as_str().as_bytes() == name).unwrap_or(Self::Unknown))
    }
}

impl<'a> Answer<'a> for CardStatus {
    fn put(&self, out: &mut Vec<u8>) {
        Self::put(self, out);
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Self::read(r).map_err(CardFormError::as_wire_error)
    }
}

/// The public half of a key that was made, or moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made<'a> {
    /// The public key's blob.
    pub blob: &'a [u8],
    /// The same as a SubjectPublicKeyInfo in DER (RFC 5280, 4.1.2.7).
    pub spki: &'a [u8],
    /// The SHA-1 of its subjectPublicKey's bits: 20 bytes (RFC 5280, 4.2.1.2, method 1).
    pub identifier: &'a [u8],
}

impl<'a> Answer<'a> for Made<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        [self.blob, self.spki, self.identifier].into_iter().for_each(|bytes| out.put_string(bytes));
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self { blob: r.string()?, spki: r.string()?, identifier: r.string()? })
    }
}

/// What would become of a use that is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked<'a> {
    /// `allow`, or `confirm` where a person would be asked first.
    pub verdict: &'a str,
    /// The first place that could do it now: a device's id, `memory` or `fido`.
    pub device: &'a str,
    /// For a person: what they would be asked; may be empty.
    pub note: &'a str,
}

impl<'a> Answer<'a> for Checked<'a> {
    fn put(&self, out: &mut Vec<u8>) {
        [self.verdict, self.device, self.note].into_iter().for_each(|text| out.put_string(text.as_bytes()));
    }

    fn read(r: &mut Reader<'a>) -> Result<Self, WireError> {
        Ok(Self { verdict: read_text(r)?, device: read_text(r)?, note: read_text(r)? })
    }
}
