//! `strongroom agent` under test, with a configuration and scripted devices.

use std::{
    fs::{self, File},
    os::unix::{fs::PermissionsExt, net::UnixDatagram},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use strongroom::vault::{
    audit::{
        self,
        verify::{Report, verify},
    },
    store::Store,
};
use tempfile::TempDir;

use super::{Outcome, PATH, PATIENCE, askpass::Askpass, client::Client, command, pcsc::Room, run};

/// A directory with a configuration, in which a daemon runs, and runs again.
pub struct Home {
    dir: TempDir,
    notifications: UnixDatagram,
    config: String,
    environment: Vec<(String, String)>,
    /// The words before the daemon's.
    door: Vec<String>,
}

/// The script of a device that opens locked.
pub const LOCKED: &str = r#"
serial = "L1"
locked = true
control = CONTROL
[pin]
value = "123456"
tries = 5
[[key]]
slot = "k"
type = "p256"
seed = 4
label = "locked"
"#;

/// That of one whose eight lanes take 50 ms each.
pub const SLOW: &str = r#"
lanes = 8
control = CONTROL
[[key]]
slot = "k"
type = "ed25519"
[[rule]]
on = "sign"
do = { sleep_ms = 50 }
"#;

/// A daemon that lives as long as this value.
pub struct Daemon<'a> {
    home: &'a Home,
    child: Child,
    /// How long the log was before.
    log_begins: usize,
}

impl Home {
    /// An ssh door and a service door, and no devices.
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-test-").expect("a directory");
        let notifications = UnixDatagram::bind(dir.path().join("notify")).expect("a socket");
        notifications.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let path = |name: &str| dir.path().join(name).display().to_string();
        // What cards are in the machine's readers is none of a test's business.
        let config = format!(
            "state = {:?}\n[openpgp]\nfind = false\n[[listen]]\ndoor = \"ssh\"\npath = {:?}\n[[listen]]\ndoor = \"service\"\npath = {:?}\n",
            path("state"),
            path("agent"),
            path("service")
        );
        Self { dir, notifications, config, environment: Vec::new(), door: vec!["/usr/bin/env".to_owned()] }
    }

    /// The same, in which a try at a passphrase costs as little as a store allows.
    pub fn with_cheap_tries() -> Self {
        let mut home = Self::new();
        home.env("STRONGROOM_TEST_SLOT_MS", "1");
        home
    }

    /// Adds lines to the end of the configuration.
    pub fn configure(&mut self, lines: &str) {
        self.config.push_str(lines);
        self.config.push('\n');
    }

    /// Adds a device that does what `script` says, with `lines` of its own in the configuration. The script may name
    /// [`Home::control`] as `CONTROL`.
    pub fn device(&mut self, name: &str, script: &str, lines: &str) {
        let control = self.control(name);
        fs::create_dir(&control).expect("a directory for the controls");
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, script.replace("CONTROL", &format!("{:?}", control.display().to_string()))).expect("a script");
        self.configure(&format!("[[device]]\nname = \"{name}\"\ndriver = \"scripted\"\nscript = {path:?}\n{lines}"));
    }

    /// The directory of a device's control files.
    pub fn control(&self, device: &str) -> PathBuf {
        self.path(&format!("{device}.control"))
    }

    /// Sets a variable in the daemon's environment.
    pub fn env(&mut self, name: &str, value: impl AsRef<Path>) {
        self.environment.push((name.to_owned(), value.as_ref().display().to_string()));
    }

    /// Has the daemon run in this room, where the cards are.
    pub fn enter(&mut self, room: &Room) {
        self.door = room.door(self.dir.path());
        self.config = self.config.replace("[openpgp]\nfind = false\n", "");
    }

    /// Lets other users reach the sockets whose mode does.
    pub fn open_to_others(&self) {
        fs::set_permissions(self.dir.path(), fs::Permissions::from_mode(0o711)).expect("its mode");
    }

    /// Has the daemon ask this program.
    pub fn askpass(&mut self, askpass: &Askpass) {
        self.env("SSH_ASKPASS", askpass.program());
        self.environment.push(("SSH_ASKPASS_REQUIRE".to_owned(), "force".to_owned()));
    }

    /// A file in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a daemon and waits until it says that it is ready. Its devices may not be yet.
    pub fn start(&self) -> Daemon<'_> {
        let config = self.path("config.toml");
        fs::write(&config, &self.config).expect("a configuration");
        self.forget_notifications();
        let log_begins = self.log().len();
        let log = File::options().create(true).append(true).open(self.path("log")).expect("a log");
        let child = Command::new(&self.door[0])
            .args(&self.door[1..])
            .args([env!("CARGO_BIN_EXE_strongroom"), "agent", "--config"])
            .arg(&config)
            .current_dir(self.dir.path())
            .env_clear()
            .envs([("PATH", PATH), ("LC_ALL", "C")])
            .envs([("HOME", self.dir.path()), ("XDG_RUNTIME_DIR", self.dir.path())])
            .env("NOTIFY_SOCKET", self.path("notify"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon starts");
        let daemon = Daemon { home: self, child, log_begins };
        while self.notification() != "READY=1" {}
        daemon
    }

    /// What an earlier daemon said, above all that it was ready, is not the next one's.
    fn forget_notifications(&self) {
        self.notifications.set_nonblocking(true).expect("a socket");
        while self.notifications.recv(&mut [0; 512]).is_ok() {}
        self.notifications.set_nonblocking(false).expect("a socket");
    }

    fn notification(&self) -> String {
        let mut message = [0; 512];
        let length = self.notifications.recv(&mut message).expect("a message to systemd");
        String::from_utf8_lossy(&message[..length]).trim_end().to_owned()
    }

    /// Where the audit log is.
    pub fn audit_directory(&self) -> PathBuf {
        self.path("state/audit")
    }

    /// What is in the audit log.
    pub fn audit(&self) -> String {
        let directory = self.audit_directory();
        let numbers = audit::numbers(&directory).unwrap_or_default();
        numbers.iter().map(|n| fs::read_to_string(audit::path_of(&directory, *n)).unwrap_or_default()).collect()
    }

    /// Holds the audit log against its head, while no daemon runs.
    pub fn verify_audit(&self) -> Report {
        let head = Store::audit_head_in(&self.path("state")).expect("a state file");
        verify(&self.audit_directory(), Some(&head.expect("a head")), &[]).expect("a log")
    }

    /// What all daemons here have logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Daemon<'_> {
    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it runs.
    pub fn home(&self) -> &Home {
        self.home
    }

    /// A new connection to the ssh door.
    pub fn connect(&self) -> Client {
        Client::connect(&self.home.path("agent"))
    }

    /// A new connection to the service door.
    pub fn connect_service(&self) -> Client {
        Client::connect(&self.home.path("service"))
    }

    /// The blob of the key with this comment, once the ssh door lists it.
    #[track_caller]
    pub fn blob(&self, comment: &str) -> Vec<u8> {
        let mut found = None;
        super::eventually(&format!("{comment:?} is listed"), || {
            found = self.connect().list().into_iter().find(|(_, c)| c == comment.as_bytes()).map(|(blob, _)| blob);
            found.is_some()
        });
        found.expect("it is listed")
    }

    /// Runs ssh-add at the ssh door to its end.
    pub fn ssh_add(&self, args: &[&str]) -> Outcome {
        let mut command = command("ssh-add", self.home.dir.path());
        run(command.env("SSH_AUTH_SOCK", self.home.path("agent")).args(args))
    }

    /// Waits until a line of the log contains this, since this daemon was started.
    #[track_caller]
    pub fn logs(&self, text: &str) {
        super::eventually(&format!("the log says {text:?}"), || {
            self.home.log().get(self.log_begins..).is_some_and(|log| log.contains(text))
        });
    }

    /// The processes that run this daemon's devices, with the devices' names. Zombies are none.
    pub fn hosts(&self) -> Vec<(Pid, String)> {
        children(self.pid())
    }

    /// Sends a signal and waits for the end.
    pub fn end(self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait()
    }

    /// Waits for the end.
    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().expect("the daemon's end")
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("the daemon lives");
    }
}

/// The processes that run devices for the daemon `parent`, with the devices' names.
pub fn children(parent: u32) -> Vec<(Pid, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process may end while it is looked at.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let mut fields = after_name.split_whitespace();
        let (state, its_parent) = (fields.next(), fields.next().and_then(|field| field.parse::<u32>().ok()));
        if its_parent != Some(parent) || state == Some("Z") {
            continue;
        }
        let Ok(args) = fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<_> = args.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
        if args.get(1).is_some_and(|arg| arg == "device-host")
            && let (Some(pid), Some(name)) = (Pid::from_raw(pid), args.get(3))
        {
            found.push((pid, name.clone()));
        }
    }
    found
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if self.child.try_wait().expect("the daemon's state").is_none() {
            self.signal(Signal::TERM);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while self.child.try_wait().expect("the daemon's state").is_none() && std::time::Instant::now() < deadline {
                thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = self.home.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            let tail: String = tail.iter().rev().map(|line| format!("  {line}\n")).collect();
            eprintln!("the daemon's log ends with:\n{tail}");
        }
    }
}
