//! A message on the desktop, through `notify-send` and the session's D-Bus, and its end. Knows no askpass.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{io::AsyncReadExt, process::Command, time::timeout};

use super::Environment;

/// The program that shows messages.
const PROGRAM: &str = "notify-send";
/// The program that takes them away again.
const CLOSER: &str = "dbus-send";
/// How long the message may take to be handed over, or to be taken away.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the desktop shows the message, in milliseconds, where it lets itself be told: as long as cards wait for a touch.
const SHOWN_MS: u32 = 15_000;
/// More than the message's number and the end of its line take.
const MAX_PRINTED: u64 = 16;

/// The program that shows messages; `None` where it is not installed, or there is no session to show them in.
pub(super) fn program(environment: &Environment) -> Option<PathBuf> {
    let has_bus = environment.get("DBUS_SESSION_BUS_ADDRESS").is_some()
        || environment.get("XDG_RUNTIME_DIR").is_some_and(|dir| Path::new(&dir).join("bus").exists());
    if has_bus { find(environment, PROGRAM) } else { None }
}

fn find(environment: &Environment, name: &str) -> Option<PathBuf> {
    std::env::split_paths(&environment.get("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A message on the desktop.
pub(super) struct Shown {
    /// The desktop's number of it, where that is known.
    id: Option<u32>,
}

/// Shows a message. `None` when the desktop did not take it.
pub(super) async fn show(environment: &Environment, program: &Path, text: &str) -> Option<Shown> {
    let text = escaped(text);
    let expire = format!("--expire-time={SHOWN_MS}");
    let common = ["--app-name=Strongroom", "--icon=dialog-password", "--hint=int:transient:1", &expire];
    let message = ["--", "Strongroom", &text];
    let shown = async {
        let printed = run(environment, program, &[&common[..], &["--print-id"], &message].concat()).await;
        match printed {
            Some(printed) => Some(Shown { id: printed.trim().parse().ok() }),
            // Before 0.8 it tells no number: the message goes when its time is over.
            None => run(environment, program, &[&common[..], &message].concat()).await.map(|_| Shown { id: None }),
        }
    };
    timeout(PATIENCE, shown).await.ok().flatten()
}

impl Shown {
    /// Takes the message away, where that can be done: what it asks for is done or not wanted any more.
    pub(super) async fn withdraw(self, environment: &Environment) {
        let (Some(id), Some(program)) = (self.id, find(environment, CLOSER)) else { return };
        let call = [
            "--session",
            "--type=method_call",
            "--dest=org.freedesktop.Notifications",
            "/org/freedesktop/Notifications",
            "org.freedesktop.Notifications.CloseNotification",
            &format!("uint32:{id}"),
        ];
        let _ = timeout(PATIENCE, run(environment, &program, &call)).await;
    }
}

/// Runs a program to its end; gives the beginning of what it printed, if it says that it succeeded.
async fn run(environment: &Environment, program: &Path, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    if let Environment::Only(variables) = environment {
        command.env_clear().envs(variables);
    }
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().ok()?;
    let mut printed = String::new();
    let _ = child.stdout.take()?.take(MAX_PRINTED).read_to_string(&mut printed).await;
    child.wait().await.ok()?.success().then_some(printed)
}

/// Desktops take the text for markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
