//! The frames between the daemon and a device's process: `uint32` length, `uint64` request id, a tag, the body in the
//! data types of RFC 4251. Knows no process and no socket.
//!
//! Both sides read with suspicion: a device that lies may own its process. Whatever is read keeps the bounds that
//! [`devices`](crate::devices) sets, so that a daemon needs not check again. Frames carry PINs and secrets and are wiped.

use std::borrow::Cow;

use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    devices::{
        Algorithm, CardChange, CardSlot, CardStatus, DecryptScheme, DeriveScheme, DeviceError, FoundKey, Hash, Input,
        MAX_BLOB, MAX_KEYS, MAX_LABEL, MAX_NOTES, MAX_SLOT, NewKey, Operation, PrivateHalf, Scan, Scheme, Slot, Status,
        Touch,
        call::{Call, Reply},
        card::CardFormError,
        life::MAX_PRIVATE,
        operation::{MAX_INPUT, MAX_RESULT},
    },
    prompt::harmless,
    rfc4251::{Put, Reader, WireError},
};

/// The longest frame, in bytes, without its length: 4,096 keys of a kilobyte each.
pub const MAX_FRAME: usize = 4 * 1024 * 1024;
/// Bytes of the length in front of a frame.
pub(super) const HEADER: usize = 4;
/// The most lanes that a driver may claim.
pub const MAX_LANES: usize = 64;
/// Calls that a process takes besides those in its lanes and ahead of them: what waits behind abandoned ones.
pub const SPARE_CALLS: usize = 16;
/// The id of the request that opens the device. Calls have the ids above it, each once.
pub const OPEN_ID: u64 = 0;

/// The longest PIN, in bytes.
const MAX_PIN: usize = 1024;
/// The most random bytes that one call asks for.
const MAX_RANDOM: usize = 1024;
/// The most certificates of one key.
const MAX_CERTIFICATES: usize = 64;
/// The most schemes of one kind that a key lists.
const MAX_SCHEMES: usize = 32;
/// The longest text of an error, in bytes.
const MAX_REASON: usize = 2048;
/// Length, id, tag and lengths of a call's or an answer's parts.
const OVERHEAD: usize = 64;

/// A whole frame, its length in front.
pub type Frame = Zeroizing<Vec<u8>>;

/// What the daemon sends.
pub enum Request {
    /// Open the device with this configuration: the first frame, under [`OPEN_ID`].
    Open(Zeroizing<Vec<u8>>),
    /// Anything else.
    Call(Call),
    /// Answer the call of this id with [`Reply::Withdrawn`], if it has not begun.
    Withdraw,
}

/// What the device's process sends.
pub enum Answer {
    /// To the opening: the driver's lanes, 1 to [`MAX_LANES`].
    Opened(usize),
    /// To a call.
    Reply(Reply),
}

/// Why bytes are not a frame that the other side may send.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// A length is beyond what its place allows.
    #[error("something is too long")]
    TooLong,
    /// A tag that stands for nothing.
    #[error("the tag {0} is unknown")]
    Unknown(u8),
    /// A text is not UTF-8.
    #[error("a text is not UTF-8")]
    NotText,
    /// A name stands for nothing, or a key is none.
    #[error("a key, or what one is to be, is not readable")]
    NoKey,
    /// A change or the state of a card is none.
    #[error(transparent)]
    Card(#[from] CardFormError),
    /// The data types do not fit.
    #[error(transparent)]
    Malformed(#[from] WireError),
}

/// The length of the body that follows `header`.
pub fn body_len(header: [u8; 4]) -> Result<usize, FrameError> {
    let len = u32::from_be_bytes(header) as usize;
    if len > MAX_FRAME { Err(FrameError::TooLong) } else { Ok(len) }
}

fn frame(id: u64, capacity: usize, body: impl FnOnce(&mut Vec<u8>)) -> Frame {
    // Enough from the start: a buffer that grows leaves copies behind.
    let mut out = Zeroizing::new(Vec::with_capacity(OVERHEAD + capacity));
    out.put_u32(0);
    put_u64(&mut out, id);
    body(&mut out);
    let len = u32::try_from(out.len() - 4).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&len.to_be_bytes());
    out
}

// Requests.

const OPEN: u8 = 0;
const SCAN: u8 = 1;
const HEALTH: u8 = 2;
const UNLOCK: u8 = 3;
const LOCK: u8 = 4;
const RANDOM: u8 = 5;
const SIGN: u8 = 6;
const DECRYPT: u8 = 7;
const DERIVE: u8 = 8;
const GENERATE: u8 = 9;
const IMPORT: u8 = 10;
const RENAME: u8 = 11;
const DELETE: u8 = 12;
const CARD_STATUS: u8 = 13;
const CHANGE_CARD: u8 = 14;
const WITHDRAW: u8 = 15;

/// The frame that opens a device.
pub fn encode_open(config: &[u8]) -> Frame {
    frame(OPEN_ID, config.len(), |out| {
        out.push(OPEN);
        out.put_string(config);
    })
}

/// The frame that withdraws the call of this id.
pub fn encode_withdraw(id: u64) -> Frame {
    frame(id, 0, |out| out.push(WITHDRAW))
}

fn fits(len: usize, max: usize) -> Result<(), DeviceError> {
    if len > max { Err(DeviceError::TooLong { max }) } else { Ok(()) }
}

/// The frame of a call; an error where it is too long for any device.
pub fn encode_call(id: u64, call: &Call) -> Result<Frame, DeviceError> {
    let tagged = |tag: u8| frame(id, 0, |out| out.push(tag));
    Ok(match call {
        Call::Scan => tagged(SCAN),
        Call::Health => tagged(HEALTH),
        Call::Unlock(pin, even_last) => {
            let pin = pin.expose_secret().as_bytes();
            fits(pin.len(), MAX_PIN)?;
            frame(id, pin.len(), |out| {
                out.push(UNLOCK);
                out.put_string(pin);
                out.push((*even_last).into());
            })
        }
        Call::Lock => tagged(LOCK),
        Call::Random(len) => {
            fits(*len, MAX_RANDOM)?;
            frame(id, 0, |out| {
                out.push(RANDOM);
                put_usize(out, *len);
            })
        }
        Call::Operate(slot, _) | Call::Rename(slot, _) | Call::Delete(slot) if slot.0.len() > MAX_SLOT => {
            return Err(DeviceError::NoSuchKey);
        }
        Call::Generate(new) => frame_of_new(id, GENERATE, new, None)?,
        Call::Import(new, private) => frame_of_new(id, IMPORT, new, Some(private))?,
        Call::Rename(slot, label) => {
            fits(label.len(), MAX_LABEL)?;
            frame(id, slot.0.len() + label.len(), |out| {
                out.push(RENAME);
                out.put_string(&slot.0);
                out.put_string(label.as_bytes());
            })
        }
        Call::Delete(slot) => frame(id, slot.0.len(), |out| {
            out.push(DELETE);
            out.put_string(&slot.0);
        }),
        Call::CardStatus => tagged(CARD_STATUS),
        Call::ChangeCard(change) if !change.is_in_bounds() => {
            return Err(DeviceError::unsupported("no card takes so long a PIN or text"));
        }
        Call::ChangeCard(change) => frame(id, change.capacity(), |out| {
            out.push(CHANGE_CARD);
            change.put(out);
        }),
        Call::Operate(slot, operation) => frame_of_use(id, slot, operation)?,
    })
}

fn frame_of_use(id: u64, slot: &Slot, operation: &Operation<'_>) -> Result<Frame, DeviceError> {
    Ok(match operation {
        Operation::Sign { scheme, input } => {
            fits(input.bytes().len(), MAX_INPUT)?;
            frame(id, slot.0.len() + input.bytes().len(), |out| {
                out.push(SIGN);
                out.put_string(&slot.0);
                put_scheme(out, *scheme);
                out.push(matches!(input, Input::Digest(_)).into());
                out.put_string(input.bytes());
            })
        }
        Operation::Decrypt { scheme, label, ciphertext } => {
            fits(label.len(), MAX_INPUT)?;
            fits(ciphertext.len(), MAX_INPUT)?;
            frame(id, slot.0.len() + label.len() + ciphertext.len(), |out| {
                out.push(DECRYPT);
                out.put_string(&slot.0);
                put_decrypt_scheme(out, *scheme);
                out.put_string(label);
                out.put_string(ciphertext);
            })
        }
        Operation::Derive { scheme, peer } => {
            fits(peer.len(), MAX_INPUT)?;
            frame(id, slot.0.len() + peer.len(), |out| {
                out.push(DERIVE);
                out.put_string(&slot.0);
                put_derive_scheme(out, *scheme);
                out.put_string(peer);
            })
        }
    })
}

fn frame_of_new(id: u64, tag: u8, new: &NewKey, private: Option<&PrivateHalf>) -> Result<Frame, DeviceError> {
    let secret = new.secret.as_ref().map(|secret| secret.expose_secret().as_bytes()).unwrap_or_default();
    fits(new.label.len(), MAX_LABEL)?;
    fits(secret.len(), MAX_PIN)?;
    let len = 2 * OVERHEAD + new.label.len() + secret.len() + private.map_or(0, |private| private.as_bytes().len());
    Ok(frame(id, len, |out| {
        out.push(tag);
        out.put_string(new.label.as_bytes());
        out.put_string(new.algorithm.to_string().as_bytes());
        out.put_string(new.slot.map_or("", CardSlot::as_str).as_bytes());
        out.put_string(new.touch.map_or("", Touch::as_str).as_bytes());
        out.push(new.secret.is_some().into());
        out.put_string(secret);
        if let Some(private) = private {
            out.put_string(private.as_bytes());
        }
    }))
}

fn new_key(r: &mut Reader<'_>) -> Result<NewKey, FrameError> {
    let label = text(r, MAX_LABEL)?.to_owned();
    let algorithm = Algorithm::from_name(text(r, MAX_LABEL)?).ok_or(FrameError::NoKey)?;
    let slot = choice(r, CardSlot::from_name)?;
    let touch = choice(r, Touch::from_name)?;
    let (is_some, secret) = (boolean(r)?, text(r, MAX_PIN)?);
    if !is_some && !secret.is_empty() {
        return Err(FrameError::TooLong);
    }
    Ok(NewKey { label, algorithm, slot, touch, secret: is_some.then(|| SecretString::from(Box::<str>::from(secret))) })
}

/// A name, or nothing.
fn choice<T>(r: &mut Reader<'_>, from_name: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>, FrameError> {
    match text(r, MAX_LABEL)? {
        "" => Ok(None),
        name => from_name(name).map(Some).ok_or(FrameError::NoKey),
    }
}

/// Reads the body of a frame from the daemon.
pub fn decode_request(body: &[u8]) -> Result<(u64, Request), FrameError> {
    let mut r = Reader::new(body);
    let id = r.u64()?;
    let request = match r.u8()? {
        OPEN => Request::Open(Zeroizing::new(r.string()?.to_vec())),
        SCAN => Request::Call(Call::Scan),
        HEALTH => Request::Call(Call::Health),
        UNLOCK => {
            let pin = SecretString::from(Box::<str>::from(text(&mut r, MAX_PIN)?));
            Request::Call(Call::Unlock(pin, boolean(&mut r)?))
        }
        LOCK => Request::Call(Call::Lock),
        RANDOM => {
            let len = number(&mut r)?;
            if len > MAX_RANDOM {
                return Err(FrameError::TooLong);
            }
            Request::Call(Call::Random(len))
        }
        SIGN => {
            let (slot, scheme, digest) = (slot(&mut r)?, scheme(&mut r)?, boolean(&mut r)?);
            let bytes = Cow::Owned(bytes(&mut r, MAX_INPUT)?.to_vec());
            let input = if digest { Input::Digest(bytes) } else { Input::Message(bytes) };
            Request::Call(Call::Operate(slot, Operation::Sign { scheme, input }.into()))
        }
        DECRYPT => {
            let (slot, scheme) = (slot(&mut r)?, decrypt_scheme(&mut r)?);
            let label = Cow::Owned(bytes(&mut r, MAX_INPUT)?.to_vec());
            let ciphertext = Cow::Owned(bytes(&mut r, MAX_INPUT)?.to_vec());
            Request::Call(Call::Operate(slot, Operation::Decrypt { scheme, label, ciphertext }.into()))
        }
        DERIVE => {
            let (slot, scheme) = (slot(&mut r)?, derive_scheme(&mut r)?);
            let peer = Cow::Owned(bytes(&mut r, MAX_INPUT)?.to_vec());
            Request::Call(Call::Operate(slot, Operation::Derive { scheme, peer }.into()))
        }
        GENERATE => Request::Call(Call::Generate(new_key(&mut r)?)),
        IMPORT => {
            let (new, private) = (new_key(&mut r)?, bytes(&mut r, MAX_PRIVATE)?);
            Request::Call(Call::Import(new, PrivateHalf::read(private).ok_or(FrameError::NoKey)?))
        }
        RENAME => Request::Call(Call::Rename(slot(&mut r)?, text(&mut r, MAX_LABEL)?.to_owned())),
        DELETE => Request::Call(Call::Delete(slot(&mut r)?)),
        CARD_STATUS => Request::Call(Call::CardStatus),
        CHANGE_CARD => Request::Call(Call::ChangeCard(CardChange::read(&mut r)?)),
        WITHDRAW => Request::Withdraw,
        other => return Err(FrameError::Unknown(other)),
    };
    r.finish()?;
    Ok((id, request))
}

// Answers.

const ERROR: u8 = 0;
const OPENED: u8 = 1;
const FOUND: u8 = 2;
const STATUS: u8 = 3;
const DONE: u8 = 4;
const BYTES: u8 = 5;
const MADE: u8 = 6;
const CARD: u8 = 7;
const WITHDRAWN: u8 = 8;

/// The frame of an answer. One that is out of bounds becomes an error, since the daemon would not take it.
pub fn encode_answer(id: u64, answer: &Result<Answer, DeviceError>) -> Frame {
    let frame = frame_of_answer(id, answer);
    let body = &frame[4..];
    let checked = if body.len() > MAX_FRAME { Err(FrameError::TooLong) } else { decode_answer(body).map(drop) };
    match checked {
        Ok(()) => frame,
        Err(e) => frame_of_answer(id, &Err(DeviceError::Failed(format!("the driver's answer is out of bounds: {e}")))),
    }
}

fn frame_of_answer(id: u64, answer: &Result<Answer, DeviceError>) -> Frame {
    let capacity = match answer {
        Ok(Answer::Reply(Reply::Bytes(bytes))) => bytes.len(),
        _ => 0,
    };
    frame(id, capacity, |out| match answer {
        Err(error) => {
            out.push(ERROR);
            put_error(out, error);
        }
        Ok(Answer::Opened(lanes)) => {
            out.push(OPENED);
            put_usize(out, *lanes);
        }
        Ok(Answer::Reply(Reply::Scan(scan))) => {
            out.push(FOUND);
            put_scan(out, scan);
        }
        Ok(Answer::Reply(Reply::Status(status))) => {
            out.push(STATUS);
            put_status(out, status);
        }
        Ok(Answer::Reply(Reply::Done)) => out.push(DONE),
        Ok(Answer::Reply(Reply::Withdrawn)) => out.push(WITHDRAWN),
        Ok(Answer::Reply(Reply::Key(key))) => {
            out.push(MADE);
            put_key(out, key);
        }
        Ok(Answer::Reply(Reply::Card(status))) => {
            out.push(CARD);
            status.put(out);
        }
        Ok(Answer::Reply(Reply::Bytes(bytes))) => {
            out.push(BYTES);
            out.put_string(bytes);
        }
    })
}

/// Reads the body of a frame from a device's process. The texts of errors come out harmless, for people.
#[allow(clippy::type_complexity, reason = "an id and what it got")]
pub fn decode_answer(body: &[u8]) -> Result<(u64, Result<Answer, DeviceError>), FrameError> {
    let mut r = Reader::new(body);
    let id = r.u64()?;
    let answer = match r.u8()? {
        ERROR => Err(error(&mut r)?),
        OPENED => match number(&mut r)? {
            lanes @ 1..=MAX_LANES => Ok(Answer::Opened(lanes)),
            _ => return Err(FrameError::TooLong),
        },
        FOUND => Ok(Answer::Reply(Reply::Scan(scan(&mut r)?))),
        STATUS => Ok(Answer::Reply(Reply::Status(status(&mut r)?))),
        DONE => Ok(Answer::Reply(Reply::Done)),
        WITHDRAWN => Ok(Answer::Reply(Reply::Withdrawn)),
        MADE => Ok(Answer::Reply(Reply::Key(Box::new(key(&mut r)?)))),
        CARD => Ok(Answer::Reply(Reply::Card(Box::new(CardStatus::read(&mut r)?)))),
        BYTES => Ok(Answer::Reply(Reply::Bytes(Zeroizing::new(bytes(&mut r, MAX_RESULT)?.to_vec())))),
        other => return Err(FrameError::Unknown(other)),
    };
    r.finish()?;
    Ok((id, answer))
}

// Errors.

fn put_error(out: &mut Vec<u8>, error: &DeviceError) {
    let tag = match error {
        DeviceError::Sealed => 0,
        DeviceError::PinRequired => 1,
        DeviceError::PinWrong { .. } => 2,
        DeviceError::PinBlocked => 3,
        DeviceError::NotTouched => 4,
        DeviceError::NoSuchKey => 5,
        DeviceError::Absent => 6,
        DeviceError::Unsupported(_) => 7,
        DeviceError::TooLong { .. } => 8,
        DeviceError::Busy => 9,
        DeviceError::Timeout => 10,
        DeviceError::Restarted => 11,
        DeviceError::Failed(_) => 12,
        DeviceError::InUse => 13,
        DeviceError::Gone => 14,
        DeviceError::PinEachTime => 15,
    };
    out.push(tag);
    match error {
        DeviceError::PinWrong { left } => put_tries(out, *left),
        DeviceError::Unsupported(why) => put_reason(out, why),
        DeviceError::TooLong { max } => put_usize(out, *max),
        DeviceError::Failed(why) => put_reason(out, why),
        _ => {}
    }
}

fn error(r: &mut Reader<'_>) -> Result<DeviceError, FrameError> {
    Ok(match r.u8()? {
        0 => DeviceError::Sealed,
        1 => DeviceError::PinRequired,
        2 => DeviceError::PinWrong { left: tries(r)? },
        3 => DeviceError::PinBlocked,
        4 => DeviceError::NotTouched,
        5 => DeviceError::NoSuchKey,
        6 => DeviceError::Absent,
        7 => DeviceError::Unsupported(Cow::Owned(harmless(text(r, MAX_REASON)?))),
        8 => DeviceError::TooLong { max: number(r)? },
        9 => DeviceError::Busy,
        10 => DeviceError::Timeout,
        11 => DeviceError::Restarted,
        12 => DeviceError::Failed(harmless(text(r, MAX_REASON)?)),
        13 => DeviceError::InUse,
        14 => DeviceError::Gone,
        15 => DeviceError::PinEachTime,
        other => return Err(FrameError::Unknown(other)),
    })
}

fn put_reason(out: &mut Vec<u8>, why: &str) {
    out.put_string(&why.as_bytes()[..why.floor_char_boundary(MAX_REASON)]);
}

// Scans.

fn put_scan(out: &mut Vec<u8>, scan: &Scan) {
    put_list(out, &scan.keys, put_key);
    out.push(scan.complete.into());
    put_status(out, &scan.status);
    let notes = &scan.notes[..scan.notes.len().min(MAX_NOTES)];
    put_list(out, notes, |out, note| out.put_string(&note.as_bytes()[..note.floor_char_boundary(MAX_LABEL)]));
}

fn scan(r: &mut Reader<'_>) -> Result<Scan, FrameError> {
    Ok(Scan {
        keys: list(r, MAX_KEYS, key)?,
        complete: boolean(r)?,
        status: status(r)?,
        notes: list(r, MAX_NOTES, |r| Ok(harmless(text(r, MAX_LABEL)?)))?,
    })
}

fn put_key(out: &mut Vec<u8>, key: &FoundKey) {
    out.put_string(&key.slot.0);
    out.put_string(&key.blob);
    put_list(out, &key.certificates, |out, certificate| out.put_string(certificate));
    out.put_string(key.label.as_bytes());
    put_list(out, &key.schemes, |out, scheme| put_scheme(out, *scheme));
    put_list(out, &key.decrypts, |out, scheme| put_decrypt_scheme(out, *scheme));
    put_list(out, &key.derives, |out, scheme| put_derive_scheme(out, *scheme));
    out.push(key.touch.into());
    out.push(key.ssh.into());
    out.put_string(key.note.as_bytes());
}

fn key(r: &mut Reader<'_>) -> Result<FoundKey, FrameError> {
    Ok(FoundKey {
        slot: slot(r)?,
        blob: bytes(r, MAX_BLOB)?.into(),
        certificates: list(r, MAX_CERTIFICATES, |r| Ok(bytes(r, MAX_BLOB)?.into()))?,
        label: text(r, MAX_LABEL)?.to_owned(),
        schemes: list(r, MAX_SCHEMES, scheme)?,
        decrypts: list(r, MAX_SCHEMES, decrypt_scheme)?,
        derives: list(r, MAX_SCHEMES, derive_scheme)?,
        touch: boolean(r)?,
        ssh: boolean(r)?,
        note: text(r, MAX_LABEL)?.to_owned(),
    })
}

fn put_status(out: &mut Vec<u8>, status: &Status) {
    out.put_string(status.serial.as_bytes());
    out.push(status.locked.into());
    put_tries(out, status.tries_left);
    put_u64(out, status.generation);
}

fn status(r: &mut Reader<'_>) -> Result<Status, FrameError> {
    Ok(Status {
        serial: text(r, MAX_LABEL)?.to_owned(),
        locked: boolean(r)?,
        tries_left: tries(r)?,
        generation: r.u64()?,
    })
}

// Schemes: a byte, and one for the hash where there is one.

fn put_scheme(out: &mut Vec<u8>, scheme: Scheme) {
    let (tag, hash) = match scheme {
        Scheme::RsaPkcs1v15(hash) => (0, Some(hash)),
        Scheme::RsaPkcs1v15Raw => (1, None),
        Scheme::RsaPss(hash) => (2, Some(hash)),
        Scheme::Ecdsa(hash) => (3, Some(hash)),
        Scheme::Ed25519 => (4, None),
        Scheme::Ed25519BlindedTor => (5, None),
        Scheme::MlDsa44Ed25519 => (6, None),
        Scheme::Sk => (7, None),
    };
    put_tag_and_hash(out, tag, hash);
}

fn scheme(r: &mut Reader<'_>) -> Result<Scheme, FrameError> {
    Ok(match r.u8()? {
        0 => Scheme::RsaPkcs1v15(hash(r)?),
        1 => Scheme::RsaPkcs1v15Raw,
        2 => Scheme::RsaPss(hash(r)?),
        3 => Scheme::Ecdsa(hash(r)?),
        4 => Scheme::Ed25519,
        5 => Scheme::Ed25519BlindedTor,
        6 => Scheme::MlDsa44Ed25519,
        7 => Scheme::Sk,
        other => return Err(FrameError::Unknown(other)),
    })
}

fn put_decrypt_scheme(out: &mut Vec<u8>, scheme: DecryptScheme) {
    let (tag, hash) = match scheme {
        DecryptScheme::RsaOaep(hash) => (0, Some(hash)),
        DecryptScheme::RsaPkcs1v15 => (1, None),
    };
    put_tag_and_hash(out, tag, hash);
}

fn decrypt_scheme(r: &mut Reader<'_>) -> Result<DecryptScheme, FrameError> {
    Ok(match r.u8()? {
        0 => DecryptScheme::RsaOaep(hash(r)?),
        1 => DecryptScheme::RsaPkcs1v15,
        other => return Err(FrameError::Unknown(other)),
    })
}

fn put_derive_scheme(out: &mut Vec<u8>, scheme: DeriveScheme) {
    out.push(match scheme {
        DeriveScheme::Ecdh => 0,
        DeriveScheme::X25519 => 1,
    });
}

fn derive_scheme(r: &mut Reader<'_>) -> Result<DeriveScheme, FrameError> {
    Ok(match r.u8()? {
        0 => DeriveScheme::Ecdh,
        1 => DeriveScheme::X25519,
        other => return Err(FrameError::Unknown(other)),
    })
}

fn put_tag_and_hash(out: &mut Vec<u8>, tag: u8, hash: Option<Hash>) {
    out.push(tag);
    out.extend(hash.map(|hash| match hash {
        Hash::Sha1 => 0,
        Hash::Sha256 => 1,
        Hash::Sha384 => 2,
        Hash::Sha512 => 3,
    }));
}

fn hash(r: &mut Reader<'_>) -> Result<Hash, FrameError> {
    Ok(match r.u8()? {
        0 => Hash::Sha1,
        1 => Hash::Sha256,
        2 => Hash::Sha384,
        3 => Hash::Sha512,
        other => return Err(FrameError::Unknown(other)),
    })
}

// Parts.

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put_usize(out: &mut Vec<u8>, value: usize) {
    put_u64(out, value as u64);
}

fn number(r: &mut Reader<'_>) -> Result<usize, FrameError> {
    usize::try_from(r.u64()?).map_err(|_| FrameError::TooLong)
}

/// A value has one form only, unlike RFC 4251's boolean.
fn boolean(r: &mut Reader<'_>) -> Result<bool, FrameError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(FrameError::Unknown(other)),
    }
}

/// PIN tries that are left, where that is known.
fn put_tries(out: &mut Vec<u8>, left: Option<u8>) {
    out.push(left.is_some().into());
    out.extend(left);
}

fn tries(r: &mut Reader<'_>) -> Result<Option<u8>, FrameError> {
    Ok(if boolean(r)? { Some(r.u8()?) } else { None })
}

fn bytes<'a>(r: &mut Reader<'a>, max: usize) -> Result<&'a [u8], FrameError> {
    let bytes = r.string()?;
    if bytes.len() > max { Err(FrameError::TooLong) } else { Ok(bytes) }
}

fn text<'a>(r: &mut Reader<'a>, max: usize) -> Result<&'a str, FrameError> {
    std::str::from_utf8(bytes(r, max)?).map_err(|_| FrameError::NotText)
}

fn slot(r: &mut Reader<'_>) -> Result<Slot, FrameError> {
    Ok(Slot(bytes(r, MAX_SLOT)?.into()))
}

fn put_list<T>(out: &mut Vec<u8>, items: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    put_usize(out, items.len());
    for item in items {
        put(out, item);
    }
}

/// Allocates for what has been read, never for what a count claims.
fn list<'a, T>(
    r: &mut Reader<'a>,
    max: usize,
    item: impl Fn(&mut Reader<'a>) -> Result<T, FrameError>,
) -> Result<Vec<T>, FrameError> {
    let count = number(r)?;
    if count > max {
        return Err(FrameError::TooLong);
    }
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(item(r)?);
    }
    Ok(items)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::devices::card;

    const HASHES: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];

    /// What prints nothing, as strategies want printed what they make.
    struct Opaque<T>(T);

    impl<T> std::fmt::Debug for Opaque<T> {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("…")
        }
    }

    fn a_hash() -> impl Strategy<Value = Hash> {
        proptest::sample::select(HASHES.to_vec())
    }

    fn a_scheme() -> impl Strategy<Value = Scheme> {
        prop_oneof![
            a_hash().prop_map(Scheme::RsaPkcs1v15),
            Just(Scheme::RsaPkcs1v15Raw),
            a_hash().prop_map(Scheme::RsaPss),
            a_hash().prop_map(Scheme::Ecdsa),
            Just(Scheme::Ed25519),
            Just(Scheme::Ed25519BlindedTor),
            Just(Scheme::MlDsa44Ed25519),
            Just(Scheme::Sk),
        ]
    }

    fn a_decrypt_scheme() -> impl Strategy<Value = DecryptScheme> {
        prop_oneof![a_hash().prop_map(DecryptScheme::RsaOaep), Just(DecryptScheme::RsaPkcs1v15)]
    }

    fn a_derive_scheme() -> impl Strategy<Value = DeriveScheme> {
        prop_oneof![Just(DeriveScheme::Ecdh), Just(DeriveScheme::X25519)]
    }

    fn some_bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
        vec(any::<u8>(), 0..=max)
    }

    fn a_slot() -> impl Strategy<Value = Slot> {
        some_bytes(MAX_SLOT).prop_map(|bytes| Slot(bytes.into()))
    }

    fn an_operation() -> impl Strategy<Value = Opaque<Operation<'static>>> {
        prop_oneof![
            (a_scheme(), any::<bool>(), some_bytes(700)).prop_map(|(scheme, digest, bytes)| {
                let bytes = Cow::Owned(bytes);
                let input = if digest { Input::Digest(bytes) } else { Input::Message(bytes) };
                Opaque(Operation::Sign { scheme, input })
            }),
            (a_decrypt_scheme(), some_bytes(40), some_bytes(300)).prop_map(|(scheme, label, ciphertext)| {
                Opaque(Operation::Decrypt { scheme, label: label.into(), ciphertext: ciphertext.into() })
            }),
            (a_derive_scheme(), some_bytes(140))
                .prop_map(|(scheme, peer)| Opaque(Operation::Derive { scheme, peer: peer.into() })),
        ]
    }

    fn a_new_key() -> impl Strategy<Value = Opaque<NewKey>> {
        let algorithms = ["rsa-2048", "rsa-3072", "nistp256", "nistp521", "ed25519", "x25519"];
        let slots: Vec<_> = CardSlot::ALL.iter().copied().map(Some).chain([None]).collect();
        let touches: Vec<_> = Touch::ALL.iter().copied().map(Some).chain([None]).collect();
        let kind = proptest::sample::select(algorithms.to_vec());
        let choices = (proptest::sample::select(slots), proptest::sample::select(touches));
        let secret = prop_oneof![Just(None), "\\PC{0,64}".prop_map(Some)];
        ("\\PC{0,60}", kind, choices, secret).prop_map(|(label, kind, (slot, touch), secret)| {
            let algorithm = Algorithm::from_name(kind).unwrap();
            Opaque(NewKey { label, algorithm, slot, touch, secret: secret.map(Into::into) })
        })
    }

    fn a_private_half() -> impl Strategy<Value = PrivateHalf> {
        (any::<[u8; 32]>(), any::<[u8; 32]>()).prop_map(|(seed, public)| {
            PrivateHalf::of(&crate::devices::soft::SoftParts::Ed25519 { seed: &seed, public: &public }).unwrap()
        })
    }

    fn same_new_key(a: &NewKey, b: &NewKey) -> bool {
        let secret = |new: &NewKey| new.secret.as_ref().map(|secret| secret.expose_secret().to_owned());
        (&a.label, a.algorithm, a.slot, a.touch, secret(a)) == (&b.label, b.algorithm, b.slot, b.touch, secret(b))
    }

    fn a_call() -> impl Strategy<Value = Call> {
        let new = a_new_key().boxed();
        prop_oneof![
            Just(Call::Scan),
            Just(Call::Health),
            ("\\PC{0,64}", any::<bool>()).prop_map(|(pin, even_last)| Call::Unlock(pin.into(), even_last)),
            Just(Call::Lock),
            (0..=MAX_RANDOM).prop_map(Call::Random),
            (a_slot(), an_operation()).prop_map(|(slot, operation)| Call::Operate(slot, operation.0.into())),
            new.clone().prop_map(|new| Call::Generate(new.0)),
            (new, a_private_half()).prop_map(|(new, private)| Call::Import(new.0, private)),
            (a_slot(), "\\PC{0,60}").prop_map(|(slot, label)| Call::Rename(slot, label)),
            a_slot().prop_map(Call::Delete),
            Just(Call::CardStatus),
            card::tests::a_change().prop_map(Call::ChangeCard),
        ]
    }

    fn same_call(a: &Call, b: &Call) -> bool {
        match (a, b) {
            (Call::Scan, Call::Scan) | (Call::Health, Call::Health) | (Call::Lock, Call::Lock) => true,
            (Call::Unlock(a, last_a), Call::Unlock(b, last_b)) => {
                a.expose_secret() == b.expose_secret() && last_a == last_b
            }
            (Call::Random(a), Call::Random(b)) => a == b,
            (Call::Operate(slot, a), Call::Operate(other, b)) => slot == other && a == b,
            (Call::Generate(a), Call::Generate(b)) => same_new_key(a, b),
            (Call::Import(a, one), Call::Import(b, two)) => same_new_key(a, b) && one.as_bytes() == two.as_bytes(),
            (Call::Rename(slot, a), Call::Rename(other, b)) => slot == other && a == b,
            (Call::Delete(a), Call::Delete(b)) => a == b,
            (Call::CardStatus, Call::CardStatus) => true,
            (Call::ChangeCard(a), Call::ChangeCard(b)) => card::tests::bytes_of(a) == card::tests::bytes_of(b),
            _ => false,
        }
    }

    fn an_error() -> impl Strategy<Value = DeviceError> {
        prop_oneof![
            Just(DeviceError::Sealed),
            Just(DeviceError::PinRequired),
            Just(DeviceError::PinEachTime),
            any::<Option<u8>>().prop_map(|left| DeviceError::PinWrong { left }),
            Just(DeviceError::PinBlocked),
            Just(DeviceError::NotTouched),
            Just(DeviceError::NoSuchKey),
            Just(DeviceError::Absent),
            "[ -~]{0,200}".prop_map(|why| DeviceError::Unsupported(why.into())),
            any::<usize>().prop_map(|max| DeviceError::TooLong { max }),
            Just(DeviceError::Busy),
            Just(DeviceError::Timeout),
            Just(DeviceError::Restarted),
            Just(DeviceError::Gone),
            "[ -~]{0,200}".prop_map(DeviceError::Failed),
            Just(DeviceError::InUse),
        ]
    }

    fn a_status() -> impl Strategy<Value = Status> {
        ("\\PC{0,30}", any::<bool>(), any::<Option<u8>>(), any::<u64>())
            .prop_map(|(serial, locked, tries_left, generation)| Status { serial, locked, tries_left, generation })
    }

    fn a_key() -> impl Strategy<Value = FoundKey> {
        let schemes = (vec(a_scheme(), 0..5), vec(a_decrypt_scheme(), 0..3), vec(a_derive_scheme(), 0..3));
        let texts = ("\\PC{0,30}", "\\PC{0,30}");
        let certificates = vec(some_bytes(60).prop_map(Into::into), 0..3);
        (a_slot(), some_bytes(300), certificates, texts, schemes, any::<[bool; 2]>()).prop_map(
            |(slot, blob, certificates, (label, note), (schemes, decrypts, derives), [touch, ssh])| FoundKey {
                slot,
                blob: blob.into(),
                certificates,
                label,
                schemes,
                decrypts,
                derives,
                touch,
                ssh,
                note,
            },
        )
    }

    fn an_answer() -> impl Strategy<Value = Opaque<Result<Answer, DeviceError>>> {
        let replied = |reply| Opaque(Ok(Answer::Reply(reply)));
        prop_oneof![
            an_error().prop_map(|error| Opaque(Err(error))),
            (1..=MAX_LANES).prop_map(|lanes| Opaque(Ok(Answer::Opened(lanes)))),
            (vec(a_key(), 0..4), any::<bool>(), a_status(), vec("[ -~]{0,60}", 0..4)).prop_map(
                move |(keys, complete, status, notes)| replied(Reply::Scan(Scan { keys, complete, status, notes }))
            ),
            a_status().prop_map(move |status| replied(Reply::Status(status))),
            Just(()).prop_map(move |()| replied(Reply::Done)),
            Just(()).prop_map(move |()| replied(Reply::Withdrawn)),
            a_key().prop_map(move |key| replied(Reply::Key(Box::new(key)))),
            card::tests::a_status().prop_map(move |status| replied(Reply::Card(Box::new(status)))),
            some_bytes(600).prop_map(move |bytes| replied(Reply::Bytes(Zeroizing::new(bytes)))),
        ]
    }

    fn same_answer(a: &Result<Answer, DeviceError>, b: &Result<Answer, DeviceError>) -> bool {
        match (a, b) {
            (Err(a), Err(b)) => a == b,
            (Ok(Answer::Opened(a)), Ok(Answer::Opened(b))) => a == b,
            (Ok(Answer::Reply(a)), Ok(Answer::Reply(b))) => match (a, b) {
                (Reply::Scan(a), Reply::Scan(b)) => a == b,
                (Reply::Status(a), Reply::Status(b)) => a == b,
                (Reply::Done, Reply::Done) | (Reply::Withdrawn, Reply::Withdrawn) => true,
                (Reply::Key(a), Reply::Key(b)) => a == b,
                (Reply::Card(a), Reply::Card(b)) => a == b,
                (Reply::Bytes(a), Reply::Bytes(b)) => a == b,
                _ => false,
            },
            _ => false,
        }
    }

    fn body(frame: &Frame) -> &[u8] {
        let (header, body) = frame.split_first_chunk().unwrap();
        assert_eq!(body_len(*header), Ok(body.len()));
        body
    }

    fn a_found_key(blob: usize) -> FoundKey {
        FoundKey {
            slot: Slot([1, 2].into()),
            blob: vec![0; blob].into(),
            certificates: Vec::new(),
            label: "a label".into(),
            schemes: vec![Scheme::RsaPkcs1v15(Hash::Sha256); 4],
            decrypts: Vec::new(),
            derives: Vec::new(),
            touch: false,
            ssh: true,
            note: String::new(),
        }
    }

    fn found(keys: Vec<FoundKey>) -> Result<Answer, DeviceError> {
        Ok(Answer::Reply(Reply::Scan(Scan { keys, complete: true, ..Scan::default() })))
    }

    #[track_caller]
    fn becomes_an_error(answer: &Result<Answer, DeviceError>) {
        let (id, answer) = decode_answer(body(&encode_answer(7, answer))).unwrap();
        assert_eq!(id, 7);
        assert!(matches!(answer, Err(DeviceError::Failed(why)) if why.contains("out of bounds")));
    }

    #[test]
    fn as_many_keys_as_may_be_found_fit_into_a_frame() {
        let answer = found(vec![a_found_key(530); MAX_KEYS]);
        let (_, back) = decode_answer(body(&encode_answer(1, &answer))).unwrap();
        assert!(same_answer(&answer, &back));
    }

    #[test]
    fn an_answer_out_of_bounds_is_told_instead_of_sent() {
        becomes_an_error(&found(vec![a_found_key(1); MAX_KEYS + 1]));
        becomes_an_error(&found(vec![a_found_key(MAX_BLOB + 1)]));
        becomes_an_error(&found(vec![a_found_key(MAX_BLOB); MAX_FRAME / MAX_BLOB + 1]));
        becomes_an_error(&Ok(Answer::Opened(0)));
        becomes_an_error(&Ok(Answer::Reply(Reply::Bytes(Zeroizing::new(vec![0; MAX_RESULT + 1])))));
        let serial = "x".repeat(MAX_LABEL + 1);
        becomes_an_error(&Ok(Answer::Reply(Reply::Status(Status { serial, ..Status::default() }))));
    }

    #[test]
    fn a_call_out_of_bounds_is_refused_before_it_is_sent() {
        let sign = |slot: usize, message: usize| {
            let operation = Operation::Sign { scheme: Scheme::Ed25519, input: Input::Message(vec![0; message].into()) };
            encode_call(1, &Call::Operate(Slot(vec![0; slot].into()), operation.into())).map(drop)
        };
        assert_eq!(sign(MAX_SLOT, MAX_INPUT), Ok(()));
        assert_eq!(sign(MAX_SLOT, MAX_INPUT + 1), Err(DeviceError::TooLong { max: MAX_INPUT }));
        assert_eq!(sign(MAX_SLOT + 1, 1), Err(DeviceError::NoSuchKey));
        let random = encode_call(1, &Call::Random(MAX_RANDOM + 1)).map(drop);
        assert_eq!(random, Err(DeviceError::TooLong { max: MAX_RANDOM }));
        let pin = encode_call(1, &Call::Unlock("1".repeat(MAX_PIN + 1).into(), true)).map(drop);
        assert_eq!(pin, Err(DeviceError::TooLong { max: MAX_PIN }));
    }

    #[test]
    fn the_words_of_an_error_are_cut_and_made_harmless() {
        let answer = Err(DeviceError::Failed(format!("\u{1b}[31m{}", "é".repeat(MAX_REASON))));
        let (_, back) = decode_answer(body(&encode_answer(1, &answer))).unwrap();
        let Err(DeviceError::Failed(why)) = back else { panic!("not an error") };
        assert!(why.starts_with("\u{fffd}[31mé") && why.len() <= MAX_REASON, "{why}");
    }

    #[test]
    fn a_frame_that_carries_a_secret_never_moves() {
        let call = encode_call(1, &Call::Unlock("123456".into(), true)).unwrap();
        assert!(call.capacity() <= OVERHEAD + 6);
        let new = NewKey {
            secret: Some("1".repeat(MAX_PIN).into()),
            ..NewKey::new("x".repeat(MAX_LABEL), Algorithm::Rsa(4096))
        };
        let parts = crate::devices::soft::SoftParts::Ed25519 { seed: &[1; 32], public: &[2; 32] };
        let private = PrivateHalf::of(&parts).unwrap();
        let expected = 3 * OVERHEAD + MAX_LABEL + MAX_PIN + private.as_bytes().len();
        assert!(encode_call(1, &Call::Import(new, private)).unwrap().capacity() <= expected);
        let bytes = Zeroizing::new(vec![1; 5000]);
        let answer = encode_answer(1, &Ok(Answer::Reply(Reply::Bytes(bytes))));
        assert!(answer.capacity() <= OVERHEAD + 5000);
    }

    proptest! {
        #[test]
        fn calls_round_trip(id: u64, call in a_call()) {
            let frame = encode_call(id, &call).unwrap();
            let (back, request) = decode_request(body(&frame)).unwrap();
            prop_assert_eq!(back, id);
            prop_assert!(matches!(request, Request::Call(other) if same_call(&call, &other)));
        }

        #[test]
        fn a_withdrawal_round_trips(id: u64) {
            let (back, request) = decode_request(body(&encode_withdraw(id))).unwrap();
            prop_assert!(back == id && matches!(request, Request::Withdraw));
        }

        #[test]
        fn the_configuration_round_trips(config: Vec<u8>) {
            let (id, request) = decode_request(body(&encode_open(&config))).unwrap();
            prop_assert_eq!(id, OPEN_ID);
            prop_assert!(matches!(request, Request::Open(bytes) if *bytes == config));
        }

        #[test]
        fn answers_round_trip(id: u64, answer in an_answer()) {
            let (back, other) = decode_answer(body(&encode_answer(id, &answer.0))).unwrap();
            prop_assert_eq!(back, id);
            prop_assert!(same_answer(&answer.0, &other));
        }

        #[test]
        fn a_cut_or_longer_answer_is_none(answer in an_answer(), cut: proptest::sample::Index, more: u8) {
            let frame = encode_answer(1, &answer.0);
            let mut body = body(&frame).to_vec();
            prop_assert!(decode_answer(&body[..cut.index(body.len())]).is_err());
            body.push(more);
            prop_assert!(decode_answer(&body).is_err());
        }

        #[test]
        fn arbitrary_bytes_are_read_the_same_or_refused(id: u64, tag in 0..17u8, rest: Vec<u8>) {
            let bytes: Vec<u8> = id.to_be_bytes().into_iter().chain([tag]).chain(rest).collect();
            if let Ok((id, Request::Call(call))) = decode_request(&bytes) {
                let frame = encode_call(id, &call).unwrap();
                prop_assert_eq!(body(&frame), &bytes);
            }
            if let Ok((id, answer)) = decode_answer(&bytes) {
                let frame = encode_answer(id, &answer);
                prop_assert!(same_answer(&answer, &decode_answer(body(&frame)).unwrap().1));
            }
        }
    }
}
