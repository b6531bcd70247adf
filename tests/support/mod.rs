//! What the integration tests share: an agent under test, OpenSSH's programs pointed at it, a client that speaks the
//! protocol byte by byte, an askpass that the test answers, sshd on loopback, and soft keys without an agent.
//!
//! `STRONGROOM_TEST_AGENT=/usr/bin/ssh-agent` runs the same tests against another agent.
#![allow(dead_code, unreachable_pub, clippy::print_stderr, reason = "each test program uses its own part of this")]

pub mod agent;
pub mod askpass;
pub mod bad_module;
pub mod c;
pub mod cli;
pub mod client;
pub mod daemon;
pub mod faults;
pub mod gpg;
pub mod life;
pub mod pcsc;
pub mod reactor;
pub mod service;
pub mod soft;
pub mod softhsm;
pub mod sshd;
pub mod terminal;
pub mod tpm;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Longer than anything here takes on a loaded machine; what is later than this hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where OpenSSH's programs are.
pub const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The standard output of a program that succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// Checks that the program ended with `code`.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }
}

/// A program with nothing of the caller's environment in it, ended when it takes longer than [`PATIENCE`].
pub fn command(program: &str, dir: &Path) -> Command {
    let mut command = Command::new("/usr/bin/timeout");
    command
        .arg(PATIENCE.as_secs().to_string())
        .arg(program)
        .current_dir(dir)
        .env_clear()
        .envs([("PATH", PATH), ("LC_ALL", "C")])
        .env("HOME", dir)
        .stdin(Stdio::null());
    command
}

/// Runs `command` to its end.
pub fn run(command: &mut Command) -> Outcome {
    let output = command.output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Makes a key pair `dir/name` without passphrase; `options` are ssh-keygen's, among them `-t TYPE`.
pub fn keygen(dir: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = dir.join(name);
    run(command("ssh-keygen", dir)
        .env("SSH_SK_PROVIDER", SK_DUMMY)
        .args(["-q", "-N", "", "-C", name, "-f"])
        .arg(&path)
        .args(options))
    .ok();
    path
}

/// The authenticator in software that comes with OpenSSH's regression tests.
pub const SK_DUMMY: &str = "/usr/lib/openssh/regress/misc/sk-dummy/sk-dummy.so";

/// The second word of a public key file: the key itself.
pub fn public_key(private: &Path) -> String {
    let line = fs::read_to_string(with_suffix(private, ".pub")).expect("a public key file");
    line.split(' ').nth(1).expect("a key in base64").to_owned()
}

/// `path` with `suffix` behind its name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Writes an executable shell script.
pub fn script(path: &Path, body: &str) {
    // A shell writes the file: were it open for writing here, a child that another test starts at this moment would
    // inherit it, and running it would fail with ETXTBSY.
    let mut shell = Command::new("/bin/sh")
        .args(["-c", "cat >\"$0\" && chmod 700 \"$0\""])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .expect("a shell");
    let mut input = shell.stdin.take().expect("its input");
    write!(input, "#!/bin/sh\n{body}\n").expect("a script");
    drop(input);
    assert!(shell.wait().expect("the shell's end").success(), "{} is not written", path.display());
}

/// A library of the system's, wherever this machine's architecture has it.
pub fn library(name: &str) -> PathBuf {
    let mut places = fs::read_dir("/usr/lib").expect("libraries").flatten().map(|entry| entry.path());
    places.find_map(|dir| Some(dir.join(name)).filter(|file| file.exists())).unwrap_or_else(|| panic!("no {name}"))
}

/// Asks `condition` again and again until it holds: for what nobody announces.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
