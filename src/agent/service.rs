//! Our messages ↔ vault calls: what docs/protocol.md specifies, behind the bytes. Knows tickets; decides nothing.

use std::{borrow::Cow, future::Future, pin::Pin, sync::Arc};

use aws_lc_rs::rand;
use indexmap::IndexMap;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{
    message::{
        self, Cancelled, Code, Collect, Collected, DeviceEntry, Failure, Finished, How, KeyEntry, KeyUse, Name, Page,
        Paging, PinState, Place, RefusalEntry, Request, Submit, Target, compatible, fitting, scheme,
    },
    ticket::{self, Tickets},
    wire::{self, number},
};
use crate::{
    devices::{
        DecryptScheme, DeriveScheme, Device, DeviceError, DeviceState, Hash, Health, Input, MAX_BLOB, Operation,
        Outcome, Patience, Scheme,
    },
    public_key::{Blob, FingerprintHash, KeyType, PublicKey, fingerprint},
    vault::{
        Answer, Asked, Use, Vault,
        key::{Caller, Grants, Identity, PrivateKey},
        policy::{self, Refusal},
        why::Refused,
    },
};

/// What a ticket's result is taken to need before it is there, in bytes: a signature of RSA-4096…
const RESULT: usize = 512;
/// …or whatever ssh has signatures for, hybrid ones among them.
const SSH_RESULT: usize = 4096;
/// A key's certificates in one entry of a list.
const MAX_CERTIFICATES: usize = 8;
/// The bytes of a comment that a list shows: one key must not fill a frame.
const MAX_COMMENT: usize = 1024;
/// What the entries of a list may take of a frame, in bytes.
const MAX_LIST: usize = super::frame::MAX_FRAME - 512;

/// What became of a frame.
pub(super) enum Handled {
    /// The reply is written.
    Done,
    /// It will come.
    Later(Later),
    /// It comes when a ticket is finished, when the time is up, or when the next frame is there.
    Collect(Collect),
}

pub(super) type Later = Pin<Box<dyn Future<Output = Zeroizing<Vec<u8>>> + Send>>;

/// One connection, seen from our messages.
pub(super) struct Service<'a> {
    pub(super) vault: &'a Arc<Vault>,
    pub(super) caller: &'a Arc<Caller>,
    pub(super) tickets: &'a mut Tickets,
}

impl Service<'_> {
    /// Handles the message with this name.
    pub(super) fn handle(&mut self, name: Name, body: &[u8], out: &mut Vec<u8>) -> Handled {
        let request = match Request::read(name, body) {
            Ok(request) => request,
            Err(error) => {
                match error.failure() {
                    Some(failure) => message::put_reply::<()>(out, name, Err(&failure)),
                    None => wire::put_bare(out, number::EXTENSION_FAILURE),
                }
                return Handled::Done;
            }
        };
        // What was finished before a lock may still be collected.
        if !matches!(name, Name::Collect | Name::Cancel)
            && let Err(refusal) = self.vault.check_open()
        {
            return done::<()>(out, name, Err(self.refused(name, "", refusal)));
        }
        match request {
            Request::Keys(paging) => self.keys(paging, out),
            Request::Devices(paging) => self.devices(paging, out),
            Request::Use(task, deadline) => self.use_key(&task, deadline.map(|d| Instant::now() + d), out),
            Request::Submit(submit) => done(out, name, self.submit(&submit)),
            Request::Collect(collect) => Handled::Collect(collect),
            Request::Cancel(id) => done::<Cancelled>(out, name, Ok(self.tickets.cancel(id))),
            Request::Unlock(target, pin) => {
                let device = match self.device(name, target) {
                    Ok(device) => device,
                    Err(failure) => return done::<()>(out, name, Err(failure)),
                };
                let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
                self.later(name, async move { vault.unlock_device(&device, &caller, pin).await })
            }
            Request::Lock(target) => {
                let device = match self.device(name, target) {
                    Ok(device) => device,
                    Err(failure) => return done::<()>(out, name, Err(failure)),
                };
                let vault = Arc::clone(self.vault);
                self.later(name, async move { vault.lock_device(&device).await })
            }
            Request::Forget(target) => {
                let devices = match target {
                    Target::Everything if policy::may_lock(self.caller) => Ok(self.vault.devices()),
                    Target::Everything => Err(self.refused(name, "", Refusal::NotForForwarded)),
                    one => self.device(name, one).map(|device| vec![device]),
                };
                let devices = match devices {
                    Ok(devices) => devices,
                    Err(failure) => return done::<()>(out, name, Err(failure)),
                };
                let vault = Arc::clone(self.vault);
                self.later(name, async move { vault.forget_pins_of(&devices).await })
            }
            Request::Why { all, max } => {
                let refused = self.vault.why().of(self.caller, all);
                let told: Vec<_> = refused.iter().map(|refused| (refused, refused.refusal.to_string())).collect();
                let (entries, _) = fitting(told.iter().map(|(refused, reason)| refusal_entry(refused, reason)), max);
                done(out, name, Ok(entries))
            }
            Request::Random { len, device } => self.random(len as usize, device, out),
        }
    }

    /// Writes a refusal down for `why`, and as its caller is told.
    fn refused(&self, name: Name, key: &str, refusal: Refusal) -> Failure {
        refused(self.vault, self.caller, name, key, refusal)
    }

    /// A reply that waits for something which only succeeds or fails.
    fn later(&self, name: Name, work: impl Future<Output = Result<(), Refusal>> + Send + 'static) -> Handled {
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let result = work.await.map_err(|refusal| refused(&vault, &caller, name, "", refusal));
            reply::<()>(name, result.as_ref())
        }))
    }

    fn use_key(&self, task: &KeyUse<'_>, deadline: Option<Instant>, out: &mut Vec<u8>) -> Handled {
        let name = task.name();
        match self.operate(task, deadline) {
            Answer::Now(result) => done(out, name, result),
            Answer::Later(work) => Handled::Later(Box::pin(async move { reply(name, work.await.as_ref()) })),
        }
    }

    /// The way of every use, whether its caller waits for it or not.
    fn operate(&self, task: &KeyUse<'_>, deadline: Option<Instant>) -> Answer<ticket::Outcome> {
        let name = task.name();
        let asked = match &task.how {
            How::Ssh { flags, data } => Asked::Ssh { data, rsa_hash: wire::rsa_hash(*flags) },
            How::Operation(operation) => Asked::Operation(operation.borrowed()),
        };
        let is_ssh = matches!(task.how, How::Ssh { .. });
        let wanted = Use { blob: task.key, asked, deadline, waits_for_place: false };
        match self.vault.operate(self.caller, wanted) {
            Answer::Now(result) => Answer::Now(match result {
                Ok(outcome) => Ok(bytes(outcome, is_ssh)),
                Err(refusal) => Err(self.refused(name, &key_name(task.key), refusal)),
            }),
            Answer::Later(work) => {
                let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
                let key = task.key.to_vec();
                Answer::Later(Box::pin(async move {
                    match work.await {
                        Ok(outcome) => Ok(bytes(outcome, is_ssh)),
                        Err(refusal) => Err(refused(&vault, &caller, name, &key_name(&key), refusal)),
                    }
                }))
            }
        }
    }

    /// Handles a message of another agent. A failure is a bare 28; the reason is in the log and in `why`.
    pub(super) fn handle_compatible(&self, name: compatible::Name, body: &[u8], out: &mut Vec<u8>) -> Handled {
        let request = match compatible::Request::read(name, body) {
            Ok(compatible::Request::DecryptDeriveIds) => {
                self.decrypt_derive_ids(out);
                return Handled::Done;
            }
            Ok(request) => request,
            Err(error) => {
                tracing::info!(pid = self.caller.pid, "refused a malformed {}: {error}", name.as_str());
                wire::put_bare(out, number::EXTENSION_FAILURE);
                return Handled::Done;
            }
        };
        let (key, how) = match self.compatible_use(&request) {
            Ok(wanted) => wanted,
            Err(refusal) => {
                let ours = match name {
                    compatible::Name::SignPrehash => Name::Sign,
                    compatible::Name::Ecdh => Name::Derive,
                    compatible::Name::DecryptDerive | compatible::Name::DecryptDeriveIds => Name::Decrypt,
                };
                let _ = self.refused(ours, "", refusal);
                wire::put_bare(out, number::EXTENSION_FAILURE);
                return Handled::Done;
            }
        };
        let is_ecdsa = matches!(how, How::Operation(Operation::Sign { scheme: Scheme::Ecdsa(_), .. }));
        let task = KeyUse { key: &key, how };
        let put = move |out: &mut Vec<u8>, result: ticket::Outcome| match result {
            Ok(bytes) if is_ecdsa => compatible::put_result(out, name, &compatible::ecdsa_der(&bytes)),
            Ok(bytes) => compatible::put_result(out, name, &bytes),
            Err(_) => wire::put_bare(out, number::EXTENSION_FAILURE),
        };
        match self.operate(&task, None) {
            Answer::Now(result) => {
                put(out, result);
                Handled::Done
            }
            Answer::Later(work) => Handled::Later(Box::pin(async move {
                let mut out = Zeroizing::new(Vec::new());
                put(&mut out, work.await);
                out
            })),
        }
    }

    /// Keys that decrypt or agree on secrets, with their comments.
    fn decrypt_derive_ids(&self, out: &mut Vec<u8>) {
        let listing = self.vault.list(self.caller);
        let able = |identity: &&Arc<Identity>| {
            let plain = Blob::parse(&identity.blob).is_ok_and(|blob| matches!(blob, Blob::Key(_)));
            let uses = uses([&***identity]);
            plain && (uses.decrypt || uses.derive)
        };
        let mut room = MAX_LIST;
        let identities: Vec<_> = listing
            .identities
            .iter()
            .filter(able)
            .map(|identity| (metacode_blob(identity), comment(identity)))
            .take_while(|(blob, comment)| {
                let len = 8 + blob.len() + comment.len();
                let fits = len <= room;
                room -= if fits { len } else { 0 };
                fits
            })
            .collect();
        compatible::put_identities(out, identities.iter().map(|(blob, comment)| (&**blob, *comment)));
    }

    /// What a message of another agent asks, in our words.
    fn compatible_use<'a>(&self, request: &compatible::Request<'a>) -> Result<(Vec<u8>, How<'a>), Refusal> {
        let unsupported = |why| Refusal::Device(DeviceError::unsupported(why));
        match *request {
            compatible::Request::DecryptDeriveIds => Err(Refusal::NoSuchKey),
            compatible::Request::DecryptDerive { key, data } => {
                let listing = self.vault.list(self.caller);
                let identity = listing.identities.iter().find(|identity| *metacode_blob(identity) == *key);
                let identity = identity.ok_or(Refusal::NoSuchKey)?;
                let data = Cow::Borrowed(data);
                let operation = match identity.key_type {
                    KeyType::Rsa => Operation::Decrypt {
                        scheme: DecryptScheme::RsaPkcs1v15,
                        label: Cow::Borrowed(&[]),
                        ciphertext: data,
                    },
                    KeyType::X25519 => Operation::Derive { scheme: DeriveScheme::X25519, peer: data },
                    _ => Operation::Derive { scheme: DeriveScheme::Ecdh, peer: data },
                };
                Ok((identity.blob.to_vec(), How::Operation(operation)))
            }
            compatible::Request::Ecdh { key, partner } => {
                let Ok(PublicKey::Ecdsa(_, point)) = PublicKey::parse(partner) else {
                    return Err(unsupported("the partner's is no key on a NIST curve"));
                };
                let operation = Operation::Derive { scheme: DeriveScheme::Ecdh, peer: Cow::Borrowed(point) };
                Ok((key.to_vec(), How::Operation(operation)))
            }
            compatible::Request::SignPrehash { key, digest } => {
                let hashes = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];
                let hash = hashes.into_iter().find(|hash| hash.digest_len() == digest.len());
                let hash = hash.ok_or_else(|| unsupported("no hash has digests of this length"))?;
                let key_type = PublicKey::parse(key).map_err(|_| Refusal::NoSuchKey)?.key_type();
                let scheme = match key_type {
                    KeyType::Rsa => Scheme::RsaPkcs1v15(hash),
                    KeyType::Ecdsa(_) => Scheme::Ecdsa(hash),
                    _ => return Err(unsupported("only ECDSA and RSA keys sign digests")),
                };
                let operation = Operation::Sign { scheme, input: Input::Digest(Cow::Borrowed(digest)) };
                Ok((key.to_vec(), How::Operation(operation)))
            }
        }
    }

    fn submit(&mut self, submit: &Submit<'_>) -> Result<(), Failure> {
        let deadline = submit.deadline.map(|deadline| Instant::now() + deadline);
        let result = if matches!(submit.task.how, How::Ssh { .. }) { SSH_RESULT } else { RESULT };
        self.tickets.reserve(submit.id, submit.task.size() + result)?;
        match self.operate(&submit.task, deadline) {
            Answer::Now(outcome) => self.tickets.finish(submit.id, outcome),
            Answer::Later(work) => self.tickets.run(submit.id, work),
        }
        Ok(())
    }

    fn keys(&self, paging: Paging<'_>, out: &mut Vec<u8>) -> Handled {
        let listing = self.vault.list(self.caller);
        // A key with its certificates is one entry, in the place of whichever was added first.
        let mut keys: IndexMap<Vec<u8>, Vec<&Identity>> = IndexMap::new();
        for identity in &listing.identities {
            let plain =
                Blob::parse(&identity.blob).map_or_else(|_| identity.blob.to_vec(), |blob| blob.key().to_blob());
            keys.entry(plain).or_default().push(identity);
        }
        let start = start(paging);
        let entries = keys.iter().skip(start).map(|(plain, identities)| key_entry(self.vault, plain, identities));
        let (entries, more) = fitting(entries, paging.max);
        done(out, Name::Keys, Ok(page(start, entries, more)))
    }

    fn devices(&self, paging: Paging<'_>, out: &mut Vec<u8>) -> Handled {
        let shown = |device: &Device| self.vault.shows_device(self.caller, device);
        let devices: Vec<_> = self.vault.devices().into_iter().filter(shown).map(|d| (d.state(), d)).collect();
        let start = start(paging);
        let (entries, more) = fitting(devices.iter().skip(start).map(|(state, d)| device_entry(d, state)), paging.max);
        done(out, Name::Devices, Ok(page(start, entries, more)))
    }

    /// The device that a lock, unlock or forget is about, if the caller may do that.
    fn device(&self, name: Name, target: Target<'_>) -> Result<Device, Failure> {
        let found = match target {
            _ if !policy::may_lock(self.caller) => Err(Refusal::NotForForwarded),
            Target::Device(id) => self.vault.device(id).ok_or(Refusal::NoSuchDevice),
            Target::Key(blob) => self.vault.device_of(self.caller, blob),
            Target::Everything => Err(Refusal::NoSuchDevice),
        };
        found.map_err(|refusal| self.refused(name, "", refusal))
    }

    fn random(&self, len: usize, device: &str, out: &mut Vec<u8>) -> Handled {
        let name = Name::Random;
        if device.is_empty() {
            let mut bytes = Zeroizing::new(vec![0; len]);
            let filled = rand::fill(&mut bytes).map(|()| bytes);
            return done(
                out,
                name,
                filled.map_err(|_| Failure::new(Code::Failed, "the system gives no random numbers")),
            );
        }
        let shown = self.vault.device(device).filter(|device| self.vault.shows_device(self.caller, device));
        let Some(device) = shown else {
            return done::<()>(out, name, Err(self.refused(name, "", Refusal::NoSuchDevice)));
        };
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let random = device.random(caller.connection, len, Patience::default()).await;
            let random = random.map_err(|error| refused(&vault, &caller, name, "", error.into()));
            reply(name, random.as_ref())
        }))
    }
}

/// The reply to a collect: what is finished, as far as one frame holds it.
pub(super) fn collected(tickets: &mut Tickets, collect: Collect) -> Zeroizing<Vec<u8>> {
    let max = if collect.max == 0 { usize::MAX } else { collect.max as usize };
    let mut room = MAX_LIST;
    let mut finished = Vec::new();
    tickets.settle();
    while finished.len() < max {
        let next = tickets.take(|outcome| {
            let len = Finished::len_with(outcome);
            let fits = len <= room;
            room -= if fits { len } else { 0 };
            fits
        });
        let Some((id, reply)) = next else { break };
        finished.push(Finished { id, reply });
    }
    reply(Name::Collect, Ok(&Collected { finished, more: tickets.has_finished() }))
}

fn done<'a, T: message::Answer<'a>>(out: &mut Vec<u8>, name: Name, result: Result<T, Failure>) -> Handled {
    message::put_reply(out, name, result.as_ref());
    Handled::Done
}

fn reply<'a, T: message::Answer<'a>>(name: Name, result: Result<&T, &Failure>) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::new());
    message::put_reply(&mut out, name, result);
    out
}

/// Writes a refusal down for `why`, and as its caller is told.
fn refused(vault: &Vault, caller: &Caller, name: Name, key: &str, refusal: Refusal) -> Failure {
    tracing::warn!(key, pid = caller.pid, uid = caller.uid, "refused {}: {refusal}", name.short());
    let failure = Failure::from(&refusal);
    vault.why().record(caller, name.short(), key.to_owned(), refusal);
    failure
}

fn key_name(blob: &[u8]) -> String {
    fingerprint(blob, FingerprintHash::Sha256)
}

/// The blob by which openpgp-card-ssh-agent's clients know a key: one for X25519 says that it is for Ed25519.
fn metacode_blob(identity: &Identity) -> Cow<'_, [u8]> {
    match Blob::parse(&identity.blob) {
        Ok(Blob::Key(PublicKey::X25519(point))) => Cow::Owned(PublicKey::Ed25519(point).to_blob()),
        _ => Cow::Borrowed(&identity.blob),
    }
}

/// The result of a use, as it is sent: an SSH signature for the scheme `ssh`, else the scheme's own form.
fn bytes(outcome: Outcome, is_ssh: bool) -> Zeroizing<Vec<u8>> {
    match outcome {
        Outcome::Signature(signature) if is_ssh => {
            let mut blob = Vec::new();
            wire::put_signature_blob(&mut blob, &signature);
            Zeroizing::new(blob)
        }
        Outcome::Signature(signature) => Zeroizing::new(signature.as_bytes().to_vec()),
        Outcome::Secret(secret) => secret,
    }
}

/// A cursor is the number of entries before it: a list that changes meanwhile is not told twice from the start.
fn start(paging: Paging<'_>) -> usize {
    paging.cursor.try_into().map_or(0, |bytes| u32::from_be_bytes(bytes) as usize)
}

fn page<T>(start: usize, entries: Vec<T>, more: bool) -> Page<T> {
    let next = u32::try_from(start + entries.len()).unwrap_or(u32::MAX);
    Page { entries, next: if more { next.to_be_bytes().to_vec() } else { Vec::new() } }
}

fn key_entry<'a>(vault: &Vault, plain: &'a [u8], identities: &[&'a Identity]) -> KeyEntry<'a> {
    let places = || identities.iter().flat_map(|identity| &identity.places);
    let certificates = identities.iter().map(|identity| &*identity.blob);
    let certificates = certificates.filter(|blob| *blob != plain && blob.len() <= MAX_BLOB);
    let mut entry = KeyEntry {
        blob: plain,
        certificates: certificates.take(MAX_CERTIFICATES).collect(),
        comment: identities.first().map_or(&[], |identity| comment(identity)),
        password: "none",
        ..KeyEntry::default()
    };
    for place in places() {
        let shown = match &place.key {
            PrivateKey::Soft(key) => {
                add(&mut entry.signs, key.schemes().iter().filter_map(|scheme| scheme::sign_name(*scheme)));
                add(&mut entry.decrypts, key.decrypts().iter().filter_map(|scheme| scheme::decrypt_name(*scheme)));
                add(&mut entry.derives, key.derives().iter().filter_map(|scheme| scheme::derive_name(*scheme)));
                Place { device: "memory", state: "ready" }
            }
            PrivateKey::Sk(key) => {
                add(&mut entry.constraints, key.wants_touch().then_some("touch"));
                Place { device: "fido", state: "ready" }
            }
            PrivateKey::OnDevice(device, key) => {
                add(&mut entry.signs, key.schemes.iter().filter_map(|scheme| scheme::sign_name(*scheme)));
                add(&mut entry.decrypts, key.decrypts.iter().filter_map(|scheme| scheme::decrypt_name(*scheme)));
                add(&mut entry.derives, key.derives.iter().filter_map(|scheme| scheme::derive_name(*scheme)));
                add(&mut entry.constraints, key.touch.then_some("touch"));
                entry.password = vault.password_source(device);
                Place { device: device.name(), state: device.state().health.name() }
            }
        };
        if !entry.places.contains(&shown) {
            entry.places.push(shown);
        }
        add(&mut entry.constraints, place.constraints.confirm.then_some("confirm"));
        add(&mut entry.constraints, (!place.constraints.destinations.is_empty()).then_some("destination"));
        add(&mut entry.constraints, place.constraints.expires.map(|_| "lifetime"));
    }
    let uses = uses(identities.iter().copied());
    add(&mut entry.operations, uses.sign.then_some("sign"));
    add(&mut entry.operations, uses.decrypt.then_some("decrypt"));
    add(&mut entry.operations, uses.derive.then_some("derive"));
    if identities.iter().any(|identity| identity.key_type.is_ssh()) {
        entry.signs.insert(0, scheme::SSH);
    }
    entry
}

/// What a key does beyond plain signatures: where it is able to and has been granted it. With a restriction to hosts it
/// does nothing, whatever it was granted.
fn uses<'a>(identities: impl IntoIterator<Item = &'a Identity> + Clone) -> Grants {
    let mut uses = Grants::NONE;
    if identities.clone().into_iter().any(|identity| identity.restrictions().next().is_some()) {
        return uses;
    }
    for place in identities.into_iter().flat_map(|identity| &identity.places) {
        let (schemes, decrypts, derives) = match &place.key {
            PrivateKey::Soft(key) => (key.schemes(), key.decrypts(), key.derives()),
            PrivateKey::OnDevice(_, key) => (&*key.schemes, &*key.decrypts, &*key.derives),
            PrivateKey::Sk(_) => continue,
        };
        uses.sign |= place.grants.sign && schemes.iter().any(|scheme| scheme::sign_name(*scheme).is_some());
        uses.decrypt |= place.grants.decrypt && !decrypts.is_empty();
        uses.derive |= place.grants.derive && !derives.is_empty();
    }
    uses
}

/// As much of the comment as a list shows.
fn comment(identity: &Identity) -> &[u8] {
    let comment = identity.comment();
    &comment[..comment.len().min(MAX_COMMENT)]
}

/// Adds the names that are not there yet.
fn add<'a>(names: &mut Vec<&'a str>, more: impl IntoIterator<Item = &'a str>) {
    for name in more {
        if !names.contains(&name) {
            names.push(name);
        }
    }
}

fn device_entry<'a>(device: &'a Device, state: &'a DeviceState) -> DeviceEntry<'a> {
    let status = state.status.as_ref();
    let (waiting, running) = device.load();
    let counters = device.counters();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    DeviceEntry {
        id: device.name(),
        kind: device.kind(),
        serial: status.map_or("", |status| &status.serial),
        state: state.health.name(),
        reason: match &state.health {
            Health::Failed(why) => why,
            _ => "",
        },
        lanes: count(device.lanes()),
        running: count(running),
        waiting: count(waiting),
        pin: match status {
            Some(status) if status.tries_left == Some(0) => PinState::Blocked,
            Some(status) if status.locked => PinState::Needed,
            Some(status) if status.tries_left.is_some() => PinState::Open,
            _ => PinState::None,
        },
        tries_left: status.and_then(|status| status.tries_left).map(u32::from),
        done: counters.done,
        failed: counters.failed,
        timed_out: counters.timeouts,
        restarts: counters.restarts,
    }
}

fn refusal_entry<'a>(refused: &'a Refused, reason: &'a str) -> RefusalEntry<'a> {
    RefusalEntry {
        unix_ms: refused.unix_ms,
        message: refused.message,
        key: &refused.key,
        caller: &refused.caller,
        code: Code::from(&refused.refusal),
        reason,
    }
}
