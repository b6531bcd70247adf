//! The inside of a device's process: runs one driver for the daemon at the other end of its socket. Knows drivers and
//! frames.
//!
//! A thread of its own ends the process with the daemon, even when every other thread hangs in foreign code. Each lane is a
//! thread that makes one call at a time, of whatever kind: it takes the one that has waited longest and sends the answer.
//! First it reads what else has come: a call that was withdrawn meanwhile never begins. Lanes that have nothing to do wait
//! in one edge-triggered epoll set, which wakes one of them for a call (epoll(7)).

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::{self, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    panic,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use rustix::{
    event::{
        EventfdFlags, PollFd, PollFlags,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
        eventfd, poll,
    },
    io::Errno,
    net::{RecvFlags, recv},
};

use thiserror::Error;
use tokio::runtime;
use zeroize::Zeroizing;

use super::{
    incoming::Incoming,
    wire::{self, Answer, FrameError, MAX_LANES, Request},
};
#[cfg(feature = "openpgp")]
use crate::devices::openpgp::{OpenPgp, Readers};
#[cfg(feature = "scripted")]
use crate::devices::scripted::Scripted;
use crate::{
    devices::{
        DeviceError, Driver,
        call::{Call, Reply, perform},
        pkcs11::{Pkcs11, Tokens},
    },
    sys::process::{confine, exit_now, stream_from_stdin},
};

/// How long what is under way may take when the daemon goes. The daemon itself waits less.
const PARTING: Duration = Duration::from_secs(1);
/// The exit code after a panic, as Rust's own programs have it.
const PANICKED: i32 = 101;

/// A driver that can run in a process of its own.
pub trait Hosted: Driver {
    /// Reads the configuration that [`Host::new`](super::Host::new) was given.
    fn config(bytes: &[u8]) -> Result<Self::Config, DeviceError>;
}

/// What a process of its own is asked once, before it ends: what foreign code says about something that is no device yet.
pub trait Question {
    /// What comes after `device-host` on the command line of the process.
    const KIND: &'static str;

    /// Answers what [`Host::new`](super::Host::new) was given, in at most [`MAX_RESULT`](crate::devices::operation::MAX_RESULT)
    /// bytes. May block.
    fn answer(question: &[u8]) -> Result<Vec<u8>, DeviceError>;
}

/// Something that watches in a process of its own, and tells what it sees.
pub trait Watcher {
    /// What comes after `device-host` on the command line of the process.
    const KIND: &'static str;

    /// Watches for ever, and tells in at most [`MAX_RESULT`](crate::devices::operation::MAX_RESULT) bytes each time. Returns
    /// when nobody can be told.
    fn watch(tell: &mut dyn FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()>;
}

/// Why a device's process could not begin, or ended before the daemon did.
#[derive(Debug, Error)]
pub enum ChildError {
    /// Only the daemon gives a socket: this program is not for people.
    #[error("standard input is not the daemon's socket: {0}")]
    Socket(io::Error),
    /// The system does not let this process give up what it must give up.
    #[error("cannot confine this process: {0}")]
    Confine(io::Error),
    /// The daemon is of another version.
    #[error("there is no driver {0:?}")]
    UnknownKind(String),
    /// Threads are lacking.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The daemon's frames are wrong.
    #[error("the daemon sent nonsense: {0}")]
    Nonsense(#[from] FrameError),
    /// The daemon's frames come in the wrong order.
    #[error("the daemon sent a frame out of order")]
    Misplaced,
    /// The socket fails.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Runs the driver of this kind until the daemon goes; returns only an error. For the start of `main`, once inherited
/// descriptors are closed: gives up this process's rights before anything foreign is loaded.
pub fn main(kind: &str) -> Result<Infallible, ChildError> {
    let run = driver(kind).ok_or_else(|| ChildError::UnknownKind(kind.to_owned()))?;
    confine().map_err(ChildError::Confine)?;
    let socket = stream_from_stdin().map_err(ChildError::Socket)?;
    // One thread's panic leaves foreign code in a state that nobody knows.
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        tell(info);
        exit_now(PANICKED);
    }));
    run(socket)
}

type Run = fn(UnixStream) -> Result<Infallible, ChildError>;

/// What runs in processes of its own.
fn driver(kind: &str) -> Option<Run> {
    match kind {
        #[cfg(feature = "openpgp")]
        OpenPgp::KIND => Some(run::<OpenPgp>),
        #[cfg(feature = "openpgp")]
        Readers::KIND => Some(watch::<Readers>),
        Pkcs11::KIND => Some(run::<Pkcs11>),
        Tokens::KIND => Some(answer_once::<Tokens>),
        #[cfg(feature = "scripted")]
        Scripted::KIND => Some(run::<Scripted>),
        _ => None,
    }
}

/// Runs a driver on the daemon's socket; returns only when it cannot begin. The process is the driver's: it ends with the
/// daemon, without running any handler.
pub fn run<D: Hosted>(socket: UnixStream) -> Result<Infallible, ChildError> {
    serve::<D>(&*Line::open(socket)?)?;
    exit_now(0)
}

/// Answers the one question that comes on the daemon's socket, and ends the process.
fn answer_once<Q: Question>(socket: UnixStream) -> Result<Infallible, ChildError> {
    let line = Line::open(socket)?;
    if let Some(question) = line.config()? {
        let answer = Q::answer(&question).map(|bytes| Answer::Reply(Reply::Bytes(Zeroizing::new(bytes))));
        line.send(wire::OPEN_ID, &answer)?;
    }
    exit_now(0)
}

/// Tells what is seen, until the daemon goes.
#[cfg_attr(not(feature = "openpgp"), allow(dead_code, reason = "cards are all that is watched for"))]
fn watch<W: Watcher>(socket: UnixStream) -> Result<Infallible, ChildError> {
    let line = Line::open(socket)?;
    if line.config()?.is_some() {
        W::watch(&mut |seen| line.send(wire::OPEN_ID, &Ok(Answer::Reply(Reply::Bytes(Zeroizing::new(seen))))))?;
    }
    exit_now(0)
}

/// The daemon's socket, as all lanes share it.
struct Line {
    socket: UnixStream,
    /// The socket and the bell.
    set: OwnedFd,
    /// Rings when there is more than one lane has taken, and another has nothing to do.
    bell: OwnedFd,
    /// What has come. Nobody waits for anything while it is locked.
    inbox: Mutex<Inbox>,
    /// Held while an answer is sent: whole, before another lane's.
    sending: Mutex<()>,
}

impl Line {
    fn new(socket: UnixStream) -> io::Result<Self> {
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Nobody asks which of the two it was.
        epoll::add(&set, &socket, EventData::new_u64(0), EventFlags::IN | EventFlags::RDHUP | EventFlags::ET)?;
        epoll::add(&set, &bell, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { socket, set, bell, inbox: Mutex::new(Inbox::new()), sending: Mutex::new(()) })
    }

    /// With the thread that ends the process when the daemon goes.
    fn open(socket: UnixStream) -> Result<Arc<Self>, ChildError> {
        let line = Arc::new(Self::new(socket)?);
        let watched = Arc::clone(&line);
        let watcher = move || match watched.hung_up() {
            Ok(()) => {
                // The lanes that have nothing to do let go of the device, and end the process themselves.
                thread::sleep(PARTING);
                exit_now(0)
            }
            Err(e) => end_with(&e.into()),
        };
        thread::Builder::new().name("socket".into()).spawn(watcher).map_err(ChildError::Thread)?;
        Ok(line)
    }

    /// Waits until the daemon has closed its end, without reading.
    fn hung_up(&self) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(&self.socket, PollFlags::RDHUP)], None) {
                Err(Errno::INTR) => {}
                polled => return Ok(polled.map(drop)?),
            }
        }
    }

    /// The next request; `None` when the daemon has gone.
    fn next(&self) -> Result<Option<(u64, Request)>, ChildError> {
        let mut was_idle = false;
        loop {
            let Some((request, withdrawn)) = self.look(was_idle)? else { return Ok(None) };
            for id in withdrawn {
                // It fails when the daemon is gone, which the next to read sees, too.
                let _ = self.send(id, &Ok(Answer::Reply(Reply::Withdrawn)));
            }
            if request.is_some() {
                return Ok(request);
            }
            self.wait()?;
            was_idle = true;
        }
    }

    /// The request that has waited longest, and the ids of those that were withdrawn; `None` when the daemon has gone.
    #[allow(clippy::type_complexity, reason = "a request with its id, and ids")]
    fn look(&self, was_idle: bool) -> Result<Option<(Option<(u64, Request)>, Vec<u64>)>, ChildError> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        inbox.idle -= usize::from(was_idle);
        let Some(withdrawn) = inbox.read(&self.socket)? else {
            self.ring();
            return Ok(None);
        };
        let request = inbox.requests.pop_front();
        if request.is_none() {
            inbox.idle += 1;
        } else if inbox.idle > 0 && !inbox.requests.is_empty() {
            // The set tells of what came at once only once, and this lane may be long.
            self.ring();
        }
        Ok(Some((request, withdrawn)))
    }

    /// Until there may be something to take.
    fn wait(&self) -> io::Result<()> {
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
        match epoll::wait(&self.set, &mut events, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Wakes a lane that waits, or has the next one look before it waits.
    fn ring(&self) {
        // It counts how often: no process gets so far that there is no room.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// What comes first: the configuration, or the question.
    fn config(&self) -> Result<Option<Zeroizing<Vec<u8>>>, ChildError> {
        match self.next()? {
            Some((wire::OPEN_ID, Request::Open(config))) => Ok(Some(config)),
            Some(_) => Err(ChildError::Misplaced),
            None => Ok(None),
        }
    }

    /// What comes then.
    fn call(&self) -> Result<Option<(u64, Call)>, ChildError> {
        match self.next()? {
            Some((id, Request::Call(call))) => Ok(Some((id, call))),
            Some(_) => Err(ChildError::Misplaced),
            None => Ok(None),
        }
    }

    fn send(&self, id: u64, answer: &Result<Answer, DeviceError>) -> io::Result<()> {
        let frame = wire::encode_answer(id, answer);
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.socket).write_all(&frame)
    }
}

/// What has come from the daemon, and who waits for more.
struct Inbox {
    incoming: Incoming,
    /// In the order they came. The daemon bounds how many.
    requests: VecDeque<(u64, Request)>,
    /// Lanes that wait, or have been woken and have not looked yet.
    idle: usize,
}

impl Inbox {
    fn new() -> Self {
        Self { incoming: Incoming::new(), requests: VecDeque::new(), idle: 0 }
    }

    /// Reads all that has come; the ids of requests that were withdrawn, or `None` when the daemon has gone.
    fn read(&mut self, socket: &UnixStream) -> Result<Option<Vec<u64>>, ChildError> {
        let mut withdrawn = Vec::new();
        loop {
            match recv(socket, self.incoming.room()?, RecvFlags::DONTWAIT) {
                // Or it has gone and left answers unread.
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(None),
                Ok((n, _)) => self.incoming.came(n),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Some(withdrawn)),
                Err(e) => return Err(io::Error::from(e).into()),
            }
            while let Some(request) = self.incoming.take(wire::decode_request)? {
                let (id, request) = request?;
                match request {
                    // One that has begun has an answer of its own.
                    Request::Withdraw => withdrawn.extend(self.withdraw(id)),
                    request => self.requests.push_back((id, request)),
                }
            }
            if !self.incoming.was_full() {
                return Ok(Some(withdrawn));
            }
        }
    }

    fn withdraw(&mut self, id: u64) -> Option<u64> {
        let at = self.requests.iter().position(|(other, _)| *other == id)?;
        self.requests.remove(at).map(|(id, _)| id)
    }
}

/// Ends the process, whatever its other threads are in, and says why.
fn end_with(error: &ChildError) -> ! {
    // Not a macro: they panic when standard error is closed.
    let _ = writeln!(io::stderr(), "{error}");
    exit_now(1)
}

/// Opens the device and makes the calls, until the daemon goes. Without a driver, returns once it has said why.
fn serve<D: Hosted>(line: &Line) -> Result<(), ChildError> {
    // Its one worker drives the timers and sockets of drivers that use them; the lanes only wait there.
    let runtime =
        runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(ChildError::Thread)?;
    let Some(config) = line.config()? else { return Ok(()) };
    let opened = D::config(&config).and_then(|config| runtime.block_on(D::open(config)));
    drop(config);
    let driver = match opened {
        Ok(driver) => driver,
        Err(error) => return Ok(line.send(wire::OPEN_ID, &Err(error))?),
    };
    let lanes = driver.lanes().clamp(1, MAX_LANES);
    line.send(wire::OPEN_ID, &Ok(Answer::Opened(lanes)))?;

    let lane = || {
        loop {
            let (id, call) = match line.call() {
                Ok(Some(call)) => call,
                Ok(None) => return,
                Err(e) => end_with(&e),
            };
            let answer = runtime.block_on(perform(&driver, call)).map(Answer::Reply);
            // It fails when the daemon is gone, which the next to read sees, too.
            let _ = line.send(id, &answer);
        }
    };
    thread::scope(|scope| {
        for n in 1..lanes {
            let lane = thread::Builder::new().name(format!("lane-{n}")).spawn_scoped(scope, lane);
            lane.map_err(ChildError::Thread)?;
        }
        lane();
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::{
        borrow::Cow,
        future::pending,
        io::Read,
        sync::{Condvar, MutexGuard},
    };

    use super::{super::incoming::READ_SIZE, *};
    use crate::devices::{Input, Operation, Scan, Scheme, Slot, Status};

    /// One test's: whether somebody has come to it, and it is open.
    static GATE: (Mutex<Option<bool>>, Condvar) = (Mutex::new(None), Condvar::new());

    fn gate(is: impl Fn(Option<bool>) -> bool) -> MutexGuard<'static, Option<bool>> {
        GATE.1.wait_while(GATE.0.lock().unwrap(), |gate| !is(*gate)).unwrap()
    }

    /// Returns its input as the signature; some inputs are commands.
    struct Echo {
        /// `wait` waits until so many are there.
        together: (Mutex<usize>, Condvar),
    }

    impl Driver for Echo {
        type Config = Vec<u8>;
        const KIND: &'static str = "echo";

        async fn open(config: Vec<u8>) -> Result<Self, DeviceError> {
            if config == b"absent" {
                return Err(DeviceError::Absent);
            }
            Ok(Self { together: (Mutex::new(0), Condvar::new()) })
        }

        fn lanes(&self) -> usize {
            3
        }

        async fn scan(&self) -> Result<Scan, DeviceError> {
            Ok(Scan::default())
        }

        async fn sign(&self, _: &Slot, _: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
            match input.bytes() {
                bytes if bytes.starts_with(b"hang") => pending().await,
                b"together" => {
                    let mut there = self.together.0.lock().unwrap();
                    *there += 1;
                    self.together.1.notify_all();
                    drop(self.together.1.wait_while(there, |there| *there < 3).unwrap());
                }
                b"gate" => {
                    *GATE.0.lock().unwrap() = Some(false);
                    GATE.1.notify_all();
                    drop(gate(|open| open == Some(true)));
                }
                b"timer" => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
                b"long" => return Ok(vec![0; 1 << 20]),
                _ => {}
            }
            Ok(input.bytes().to_vec())
        }

        async fn health(&self) -> Result<Status, DeviceError> {
            Ok(Status { serial: "echo".into(), ..Status::default() })
        }
    }

    impl Hosted for Echo {
        fn config(bytes: &[u8]) -> Result<Vec<u8>, DeviceError> {
            Ok(bytes.to_vec())
        }
    }

    fn signing(id: u64, message: &'static [u8]) -> wire::Frame {
        let operation = Operation::Sign { scheme: Scheme::Ed25519, input: Input::Message(Cow::Borrowed(message)) };
        wire::encode_call(id, &Call::Operate(Slot([].into()), operation.into())).unwrap()
    }

    struct Daemon(UnixStream);

    impl Daemon {
        fn send(&mut self, frame: &[u8]) {
            self.0.write_all(frame).unwrap();
        }

        fn sign(&mut self, id: u64, message: &'static [u8]) {
            self.send(&signing(id, message));
        }

        fn answer(&mut self) -> (u64, Result<Answer, DeviceError>) {
            let mut header = [0; 4];
            self.0.read_exact(&mut header).unwrap();
            let mut body = vec![0; wire::body_len(header).unwrap()];
            self.0.read_exact(&mut body).unwrap();
            wire::decode_answer(&body).unwrap()
        }

        fn signature(&mut self) -> (u64, Vec<u8>) {
            match self.answer() {
                (id, Ok(Answer::Reply(Reply::Bytes(bytes)))) => (id, bytes.to_vec()),
                _ => panic!("not a signature"),
            }
        }
    }

    type Ends = (thread::JoinHandle<io::Result<()>>, thread::JoinHandle<Result<(), ChildError>>);

    /// The threads of a device's process, in this one.
    fn start() -> (Daemon, Ends) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let line = Arc::new(Line::new(theirs).unwrap());
        let watched = Arc::clone(&line);
        let watcher = thread::spawn(move || watched.hung_up());
        (Daemon(ours), (watcher, thread::spawn(move || serve::<Echo>(&line))))
    }

    fn opened() -> (Daemon, Ends) {
        let (mut daemon, ends) = start();
        daemon.send(&wire::encode_open(b"config"));
        assert!(matches!(daemon.answer(), (wire::OPEN_ID, Ok(Answer::Opened(3)))));
        (daemon, ends)
    }

    #[test]
    fn lanes_work_at_once_and_everything_ends_with_the_daemon() {
        let (mut daemon, (watcher, lanes)) = opened();
        // None of the three has an answer before the third has begun.
        (1..=3).for_each(|id| daemon.sign(id, b"together"));
        let mut ids: Vec<u64> = (1..=3).map(|_| daemon.signature().0).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2, 3]);
        drop(daemon);
        assert!(watcher.join().unwrap().is_ok() && lanes.join().unwrap().is_ok());
    }

    #[test]
    fn a_hung_lane_holds_up_no_other_and_not_the_end() {
        let (mut daemon, (watcher, _)) = opened();
        daemon.sign(1, b"hang");
        daemon.sign(2, b"hang");
        for id in 3..50 {
            daemon.sign(id, b"timer");
            assert_eq!(daemon.signature(), (id, b"timer".to_vec()));
        }
        // Now nobody reads.
        daemon.sign(50, b"hang");
        daemon.sign(51, b"never read");
        drop(daemon);
        assert!(watcher.join().unwrap().is_ok());
    }

    #[test]
    fn a_call_that_comes_in_one_piece_with_one_that_hangs_is_made() {
        static HANG: [u8; READ_SIZE] = {
            let mut bytes = [0; READ_SIZE];
            (bytes[0], bytes[1], bytes[2], bytes[3]) = (b'h', b'a', b'n', b'g');
            bytes
        };
        let header = signing(1, b"").len();
        // What one read takes ends behind the second call, at its end, in it, or before it.
        let frames = [100, READ_SIZE - signing(2, b"next").len(), READ_SIZE - 1, READ_SIZE];
        // A lane that does not wait yet finds the second call by itself: most rounds have none.
        for frame in frames.repeat(5) {
            let (mut daemon, (watcher, _)) = opened();
            (1..=3).for_each(|id| daemon.sign(id, b"together"));
            (1..=3).for_each(|_| drop(daemon.signature()));
            daemon.send(&[&signing(4, &HANG[..frame - header])[..], &signing(5, b"next")].concat());
            assert_eq!(daemon.signature(), (5, b"next".to_vec()));
            drop(daemon);
            assert!(watcher.join().unwrap().is_ok());
        }
    }

    #[test]
    fn a_call_that_was_withdrawn_before_a_lane_came_to_it_is_never_made() {
        let (mut daemon, _) = opened();
        daemon.sign(1, b"hang");
        daemon.sign(2, b"hang");
        // One lane reads three calls and begins the first; the second is withdrawn before the first is done.
        daemon.send(&[&signing(3, b"gate")[..], &signing(4, b"never"), &signing(5, b"next")].concat());
        drop(gate(|open| open.is_some()));
        daemon.send(&wire::encode_withdraw(4));
        // What has begun, and what never came, is not withdrawn.
        daemon.send(&[&wire::encode_withdraw(1)[..], &wire::encode_withdraw(3), &wire::encode_withdraw(77)].concat());
        *GATE.0.lock().unwrap() = Some(true);
        GATE.1.notify_all();
        assert_eq!(daemon.signature(), (3, b"gate".to_vec()));
        assert!(matches!(daemon.answer(), (4, Ok(Answer::Reply(Reply::Withdrawn)))));
        assert_eq!(daemon.signature(), (5, b"next".to_vec()));
        // The same where both come as one.
        daemon.send(&[&signing(6, b"timer")[..], &signing(7, b"never"), &wire::encode_withdraw(7)].concat());
        assert!(matches!(daemon.answer(), (7, Ok(Answer::Reply(Reply::Withdrawn)))));
        assert_eq!(daemon.signature(), (6, b"timer".to_vec()));
    }

    #[test]
    fn an_error_of_the_opening_is_told() {
        let (mut daemon, (_, lanes)) = start();
        daemon.send(&wire::encode_open(b"absent"));
        assert!(matches!(daemon.answer(), (wire::OPEN_ID, Err(DeviceError::Absent))));
        assert!(lanes.join().unwrap().is_ok());
    }

    #[test]
    fn a_signature_out_of_bounds_is_an_error_and_the_next_is_fine() {
        let (mut daemon, _) = opened();
        daemon.sign(1, b"long");
        assert!(matches!(daemon.answer(), (1, Err(DeviceError::Failed(_)))));
        daemon.sign(2, b"short");
        assert_eq!(daemon.signature(), (2, b"short".to_vec()));
    }

    #[test]
    fn frames_out_of_order_or_without_sense_are_refused() {
        let refused = |frames: &[&[u8]]| {
            let (mut daemon, theirs) = UnixStream::pair().unwrap();
            frames.iter().for_each(|frame| daemon.write_all(frame).unwrap());
            let line = Line::new(theirs).unwrap();
            line.config().and_then(|_| line.call()).err().unwrap().to_string()
        };
        let open = wire::encode_open(b"");
        let scan = wire::encode_call(1, &Call::Scan).unwrap();
        assert_eq!(refused(&[&scan]), "the daemon sent a frame out of order");
        assert_eq!(refused(&[&open, &open]), "the daemon sent a frame out of order");
        assert_eq!(refused(&[&[0xff; 4]]), "the daemon sent nonsense: something is too long");
        assert_eq!(refused(&[&[0, 0, 0, 1, 0]]), "the daemon sent nonsense: the message ends too early");
    }

    #[test]
    fn an_unknown_driver_is_refused_before_anything_changes() {
        assert!(matches!(main("nonsense"), Err(ChildError::UnknownKind(_))));
    }
}
