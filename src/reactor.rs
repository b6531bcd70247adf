//! The threads that wait for sockets, one for each core: whoever is free takes the next socket that has something to read,
//! and polls what serves it right there. Knows futures and sockets; no agent and no device.
//!
//! All threads wait in one edge-triggered epoll set (epoll(7)), so that connections need not be dealt out, and no socket
//! waits while a core has nothing to do. A tokio runtime would have one thread wait for all sockets and hand them to the
//! others, which costs a tenth of the signatures that can be made (docs/performance.md). What a task waits for besides
//! its socket may be tokio's, whose threads have other things to do than to poll it: a waker puts it into a queue, and
//! rings a bell in the set if a thread sleeps. What a task wakes first while it is polled here, the same thread polls next:
//! a request that goes from a connection to a device, and back, needs no other thread to be woken.

mod socket;

use std::{
    cell::Cell,
    collections::{HashMap, VecDeque},
    future::Future,
    io, iter, mem,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use rustix::{
    buffer::spare_capacity,
    event::{
        EventfdFlags, Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
        eventfd,
    },
    io::Errno,
};
use tokio::runtime::Handle;
use tracing::error;

use socket::Ready;
pub use socket::{Listener, Socket, SocketWriter};

/// Sockets that a thread takes at once. The second waits for the first, even while another thread has nothing to do: with
/// sixteen, eight clients had 6 % fewer signatures than with two, and twice the p99. With one, many clients had 2 % fewer.
const EVENTS: usize = 2;
/// How many tasks one after the other a thread polls because the one before has woken them. A signature of a device takes
/// two: the connection wakes the device, or the process's socket wakes the device, which wakes the connection.
const CHAIN: usize = 8;
/// What the set calls the bell.
const BELL: u64 = u64::MAX;

/// A task that somebody wants to be polled…
const WANTED: u8 = 1;
/// …and one that a thread is polling, or that is over.
const RUNNING: u8 = 2;

/// The stages of a reactor, in their order: it serves;
const SERVING: u8 = 0;
/// every [`Ending`] is ready;
const ENDING: u8 = 1;
/// what serves clients is dropped;
const CUT: u8 = 2;
/// everything is dropped, and its threads end.
const OVER: u8 = 3;

/// How long threads may take to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// The threads, which end with it. To be dropped before the runtime.
pub struct Reactor {
    registry: Registry,
    /// Sends nothing; it is closed when the last thread has ended.
    threads: mpsc::Receiver<()>,
}

/// Takes tasks, and sockets that are to be served.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

struct Shared {
    /// All sockets, and the bell.
    set: OwnedFd,
    /// Rings when somebody is in `woken` while a thread sleeps, and in the end.
    bell: OwnedFd,
    /// Threads that sleep, or look for sockets that are ready. The others look at `woken_count` before they sleep.
    idle: AtomicUsize,
    /// Tasks that are wanted for another reason than their sockets…
    woken: Mutex<VecDeque<Arc<Task>>>,
    /// …and how many they are.
    woken_count: AtomicUsize,
    tasks: Mutex<HashMap<u64, Arc<Task>>>,
    next: AtomicU64,
    stage: AtomicU8,
    runtime: Handle,
}

/// Ready from when the reactor begins to end.
pub struct Ending(Arc<Shared>);

impl Future for Ending {
    type Output = ();

    /// Needs no waker: all tasks are polled then.
    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.0.stage() >= ENDING { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Reactor {
    /// Starts so many threads. What they poll may use `runtime`.
    pub fn start(threads: usize, runtime: &Handle) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            set: epoll::create(CreateFlags::CLOEXEC)?,
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            idle: AtomicUsize::new(0),
            woken: Mutex::default(),
            woken_count: AtomicUsize::new(0),
            tasks: Mutex::default(),
            next: AtomicU64::new(0),
            stage: AtomicU8::new(SERVING),
            runtime: runtime.clone(),
        });
        epoll::add(&shared.set, &shared.bell, EventData::new_u64(BELL), EventFlags::IN | EventFlags::ET)?;
        let (lives, ended) = mpsc::channel();
        // If one thread cannot be started, dropping this ends the others.
        let reactor = Self { registry: Registry(Arc::clone(&shared)), threads: ended };
        for lives in iter::repeat_n(lives, threads) {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("sockets".to_owned()).spawn(move || {
                shared.work();
                drop(lives);
            })?;
        }
        Ok(reactor)
    }

    /// Takes what is to be served, also when the reactor has gone: then nothing serves it.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// From now on every [`Ending`] is ready.
    pub fn end(&self) {
        let shared = &self.registry.0;
        shared.stage.fetch_max(ENDING, Ordering::AcqRel);
        shared.all().into_iter().for_each(Wake::wake);
    }

    /// From now on what serves clients is dropped instead of polled. Drops all of it that no thread is polling.
    pub fn cut_off(&self) {
        self.stop(CUT);
    }

    fn stop(&self, stage: u8) {
        let shared = &self.registry.0;
        shared.stage.fetch_max(stage, Ordering::AcqRel);
        shared.ring();
        let _runtime = shared.runtime.enter();
        shared.drop_stopped();
    }
}

impl Drop for Reactor {
    /// Drops all tasks, and waits for the threads, unless one is stuck.
    fn drop(&mut self) {
        self.stop(OVER);
        let _ = self.threads.recv_timeout(PATIENCE);
    }
}

impl Registry {
    /// Serves a listening socket, which does not block, with the future that `work` makes.
    pub fn listen<F>(&self, socket: OwnedFd, work: impl FnOnce(Listener, Ending) -> F) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let socket = Arc::new(socket);
        self.add(Some(&socket), false, |ready, ending| work(Listener::new(Arc::clone(&socket), ready), ending))
    }

    /// Serves a connection with the future that `work` makes. It is polled whenever there is something to read, and its
    /// panic is the end of this connection only.
    pub fn serve<F>(&self, socket: OwnedFd, work: impl FnOnce(Socket, Ending) -> F) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let socket = Arc::new(socket);
        self.add(Some(&socket), false, |ready, ending| work(Socket::new(Arc::clone(&socket), ready), ending))
    }

    /// Polls what is no client's, until the reactor is dropped: now, when its socket has something to read, or it is woken.
    pub fn attend<F>(&self, socket: OwnedFd, work: impl FnOnce(Socket) -> F) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let socket = Arc::new(socket);
        self.add(Some(&socket), true, |ready, _| work(Socket::new(Arc::clone(&socket), ready)))
    }

    /// The same without a socket.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        // Without a socket there is nothing that could fail.
        let _ = self.add(None, true, |_, _| work);
    }

    fn add<F>(
        &self,
        socket: Option<&Arc<OwnedFd>>,
        stays: bool,
        work: impl FnOnce(Arc<Ready>, Ending) -> F,
    ) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let shared = &self.0;
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        let ready = Arc::new(Ready::new(id, Arc::clone(shared)));
        let work: Work = Box::pin(work(Arc::clone(&ready), Ending(Arc::clone(shared))));
        let task = Arc::new(Task { state: AtomicU8::new(0), ready, stays, work: Mutex::new(Some(work)) });
        // Before the set knows it: a thread may see it at once, and whoever ends must find it.
        shared.tasks().insert(id, Arc::clone(&task));
        if let Some(socket) = socket
            && let Err(error) = epoll::add(&shared.set, socket, EventData::new_u64(id), socket::TOLD)
        {
            shared.tasks().remove(&id);
            return Err(error.into());
        }
        // What is no client's may wait for other things first, and who came too late is not among those that `end` had polled.
        if stays || shared.stage() >= ENDING {
            Arc::clone(&task).wake();
        }
        // Nobody would drop it later.
        if task.is_stopped() && task.want() && task.begin() {
            task.run();
        }
        Ok(())
    }
}

impl Shared {
    fn tasks(&self) -> MutexGuard<'_, HashMap<u64, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn woken(&self) -> MutexGuard<'_, VecDeque<Arc<Task>>> {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Task>> {
        self.tasks().values().cloned().collect()
    }

    /// Has the next thread that is free run a task, which is wanted.
    fn hand_over(&self, task: Arc<Task>) {
        let mut woken = self.woken();
        woken.push_back(task);
        self.count(woken);
    }

    /// Tells how many are in `woken`, if any, to a thread that sleeps. One that does not sees it before it would.
    fn count(&self, woken: MutexGuard<'_, VecDeque<Arc<Task>>>) {
        let count = woken.len();
        // In one order with what `wait` does: either it sees the count, or this its thread.
        self.woken_count.store(count, Ordering::SeqCst);
        drop(woken);
        if count > 0 && self.idle.load(Ordering::SeqCst) > 0 {
            self.ring();
        }
    }

    /// Takes one task that was handed over. The others are for whoever is free before this thread.
    fn take_over(&self) -> Option<Arc<Task>> {
        if self.woken_count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut woken = self.woken();
        let task = woken.pop_front();
        self.count(woken);
        task
    }

    /// Waits for sockets that are ready, but not where there is something else to do.
    fn wait(&self, events: &mut Vec<Event>, is_busy: bool) -> rustix::io::Result<()> {
        events.clear();
        self.idle.fetch_add(1, Ordering::SeqCst);
        let no_time = (is_busy || self.woken_count.load(Ordering::SeqCst) > 0).then(Timespec::default);
        let waited = epoll::wait(&self.set, spare_capacity(events), no_time.as_ref());
        self.idle.fetch_sub(1, Ordering::Relaxed);
        match waited {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Wakes a thread that sleeps, or has the next one that would sleep look.
    fn ring(&self) {
        // It counts how often: no machine gets so far that there is no room.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn stage(&self) -> u8 {
        self.stage.load(Ordering::Acquire)
    }

    fn work(self: &Arc<Self>) {
        let _runtime = self.runtime.enter();
        HERE.with(|here| here.reactor.set(Arc::as_ptr(self)));
        self.serve();
        HERE.with(|here| here.reactor.set(ptr::null()));
        // The next thread hears it.
        self.ring();
        if self.stage() == OVER {
            self.drop_stopped();
        }
    }

    /// Drops every task whose time is over and that nobody is running. Who is running one does it himself.
    fn drop_stopped(&self) {
        for task in self.all() {
            if task.is_stopped() && task.want() && task.begin() {
                task.run();
            }
        }
        if self.stage() < OVER {
            return;
        }
        let woken = mem::take(&mut *self.woken());
        drop(woken);
    }

    /// Polls whose socket is ready, until the reactor is over.
    fn serve(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut wanted = Vec::new();
        // Has had a turn and wants another, behind those who have had none.
        let mut again: Option<Arc<Task>> = None;
        while self.stage() < OVER {
            if let Err(error) = self.wait(&mut events, again.is_some()) {
                again.into_iter().for_each(|task| self.hand_over(task));
                return error!("sockets cannot be waited for: {error}");
            }
            self.note(&events, &mut wanted);
            wanted.extend(self.take_over());
            wanted.extend(again.take());
            for task in wanted.drain(..) {
                let mut next = Some(task);
                for _ in 0..CHAIN {
                    let Some(task) = next.take() else { break };
                    if task.begin()
                        && task.run()
                        && let Some(other) = again.replace(task)
                    {
                        // One is enough here: another thread may have less to do.
                        self.hand_over(other);
                    }
                    next = HERE.with(|here| here.next.take());
                }
                next.into_iter().for_each(|task| self.hand_over(task));
            }
        }
    }

    /// Tells tasks what their sockets are ready for, and finds those that nobody is polling.
    fn note(&self, events: &[Event], wanted: &mut Vec<Arc<Task>>) {
        for event in events {
            // The bell, which only wakes, and those that ended meanwhile are not there.
            let Some(task) = self.tasks().get(&event.data.u64()).cloned() else { continue };
            task.ready.note(event.flags);
            if task.want() {
                wanted.push(task);
            }
        }
    }
}

thread_local! {
    static HERE: Here = const { Here { reactor: Cell::new(ptr::null()), next: Cell::new(None) } };
}

/// What a thread knows of itself.
struct Here {
    /// Whose thread it is; only ever compared.
    reactor: Cell<*const Shared>,
    /// The first task that the one it is polling has woken.
    next: Cell<Option<Arc<Task>>>,
}

impl Here {
    /// Whether the task that is being polled has woken another, which waits for its end.
    fn has_next(&self) -> bool {
        let next = self.next.take();
        let has_next = next.is_some();
        self.next.set(next);
        has_next
    }

    /// Keeps a task to be polled next, where there is none yet; otherwise gives it back.
    fn keep(&self, task: Arc<Task>) -> Option<Arc<Task>> {
        if self.reactor.get() != Arc::as_ptr(task.ready.shared()) {
            return Some(task);
        }
        let (next, other) = match self.next.take() {
            None => (task, None),
            Some(next) => (next, Some(task)),
        };
        self.next.set(Some(next));
        other
    }
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What serves a socket, or has none.
struct Task {
    /// [`WANTED`] and [`RUNNING`], or neither: then it waits.
    state: AtomicU8,
    ready: Arc<Ready>,
    /// Whether it goes on when what serves clients is dropped.
    stays: bool,
    /// `None` when it is over. Only who is running it has it locked.
    work: Mutex<Option<Work>>,
}

impl Task {
    /// Has it polled once more. Whether nobody is running it, who would do that.
    fn want(&self) -> bool {
        self.state.fetch_or(WANTED, Ordering::AcqRel) & RUNNING == 0
    }

    /// Whether it is wanted and nobody is running it. Then the caller does.
    fn begin(&self) -> bool {
        self.state.compare_exchange(WANTED, RUNNING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Polls it once. Whether it wants another turn: then it waits for somebody to begin it.
    fn run(self: &Arc<Self>) -> bool {
        if self.is_over() {
            // It stays running, so that nobody begins it again.
            self.ready.shared().tasks().remove(&self.ready.id());
            return false;
        }
        // Acquires, too: whoever wanted it meanwhile has told the socket of something before.
        self.state.fetch_and(!RUNNING, Ordering::AcqRel) & WANTED != 0
    }

    fn is_stopped(&self) -> bool {
        self.ready.shared().stage() >= if self.stays { OVER } else { CUT }
    }

    /// Polls its future, and drops it when that was the last time. The panic hook tells of a panic.
    fn is_over(self: &Arc<Self>) -> bool {
        let waker = Waker::from(Arc::clone(self));
        let stopped = self.is_stopped();
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let polled = catch_unwind(AssertUnwindSafe(|| {
            let mut cx = Context::from_waker(&waker);
            stopped || work.as_mut().is_none_or(|future| future.as_mut().poll(&mut cx).is_ready())
        }));
        let is_over = polled.unwrap_or(true);
        if is_over {
            let work = work.take();
            let _ = catch_unwind(AssertUnwindSafe(|| drop(work)));
        }
        is_over
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        if self.state.fetch_or(WANTED, Ordering::AcqRel) == 0 {
            let shared = Arc::clone(self.ready.shared());
            // No thread that is ending has anything to keep.
            let mut task = Some(self);
            let _ = HERE.try_with(|here| task = task.take().and_then(|task| here.keep(task)));
            task.into_iter().for_each(|task| shared.hand_over(task));
        }
    }
}

#[cfg(test)]
mod tests;
