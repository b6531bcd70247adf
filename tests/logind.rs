//! The store is locked when logind says that the machine goes to sleep, or that a session of this user is locked: with a bus
//! and a logind of the test's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, IoSlice, PipeReader, Read, pipe},
    mem::MaybeUninit,
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, Stdio},
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
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

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
    /// Somebody on the bus who is not logind.
    fn connect(address: &str) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let bus = runtime.block_on(Bus::connect(address)).unwrap();
        Self { runtime, bus }
    }

    fn start(address: &str) -> Self {
        let Self { runtime, mut bus } = Self::connect(address);
        runtime.block_on(async {
            let mut request = Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "RequestName", &[LOGIND]);
            request.signature.push('u');
            request.body.resize(request.body.len().next_multiple_of(4), 0);
            request.body.extend([0; 4]);
            bus.ask(&request).await.unwrap();
        });
        Self { runtime, bus }
    }

    fn tell(&mut self, signal: Message) {
        self.runtime.block_on(self.bus.send(&Message { kind: Some(Kind::Signal), ..signal })).unwrap();
    }

    fn sleep(&mut self, begins: bool) {
        self.tell(prepare_for_sleep(begins));
    }

    /// Locks a session, and says nothing else.
    fn lock(&mut self) {
        self.tell(Message {
            path: SESSION.to_owned(),
            interface: "org.freedesktop.login1.Session".to_owned(),
            member: "Lock".to_owned(),
            ..Message::default()
        });
    }

    /// Waits for a call of this method.
    fn called(&mut self, member: &str) -> Message {
        let called = async {
            loop {
                let message = self.bus.next().await.unwrap();
                if message.kind == Some(Kind::Call) && message.member == member {
                    break message;
                }
            }
        };
        self.runtime.block_on(async { timeout(PATIENCE, called).await.expect("nobody calls") })
    }

    /// Waits until somebody asks whose a session is.
    fn asked(&mut self) -> Message {
        let asked = self.called("Get");
        assert_eq!((asked.path.as_str(), asked.signature.as_str()), (SESSION, "ss"));
        asked
    }

    /// Waits until somebody wants sleep to wait, and lets it: until what is returned is at its end. With it, who that is.
    fn delayed(&mut self) -> (PipeReader, String) {
        let asked = self.called("Inhibit");
        assert_eq!((asked.path.as_str(), asked.signature.as_str()), ("/org/freedesktop/login1", "ssss"));
        assert!(asked.body.starts_with(b"\x05\0\0\0sleep\0") && asked.body.ends_with(b"\x05\0\0\0delay\0"));
        let (lock, held) = pipe().unwrap();
        let answer = Message {
            kind: Some(Kind::Return),
            destination: asked.sender.clone(),
            serial: 1000,
            reply_to: asked.serial,
            signature: "h".to_owned(),
            descriptors: 1,
            body: vec![0; 4],
            ..Message::default()
        };
        let bytes = answer.encode();
        let held = [held.as_fd()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&held)));
        let sent = sendmsg(&self.bus, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
        (lock, asked.sender)
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

fn prepare_for_sleep(begins: bool) -> Message {
    Message {
        path: "/org/freedesktop/login1".to_owned(),
        interface: "org.freedesktop.login1.Manager".to_owned(),
        member: "PrepareForSleep".to_owned(),
        signature: "b".to_owned(),
        body: vec![u8::from(begins), 0, 0, 0],
        ..Message::default()
    }
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
    let mut logind = Logind::start(&bus.address);
    listen_to(&bus, &mut home);
    let (_daemon, mut client) = start(&home);
    let (mut lock, daemon) = logind.delayed();
    for _ in 0..2 {
        assert_eq!(
            poll(&mut [PollFd::new(&lock, PollFlags::IN)], Some(&Timespec::default())),
            Ok(0),
            "sleep is let go while the store is open"
        );
        logind.sleep(true);
        assert_eq!(lock.read(&mut [0]).unwrap(), 0);
        assert!(!is_open(&mut client));
        logind.sleep(false);
        (lock, _) = logind.delayed();
        unlock(&mut client);
    }
    // Who is not logind locks the store, and no more: the next sleep waits as well.
    let mut stranger = Logind::connect(&bus.address);
    stranger.tell(Message { destination: daemon, ..prepare_for_sleep(true) });
    eventually("a stranger locks", || !is_open(&mut client));
    let (mut lock, _) = logind.delayed();
    unlock(&mut client);
    logind.sleep(true);
    assert_eq!(lock.read(&mut [0]).unwrap(), 0);
    assert!(!is_open(&mut client));
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
