//! The runtime, the vault in it, and the connections that are accepted. Knows doors, but no signal and no configuration.

use std::io;
use std::os::{
    fd::OwnedFd,
    unix::net::{UnixListener, UnixStream},
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{self, Runtime};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::agent::{door::Door, session};
use crate::prompt::{self, Prompter};
use crate::reactor::{Listener, Reactor, Registry};
use crate::sys::{memory, peer};
use crate::vault::{self, Parts, Vault, audit::Audit, budget::Budget, store::Store};

/// Threads for what blocks: arithmetic of the lock, files.
const BLOCKING_THREADS: usize = 64;
/// As many descriptors as this are used, where the system allows them.
const MAX_DESCRIPTORS: u64 = 65_536;
/// Descriptors for everything but connections: standard streams, the runtime, prompts, helpers of security keys.
const RESERVED_DESCRIPTORS: u64 = 128;
/// More connections than this are never open.
const MAX_CONNECTIONS: usize = 65_536;
/// One uid that is neither ours nor root's has no more than this part of the places for connections.
const GUESTS_PART: usize = 4;
/// The pause after a connection could not be accepted: at first…
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// …and at most, doubled each time.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long nobody has been connected when the program's code is let go.
const CALM: Duration = Duration::from_secs(1);
/// How long connections may take in the end to have their answers.
const DRAIN: Duration = Duration::from_secs(1);
/// How long a device may take to answer to a PIN that it was sent: longer than a login that waits for a lane usually takes, with
/// [`devices::Settings::grace`](crate::devices::Settings::grace).
const END_PINS: Duration = Duration::from_secs(12);
/// How long the devices may take to be gone.
const END_DEVICES: Duration = Duration::from_secs(3);
/// How long the end may wait for what cannot be interrupted.
const END: Duration = Duration::from_secs(1);

/// A vault, the runtime that it works in, and the threads that serve its connections.
pub(super) struct Server {
    // Before the runtime, which what it drops in its end may use.
    reactor: Reactor,
    runtime: Runtime,
    vault: Arc<Vault>,
    /// A place for each connection that may be open.
    room: Arc<Semaphore>,
    /// How many places there are.
    places: usize,
    /// How many of them each uid has that is neither ours nor root's.
    guests: Arc<Budget>,
    traffic: Arc<Traffic>,
}

impl Server {
    /// An empty vault that nobody is connected to. Raises the limit on open files, and starts threads.
    pub(super) fn new(
        settings: vault::Settings,
        prompts: prompt::Settings,
        store: Store,
        audit: Audit,
    ) -> io::Result<Self> {
        let descriptors = raise_descriptor_limit();
        let room = usize::try_from(descriptors.saturating_sub(RESERVED_DESCRIPTORS)).unwrap_or(usize::MAX);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(cores)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("strongroom")
            .enable_all()
            .build()?;
        let reactor = Reactor::start(cores, runtime.handle())?;
        let vault = {
            let _runtime = runtime.enter();
            let parts = Parts::new(Prompter::new(prompts), store);
            let slot_time = slot_time().unwrap_or(parts.slot_time);
            Vault::new(settings, Parts { audit, slot_time, reactor: Some(reactor.registry().clone()), ..parts })
        };
        let clock = Arc::clone(&vault);
        runtime.spawn(async move { clock.expire().await });
        runtime.spawn(Arc::clone(&vault).lock_by_itself());
        let traffic = Arc::<Traffic>::default();
        runtime.spawn(Arc::clone(&traffic).tidy());
        // A few places at least, or an agent with few descriptors would serve nobody.
        let places = room.clamp(8, MAX_CONNECTIONS);
        let room = Arc::new(Semaphore::new(places));
        let guests = Arc::new(Budget::new(places / GUESTS_PART));
        Ok(Self { reactor, runtime, vault, room, places, guests, traffic })
    }

    pub(super) fn vault(&self) -> &Arc<Vault> {
        &self.vault
    }

    /// Waits for the sockets of devices, too.
    pub(super) fn registry(&self) -> &Registry {
        self.reactor.registry()
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Serves `listener` from now on. Each connection gets the door of its moment.
    pub(super) fn listen(&self, listener: UnixListener, door: watch::Receiver<Arc<Door>>) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let (vault, guests, traffic) = (Arc::clone(&self.vault), Arc::clone(&self.guests), Arc::clone(&self.traffic));
        let front = Front { door, vault, guests, traffic, registry: self.reactor.registry().clone() };
        let room = Arc::clone(&self.room);
        self.reactor.registry().listen(listener.into(), |listener, ending| async move {
            tokio::select! {
                biased;
                () = ending => {}
                () = accept(&listener, front, room) => {}
            }
        })
    }

    /// A stream whose other end gives every byte back, served like a connection: whoever hears nothing knows that nobody
    /// is served.
    pub(super) fn pulse(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.reactor.registry().serve(theirs.into(), |mut socket, _| async move {
            while let Ok(byte) = socket.read_u8().await {
                // By way of the runtime, which then has to wake the connection.
                if tokio::spawn(async {}).await.is_err() || socket.write_u8(byte).await.is_err() {
                    return;
                }
            }
        })?;
        ours.set_nonblocking(true)?;
        Ok(ours)
    }

    /// Makes the first random number, which alone costs tens of milliseconds, before a request needs one; then, when the
    /// start is over, lets go of the code that was needed so far.
    pub(super) fn warm_up(&self) {
        let (runtime, audit) = (self.runtime.handle().clone(), self.vault.audit().clone());
        let warm_up = move || {
            let _ = aws_lc_rs::rand::fill(&mut [0; 8]);
            // The last that a start does is to write down that it was one.
            runtime.block_on(audit.flushed());
            release_code();
        };
        // Without the thread, the first request that needs a random number is slow, and nothing else.
        let _ = thread::Builder::new().name("warm-up".to_owned()).spawn(warm_up);
    }

    /// Refuses what is in flight, ends every connection, prompt and device. No secret is in memory when this returns,
    /// unless a thread was stuck with one.
    pub(super) fn end(self) {
        self.runtime.block_on(async {
            self.vault.begin_end();
            self.reactor.end();
            // All places are free when all connections have ended. One whose peer does not read is cut off.
            let all = u32::try_from(self.places).unwrap_or(u32::MAX);
            if timeout(DRAIN, self.room.acquire_many(all)).await.is_err() {
                self.reactor.cut_off();
                let _ = timeout(END, self.room.acquire_many(all)).await;
            }
            self.wait_for_pins().await;
            if timeout(END_DEVICES, self.vault.end_devices()).await.is_err() {
                warn!("a device does not end; its process is left to itself");
            }
            self.vault.audit().close().await;
            self.vault.close_store().await;
        });
        self.vault.wipe();
        drop(self.reactor);
        self.runtime.shutdown_timeout(END);
        // What a connection may have added while the others ended.
        self.vault.wipe();
    }

    /// A PIN whose answer is not known may have cost a try, and would have to be given by a person after the next start.
    async fn wait_for_pins(&self) {
        if self.vault.have_pins_arrived() {
            return;
        }
        info!("a device has been sent a PIN; its answer is waited for");
        if timeout(END_PINS, self.vault.pins_have_arrived()).await.is_err() {
            warn!("a device does not say whether its PIN is right");
        }
    }
}

/// How long tests want a try at a passphrase of the store to take. No release has the scripted device, nor this.
fn slot_time() -> Option<Duration> {
    let named = cfg!(feature = "scripted").then(|| std::env::var("STRONGROOM_TEST_SLOT_MS").ok()).flatten();
    named.and_then(|ms| ms.parse().ok()).map(Duration::from_millis)
}

/// What is behind a listening socket.
struct Front {
    door: watch::Receiver<Arc<Door>>,
    vault: Arc<Vault>,
    guests: Arc<Budget>,
    traffic: Arc<Traffic>,
    registry: Registry,
}

/// A connection's place among those of its uid: who shares a vault with others must not have all its places.
struct Seat(Option<(Arc<Budget>, u32)>);

impl Seat {
    /// `None` when the uid has as many as it may.
    fn take(guests: &Arc<Budget>, uid: u32) -> Option<Self> {
        if uid == geteuid().as_raw() || uid == 0 {
            return Some(Self(None));
        }
        guests.take(uid, 1).then(|| Self(Some((Arc::clone(guests), uid))))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some((guests, uid)) = &self.0 {
            guests.give_back(*uid, 1);
        }
    }
}

/// How many connections are open.
#[derive(Default)]
struct Traffic {
    open: AtomicUsize,
    /// The last has ended.
    over: Notify,
}

impl Traffic {
    /// Lets go of the program's code whenever nobody has been connected for a moment. Never returns.
    async fn tidy(self: Arc<Self>) {
        loop {
            self.over.notified().await;
            sleep(CALM).await;
            if self.open.load(Ordering::Relaxed) == 0 {
                let _ = spawn_blocking(release_code).await;
            }
        }
    }
}

/// That a connection is open.
struct Presence(Arc<Traffic>);

impl Presence {
    fn new(traffic: &Arc<Traffic>) -> Self {
        traffic.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(traffic))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.over.notify_one();
        }
    }
}

fn release_code() {
    if let Err(error) = memory::release_code() {
        debug!("the program's code stays in memory: {error}");
    }
}

/// Accepts until it is dropped. A connection that finds no room waits in the socket's backlog.
async fn accept(listener: &Listener, front: Front, room: Arc<Semaphore>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await.and_then(|connection| front.admit(connection, permit)) {
            Ok(()) => {
                pause = FIRST_PAUSE;
                // A flood of connections must not keep the thread from those that it has.
                yield_now().await;
            }
            Err(error) => {
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
    /// Serves a connection, if its door lets it in. An error: no connection can be served now.
    fn admit(&self, connection: OwnedFd, permit: OwnedSemaphorePermit) -> io::Result<()> {
        let peer = match peer::credentials(&connection) {
            Ok(peer) => peer,
            Err(error) => {
                debug!("a connection without credentials is closed: {error}");
                return Ok(());
            }
        };
        let door = Arc::clone(&self.door.borrow());
        let Some(caller) = door.admit(peer) else { return Ok(()) };
        let Some(seat) = Seat::take(&self.guests, caller.uid) else {
            warn!(uid = caller.uid, pid = caller.pid, "closed a connection: its uid has too many");
            return Ok(());
        };
        let vault = Arc::clone(&self.vault);
        let presence = Presence::new(&self.traffic);
        self.registry.serve(connection, |socket, ending| async move {
            session::serve(socket, vault, door, caller, ending).await;
            drop((seat, permit, presence));
        })
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_has_a_part_of_the_places_and_we_have_all() {
        let guests = Arc::new(Budget::new(2));
        let (own, stranger) = (geteuid().as_raw(), geteuid().as_raw() + 1);
        let one = Seat::take(&guests, stranger).unwrap();
        let _two = Seat::take(&guests, stranger).unwrap();
        assert!(Seat::take(&guests, stranger).is_none());
        assert!(Seat::take(&guests, stranger + 1).is_some());
        let ours: Vec<_> = (0..9).map(|_| Seat::take(&guests, own).unwrap()).collect();
        drop((one, ours));
        assert!(Seat::take(&guests, stranger).is_some());
    }
}
