//! The agents that are measured, each a process of its own with keys in it: ours, with all that a user has on, the floor,
//! and the peers that are installed. Knows how each is started; nothing of loads.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64ct::{Base64, Encoding};
use tempfile::TempDir;

use crate::support::{PATIENCE, client::Client, command, keygen, public_key, run, script};

/// The key files that agents are given, and a state directory with an encrypted store, made once.
pub struct Keys {
    dir: TempDir,
}

/// Keys in the store.
const STORED: usize = 100;
const PASSPHRASE: &str = "correct horse battery staple";

/// ssh-keygen's options for each key, by the name that it has here.
const KEYS: [(&str, &[&str]); 5] = [
    ("ed25519", &["-t", "ed25519"]),
    ("p256", &["-t", "ecdsa", "-b", "256"]),
    ("rsa2048", &["-t", "rsa", "-b", "2048"]),
    ("rsa3072", &["-t", "rsa", "-b", "3072"]),
    ("rsa4096", &["-t", "rsa", "-b", "4096"]),
];

impl Keys {
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-bench-").expect("a directory");
        for (name, options) in KEYS {
            keygen(dir.path(), name, options);
        }
        let keys = Self { dir };
        keys.make_store();
        keys
    }

    fn make_store(&self) {
        let mut subject = Subject::strongroom_without_store("");
        subject.cli(&["init", "--stdin"], PASSPHRASE);
        for n in 0..STORED {
            subject.cli(&["key", "generate", "store", "ed25519", "--label", &format!("stored {n}")], "");
        }
        // The state file is whole when the daemon has ended.
        subject.end();
        run(command("cp", self.dir.path()).arg("-a").arg(subject.dir.path().join("state")).arg(self.state())).ok();
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The blob of a key.
    pub fn blob(&self, name: &str) -> Vec<u8> {
        Base64::decode_vec(&public_key(&self.dir.path().join(name))).expect("base64")
    }
}

/// An agent at work. It ends with this value.
pub struct Subject {
    pub socket: PathBuf,
    pid: u32,
    child: Child,
    dir: TempDir,
}

impl Subject {
    /// `strongroom agent` as a user has it: with its two doors, its audit log, an open store with a hundred keys, and
    /// `settings` in its configuration.
    pub fn strongroom(keys: &Keys, settings: &str) -> Self {
        let subject = Self::start("strongroom", strongroom(Some(keys), settings));
        subject.cli(&["unlock", "store", "--stdin"], PASSPHRASE);
        subject
    }

    /// The same without the store.
    pub fn strongroom_without_store(settings: &str) -> Self {
        Self::start("strongroom", strongroom(None, settings))
    }

    /// Runs `strongroom` on its service door.
    fn cli(&self, words: &[&str], input: &str) {
        let stdin = self.dir.path().join("stdin");
        fs::write(&stdin, input).expect("a file");
        let mut command = command(program().to_str().expect("a path of text"), self.dir.path());
        command.env("STRONGROOM_SOCKET", self.dir.path().join("service.sock")).args(words);
        run(command.stdin(fs::File::open(stdin).expect("the file"))).ok();
    }

    fn end(&mut self) {
        let lives = self.child.try_wait().is_ok_and(|status| status.is_none());
        if lives && let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }

    /// The minimal agent of this program.
    pub fn floor() -> Self {
        Self::start("floor", |_, socket| {
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            command.arg("floor").arg(socket);
            command
        })
    }

    /// OpenSSH's.
    pub fn ssh_agent() -> Self {
        Self::start("ssh-agent", ssh_agent)
    }

    /// GnuPG's, if it is installed.
    pub fn gpg_agent() -> Option<Self> {
        Path::new("/usr/bin/gpg-agent").exists().then(|| {
            Self::start("gpg-agent", |dir, socket| {
                // Keys come without a passphrase, and it would ask for one to keep them under.
                let pinentry = dir.join("pinentry");
                script(
                    &pinentry,
                    "echo OK\nwhile read -r word rest; do\n\
                     case $word in BYE) echo OK; exit;; GETPIN) echo 'D '; echo OK;; *) echo OK;; esac\ndone",
                );
                // As it comes, it runs out of secure memory at a few dozen signatures at once.
                let settings = "auto-expand-secmem 0x4000000\ndisable-scdaemon\n";
                let settings = format!("pinentry-program {}\n{settings}", pinentry.display());
                fs::write(dir.join("gpg-agent.conf"), settings).expect("a file");
                // Its socket has a name of its own.
                std::os::unix::fs::symlink(dir.join("S.gpg-agent.ssh"), socket).expect("a link");
                let mut command = Command::new("gpg-agent");
                command.arg("--homedir").arg(dir).args(["--daemon", "--enable-ssh-support"]);
                command.args(["--no-detach"]);
                command
            })
        })
    }

    fn start(name: &'static str, make: impl FnOnce(&Path, &Path) -> Command) -> Self {
        let dir = TempDir::with_prefix("strongroom-bench-").expect("a directory");
        let socket = dir.path().join("agent.sock");
        let mut command = make(dir.path(), &socket);
        let mut child = prepared(&mut command, dir.path()).stdin(Stdio::piped()).spawn().expect("the agent starts");
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(child.try_wait().expect("its state").is_none(), "{name} has ended");
            assert!(Instant::now() < deadline, "{name} does not listen");
            thread::sleep(Duration::from_millis(5));
        }
        Self { socket, pid: child.id(), child, dir }
    }

    /// Gives it a key by ssh-add.
    pub fn add(&self, keys: &Keys, name: &str) -> &Self {
        let mut add = command("ssh-add", self.dir.path());
        run(add.env("SSH_AUTH_SOCK", &self.socket).arg("-q").arg(keys.dir.path().join(name))).ok();
        self
    }

    /// The blob of its first key.
    pub fn first_key(&self) -> Vec<u8> {
        Client::connect(&self.socket).list().swap_remove(0).0
    }

    /// What it has used of the processors so far.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).expect("the agent lives");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
        // User and system time, in ticks of the kernel's clock.
        Duration::from_micros((ticks(11) + ticks(12)) * 1_000_000 / rustix::param::clock_ticks_per_second())
    }

    /// Its memory in KiB: all of it, and what of it is not from a file.
    pub fn memory(&self) -> (f64, f64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("the agent lives");
        let of = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("the field");
            line.split_whitespace().nth(1).expect("a number").parse::<f64>().expect("a number")
        };
        (of("VmRSS:"), of("RssAnon:"))
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.end();
    }
}

/// From the start of a program to the first list of keys that it answers.
pub fn start_up(make: impl FnOnce(&Path, &Path) -> Command) -> Duration {
    let dir = TempDir::with_prefix("strongroom-bench-").expect("a directory");
    let socket = dir.path().join("agent.sock");
    let mut command = make(dir.path(), &socket);
    let begun = Instant::now();
    let child = prepared(&mut command, dir.path()).spawn().expect("the agent starts");
    let stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_micros(50)),
        }
        assert!(begun.elapsed() < PATIENCE, "the agent does not listen");
    };
    Client { stream }.list();
    let took = begun.elapsed();
    drop(Subject { socket, pid: child.id(), child, dir });
    took
}

/// The program that is measured: a release, which cargo does not build for benches that share their helpers with tests.
pub fn program() -> PathBuf {
    std::env::var_os("STRONGROOM_RELEASE").expect("STRONGROOM_RELEASE names the release; `make bench` sets it").into()
}

/// How `strongroom agent` is started, with a copy of the store of `keys` if there are any.
pub fn strongroom(keys: Option<&Keys>, settings: &str) -> impl FnOnce(&Path, &Path) -> Command {
    let settings = settings.to_owned();
    move |dir, socket| {
        if let Some(keys) = keys {
            run(command("cp", dir).arg("-a").arg(keys.state()).arg(dir)).ok();
        }
        let config = dir.join("config.toml");
        let (state, service) = (dir.join("state"), dir.join("service.sock"));
        let doors = format!(
            "state = {state:?}\n[openpgp]\nfind = false\n{settings}\n\
             [[listen]]\ndoor = \"ssh\"\npath = {socket:?}\n[[listen]]\ndoor = \"service\"\npath = {service:?}\n"
        );
        fs::write(&config, doors).expect("a configuration");
        let mut command = Command::new(program());
        command.args(["agent", "--config"]).arg(config);
        command
    }
}

/// How OpenSSH's agent is started.
pub fn ssh_agent(_: &Path, socket: &Path) -> Command {
    let mut command = Command::new("ssh-agent");
    command.args(["-D", "-a"]).arg(socket);
    command
}

fn prepared<'a>(command: &'a mut Command, dir: &Path) -> &'a mut Command {
    let log = fs::File::create(dir.join("log")).expect("a log");
    command
        .env_clear()
        .envs([("PATH", crate::support::PATH), ("LC_ALL", "C")])
        .envs([("HOME", dir), ("XDG_RUNTIME_DIR", dir)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
}
