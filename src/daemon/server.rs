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
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::agent::{door::Door, session};
use crate::prompt::{self, Prompter};
use crate::vault::{self, Parts, Vault, store::Store};

/// Threads for what blocks: arithmetic of the lock, files.
const BLOCKING_THREADS: usize = 64;
/// As many descriptors as this are used, where the system allows them.
const MAX_DESCRIPTORS: u64 = 65_536;
/// Descriptors for everything but connections: standard streams, the runtime, prompts, helpers of security keys.
const RESERVED_DESCRIPTORS: u64 = 128;
/// More connections than this are never open.
const MAX_CONNECTIONS: usize = 65_536;
/// The pause after a connection could not be accepted: at first…
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// …and at most, doubled each time.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long connections may take in the end to have their answers.
const DRAIN: Duration = Duration::from_secs(1);
/// How long the devices may take to be gone.
const END_DEVICES: Duration = Duration::from_secs(3);
/// How long the end may wait for what cannot be interrupted.
const END: Duration = Duration::from_secs(1);

/// A vault and the runtime that serves it.
pub(super) struct Server {
    runtime: Runtime,
    vault: Arc<Vault>,
    /// A place for each connection that may be open.
    room: Arc<Semaphore>,
    /// How many places there are.
    places: usize,
    accepting: Vec<AbortHandle>,
    /// True when connections are to end.
    ending: watch::Sender<bool>,
}

impl Server {
    /// An empty vault that nobody is connected to. Raises the limit on open files, and starts threads.
    pub(super) fn new(settings: vault::Settings, prompts: prompt::Settings, store: Store) -> io::Result<Self> {
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
            Vault::new(settings, Parts::new(Prompter::new(prompts), store))
        };
        let clock = Arc::clone(&vault);
        runtime.spawn(async move { clock.expire().await });
        // A few places at least, or an agent with few descriptors would serve nobody.
        let places = room.clamp(8, MAX_CONNECTIONS);
        let room = Arc::new(Semaphore::new(places));
        Ok(Self { runtime, vault, room, places, accepting: Vec::new(), ending: watch::Sender::new(false) })
    }

    pub(super) fn vault(&self) -> &Arc<Vault> {
        &self.vault
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Serves `listener` from now on. Each connection gets the door of its moment.
    pub(super) fn listen(&mut self, listener: StdListener, door: watch::Receiver<Arc<Door>>) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let _runtime = self.runtime.enter();
        let listener = UnixListener::from_std(listener)?;
        let front = Front { door, vault: Arc::clone(&self.vault), ending: self.ending.subscribe() };
        self.accepting.push(self.runtime.spawn(accept(listener, front, Arc::clone(&self.room))).abort_handle());
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

    /// Refuses what is in flight, ends every connection, prompt and device. No secret is in memory when this returns,
    /// unless a thread was stuck with one.
    pub(super) fn end(self) {
        for accepting in &self.accepting {
            accepting.abort();
        }
        self.runtime.block_on(async {
            self.vault.begin_end();
            self.ending.send_replace(true);
            // All places are free when all connections have ended. One whose peer does not read is cut off.
            let all = u32::try_from(self.places).unwrap_or(u32::MAX);
            let _ = timeout(DRAIN, self.room.acquire_many(all)).await;
            if timeout(END_DEVICES, self.vault.end_devices()).await.is_err() {
                warn!("a device does not end; its process is left to itself");
            }
            self.vault.close_store().await;
        });
        self.vault.wipe();
        self.runtime.shutdown_timeout(END);
        // What a connection may have added while the others ended.
        self.vault.wipe();
    }
}

/// What is behind a listening socket.
struct Front {
    door: watch::Receiver<Arc<Door>>,
    vault: Arc<Vault>,
    ending: watch::Receiver<bool>,
}

/// Accepts until it is aborted. A connection that finds no room waits in the socket's backlog.
async fn accept(listener: UnixListener, front: Front, room: Arc<Semaphore>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                pause = FIRST_PAUSE;
                front.admit(stream, permit);
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

impl Front {
    /// Serves a connection, if its door lets it in.
    fn admit(&self, stream: UnixStream, permit: OwnedSemaphorePermit) {
        let peer = match stream.peer_cred() {
            Ok(peer) => peer,
            Err(error) => {
                debug!("a connection without credentials is closed: {error}");
                return;
            }
        };
        let door = Arc::clone(&self.door.borrow());
        let Some(caller) = door.admit(peer) else { return };
        let (vault, mut ending) = (Arc::clone(&self.vault), self.ending.clone());
        tokio::spawn(async move {
            let end = async move { drop(ending.wait_for(|ending| *ending).await) };
            session::serve(stream, vault, door, caller, end).await;
            drop(permit);
        });
    }
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
