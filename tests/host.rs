//! Drivers in processes of their own, with the real program on the other side: how such a process is confined, how it
//! dies, and that nothing of it is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::MetadataExt,
            net::UnixStream,
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Pid, Signal, geteuid, kill_process},
};
use strongroom::{
    devices::{
        DeviceError, Input, Operation, Scheme, Slot,
        call::{Call, Engine, Reply, Session},
        host::{Host, HostEngine, HostSession, HostSettings, wire},
    },
    public_key::PublicKey,
};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::timeout};

use support::{PATIENCE, eventually, reactor::engine};

const PROGRAM: &str = env!("CARGO_BIN_EXE_strongroom");

/// A scripted device in a process of its own. Its name is nobody else's, so that its process can be found.
struct Device {
    dir: TempDir,
    host: HostEngine,
    name: String,
}

impl Device {
    fn new(script: &str) -> Self {
        Self::with(script, |_| {})
    }

    fn with(script: &str, change: impl FnOnce(&mut HostSettings)) -> Self {
        let dir = TempDir::with_prefix("strongroom-host-").unwrap();
        let name = dir.path().file_name().unwrap().to_str().unwrap().to_owned();
        let mut settings = HostSettings { program: PROGRAM.into(), ..HostSettings::new(&name) };
        change(&mut settings);
        let host = engine(Host::new("scripted", with_control(script, dir.path()), settings));
        Self { dir, host, name }
    }

    async fn open(&self) -> HostSession {
        match self.host.open().await {
            Ok(session) => session,
            Err(e) => panic!("{e}"),
        }
    }

    async fn refusal(&self) -> DeviceError {
        self.host.open().await.err().expect("an error")
    }

    /// Its processes, zombies included.
    fn processes(&self) -> Vec<Pid> {
        let of_device = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).any(|word| word == self.name.as_bytes())
        };
        let entries = fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        pids.filter(of_device).filter_map(Pid::from_raw).collect()
    }

    fn process(&self) -> Pid {
        match self.processes()[..] {
            [pid] => pid,
            ref other => panic!("{} processes", other.len()),
        }
    }

    /// Sets a control of the script.
    fn set(&self, control: &str) -> PathBuf {
        let path = self.dir.path().join(control);
        fs::write(&path, "").unwrap();
        path
    }
}

fn with_control(script: &str, dir: &Path) -> Vec<u8> {
    format!("control = {:?}\n{script}", dir.to_str().unwrap()).into_bytes()
}

fn is_gone(pid: Pid) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

fn sign(session: &HostSession, slot: &str) -> JoinHandle<Result<Reply, DeviceError>> {
    let operation = Operation::Sign { scheme: Scheme::Ed25519, input: Input::Message(b"a message".as_slice().into()) };
    tokio::spawn(session.call(Call::Operate(Slot(slot.as_bytes().into()), operation.into())))
}

async fn answer(call: JoinHandle<Result<Reply, DeviceError>>) -> Result<Reply, DeviceError> {
    timeout(PATIENCE, call).await.expect("an answer").unwrap()
}

async fn died(session: &HostSession) -> String {
    timeout(PATIENCE, session.died()).await.expect("the end of the session")
}

/// The keys `a` to `d`, four lanes.
const FOUR_KEYS: &str = "lanes = 4
    [[key]]
    slot = 'a'
    type = 'ed25519'
    [[key]]
    slot = 'b'
    type = 'ed25519'
    [[key]]
    slot = 'c'
    type = 'ed25519'
    [[key]]
    slot = 'd'
    type = 'ed25519'
    ";

#[tokio::test]
async fn a_key_in_another_process_signs() {
    let device = Device::new(FOUR_KEYS);
    let session = device.open().await;
    assert_eq!(session.lanes(), 4);
    let Ok(Reply::Scan(scan)) = session.call(Call::Scan).await else { panic!("no scan") };
    assert_eq!(scan.keys.len(), 4);
    let key = PublicKey::parse(&scan.keys[0].blob).unwrap();
    let Ok(Reply::Bytes(signature)) = answer(sign(&session, "a")).await else { panic!("no signature") };
    let PublicKey::Ed25519(point) = key else { panic!("another key") };
    let public = ed25519(point);
    public.verify(b"a message", &signature).expect("a signature of the key");
    assert!(matches!(answer(sign(&session, "z")).await, Err(DeviceError::NoSuchKey)));
    let pid = device.process();
    timeout(PATIENCE, session.end(Duration::ZERO)).await.unwrap();
    assert!(is_gone(pid));
}

fn ed25519(point: &[u8]) -> aws_lc_rs::signature::UnparsedPublicKey<&[u8]> {
    aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::ED25519, point)
}

#[tokio::test]
async fn kill_9_restarts_every_call_inside_and_the_device_opens_again() {
    let rules: String = ["a", "b", "c"]
        .map(|slot| format!("[[rule]]\non = 'sign'\nslot = '{slot}'\nonce = 'hang-{slot}'\ndo = 'hang'\n"))
        .concat();
    let device = Device::new(&(FOUR_KEYS.to_owned() + &rules));
    let session = device.open().await;
    let controls = ["a", "b", "c"].map(|slot| device.set(&format!("hang-{slot}")));
    let hung = ["a", "b", "c"].map(|slot| sign(&session, slot));
    let begun = move || controls.iter().all(|control| !control.exists());
    tokio::task::spawn_blocking(|| eventually("all three hang", begun)).await.unwrap();
    // A lane is free, and works.
    assert!(answer(sign(&session, "d")).await.is_ok());
    let pid = device.process();
    kill_process(pid, Signal::KILL).unwrap();
    for call in hung {
        assert!(matches!(answer(call).await, Err(DeviceError::Restarted)));
    }
    assert_eq!(died(&session).await, "the device's process was ended by signal: 9 (SIGKILL)");
    assert!(is_gone(pid), "reaped");
    let again = device.open().await;
    assert!(answer(sign(&again, "a")).await.is_ok());
}

#[tokio::test]
async fn each_death_has_its_reason() {
    for (how, reason) in [
        ("{ crash = 'panic' }", "the device's process exited with code 101"),
        ("{ crash = { exit = 7 } }", "the device's process exited with code 7"),
        ("{ crash = 'abort' }", "the device's process was ended by signal: 6 (SIGABRT)"),
        ("{ crash = 'segv' }", "the device's process was ended by signal: 11 (SIGSEGV)"),
        ("'garbage'", "the device's process sent nonsense: something is too long"),
    ] {
        let device = Device::new(&format!("{FOUR_KEYS}\n[[rule]]\non = 'sign'\ndo = {how}"));
        let session = device.open().await;
        let pid = device.process();
        assert!(matches!(answer(sign(&session, "a")).await, Err(DeviceError::Restarted)), "{how}");
        assert_eq!(died(&session).await, reason);
        assert!(is_gone(pid), "{how}");
        assert!(matches!(answer(sign(&session, "a")).await, Err(DeviceError::Restarted)));
    }
}

#[tokio::test]
async fn an_opening_that_fails_says_why_and_leaves_nothing() {
    let failed = |why: &str| DeviceError::Failed(why.to_owned());
    for (script, error) in [
        ("[[rule]]\non = 'open'\ndo = 'absent'", DeviceError::Absent),
        ("[[rule]]\non = 'open'\ndo = { fail = 'no luck' }", failed("no luck")),
        ("[[rule]]\non = 'open'\ndo = { crash = { exit = 3 } }", failed("the device's process exited with code 3")),
    ] {
        let device = Device::new(script);
        assert_eq!(device.refusal().await, error);
        tokio::task::spawn_blocking(move || eventually("no process", || device.processes().is_empty())).await.unwrap();
    }
    assert!(matches!(Device::new("lanes = 'x'").refusal().await, DeviceError::Failed(why) if why.contains("script")));
    let missing = Device::with("", |settings| settings.program = "/nonexistent".into());
    assert!(matches!(missing.refusal().await, DeviceError::Failed(why) if why.starts_with("cannot start")));
}

#[tokio::test]
async fn an_opening_that_hangs_ends_at_its_time() {
    let device = Device::with("[[rule]]\non = 'open'\ndo = 'hang'", |settings| {
        settings.open_timeout = Duration::from_millis(100);
    });
    assert_eq!(device.refusal().await, DeviceError::Timeout);
    tokio::task::spawn_blocking(move || eventually("no process", || device.processes().is_empty())).await.unwrap();
}

#[tokio::test]
async fn a_dropped_session_takes_its_hung_process_with_it() {
    let device = Device::new(&format!("{FOUR_KEYS}\n[[rule]]\non = 'sign'\ndo = 'hang'"));
    let session = device.open().await;
    let (pid, hung) = (device.process(), sign(&session, "a"));
    drop(session);
    assert!(matches!(answer(hung).await, Err(DeviceError::Restarted)));
    tokio::task::spawn_blocking(move || eventually("the process is gone", || is_gone(pid))).await.unwrap();
}

#[tokio::test]
async fn a_flood_on_standard_error_holds_up_nothing() {
    let device = Device::new(&format!("{FOUR_KEYS}\n[[rule]]\non = 'sign'\ndo = {{ stderr = 100000 }}"));
    let session = device.open().await;
    let flooding = sign(&session, "a");
    assert!(matches!(session.call(Call::Health).await, Ok(Reply::Status(_))));
    assert!(answer(flooding).await.is_ok());
}

#[tokio::test]
async fn the_process_has_nothing_of_ours() {
    // A descriptor that every child would inherit.
    let leaked = File::open("/etc/hostname").unwrap();
    fcntl_setfd(&leaked, FdFlags::empty()).unwrap();
    let device = Device::with(FOUR_KEYS, |settings| settings.env = vec![("VENDOR_SETTING".into(), "x".into())]);
    let _session = device.open().await;
    let proc = PathBuf::from(format!("/proc/{}", device.process()));

    let mut open: Vec<(i32, String)> = fs::read_dir(proc.join("fd"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let to = fs::read_link(entry.path()).unwrap().to_str().unwrap().to_owned();
            (entry.file_name().to_str().unwrap().parse().unwrap(), to)
        })
        .collect();
    open.sort();
    assert_eq!((open[0].1.as_str(), open[1].1.as_str()), ("/dev/null", "/dev/null"));
    assert!(open[2].1.starts_with("pipe:"), "{open:?}");
    let own = |to: &str| to.starts_with("socket:") || to.starts_with("anon_inode:");
    assert!(open[3..].iter().all(|(_, to)| own(to)), "{open:?}");

    let environ = fs::read(proc.join("environ")).unwrap();
    let names: Vec<&str> = environ
        .split(|b| *b == 0)
        .filter(|variable| !variable.is_empty())
        .map(|variable| std::str::from_utf8(variable.split(|b| *b == b'=').next().unwrap()).unwrap())
        .collect();
    assert!(names.contains(&"VENDOR_SETTING") && names.contains(&"PATH"), "{names:?}");
    let listed = |name: &&str| {
        ["HOME", "PATH", "LANG", "SOFTHSM2_CONF", "OPENSC_CONF", "KRYOPTIC_CONF", "VENDOR_SETTING"].contains(name)
            || ["LC_", "XDG_", "TPM2_PKCS11_", "P11_KIT_"].iter().any(|start| name.starts_with(start))
    };
    assert!(names.iter().all(listed), "{names:?}");
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some(), "there is something to leave out");

    let status = fs::read_to_string(proc.join("status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    let command = fs::read(proc.join("cmdline")).unwrap();
    assert!(command.starts_with(b"strongroom\0device-host\0scripted\0"));
}

/// The process as the daemon starts it, but by hand: the script says when it hangs.
struct ByHand {
    child: Child,
    socket: UnixStream,
}

impl ByHand {
    fn start(mut command: Command) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        command.args(["device-host", "scripted", "by-hand"]).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        Self { child: command.spawn().unwrap(), socket }
    }

    fn open(&mut self, script: &[u8]) {
        self.socket.write_all(&wire::encode_open(script)).unwrap();
    }

    /// Whatever comes next.
    fn frame(&mut self) -> Vec<u8> {
        let mut header = [0; 4];
        self.socket.read_exact(&mut header).unwrap();
        let mut body = vec![0; wire::body_len(header).unwrap()];
        self.socket.read_exact(&mut body).unwrap();
        body
    }

    fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the process ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_closed_socket_ends_a_process_that_hangs_everywhere() {
    let dir = TempDir::new().unwrap();
    let hangs = dir.path().join("hang");
    for on in ["open", "scan"] {
        fs::write(&hangs, "").unwrap();
        let mut process = ByHand::start(Command::new(PROGRAM));
        let script = format!("[[rule]]\non = '{on}'\nonce = 'hang'\ndo = 'hang'\n");
        process.open(&with_control(&script, dir.path()));
        if on == "scan" {
            // Its only lane is the main thread.
            process.frame();
            process.socket.write_all(&wire::encode_call(1, &Call::Scan).unwrap()).unwrap();
        }
        eventually("it hangs", || !hangs.exists());
        process.socket.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(process.ended().code(), Some(0), "{on}");
    }
}

#[test]
fn the_end_of_the_thread_that_started_it_ends_the_process() {
    let mut process = thread::spawn(|| {
        let mut process = ByHand::start(Command::new(PROGRAM));
        process.open(b"");
        // It is confined before it opens anything.
        process.frame();
        process
    })
    .join()
    .unwrap();
    assert_eq!(process.ended().signal(), Some(9));
}

#[test]
fn others_of_its_user_cannot_look_into_the_process() {
    // Root's own process would show nothing: its files are root's in any case.
    const NOBODY: u32 = 65534;
    // By descriptor: that user may not be let into the directory.
    let program = File::open(PROGRAM).unwrap();
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut process = ByHand::start(command);
    process.open(b"");
    process.frame();
    // The files of a process that others must not look into are root's (proc(5)).
    assert_eq!(fs::metadata(format!("/proc/{}/environ", process.child.id())).unwrap().uid(), 0);
}

#[test]
fn only_the_daemon_can_use_it() {
    for (args, words) in [(["nonsense", "x"], "there is no driver"), (["scripted", "x"], "not the daemon's socket")] {
        let output = Command::new(PROGRAM).arg("device-host").args(args).stdin(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr.contains(words) && stderr.contains("Only the daemon starts this"), "{stderr}");
    }
}
