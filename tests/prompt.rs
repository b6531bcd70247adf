//! Prompts against askpass programs that are shell scripts: they allow, deny, hang, flood and look around.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::ExposeSecret;
use strongroom::prompt::{Environment, PromptError, Prompter, Settings, Unavailable};
use support::life::{Life, soon};
use tempfile::TempDir;

const UID: u32 = 1000;

/// A directory with one askpass in it and what that leaves there.
struct Desk(TempDir);

impl Desk {
    /// An askpass with this body; `$here` is the directory.
    fn with_askpass(body: &str) -> Self {
        let desk = Self(TempDir::new().unwrap());
        desk.script("askpass", body);
        desk
    }

    /// A program in the directory.
    fn script(&self, name: &str, body: &str) {
        support::script(&self.path(name), &format!("here={}\n{body}", self.0.path().display()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Settings in which this askpass is `$SSH_ASKPASS`, with these variables besides.
    fn settings(&self, variables: &[(&str, &str)]) -> Settings {
        let askpass = (OsString::from("SSH_ASKPASS"), self.path("askpass").into_os_string());
        let others = variables.iter().map(|&(name, value)| (name.into(), value.into()));
        let environment: BTreeMap<OsString, OsString> = others.chain([askpass]).collect();
        Settings {
            timeout: Duration::from_secs(20),
            environment: Environment::Only(environment),
            ..Settings::default()
        }
    }

    fn prompter(&self) -> Prompter {
        Prompter::new(self.settings(&[("DISPLAY", ":0")]))
    }

    /// A FIFO that scripts hold open.
    fn life(&self) -> Life {
        Life::of(&self.path("life"))
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }
}

/// The start of a script whose life the test watches.
const LIVE: &str = "exec 3>\"$here/life\"; echo up >&3\n";

#[tokio::test]
async fn nothing_or_yes_with_exit_0_allows_and_all_else_denies() {
    for (body, expected) in [
        ("exit 0", Ok(())),
        ("echo", Ok(())),
        ("echo yes", Ok(())),
        ("printf YeS", Ok(())),
        ("printf 'yes\\r\\nand more'", Ok(())),
        ("printf '\\nno'", Ok(())),
        ("echo no", Err(PromptError::Denied)),
        ("echo yes please", Err(PromptError::Denied)),
        ("echo ' yes'", Err(PromptError::Denied)),
        ("exit 1", Err(PromptError::Denied)),
        ("echo yes; exit 1", Err(PromptError::Denied)),
        ("kill -9 $$", Err(PromptError::Denied)),
    ] {
        let desk = Desk::with_askpass(body);
        assert_eq!(desk.prompter().confirm(UID, "Allow?").await, expected, "{body}");
    }
}

#[tokio::test]
async fn the_text_is_the_only_argument_and_the_kind_is_in_the_environment() {
    let desk = Desk::with_askpass(
        r#"printf '%s|%s' "$#" "$1" >"$here/text"; echo "${SSH_ASKPASS_PROMPT-unset} $DISPLAY" >"$here/kind"; echo yes"#,
    );
    let prompter = Prompter::new(desk.settings(&[("DISPLAY", ":7"), ("SSH_ASKPASS_PROMPT", "stale")]));
    prompter.confirm(UID, "Allow \"it\"?\n$(reboot) \u{1b}[2J\0").await.unwrap();
    assert_eq!(desk.read("text"), "1|Allow \"it\"?\n$(reboot) \u{fffd}[2J\u{fffd}");
    assert_eq!(desk.read("kind"), "confirm :7\n");
    prompter.pin(UID, "Enter PIN: ").await.unwrap();
    assert_eq!(desk.read("text"), "1|Enter PIN: ");
    assert_eq!(desk.read("kind"), "unset :7\n");
}

#[tokio::test]
async fn a_pin_is_the_first_line() {
    for (body, expected) in [
        ("printf '12 34\\n'", Some("12 34".to_owned())),
        ("printf '1234'", Some("1234".to_owned())),
        ("printf '1234\\r\\n5678\\n'", Some("1234".to_owned())),
        ("printf '%01024d' 1", Some(format!("{:01024}", 1))),
        ("printf '%01025d' 1", None),
        ("printf '\\n1234\\n'", None),
        ("printf '\\377\\376\\n'", None),
        ("echo 1234; exit 1", None),
        ("exit 0", None),
    ] {
        let desk = Desk::with_askpass(body);
        let pin = desk.prompter().pin(UID, "Enter PIN: ").await;
        let pin = pin.map(|pin| pin.expose_secret().to_owned());
        assert_eq!(pin, expected.ok_or(PromptError::Denied), "{body}");
    }
}

#[tokio::test]
async fn a_flood_is_a_denial_and_ends_the_askpass() {
    let desk = Desk::with_askpass(&format!("{LIVE} cat /dev/zero"));
    let mut life = desk.life();
    assert_eq!(soon(desk.prompter().pin(UID, "Enter PIN: ")).await.map(drop), Err(PromptError::Denied));
    life.started().await;
    life.gone().await;
}

#[tokio::test]
async fn without_a_display_nobody_is_asked_unless_forced() {
    let no_display = || Err(PromptError::Unavailable(Unavailable::NoDisplay));
    for (variables, expected) in [
        (&[][..], no_display()),
        (&[("DISPLAY", ""), ("WAYLAND_DISPLAY", "")], no_display()),
        (&[("SSH_ASKPASS_REQUIRE", "prefer")], no_display()),
        (&[("SSH_ASKPASS_REQUIRE", "force")], Ok(())),
        (&[("SSH_ASKPASS_REQUIRE", "FORCE")], Ok(())),
        (&[("DISPLAY", ":0")], Ok(())),
        (&[("WAYLAND_DISPLAY", "wayland-0")], Ok(())),
        (&[("DISPLAY", ":0"), ("SSH_ASKPASS_REQUIRE", "never")], Err(PromptError::Unavailable(Unavailable::Forbidden))),
    ] {
        let desk = Desk::with_askpass("echo >\"$here/asked\"");
        let prompter = Prompter::new(desk.settings(variables));
        assert_eq!(prompter.confirm(UID, "Allow?").await, expected, "{variables:?}");
        assert_eq!(desk.path("asked").exists(), expected.is_ok(), "{variables:?}");
    }
    let desk = Desk::with_askpass("echo >\"$here/asked\"");
    assert!(Prompter::new(desk.settings(&[])).notice(UID, "Touch").is_none());
    let words = PromptError::Unavailable(Unavailable::NoDisplay).to_string();
    assert!(words.contains("SSH_ASKPASS_REQUIRE=force"), "{words}");
}

#[tokio::test]
async fn the_settings_name_an_askpass_before_the_environment_does() {
    let desk = Desk::with_askpass("exit 0");
    let deny = Desk::with_askpass("exit 1");
    let mut settings = desk.settings(&[("DISPLAY", ":0")]);
    settings.askpass = Some(deny.path("askpass").into());
    assert_eq!(Prompter::new(settings).confirm(UID, "Allow?").await, Err(PromptError::Denied));
}

#[tokio::test]
async fn an_askpass_that_does_not_start_is_named_with_the_remedy() {
    let desk = Desk::with_askpass("exit 0");
    let mut settings = desk.settings(&[("DISPLAY", ":0")]);
    settings.askpass = Some(desk.path("nothing here").into());
    let prompter = Prompter::new(settings);
    let error = prompter.confirm(UID, "Allow?").await.unwrap_err();
    assert!(matches!(error, PromptError::Unavailable(Unavailable::CannotStart { .. })), "{error}");
    assert!(error.to_string().contains("nothing here") && error.to_string().contains("SSH_ASKPASS"), "{error}");
}

#[tokio::test]
async fn the_systems_programs_ask_only_where_they_are() {
    let environment = Environment::Only([("DISPLAY".into(), ":0".into())].into());
    let prompter = Prompter::new(Settings { environment, timeout: Duration::from_millis(1), ..Settings::default() });
    let error = prompter.confirm(UID, "Allow?").await.unwrap_err();
    match ["/usr/bin/ssh-askpass", "/usr/bin/pinentry"].into_iter().find(|program| Path::new(program).exists()) {
        None => assert_eq!(error, PromptError::Unavailable(Unavailable::NoProgram)),
        // Which of the two it is, is the time's to say: a pinentry without a terminal gives up at once.
        Some(program) => match &error {
            PromptError::TimedOut => {}
            PromptError::Unavailable(Unavailable::CannotStart { .. }) => {
                assert!(error.to_string().contains(program), "{error}");
            }
            _ => panic!("{error}"),
        },
    }
}

#[tokio::test]
async fn who_stops_waiting_ends_the_askpass_and_its_children() {
    let desk = Desk::with_askpass(&format!("{LIVE} sleep 1000"));
    let mut life = desk.life();
    let prompter = desk.prompter();
    let question = tokio::spawn(async move { prompter.confirm(UID, "Allow?").await });
    life.started().await;
    question.abort();
    life.gone().await;
}

#[tokio::test]
async fn an_askpass_that_ignores_the_signal_is_killed() {
    let desk = Desk::with_askpass(&format!("trap '' TERM; {LIVE} while :; do sleep 1000; done"));
    let mut life = desk.life();
    let prompter = desk.prompter();
    let question = tokio::spawn(async move { prompter.confirm(UID, "Allow?").await });
    life.started().await;
    question.abort();
    life.gone().await;
}

#[tokio::test]
async fn a_question_closes_at_its_deadline() {
    for body in ["sleep 1000", "echo yes; exec >/dev/null; sleep 1000"] {
        let desk = Desk::with_askpass(&format!("{LIVE} {body}"));
        let life = desk.life();
        let settings = Settings { timeout: Duration::from_millis(300), ..desk.settings(&[("DISPLAY", ":0")]) };
        let answer = soon(Prompter::new(settings).confirm(UID, "Allow?")).await;
        assert_eq!(answer, Err(PromptError::TimedOut), "{body}");
        life.gone().await;
    }
}

#[tokio::test]
async fn a_notice_stays_until_it_is_dropped() {
    let desk = Desk::with_askpass(&format!(
        "trap 'echo done >\"$here/signal\"; exit' TERM; echo \"$SSH_ASKPASS_PROMPT $1\" >\"$here/notice\"\n{LIVE} sleep 1000 & wait"
    ));
    let mut life = desk.life();
    let notice = desk.prompter().notice(UID, "Touch the key").unwrap();
    life.started().await;
    assert_eq!(desk.read("notice"), "none Touch the key\n");
    drop(notice);
    life.gone().await;
    assert_eq!(desk.read("signal"), "done\n");
}

#[tokio::test]
async fn a_notice_goes_to_the_desktop_and_where_that_fails_to_askpass() {
    for (code, expected) in [(0, "desktop Touch &lt;it&gt;\n"), (1, "askpass Touch <it>\n")] {
        let desk = Desk::with_askpass(&format!("echo \"askpass $1\" >\"$here/shown\"\n{LIVE}"));
        desk.script(
            "notify-send",
            &format!("[ {code} = 0 ] || exit 1; for last; do :; done; echo \"desktop $last\" >\"$here/shown\"\n{LIVE}"),
        );
        let mut life = desk.life();
        let path = desk.0.path().display().to_string();
        let variables = [("DISPLAY", ":0"), ("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere"), ("PATH", &*path)];
        let prompter = Prompter::new(Settings { notifications: true, ..desk.settings(&variables) });
        let notice = prompter.notice(UID, "Touch <it>").unwrap();
        life.started().await;
        assert_eq!(desk.read("shown"), expected);
        drop(notice);
    }
}

#[tokio::test]
async fn a_notice_on_the_desktop_is_withdrawn_when_it_is_dropped() {
    let desk = Desk::with_askpass("exit 1");
    let mut calls = Life::of(&desk.path("calls"));
    desk.script("dbus-send", "echo \"$*\" >\"$here/calls\"");
    // An old one, which tells no number.
    let refuses = "for word; do [ \"$word\" != --print-id ] || exit 1; done";
    for (refuses, number) in [(refuses, ""), ("", "7")] {
        desk.script("notify-send", &format!("{refuses}\necho {number}\n{LIVE}"));
        let mut life = desk.life();
        let path = desk.0.path().display().to_string();
        let variables = [("DISPLAY", ":0"), ("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere"), ("PATH", &*path)];
        let prompter = Prompter::new(Settings { notifications: true, ..desk.settings(&variables) });
        let notice = prompter.notice(UID, "Touch it").unwrap();
        life.started().await;
        drop(notice);
    }
    let call = calls.line().await;
    assert!(call.ends_with("Notifications.CloseNotification uint32:7\n"), "{call}");
}

#[tokio::test]
async fn notices_are_bounded_apart_from_questions() {
    let desk = Desk::with_askpass(&format!("[ \"$1\" = now ] && exit 0; {LIVE} sleep 1000"));
    let mut life = desk.life();
    let prompter = desk.prompter();
    let notices: Vec<_> = (0..16).map(|_| prompter.notice(UID, "Touch").unwrap()).collect();
    assert!(prompter.notice(UID, "Touch").is_none());
    let other = prompter.notice(UID + 1, "Touch").unwrap();
    assert_eq!(soon(prompter.confirm(UID, "now")).await, Ok(()));
    for _ in 0..17 {
        life.started().await;
    }
    drop((notices, other));
    life.gone().await;
}

#[tokio::test]
async fn open_questions_are_bounded_for_each_uid_and_wait_for_nobody() {
    let desk = Desk::with_askpass(&format!("[ \"$1\" = now ] && exit 0\n{LIVE} sleep 1000"));
    let mut life = desk.life();
    let prompter = desk.prompter();
    let mut open = Vec::new();
    for n in 0..16 {
        assert_eq!(soon(prompter.confirm(UID, "now")).await, Ok(()), "while {n} others are open");
        let prompter = prompter.clone();
        open.push(tokio::spawn(async move { prompter.confirm(UID, "later").await }));
        life.started().await;
    }
    assert_eq!(prompter.confirm(UID, "now").await, Err(PromptError::TooMany));
    assert_eq!(prompter.pin(UID, "now").await.map(drop), Err(PromptError::TooMany));
    assert_eq!(soon(prompter.confirm(UID + 1, "now")).await, Ok(()));
    open.iter().for_each(tokio::task::JoinHandle::abort);
    life.gone().await;
    // A place is free again once its askpass has been reaped, which follows its end.
    soon(async {
        while prompter.confirm(UID, "now").await == Err(PromptError::TooMany) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(prompter.confirm(UID, "now").await, Ok(()));
}
