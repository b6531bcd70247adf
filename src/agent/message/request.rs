//! The requests. Knows their fields and bounds; no answer.

use std::{borrow::Cow, time::Duration};

use secrecy::{ExposeSecret, SecretString};

use super::{
    MAX_CURSOR, MAX_RANDOM, MAX_SECRET, MAX_WAIT_MS, Name, RequestError, carry::CarryRequest, scheme,
    store::StoreRequest, stored::StoredRequest,
};
use crate::{
    agent::wire::{number, put_frame},
    devices::{Algorithm, CardChange, CardSlot, Input, MAX_BLOB, MAX_LABEL, NewKey, Operation, Touch},
    rfc4251::{Put, Reader},
    vault::{Move, key::Grants, stored::NewStored},
};

/// A request, borrowed from its frame. It does not print: it may hold a PIN.
#[derive(Clone)]
pub enum Request<'a> {
    /// `keys`
    Keys(Paging<'a>),
    /// `devices`
    Devices(Paging<'a>),
    /// `sign`, `decrypt` or `derive`. Without a deadline the device's default holds.
    Use(KeyUse<'a>, Option<Duration>),
    /// `submit`
    Submit(Submit<'a>),
    /// `collect`
    Collect(Collect),
    /// `cancel` of the ticket with this id.
    Cancel(u64),
    /// `unlock` with a PIN or passphrase; never of [`Target::Everything`].
    Unlock(Target<'a>, SecretString),
    /// `lock`; never of [`Target::Everything`].
    Lock(Target<'a>),
    /// `forget`
    Forget(Target<'a>),
    /// `why`: at most `max` refusals, of all this uid's connections or of this one only.
    Why {
        /// Whether those of the uid's other connections are wanted, too.
        all: bool,
        /// How many at most; 0 for as many as there are.
        max: u32,
    },
    /// `card-status` of the device with this id.
    CardStatus(&'a str),
    /// `change-card` of the device with this id.
    ChangeCard(&'a str, CardChange),
    /// `random`
    Random {
        /// How many bytes: 1 to [`MAX_RANDOM`].
        len: u32,
        /// The device to take them from; empty for the daemon's own generator.
        device: &'a str,
    },
    /// `audit`
    Audit {
        /// Whether what was recorded is to be on the disk first, and told too.
        flush: bool,
    },
    /// `check`: what would become of this use.
    Check(KeyUse<'a>),
    /// `generate`
    Generate {
        /// Without it the device's default holds.
        deadline: Option<Duration>,
        /// The device that is to make it.
        device: &'a str,
        /// What it is to be.
        new: NewKey,
        /// What it may do in the store.
        terms: NewStored,
    },
    /// `import`
    Import {
        /// Without it the device's default holds.
        deadline: Option<Duration>,
        /// The key in memory.
        key: &'a [u8],
        /// Where it goes.
        to: Move,
    },
    /// `rename`
    Rename {
        /// The key.
        key: &'a [u8],
        /// Its new name; empty for none.
        name: &'a str,
    },
    /// `allow`
    Allow {
        /// The key.
        key: &'a [u8],
        /// All that it may do from now on, beyond plain signatures.
        operations: Grants,
        /// A passphrase of the store, which granting a stored key more takes.
        proof: Option<SecretString>,
    },
    /// `delete`
    Delete {
        /// The key.
        key: &'a [u8],
        /// Where it is deleted: a device, `memory` or `store`.
        device: &'a str,
        /// What it is called: its name, its label, its comment or its fingerprint.
        name: &'a str,
        /// A passphrase of the store, which deleting from there takes.
        proof: Option<SecretString>,
    },
    /// A message about the encrypted store.
    Store(StoreRequest<'a>),
    /// A message about a key in it.
    Stored(StoredRequest<'a>),
    /// A message about a backup or a transfer.
    Carry(CarryRequest<'a>),
}

/// Which part of a list is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging<'a> {
    /// What the page before this one gave; empty for the first page. At most [`MAX_CURSOR`] bytes.
    pub cursor: &'a [u8],
    /// How many entries at most; 0 for as many as fit.
    pub max: u32,
}

/// A use of one key.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyUse<'a> {
    /// The public key's blob, or a certificate's.
    pub key: &'a [u8],
    /// What is to be done with it.
    pub how: How<'a>,
}

/// What is to be done with a key.
#[derive(Clone, PartialEq, Eq)]
pub enum How<'a> {
    /// What SSH_AGENTC_SIGN_REQUEST does: the scheme `ssh`.
    Ssh {
        /// As in the sign request (RFC 9987, section 3.6.1).
        flags: u32,
        /// The message.
        data: &'a [u8],
    },
    /// A scheme that has a name of its own. One that has none is sent with an empty name, which is `unsupported`.
    Operation(Operation<'a>),
}

/// `submit`: a use that nobody waits for.
#[derive(Clone, PartialEq, Eq)]
pub struct Submit<'a> {
    /// The caller's own number for it, unlike that of any ticket that it still has on this connection.
    pub id: u64,
    /// Without it the device's default holds.
    pub deadline: Option<Duration>,
    /// What is asked.
    pub task: KeyUse<'a>,
}

/// `collect`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collect {
    /// How long to wait for the first, at most an hour. Zero answers at once.
    pub wait: Duration,
    /// How many at most; 0 for as many as fit.
    pub max: u32,
}

/// What an `unlock`, `lock` or `forget` is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// The device with this id.
    Device(&'a str),
    /// The key with this blob, or the device or store that holds it.
    Key(&'a [u8]),
    /// The encrypted store.
    Store,
    /// All there is.
    Everything,
}

impl<'a> Request<'a> {
    /// Reads the body of the message with this name, to its end.
    pub fn read(name: Name, body: &'a [u8]) -> Result<Self, RequestError> {
        let mut r = Reader::new(body);
        if let Some(request) = StoreRequest::read(name, &mut r)? {
            r.finish()?;
            return Ok(Self::Store(request));
        }
        if let Some(request) = StoredRequest::read(name, &mut r)? {
            r.finish()?;
            return Ok(Self::Stored(request));
        }
        if let Some(request) = CarryRequest::read(name, &mut r)? {
            r.finish()?;
            return Ok(Self::Carry(request));
        }
        let request = match name {
            Name::Keys => Self::Keys(Paging::read(&mut r)?),
            Name::Devices => Self::Devices(Paging::read(&mut r)?),
            Name::Sign | Name::Decrypt | Name::Derive => {
                let deadline = read_deadline(&mut r)?;
                Self::Use(KeyUse::read(name, &mut r)?, deadline)
            }
            Name::Submit => Self::Submit(Submit::read(&mut r)?),
            Name::Collect => {
                let (wait, max) = (r.u32()?, r.u32()?);
                Self::Collect(Collect { wait: read_wait(wait)?, max })
            }
            Name::Cancel => Self::Cancel(r.u64()?),
            Name::Unlock => {
                let (target, secret) = (Target::read(&mut r)?, read_secret(&mut r)?);
                Self::Unlock(target.one()?, secret)
            }
            Name::Lock => Self::Lock(Target::read(&mut r)?.one()?),
            Name::Forget => Self::Forget(Target::read(&mut r)?),
            Name::Why => Self::Why { all: r.bool()?, max: r.u32()? },
            Name::Random => {
                let (len, device) = (r.u32()?, read_label(&mut r)?);
                if !(1..=MAX_RANDOM).contains(&len) {
                    return Err(RequestError::Invalid("1 to 1024 random bytes are given at once"));
                }
                Self::Random { len, device }
            }
            Name::Audit => Self::Audit { flush: r.bool()? },
            Name::Check => Self::Check(read_operation(&mut r)?),
            Name::Generate => {
                let (deadline, device) = (read_deadline(&mut r)?, read_label(&mut r)?);
                let label = read_name(&mut r)?.to_owned();
                let algorithm = read_known(&mut r, "algorithm", Algorithm::from_name)?;
                let (slot, touch, secret) = read_wishes(&mut r)?;
                let new = NewKey { label, algorithm, slot, touch, secret };
                Self::Generate { deadline, device, new, terms: read_terms(&mut r)? }
            }
            Name::Import => {
                let (deadline, key) = (read_deadline(&mut r)?, read_blob(&mut r)?);
                let (device, label) = (read_label(&mut r)?.to_owned(), read_name(&mut r)?.to_owned());
                let (slot, touch, secret) = read_wishes(&mut r)?;
                let terms = read_terms(&mut r)?;
                Self::Import { deadline, key, to: Move { device, label, slot, touch, secret, terms } }
            }
            Name::Rename => Self::Rename { key: read_blob(&mut r)?, name: read_name(&mut r)? },
            Name::Allow => {
                let (key, operations) = (read_blob(&mut r)?, read_operations(&mut r)?);
                Self::Allow { key, operations, proof: read_proof(&mut r)? }
            }
            Name::CardStatus => Self::CardStatus(read_label(&mut r)?),
            Name::ChangeCard => Self::ChangeCard(read_label(&mut r)?, CardChange::read(&mut r)?),
            Name::Delete => {
                let (key, device) = (read_blob(&mut r)?, read_label(&mut r)?);
                // A comment that came by ssh-add may have any length.
                Self::Delete { key, device, name: read_text(&mut r)?, proof: read_proof(&mut r)? }
            }
            // The others were read above.
            _ => return Err(RequestError::Unknown("message")),
        };
        r.finish()?;
        Ok(request)
    }

    /// The message that it is.
    pub fn name(&self) -> Name {
        match self {
            Self::Keys(_) => Name::Keys,
            Self::Devices(_) => Name::Devices,
            Self::Use(task, _) => task.name(),
            Self::Submit(_) => Name::Submit,
            Self::Collect(_) => Name::Collect,
            Self::Cancel(_) => Name::Cancel,
            Self::Unlock(..) => Name::Unlock,
            Self::Lock(_) => Name::Lock,
            Self::Forget(_) => Name::Forget,
            Self::Why { .. } => Name::Why,
            Self::Random { .. } => Name::Random,
            Self::Audit { .. } => Name::Audit,
            Self::Check(_) => Name::Check,
            Self::Generate { .. } => Name::Generate,
            Self::Import { .. } => Name::Import,
            Self::Rename { .. } => Name::Rename,
            Self::Allow { .. } => Name::Allow,
            Self::Delete { .. } => Name::Delete,
            Self::CardStatus(_) => Name::CardStatus,
            Self::ChangeCard(..) => Name::ChangeCard,
            Self::Store(request) => request.name(),
            Self::Carry(request) => request.name(),
            Self::Stored(request) => request.name(),
        }
    }

    /// Appends the whole frame.
    pub fn put(&self, out: &mut Vec<u8>) {
        if self.name().brings_secrets() {
            // The buffer grows before the secret is in it, so that growing leaves no copy behind.
            out.reserve(8 * 1024 + 2 * MAX_BLOB + 2 * MAX_SECRET);
        }
        put_frame(out, number::EXTENSION, |out| {
            out.put_string(self.name().as_str().as_bytes());
            self.put_body(out);
        });
    }

    fn put_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Keys(paging) | Self::Devices(paging) => {
                out.put_string(paging.cursor);
                out.put_u32(paging.max);
            }
            Self::Use(task, deadline) => {
                out.put_u32(deadline_ms(*deadline));
                task.put(out);
            }
            Self::Submit(submit) => {
                out.put_u64(submit.id);
                out.put_u32(deadline_ms(submit.deadline));
                out.put_string(submit.task.name().short().as_bytes());
                submit.task.put(out);
            }
            Self::Collect(collect) => {
                out.put_u32(milliseconds(collect.wait));
                out.put_u32(collect.max);
            }
            Self::Cancel(id) => out.put_u64(*id),
            Self::Unlock(target, secret) => {
                target.put(out);
                out.put_string(secret.expose_secret().as_bytes());
            }
            Self::Lock(target) | Self::Forget(target) => target.put(out),
            Self::Why { all, max } => {
                out.push((*all).into());
                out.put_u32(*max);
            }
            Self::Random { len, device } => {
                out.put_u32(*len);
                out.put_string(device.as_bytes());
            }
            Self::Audit { flush } => out.push((*flush).into()),
            Self::Check(task) => {
                out.put_string(task.name().short().as_bytes());
                task.put(out);
            }
            Self::Generate { deadline, device, new, terms } => {
                out.put_u32(deadline_ms(*deadline));
                out.put_string(device.as_bytes());
                out.put_string(new.label.as_bytes());
                out.put_string(new.algorithm.to_string().as_bytes());
                put_wishes(out, new.slot, new.touch, new.secret.as_ref());
                put_terms(out, *terms);
            }
            Self::Import { deadline, key, to } => {
                out.put_u32(deadline_ms(*deadline));
                out.put_string(key);
                out.put_string(to.device.as_bytes());
                out.put_string(to.label.as_bytes());
                put_wishes(out, to.slot, to.touch, to.secret.as_ref());
                put_terms(out, to.terms);
            }
            Self::Rename { key, name } => {
                out.put_string(key);
                out.put_string(name.as_bytes());
            }
            Self::Allow { key, operations, proof } => {
                out.put_string(key);
                put_operations(out, *operations);
                put_proof(out, proof.as_ref());
            }
            Self::CardStatus(device) => out.put_string(device.as_bytes()),
            Self::ChangeCard(device, change) => {
                out.put_string(device.as_bytes());
                change.put(out);
            }
            Self::Delete { key, device, name, proof } => {
                [key, device.as_bytes(), name.as_bytes()].into_iter().for_each(|field| out.put_string(field));
                put_proof(out, proof.as_ref());
            }
            Self::Store(request) => request.put(out),
            Self::Carry(request) => request.put(out),
            Self::Stored(request) => request.put(out),
        }
    }
}

impl<'a> Paging<'a> {
    fn read(r: &mut Reader<'a>) -> Result<Self, RequestError> {
        let (cursor, max) = (r.string()?, r.u32()?);
        if cursor.len() > MAX_CURSOR {
            return Err(RequestError::Invalid("no list has such a cursor"));
        }
        Ok(Self { cursor, max })
    }
}

impl<'a> KeyUse<'a> {
    /// [`Name::Sign`], [`Name::Decrypt`] or [`Name::Derive`].
    pub fn name(&self) -> Name {
        match &self.how {
            How::Ssh { .. } | How::Operation(Operation::Sign { .. }) => Name::Sign,
            How::Operation(Operation::Decrypt { .. }) => Name::Decrypt,
            How::Operation(Operation::Derive { .. }) => Name::Derive,
        }
    }

    /// How many bytes of it a caller chose.
    pub fn size(&self) -> usize {
        self.key.len()
            + match &self.how {
                How::Ssh { data, .. } => data.len(),
                How::Operation(Operation::Sign { input, .. }) => input.bytes().len(),
                How::Operation(Operation::Decrypt { label, ciphertext, .. }) => label.len() + ciphertext.len(),
                How::Operation(Operation::Derive { peer, .. }) => peer.len(),
            }
    }

    fn read(name: Name, r: &mut Reader<'a>) -> Result<Self, RequestError> {
        let key = read_blob(r)?;
        let wanted = r.string()?;
        let unknown = RequestError::Unknown("scheme");
        let how = match name {
            Name::Decrypt => {
                let (label, ciphertext) = (Cow::Borrowed(r.string()?), Cow::Borrowed(r.string()?));
                let scheme = scheme::decrypt_scheme(wanted).ok_or(unknown)?;
                if scheme == crate::devices::DecryptScheme::RsaPkcs1v15 && !label.is_empty() {
                    return Err(RequestError::Invalid("only OAEP has a label"));
                }
                How::Operation(Operation::Decrypt { scheme, label, ciphertext })
            }
            Name::Derive => {
                let peer = Cow::Borrowed(r.string()?);
                let scheme = scheme::derive_scheme(wanted).ok_or(unknown)?;
                How::Operation(Operation::Derive { scheme, peer })
            }
            _ => read_sign(wanted, r.u32()?, r.bool()?, r.string()?)?,
        };
        Ok(Self { key, how })
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.key);
        match &self.how {
            How::Ssh { flags, data } => put_sign(out, scheme::SSH, *flags, false, data),
            How::Operation(Operation::Sign { scheme, input }) => {
                let prehashed = matches!(input, Input::Digest(_));
                put_sign(out, scheme::sign_name(*scheme).unwrap_or_default(), 0, prehashed, input.bytes());
            }
            How::Operation(Operation::Decrypt { scheme, label, ciphertext }) => {
                out.put_string(scheme::decrypt_name(*scheme).unwrap_or_default().as_bytes());
                out.put_string(label);
                out.put_string(ciphertext);
            }
            How::Operation(Operation::Derive { scheme, peer }) => {
                out.put_string(scheme::derive_name(*scheme).unwrap_or_default().as_bytes());
                out.put_string(peer);
            }
        }
    }
}

fn read_sign<'a>(wanted: &[u8], flags: u32, prehashed: bool, data: &'a [u8]) -> Result<How<'a>, RequestError> {
    if wanted == scheme::SSH.as_bytes() {
        if prehashed {
            return Err(RequestError::Invalid("the scheme ssh signs no digests"));
        }
        return Ok(How::Ssh { flags, data });
    }
    let scheme = scheme::sign_scheme(wanted).ok_or(RequestError::Unknown("scheme"))?;
    if flags != 0 {
        return Err(RequestError::Invalid("only the scheme ssh has flags"));
    }
    let data = Cow::Borrowed(data);
    let input = match (prehashed, scheme::hash(scheme)) {
        (false, _) => Input::Message(data),
        (true, None) => return Err(RequestError::Invalid("the scheme has no hash whose digest it could sign")),
        (true, Some(hash)) if hash.digest_len() != data.len() => {
            return Err(RequestError::Invalid("the digest is not as long as the scheme's hash makes them"));
        }
        (true, Some(_)) => Input::Digest(data),
    };
    Ok(How::Operation(Operation::Sign { scheme, input }))
}

fn put_sign(out: &mut Vec<u8>, scheme: &str, flags: u32, prehashed: bool, data: &[u8]) {
    out.put_string(scheme.as_bytes());
    out.put_u32(flags);
    out.push(prehashed.into());
    out.put_string(data);
}

impl<'a> Submit<'a> {
    fn read(r: &mut Reader<'a>) -> Result<Self, RequestError> {
        let id = r.u64()?;
        let deadline = read_deadline(r)?;
        Ok(Self { id, deadline, task: read_operation(r)? })
    }
}

/// An operation's name, then its request's fields from the key on.
fn read_operation<'a>(r: &mut Reader<'a>) -> Result<KeyUse<'a>, RequestError> {
    let wanted = r.string()?;
    let name = [Name::Sign, Name::Decrypt, Name::Derive]
        .into_iter()
        .find(|name| name.short().as_bytes() == wanted)
        .ok_or(RequestError::Unknown("operation"))?;
    KeyUse::read(name, r)
}

impl<'a> Target<'a> {
    fn read(r: &mut Reader<'a>) -> Result<Self, RequestError> {
        match r.string()? {
            b"device" => Ok(Self::Device(read_label(r)?)),
            b"key" => Ok(Self::Key(read_blob(r)?)),
            kind @ (b"everything" | b"store") => match (kind, r.string()?) {
                (b"store", b"") => Ok(Self::Store),
                (_, b"") => Ok(Self::Everything),
                _ => Err(RequestError::Invalid("everything and the store have no name")),
            },
            _ => Err(RequestError::Unknown("kind of target")),
        }
    }

    fn one(self) -> Result<Self, RequestError> {
        match self {
            Self::Everything => Err(RequestError::Invalid("one device or key at a time")),
            one => Ok(one),
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        let (kind, which): (&[u8], &[u8]) = match self {
            Self::Device(id) => (b"device", id.as_bytes()),
            Self::Key(blob) => (b"key", blob),
            Self::Store => (b"store", b""),
            Self::Everything => (b"everything", b""),
        };
        out.put_string(kind);
        out.put_string(which);
    }
}

pub(super) fn read_blob<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], RequestError> {
    let blob = r.string()?;
    if blob.is_empty() || blob.len() > MAX_BLOB {
        return Err(RequestError::Invalid("a key's blob has 1 to 16384 bytes"));
    }
    Ok(blob)
}

pub(super) fn read_label<'a>(r: &mut Reader<'a>) -> Result<&'a str, RequestError> {
    let label = r.string()?;
    if label.len() > MAX_LABEL {
        return Err(RequestError::Invalid("a device's id has at most 256 bytes"));
    }
    std::str::from_utf8(label).map_err(|_| RequestError::Invalid("a device's id is UTF-8 text"))
}

pub(super) fn read_text<'a>(r: &mut Reader<'a>) -> Result<&'a str, RequestError> {
    std::str::from_utf8(r.string()?).map_err(|_| RequestError::Invalid("names are UTF-8 text"))
}

/// What a key is called: one line for people.
pub(super) fn read_name<'a>(r: &mut Reader<'a>) -> Result<&'a str, RequestError> {
    let name = read_text(r)?;
    if name.len() > MAX_LABEL || name.chars().any(char::is_control) {
        return Err(RequestError::Invalid("a key's name has at most 256 bytes and no control characters"));
    }
    Ok(name)
}

/// The value with this name.
fn read_known<T>(
    r: &mut Reader<'_>,
    what: &'static str,
    from_name: impl FnOnce(&str) -> Option<T>,
) -> Result<T, RequestError> {
    from_name(read_text(r)?).ok_or(RequestError::Unknown(what))
}

/// What a new key may be told besides; an empty field says nothing.
#[allow(clippy::type_complexity, reason = "three fields that always stand together")]
fn read_wishes(r: &mut Reader<'_>) -> Result<(Option<CardSlot>, Option<Touch>, Option<SecretString>), RequestError> {
    fn named<T>(from_name: impl FnOnce(&str) -> Option<T>) -> impl FnOnce(&str) -> Option<Option<T>> {
        |name| if name.is_empty() { Some(None) } else { from_name(name).map(Some) }
    }
    let slot = read_known(r, "slot", named(CardSlot::from_name))?;
    let touch = read_known(r, "touch policy", named(Touch::from_name))?;
    let secret = r.string()?;
    Ok((slot, touch, if secret.is_empty() { None } else { Some(checked_secret(secret)?) }))
}

/// What a key may do in the store, behind what devices know: left out where it is nothing special.
fn read_terms(r: &mut Reader<'_>) -> Result<NewStored, RequestError> {
    if r.is_empty() {
        return Ok(NewStored::default());
    }
    Ok(NewStored { exportable: r.bool()?, grants: read_operations(r)? })
}

fn put_terms(out: &mut Vec<u8>, terms: NewStored) {
    if terms != NewStored::default() {
        out.push(terms.exportable.into());
        put_operations(out, terms.grants);
    }
}

pub(super) fn read_operations(r: &mut Reader<'_>) -> Result<Grants, RequestError> {
    let names = read_text(r)?.split(',').filter(|name| !name.is_empty());
    Grants::from_names(names).ok_or(RequestError::Unknown("operation"))
}

pub(super) fn put_operations(out: &mut Vec<u8>, operations: Grants) {
    out.put_string(operations.names().collect::<Vec<_>>().join(",").as_bytes());
}

/// A passphrase of the store at the end of a request that may be without.
fn read_proof(r: &mut Reader<'_>) -> Result<Option<SecretString>, RequestError> {
    if r.is_empty() { Ok(None) } else { read_secret(r).map(Some) }
}

fn put_proof(out: &mut Vec<u8>, proof: Option<&SecretString>) {
    if let Some(proof) = proof {
        out.put_string(proof.expose_secret().as_bytes());
    }
}

fn put_wishes(out: &mut Vec<u8>, slot: Option<CardSlot>, touch: Option<Touch>, secret: Option<&SecretString>) {
    out.put_string(slot.map_or("", CardSlot::as_str).as_bytes());
    out.put_string(touch.map_or("", Touch::as_str).as_bytes());
    out.put_string(secret.map_or("", |secret| secret.expose_secret()).as_bytes());
}

pub(super) fn read_secret(r: &mut Reader<'_>) -> Result<SecretString, RequestError> {
    checked_secret(r.string()?)
}

fn checked_secret(secret: &[u8]) -> Result<SecretString, RequestError> {
    if secret.is_empty() || secret.len() > MAX_SECRET {
        return Err(RequestError::Invalid("a PIN or passphrase has 1 to 1024 bytes"));
    }
    let secret = std::str::from_utf8(secret).map_err(|_| RequestError::Invalid("a PIN or passphrase is UTF-8 text"))?;
    Ok(secret.into())
}

fn read_deadline(r: &mut Reader<'_>) -> Result<Option<Duration>, RequestError> {
    match r.u32()? {
        0 => Ok(None),
        ms => read_wait(ms).map(Some),
    }
}

fn read_wait(ms: u32) -> Result<Duration, RequestError> {
    if ms > MAX_WAIT_MS {
        return Err(RequestError::Invalid("nothing waits for longer than an hour (3600000 ms)"));
    }
    Ok(Duration::from_millis(ms.into()))
}

/// As the wire has it. Zero would mean the device's default.
fn deadline_ms(deadline: Option<Duration>) -> u32 {
    deadline.map_or(0, |deadline| milliseconds(deadline).max(1))
}

fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}
