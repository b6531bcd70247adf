//! Questions through a pinentry: GnuPG's own on a terminal, and one that answers whatever a test wants to hear.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use secrecy::ExposeSecret;
use strongroom::prompt::{Environment, PromptError, Prompter, Settings, Unavailable};
use support::life::Life;
use tempfile::TempDir;

const UID: u32 = 1000;

/// Settings with this pinentry and these variables.
fn settings(pinentry: &Path, variables: &[(&str, &str)]) -> Settings {
    let variables = [&[("PATH", support::PATH)], variables].concat();
    let environment = variables.iter().map(|&(name, value)| (name.into(), value.into())).collect();
    Settings {
        pinentry: Some(pinentry.into()),
        environment: Environment::Only(environment),
        timeout: Duration::from_secs(30),
        ..Settings::default()
    }
}

/// A pinentry that greets, writes down what it is told, and answers GETPIN, CONFIRM and MESSAGE as `answer` says.
struct Played(TempDir);

impl Played {
    fn answering(answer: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let body = format!(
            r#"
            cd "${{0%/*}}" || exit 1
            echo 'OK Pleased to meet you'
            while read -r command rest; do
                printf '%s %s\n' "$command" "$rest" >>heard
                case $command in
                    GETPIN|CONFIRM|MESSAGE) {answer} ;;
                    OPTION) echo 'ERR 83886254 Unknown option <Pinentry>' ;;
                    *) echo OK ;;
                esac
            done
            "#
        );
        support::script(&dir.path().join("pinentry"), &body);
        Self(dir)
    }

    fn prompter(&self) -> Prompter {
        Prompter::new(settings(&self.path(), &[("DISPLAY", ":0"), ("GPG_TTY", "/dev/tty7")]))
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("pinentry")
    }

    fn heard(&self) -> String {
        fs::read_to_string(self.0.path().join("heard")).unwrap()
    }
}

#[tokio::test]
async fn a_pin_comes_as_it_was_typed() {
    let played = Played::answering(r"printf '# a comment\nS PIN_CACHE\nD 12%%25 %%0A\nD ü\nOK\n'");
    let pin = played.prompter().pin(UID, "PIN of the token\n100 % \u{1b}[2J").await.unwrap();
    assert_eq!(pin.expose_secret(), "12% \nü");
    let heard = played.heard();
    assert!(heard.contains("OPTION ttyname=/dev/tty7\n"), "{heard}");
    assert!(heard.contains("SETDESC PIN of the token%0A100 %25 \u{fffd}[2J\n"), "{heard}");
}

#[tokio::test]
async fn what_a_person_decided_is_told_from_what_went_wrong() {
    for (answer, expected) in [
        ("echo 'ERR 83886179 Operation cancelled <Pinentry>'", Some(PromptError::Denied)),
        ("echo 'ERR 83886194 Not confirmed <Pinentry>'", Some(PromptError::Denied)),
        ("echo 'ERR 83886142 Timeout <Pinentry>'", Some(PromptError::TimedOut)),
        ("printf 'D %%4\\nOK\\n'", Some(PromptError::Denied)),
        ("head -c 5000 /dev/zero | tr '\\0' x; echo; echo OK", None),
        ("echo 'ERR 83918950 Inappropriate ioctl for device <Pinentry>'", None),
        ("exit 0", None),
    ] {
        let error = Played::answering(answer).prompter().pin(UID, "PIN").await.unwrap_err();
        match expected {
            Some(expected) => assert_eq!(error, expected, "{answer}"),
            None => {
                let Unavailable::CannotStart { reason, .. } = (match error {
                    PromptError::Unavailable(reason) => reason,
                    other => panic!("{answer}: {other}"),
                }) else {
                    panic!("{answer}")
                };
                assert!(reason.contains("ioctl") || reason.contains("ended"), "{answer}: {reason}");
            }
        }
    }
    assert_eq!(Played::answering("echo OK").prompter().confirm(UID, "Allow?").await, Ok(()));
    // Nothing was typed.
    assert_eq!(Played::answering("echo OK").prompter().pin(UID, "PIN").await.map(drop), Err(PromptError::Denied));
}

#[tokio::test]
async fn a_program_that_does_not_greet_is_no_pinentry() {
    let dir = TempDir::new().unwrap();
    let program = dir.path().join("pinentry");
    support::script(&program, "echo 'Usage: something else'");
    let error = Prompter::new(settings(&program, &[("DISPLAY", ":0")])).confirm(UID, "Allow?").await.unwrap_err();
    assert!(error.to_string().contains("it is no pinentry"), "{error}");
}

#[tokio::test]
async fn who_stops_waiting_closes_the_question() {
    let dir = TempDir::new().unwrap();
    let (program, fifo) = (dir.path().join("pinentry"), dir.path().join("life"));
    let mut life = Life::of(&fifo);
    support::script(&program, &format!("exec 3>{}; echo up >&3; echo OK; exec cat >/dev/null", fifo.display()));
    let prompter = Prompter::new(settings(&program, &[("DISPLAY", ":0")]));
    let question = tokio::spawn(async move { prompter.confirm(UID, "Allow?").await });
    life.started().await;
    question.abort();
    life.gone().await;
}

#[tokio::test]
async fn a_terminal_is_enough_for_a_pinentry_and_none_for_an_askpass() {
    let played = Played::answering("echo OK");
    let on = |variables: &[(&str, &str)]| settings(&played.path(), variables);
    assert_eq!(Prompter::new(on(&[("GPG_TTY", "/dev/pts/0")])).confirm(UID, "Allow?").await, Ok(()));
    let no_display = Err(PromptError::Unavailable(Unavailable::NoDisplay));
    assert_eq!(Prompter::new(on(&[])).confirm(UID, "Allow?").await, no_display);
    let mut askpass = on(&[("GPG_TTY", "/dev/pts/0")]);
    askpass.askpass = askpass.pinentry.take();
    assert_eq!(Prompter::new(askpass).confirm(UID, "Allow?").await, no_display);
}

/// A terminal whose keys the test presses and whose screen it reads.
struct Terminal {
    process: Child,
    keys: ChildStdin,
    screen: ChildStdout,
    dir: TempDir,
}

impl Terminal {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let link = format!("PTY,link={},wait-slave,rawer", dir.path().join("tty").display());
        let mut process = Command::new("socat")
            .args(["-d", "-d", &link, "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It says so when the terminal is there.
        let mut log = process.stderr.take().unwrap();
        let (mut said, mut byte) = (Vec::new(), [0]);
        while !String::from_utf8_lossy(&said).contains("PTY is ") {
            log.read_exact(&mut byte).expect("socat makes a terminal");
            said.push(byte[0]);
        }
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let (keys, screen) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, keys, screen, dir }
    }

    fn prompter(&self) -> Prompter {
        let tty = self.dir.path().join("tty");
        let variables = [("GPG_TTY", tty.to_str().unwrap()), ("TERM", "xterm"), ("LC_CTYPE", "C.UTF-8")];
        Prompter::new(settings(Path::new("/usr/bin/pinentry-curses"), &variables))
    }

    /// Reads the screen until it shows `text`, then presses `keys`.
    fn answer(&mut self, text: &str, keys: &str) {
        let mut shown = Vec::new();
        let mut chunk = [0; 4096];
        while !String::from_utf8_lossy(&shown).contains(text) {
            let n = self.screen.read(&mut chunk).unwrap();
            assert!(n > 0, "{}", String::from_utf8_lossy(&shown));
            shown.extend_from_slice(&chunk[..n]);
        }
        self.keys.write_all(keys.as_bytes()).unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Asks on a terminal, where somebody waits for `text` and presses `keys`.
async fn on_a_terminal<T>(text: &'static str, keys: &'static str, ask: impl AsyncFnOnce(Prompter) -> T) -> T {
    let mut terminal = Terminal::new();
    let prompter = terminal.prompter();
    let person = tokio::task::spawn_blocking(move || {
        terminal.answer(text, keys);
        terminal
    });
    let answer = ask(prompter).await;
    person.await.unwrap();
    answer
}

#[tokio::test]
async fn gnupgs_pinentry_asks_on_a_terminal() {
    let pin = on_a_terminal("token-7", "12%34\r", async |prompter| prompter.pin(UID, "PIN of token-7").await).await;
    assert_eq!(pin.unwrap().expose_secret(), "12%34");
    // The other button is no.
    let allowed = on_a_terminal("key-8", "\t\r", async |prompter| prompter.confirm(UID, "Allow key-8?").await).await;
    assert_eq!(allowed, Err(PromptError::Denied));
    let allowed = on_a_terminal("key-9", "\r", async |prompter| prompter.confirm(UID, "Allow key-9?").await).await;
    assert_eq!(allowed, Ok(()));
}
