//! Our messages ↔ vault calls: what docs/protocol.md specifies, behind the bytes. Knows tickets; decides nothing.

mod card;
mod carry;
mod life;
mod store;
mod stored;

use std::{borrow::Cow, future::Future, pin::Pin, sync::Arc};

use aws_lc_rs::rand;
use indexmap::IndexMap;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{
    message::{
        self, Cancelled, CarryRequest, Code, Collect, Collected, DeviceEntry, Failure, Finished, How, KeyEntry, KeyUse,
        Name, Page, Paging, PinState, Place, RefusalEntry, Request, StoreRequest, Submit, Target, code::MAX_MESSAGE,
        compatible, fitting, scheme,
    },
    parcel::Parcel,
    ticket::{self, Tickets},
    wire::{self, number},
};
use crate::{
    der,
    devices::{
        DecryptScheme, DeriveScheme, Device, DeviceError, DeviceState, Hash, Health, Input, MAX_BLOB, MAX_NOTES,
        Operation, Outcome, Patience, Scheme, Want, soft::kind,
    },
    public_key::{Blob, FingerprintHash, KeyType, PublicKey, fingerprint},
    vault::{
        Answer, Asked, MEMORY, STORE, Use, Vault,
        audit::{Head, Note},
        key::{Caller, Grants, Identity, PrivateKey},
        policy::{self, Refusal},
        stored::StoredKey,
        why::Refused,
    },
};

/// What a ticket's result is taken to need before it is there, in bytes: a signature of RSA-4096…
const RESULT: usize = 512;
/// …or whatever ssh has signatures for, hybrid ones among them.
const SSH_RESULT: usize = 4096;
/// A key's certificates in one entry of a list.
const MAX_CERTIFICATES: usize = 8;
/// A key's places in one entry of a list.
const MAX_PLACES: usize = 16;
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
    pub(super) parcel: &'a Arc<Parcel>,
    /// When the message was here: deadlines count from then, however long it had to wait for others.
    pub(super) arrived: Instant,
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
        // What was finished before a lock may still be collected. Of the log's state nothing is secret.
        if !matches!(name, Name::Collect | Name::Cancel | Name::Audit)
            && let Err(refusal) = self.vault.check_open()
        {
            let refusal = self.refuse(&request, refusal);
            return done::<()>(out, name, Err(self.refused(name, "", refusal)));
        }
        match request {
            Request::Keys(paging) => self.keys(paging, out),
            Request::Devices(paging) => self.devices(paging, out),
            Request::Use(task, deadline) => self.use_key(&task, deadline.map(|d| self.arrived + d), out),
            Request::Submit(submit) => done(out, name, self.submit(&submit)),
            Request::Collect(collect) => Handled::Collect(collect),
            Request::Cancel(id) => done::<Cancelled>(out, name, Ok(self.tickets.cancel(id))),
            Request::Unlock(target, secret) if self.is_store(&target) => self.unlock_store(&target, secret),
            Request::Lock(target) if self.is_store(&target) => self.lock_store(name, &target),
            Request::Forget(target) if self.is_store(&target) => self.lock_store(name, &target),
            Request::Unlock(target, pin) => {
                let note = self.vault.audit().admit(self.caller, "unlock").map(|note| about(note, &target));
                let (vault, caller, device) = (Arc::clone(self.vault), Arc::clone(self.caller), self.device(target));
                self.act(name, "", note, async move { vault.unlock_device(&device?, &caller, pin).await })
            }
            Request::Lock(target) => {
                let note = about(self.note(name), &target);
                let (vault, device) = (Arc::clone(self.vault), self.device(target));
                self.act(name, "", Ok(note), async move { vault.lock_device(&device?).await })
            }
            Request::Forget(target) => {
                let note = about(self.note(name), &target);
                let everything = matches!(target, Target::Everything);
                let (vault, devices) = (Arc::clone(self.vault), self.devices_of(target));
                self.act(name, "", Ok(note), async move {
                    let devices = devices?;
                    if everything {
                        vault.lock_store();
                    }
                    vault.forget_pins_of(&devices).await
                })
            }
            Request::Why { all, max } => {
                // Whoever may not know of a key learns of it from no refusal.
                let refused = self.vault.why().of(self.caller, all && self.caller.keys.is_none());
                let told: Vec<_> = refused.iter().map(|refused| (refused, refused.refusal.to_string())).collect();
                let (entries, _) = fitting(told.iter().map(|(refused, reason)| refusal_entry(refused, reason)), max);
                done(out, name, Ok(entries))
            }
            Request::Random { len, device } => self.random(len as usize, device, out),
            Request::Audit { flush } => self.audit(flush),
            Request::Check(task) => self.check(&task, out),
            Request::Generate { deadline, device, new, terms } => self.generate(deadline, device, new, terms),
            Request::Import { deadline, key, to } => self.import(deadline, key, to),
            Request::Rename { key, name } => self.rename(key, name),
            Request::Allow { key, operations, proof } => self.allow(key, operations, proof),
            Request::Delete { key, device, name, proof } => self.delete(key, device, name, proof),
            Request::Store(request) => self.store(request),
            Request::Stored(request) => self.stored(request),
            Request::Carry(request) => self.carry(request, out),
            Request::CardStatus(device) => self.card_status(device),
            Request::ChangeCard(device, change) => self.change_card(device, change),
        }
    }

    /// Writes a refusal down for `why`, and as its caller is told.
    fn refused(&self, name: Name, key: &str, refusal: Refusal) -> Failure {
        refused(self.vault, self.caller, name, key, refusal)
    }

    /// An administrative act: something that only succeeds or fails. The reply leaves when the audit log has it.
    fn act(
        &self,
        name: Name,
        key: &str,
        note: Result<Note, Refusal>,
        work: impl Future<Output = Result<(), Refusal>> + Send + 'static,
    ) -> Handled {
        let (vault, caller, key) = (Arc::clone(self.vault), Arc::clone(self.caller), key.to_owned());
        Handled::Later(Box::pin(async move {
            let result = recorded(&vault, note, work, |note, ()| note).await;
            let result = result.map_err(|refusal| refused(&vault, &caller, name, &key, refusal));
            reply::<()>(name, result.as_ref())
        }))
    }

    /// A line of the audit log about something that happens whether it can be written or not.
    fn note(&self, name: Name) -> Note {
        self.vault.audit().note(self.caller, name.short())
    }

    /// Writes down what is refused before it comes to the vault.
    fn refuse(&self, request: &Request<'_>, refusal: Refusal) -> Refusal {
        let note = match request {
            Request::Use(task, _) | Request::Submit(Submit { task, .. }) => self.note(task.name()).blob(task.key),
            Request::Unlock(target, _) | Request::Lock(target) | Request::Forget(target) => {
                about(self.note(request.name()), target)
            }
            Request::ChangeCard(device, change) => self.vault.audit().note(self.caller, change.name()).device(device),
            Request::Generate { device, .. } => self.note(request.name()).device(device),
            Request::Store(StoreRequest::Status) => return refusal,
            Request::Carry(CarryRequest::Fetch(_) | CarryRequest::Upload { .. }) => return refusal,
            Request::Store(_) | Request::Carry(_) => self.note(request.name()).device(STORE),
            Request::Stored(stored) => {
                let note = self.note(request.name()).device(STORE);
                stored.key().map_or_else(|| self.note(request.name()), |key| note.blob(key))
            }
            Request::Import { key, .. }
            | Request::Rename { key, .. }
            | Request::Allow { key, .. }
            | Request::Delete { key, .. } => self.note(request.name()).blob(key),
            _ => return refusal,
        };
        note.end::<()>(Err(refusal.clone())).err().unwrap_or(refusal)
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
        let asked = asked(&task.how);
        let is_ssh = matches!(task.how, How::Ssh { .. });
        let wanted = Use { blob: task.key, asked, deadline, offered: false, waits_for_place: false };
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
        if let Err(refusal) = self.vault.check_open() {
            let _ = self.refused(in_our_words(name), "", refusal);
            wire::put_bare(out, number::EXTENSION_FAILURE);
            return Handled::Done;
        }
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
        let (key, how) = match compatible_use(&request) {
            Ok(wanted) => wanted,
            Err(refusal) => {
                let ours = in_our_words(name);
                let refusal = self.note(ours).end::<()>(Err(refusal.clone())).err().unwrap_or(refusal);
                let _ = self.refused(ours, "", refusal);
                wire::put_bare(out, number::EXTENSION_FAILURE);
                return Handled::Done;
            }
        };
        let is_ecdsa = matches!(how, How::Operation(Operation::Sign { scheme: Scheme::Ecdsa(_), .. }));
        let task = KeyUse { key: &key, how };
        let put = move |out: &mut Vec<u8>, result: ticket::Outcome| match result {
            Ok(bytes) if is_ecdsa => compatible::put_result(out, name, &der::ecdsa_signature(&bytes)),
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
            let uses = uses([&***identity]).without(self.caller.forbidden);
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

    fn submit(&mut self, submit: &Submit<'_>) -> Result<(), Failure> {
        let deadline = submit.deadline.map(|deadline| self.arrived + deadline);
        // An RSA key's results are no longer than the modulus that is in its blob.
        let result =
            if matches!(submit.task.how, How::Ssh { .. }) { SSH_RESULT } else { RESULT.max(submit.task.key.len()) };
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
            // No message of ours could name it, and its entry might be longer than a frame.
            if plain.len() > MAX_BLOB {
                continue;
            }
            keys.entry(plain).or_default().push(identity);
        }
        let start = start(paging);
        let entries =
            keys.iter().skip(start).map(|(plain, identities)| key_entry(self.vault, self.caller, plain, identities));
        let (entries, more) = fitting(entries, paging.max);
        done(out, Name::Keys, Ok(page(start, entries, more)))
    }

    fn devices(&self, paging: Paging<'_>, out: &mut Vec<u8>) -> Handled {
        let shown = |device: &Device| self.vault.shows_device(self.caller, device);
        let devices: Vec<_> =
            self.vault.devices().into_iter().filter(shown).map(|d| (d.state(), d.wanted(), d)).collect();
        let start = start(paging);
        let uid = self.caller.uid;
        let entries = devices.iter().skip(start).map(|(state, want, d)| device_entry(d, state, want.as_deref(), uid));
        let (entries, more) = fitting(entries, paging.max);
        done(out, Name::Devices, Ok(page(start, entries, more)))
    }

    /// The device that a lock, unlock or forget is about, if the caller may do that.
    fn device(&self, target: Target<'_>) -> Result<Device, Refusal> {
        match target {
            _ if !policy::may_lock(self.caller) => Err(Refusal::NotForForwarded),
            Target::Device(id) => self.vault.device(id).ok_or(Refusal::NoSuchDevice),
            Target::Key(blob) => self.vault.device_of(self.caller, blob),
            Target::Everything | Target::Store => Err(Refusal::NoSuchDevice),
        }
    }

    /// The devices that a forget is about, if the caller may do that.
    fn devices_of(&self, target: Target<'_>) -> Result<Vec<Device>, Refusal> {
        match target {
            Target::Everything if policy::may_lock(self.caller) => Ok(self.vault.devices()),
            Target::Everything => Err(Refusal::NotForForwarded),
            one => self.device(one).map(|device| vec![device]),
        }
    }

    /// Tells how far the audit log is written. A log on a disk that hangs makes it wait, and nothing else.
    fn audit(&self, flush: bool) -> Handled {
        let (vault, caller) = (Arc::clone(self.vault), Arc::clone(self.caller));
        Handled::Later(Box::pin(async move {
            let allowed = if policy::may_lock(&caller) { Ok(()) } else { Err(Refusal::NotForForwarded) };
            let head = match allowed {
                Ok(()) if flush => vault.audit().flushed_head().await,
                Ok(()) => vault.audit().head(),
                Err(refusal) => {
                    let failure = refused(&vault, &caller, Name::Audit, "", refusal);
                    return reply::<Head>(Name::Audit, Err(&failure));
                }
            };
            let none = || {
                Failure::new(
                    Code::Unsupported,
                    "there is no audit log; the daemon's log says why, or else `enabled = true` in [audit] begins one",
                )
            };
            reply(Name::Audit, head.ok_or_else(none).as_ref())
        }))
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

/// What comes of an administrative act, once the audit log has it. `told` adds to the line what is known only now.
async fn recorded<T>(
    vault: &Vault,
    note: Result<Note, Refusal>,
    work: impl Future<Output = Result<T, Refusal>>,
    told: impl FnOnce(Note, &T) -> Note,
) -> Result<T, Refusal> {
    let result = match note {
        Ok(note) => match work.await {
            Ok(done) => told(note, &done).end(Ok(done)),
            refused => note.end(refused),
        },
        Err(refusal) => Err(refusal),
    };
    vault.audit().flushed().await;
    result
}

/// The line of the audit log about this target.
fn about(note: Note, target: &Target<'_>) -> Note {
    match target {
        Target::Device(id) => note.device(id),
        Target::Key(blob) => note.blob(blob),
        Target::Store => note.device(STORE),
        Target::Everything => note,
    }
}

/// What is asked of a key, in the vault's words.
fn asked<'a>(how: &'a How<'_>) -> Asked<'a> {
    match how {
        How::Ssh { flags, data } => Asked::Ssh { data, rsa_hash: wire::rsa_hash(*flags) },
        How::Operation(operation) => Asked::Operation(operation.borrowed()),
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

/// What a message of another agent asks, in our words.
fn compatible_use<'a>(request: &compatible::Request<'a>) -> Result<(Vec<u8>, How<'a>), Refusal> {
    let unsupported = |why| Refusal::Device(DeviceError::unsupported(why));
    match *request {
        compatible::Request::DecryptDeriveIds => Err(Refusal::NoSuchKey),
        compatible::Request::DecryptDerive { key, data } => {
            let public = PublicKey::parse(key).map_err(|_| Refusal::NoSuchKey)?;
            let data = Cow::Borrowed(data);
            Ok(match public {
                PublicKey::Rsa { .. } => {
                    let (scheme, label) = (DecryptScheme::RsaPkcs1v15, Cow::Borrowed(&[][..]));
                    (key.to_vec(), How::Operation(Operation::Decrypt { scheme, label, ciphertext: data }))
                }
                // Its clients know X25519 keys by such blobs.
                PublicKey::Ed25519(point) | PublicKey::X25519(point) => {
                    let operation = Operation::Derive { scheme: DeriveScheme::X25519, peer: data };
                    (PublicKey::X25519(point).to_blob(), How::Operation(operation))
                }
                _ => (key.to_vec(), How::Operation(Operation::Derive { scheme: DeriveScheme::Ecdh, peer: data })),
            })
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

/// Which of our messages would ask the same.
fn in_our_words(name: compatible::Name) -> Name {
    match name {
        compatible::Name::SignPrehash => Name::Sign,
        compatible::Name::Ecdh => Name::Derive,
        compatible::Name::DecryptDerive | compatible::Name::DecryptDeriveIds => Name::Decrypt,
    }
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

fn key_entry<'a>(vault: &Vault, caller: &Caller, plain: &'a [u8], identities: &[&'a Identity]) -> KeyEntry<'a> {
    let places = || identities.iter().flat_map(|identity| &identity.places);
    let certificates = identities.iter().map(|identity| &*identity.blob);
    let certificates = certificates.filter(|blob| *blob != plain && blob.len() <= MAX_BLOB);
    let mut entry = KeyEntry {
        blob: plain,
        certificates: certificates.take(MAX_CERTIFICATES).collect(),
        name: identities.iter().map(|identity| identity.given_name()).find(|name| !name.is_empty()).unwrap_or_default(),
        comment: identities.first().map_or(&[], |identity| comment(identity)),
        password: "none",
        ..KeyEntry::default()
    };
    for place in places() {
        if let PrivateKey::OnDevice(_, key) = &place.key
            && entry.note.is_empty()
        {
            entry.note = &key.note;
        }
        let shown = match &place.key {
            PrivateKey::Soft(key) => {
                add(&mut entry.signs, key.schemes().iter().filter_map(|scheme| scheme::sign_name(*scheme)));
                add(&mut entry.decrypts, key.decrypts().iter().filter_map(|scheme| scheme::decrypt_name(*scheme)));
                add(&mut entry.derives, key.derives().iter().filter_map(|scheme| scheme::derive_name(*scheme)));
                Place { device: MEMORY, state: "ready" }
            }
            PrivateKey::Sk(key) => {
                add(&mut entry.constraints, key.wants_touch().then_some("touch"));
                Place { device: "fido", state: "ready" }
            }
            PrivateKey::Stored(key) => {
                describe_stored(&mut entry, key);
                Place { device: STORE, state: if vault.store_is_open() { "ready" } else { "locked" } }
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
        if !entry.places.contains(&shown) && entry.places.len() < MAX_PLACES {
            entry.places.push(shown);
        }
        add(&mut entry.constraints, place.constraints.confirm.then_some("confirm"));
        add(&mut entry.constraints, (!place.constraints.destinations.is_empty()).then_some("destination"));
        let ends = place.constraints.expires.is_some() || place.constraints.not_after.is_some();
        add(&mut entry.constraints, ends.then_some("lifetime"));
        add(&mut entry.constraints, place.constraints.disabled.then_some("disabled"));
    }
    let uses = uses(identities.iter().copied()).without(caller.forbidden);
    add(&mut entry.operations, uses.sign.then_some("sign"));
    add(&mut entry.operations, uses.decrypt.then_some("decrypt"));
    add(&mut entry.operations, uses.derive.then_some("derive"));
    if identities.iter().any(|identity| identity.key_type.is_ssh()) {
        entry.signs.insert(0, scheme::SSH);
    }
    entry
}

/// What an entry says of a key in the store.
fn describe_stored(entry: &mut KeyEntry<'_>, key: &StoredKey) {
    let (of, metadata) = (key.key_type(), key.metadata());
    add(&mut entry.signs, kind::schemes(of).iter().filter_map(|scheme| scheme::sign_name(*scheme)));
    add(&mut entry.decrypts, kind::decrypts(of).iter().filter_map(|scheme| scheme::decrypt_name(*scheme)));
    add(&mut entry.derives, kind::derives(of).iter().filter_map(|scheme| scheme::derive_name(*scheme)));
    entry.password = "prompt";
    entry.created = metadata.created;
    entry.not_after = metadata.expires.unwrap_or(0);
    add(&mut entry.traits, metadata.exportable.then_some("exportable"));
    add(&mut entry.traits, metadata.retires.map(|_| "retired"));
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
            PrivateKey::Stored(key) => {
                let of = key.key_type();
                (kind::schemes(of), kind::decrypts(of), kind::derives(of))
            }
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

fn device_entry<'a>(device: &'a Device, state: &'a DeviceState, want: Option<&'a Want>, uid: u32) -> DeviceEntry<'a> {
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
            Health::Failed(why) => told(why),
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
        notes: state.scan.iter().flat_map(|scan| &scan.notes).take(MAX_NOTES).map(|note| told(note)).collect(),
        wants: want.map_or("", |want| want.deed.name()),
        wanted_for: want.filter(|want| uid == 0 || want.uid == uid).map_or("", |want| &want.text),
    }
}

fn refusal_entry<'a>(refused: &'a Refused, reason: &'a str) -> RefusalEntry<'a> {
    RefusalEntry {
        unix_ms: refused.unix_ms,
        message: refused.message,
        key: &refused.key,
        caller: &refused.caller,
        code: Code::from(&refused.refusal),
        reason: told(reason),
    }
}

/// As much of a reason as is told.
fn told(reason: &str) -> &str {
    &reason[..reason.floor_char_boundary(MAX_MESSAGE)]
}
