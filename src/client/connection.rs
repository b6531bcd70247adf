//! The connection: a task that owns the socket, and the [`Link`] by which requests reach it. Knows frames, tickets and
//! the order of replies; of the messages only those about tickets.
//!
//! Replies come in the order of the requests, so each frame that is written leaves one [`Waiter`] behind. While tickets
//! are open, one `collect` with a long wait is the last frame on the connection; whatever is sent behind it makes the
//! daemon answer it, and then it is sent again (docs/protocol.md, section 6).

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    io::{self, IoSlice},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::UnixStream,
    select,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use zeroize::{Zeroize, Zeroizing};

use super::{ClientError, GRACE, PROMPT};
use crate::agent::{
    frame::{self, Backlog, MAX_FRAME},
    message::{Collect, Collected, KeyUse, MAX_WAIT_MS, Name, ReplyError, Request, Submit, read_reply},
    ticket::MAX_TICKETS,
};

/// The most bytes of requests that wait to be written.
const MAX_UNSENT: usize = 1 << 20;
/// The most requests that the task is offered at once.
const MAX_OFFERED: usize = 1024;
/// The most frames that wait for the socket; the next ones are not taken over before.
const MAX_QUEUED: usize = 64;
/// How long one `collect` waits. It also shows that the daemon lives.
const COLLECT: Duration = Duration::from_secs(20);
/// How long a request that finds no daemon waits for one.
const RECONNECT: Duration = Duration::from_secs(5);
/// The pauses between attempts to connect, from the first to the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(25), Duration::from_secs(1));
/// Bytes that are read at once.
const READ: usize = 64 * 1024;

/// A reply's body, or a ticket's result.
type Bytes = Zeroizing<Vec<u8>>;
type Answered = oneshot::Sender<Result<Bytes, ClientError>>;

/// How long to wait for the answer to a request with this deadline before the daemon is taken for dead.
pub(super) fn patience(deadline: Option<Duration>) -> Duration {
    deadline.unwrap_or(Duration::from_millis(MAX_WAIT_MS.into())).saturating_add(PROMPT)
}

/// Waits for an answer until a little after its deadline.
pub(super) async fn within<T>(
    deadline: Option<Duration>,
    answer: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    match deadline {
        Some(deadline) => timeout(deadline.saturating_add(GRACE), answer).await.unwrap_or(Err(ClientError::NoAnswer)),
        None => answer.await,
    }
}

/// What requests need to reach the connection's task. The task ends with the last one.
#[derive(Clone)]
pub(super) struct Link {
    path: Arc<Path>,
    offers: mpsc::Sender<Offer>,
    /// Ids of tickets that nobody waits for any more; at most one for each that was opened.
    given_up: mpsc::UnboundedSender<u64>,
    tickets: Arc<Semaphore>,
    unsent: Arc<Semaphore>,
    next_id: Arc<AtomicU64>,
}

/// A frame to send, and what is to become of its reply.
struct Offer {
    frame: Frame,
    waiter: Waiter,
    /// Of a submit: whom its ticket is for.
    ticket: Option<(u64, Ticket)>,
}

/// A frame that has not been written yet. Its bytes are counted until they are.
struct Frame {
    bytes: Bytes,
    _counted: Option<OwnedSemaphorePermit>,
}

struct Ticket {
    answer: Answered,
    slot: OwnedSemaphorePermit,
}

/// What the next reply is for.
struct Waiter {
    what: Awaited,
    /// How long it may take once those before it have come.
    patience: Duration,
}

enum Awaited {
    Message(Answered),
    Submit(u64),
    Collect,
    /// The ticket's place is taken until the daemon has let it go.
    Cancel {
        _slot: OwnedSemaphorePermit,
    },
}

impl Link {
    /// Connects, and starts the task.
    pub(super) async fn connect(path: PathBuf) -> Result<Self, ClientError> {
        let path: Arc<Path> = path.into();
        let unreachable = |source| ClientError::Unreachable { path: path.to_path_buf(), source: Arc::new(source) };
        let stream = dial(&path).await.map_err(unreachable)?;
        let (offers, offered) = mpsc::channel(MAX_OFFERED);
        let (given_up, given_up_here) = mpsc::unbounded_channel();
        let task = Task {
            path: path.clone(),
            offered,
            given_up: given_up_here,
            taken: Vec::new(),
            pause: PAUSES.0,
            not_before: Instant::now(),
        };
        tokio::spawn(task.run(stream));
        Ok(Self {
            path,
            offers,
            given_up,
            tickets: Arc::new(Semaphore::new(MAX_TICKETS)),
            unsent: Arc::new(Semaphore::new(MAX_UNSENT)),
            next_id: Arc::default(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Sends a frame and waits for its reply, which may take this long once its turn has come.
    pub(super) async fn message(&self, frame: Bytes, patience: Duration) -> Result<Bytes, ClientError> {
        let frame = self.frame(frame).await?;
        let (answer, answered) = oneshot::channel();
        let waiter = Waiter { what: Awaited::Message(answer), patience };
        self.offer(Offer { frame, waiter, ticket: None }).await?;
        answered.await.map_err(|_| ClientError::Ended)?
    }

    /// Has a key used, as a ticket. When the future is dropped the ticket is cancelled.
    pub(super) async fn ticket(&self, task: KeyUse<'_>, deadline: Option<Duration>) -> Result<Bytes, ClientError> {
        let began = Instant::now();
        let answer = async {
            let slot = self.tickets.clone().acquire_owned().await.map_err(|_| ClientError::Ended)?;
            // The daemon's clock begins when the frame arrives, the caller's began before this waited for its turn.
            let deadline = deadline.map(|deadline| deadline.saturating_sub(began.elapsed()));
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let mut frame = Zeroizing::new(Vec::with_capacity(task.size() + 256));
            Request::Submit(Submit { id, deadline, task }).put(&mut frame);
            let frame = self.frame(frame).await?;
            let (answer, answered) = oneshot::channel();
            let waiter = Waiter { what: Awaited::Submit(id), patience: PROMPT };
            let guard = GiveUp { id, link: self };
            self.offer(Offer { frame, waiter, ticket: Some((id, Ticket { answer, slot })) }).await?;
            let answer = answered.await.map_err(|_| ClientError::Ended);
            std::mem::forget(guard);
            answer?
        };
        within(deadline, answer).await
    }

    /// Waits until there is room for the frame's bytes.
    async fn frame(&self, bytes: Bytes) -> Result<Frame, ClientError> {
        let len = bytes.len();
        if len > 4 + MAX_FRAME {
            return Err(ClientError::TooLong(len));
        }
        let count = u32::try_from(len).map_err(|_| ClientError::TooLong(len))?;
        let counted = self.unsent.clone().acquire_many_owned(count).await.map_err(|_| ClientError::Ended)?;
        Ok(Frame { bytes, _counted: Some(counted) })
    }

    async fn offer(&self, offer: Offer) -> Result<(), ClientError> {
        self.offers.send(offer).await.map_err(|_| ClientError::Ended)
    }
}

/// Gives a ticket up when it is dropped.
struct GiveUp<'a> {
    id: u64,
    link: &'a Link,
}

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        // Without the task there is no ticket.
        let _ = self.link.given_up.send(self.id);
    }
}

/// Connects once. A daemon whose queue of connections is full is asked again for a while.
async fn dial(path: &Path) -> io::Result<UnixStream> {
    let give_up = Instant::now() + RECONNECT;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < give_up => {
                sleep(PAUSES.0).await;
            }
            done => return done,
        }
    }
}

/// Why a connection is over.
enum End {
    /// Nobody needs it any more.
    Unneeded,
    /// Whatever was under way fails with this.
    Broken(ClientError),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Broken(ClientError::Lost)
    }
}

impl From<ReplyError> for End {
    fn from(error: ReplyError) -> Self {
        Self::Broken(error.into())
    }
}

/// The connection's task: one session after the other.
struct Task {
    path: Arc<Path>,
    offered: mpsc::Receiver<Offer>,
    given_up: mpsc::UnboundedReceiver<u64>,
    /// Taken from `offered`, and not yet a session's.
    taken: Vec<Offer>,
    /// Before the next attempt to connect, if this one fails.
    pause: Duration,
    not_before: Instant,
}

impl Task {
    async fn run(mut self, stream: UnixStream) {
        let mut connected = Some(stream);
        while let Some(stream) = connected {
            let mut session = Session::new(stream);
            match session.serve(&mut self).await {
                End::Unneeded => return,
                End::Broken(error) => session.fail(&error),
            }
            connected = self.reconnect().await;
        }
    }

    /// Connects when something is to be sent. `None` when nothing can be sent any more.
    async fn reconnect(&mut self) -> Option<UnixStream> {
        loop {
            if self.taken.is_empty() && self.offered.recv_many(&mut self.taken, MAX_QUEUED).await == 0 {
                return None;
            }
            let give_up = Instant::now() + RECONNECT;
            let error = loop {
                sleep_until(self.not_before).await;
                match dial(&self.path).await {
                    Ok(stream) => {
                        self.pause = PAUSES.0;
                        return Some(stream);
                    }
                    Err(error) => {
                        self.not_before = Instant::now() + self.pause;
                        self.pause = (2 * self.pause).min(PAUSES.1);
                        if self.not_before >= give_up {
                            break error;
                        }
                    }
                }
            };
            let error = ClientError::Unreachable { path: self.path.to_path_buf(), source: Arc::new(error) };
            while let Ok(offer) = self.offered.try_recv() {
                self.taken.push(offer);
            }
            self.taken.drain(..).for_each(|offer| offer.fail(&error));
            while self.given_up.try_recv().is_ok() {}
        }
    }
}

impl Offer {
    fn fail(self, error: &ClientError) {
        self.waiter.fail(error);
        if let Some((_, ticket)) = self.ticket {
            let _ = ticket.answer.send(Err(error.clone()));
        }
    }
}

impl Waiter {
    fn fail(self, error: &ClientError) {
        if let Awaited::Message(answer) = self.what {
            let _ = answer.send(Err(error.clone()));
        }
    }
}

/// One connection from its beginning to its end.
struct Session {
    stream: UnixStream,
    out: VecDeque<Frame>,
    /// Bytes of the first of these that have been written.
    sent: usize,
    waiters: VecDeque<Waiter>,
    /// Since when the first waiter is the first.
    first_since: Instant,
    tickets: HashMap<u64, Ticket>,
    collecting: bool,
    backlog: Backlog,
    buffer: Bytes,
}

impl Session {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            out: VecDeque::new(),
            sent: 0,
            waiters: VecDeque::new(),
            first_since: Instant::now(),
            tickets: HashMap::new(),
            collecting: false,
            backlog: Backlog::default(),
            buffer: vec![0; READ].into(),
        }
    }

    async fn serve(&mut self, task: &mut Task) -> End {
        loop {
            let taken: Vec<Offer> = task.taken.drain(..).collect();
            taken.into_iter().for_each(|offer| self.take(offer));
            if task.offered.is_empty() || self.out.len() >= MAX_QUEUED {
                self.collect();
            }
            let silent = self.waiters.front().map(|first| self.first_since + first.patience);
            let done = select! {
                n = task.offered.recv_many(&mut task.taken, MAX_QUEUED), if self.out.len() < MAX_QUEUED => match n {
                    0 => return End::Unneeded,
                    _ => Ok(()),
                },
                Some(id) = task.given_up.recv() => {
                    self.give_up(id);
                    Ok(())
                }
                ready = self.stream.readable() => ready.map_err(End::from).and_then(|()| self.read()),
                ready = self.stream.writable(), if !self.out.is_empty() => {
                    ready.and_then(|()| self.write()).map_err(End::from)
                }
                () = sleep_until(silent.unwrap_or_else(Instant::now)), if silent.is_some() => {
                    Err(End::Broken(ClientError::NoAnswer))
                }
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    /// Whatever is under way fails.
    fn fail(&mut self, error: &ClientError) {
        self.waiters.drain(..).for_each(|waiter| waiter.fail(error));
        for (_, ticket) in self.tickets.drain() {
            let _ = ticket.answer.send(Err(error.clone()));
        }
    }

    /// Sends what is still wanted.
    fn take(&mut self, offer: Offer) {
        match offer.ticket {
            Some((_, ticket)) if ticket.answer.is_closed() => return,
            Some((id, ticket)) => {
                self.tickets.insert(id, ticket);
            }
            None if matches!(&offer.waiter.what, Awaited::Message(answer) if answer.is_closed()) => return,
            None => {}
        }
        self.send(offer.frame, offer.waiter);
    }

    fn send(&mut self, frame: Frame, waiter: Waiter) {
        if self.waiters.is_empty() {
            self.first_since = Instant::now();
        }
        self.out.push_back(frame);
        self.waiters.push_back(waiter);
    }

    /// Sends a frame of this task's own.
    fn tell(&mut self, request: &Request<'_>, what: Awaited, patience: Duration) {
        let mut bytes = Bytes::default();
        request.put(&mut bytes);
        self.send(Frame { bytes, _counted: None }, Waiter { what, patience });
    }

    /// Sees to it that the results of open tickets come.
    fn collect(&mut self) {
        if !self.collecting && !self.tickets.is_empty() {
            self.collecting = true;
            self.tell(&Request::Collect(Collect { wait: COLLECT, max: 0 }), Awaited::Collect, COLLECT + PROMPT);
        }
    }

    fn give_up(&mut self, id: u64) {
        // Otherwise its result has come, or its submit is still to be taken and will be found closed.
        if let Some(ticket) = self.tickets.remove(&id) {
            self.tell(&Request::Cancel(id), Awaited::Cancel { _slot: ticket.slot }, PROMPT);
        }
    }

    fn write(&mut self) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); MAX_QUEUED];
        for (n, (slice, frame)) in slices.iter_mut().zip(&self.out).enumerate() {
            *slice = IoSlice::new(if n == 0 { &frame.bytes[self.sent..] } else { &frame.bytes });
        }
        let mut written = match self.stream.try_write_vectored(&slices) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            done => self.sent + done?,
        };
        while let Some(first) = self.out.front()
            && first.bytes.len() <= written
        {
            written -= first.bytes.len();
            self.out.pop_front();
        }
        self.sent = written;
        Ok(())
    }

    fn read(&mut self) -> Result<(), End> {
        let n = match self.stream.try_read(&mut self.buffer) {
            Ok(0) => return Err(End::Broken(ClientError::Lost)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            done => done?,
        };
        self.backlog.push(&self.buffer[..n]);
        self.buffer[..n].zeroize();
        let backlog = std::mem::take(&mut self.backlog);
        let mut taken = 0;
        while let Some(body) = frame::first(&backlog.bytes()[taken..]).map_err(|_| ReplyError::Unexpected)? {
            self.reply(body)?;
            taken += 4 + body.len();
        }
        self.backlog = backlog;
        self.backlog.consume(taken);
        Ok(())
    }

    fn reply(&mut self, body: &[u8]) -> Result<(), End> {
        let waiter = self.waiters.pop_front().ok_or(ReplyError::Unexpected)?;
        self.first_since = Instant::now();
        match waiter.what {
            Awaited::Message(answer) => {
                let _ = answer.send(Ok(body.to_vec().into()));
            }
            Awaited::Cancel { .. } => {}
            Awaited::Submit(id) => {
                let error = match read_reply::<()>(Name::Submit, body) {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(failure)) => ClientError::Refused(failure),
                    Err(error) => error.into(),
                };
                self.finish(id, Err(error));
            }
            Awaited::Collect => {
                self.collecting = false;
                let collected: Collected =
                    read_reply(Name::Collect, body)?.map_err(|failure| End::Broken(ClientError::Refused(failure)))?;
                for finished in collected.finished {
                    self.finish(finished.id, finished.reply.map_err(ClientError::Refused));
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self, id: u64, outcome: Result<Bytes, ClientError>) {
        // One that was given up in the meantime is not here.
        if let Some(ticket) = self.tickets.remove(&id) {
            let _ = ticket.answer.send(outcome);
        }
    }
}
