//! The store is locked when logind says that the machine goes to sleep, or that a session of this user is locked: with a bus
//! and a logind of the test's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::{Signal, geteuid};
use strongroom::{
    agent::message::{Request, StoreRequest, StoreStatus, Target},
    dbus::{Bus, DBUS, Kind, Message},
};
use support::{client::Client, daemon::Home, eventually};
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
            let mut request = Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "RequestName", &[LOGIND]);
            request.signature.push('u');
            request.body.resize(request.body.len().next_multiple_of(4), 0);
            request.body.extend([0; 4]);
            bus.ask(&request).await.unwrap();
            bus
        });
        Self { runtime, bus }
    }

    fn tell(&mut self, path: &str, interface: &str, member: &str, signature: &str, body: &[u8]) {
        let signal = Message {
            kind: Some(Kind::Signal),
            path: path.to_owned(),
            interface: interface.to_owned(),
            member: member.to_owned(),
            signature: signature.to_owned(),
            body: body.to_vec(),
            ..Message::default()
        };
        self.runtime.block_on(self.bus.send(&signal)).unwrap();
    }

    fn sleep(&mut self, begins: bool) {
        let body = [u8::from(begins), 0, 0, 0];
        self.tell("/org/freedesktop/login1", "org.freedesktop.login1.Manager", "PrepareForSleep", "b", &body);
    }

    /// Locks a session, and says nothing else.
    fn lock(&mut self) {
        self.tell(SESSION, "org.freedesktop.login1.Session", "Lock", "", &[]);
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
