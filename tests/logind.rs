//! The store is locked when logind says that the machine goes to sleep, or that a session of this user is locked: with a bus
//! and a logind of the test's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, IoSlice, PipeReader, Read, Write, pipe},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    cmsg_space,
    event::{PollFd, PollFlags, Timespec, poll},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
    process::{Signal, geteuid},
};
use strongroom::{
    agent::message::{Request, StoreRequest, StoreStatus, Target},
    dbus::{Bus, DBUS, Kind, Message},
};
use support::{PATIENCE, client::Client, daemon::Home, eventually};
use tokio::runtime::{Builder, Runtime};

const LOGIND: &str = "org.freedesktop.login1";
const SESSION: &str = "/org/freedesktop/login1/session/_32";

/// A bus that lives as long as this value.
struct Daemon {
    child: Child,
    address: String,
}

impl Daemon {
    fn start(dir: &Path) -> Self {
        let config = dir.join("bus.conf");
        let socket = dir.join("bus");
        let rules = "<policy context=\"default\"><allow send_destination=\"*\" eavesdrop=\"true\"/>\
                     <allow eavesdrop=\"true\"/><allow own=\"*\"/></policy>";
        fs::write(&config, format!("<busconfig><listen>unix:path={}</listen>{rules}</busconfig>", socket.display()))
            .unwrap();
        let mut child = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon starts");
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { child, address: address.trim().to_owned() }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Who says what logind says.
struct Logind {
    runtime: Runtime,
    bus: Bus,
}

impl Logind {
    fn start(address: &str) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let bus = runtime.block_on(async {
            let mut bus = Bus::connect(address).await.unwrap();
            bus.ask(&request_name()).await.unwrap();
            bus
        });
        Self { runtime, bus }
    }

    fn sleep(&mut self, begins: bool) {
        self.runtime.block_on(self.bus.send(&prepare_for_sleep(begins))).unwrap();
    }

    /// Locks a session, and says nothing else.
    fn lock(&mut self) {
        self.runtime.block_on(self.bus.send(&signal(SESSION, "org.freedesktop.login1.Session", "Lock"))).unwrap();
    }

    /// Waits until somebody asks whose a session is.
    fn asked(&mut self) -> Message {
        let asked = self.runtime.block_on(async {
            loop {
                let message = self.bus.next().await.unwrap();
                if message.kind == Some(Kind::Call) && message.member == "Get" {
                    break message;
                }
            }
        });
        assert_eq!((asked.path.as_str(), asked.signature.as_str()), (SESSION, "ss"));
        asked
    }

    /// Locks a session, and says whose it is when that is asked.
    fn lock_session(&mut self, uid: u32) {
        self.lock();
        let asked = self.asked();
        self.runtime.block_on(async {
            let mut body = b"\x04(uo)\0\0\0".to_vec();
            body.extend(uid.to_le_bytes());
            body.extend(b"\x02\0\0\0/u\0");
            let answer = Message {
                kind: Some(Kind::Return),
                destination: asked.sender,
                reply_to: asked.serial,
                signature: "v".to_owned(),
                body,
                ..Message::default()
            };
            self.bus.send(&answer).await.unwrap();
        });
    }
}

/// A logind that lets sleep wait: on a connection that passes descriptors.
struct Sleeper(UnixStream);

impl Sleeper {
    fn start(address: &str) -> Self {
        let path = address.strip_prefix("unix:path=").unwrap().split(',').next().unwrap();
        let mut this = Self(UnixStream::connect(path).unwrap());
        this.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let uid: String = geteuid().as_raw().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        for (said, answer) in
            [(format!("\0AUTH EXTERNAL {uid}"), "OK "), ("NEGOTIATE_UNIX_FD".to_owned(), "AGREE_UNIX_FD")]
        {
            this.0.write_all(format!("{said}\r\n").as_bytes()).unwrap();
            assert!(this.line().starts_with(answer));
        }
        this.0.write_all(b"BEGIN\r\n").unwrap();
        this.send(&Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "Hello", &[]));
        this.send(&request_name());
        this
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            line.extend(byte);
        }
        String::from_utf8(line).unwrap()
    }

    fn send(&mut self, message: &Message) {
        self.0.write_all(&Message { serial: 1, ..message.clone() }.encode()).unwrap();
    }

    /// The bytes of the next message.
    fn next(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        self.0.read_exact(&mut bytes).unwrap();
        let number = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap()) as usize;
        let rest = number(12).next_multiple_of(8) + number(4);
        bytes.resize(16 + rest, 0);
        self.0.read_exact(&mut bytes[16..]).unwrap();
        bytes
    }

    /// Waits until somebody wants sleep to wait, and lets it: until what is returned is at its end.
    fn delayed(&mut self) -> PipeReader {
        let asked = loop {
            let message = Message::decode(&self.next()).unwrap();
            if message.kind == Some(Kind::Call) && message.member == "Inhibit" {
                break message;
            }
        };
        assert_eq!((asked.path.as_str(), asked.signature.as_str()), ("/org/freedesktop/login1", "ssss"));
        assert!(asked.body.starts_with(b"\x05\0\0\0sleep\0") && asked.body.ends_with(b"\x05\0\0\0delay\0"));
        let answer = Message {
            kind: Some(Kind::Return),
            serial: 1,
            destination: asked.sender,
            reply_to: asked.serial,
            signature: "h".to_owned(),
            ..Message::default()
        };
        // With how many descriptors there are behind the other fields, and the number of one for an argument.
        let mut bytes = answer.encode();
        bytes.extend([9, 1, b'u', 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let fields = u32::try_from(bytes.len() - 16 - 4).unwrap();
        bytes[12..16].copy_from_slice(&fields.to_le_bytes());
        bytes[4..8].copy_from_slice(&4u32.to_le_bytes());
        let (lock, held) = pipe().unwrap();
        let held = [held.as_fd()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&held)));
        let sent = sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
        lock
    }
}

fn request_name() -> Message {
    let mut request = Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "RequestName", &[LOGIND]);
    request.signature.push('u');
    request.body.resize(request.body.len().next_multiple_of(4), 0);
    request.body.extend([0; 4]);
    request
}

fn signal(path: &str, interface: &str, member: &str) -> Message {
    Message {
        kind: Some(Kind::Signal),
        path: path.to_owned(),
        interface: interface.to_owned(),
        member: member.to_owned(),
        ..Message::default()
    }
}

fn prepare_for_sleep(begins: bool) -> Message {
    let signal = signal("/org/freedesktop/login1", "org.freedesktop.login1.Manager", "PrepareForSleep");
    Message { signature: "b".to_owned(), body: vec![u8::from(begins), 0, 0, 0], ..signal }
}

/// Whether sleep may begin, within this time.
fn may_sleep(lock: &PipeReader, patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).unwrap();
    poll(&mut [PollFd::new(lock, PollFlags::IN)], Some(&patience)).unwrap() > 0
}

fn is_open(client: &mut Client) -> bool {
    client.ask(&Request::Store(StoreRequest::Status)).ok::<StoreStatus<'_>>().state == "open"
}

fn unlock(client: &mut Client) {
    client.ask(&Request::Unlock(Target::Store, "passphrase".into())).ok::<()>();
    assert!(is_open(client));
}

/// What is started from this home listens to this bus.
fn listen_to(bus: &Daemon, home: &mut Home) {
    home.env("STRONGROOM_TEST_SLOT_MS", "1");
    home.env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address);
    home.configure("[store]\nlock_on_sleep = true\nlock_on_session_lock = true");
}

/// A daemon with an open store.
fn start(home: &Home) -> (support::daemon::Daemon<'_>, Client) {
    let daemon = home.start();
    daemon.logs("the store is locked when logind says so");
    let mut client = daemon.connect_service();
    let init = StoreRequest::Init { passphrase: "passphrase".into(), recovery: false };
    client.ask(&Request::Store(init)).read::<strongroom::agent::message::SlotMade<'_>>().map(drop).unwrap();
    (daemon, client)
}

#[test]
fn sleep_and_a_locked_session_lock_the_store() {
    let mut home = Home::new();
    let bus = Daemon::start(&home.path(""));
    let mut logind = Logind::start(&bus.address);
    listen_to(&bus, &mut home);
    let (daemon, mut client) = start(&home);
    assert!(is_open(&mut client));
    logind.sleep(true);
    eventually("sleep locks", || !is_open(&mut client));
    unlock(&mut client);
    // Waking up does not lock, nor does somebody else's session; the next sleep shows that both were heard.
    logind.sleep(false);
    logind.lock_session(geteuid().as_raw() + 1);
    logind.lock_session(geteuid().as_raw());
    eventually("the session's lock locks", || !is_open(&mut client));
    // The log is written behind what it tells of.
    eventually("two locks are told", || home.log().matches("the store is locked\n").count() == 2);
    assert!(home.log().contains("the session is locked"));

    // A bus that was restarted is found again.
    unlock(&mut client);
    drop(logind);
    drop(bus);
    daemon.logs("logind cannot be heard");
    let bus = Daemon::start(&home.path(""));
    let mut logind = Logind::start(&bus.address);
    eventually("the bus is found again", || home.log().matches("the store is locked when logind says so").count() == 2);
    logind.sleep(true);
    eventually("sleep locks again", || !is_open(&mut client));
    daemon.end(Signal::TERM);
}

#[test]
fn sleep_waits_until_the_store_is_locked() {
    let mut home = Home::new();
    let bus = Daemon::start(&home.path(""));
    let mut logind = Sleeper::start(&bus.address);
    listen_to(&bus, &mut home);
    let (daemon, mut client) = start(&home);
    for _ in 0..2 {
        let lock = logind.delayed();
        // By the same way, it is there before what comes then.
        logind.send(&signal(SESSION, "org.freedesktop.login1.Session", "Unlock"));
        assert!(is_open(&mut client) && !may_sleep(&lock, Duration::ZERO));
        logind.send(&prepare_for_sleep(true));
        assert!(may_sleep(&lock, PATIENCE));
        assert!(!is_open(&mut client));
        logind.send(&prepare_for_sleep(false));
        unlock(&mut client);
    }
    let lock = logind.delayed();
    // Nobody else makes it sleep, or lock.
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let mut stranger = runtime.block_on(Bus::connect(&bus.address)).unwrap();
    let names = Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "ListNames", &[]);
    let names = runtime.block_on(stranger.ask(&names)).unwrap().body;
    let names =
        names.split(|byte| !byte.is_ascii_digit() && !b":.".contains(byte)).filter(|name| name.starts_with(b":"));
    for name in names.map(|name| String::from_utf8(name.to_vec()).unwrap()) {
        let signal = Message { destination: name, ..prepare_for_sleep(true) };
        runtime.block_on(stranger.send(&signal)).unwrap();
    }
    logind.send(&signal(SESSION, "org.freedesktop.login1.Session", "Lock"));
    // Whose session that is, the daemon asks behind what the stranger said.
    while Message::decode(&logind.next()).is_none_or(|message| message.member != "Get") {}
    assert!(is_open(&mut client) && !may_sleep(&lock, Duration::ZERO));
    // It lets go when it ends, and when it is killed.
    daemon.end(Signal::KILL);
    assert!(may_sleep(&lock, PATIENCE));
}

#[test]
fn a_locked_session_locks_the_store_when_logind_does_not_say_whose_it_is() {
    let mut home = Home::new();
    let bus = Daemon::start(&home.path(""));
    let mut logind = Logind::start(&bus.address);
    listen_to(&bus, &mut home);
    let (_daemon, mut client) = start(&home);
    // It goes away without an answer, so that the bus answers with an error.
    logind.lock();
    logind.asked();
    drop(logind);
    eventually("the error locks", || !is_open(&mut client));

    // 64 questions are open, and one more is not asked.
    let mut logind = Logind::start(&bus.address);
    unlock(&mut client);
    for _ in 0..64 {
        logind.lock();
    }
    for _ in 0..64 {
        logind.asked();
    }
    assert!(is_open(&mut client));
    logind.lock();
    eventually("one lock too many locks", || !is_open(&mut client));

    // So do open questions when the bus goes away.
    unlock(&mut client);
    drop(bus);
    eventually("the end of the bus locks", || !is_open(&mut client));
}
