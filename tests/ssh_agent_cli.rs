//! The drop-in's command line, against the built program: options, output, sockets, processes, exit codes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Timestamps, utimensat};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, kill_process, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

/// Far less than the 10 s after which ssh-agent looks for its parent.
const PATIENCE: Duration = Duration::from_secs(5);

/// A home, a $TMPDIR and the program under the name `ssh-agent`.
struct Sandbox {
    dir: TempDir,
    program: PathBuf,
}

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["home", "tmp"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let program = dir.path().join("ssh-agent");
        symlink(env!("CARGO_BIN_EXE_strongroom"), &program).unwrap();
        Self { dir, program }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `program` in an environment that holds nothing of ours but PATH.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::null());
        command
    }

    fn agent(&self, args: &[&str]) -> Command {
        let mut command = self.command(&self.program);
        command.args(args);
        command
    }

    /// What a script prints, `"$A"` being the program.
    fn script(&self, script: &str) -> Output {
        self.command("sh").args(["-c", script]).env("A", &self.program).output().unwrap()
    }

    fn run(&self, args: &[&str]) -> (i32, String, String) {
        code_and_text(&self.agent(args).output().unwrap())
    }

    /// Starts an agent in the background.
    fn start(&self, args: &[&str]) -> Agent {
        let (code, out, err) = self.run(args);
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        Agent::new(&out)
    }

    /// Starts an agent in the foreground and waits until it is ready.
    fn foreground(&self, args: &[&str]) -> (Child, Vec<String>) {
        let mut child = self.agent(args).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().take(2).map(Result::unwrap).collect();
        (child, lines)
    }

    fn agent_directory(&self) -> PathBuf {
        self.path("home/.ssh/agent")
    }

    fn sockets(&self) -> Vec<String> {
        let entries = fs::read_dir(self.agent_directory()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// An agent in the background, ended with the test.
struct Agent {
    pid: Pid,
    /// Names this process only, even when it is gone and its number taken.
    process: OwnedFd,
    socket: PathBuf,
}

impl Agent {
    fn of(pid: Pid, socket: impl Into<PathBuf>) -> Self {
        Self { pid, process: pidfd_open(pid, PidfdFlags::empty()).unwrap(), socket: socket.into() }
    }

    /// Waits for the end.
    fn ends(&self) -> bool {
        let limit = Timespec { tv_sec: PATIENCE.as_secs().try_into().unwrap(), tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&limit)).unwrap() == 1
    }

    fn signal(&self, signal: Signal) {
        pidfd_send_signal(&self.process, signal).unwrap();
    }

    /// From the sh lines.
    fn new(lines: &str) -> Self {
        let value = |name: &str| {
            let (_, rest) = lines.split_once(&format!("{name}=")).unwrap_or_else(|| panic!("{lines}"));
            rest.split(';').next().unwrap().to_owned()
        };
        Self::of(pid(&value("SSH_AGENT_PID")), value("SSH_AUTH_SOCK"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.process, Signal::TERM);
    }
}

fn pid(text: &str) -> Pid {
    Pid::from_raw(text.trim().parse().unwrap()).unwrap()
}

fn code_and_text(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Asks the agent for its identities: a SUCCESS-like answer shows that it serves.
fn lists(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&[0, 0, 0, 1, 11]).unwrap();
    let mut reply = [0; 5];
    stream.read_exact(&mut reply).is_ok() && reply[4] == 12
}

/// Waits for the end of a process that need not be a child and may be gone.
fn ends(pid: Pid) -> bool {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    Agent { pid, process, socket: PathBuf::new() }.ends()
}

/// Leaves a socket that nobody ever listened on: a closed listener can live on for a moment in the children that
/// other tests start.
fn dead_socket(path: &Path) {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
}

fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The exit code after a signal.
fn end_with(child: &mut Child, signal: Signal) -> i32 {
    kill_process(Pid::from_child(child), signal).unwrap();
    child.wait().unwrap().code().unwrap_or(-1)
}

#[test]
fn the_default_socket_lives_below_the_home_directory() {
    let sandbox = Sandbox::new();
    let (code, out, err) = sandbox.run(&[]);
    let agent = Agent::new(&out);
    assert_eq!((code, err.as_str()), (0, ""));
    let (socket, pid) = (agent.socket.display(), agent.pid);
    assert_eq!(
        out,
        format!(
            "SSH_AUTH_SOCK={socket}; export SSH_AUTH_SOCK;\nSSH_AGENT_PID={pid}; export SSH_AGENT_PID;\n\
             echo Agent pid {pid};\n"
        )
    );
    assert!(lists(&agent.socket));
    assert_eq!(agent.socket.parent().unwrap(), sandbox.agent_directory());
    let name = agent.socket.file_name().unwrap().to_str().unwrap();
    let parts: Vec<_> = name.split('.').collect();
    assert_eq!(parts.iter().map(|p| p.len()).collect::<Vec<_>>(), [1, 10, 5, 10], "{name}");
    assert_eq!((parts[0], parts[2]), ("s", "agent"));
    assert_eq!(mode(&agent.socket), 0o600);
    assert_eq!(mode(&sandbox.path("home/.ssh")), 0o700);
    assert_eq!(mode(&sandbox.agent_directory()), 0o700);
}

#[test]
fn strongroom_ssh_agent_is_the_same_program() {
    let sandbox = Sandbox::new();
    let output =
        sandbox.command(env!("CARGO_BIN_EXE_strongroom")).args(["ssh-agent", "-s", "-t", "5"]).output().unwrap();
    let agent = Agent::new(&String::from_utf8(output.stdout).unwrap());
    assert!(output.status.success() && lists(&agent.socket));
    // Whoever looks for the agent by name finds it, however it was started.
    assert_eq!(fs::read_to_string(format!("/proc/{}/comm", agent.pid)).unwrap(), "ssh-agent\n");
    assert!(fs::read(format!("/proc/{}/cmdline", agent.pid)).unwrap().starts_with(b"ssh-agent\0"));
}

#[test]
fn csh_by_option_and_by_login_shell() {
    let sandbox = Sandbox::new();
    let start = |args: &[&str], shell: &str| {
        let (code, out, _) = code_and_text(&sandbox.agent(args).env("SHELL", shell).output().unwrap());
        assert_eq!(code, 0);
        let pid = out.lines().last().unwrap().trim_start_matches("echo Agent pid ").trim_end_matches(';').to_owned();
        let _agent = Agent::of(self::pid(&pid), "");
        out.replace(&pid, "PID").replace(sandbox.path("s").to_str().unwrap(), "SOCKET")
    };
    let socket = sandbox.path("s");
    let a = socket.to_str().unwrap();
    let csh = "setenv SSH_AUTH_SOCK SOCKET;\nsetenv SSH_AGENT_PID PID;\necho Agent pid PID;\n";
    for (args, shell) in [(&["-c", "-a", a][..], "/bin/sh"), (&["-a", a], "/bin/tcsh"), (&["-a", a], "csh")] {
        assert_eq!(start(args, shell), csh, "{args:?} {shell}");
        assert!(eventually(|| !socket.exists()));
    }
    assert!(start(&["-s", "-a", a], "/bin/csh").starts_with("SSH_AUTH_SOCK=SOCKET; export"));
}

#[test]
fn a_path_with_spaces_and_quotes_survives_the_shell() {
    let sandbox = Sandbox::new();
    for name in ["a b", "it's", "two  $(spaces) `and` \"more\"; 'of it'"] {
        let socket = sandbox.path(name);
        let out = sandbox
            .command("sh")
            .args(["-c", r#"eval "$("$A" -s -a "$S")" >&2; printf '%s\n%s' "$SSH_AGENT_PID" "$SSH_AUTH_SOCK""#])
            .env("A", &sandbox.program)
            .env("S", &socket)
            .output()
            .unwrap();
        let out = String::from_utf8(out.stdout).unwrap();
        let (pid_text, path) = out.split_once('\n').unwrap();
        let agent = Agent::of(pid(pid_text), path);
        assert!(agent.socket == socket && lists(&socket), "{path}");
    }
    let socket = sandbox.path("x y");
    let (_, out, _) = sandbox.run(&["-a", socket.to_str().unwrap()]);
    assert!(out.starts_with(&format!("SSH_AUTH_SOCK=\"{}\"; export", socket.display())), "{out}");
    drop(Agent::new(&out));
}

#[test]
fn usage_errors_exit_1_and_bad_values_255() {
    let sandbox = Sandbox::new();
    let usage: [&[&str]; 17] = [
        &["-c", "-s"],
        &["-sc"],
        &["-dd"],
        &["-DD"],
        &["-d", "-D"],
        &["-x"],
        &["-a"],
        &["-t"],
        &["--help"],
        &["-t", "5y"],
        &["-t", "2147483648"],
        &["-c", "true"],
        &["-s", "true"],
        &["-k", "true"],
        &["-d", "true"],
        &["-D", "true"],
        &["-u", "true"],
    ];
    for args in usage {
        let (code, out, err) = sandbox.run(args);
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}");
        assert!(err.contains("\nusage: ssh-agent [-c | -s] [-Dd]"), "{args:?}: {err}");
    }
    assert!(sandbox.run(&["-t", "5y"]).2.starts_with("Invalid lifetime\nusage: "));
    let values: [&[&str]; 4] = [&["-O", "x"], &["-E", "md4"], &["-P", "a", "-P", "b"], &["-Owebsafe-allow=a", "-Ox"]];
    for args in values {
        let (code, out, err) = sandbox.run(args);
        assert_eq!((code, out.as_str()), (255, ""), "{args:?}");
        assert!(err.starts_with("ssh-agent: -") && !err.contains("usage"), "{args:?}: {err}");
    }
    assert!(!sandbox.path("home/.ssh").exists());
}

#[test]
fn the_version_goes_to_standard_error() {
    let (code, out, err) = Sandbox::new().run(&["-V", "-x"]);
    assert_eq!((code, out.as_str()), (0, ""));
    let expected = format!("strongroom {}, AWS-LC ", env!("CARGO_PKG_VERSION"));
    assert!(err.starts_with(&expected) && err.lines().count() == 1, "{err}");
}

#[test]
fn a_command_gets_the_agent_and_its_status_is_ours() {
    let sandbox = Sandbox::new();
    let out = sandbox.path("out");
    let socket = sandbox.path("at");
    let all = ["-TU", "-t", "1h30m", "-E", "md5", "-Ono-restrict-websafe", "-O", "allow-remote-pkcs11"];
    let script = r#"[ -S "$SSH_AUTH_SOCK" ] && kill -0 "$SSH_AGENT_PID" &&
        printf '%s\n%s' "$SSH_AGENT_PID" "$SSH_AUTH_SOCK" > "$1" && exit 37"#;
    let given: [&[&str]; 3] =
        [&[], &["-a", socket.to_str().unwrap()], &[&all[..], &["-O", "websafe-allow=x:*", "-P", "/a/*"]].concat()];
    for options in given {
        let args = [options, &["sh", "-c", script, "sh", out.to_str().unwrap()]].concat();
        assert_eq!(sandbox.run(&args), (37, String::new(), String::new()), "{options:?}");
        let text = fs::read_to_string(&out).unwrap();
        let (pid_text, path) = text.split_once('\n').unwrap();
        assert!(ends(pid(pid_text)), "the agent outlives its command");
        assert!(!Path::new(path).exists(), "{path}");
    }
    assert_eq!(fs::read_dir(sandbox.path("tmp")).unwrap().count(), 0);
}

#[test]
fn a_command_keeps_what_it_inherits() {
    let sandbox = Sandbox::new();
    let output = sandbox.script(r#"exec 9>&1; echo in | "$A" sh -c 'cat; echo nine >&9; echo two >&2'"#);
    assert_eq!(code_and_text(&output), (0, "in\nnine\n".into(), "two\n".into()));
    let output = sandbox.script(r#"umask 027; cd /; "$A" sh -c 'umask; pwd; exec kill -PIPE $$'; echo $?"#);
    assert_eq!(code_and_text(&output).1, "0027\n/\n141\n");
}

#[test]
fn a_command_that_cannot_run_exits_1_and_takes_the_agent_along() {
    let sandbox = Sandbox::new();
    let (code, out, err) = sandbox.run(&["/nonexistent/program", "-c"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("ssh-agent: /nonexistent/program: No such file"), "{err}");
    assert!(eventually(|| sandbox.sockets().is_empty()));
}

#[test]
fn a_killed_command_takes_the_agent_along() {
    let sandbox = Sandbox::new();
    let script = "echo $SSH_AGENT_PID; exec sleep 1000";
    let mut child = sandbox.agent(&["-T", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    assert!(ends(pid(&line)));
    assert_eq!(fs::read_dir(sandbox.path("tmp")).unwrap().count(), 0);
    child.wait().unwrap();
}

#[test]
fn an_existing_path_is_left_alone() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("file");
    fs::write(&path, "precious").unwrap();
    let dead = sandbox.path("dead");
    dead_socket(&dead);
    for path in [&path, &dead] {
        let args = ["-a", path.to_str().unwrap()];
        for more in [&[][..], &["-D"], &["true"]] {
            let (code, out, err) = sandbox.run(&[&args, more].concat());
            assert_eq!((code, out.as_str()), (1, ""));
            assert!(err.contains(path.to_str().unwrap()) && err.contains("remove it"), "{err}");
        }
    }
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert!(dead.exists());
}

#[test]
fn a_relative_path_is_removed_although_the_daemon_has_left_the_directory() {
    let sandbox = Sandbox::new();
    let output = sandbox.agent(&["-a", "relative"]).current_dir(sandbox.dir.path()).output().unwrap();
    let agent = Agent::new(&String::from_utf8(output.stdout).unwrap());
    assert_eq!(agent.socket, Path::new("relative"));
    assert!(lists(&sandbox.path("relative")));
    agent.signal(Signal::TERM);
    assert!(agent.ends() && !sandbox.path("relative").exists());
}

#[test]
fn a_private_directory_beats_a_path() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("unused");
    let child = sandbox.agent(&["-T", "-a", path.to_str().unwrap()]).stdout(Stdio::piped()).spawn().unwrap();
    let first = child.id();
    let agent = Agent::new(&String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap());
    assert!(lists(&agent.socket) && !path.exists() && !sandbox.agent_directory().exists());
    let directory = agent.socket.parent().unwrap();
    assert_eq!(directory.parent().unwrap(), sandbox.path("tmp"));
    let name = directory.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("ssh-") && name.len() == 16, "{name}");
    assert_eq!(agent.socket.file_name().unwrap().to_str().unwrap(), format!("agent.{first}"));
    assert_eq!((mode(directory), mode(&agent.socket)), (0o700, 0o600));
    agent.signal(Signal::HUP);
    assert!(agent.ends() && !directory.exists());
}

#[test]
fn a_home_that_cannot_hold_a_socket_exits_255_with_a_remedy() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.path("home/.ssh"), "not a directory").unwrap();
    let (code, out, err) = sandbox.run(&[]);
    assert_eq!((code, out.as_str()), (255, ""));
    assert!(err.contains("-T or -a"), "{err}");
    let long = sandbox.path(&"x".repeat(120));
    assert_eq!(sandbox.run(&["-a", long.to_str().unwrap()]).0, 1);
    let output = sandbox.agent(&["-T"]).env("TMPDIR", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
}

/// Sockets of every kind that a sweep meets, and what keeps one of them alive.
fn litter(sandbox: &Sandbox, prefix: &str) -> UnixListener {
    let directory = sandbox.agent_directory();
    let hours_ago = |hours: u64| {
        let then = std::time::SystemTime::now() - Duration::from_secs(hours * 3600);
        let seconds = then.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let time = Timespec { tv_sec: seconds.try_into().unwrap(), tv_nsec: 0 };
        Timestamps { last_access: time, last_modification: time }
    };
    let (dead, young) = (format!("{prefix}agent.dead"), format!("{prefix}agent.young"));
    for name in [dead.as_str(), &young, "s.otherhost00.agent.dead", "unrelated"] {
        dead_socket(&directory.join(name));
    }
    let live = UnixListener::bind(directory.join(format!("{prefix}agent.live"))).unwrap();
    fs::write(directory.join(format!("{prefix}agent.file")), "").unwrap();
    symlink(young, directory.join(format!("{prefix}agent.link"))).unwrap();
    for name in sandbox.sockets().iter().filter(|n| !n.ends_with("young")) {
        utimensat(CWD, directory.join(name), &hours_ago(2), AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
    live
}

/// Runs an agent once, which tells how this host's sockets are named.
fn host_prefix(sandbox: &Sandbox) -> String {
    let agent = sandbox.start(&[]);
    let name = agent.socket.file_name().unwrap().to_str().unwrap()[..13].to_owned();
    agent.signal(Signal::TERM);
    assert!(agent.ends());
    name
}

#[test]
fn stale_sockets_are_swept() {
    let sandbox = Sandbox::new();
    let prefix = host_prefix(&sandbox);
    let _live = litter(&sandbox, &prefix);
    let all = sandbox.sockets();
    assert_eq!(all.len(), 7);
    let said = (0, "Deleted stale agent sockets in ~/.ssh/agent\n".to_owned(), String::new());
    let without = |names: &[&str]| all.iter().filter(|n| !names.contains(&n.as_str())).cloned().collect::<Vec<_>>();
    let ours = format!("{prefix}agent.dead");

    assert_eq!(sandbox.run(&["-u"]), said);
    assert_eq!(sandbox.sockets(), without(&[&ours]));
    assert_eq!(sandbox.run(&["-uu"]), said);
    assert_eq!(sandbox.sockets(), without(&[&ours, "s.otherhost00.agent.dead", "unrelated"]));
}

#[test]
fn an_agent_sweeps_when_it_starts_unless_told_otherwise() {
    let sandbox = Sandbox::new();
    let prefix = host_prefix(&sandbox);
    let _live = litter(&sandbox, &prefix);
    let before = sandbox.sockets().len();
    for (args, left) in [(&["-U"][..], before), (&["-T"], before), (&[], before - 1)] {
        let agent = sandbox.start(args);
        agent.signal(Signal::TERM);
        assert!(agent.ends());
        assert_eq!(sandbox.sockets().len(), left, "{args:?}");
    }
}

#[test]
fn sweeping_nothing_succeeds() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.run(&["-u"]).0, 0);
    assert!(!sandbox.path("home/.ssh").exists());
    // A directory that cannot be looked into is not called swept.
    fs::create_dir(sandbox.path("home/.ssh")).unwrap();
    fs::write(sandbox.agent_directory(), "").unwrap();
    let (code, out, err) = sandbox.run(&["-u"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("cannot look into"), "{err}");
}

#[test]
fn k_ends_the_agent_of_the_environment() {
    let sandbox = Sandbox::new();
    for (args, unset) in [(&["-k"][..], "unset"), (&["-ck"], "unsetenv")] {
        let agent = sandbox.start(&[]);
        let pid = agent.pid;
        let output = sandbox.agent(args).env("SSH_AGENT_PID", pid.to_string()).output().unwrap();
        let lines = format!("{unset} SSH_AUTH_SOCK;\n{unset} SSH_AGENT_PID;\necho Agent pid {pid} killed;\n");
        assert_eq!(code_and_text(&output), (0, lines, String::new()));
        assert!(agent.ends() && !agent.socket.exists());
    }
    assert_eq!(sandbox.run(&["-k"]).0, 1);
    for bad in ["1", "0", "-5", "", "x", "99999999999", "4194305"] {
        let (code, out, err) = code_and_text(&sandbox.agent(&["-k"]).env("SSH_AGENT_PID", bad).output().unwrap());
        assert_eq!((code, out.as_str()), (1, ""), "{bad}: {err}");
    }
}

#[test]
fn a_foreground_agent_prints_two_lines_and_ends_by_signal() {
    let sandbox = Sandbox::new();
    for (option, signal) in [("-D", Signal::TERM), ("-D", Signal::HUP), ("-d", Signal::INT)] {
        let (mut child, lines) = sandbox.foreground(&[option]);
        let path = lines[0].strip_prefix("SSH_AUTH_SOCK=").unwrap().strip_suffix("; export SSH_AUTH_SOCK;").unwrap();
        assert_eq!(lines[1], format!("echo Agent pid {};", child.id()));
        assert!(lists(Path::new(path)));
        assert_eq!(end_with(&mut child, signal), 2, "{signal:?}");
        assert!(!Path::new(path).exists());
    }
    let (mut child, lines) = sandbox.foreground(&["-cD", "-T"]);
    assert!(lines[0].starts_with("setenv SSH_AUTH_SOCK "));
    assert_eq!(end_with(&mut child, Signal::TERM), 2);
    assert_eq!(fs::read_dir(sandbox.path("tmp")).unwrap().count(), 0);
}

#[test]
fn a_term_right_after_the_lines_leaves_no_socket() {
    let sandbox = Sandbox::new();
    for _ in 0..10 {
        let output = sandbox.script(r#"eval "$("$A" -s)" >&2; kill "$SSH_AGENT_PID"; echo "$SSH_AGENT_PID""#);
        assert!(ends(pid(&String::from_utf8(output.stdout).unwrap())));
        assert!(sandbox.sockets().is_empty());
    }
}

#[test]
fn a_daemon_ignores_an_interrupt() {
    let sandbox = Sandbox::new();
    let agent = sandbox.start(&[]);
    agent.signal(Signal::INT);
    assert!(lists(&agent.socket));
    agent.signal(Signal::HUP);
    assert!(agent.ends() && !agent.socket.exists());
}

#[test]
fn a_daemon_stands_alone() {
    let sandbox = Sandbox::new();
    // The output ends only when nobody holds descriptor 9 any more.
    let output = sandbox.script(r#"exec 9>&1; exec "$A" -s"#);
    let agent = Agent::new(&String::from_utf8(output.stdout).unwrap());
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", agent.pid)).unwrap();
    let limits = read("limits");
    let core: Vec<_> = limits.lines().find(|l| l.starts_with("Max core")).unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
    let stat = read("stat");
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3).unwrap();
    assert_eq!(session, agent.pid.to_string());
    if geteuid().is_root() {
        assert_eq!(fs::read_link(format!("/proc/{}/cwd", agent.pid)).unwrap(), Path::new("/"));
        for fd in ["0", "1", "2"] {
            let target = fs::read_link(format!("/proc/{}/fd/{fd}", agent.pid)).unwrap();
            assert_eq!(target, Path::new("/dev/null"));
        }
    }
}

#[test]
fn a_foreground_agent_closes_what_it_inherited() {
    let sandbox = Sandbox::new();
    let mut child = sandbox
        .command("sh")
        .args(["-c", r#"exec 9>&2 2>/dev/null; exec "$A" -D"#])
        .env("A", &sandbox.program)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut rest = String::new();
    child.stderr.take().unwrap().read_to_string(&mut rest).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(end_with(&mut child, Signal::TERM), 2, "{rest}");
}

/// Files of a process in /proc belong to root as soon as it is not dumpable.
#[test]
fn an_agent_is_not_dumpable() {
    let sandbox = Sandbox::new();
    // Root's own processes show nothing, so that root's agent runs as somebody else, from a place that they may read.
    let somebody = if geteuid().is_root() { 65534 } else { geteuid().as_raw() };
    let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let program = dir.path().join("ssh-agent");
    // By another program: a descriptor of ours, open for writing, could reach another test's child and keep the file
    // from being run.
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_strongroom")).arg(&program).status().unwrap().success());
    let private = dir.path().join("private");
    fs::DirBuilder::new().mode(0o700).create(&private).unwrap();
    let mut command = sandbox.command(&program);
    command.arg("-T").env("TMPDIR", &private).current_dir("/");
    if geteuid().is_root() {
        std::os::unix::fs::chown(&private, Some(somebody), Some(somebody)).unwrap();
        command.uid(somebody).gid(somebody);
    }
    let agent = Agent::new(&code_and_text(&command.output().unwrap()).1);
    let owner = |file: &str| fs::metadata(format!("/proc/{}/{file}", agent.pid)).unwrap().uid();
    assert_eq!(fs::metadata(&agent.socket).unwrap().uid(), somebody);
    assert_eq!(owner("environ"), 0);
}

/// Starts `-D` as a systemd would, with `passed` as descriptor 3.
fn activate(sandbox: &Sandbox, passed: OwnedFd, variables: &str, args: &[&str]) -> Child {
    let script = format!(r#"exec 3<&0 </dev/null; {variables} exec "$A" "$@""#);
    sandbox
        .command("sh")
        .args([&["-c", &script, "sh"], args].concat())
        .env("A", &sandbox.program)
        .stdin(passed)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_passed_socket_is_served_and_left() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("passed");
    for (option, signal, code) in [("-D", Signal::TERM, 0), ("-d", Signal::TERM, 0), ("-D", Signal::HUP, 2)] {
        let listener = UnixListener::bind(&path).unwrap();
        let mut child = activate(&sandbox, listener.into(), "LISTEN_PID=$$ LISTEN_FDS=1", &[option]);
        assert!(lists(&path));
        assert_eq!(end_with(&mut child, signal), code);
        let mut out = String::new();
        child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        assert_eq!(out, "", "nobody reads the path from a socket unit");
        fs::remove_file(&path).expect("the socket is systemd's");
    }
    assert!(!sandbox.path("home/.ssh").exists());
}

#[test]
fn a_path_wins_over_a_passed_socket() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("own");
    let listener = UnixListener::bind(sandbox.path("passed")).unwrap();
    let args = ["-D", "-a", path.to_str().unwrap()];
    let mut child = activate(&sandbox, listener.into(), "LISTEN_PID=$$ LISTEN_FDS=1", &args);
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("/own;") && lists(&path), "{line}");
    assert_eq!(end_with(&mut child, Signal::TERM), 2);
}

#[test]
fn a_wrong_activation_exits_255() {
    let sandbox = Sandbox::new();
    let listener = || OwnedFd::from(UnixListener::bind(sandbox.path("tmp").join(rand_name())).unwrap());
    let bound_only = OwnedFd::from(UnixStream::pair().unwrap().0);
    let file = OwnedFd::from(File::open("/dev/null").unwrap());
    let right = "LISTEN_PID=$$ LISTEN_FDS=1";
    for (passed, variables) in [
        (listener(), "LISTEN_PID=$$ LISTEN_FDS=2"),
        (listener(), "LISTEN_PID=$$ LISTEN_FDS="),
        (listener(), "LISTEN_PID=1 LISTEN_FDS=1"),
        (bound_only, right),
        (file, right),
        (listener(), "exec 3<&-; LISTEN_PID=$$ LISTEN_FDS=1"),
    ] {
        let output = activate(&sandbox, passed, variables, &["-D"]).wait_with_output().unwrap();
        let (code, out, err) = code_and_text(&output);
        assert_eq!((code, out.as_str()), (255, ""), "{variables}");
        assert!(err.contains("no socket was passed"), "{err}");
    }
    // Not asked for: a daemon makes its own.
    let output = sandbox.agent(&[]).env("LISTEN_PID", "1").env("LISTEN_FDS", "1").output().unwrap();
    drop(Agent::new(&code_and_text(&output).1));
}

fn rand_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed).to_string()
}

#[test]
fn lines_that_cannot_be_printed_leave_no_agent() {
    let sandbox = Sandbox::new();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = sandbox.agent(&[]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(eventually(|| sandbox.sockets().is_empty()));
}

#[test]
fn the_inner_argument_is_not_for_people() {
    let sandbox = Sandbox::new();
    let (code, out, err) = sandbox.run(&["--serve-from-stdin", "0", "shared", "/tmp/x"]);
    assert_eq!((code, out.as_str()), (255, ""), "{err}");
}
