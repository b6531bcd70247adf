//! One connection: who asks, what it is bound to, the order of replies, and which vault call a message becomes.
//!
//! Everything happens in one poll: take what has arrived, answer every complete frame in it, write all answers at
//! once. Buffers belong to the thread; a connection keeps only a partial frame and what the peer has not taken yet.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use tracing::{debug, info, warn};
use zeroize::{Zeroize, Zeroizing};

use super::{
    door::Door,
    extension::{self, SESSION_BIND},
    frame::{self, Backlog, FrameError, MAX_FRAME},
    message::{self, Code, Collect, Failure, compatible},
    parcel::Parcel,
    service::{self, Handled, Later, Service},
    ticket::Tickets,
    wire::{self, AddRequest, PrivateParts, Request, SignRequest, SmartcardRequest, number},
};
use crate::{
    devices::{Outcome, sk::SkKey},
    public_key::{FingerprintHash, KeyType, fingerprint},
    vault::{
        Answer, Asked, Candidate, Use, Vault,
        audit::Note,
        key::{Caller, PrivateKey},
        policy::Refusal,
        provider::NewProvider,
        soft_key,
    },
};

/// Key operations in flight on one connection; then we stop reading frames.
const MAX_IN_FLIGHT: usize = 64;
/// The same in bytes of their requests, of each of which there are copies on its way.
const MAX_IN_FLIGHT_BYTES: usize = 1 << 20;
/// Replies that the peer has not taken, in bytes; then we stop reading.
const MAX_UNSENT: usize = 1 << 20;
/// What one read takes: enough for a burst of requests, little enough that no connection keeps its thread for long.
const READ_SIZE: usize = 32 * 1024;
/// Frames handled in one turn; then other connections have theirs.
const TURN: usize = 64;
/// A reply buffer that grew beyond this goes back to the allocator.
const KEPT_CAPACITY: usize = 64 * 1024;

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_SIZE].into_boxed_slice());
    /// A spare buffer for replies, lent to the connection that is being served.
    static WRITE_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Serves one connection until the peer hangs up or breaks the framing, or until `end` completes and what is in flight
/// is answered. Dropping the future cancels what is in flight.
pub async fn serve<S, E>(stream: S, vault: Arc<Vault>, door: Arc<Door>, caller: Caller, end: E)
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Future<Output = ()>,
{
    let tickets = Tickets::new(caller.uid, Arc::clone(vault.ticket_budget()));
    let session = Session {
        vault,
        door,
        caller: Arc::new(caller),
        tickets,
        parcel: Arc::default(),
        gives_secrets: false,
        secret_seen: false,
    };
    let mut connection = Connection {
        stream,
        session,
        backlog: Backlog::default(),
        replies: VecDeque::new(),
        in_flight_bytes: 0,
        barrier: false,
        out: Vec::new(),
        sent: 0,
        budget: TURN,
        ending: false,
        wipes: false,
    };
    let mut end = pin!(end);
    poll_fn(|cx| {
        connection.ending = connection.ending || end.as_mut().poll(cx).is_ready();
        connection.poll(cx)
    })
    .await;
}

/// A reply in its place among the others.
enum Reply {
    Ready(Zeroizing<Vec<u8>>),
    /// Of a request of so many bytes.
    Waiting(Later, usize),
    /// Of a `collect`, with its time: at once when there is something, or when the next frame is there.
    Collecting(Collect, Pin<Box<Sleep>>),
}

struct Connection<S> {
    stream: S,
    session: Session,
    /// A frame that is not complete, or frames that must wait.
    backlog: Backlog,
    /// Replies that wait, or stand behind one that waits; in the order of their requests.
    replies: VecDeque<Reply>,
    /// Bytes of the requests whose replies wait.
    in_flight_bytes: usize,
    /// Whether what waits is not a key operation, so that nothing may overtake or overlap it.
    barrier: bool,
    out: Vec<u8>,
    sent: usize,
    /// Frames that may still be handled before other connections have their turn.
    budget: usize,
    /// Whether no further frame is handled, and the connection ends when all that were are answered.
    ending: bool,
    /// Whether replies here may carry secrets, so that their buffer is wiped.
    wipes: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.out.capacity() == 0 {
            self.out = WRITE_BUFFER.take();
        }
        self.budget = TURN;
        let polled = self.poll_inner(cx);
        if self.out.is_empty() {
            let mut spare = std::mem::take(&mut self.out);
            if self.wipes {
                spare.zeroize();
            }
            if spare.capacity() <= KEPT_CAPACITY {
                WRITE_BUFFER.set(spare);
            }
        }
        polled
    }

    /// Ready when the connection is over.
    fn poll_inner(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.poll_replies(cx);
            if !self.backlog.bytes().is_empty() && !self.is_full() {
                let backlog = std::mem::take(&mut self.backlog);
                let Ok(taken) = self.handle(backlog.bytes(), |n| backlog.arrived(n)) else { return Poll::Ready(()) };
                self.backlog = backlog;
                self.backlog.consume(taken);
                // A frame that has to wait may have ended a `collect`, whose reply is then due.
                if taken > 0 || matches!(self.replies.front(), Some(Reply::Ready(_))) {
                    continue;
                }
            }
            let held = !self.backlog.bytes().is_empty() && self.is_full();
            let unsent = match self.poll_write(cx) {
                Poll::Ready(Ok(())) => 0,
                Poll::Ready(Err(())) => return Poll::Ready(()),
                Poll::Pending => self.out.len() - self.sent,
            };
            if self.budget == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.ending && self.replies.is_empty() && unsent == 0 {
                return Poll::Ready(());
            }
            // What was written may have made room for frames that wait; nothing else would wake us for them.
            if held && !self.is_full() {
                continue;
            }
            // Reading goes on while something waits, so that a hang-up is noticed.
            if unsent >= MAX_UNSENT || self.backlog.bytes().len() > MAX_FRAME + 4 {
                return Poll::Pending;
            }
            if ready!(self.poll_read(cx)).is_err() {
                return Poll::Ready(());
            }
        }
    }

    /// Whether no further frame may be handled now.
    fn is_full(&self) -> bool {
        self.barrier
            || self.ending
            || self.budget == 0
            || self.replies.len() >= MAX_IN_FLIGHT
            || self.in_flight_bytes >= MAX_IN_FLIGHT_BYTES
            || self.out.len() - self.sent >= MAX_UNSENT
    }

    /// Moves replies that are due into the output.
    fn poll_replies(&mut self, cx: &mut Context<'_>) {
        for reply in &mut self.replies {
            match reply {
                Reply::Ready(_) => {}
                Reply::Waiting(future, request) => {
                    if let Poll::Ready(bytes) = future.as_mut().poll(cx) {
                        self.in_flight_bytes -= *request;
                        *reply = Reply::Ready(bytes);
                    }
                }
                Reply::Collecting(collect, time) => {
                    let found = self.session.tickets.poll_finished(cx).is_ready();
                    if found || self.ending || time.as_mut().poll(cx).is_ready() {
                        *reply = Reply::Ready(service::collected(&mut self.session.tickets, *collect));
                    }
                }
            }
        }
        while let Some(reply) = self.replies.pop_front_if(|reply| matches!(reply, Reply::Ready(_))) {
            if let Reply::Ready(bytes) = reply {
                self.append(&bytes);
            }
        }
        self.barrier &= !self.replies.is_empty();
    }

    fn append(&mut self, reply: &[u8]) {
        if self.wipes {
            frame::append(&mut self.out, reply);
        } else {
            self.out.extend_from_slice(reply);
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        while self.sent < self.out.len() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.out[self.sent..])) {
                Ok(n) if n > 0 => self.sent += n,
                _ => return Poll::Ready(Err(())),
            }
        }
        if self.wipes {
            self.out.zeroize();
        }
        self.out.clear();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Reads once and handles what came. An error is the end of the connection.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            let result = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read));
            let n = read.filled().len();
            if result.is_err() || n == 0 {
                return Poll::Ready(Err(()));
            }
            let (bytes, now) = (&mut buffer[..n], Instant::now());
            let mut taken = 0;
            let mut over = false;
            if self.backlog.bytes().is_empty() && !self.is_full() {
                match self.handle(bytes, |_| now) {
                    Ok(n) => taken = n,
                    Err(_) => over = true,
                }
            }
            if !over && taken < n {
                self.backlog.push(&bytes[taken..]);
            }
            // What was more than signature requests may have been a private key or a PIN.
            if over || taken < n || self.session.handled_secret() {
                bytes.zeroize();
            }
            Poll::Ready(if over { Err(()) } else { Ok(()) })
        })
    }

    /// Handles the complete frames in `bytes` as far as they may be, and returns how many bytes that were. `arrived` says
    /// when so many of them had come.
    fn handle(&mut self, bytes: &[u8], arrived: impl Fn(usize) -> Instant) -> Result<usize, FrameError> {
        let mut taken = 0;
        while !self.is_full() {
            let body = match frame::first(&bytes[taken..]) {
                Ok(Some(body)) => body,
                Ok(None) => break,
                Err(e) => {
                    info!(pid = self.session.caller.pid, "closed a connection: {e}");
                    return Err(e);
                }
            };
            self.hurry();
            let key_operation = Request::is_key_operation(body);
            if !key_operation && !self.replies.is_empty() {
                break;
            }
            taken += 4 + body.len();
            // Behind a reply that waits, one that is ready has to queue. Nor may a buffer that has secrets grow elsewhere.
            let mut queued = Zeroizing::new(Vec::new());
            let out = if self.replies.is_empty() && !self.wipes { &mut self.out } else { &mut *queued };
            match self.session.handle(body, arrived(taken), out) {
                Handled::Done if self.replies.is_empty() => self.append(&queued),
                Handled::Done => self.replies.push_back(Reply::Ready(queued)),
                Handled::Later(waiting) => {
                    self.replies.push_back(Reply::Waiting(waiting, body.len()));
                    self.in_flight_bytes += body.len();
                    self.barrier = !key_operation;
                }
                Handled::Collect(collect) => {
                    let time = Box::pin(sleep(collect.wait));
                    self.replies.push_back(Reply::Collecting(collect, time));
                }
            }
            self.wipes |= self.session.gives_secrets;
            // A list looks at all keys.
            let is_list = !key_operation && body[0] == number::EXTENSION;
            self.budget = if is_list { 0 } else { self.budget - 1 };
        }
        // A future begins when it is polled: whoever handled frames polls the replies before it sleeps.
        Ok(taken)
    }

    /// A `collect` waits only while it is the last frame.
    fn hurry(&mut self) {
        if let Some(reply @ Reply::Collecting(..)) = self.replies.back_mut()
            && let Reply::Collecting(collect, _) = *reply
        {
            *reply = Reply::Ready(service::collected(&mut self.session.tickets, collect));
        }
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        if self.wipes {
            self.out.zeroize();
        }
    }
}

struct Session {
    vault: Arc<Vault>,
    door: Arc<Door>,
    caller: Arc<Caller>,
    tickets: Tickets,
    parcel: Arc<Parcel>,
    /// Whether a message was handled here whose reply may carry a secret.
    gives_secrets: bool,
    /// Whether a frame with a secret was handled since this was last asked.
    secret_seen: bool,
}

impl Session {
    fn handled_secret(&mut self) -> bool {
        std::mem::take(&mut self.secret_seen)
    }

    /// Appends the reply to `out`, or returns the future that makes it. The frame was complete when it `arrived`.
    fn handle(&mut self, body: &[u8], arrived: Instant, out: &mut Vec<u8>) -> Handled {
        self.secret_seen |= Request::is_secret(body);
        let request = match Request::read(body) {
            Ok(request) if !self.caller.denied => request,
            Ok(Request::Extension(name, _)) if let Some(name) = message::Name::from_bytes(name) => {
                message::put_reply::<()>(out, name, Err(&shut_out()));
                return Handled::Done;
            }
            Ok(_) => return bare(out, number::FAILURE),
            Err(e) => {
                info!(pid = self.caller.pid, message = body.first(), "refused a malformed request: {e}");
                return bare(out, number::FAILURE);
            }
        };
        match request {
            Request::Sign(request) => return self.sign(&request, out),
            Request::List => self.list(out),
            Request::Add(request) if is_slow(&request) => return Handled::Later(self.add_later(body)),
            Request::Add(request) => {
                let added = self.vault.audit().admit(&self.caller, "add").and_then(|note| {
                    let added = self.vault.check_open().and_then(|()| add(&self.vault, &self.caller, &request, None));
                    note.blob(&request.blob).end(added)
                });
                return self.done("add", added, out);
            }
            Request::Remove(blob) => {
                let removed = self.note("remove").blob(blob).end(self.vault.remove(&self.caller, blob));
                return self.done("remove", removed, out);
            }
            Request::RemoveAll => {
                let removed = self.note("remove-all").end(self.vault.remove_all(&self.caller));
                return self.done("remove-all", removed, out);
            }
            Request::AddSmartcard(request) => return Handled::Later(self.add_provider(&request)),
            Request::RemoveSmartcard(request) => {
                let (vault, caller) = (Arc::clone(&self.vault), Arc::clone(&self.caller));
                let provider = request.provider.to_owned();
                return Handled::Later(self.done_later("remove-smartcard", async move {
                    let note = vault.audit().note(&caller, "remove-smartcard");
                    note.end(vault.remove_provider(&caller, &provider).await)
                }));
            }
            Request::Lock(password) => {
                let lock = Arc::clone(&self.vault).lock(Arc::clone(&self.caller), Zeroizing::new(password.to_vec()));
                return Handled::Later(self.done_later("lock", lock));
            }
            Request::Unlock(password) => {
                let unlock =
                    Arc::clone(&self.vault).unlock(Arc::clone(&self.caller), Zeroizing::new(password.to_vec()));
                return Handled::Later(self.done_later("unlock", unlock));
            }
            Request::Extension(name, body) => return self.extension(name, body, arrived, out),
        }
        Handled::Done
    }

    fn sign(&self, request: &SignRequest<'_>, out: &mut Vec<u8>) -> Handled {
        let asked = Asked::Ssh { data: request.data, rsa_hash: wire::rsa_hash(request.flags) };
        let wanted = Use { blob: request.blob, asked, deadline: None, offered: true, waits_for_place: true };
        match self.vault.operate(&self.caller, wanted) {
            Answer::Now(result) => {
                put_signed(out, result, request.blob, &self.vault, &self.caller);
                Handled::Done
            }
            Answer::Later(future) => {
                let (blob, vault, caller) = (request.blob.to_vec(), Arc::clone(&self.vault), Arc::clone(&self.caller));
                Handled::Later(Box::pin(async move {
                    let mut out = Zeroizing::new(Vec::new());
                    put_signed(&mut out, future.await, &blob, &vault, &caller);
                    out
                }))
            }
        }
    }

    fn list(&self, out: &mut Vec<u8>) {
        let listing = self.vault.list(&self.caller);
        out.extend_from_slice(listing.encoded(|identities| {
            wire::identities_answer(identities, |left_out| {
                warn!(left_out, "the listing ends where OpenSSH's clients would refuse it");
            })
        }));
    }

    /// Adds a key whose checking takes long, or whose provider's path leads to who knows what file system.
    fn add_later(&self, body: &[u8]) -> Later {
        let (vault, caller) = (Arc::clone(&self.vault), Arc::clone(&self.caller));
        let body = Zeroizing::new(body.to_vec());
        self.done_later("add", async move {
            let note = vault.audit().admit(&caller, "add")?;
            let (note, provider) = match Request::read(&body) {
                Ok(Request::Add(request)) => {
                    let provider = request.constraints.sk_provider.filter(|path| is_path(path));
                    (note.blob(&request.blob), provider.map(str::to_owned))
                }
                _ => (note, None),
            };
            let added = async {
                vault.check_open()?;
                let provider = match provider {
                    Some(path) => Some(vault.approve_provider(&caller, &path).await?),
                    None => None,
                };
                let (vault, caller) = (Arc::clone(&vault), Arc::clone(&caller));
                let added = tokio::task::spawn_blocking(move || match Request::read(&body) {
                    Ok(Request::Add(request)) => add(&vault, &caller, &request, provider),
                    _ => Err(Refusal::NoSuchKey),
                });
                added.await.unwrap_or(Err(Refusal::Timeout))
            };
            note.end(added.await)
        })
    }

    fn add_provider(&self, request: &SmartcardRequest<'_>) -> Later {
        let constraints = &request.constraints;
        let certificates = constraints.associated_certs.as_ref();
        let wanted = NewProvider {
            path: request.provider.to_owned(),
            pin: request.pin.into(),
            lifetime: constraints.lifetime,
            confirm: constraints.confirm,
            destinations: constraints.destinations.clone().unwrap_or_default(),
            certificates: certificates.iter().flat_map(|all| &all.blobs).map(|blob| Box::from(*blob)).collect(),
            certificates_only: certificates.is_some_and(|all| all.cert_only),
        };
        let has_sk_provider = constraints.sk_provider.is_some();
        let (vault, caller) = (Arc::clone(&self.vault), Arc::clone(&self.caller));
        self.done_later("add-smartcard", async move {
            let note = vault.audit().admit(&caller, "add-smartcard")?;
            if has_sk_provider {
                return note.end(Err(Refusal::Constraint("sk-provider")));
            }
            note.end(vault.add_provider(caller, wanted).await)
        })
    }

    /// A line of the audit log about something that happens whether it can be written or not.
    fn note(&self, operation: &'static str) -> Note {
        self.vault.audit().note(&self.caller, operation)
    }

    fn extension(&mut self, name: &[u8], body: &[u8], arrived: Instant, out: &mut Vec<u8>) -> Handled {
        let is = |known: &str| name == known.as_bytes();
        if is(SESSION_BIND) && !self.door.binds_sessions() {
            warn!(pid = self.caller.pid, "an ssh tried to bind a session at the service door: it is denied everything");
            Arc::make_mut(&mut self.caller).denied = true;
            wire::put_bare(out, number::FAILURE);
        } else if is(SESSION_BIND) {
            match extension::session_bind(Arc::make_mut(&mut self.caller), body) {
                Ok(()) => wire::put_bare(out, number::SUCCESS),
                Err(e) => {
                    warn!(pid = self.caller.pid, "refused a session bind: {e}");
                    wire::put_bare(out, number::EXTENSION_FAILURE);
                }
            }
        } else if !self.door.speaks(&self.caller, name) {
            debug!(pid = self.caller.pid, "an extension that is not spoken here");
            wire::put_bare(out, number::FAILURE);
        } else if let Some(name) = message::Name::from_bytes(name) {
            self.gives_secrets |= name.gives_secrets();
            return self.service(arrived).handle(name, body, out);
        } else if let Some(name) = compatible::Name::from_bytes(name) {
            self.gives_secrets = true;
            return self.service(arrived).handle_compatible(name, body, out);
        } else if self.door.binds_sessions() && self.vault.check_open().is_err() {
            // As ssh-agent does. A client of the service door must find out that it is one, and why it gets nothing.
            wire::put_bare(out, number::FAILURE);
        } else {
            wire::put_query_answer(out, self.door.extensions(&self.caller));
        }
        Handled::Done
    }

    fn service(&mut self, arrived: Instant) -> Service<'_> {
        Service { vault: &self.vault, caller: &self.caller, tickets: &mut self.tickets, parcel: &self.parcel, arrived }
    }

    /// Appends success, or failure and the reason to the log: when the audit log has it on the disk, where there is one.
    fn done(&self, message: &'static str, result: Result<(), Refusal>, out: &mut Vec<u8>) -> Handled {
        if self.vault.audit().is_on() {
            return Handled::Later(self.done_later(message, async move { result }));
        }
        put_done(out, message, result, &self.vault, &self.caller);
        Handled::Done
    }

    fn done_later(
        &self,
        message: &'static str,
        work: impl Future<Output = Result<(), Refusal>> + Send + 'static,
    ) -> Later {
        let (vault, caller) = (Arc::clone(&self.vault), Arc::clone(&self.caller));
        Box::pin(async move {
            let mut out = Zeroizing::new(Vec::new());
            let result = work.await;
            vault.audit().flushed().await;
            put_done(&mut out, message, result, &vault, &caller);
            out
        })
    }
}

/// Whether adding the key is more than some ten microseconds' work.
fn is_slow(request: &AddRequest<'_>) -> bool {
    matches!(request.key_type, KeyType::Rsa | KeyType::MlDsa44Ed25519) || request.constraints.sk_provider.is_some()
}

/// Whether a FIDO provider is a library rather than the helper's own.
fn is_path(provider: &str) -> bool {
    !provider.eq_ignore_ascii_case("internal")
}

/// Adds the key of a request. `provider` is the approved library of a FIDO key; without one it is the helper's own.
fn add(vault: &Vault, caller: &Caller, request: &AddRequest<'_>, provider: Option<String>) -> Result<(), Refusal> {
    let constraints = &request.constraints;
    if constraints.associated_certs.is_some() {
        return Err(Refusal::Constraint("associated-certs"));
    }
    let key = match &request.private {
        PrivateParts::Soft(_) if constraints.sk_provider.is_some() => return Err(Refusal::Constraint("sk-provider")),
        PrivateParts::Soft(parts) => soft_key(parts)?,
        PrivateParts::Sk { public, application, flags, key_handle, reserved } => {
            let provider = provider.unwrap_or_else(|| "internal".to_owned());
            let handle = Zeroizing::new(key_handle.to_vec());
            PrivateKey::Sk(Arc::new(SkKey::new(public, application, *flags, handle, reserved, provider)?))
        }
    };
    let candidate = Candidate {
        blob: request.blob.clone(),
        key_type: request.key_type,
        comment: request.comment.into(),
        lifetime: constraints.lifetime,
        confirm: constraints.confirm,
        destinations: constraints.destinations.clone().unwrap_or_default(),
    };
    vault.add(caller, candidate, key)
}

/// What a connection is told that the service door's second fence keeps off.
fn shut_out() -> Failure {
    Failure::new(
        Code::Denied,
        "this connection is shut out: the service door is not for ssh, nor for what ssh forwards",
    )
}

fn bare(out: &mut Vec<u8>, number: u8) -> Handled {
    wire::put_bare(out, number);
    Handled::Done
}

fn put_done(out: &mut Vec<u8>, message: &'static str, result: Result<(), Refusal>, vault: &Vault, caller: &Caller) {
    match result {
        Ok(()) => wire::put_bare(out, number::SUCCESS),
        Err(refusal) => {
            warn!(pid = caller.pid, uid = caller.uid, "refused {message}: {refusal}");
            vault.why().record(caller, message, String::new(), refusal);
            wire::put_bare(out, number::FAILURE);
        }
    }
}

#[inline]
fn put_signed(out: &mut Vec<u8>, result: Result<Outcome, Refusal>, blob: &[u8], vault: &Vault, caller: &Caller) {
    match result {
        Ok(Outcome::Signature(signature)) => {
            wire::put_signature(out, &signature);
            debug!(key = fingerprint(blob, FingerprintHash::Sha256), pid = caller.pid, "signed");
        }
        // A plain sign request has no other outcome.
        Ok(Outcome::Secret(_)) => wire::put_bare(out, number::FAILURE),
        Err(refusal) => {
            let key = fingerprint(blob, FingerprintHash::Sha256);
            warn!(key, pid = caller.pid, uid = caller.uid, "refused to sign: {refusal}");
            vault.why().record(caller, "sign", key, refusal);
            wire::put_bare(out, number::FAILURE);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        devices::{
            self, Device, Driver,
            in_process::InProcess,
            scripted::{Control, Script, Scripted},
        },
        prompt::{self, Prompter},
        public_key::PublicKey,
        rfc4251::Put,
        vault::{Parts, Settings, registry::Terms, store::Store},
    };
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    use std::{future::pending, time::Duration};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    fn vault() -> Arc<Vault> {
        let prompter = Prompter::new(prompt::Settings::default());
        Vault::new(Settings::default(), Parts::new(prompter, Store::in_memory().unwrap()))
    }

    fn connect(buffer: usize) -> DuplexStream {
        connect_to(vault(), buffer)
    }

    fn connect_to(vault: Arc<Vault>, buffer: usize) -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(buffer);
        tokio::spawn(serve(theirs, vault, Arc::new(Door::ssh_agent()), Caller::default(), pending()));
        ours
    }

    fn framed(number: u8, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut body = vec![number];
        write(&mut body);
        let mut frame = Vec::new();
        frame.put_string(&body);
        frame
    }

    fn add(seed: u8, comment: &[u8]) -> Vec<u8> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        let public = pair.public_key().as_ref();
        framed(number::ADD_IDENTITY, |body| {
            body.put_string(b"ssh-ed25519");
            body.put_string(public);
            body.put_string(&[&[seed; 32], public].concat());
            body.put_string(comment);
        })
    }

    async fn reply(stream: &mut DuplexStream) -> Vec<u8> {
        let mut body = vec![0; stream.read_u32().await.unwrap() as usize];
        stream.read_exact(&mut body).await.unwrap();
        body
    }

    /// More replies than are kept unsent, to a peer that takes them all at once: nothing but the writing itself tells
    /// the connection that it may go on.
    #[tokio::test]
    async fn frames_that_waited_for_room_are_handled() {
        const LISTS: usize = 40;
        let mut stream = connect(16 << 20);
        let mut requests = Vec::new();
        for seed in 1..=5 {
            requests.extend(add(seed, &[b'c'; 40_000]));
        }
        requests.extend(framed(number::REQUEST_IDENTITIES, |_| {}).repeat(LISTS));
        stream.write_all(&requests).await.unwrap();
        for _ in 0..5 {
            assert_eq!(reply(&mut stream).await, [number::SUCCESS]);
        }
        for _ in 0..LISTS {
            let listed = tokio::time::timeout(Duration::from_secs(20), reply(&mut stream)).await.unwrap();
            assert!(listed[0] == number::IDENTITIES_ANSWER && listed.len() > 200_000);
        }
    }

    /// A peer that sends long requests to a device which hangs.
    #[tokio::test]
    async fn requests_in_flight_are_bounded_in_bytes() {
        const LONG: usize = 200_000;
        let script = "[[key]]\nslot = 'k'\ntype = 'ed25519'\n[[rule]]\non = 'sign'\ndo = 'hang'";
        let engine = InProcess::<Scripted>::new(|| Control::new(Script::parse(script).unwrap()));
        let device = Device::start("device", Scripted::KIND, devices::Settings::default(), engine);
        let scan = device.watch().wait_for(|state| state.scan.is_some()).await.unwrap().scan.clone().unwrap();
        let vault = vault();
        vault.add_device(device.clone(), Terms::default(), &scan.keys).unwrap();
        let mut stream = connect_to(vault, 16 << 20);
        let request = framed(number::SIGN_REQUEST, |body| {
            body.put_string(&scan.keys[0].blob);
            body.put_string(&[7; LONG]);
            body.put_u32(0);
        });
        stream.write_all(&request.repeat(20)).await.unwrap();
        let in_flight = || device.load().0 + device.load().1;
        let enough = MAX_IN_FLIGHT_BYTES.div_ceil(LONG);
        while in_flight() < enough {
            tokio::task::yield_now().await;
        }
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        assert_eq!(in_flight(), enough);
    }

    #[tokio::test]
    async fn a_long_burst_is_answered_in_order() {
        const SIGNS: u32 = 1000;
        let mut stream = connect(16 << 20);
        let pair = Ed25519KeyPair::from_seed_unchecked(&[1; 32]).unwrap();
        let blob = PublicKey::Ed25519(pair.public_key().as_ref()).to_blob();
        let mut requests = add(1, b"key");
        for n in 0..SIGNS {
            requests.extend(framed(number::SIGN_REQUEST, |body| {
                body.put_string(&blob);
                body.put_string(&n.to_be_bytes());
                body.put_u32(0);
            }));
        }
        stream.write_all(&requests).await.unwrap();
        assert_eq!(reply(&mut stream).await, [number::SUCCESS]);
        let public = PublicKey::parse(&blob).unwrap();
        for n in 0..SIGNS {
            let answer = reply(&mut stream).await;
            let signature = crate::rfc4251::Reader::new(&answer[1..]).string().unwrap().to_vec();
            assert!(public.verify(&n.to_be_bytes(), &signature).is_ok(), "reply {n}");
        }
    }
}
