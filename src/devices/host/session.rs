//! The daemon's side of a device's process: calls on their way, their answers, and the end of it all. Knows frames;
//! starts nothing.
//!
//! A task owns the process and reads the socket. Whatever the process does wrong ends the session: a frame that is none, an
//! answer to what was not asked, an answer of another kind than its call's. Ids come once, so that no answer can reach
//! another call.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    pin::Pin,
    process::ExitStatus,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    net::UnixStream,
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot, watch,
    },
    task::JoinHandle,
    time::timeout,
};
use zeroize::Zeroizing;

use super::{
    incoming::Incoming,
    wire::{self, Answer, Frame, FrameError},
};
use crate::{
    devices::{
        DeviceError,
        call::{Call, Reply, Session, Underway},
    },
    reactor::{Registry, Socket, SocketWriter},
    sys::spawn::Child,
};

/// How long a killed process may take to be gone before its end is told without its status; and how long what it wrote
/// before it died is still read.
const LINGER: Duration = Duration::from_secs(1);

/// How many calls few lanes have ahead together, and how many one lane at most. With one for each, two lanes had nothing to do
/// for a tenth of their time, while their answers were verified and the next requests came. More would have callers wait
/// longer for each other.
const AHEAD: usize = 6;
const AHEAD_OF_ONE: usize = 3;

/// How many calls so many lanes take besides.
fn ahead(lanes: usize) -> usize {
    lanes.max(AHEAD.min(AHEAD_OF_ONE * lanes))
}

/// A driver in a process of its own.
pub struct HostSession {
    calls: Arc<Calls>,
    lanes: usize,
    ended: watch::Receiver<Option<String>>,
    /// Says how long the process may take to part. Dropped with the session: then the task kills it at once.
    stop: oneshot::Sender<Duration>,
    /// Sends nothing; it is closed when nothing of the process is left.
    gone: oneshot::Receiver<Infallible>,
}

/// Why nothing more comes from a process.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("the device's process has closed its socket")]
    Closed,
    #[error("the socket to the device's process fails: {0}")]
    Socket(io::Error),
    #[error("the device's process sent nonsense: {0}")]
    Nonsense(#[from] Nonsense),
}

/// What no honest process sends.
#[derive(Debug, Error)]
pub(super) enum Nonsense {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("an answer to what was not asked")]
    Unasked,
    #[error("an answer of the wrong kind")]
    WrongKind,
}

impl Broken {
    /// For a person: the words, or how the process ended where that says more.
    pub(super) fn reason(&self, status: Option<ExitStatus>) -> String {
        match (self, status) {
            (Self::Nonsense(_), _) | (_, None) => self.to_string(),
            (_, Some(status)) => match status.code() {
                Some(code) => format!("the device's process exited with code {code}"),
                None => format!("the device's process was ended by {status}"),
            },
        }
    }
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Socket(error),
        }
    }
}

impl From<FrameError> for Broken {
    fn from(error: FrameError) -> Self {
        Self::Nonsense(error.into())
    }
}

/// Reads one frame's body.
async fn read_body(input: &mut (impl AsyncRead + Unpin)) -> Result<Frame, Broken> {
    let mut header = [0; wire::HEADER];
    input.read_exact(&mut header).await?;
    let mut body = Zeroizing::new(vec![0; wire::body_len(header)?]);
    input.read_exact(&mut body).await?;
    Ok(body)
}

/// Sends the configuration and waits for the driver to have opened its device; its lanes.
pub(super) async fn open(socket: &mut UnixStream, config: &[u8]) -> Result<Result<usize, DeviceError>, Broken> {
    match first_answer(socket, config).await? {
        Ok(Answer::Opened(lanes)) => Ok(Ok(lanes)),
        Ok(Answer::Reply(_)) => Err(Nonsense::WrongKind.into()),
        Err(error) => Ok(Err(error)),
    }
}

/// Sends a question and waits for its answer.
pub(super) async fn ask(
    socket: &mut UnixStream,
    question: &[u8],
) -> Result<Result<Zeroizing<Vec<u8>>, DeviceError>, Broken> {
    match first_answer(socket, question).await? {
        Ok(Answer::Reply(Reply::Bytes(bytes))) => Ok(Ok(bytes)),
        Ok(_) => Err(Nonsense::WrongKind.into()),
        Err(error) => Ok(Err(error)),
    }
}

/// Waits for what a process tells that was opened by [`ask`].
pub(super) async fn told(socket: &mut UnixStream) -> Result<Zeroizing<Vec<u8>>, Broken> {
    match wire::decode_answer(&read_body(socket).await?)? {
        (wire::OPEN_ID, Ok(Answer::Reply(Reply::Bytes(bytes)))) => Ok(bytes),
        (wire::OPEN_ID, _) => Err(Nonsense::WrongKind.into()),
        _ => Err(Nonsense::Unasked.into()),
    }
}

async fn first_answer(socket: &mut UnixStream, config: &[u8]) -> Result<Result<Answer, DeviceError>, Broken> {
    if let Err(e) = socket.write_all(&wire::encode_open(config)).await {
        // A process that ended as soon as it began: how it ended says more.
        return Err(if e.kind() == io::ErrorKind::BrokenPipe { Broken::Closed } else { e.into() });
    }
    match wire::decode_answer(&read_body(socket).await?)? {
        (wire::OPEN_ID, answer) => Ok(answer),
        _ => Err(Nonsense::Unasked.into()),
    }
}

/// How the process ended, if it does soon.
pub(super) async fn end_of(child: &Child) -> Option<ExitStatus> {
    timeout(LINGER, child.exited()).await.ok().flatten()
}

impl HostSession {
    /// A session on a process that has opened its device. `log` ends by itself soon after the process.
    pub(super) fn start(
        reactor: &Registry,
        socket: UnixStream,
        child: Child,
        lanes: usize,
        log: Option<JoinHandle<()>>,
    ) -> io::Result<Self> {
        let limit = lanes + ahead(lanes) + wire::SPARE_CALLS;
        // Each may be withdrawn.
        let (sender, late) = mpsc::channel(2 * limit);
        let (end, ended) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let (going, gone) = oneshot::channel();
        let mut started = None;
        reactor.attend(socket.into_std()?.into(), |socket| {
            let calls = Arc::new(Calls::new(socket.writer(), sender, limit));
            started = Some(Arc::clone(&calls));
            async move {
                run(socket, late, calls, child, stopped, log, end).await;
                drop(going);
            }
        })?;
        let calls = started.ok_or(io::ErrorKind::Other)?;
        Ok(Self { calls, lanes, ended, stop, gone })
    }
}

impl Session for HostSession {
    fn lanes(&self) -> usize {
        self.lanes
    }

    fn ahead(&self) -> usize {
        ahead(self.lanes)
    }

    fn call(&self, call: Call) -> impl Underway {
        let id = self.calls.next.fetch_add(1, Ordering::Relaxed);
        HostCall { id, answer: self.calls.make(id, &call), calls: Arc::clone(&self.calls) }
    }

    fn died(&self) -> impl Future<Output = String> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            match ended.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or_default(),
                // The reactor is ending, and took the task with it.
                Err(_) => "the device's process was ended".into(),
            }
        }
    }

    async fn end(self, parting: Duration) {
        // An error is the end of the process, which was first.
        let _ = self.stop.send(parting);
        let _ = self.gone.await;
    }
}

/// A call that was sent to the process, or why it was not.
struct HostCall {
    id: u64,
    answer: Result<oneshot::Receiver<Result<Reply, DeviceError>>, DeviceError>,
    calls: Arc<Calls>,
}

impl Future for HostCall {
    type Output = Result<Reply, DeviceError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.answer {
            Ok(answer) => Pin::new(answer).poll(cx).map(|answer| answer.unwrap_or(Err(DeviceError::Restarted))),
            Err(error) => Poll::Ready(Err(error.clone())),
        }
    }
}

impl Underway for HostCall {
    fn withdraw(&self) {
        self.calls.withdraw(self.id);
    }
}

/// Carries answers until the session ends, then sees the process off.
async fn run(
    socket: Socket,
    mut late: mpsc::Receiver<Late>,
    calls: Arc<Calls>,
    child: Child,
    stopped: oneshot::Receiver<Duration>,
    log: Option<JoinHandle<()>>,
    end: watch::Sender<Option<String>>,
) {
    let ended = {
        let (input, output) = split(socket);
        let mut answers = std::pin::pin!(read_answers(input, &calls));
        let writing = calls.write(output, &mut late);
        tokio::select! {
            broken = &mut answers => Err(broken),
            // What cannot be written: the process is going, and what it still said is read.
            _ = writing => Err(timeout(LINGER, answers).await.unwrap_or(Broken::Closed)),
            // The same where something that it left behind holds the socket open.
            _ = child.exited() => Err(timeout(LINGER, answers).await.unwrap_or(Broken::Closed)),
            parting = stopped => Ok(parting.unwrap_or_default()),
        }
    };
    calls.close();
    let reason = match ended {
        Ok(parting) => {
            let _ = timeout(parting, child.exited()).await;
            "the device's process was ended".to_owned()
        }
        Err(nonsense @ Broken::Nonsense(_)) => nonsense.reason(None),
        // Its own end comes with the socket's, or right after; only then is the status its own.
        Err(broken) => broken.reason(end_of(&child).await),
    };
    child.kill();
    let gone = timeout(LINGER, child.exited()).await.is_ok();
    end.send_replace(Some(reason));
    if !gone {
        child.exited().await;
    }
    if let Some(log) = log {
        let _ = log.await;
    }
}

async fn read_answers(mut input: impl AsyncRead + Unpin, calls: &Calls) -> Broken {
    let mut incoming = Incoming::new();
    let read = async {
        loop {
            while let Some(taken) = incoming.take(|body| calls.take(body))? {
                taken?;
            }
            match input.read(incoming.room()?).await? {
                0 => return Err(Broken::Closed),
                n => incoming.came(n),
            }
        }
    };
    let Err::<Infallible, _>(broken) = read.await;
    broken
}

/// A frame that the socket had no room for, and how much of it was written.
type Late = (Frame, usize);

/// The calls that have no answer yet, and the socket.
struct Calls {
    next: AtomicU64,
    /// `None` once the session is over. Not locked while anything is sent, or answers would wait for it.
    waiting: Mutex<Option<HashMap<u64, Waiting>>>,
    /// Whether frames are late: others queue behind them.
    blocked: Mutex<bool>,
    output: SocketWriter,
    late: mpsc::Sender<Late>,
    /// How many may wait, those included whose callers have given up.
    limit: usize,
}

struct Waiting {
    kind: Kind,
    withdrawn: bool,
    caller: oneshot::Sender<Result<Reply, DeviceError>>,
}

impl Waiting {
    fn may_get(&self, reply: &Reply) -> bool {
        Kind::of(reply).map_or(self.withdrawn, |kind| kind == self.kind)
    }
}

/// What a call can be answered with, besides an error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Scan,
    Status,
    Done,
    Key,
    Card,
    Bytes,
}

impl Kind {
    fn asked_for(call: &Call) -> Self {
        match call {
            Call::Scan => Self::Scan,
            Call::Health => Self::Status,
            Call::Unlock(..) | Call::Lock | Call::Rename(..) | Call::Delete(_) | Call::ChangeCard(_) => Self::Done,
            Call::CardStatus => Self::Card,
            Call::Generate(_) | Call::Import(..) => Self::Key,
            Call::Random(_) | Call::Operate(..) => Self::Bytes,
        }
    }

    /// `None` for what any call gets that was withdrawn.
    fn of(reply: &Reply) -> Option<Self> {
        Some(match reply {
            Reply::Scan(_) => Self::Scan,
            Reply::Status(_) => Self::Status,
            Reply::Done => Self::Done,
            Reply::Key(_) => Self::Key,
            Reply::Card(_) => Self::Card,
            Reply::Bytes(_) => Self::Bytes,
            Reply::Withdrawn => return None,
        })
    }
}

impl Calls {
    fn new(output: SocketWriter, late: mpsc::Sender<Late>, limit: usize) -> Self {
        let (next, waiting) = (AtomicU64::new(wire::OPEN_ID + 1), Mutex::new(Some(HashMap::new())));
        Self { next, waiting, blocked: Mutex::new(false), output, late, limit }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<HashMap<u64, Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocked(&self) -> MutexGuard<'_, bool> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a call; its answer comes from the receiver, whose error is the end of the session.
    fn make(&self, id: u64, call: &Call) -> Result<oneshot::Receiver<Result<Reply, DeviceError>>, DeviceError> {
        let frame = wire::encode_call(id, call)?;
        let (caller, answer) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            let waiting = waiting.as_mut().ok_or(DeviceError::Restarted)?;
            if waiting.len() >= self.limit {
                return Err(DeviceError::Busy);
            }
            waiting.insert(id, Waiting { kind: Kind::asked_for(call), withdrawn: false, caller });
        }
        if let Err(error) = self.send(frame) {
            self.waiting().as_mut().map(|waiting| waiting.remove(&id));
            return Err(error);
        }
        Ok(answer)
    }

    /// Takes a call back, if it waits and was not taken back before.
    fn withdraw(&self, id: u64) {
        let waits = |waiting: &mut HashMap<u64, Waiting>| {
            waiting.get_mut(&id).is_some_and(|call| !std::mem::replace(&mut call.withdrawn, true))
        };
        if self.waiting().as_mut().is_some_and(waits) {
            // There is room for it; without, the call is made.
            let _ = self.send(wire::encode_withdraw(id));
        }
    }

    /// Sends a frame behind those that are late.
    fn send(&self, frame: Frame) -> Result<(), DeviceError> {
        let mut blocked = self.blocked();
        // An error shows again where the rest is written.
        let written = if *blocked { 0 } else { self.output.try_write(&frame).unwrap_or(0) };
        if written < frame.len() {
            // Has room for every call that waits; without, the process answers what it has not read yet.
            self.late.try_send((frame, written)).map_err(|error| match error {
                TrySendError::Full(_) => DeviceError::Busy,
                TrySendError::Closed(_) => DeviceError::Restarted,
            })?;
            *blocked = true;
        }
        Ok(())
    }

    /// Writes what is late. Ends only with an error: the sender lives in here.
    async fn write(&self, mut output: impl AsyncWrite + Unpin, late: &mut mpsc::Receiver<Late>) -> io::Result<()> {
        while let Some((frame, written)) = late.recv().await {
            output.write_all(&frame[written..]).await?;
            let mut blocked = self.blocked();
            *blocked = !late.is_empty();
        }
        Ok(())
    }

    /// Hands an answer to its caller. One who has given up never learns of it.
    fn take(&self, body: &[u8]) -> Result<(), Broken> {
        let (id, answer) = wire::decode_answer(body)?;
        let asked = self.waiting().as_mut().and_then(|waiting| waiting.remove(&id)).ok_or(Nonsense::Unasked)?;
        let reply = match answer {
            Ok(Answer::Reply(reply)) if asked.may_get(&reply) => Ok(reply),
            Ok(_) => return Err(Nonsense::WrongKind.into()),
            Err(error) => Err(error),
        };
        let _ = asked.caller.send(reply);
        Ok(())
    }

    /// Hangs up, and tells every caller that the session is over.
    fn close(&self) {
        self.waiting().take();
        self.output.hang_up();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::process::{Command, Stdio};

    use tokio::runtime::Handle;

    use super::*;
    use crate::{
        devices::{Scan, Status},
        reactor::Reactor,
        sys::spawn,
    };

    /// A session whose process only sleeps; the test has its end of the socket.
    struct Fake {
        session: HostSession,
        socket: UnixStream,
        _reactor: Reactor,
    }

    impl Fake {
        async fn start(lanes: usize) -> Self {
            let (ours, socket) = UnixStream::pair().unwrap();
            let mut sleep = Command::new("sleep");
            sleep.arg("1000").stdin(Stdio::null());
            let child = spawn::spawn(sleep).await.unwrap();
            let reactor = Reactor::start(1, &Handle::current()).unwrap();
            let session = HostSession::start(reactor.registry(), ours, child, lanes, None).unwrap();
            Self { session, socket, _reactor: reactor }
        }

        /// Makes the call and waits until it has come to the process.
        async fn begin(&mut self, call: Call) -> (u64, JoinHandle<Result<Reply, DeviceError>>) {
            let answer = tokio::spawn(self.session.call(call));
            let body = read_body(&mut self.socket).await.unwrap();
            (wire::decode_request(&body).unwrap().0, answer)
        }

        async fn answer(&mut self, id: u64, reply: Reply) {
            self.socket.write_all(&wire::encode_answer(id, &Ok(Answer::Reply(reply)))).await.unwrap();
        }

        /// That the session ends for this reason, and with it the call that waits.
        async fn ends(self, waiting: JoinHandle<Result<Reply, DeviceError>>, reason: &str) {
            assert!(matches!(waiting.await.unwrap(), Err(DeviceError::Restarted)));
            assert_eq!(self.session.died().await, reason);
            assert!(matches!(self.session.call(Call::Scan).await, Err(DeviceError::Restarted)));
            self.session.end(Duration::ZERO).await;
        }
    }

    fn bytes(byte: u8) -> Reply {
        Reply::Bytes(Zeroizing::new(vec![byte]))
    }

    #[test]
    fn few_lanes_have_more_ahead() {
        let lanes = [1, 2, 3, 4, 6, 7, 64];
        assert_eq!(lanes.map(ahead), [3, 6, 6, 6, 6, 7, 64]);
    }

    #[tokio::test]
    async fn answers_come_in_any_order_and_reach_their_own_calls() {
        let mut fake = Fake::start(2).await;
        let (one, first) = fake.begin(Call::Random(1)).await;
        let (two, second) = fake.begin(Call::Random(1)).await;
        fake.answer(two, bytes(2)).await;
        fake.answer(one, bytes(1)).await;
        for (call, byte) in [(first, 1), (second, 2)] {
            assert!(matches!(call.await.unwrap(), Ok(Reply::Bytes(bytes)) if *bytes == [byte]));
        }
        fake.session.end(Duration::ZERO).await;
    }

    #[tokio::test]
    async fn an_answer_to_a_call_that_was_given_up_goes_nowhere() {
        let mut fake = Fake::start(1).await;
        let (one, first) = fake.begin(Call::Random(1)).await;
        first.abort();
        assert!(first.await.is_err_and(|e| e.is_cancelled()));
        let (two, second) = fake.begin(Call::Random(1)).await;
        assert_ne!(one, two);
        fake.answer(one, bytes(1)).await;
        fake.answer(two, bytes(2)).await;
        assert!(matches!(second.await.unwrap(), Ok(Reply::Bytes(bytes)) if *bytes == [2]));
    }

    #[tokio::test]
    async fn calls_beyond_the_bound_are_refused_and_the_rest_go_on() {
        let mut fake = Fake::start(1).await;
        let mut waiting = Vec::new();
        for _ in 0..1 + ahead(1) + wire::SPARE_CALLS {
            waiting.push(fake.begin(Call::Health).await);
        }
        assert!(matches!(fake.session.call(Call::Health).await, Err(DeviceError::Busy)));
        for (id, call) in waiting {
            fake.answer(id, Reply::Status(Status::default())).await;
            assert!(call.await.unwrap().is_ok());
        }
        fake.begin(Call::Health).await;
    }

    #[tokio::test]
    async fn a_call_that_is_withdrawn_is_answered_either_way_and_once() {
        let mut fake = Fake::start(2).await;
        let mut withdrawn = Vec::new();
        for _ in 0..2 {
            let call = fake.session.call(Call::Random(1));
            let (id, _) = wire::decode_request(&read_body(&mut fake.socket).await.unwrap()).unwrap();
            call.withdraw();
            let told = wire::decode_request(&read_body(&mut fake.socket).await.unwrap()).unwrap();
            assert!(matches!(told, (its, wire::Request::Withdraw) if its == id));
            call.withdraw();
            withdrawn.push((id, call));
        }
        for (reply, (id, call)) in [Reply::Withdrawn, bytes(1)].into_iter().zip(withdrawn) {
            let is_withdrawn = matches!(reply, Reply::Withdrawn);
            fake.answer(id, reply).await;
            assert_eq!(matches!(call.await, Ok(Reply::Withdrawn)), is_withdrawn);
        }
        // No second withdrawal has been sent.
        let (one, call) = fake.begin(Call::Random(1)).await;
        fake.answer(one, bytes(1)).await;
        assert!(call.await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn an_unknown_id_ends_the_session() {
        let mut fake = Fake::start(1).await;
        let (id, call) = fake.begin(Call::Scan).await;
        fake.answer(id + 1, Reply::Scan(Scan::default())).await;
        fake.ends(call, "the device's process sent nonsense: an answer to what was not asked").await;
    }

    #[tokio::test]
    async fn a_second_answer_ends_the_session() {
        let mut fake = Fake::start(2).await;
        let (_, waits) = fake.begin(Call::Scan).await;
        let (id, call) = fake.begin(Call::Lock).await;
        fake.answer(id, Reply::Done).await;
        assert!(matches!(call.await.unwrap(), Ok(Reply::Done)));
        fake.answer(id, Reply::Done).await;
        fake.ends(waits, "the device's process sent nonsense: an answer to what was not asked").await;
    }

    #[tokio::test]
    async fn an_answer_of_another_kind_ends_the_session() {
        let kinds: [fn() -> Reply; 5] = [
            || Reply::Scan(Scan::default()),
            || Reply::Status(Status::default()),
            || Reply::Done,
            || bytes(1),
            || Reply::Withdrawn,
        ];
        let calls = [Call::Scan, Call::Health, Call::Unlock("1".into(), true), Call::Random(1)];
        for (asked, call) in calls.iter().enumerate() {
            for (given, reply) in kinds.iter().enumerate() {
                let mut fake = Fake::start(1).await;
                let (id, call) = fake.begin(call.clone()).await;
                fake.answer(id, reply()).await;
                if asked == given {
                    assert!(call.await.unwrap().is_ok());
                } else {
                    fake.ends(call, "the device's process sent nonsense: an answer of the wrong kind").await;
                }
            }
        }
    }

    #[tokio::test]
    async fn garbage_ends_the_session() {
        for (garbage, why) in [
            (&[0xff; 4][..], "something is too long"),
            (&[0, 0, 0, 0], "the message ends too early"),
            (&[0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 77], "the tag 77 is unknown"),
        ] {
            let mut fake = Fake::start(1).await;
            let (_, call) = fake.begin(Call::Scan).await;
            fake.socket.write_all(garbage).await.unwrap();
            fake.ends(call, &format!("the device's process sent nonsense: {why}")).await;
        }
    }

    #[tokio::test]
    async fn a_socket_closed_by_a_process_that_goes_on_ends_the_session() {
        let mut fake = Fake::start(1).await;
        let (_, call) = fake.begin(Call::Scan).await;
        fake.socket.shutdown().await.unwrap();
        fake.ends(call, "the device's process has closed its socket").await;
    }
}
