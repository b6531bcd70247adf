//! Starts processes from one thread that lives as long as this process, and leaves no zombie of them.
//!
//! The thread matters: a process that asks for the signal of its parent's death gets it when the *thread* that started
//! it ends, and a runtime's threads come and go.

use std::io;
use std::process::{self, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use tokio::sync::{mpsc, oneshot, watch};

/// Processes that wait to be started; who comes later waits to be let in.
const MAX_WAITING: usize = 64;

/// Starts `command` in a process group of its own. Waits for the start, never for the process.
///
/// Dropping the future ends a process that was started meanwhile.
pub async fn spawn(command: Command) -> io::Result<Child> {
    let gone = || io::Error::other("the thread that starts processes is gone");
    let (reply, started) = oneshot::channel();
    starter()?.send(Order { command, reply }).await.map_err(|_| gone())?;
    started.await.map_err(|_| gone())?
}

/// A process with its group. Dropping it kills both; that it is reaped needs nobody's care.
#[derive(Debug)]
pub struct Child {
    running: Arc<Running>,
    exit: watch::Receiver<Option<ExitStatus>>,
    /// What the process writes to standard error, if the command has a pipe there.
    pub stderr: Option<process::ChildStderr>,
}

impl Child {
    /// Its number. It may be another process's once this one has ended.
    pub fn id(&self) -> u32 {
        self.running.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Kills the process and its group, if it still runs.
    pub fn kill(&self) {
        if self.running.process.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            self.running.signal();
        }
    }

    /// Completes when the process has ended and is reaped; `None` where the system does not tell how it ended.
    pub fn exited(&self) -> impl Future<Output = Option<ExitStatus>> + Send + 'static {
        let mut exit = self.exit.clone();
        async move { exit.wait_for(Option::is_some).await.ok().and_then(|status| *status) }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

#[derive(Debug)]
struct Running {
    pid: Pid,
    /// `None` once it is reaped: its number may then be another's.
    process: Mutex<Option<process::Child>>,
}

impl Running {
    /// For a process that is not reaped.
    fn signal(&self) {
        // What a vendor's library started is in the group. A process that left its group is not, so both.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let _ = kill_process(self.pid, Signal::KILL);
    }

    /// Until the process has ended, which also ends its group.
    fn reap(&self) -> Option<ExitStatus> {
        // First without reaping: so long, nobody else can get the number that `kill` uses.
        let ended = || waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        while matches!(ended(), Err(Errno::INTR)) {}
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        self.signal();
        process.take()?.wait().ok()
    }
}

struct Order {
    command: Command,
    reply: oneshot::Sender<io::Result<Child>>,
}

fn starter() -> io::Result<mpsc::Sender<Order>> {
    static STARTER: Mutex<Option<mpsc::Sender<Order>>> = Mutex::new(None);
    let mut starter = STARTER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(starter) = &*starter {
        return Ok(starter.clone());
    }
    let (sender, mut orders) = mpsc::channel::<Order>(MAX_WAITING);
    thread::Builder::new().name("spawn".into()).spawn(move || {
        while let Some(Order { command, reply }) = orders.blocking_recv() {
            if !reply.is_closed() {
                // Whoever has stopped waiting gets no process: dropping it ends it.
                let _ = reply.send(start(command));
            }
        }
    })?;
    Ok(starter.insert(sender).clone())
}

/// Takes the command, and with it our copies of the descriptors that are the process's.
fn start(mut command: Command) -> io::Result<Child> {
    use std::os::unix::process::CommandExt;
    let mut process = command.process_group(0).spawn()?;
    let stderr = process.stderr.take();
    let running = Arc::new(Running { pid: Pid::from_child(&process), process: Mutex::new(Some(process)) });
    let (sender, exit) = watch::channel(None);
    let reaper = {
        let running = Arc::clone(&running);
        // A thread for each process sleeps in the kernel, and needs neither a runtime nor SIGCHLD to leave no zombie.
        move || sender.send_replace(running.reap())
    };
    if let Err(e) = thread::Builder::new().name("reap".into()).spawn(reaper) {
        running.signal();
        running.reap();
        return Err(e);
    }
    Ok(Child { running, exit, stderr })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null()).stderr(Stdio::piped());
        command
    }

    #[tokio::test]
    async fn an_end_is_told_with_its_status_and_leaves_no_zombie() {
        let child = spawn(shell("exit 3")).await.unwrap();
        assert_eq!(child.exited().await.unwrap().code(), Some(3));
        assert!(!std::path::Path::new(&format!("/proc/{}", child.id())).exists());
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed_and_reaped_with_its_group() {
        let mut child = spawn(shell("sleep 1000 & sleep 1000")).await.unwrap();
        let (exited, mut stderr) = (child.exited(), child.stderr.take().unwrap());
        drop(child);
        assert_eq!(exited.await.unwrap().signal(), Some(9));
        // The pipe ends when the last of the group is gone.
        let end = tokio::task::spawn_blocking(move || stderr.read(&mut [0])).await.unwrap();
        assert_eq!(end.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_a_process_started_ends_with_it() {
        let mut child = spawn(shell("sleep 1000 & exit 0")).await.unwrap();
        let mut stderr = child.stderr.take().unwrap();
        assert_eq!(child.exited().await.unwrap().code(), Some(0));
        let end = tokio::task::spawn_blocking(move || stderr.read(&mut [0])).await.unwrap();
        assert_eq!(end.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_an_error() {
        assert_eq!(spawn(Command::new("/nonexistent")).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
