//! A room for smart cards: pcscd with two readers, and virtual cards to put into them, in namespaces of their own.
//!
//! Rooms know nothing of each other or of a pcscd on the machine. Whatever was started in one ends with the thread that
//! made it, however that ends.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Instant,
};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use super::{Outcome, PATH, PATIENCE, eventually, run};

/// Namespaces, and pcscd in them.
pub struct Room {
    dir: TempDir,
    /// It does nothing, and ends with its standard input.
    owner: Child,
    pcscd: Mutex<Option<Child>>,
}

/// A reader. Each has a driver of its own, so that a card that hangs in one does not delay the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    A,
    B,
}

impl Reader {
    /// Its name in PC/SC.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "Reader A 00 00",
            Self::B => "Reader B 00 00",
        }
    }

    /// Where vpcd waits for the card, and at the next port for another: below the ports that the kernel gives away.
    fn port(self) -> u16 {
        match self {
            Self::A => 20000,
            Self::B => 20002,
        }
    }
}

/// A card in somebody's pocket: what it remembers, and its number.
#[derive(Debug, Clone)]
pub struct Plastic {
    /// The directory of its memory.
    state: PathBuf,
    /// As it is printed on the card: eight digits.
    pub serial: String,
}

/// A card in a reader, until this value is dropped.
pub struct Card<'a> {
    room: &'a Room,
    reader: Reader,
    child: Child,
    control: ChildStdin,
    events: Events,
}

/// What a card has said, and a place up to which the test has heard it.
#[derive(Clone, Default)]
struct Events(Arc<(Mutex<Heard>, Condvar)>);

#[derive(Default)]
struct Heard {
    lines: Vec<String>,
    up_to: usize,
}

impl Room {
    /// A room with empty readers.
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-room-").expect("a directory");
        write_readers(dir.path());
        let mut unshare = Command::new("/usr/bin/unshare");
        if !geteuid().is_root() {
            unshare.arg("--map-root-user");
        }
        let mut owner = unshare
            .args(["--net", "--mount", "sh", "-ec"])
            .arg("mount -t tmpfs tmpfs /run; mkdir /run/pcscd; ip link set lo up; echo done; exec cat >/dev/null")
            .env("PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut line = String::new();
        BufReader::new(owner.stdout.as_mut().expect("its output")).read_line(&mut line).expect("a line");
        assert_eq!(line, "done\n", "there are no namespaces here");
        let room = Self { dir, owner, pcscd: Mutex::new(None) };
        room.start_pcscd();
        room
    }

    /// A file in the room's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The words before a program that have it run in this room, in the directory `dir`, and end with the thread that
    /// starts it.
    pub fn door(&self, dir: &Path) -> Vec<String> {
        let owner = self.owner.id().to_string();
        // The working directory would become the root.
        let dir = format!("--wdns={}", dir.display());
        let mut words = vec!["/usr/bin/nsenter", "--target", &owner, "--net", "--mount"];
        if !geteuid().is_root() {
            words.extend(["--user", "--preserve-credentials"]);
        }
        words.extend([&dir, "/usr/bin/setpriv", "--pdeathsig", "KILL"]);
        words.into_iter().map(str::to_owned).collect()
    }

    /// A program in this room, in its directory, with nothing of the caller's environment.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let door = self.door(self.dir.path());
        let mut command = Command::new(&door[0]);
        command.args(&door[1..]).arg(program.as_ref()).env_clear();
        command.envs([("PATH", PATH), ("LC_ALL", "C.UTF-8")]).env("HOME", self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs a program in this room, for at most [`PATIENCE`].
    pub fn run(&self, program: &str, args: &[&str]) -> Outcome {
        run(self.command("/usr/bin/timeout").arg(PATIENCE.as_secs().to_string()).arg(program).args(args))
    }

    /// Starts pcscd, and waits until it listens.
    pub fn start_pcscd(&self) {
        let run = PathBuf::from(format!("/proc/{}/root/run/pcscd", self.owner.id()));
        for left in ["pcscd.comm", "pcscd.pid"] {
            let _ = fs::remove_file(run.join(left));
        }
        let log = || File::options().create(true).append(true).open(self.path("pcscd.log")).expect("a log");
        let mut command = self.command("/usr/sbin/pcscd");
        command.args(["--foreground", "--config"]).arg(self.path("readers")).stdout(log()).stderr(log());
        *self.pcscd() = Some(command.spawn().expect("pcscd starts"));
        eventually("pcscd listens", || run.join("pcscd.comm").exists());
    }

    /// Ends pcscd without a warning. The cards stay in their readers.
    pub fn kill_pcscd(&self) {
        let mut pcscd = self.pcscd().take().expect("pcscd runs");
        pcscd.kill().expect("pcscd ends");
        pcscd.wait().expect("its end");
    }

    fn pcscd(&self) -> MutexGuard<'_, Option<Child>> {
        self.pcscd.lock().expect("no panic")
    }

    /// A new card without keys, with the PINs 123456 and 12345678.
    pub fn blank(&self, serial: &str) -> Plastic {
        let state = self.path(&format!("card-{serial}"));
        fs::create_dir(&state).expect("a directory");
        Plastic { state, serial: serial.to_owned() }
    }

    /// A card with keys in its three slots and the PINs of new ones: a copy of tests/fixtures/cards/`keys`.
    pub fn card(&self, serial: &str, keys: &str) -> Plastic {
        let card = self.blank(serial);
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cards").join(keys);
        for file in fs::read_dir(&fixture).unwrap_or_else(|error| panic!("{fixture:?}: {error}")).flatten() {
            fs::copy(file.path(), card.state.join(file.file_name())).expect("a copy");
        }
        card
    }

    /// Puts a card into a reader and waits until pcscd sees it.
    pub fn insert(&self, reader: Reader, card: &Plastic) -> Card<'_> {
        self.insert_with(reader, card, &[])
    }

    /// The same, for a card with faults from the beginning: `&["--hang-on", "88"]`.
    pub fn insert_with(&self, reader: Reader, card: &Plastic, options: &[&str]) -> Card<'_> {
        let mut command = self.command(program("virtual-card"));
        command.args(["--port", &reader.port().to_string(), "--serial", &card.serial, "--state"]);
        command.arg(&card.state).args(options).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the card starts");
        let (control, output) = (child.stdin.take().expect("its input"), child.stdout.take().expect("its output"));
        let events = Events::default();
        let listener = events.clone();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                listener.push(line);
            }
        });
        let card = Card { room: self, reader, child, control, events };
        card.wait_for("ready");
        self.wait_for(reader, true);
        card
    }

    /// Waits until pcscd has a card in this reader, or has none.
    pub fn wait_for(&self, reader: Reader, present: bool) {
        let state = if present { "present" } else { "empty" };
        self.probe(&["wait", reader.name(), state]);
    }

    /// What `gpg --card-status --with-colons` says of the card in this reader. GnuPG's daemons have the card only while
    /// this runs.
    pub fn gpg_card_status(&self, reader: Reader) -> String {
        let home = TempDir::with_prefix_in("gnupg-", self.dir.path()).expect("a directory");
        let config = format!("disable-ccid\npcsc-shared\nreader-port {}\n", reader.name());
        fs::write(home.path().join("scdaemon.conf"), config).expect("a configuration");
        let home = home.path().display().to_string();
        let status = self.run("gpg", &["--homedir", &home, "--card-status", "--with-colons"]);
        self.run("gpgconf", &["--homedir", &home, "--kill", "all"]).ok();
        status.ok()
    }

    /// Runs tests/virtual-card's card-probe and returns what it says.
    pub fn probe(&self, args: &[&str]) -> String {
        self.run(&program("card-probe").display().to_string(), args).ok()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let pcscd = self.pcscd.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        for child in pcscd.iter_mut().chain([&mut self.owner]) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if thread::panicking() {
            eprintln!("pcscd's log:\n{}", fs::read_to_string(self.path("pcscd.log")).unwrap_or_default());
        }
    }
}

impl Card<'_> {
    /// Takes the card out of its reader, whatever it is doing, and waits until pcscd has seen it.
    pub fn pull(mut self) {
        self.end();
        self.room.wait_for(self.reader, false);
    }

    /// Has the card do as `Control::obey` in tests/virtual-card says: `touch never`, `hang-on 88`, `delay 2a:500`.
    pub fn obey(&mut self, command: &str) {
        writeln!(self.control, "{command}").expect("the card listens");
        self.wait_for(&format!("obeyed {command}"));
    }

    /// Waits until the card has said a line that begins so, which counts from the last that was waited for.
    #[track_caller]
    pub fn wait_for(&self, event: &str) {
        assert!(self.events.wait_for(event), "the card does not say {event:?}, but {:#?}", self.events.all());
    }

    /// How many lines so far begin so: `apdu 20` for each VERIFY.
    pub fn count(&self, event: &str) -> usize {
        self.events.all().iter().filter(|line| line.starts_with(event)).count()
    }

    /// The same, of all that it has been sent until now: it says what came before the answer in its own time.
    pub fn count_all(&self, event: &str) -> usize {
        self.said_all();
        self.count(event)
    }

    fn said_all(&self) {
        let before = self.count("apdu ca 9000 [00, ca, 00, c4]");
        self.tries();
        eventually("it has said all", || self.count("apdu ca 9000 [00, ca, 00, c4]") > before);
    }

    /// The same, of the PINs that were sent by a VERIFY whose line begins so. One of four bytes has none in it: it asks, or
    /// has the card forget.
    pub fn count_pins(&self, event: &str) -> usize {
        self.said_all();
        self.events.all().iter().filter(|line| line.starts_with(event) && !line.ends_with("] 4")).count()
    }

    /// Stops the card in whatever it does: nobody gets an answer until [`Card::resume`].
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Has a frozen card go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("the card lives");
    }

    /// The tries that are left for the user's PIN, the resetting code and the admin's PIN, read from the card itself.
    pub fn tries(&self) -> [u8; 3] {
        let answer = self.room.probe(&["send", self.reader.name(), "00CA00C400"]);
        let answer = answer.trim_end().strip_suffix("9000").expect("the PIN status bytes");
        [8, 10, 12].map(|at| u8::from_str_radix(&answer[at..at + 2], 16).expect("a counter"))
    }

    /// Makes a key on the card, which has the PINs of a new one; returns its OpenPGP fingerprint in hexadecimal.
    /// The slots and algorithms are card-probe's.
    pub fn generate(&self, slot: &str, algorithm: &str) -> String {
        self.room.probe(&["generate", self.reader.name(), slot, algorithm]).trim_end().to_owned()
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Card<'_> {
    fn drop(&mut self) {
        self.end();
        if thread::panicking() {
            let events = self.events.all();
            eprintln!(
                "the card in {} said last: {:#?}",
                self.reader.name(),
                &events[events.len().saturating_sub(40)..]
            );
        }
    }
}

impl Events {
    fn push(&self, line: String) {
        self.0.0.lock().expect("no panic").lines.push(line);
        self.0.1.notify_all();
    }

    fn all(&self) -> Vec<String> {
        self.0.0.lock().expect("no panic").lines.clone()
    }

    fn wait_for(&self, event: &str) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.0.0.lock().expect("no panic");
        loop {
            let Heard { lines, up_to } = &mut *state;
            while let Some(line) = lines.get(*up_to) {
                *up_to += 1;
                if line.starts_with(event) {
                    return true;
                }
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            state = self.0.1.wait_timeout(state, left).expect("no panic").0;
        }
    }
}

/// A program of tests/virtual-card.
fn program(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_BIN_EXE_strongroom")).ancestors().nth(2).expect("the target directory");
    let path = target.join("virtual-card/debug").join(name);
    assert!(path.exists(), "{} is not there: make virtual-card", path.display());
    path
}

/// pcscd's configuration. vpcd keeps its slots in globals, and pcscd lets one call at a time into a driver: each reader has
/// a copy of its own.
fn write_readers(dir: &Path) {
    let readers = dir.join("readers");
    fs::create_dir(&readers).expect("a directory");
    for (reader, name) in [(Reader::A, "Reader A"), (Reader::B, "Reader B")] {
        let library = dir.join(format!("{name}.so").replace(' ', "-"));
        fs::copy("/usr/lib/pcsc/drivers/serial/libifdvpcd.so", &library).expect("vpcd's driver");
        let port = reader.port();
        let entry = format!(
            "FRIENDLYNAME \"{name}\"\nDEVICENAME /dev/null:{port:#X}\nLIBPATH {}\nCHANNELID {port:#X}\n",
            library.display()
        );
        fs::write(readers.join(name.replace(' ', "-")), entry).expect("a configuration");
    }
}
