//! `strongroom agent`, against the built program: its sockets, signals, reload, and what it says to systemd.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use support::{PATH, PATIENCE, command, eventually, keygen, run};
use tempfile::TempDir;

const NO_KEYS: &str = "The agent has no identities.\n";

/// A directory that is HOME and $XDG_RUNTIME_DIR, with a socket on which the test is systemd.
struct Place {
    dir: TempDir,
    notifications: UnixDatagram,
}

/// `strongroom agent` in a [`Place`].
struct Running {
    child: Child,
    log: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-test-").unwrap();
        let notifications = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notifications.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { dir, notifications }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.dir.path())
            .env_clear()
            .envs([("PATH", PATH), ("LC_ALL", "C")])
            .envs([("HOME", self.dir.path()), ("XDG_RUNTIME_DIR", self.dir.path())])
            .env("NOTIFY_SOCKET", self.path("notify"))
            .stdin(Stdio::null());
        command
    }

    fn agent(&self) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_strongroom"));
        command.arg("agent");
        command
    }

    fn spawn(&self, command: &mut Command) -> Running {
        let log = self.path("agent.log");
        let child = command.stderr(File::create(&log).unwrap()).spawn().unwrap();
        Running { child, log }
    }

    /// Starts an agent and waits until it says that it is ready.
    fn start(&self, command: &mut Command) -> Running {
        let agent = self.spawn(command);
        assert_eq!(self.notification(), "READY=1");
        agent
    }

    /// The next message to systemd.
    #[track_caller]
    fn notification(&self) -> String {
        let mut message = [0; 512];
        let length = self.notifications.recv(&mut message).expect("a message to systemd");
        String::from_utf8(message[..length].to_vec()).unwrap().trim_end().to_owned()
    }

    fn ssh_add(&self, socket: &Path, args: &[&str]) -> support::Outcome {
        run(command("ssh-add", self.dir.path()).env("SSH_AUTH_SOCK", socket).args(args))
    }

    #[track_caller]
    fn serves(&self, socket: &Path) {
        assert_eq!(self.ssh_add(socket, &["-l"]).fails_with(1).stdout, NO_KEYS);
    }
}

impl Running {
    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.child.wait().unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    #[track_caller]
    fn eventually_logs(&self, text: &str) {
        eventually(text, || self.log().contains(text));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
    }
}

#[test]
fn the_command_lines_socket_is_served_until_sigterm() {
    let place = Place::new();
    let socket = place.path("new/agent");
    let agent = place.start(place.agent().arg("--socket").arg(&socket));
    place.serves(&socket);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket), mode(socket.parent().unwrap())), (0o600, 0o700));
    assert!(!place.path("strongroom").exists(), "no configured socket is opened besides");
    assert_eq!(agent.end().code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn without_a_configuration_both_doors_are_open() {
    let place = Place::new();
    let agent = place.start(&mut place.agent());
    place.serves(&place.path("strongroom/agent"));
    UnixStream::connect(place.path("strongroom/service")).unwrap();
    agent.signal(Signal::INT);
    let mut agent = agent;
    assert_eq!(agent.child.wait().unwrap().code(), Some(0));
    assert!(!place.path("strongroom/agent").exists() && !place.path("strongroom/service").exists());
}

#[test]
fn a_socket_left_over_by_a_dead_agent_is_replaced() {
    let place = Place::new();
    let socket = place.path("agent");
    let mut dead = place.start(place.agent().arg("--socket").arg(&socket));
    dead.signal(Signal::KILL);
    dead.child.wait().unwrap();
    assert!(socket.exists());
    let _agent = place.start(place.agent().arg("--socket").arg(&socket));
    place.serves(&socket);
}

/// Listens on the socket in its argument and dies; a process that it started has the socket until a moment after the
/// first connection.
const DIES: &str = r#"
    use IO::Socket::UNIX;
    my $listener = IO::Socket::UNIX->new(Local => $ARGV[0], Listen => 5) or die "$!";
    exit if fork;
    alarm 60;
    $listener->accept;
    select undef, undef, undef, 0.3;
"#;

#[test]
fn a_socket_whose_agent_died_is_replaced_although_a_child_of_it_has_it_still() {
    let place = Place::new();
    let socket = place.path("agent");
    assert!(Command::new("perl").args(["-e", DIES]).arg(&socket).status().unwrap().success());
    UnixStream::connect(&socket).expect("the child listens still");
    let _agent = place.start(place.agent().arg("--socket").arg(&socket));
    place.serves(&socket);
}

#[test]
fn a_live_socket_is_refused() {
    let place = Place::new();
    let socket = place.path("agent");
    let _agent = place.start(place.agent().arg("--socket").arg(&socket));
    let second = run(place.agent().arg("--socket").arg(&socket)).fails_with(1);
    assert!(second.stderr.contains("is served by another agent already"), "{second:?}");
    place.serves(&socket);
}

#[test]
fn what_is_not_a_socket_is_refused_and_left_alone() {
    let place = Place::new();
    let file = place.path("file");
    fs::write(&file, "precious").unwrap();
    let refused = run(place.agent().arg("--socket").arg(&file)).fails_with(1);
    assert!(refused.stderr.contains("exists and is not a socket"), "{refused:?}");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
}

#[test]
fn another_agents_socket_is_not_removed_at_the_end() {
    let place = Place::new();
    let socket = place.path("agent");
    let agent = place.start(place.agent().arg("--socket").arg(&socket));
    fs::rename(&socket, place.path("aside")).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    assert!(agent.end().success());
    assert!(socket.exists());
}

#[test]
fn sighup_reloads_and_a_broken_configuration_changes_nothing() {
    let place = Place::new();
    let (socket, config) = (place.path("agent"), place.path("config.toml"));
    let listen = format!("[[listen]]\npath = \"{}\"\n", socket.display());
    fs::write(&config, &listen).unwrap();
    let agent = place.start(place.agent().arg("--config").arg(&config));
    place.serves(&socket);

    fs::write(&config, format!("{listen}uids = \"everyone\"\n")).unwrap();
    agent.signal(Signal::HUP);
    assert!(place.notification().starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert_eq!(place.notification(), "READY=1");
    agent.eventually_logs("the old one stays in force");
    agent.eventually_logs("config.toml:3: ");
    place.serves(&socket);

    // From now on nobody of ours is admitted: the door of new connections has changed.
    fs::write(&config, format!("{listen}uids = [4294967294]\n")).unwrap();
    agent.signal(Signal::HUP);
    assert!(place.notification().starts_with("RELOADING=1"));
    assert_eq!(place.notification(), "READY=1");
    // It may fail in reading or die of SIGPIPE in writing, as the closing comes late or early.
    assert_ne!(place.ssh_add(&socket, &["-l"]).code, Some(0));
    agent.eventually_logs("refused a connection of a foreign uid");

    fs::write(&config, format!("{listen}[[listen]]\npath = \"{}.other\"\n", socket.display())).unwrap();
    agent.signal(Signal::HUP);
    agent.eventually_logs("start the agent again to open and close sockets");
    place.serves(&socket);
    assert!(!place.path("agent.other").exists());
}

#[test]
fn systemd_is_told_of_readiness_the_watchdog_and_the_end() {
    let place = Place::new();
    // The shell's number is the agent's: exec keeps it.
    let mut command = place.command("/bin/sh");
    command.args(["-c", "WATCHDOG_PID=$$ exec \"$0\" agent --socket agent", env!("CARGO_BIN_EXE_strongroom")]);
    let agent = place.spawn(command.env("WATCHDOG_USEC", "100000"));
    let mut seen = vec![place.notification()];
    while !(seen.iter().any(|n| n == "READY=1") && seen.iter().filter(|n| *n == "WATCHDOG=1").count() >= 3) {
        seen.push(place.notification());
    }
    assert!(agent.end().success());
    while place.notification() != "STOPPING=1" {}
}

#[test]
fn sigusr1_removes_all_keys() {
    let place = Place::new();
    let socket = place.path("agent");
    let key = keygen(place.dir.path(), "key", &["-t", "ed25519"]);
    let agent = place.start(place.agent().arg("--socket").arg(&socket));
    place.ssh_add(&socket, &["-q", key.to_str().unwrap()]).ok();
    place.ssh_add(&socket, &["-l"]).ok();
    agent.signal(Signal::USR1);
    eventually("the keys go", || place.ssh_add(&socket, &["-l"]).code == Some(1));
    assert!(agent.end().success());
}

#[test]
fn sockets_of_systemd_replace_the_configured_ones_and_stay() {
    let place = Place::new();
    let (ssh, service) = (place.path("ssh.sock"), place.path("service.sock"));
    let mut command = place.command("systemd-socket-activate");
    command.args(["--fdname=ssh:service", "-E", "HOME", "-E", "XDG_RUNTIME_DIR", "-E", "NOTIFY_SOCKET", "-l"]);
    command.arg(&ssh).arg("-l").arg(&service).args([env!("CARGO_BIN_EXE_strongroom"), "agent"]);
    let agent = place.spawn(&mut command);
    // A file is there before anybody listens. The first connection starts the agent, with all sockets.
    eventually("it listens", || UnixStream::connect(&ssh).is_ok());
    place.serves(&ssh);
    assert_eq!(place.notification(), "READY=1");
    UnixStream::connect(&service).unwrap();
    assert!(!place.path("strongroom").exists(), "no configured socket is opened besides");
    assert!(agent.end().success());
    assert!(ssh.exists() && service.exists());
}

#[test]
fn a_socket_of_systemd_without_a_doors_name_is_refused() {
    let place = Place::new();
    let socket = place.path("sock");
    let mut command = place.command("systemd-socket-activate");
    command.args(["--fdname=door", "-l"]).arg(&socket).args([env!("CARGO_BIN_EXE_strongroom"), "agent"]);
    let mut agent = place.spawn(&mut command);
    // The connection wakes it, even one that has ended.
    eventually("it listens", || UnixStream::connect(&socket).is_ok());
    assert_eq!(agent.child.wait().unwrap().code(), Some(1));
    assert!(agent.log().contains("FileDescriptorName=ssh"), "{}", agent.log());
}
