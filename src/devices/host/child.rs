//! The inside of a device's process: runs one driver for the daemon at the other end of its socket. Knows drivers and
//! frames.
//!
//! A thread of its own owns the reading end and ends the process with the daemon, even when every other thread hangs in
//! foreign code. Each lane is a thread that makes one call at a time, of whatever kind.

use std::{
    convert::Infallible,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    panic,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use thiserror::Error;
use tokio::runtime;
use zeroize::Zeroizing;

use super::wire::{self, Answer, Frame, FrameError, MAX_LANES, Request, SPARE_CALLS};
#[cfg(feature = "scripted")]
use crate::devices::scripted::Scripted;
use crate::{
    devices::{
        DeviceError, Driver,
        call::{Call, perform},
    },
    sys::process::{confine, exit_now, stream_from_stdin},
};

/// The exit code after a panic, as Rust's own programs have it.
const PANICKED: i32 = 101;

/// A driver that can run in a process of its own.
pub trait Hosted: Driver {
    /// Reads the configuration that [`Host::new`](super::Host::new) was given.
    fn config(bytes: &[u8]) -> Result<Self::Config, DeviceError>;
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
    /// The daemon's frames come in the wrong order, or too many at once.
    #[error("the daemon sent {0}")]
    Misplaced(&'static str),
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

/// The drivers that run in processes of their own.
fn driver(kind: &str) -> Option<Run> {
    match kind {
        #[cfg(feature = "scripted")]
        Scripted::KIND => Some(run::<Scripted>),
        _ => None,
    }
}

/// Runs a driver on the daemon's socket; returns only when it cannot begin. The process is the driver's: it ends with the
/// daemon, without running any handler.
pub fn run<D: Hosted>(socket: UnixStream) -> Result<Infallible, ChildError> {
    let answers = socket.try_clone()?;
    let (requests, inbox) = channels();
    let reader = move || {
        let Err(e) = read_requests(socket, &requests) else { exit_now(0) };
        // Not a macro: they panic when standard error is closed.
        let _ = writeln!(io::stderr(), "{e}");
        exit_now(1)
    };
    thread::Builder::new().name("socket".into()).spawn(reader).map_err(ChildError::Thread)?;
    serve::<D>(&answers, inbox)?;
    exit_now(0)
}

/// What the reader gives to the rest.
struct Requests {
    config: SyncSender<Zeroizing<Vec<u8>>>,
    calls: SyncSender<(u64, Call)>,
}

/// The other end of [`Requests`].
struct Inbox {
    config: Receiver<Zeroizing<Vec<u8>>>,
    calls: Receiver<(u64, Call)>,
}

fn channels() -> (Requests, Inbox) {
    let (config, its_config) = sync_channel(1);
    let (calls, its_calls) = sync_channel(MAX_LANES + SPARE_CALLS);
    (Requests { config, calls }, Inbox { config: its_config, calls: its_calls })
}

/// Reads until the daemon goes. Waits for nothing but the daemon.
fn read_requests(mut socket: UnixStream, requests: &Requests) -> Result<(), ChildError> {
    let (mut header, mut opened) = ([0; 4], false);
    loop {
        match socket.read_exact(&mut header) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let mut body = Zeroizing::new(vec![0; wire::body_len(header)?]);
        socket.read_exact(&mut body)?;
        let full = |_| ChildError::Misplaced("more calls than there is room for");
        match wire::decode_request(&body)? {
            (wire::OPEN_ID, Request::Open(config)) if !opened => {
                requests.config.try_send(config).map_err(|_| ChildError::Misplaced("a second configuration"))?;
            }
            (id, Request::Call(call)) if opened => requests.calls.try_send((id, call)).map_err(full)?,
            _ => return Err(ChildError::Misplaced("a frame out of order")),
        }
        opened = true;
    }
}

/// Opens the device and makes the calls, until the reader ends. Without a driver, returns once it has said why.
fn serve<D: Hosted>(answers: &UnixStream, inbox: Inbox) -> Result<(), ChildError> {
    // Its one worker drives the timers and sockets of drivers that use them; the lanes only wait there.
    let runtime =
        runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(ChildError::Thread)?;
    let Ok(config) = inbox.config.recv() else { return Ok(()) };
    let opened = D::config(&config).and_then(|config| runtime.block_on(D::open(config)));
    drop(config);
    let driver = match opened {
        Ok(driver) => driver,
        Err(error) => return Ok(send(answers, &wire::encode_answer(wire::OPEN_ID, &Err(error)))?),
    };
    let lanes = driver.lanes().clamp(1, MAX_LANES);
    send(answers, &wire::encode_answer(wire::OPEN_ID, &Ok(Answer::Opened(lanes))))?;

    let (answers, calls) = (Mutex::new(answers), Mutex::new(inbox.calls));
    let lane = || {
        loop {
            let call = calls.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((id, call)) = call else { return };
            let answer = runtime.block_on(perform(&driver, call)).map(Answer::Reply);
            let frame = wire::encode_answer(id, &answer);
            // Whole, before another lane's. It fails when the daemon is gone, which the reader sees, too.
            let _ = send(&answers.lock().unwrap_or_else(PoisonError::into_inner), &frame);
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

fn send(mut socket: &UnixStream, frame: &Frame) -> io::Result<()> {
    socket.write_all(frame)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::{borrow::Cow, future::pending, sync::Condvar};

    use super::*;
    use crate::devices::{Input, Operation, Scan, Scheme, Slot, Status, call::Reply};

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
                b"hang" => pending().await,
                b"together" => {
                    let mut there = self.together.0.lock().unwrap();
                    *there += 1;
                    self.together.1.notify_all();
                    drop(self.together.1.wait_while(there, |there| *there < 3).unwrap());
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

    struct Daemon(UnixStream);

    impl Daemon {
        fn send(&mut self, frame: &Frame) {
            self.0.write_all(frame).unwrap();
        }

        fn sign(&mut self, id: u64, message: &'static [u8]) {
            let operation = Operation::Sign { scheme: Scheme::Ed25519, input: Input::Message(Cow::Borrowed(message)) };
            self.send(&wire::encode_call(id, &Call::Operate(Slot([].into()), operation)).unwrap());
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

    type Ends = (thread::JoinHandle<Result<(), ChildError>>, thread::JoinHandle<Result<(), ChildError>>);

    /// Both threads of a device's process, in this one.
    fn start() -> (Daemon, Ends) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (requests, inbox) = channels();
        let answers = theirs.try_clone().unwrap();
        let reader = thread::spawn(move || read_requests(theirs, &requests));
        (Daemon(ours), (reader, thread::spawn(move || serve::<Echo>(&answers, inbox))))
    }

    fn opened() -> (Daemon, Ends) {
        let (mut daemon, ends) = start();
        daemon.send(&wire::encode_open(b"config"));
        assert!(matches!(daemon.answer(), (wire::OPEN_ID, Ok(Answer::Opened(3)))));
        (daemon, ends)
    }

    #[test]
    fn lanes_work_at_once_and_everything_ends_with_the_daemon() {
        let (mut daemon, (reader, lanes)) = opened();
        // None of the three has an answer before the third has begun.
        (1..=3).for_each(|id| daemon.sign(id, b"together"));
        let mut ids: Vec<u64> = (1..=3).map(|_| daemon.signature().0).collect();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2, 3]);
        drop(daemon);
        assert!(reader.join().unwrap().is_ok() && lanes.join().unwrap().is_ok());
    }

    #[test]
    fn a_hung_lane_holds_up_no_other_and_not_the_reader() {
        let (mut daemon, (reader, _)) = opened();
        daemon.sign(1, b"hang");
        daemon.sign(2, b"hang");
        for id in 3..50 {
            daemon.sign(id, b"timer");
            assert_eq!(daemon.signature(), (id, b"timer".to_vec()));
        }
        drop(daemon);
        assert!(reader.join().unwrap().is_ok());
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
    fn frames_out_of_order_or_without_sense_end_the_reader() {
        let ended = |frames: &[&[u8]]| {
            let (mut daemon, (reader, _)) = start();
            frames.iter().for_each(|frame| daemon.0.write_all(frame).unwrap());
            reader.join().unwrap().unwrap_err().to_string()
        };
        let open = wire::encode_open(b"");
        let scan = wire::encode_call(1, &Call::Scan).unwrap();
        assert_eq!(ended(&[&scan]), "the daemon sent a frame out of order");
        assert_eq!(ended(&[&open, &open]), "the daemon sent a frame out of order");
        assert_eq!(ended(&[&[0xff; 4]]), "the daemon sent nonsense: something is too long");
        assert_eq!(ended(&[&[0, 0, 0, 1, 0]]), "the daemon sent nonsense: the message ends too early");
    }

    #[test]
    fn more_calls_than_there_is_room_for_end_the_reader() {
        let (mut daemon, (reader, _)) = opened();
        let room = 3 + MAX_LANES + SPARE_CALLS;
        for id in 1..=room as u64 + 1 {
            daemon.sign(id, b"hang");
        }
        assert!(matches!(reader.join().unwrap(), Err(ChildError::Misplaced(_))));
    }

    #[test]
    fn an_unknown_driver_is_refused_before_anything_changes() {
        assert!(matches!(main("nonsense"), Err(ChildError::UnknownKind(_))));
    }
}
