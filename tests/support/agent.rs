//! An agent under test, and what the system says of its process.

use std::{
    env,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
};

use tempfile::TempDir;

use super::{Outcome, PATH, client::Client, command, run};

/// An agent that lives as long as this value.
pub struct Agent {
    child: Child,
    socket: PathBuf,
    dir: TempDir,
    _stdout: BufReader<ChildStdout>,
}

impl Agent {
    /// Starts an agent without options.
    pub fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// Starts an agent after `configure` has given it options or an environment. Returns when it listens.
    pub fn start_with(configure: impl FnOnce(&mut Command)) -> Self {
        let dir = TempDir::with_prefix("strongroom-test-").expect("a directory");
        let socket = dir.path().join("agent.sock");
        let log = File::create(dir.path().join("agent.log")).expect("a log");
        let mut command = program();
        command
            .args(["-D", "-a"])
            .arg(&socket)
            .current_dir(dir.path())
            .env_clear()
            .env("PATH", PATH)
            .envs([("HOME", dir.path()), ("TMPDIR", dir.path())])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        configure(&mut command);
        let mut child = command.spawn().expect("the agent starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("its output"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line from the agent");
        let agent = Self { child, socket, dir, _stdout: stdout };
        assert!(line.starts_with("SSH_AUTH_SOCK="), "the agent says {line:?}");
        agent
    }

    /// The path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A directory for the test's files; HOME of the agent and of the programs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("the agent's state").is_none()
    }

    /// A new connection.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// A program that finds this agent.
    pub fn command(&self, program: &str) -> Command {
        let mut command = command(program, self.dir());
        command.env("SSH_AUTH_SOCK", &self.socket);
        command
    }

    /// Runs ssh-add to its end.
    pub fn ssh_add(&self, args: &[&str]) -> Outcome {
        run(self.command("ssh-add").args(args))
    }

    /// Adds a key file.
    #[track_caller]
    pub fn add(&self, key: &Path, options: &[&str]) {
        run(self.command("ssh-add").env("SSH_SK_PROVIDER", super::SK_DUMMY).arg("-q").args(options).arg(key)).ok();
    }

    /// Bytes of memory that the process has resident.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("the agent's status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        let kib: u64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
        kib * 1024
    }

    /// Whether `secret` stands anywhere in the process's memory. Only root may look.
    pub fn memory_contains(&self, secret: &[u8]) -> bool {
        memory_contains(self.pid(), secret)
    }
}

/// Whether `secret` stands anywhere in a process's memory. Only root may look.
pub fn memory_contains(pid: u32, secret: &[u8]) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the agent's maps");
    let mut memory = File::open(format!("/proc/{pid}/mem")).expect("reading memory takes root");
    let mut bytes = Vec::new();
    let mut readable = 0;
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, mode) = (fields.next().expect("a range"), fields.next().expect("a mode"));
        let (from, to) = range.split_once('-').expect("a range");
        let [from, to] = [from, to].map(|n| u64::from_str_radix(n, 16).expect("an address"));
        if !mode.starts_with('r') || memory.seek(SeekFrom::Start(from)).is_err() {
            continue;
        }
        bytes.resize(usize::try_from(to - from).expect("a size"), 0);
        if memory.read_exact(&mut bytes).is_ok() {
            readable += 1;
            if contains(&bytes, secret) {
                return true;
            }
        }
    }
    assert!(readable > 10, "only {readable} regions could be read");
    false
}

/// Whether `needle` stands in `haystack`: compared only where the first byte fits, since tests run unoptimised.
fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|b| *b == needle[0]) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

impl Drop for Agent {
    fn drop(&mut self) {
        // A signal that lets it clean up; SIGKILL would leave its helpers behind.
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed())
            && self.is_alive()
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while self.is_alive() && std::time::Instant::now() < deadline {
                thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            let tail: String = tail.iter().rev().map(|line| format!("  {line}\n")).collect();
            eprintln!("the agent's log ends with:\n{tail}");
        }
    }
}

/// The agent under test.
fn program() -> Command {
    if let Some(path) = env::var_os("STRONGROOM_TEST_AGENT") {
        return Command::new(path);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_strongroom"));
    command.arg("ssh-agent");
    command
}
