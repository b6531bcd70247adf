//! The runtime, the vault in it, and the connections that it accepts. Knows doors, but no signal and no configuration.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{self, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::agent::{door::Door, session};
use crate::prompt::{self, Prompter};
use crate::vault::{self, Vault};

/// Threads for what blocks: arithmetic of the lock, files.
const BLOCKING_THREADS: usize = 64;
/// As many descriptors as this are used, where the system allows them.
const MAX_DESCRIPTORS: u64 = 65_536;
/// Descriptors for everything but connections: standard streams, the runtime, prompts, helpers of security keys.
const RESERVED_DESCRIPTORS: u64 = 128;
/// The pause after a connection could not be accepted: at first…
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// …and at most, doubled each time.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long the end may wait for what cannot be interrupted.
const END: Duration = Duration::from_secs(1);

/// A vault and the runtime that serves it.
pub(super) struct Server {
    runtime: Runtime,
    vault: Arc<Vault>,
    /// A place for each connection that may be open.
    room: Arc<Semaphore>,
}

impl Server {
    /// An empty vault that nobody is connected to. Raises the limit on open files, and starts threads.
    pub(super) fn new(settings: vault::Settings, prompts: prompt::Settings) -> io::Result<Self> {
        let descriptors = raise_descriptor_limit();
        let room = usize::try_from(descriptors.saturating_sub(RESERVED_DESCRIPTORS)).unwrap_or(usize::MAX);
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(thread::available_parallelism().map_or(1, usize::from))
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("strongroom")
            .enable_all()
            .build()?;
        let vault = {
            let _runtime = runtime.enter();
            Vault::new(settings, Prompter::new(prompts))
        };
        let clock = Arc::clone(&vault);
        runtime.spawn(async move { clock.expire().await });
        // A few places at least, or an agent with few descriptors would serve nobody.
        let room = Arc::new(Semaphore::new(room.clamp(8, Semaphore::MAX_PERMITS)));
        Ok(Self { runtime, vault, room })
    }

    pub(super) fn vault(&self) -> &Vault {
        &self.vault
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Serves `listener` from now on. Each connection gets the door of its moment.
    pub(super) fn listen(&self, listener: StdListener, door: watch::Receiver<Arc<Door>>) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let _runtime = self.runtime.enter();
        let listener = UnixListener::from_std(listener)?;
        self.runtime.spawn(accept(listener, door, Arc::clone(&self.vault), Arc::clone(&self.room)));
        Ok(())
    }

    /// Makes the first random number, which alone costs tens of milliseconds, before a request needs one.
    pub(super) fn warm_up() {
        let fill = || {
            let _ = aws_lc_rs::rand::fill(&mut [0; 8]);
        };
        // Without the thread, the first request that needs a random number is slow, and nothing else.
        let _ = thread::Builder::new().name("warm-up".to_owned()).spawn(fill);
    }

    /// Ends every connection and prompt. No secret is in memory when this returns, unless a thread was stuck with one.
    pub(super) fn end(self) {
        self.vault.wipe();
        self.runtime.shutdown_timeout(END);
        // What a connection may have added while the others ended.
        self.vault.wipe();
    }
}

/// Accepts for as long as the runtime lives. A connection that finds no room waits in the socket's backlog.
async fn accept(listener: UnixListener, door: watch::Receiver<Arc<Door>>, vault: Arc<Vault>, room: Arc<Semaphore>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                pause = FIRST_PAUSE;
                let door = Arc::clone(&door.borrow());
                admit(stream, door, Arc::clone(&vault), permit);
            }
            Err(error) => {
                drop(permit);
                if pause == FIRST_PAUSE {
                    warn!("connections cannot be accepted and wait: {error}");
                }
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Serves a connection, if its door lets it in.
fn admit(stream: UnixStream, door: Arc<Door>, vault: Arc<Vault>, permit: OwnedSemaphorePermit) {
    let peer = match stream.peer_cred() {
        Ok(peer) => peer,
        Err(error) => {
            debug!("a connection without credentials is closed: {error}");
            return;
        }
    };
    let Some(caller) = door.admit(peer) else { return };
    tokio::spawn(async move {
        session::serve(stream, vault, door, caller).await;
        drop(permit);
    });
}

/// Raises the soft limit on open files as far as it is of use, and returns it.
fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.unwrap_or(MAX_DESCRIPTORS).min(MAX_DESCRIPTORS);
    match limit.current {
        Some(current) if current < wanted => {
            let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum });
            if raised.is_ok() { wanted } else { current }
        }
        current => current.unwrap_or(MAX_DESCRIPTORS),
    }
}
