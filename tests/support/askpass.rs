//! An askpass program whose answers come from the test, when the test wants.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, Mode, OFlags, mkfifoat},
    process::{Pid, PidfdFlags, pidfd_open},
};
use tempfile::TempDir;

use super::{PATIENCE, script};

/// The program and its two pipes: one tells the test what is asked, one carries the answers.
pub struct Askpass {
    program: PathBuf,
    asked: File,
    answer: File,
    _dir: TempDir,
}

/// One question on the screen.
#[derive(Debug)]
pub struct Prompt {
    /// The askpass process.
    pub pid: i32,
    /// What `SSH_ASKPASS_PROMPT` says: `confirm`, `none`, or nothing for a secret.
    pub kind: String,
    /// The text.
    pub text: String,
}

impl Askpass {
    /// Makes the program; nothing runs yet.
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-askpass-").unwrap();
        let [asked, answer] = ["asked", "answer"].map(|name| {
            let path = dir.path().join(name);
            mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
            // Open at both ends, so that neither side waits for the other to open.
            let nonblock = OFlags::NONBLOCK.bits().cast_signed();
            OpenOptions::new().read(true).write(true).custom_flags(nonblock).open(path).unwrap()
        });
        let program = dir.path().join("askpass");
        script(
            &program,
            r#"
            cd "${0%/*}" || exit 1
            printf '%s\0' $$ "$SSH_ASKPASS_PROMPT" "$1" >asked
            # A shell reads byte by byte: one at a time, or two would share an answer.
            exec 9<"$0" && flock 9 || exit 1
            read -r code text <answer || exit 1
            exec 9<&-
            [ -z "$text" ] || echo "$text"
            exit "$code""#,
        );
        Self { program, asked, answer, _dir: dir }
    }

    /// Its path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Makes `agent` use this program, on a display that does not exist.
    pub fn serve(&self, agent: &mut Command) {
        agent.env("SSH_ASKPASS", &self.program).env("DISPLAY", ":none");
    }

    /// Waits for the next question.
    #[track_caller]
    pub fn next(&mut self) -> Prompt {
        let mut fields = Vec::new();
        while fields.iter().filter(|b| **b == 0).count() < 3 {
            assert!(is_ready(&self.asked, PATIENCE), "nobody asks");
            let mut byte = [0];
            self.asked.read_exact(&mut byte).unwrap();
            fields.push(byte[0]);
        }
        let text = String::from_utf8(fields).expect("a prompt in UTF-8");
        let mut fields = text.split('\0');
        let mut field = || fields.next().unwrap().to_owned();
        Prompt { pid: field().parse().unwrap(), kind: field(), text: field() }
    }

    /// Whether a question has been asked that [`Askpass::next`] did not yet return.
    pub fn has_asked(&self) -> bool {
        is_ready(&self.asked, Duration::ZERO)
    }

    /// Answers the open question: the exit code, and what it prints.
    pub fn answer(&mut self, code: u8, text: &str) {
        writeln!(self.answer, "{code} {text}").unwrap();
    }
}

impl Prompt {
    /// Waits until the question is gone from the screen.
    #[track_caller]
    pub fn wait_gone(&self) {
        let Ok(process) = pidfd_open(Pid::from_raw(self.pid).unwrap(), PidfdFlags::empty()) else { return };
        assert!(is_ready(&File::from(process), PATIENCE), "the prompt stays open");
    }
}

/// Whether `file` can be read within `patience`.
fn is_ready(file: &File, patience: Duration) -> bool {
    let timeout = Timespec::try_from(patience).unwrap();
    poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// Makes `command`, one of OpenSSH's programs, read every secret it wants from `answer`.
pub fn answering(command: &mut Command, dir: &Path, answer: &str) {
    let program = dir.join("answering-askpass");
    script(&program, &format!("echo '{answer}'"));
    command.envs([("SSH_ASKPASS_REQUIRE", "force"), ("DISPLAY", ":none")]).env("SSH_ASKPASS", program);
}
