//! Real sshd on loopback: hosts with names, keys and ports of their own, and the client configuration that knows them.

use std::{
    fs::{self, DirBuilder},
    io::{BufRead, BufReader},
    net::TcpListener,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use tempfile::TempDir;

use super::{Outcome, agent::Agent, client::Client, command, keygen, public_key, run, with_suffix};

/// A set of hosts that share their `authorized_keys`.
pub struct Hosts {
    dir: TempDir,
    config: String,
    hosts: Vec<Sshd>,
}

/// One host.
struct Sshd {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Hosts {
    /// No host yet.
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-hosts-").unwrap();
        for file in ["authorized_keys", "known_hosts"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let config = format!(
            "BatchMode yes\nIdentitiesOnly yes\nControlPath none\nConnectTimeout 30\nLogLevel ERROR\n\
             StrictHostKeyChecking yes\nUpdateHostKeys no\nGlobalKnownHostsFile /dev/null\n\
             UserKnownHostsFile {dir}/known_hosts\nHostKeyAlgorithms ssh-ed25519\n\
             SecurityKeyProvider {}\nPubkeyAcceptedAlgorithms +ssh-rsa\n",
            super::SK_DUMMY,
            dir = dir.path().display(),
        );
        fs::write(dir.path().join("ssh_config"), &config).unwrap();
        Self { dir, config, hosts: Vec::new() }
    }

    /// One host called `name`.
    pub fn one(name: &str) -> Self {
        let mut hosts = Self::new();
        hosts.start(name, "");
        hosts
    }

    /// Where the hosts' files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts a host; `options` are lines for its sshd_config.
    pub fn start(&mut self, name: &str, options: &str) {
        let key = keygen(self.dir(), &format!("host_{name}"), &["-t", "ed25519"]);
        let dir = self.dir.path().display();
        let config = format!(
            "HostKey {}\nAuthorizedKeysFile {dir}/authorized_keys\nPidFile none\nStrictModes no\nUsePAM no\n\
             PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             ExposeAuthInfo yes\nPubkeyAcceptedAlgorithms +ssh-rsa\nMaxAuthTries 100\nMaxStartups 1000\n\
             LogLevel VERBOSE\n{options}\n",
            key.display(),
        );
        let config_file = self.dir().join(format!("sshd_{name}"));
        fs::write(&config_file, config).unwrap();
        let (sshd, port) = Sshd::start(&config_file);
        self.hosts.push(sshd);

        let known = format!("{name} ssh-ed25519 {}\n", public_key(&key));
        append(&self.dir().join("known_hosts"), &known);
        self.config.push_str(&format!("Host {name}\nHostname 127.0.0.1\nPort {port}\nHostKeyAlias {name}\n"));
        fs::write(self.dir().join("ssh_config"), &self.config).unwrap();
    }

    /// Lets a key in, under `options` as `authorized_keys` has them.
    pub fn authorize(&self, key: &Path, options: &str) {
        let line = fs::read_to_string(with_suffix(key, ".pub")).unwrap();
        append(&self.dir().join("authorized_keys"), format!("{options} {}\n", line.trim()).trim_start());
    }

    /// ssh with the configuration that knows these hosts, using `agent`.
    pub fn ssh(&self, agent: &Agent) -> Command {
        let mut command = agent.command("ssh");
        command.arg("-F").arg(self.ssh_config());
        command
    }

    /// The client's configuration.
    pub fn ssh_config(&self) -> PathBuf {
        self.dir().join("ssh_config")
    }

    /// Logs in with one key of the agent, whose public half `key` names, and returns what the host says of it.
    pub fn login(&self, agent: &Agent, host: &str, key: &Path, options: &[&str]) -> Outcome {
        let mut ssh = self.ssh(agent);
        ssh.arg("-i").arg(with_suffix(key, ".pub")).args(options);
        run(ssh.args([host, "cat $SSH_USER_AUTH"]))
    }

    /// Forwards the agent to `host` and keeps the session open.
    pub fn forward(&self, agent: &Agent, host: &str, key: &Path) -> Forwarded {
        self.forward_socket(agent.socket(), host, key)
    }

    /// Forwards the agent that listens at `socket`.
    pub fn forward_socket(&self, socket: &Path, host: &str, key: &Path) -> Forwarded {
        let mut ssh = command("ssh", self.dir());
        ssh.env("SSH_AUTH_SOCK", socket).arg("-F").arg(self.ssh_config()).arg("-A").arg("-i").arg(key);
        Forwarded::start(ssh.args([host, "echo $SSH_AUTH_SOCK; exec cat"]), self.dir())
    }

    /// Makes a socket of this machine one of `host`, as `ssh -R` does for whatever socket it is given.
    pub fn forward_remotely(&self, socket: &Path, host: &str, key: &Path) -> Forwarded {
        let there = self.dir().join("forwarded");
        let mut ssh = command("ssh", self.dir());
        ssh.arg("-F").arg(self.ssh_config()).args(["-o", "ExitOnForwardFailure=yes", "-i"]).arg(key);
        ssh.arg("-R").arg(format!("{}:{}", there.display(), socket.display()));
        Forwarded::start(ssh.args([host, &format!("echo {}; exec cat", there.display())]), self.dir())
    }

    /// Forwards the agent that listens at `socket` as paramiko does, which binds no session.
    pub fn forward_by_paramiko(&self, socket: &Path, host: &str, key: &Path) -> Forwarded {
        const PROGRAM: &str = r#"
import getpass, sys, paramiko
_, config, host, key = sys.argv
found = paramiko.SSHConfig.from_path(config).lookup(host)
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(found["hostname"], int(found["port"]), getpass.getuser(), key_filename=key,
               allow_agent=False, look_for_keys=False)
session = client.get_transport().open_session()
paramiko.agent.AgentRequestHandler(session)
session.exec_command("echo $SSH_AUTH_SOCK; exec cat")
print(session.makefile().readline(), end="", flush=True)
sys.stdin.read()
client.close()
"#;
        // Debian's, whose modules are Debian's packages.
        let mut python = command("/usr/bin/python3", self.dir());
        python.env("SSH_AUTH_SOCK", socket).args(["-c", PROGRAM]).arg(self.ssh_config()).arg(host).arg(key);
        Forwarded::start(&mut python, self.dir())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &mut self.hosts {
            let _ = host.child.kill();
            let _ = host.child.wait();
            if thread::panicking() {
                let log = host.log.lock().unwrap();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("a host's log ends with:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
            }
        }
    }
}

impl Sshd {
    /// Starts sshd on a port that was free a moment ago; on another when somebody was faster.
    fn start(config: &Path) -> (Self, u16) {
        if rustix::process::geteuid().is_root() {
            // Where sshd locks its unprivileged half in; a distribution makes it only when the service starts.
            DirBuilder::new().recursive(true).mode(0o755).create("/run/sshd").unwrap();
        }
        for _ in 0..20 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut child = Command::new("/usr/sbin/sshd")
                .args(["-D", "-e", "-o", &format!("ListenAddress=127.0.0.1:{port}"), "-f"])
                .arg(config)
                .env("SSH_SK_PROVIDER", super::SK_DUMMY)
                .stdin(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .expect("sshd starts: apt-get install openssh-server");
            let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
            let log = Arc::new(Mutex::new(String::new()));
            let note = |log: &Mutex<String>, line: &str| {
                let mut log = log.lock().unwrap();
                log.push_str(line);
                log.push('\n');
            };
            let listening = lines.by_ref().inspect(|line| note(&log, line)).any(|line| line.contains("listening on"));
            if listening {
                let to = Arc::clone(&log);
                thread::spawn(move || lines.for_each(|line| note(&to, &line)));
                return (Self { child, log }, port);
            }
            let _ = child.wait();
            let log = log.lock().unwrap();
            assert!(log.contains("Address already in use"), "sshd does not start: {log}");
        }
        panic!("no free port in twenty attempts");
    }
}

/// An agent as the far side of a session sees it.
pub struct Forwarded {
    session: Child,
    stdin: Option<ChildStdin>,
    home: PathBuf,
    socket: PathBuf,
}

impl Forwarded {
    /// Starts what forwards, prints the far side's socket and ends with its input.
    fn start(forwarding: &mut Command, home: &Path) -> Self {
        let mut session = forwarding.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(session.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let socket = PathBuf::from(line.trim());
        let stdin = session.stdin.take();
        assert!(socket.is_absolute(), "no forwarded agent: {line:?} (is python3-paramiko installed?)");
        Self { session, stdin, socket, home: home.to_owned() }
    }

    /// A connection from the far side.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// A program on the far side.
    pub fn command(&self, program: &str) -> Command {
        let mut command = command(program, &self.home);
        command.env("SSH_AUTH_SOCK", &self.socket);
        command
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        // The far side's cat ends with its input, and the session with it.
        drop(self.stdin.take());
        let _ = self.session.wait();
    }
}

/// Appends to a file.
fn append(path: &Path, text: &str) {
    let before = fs::read_to_string(path).unwrap_or_default();
    fs::write(path, before + text).unwrap();
}
