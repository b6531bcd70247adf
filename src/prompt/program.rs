//! The process of a program that asks: how it is started, and seen off when nobody waits for its answer. Knows nothing of
//! what it says.

use std::{ffi::OsString, process::Stdio, sync::Arc, time::Duration};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio::{
    process::{Child, ChildStdin, ChildStdout, Command},
    runtime::Handle,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{Environment, Kind, Settings, Slot, Tool, Unavailable};

/// How long a dismissed program may take to restore its terminal or window before it is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How much longer than the program itself what it started may take.
const SETTLE: Duration = Duration::from_millis(100);

/// A running askpass or pinentry.
pub(super) struct Program {
    tool: Tool,
    /// The variables that it has.
    environment: Environment,
    /// None only while it is being dropped.
    running: Option<(Child, Slot)>,
}

impl Program {
    /// Starts it on a thread that may block: the program can lie on a slow disk or a dead network.
    pub(super) async fn start(
        settings: Arc<Settings>,
        text: String,
        kind: Kind,
        slot: Slot,
    ) -> Result<Self, Unavailable> {
        let started = spawn_blocking(move || {
            let tool = settings.tool()?;
            let mut command = Command::new(tool.name());
            let environment = settings.environment.clone();
            if let Environment::Only(variables) = &environment {
                command.env_clear().envs(variables);
            }
            match tool {
                Tool::Askpass(_) => as_askpass(&mut command, text, kind),
                Tool::Pinentry(_) => _ = command.stdin(Stdio::piped()).stdout(Stdio::piped()),
            }
            command.process_group(0).kill_on_drop(true);
            match command.spawn() {
                Ok(child) => Ok(Self { tool, environment, running: Some((child, slot)) }),
                Err(error) => Err(cannot_start(&tool, error.to_string())),
            }
        });
        started.await.unwrap_or(Err(Unavailable::NoProgram))
    }

    /// What it is.
    pub(super) fn tool(&self) -> &Tool {
        &self.tool
    }

    /// Why it is of no use.
    pub(super) fn unusable(&self, reason: &str) -> Unavailable {
        cannot_start(&self.tool, reason.to_owned())
    }

    /// A variable that it has.
    pub(super) fn variable(&self, name: &str) -> Option<OsString> {
        self.environment.get(name)
    }

    /// What it reads, once.
    pub(super) fn stdin(&mut self) -> Option<ChildStdin> {
        self.running.as_mut()?.0.stdin.take()
    }

    /// What it writes, once.
    pub(super) fn stdout(&mut self) -> Option<ChildStdout> {
        self.running.as_mut()?.0.stdout.take()
    }

    /// Waits until it ends by itself, and tells whether it ends with 0.
    pub(super) async fn succeeds(&mut self) -> bool {
        match &mut self.running {
            Some((child, _)) => child.wait().await.is_ok_and(|status| status.success()),
            None => false,
        }
    }
}

fn cannot_start(tool: &Tool, reason: String) -> Unavailable {
    Unavailable::CannotStart { program: tool.name().to_string_lossy().into_owned(), reason }
}

/// The question as the argument, and what kind it is of in the environment (ssh-agent.c and readpass.c of OpenSSH).
fn as_askpass(command: &mut Command, text: String, kind: Kind) {
    match kind {
        Kind::Confirm => command.env("SSH_ASKPASS_PROMPT", "confirm"),
        Kind::Notice => command.env("SSH_ASKPASS_PROMPT", "none"),
        Kind::Secret(_) => command.env_remove("SSH_ASKPASS_PROMPT"),
    };
    let stdout = if kind == Kind::Notice { Stdio::null() } else { Stdio::piped() };
    command.arg(text).stdin(Stdio::null()).stdout(stdout);
}

impl Drop for Program {
    /// Ends it with all that it started: a script's own children share its group.
    fn drop(&mut self) {
        let Some((mut child, slot)) = self.running.take() else { return };
        // None once it was waited for; until then the number cannot belong to another group.
        let Some(group) = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) else { return };
        let _ = kill_process_group(group, Signal::TERM);
        // Without a runtime there is no time to be patient: kill_on_drop does the rest.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            if timeout(GRACE, exited(group)).await.is_ok() {
                sleep(SETTLE).await;
            }
            // Not yet reaped, so the number is still this group's: a signal can be lost between fork and exec.
            let _ = kill_process_group(group, Signal::KILL);
            let _ = child.wait().await;
            drop(slot);
        });
    }
}

/// Waits until a child has ended, without reaping it: Tokio's own wait would free its number.
async fn exited(child: Pid) {
    const TICK: Duration = Duration::from_millis(10);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while let Ok(None) = waitid(WaitId::Pid(child), options) {
        sleep(TICK).await;
    }
}
