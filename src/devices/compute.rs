//! A few threads for arithmetic that takes long enough to be felt (RSA, P-521, ML-DSA). They run at a lower priority,
//! so that a flood of RSA leaves the quick signatures their microseconds. Knows no keys.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::{runtime::Handle, sync::oneshot};
use tracing::error;

use super::{DeviceError, turns::Turns};

/// Steps of niceness. Measured: enough for quick signatures to keep their rate beside a flood of RSA-4096, while
/// SCHED_IDLE would leave RSA nothing on a busy machine.
const NICE: i32 = 9;

/// While more jobs than this wait, those who wait for brief ones are told of them in groups: waking a thread for each would
/// take a fifth of RSA-2048's rate.
const MANY: usize = 8;
/// Jobs in such a group.
const GROUP: usize = 4;

/// How long a job takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Less than half a millisecond.
    Brief,
    /// More, or nobody knows.
    Long,
}

struct Job {
    id: u64,
    length: Length,
    work: Box<dyn FnOnce() -> Option<Tell> + Send>,
}

/// Tells whoever waits for a job what came of it.
type Tell = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    /// Their number is bounded by what a connection may have in flight and in tickets: they go when nobody waits for them.
    jobs: Mutex<Turns<Job>>,
    ready: Condvar,
    /// How many there were.
    count: AtomicU64,
}

impl Queue {
    fn jobs(&self) -> MutexGuard<'_, Turns<Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a job out of the queue when its caller gives up, with the data that it holds. A job that has begun is not there
/// any more.
struct Waiting<'a> {
    queue: &'a Queue,
    owner: u64,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let job = self.queue.jobs().remove(self.owner, |job| job.id == self.id);
        drop(job);
    }
}

/// The pool. Its threads start with its first job and live as long as the process.
pub struct Compute {
    /// None of its own: work is done where it is asked for.
    threads: Option<usize>,
    queue: OnceLock<Arc<Queue>>,
}

impl Compute {
    /// A pool of one thread for each core.
    pub fn new() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self { threads: Some(cores), queue: OnceLock::new() }
    }

    /// A pool without threads: whoever asks for work does it. For simulations, in which nothing may happen at once.
    pub fn inline() -> Self {
        Self { threads: None, queue: OnceLock::new() }
    }

    /// Runs `work` on the pool, in turn with that of other owners. When the caller gives up, work that has not begun is
    /// dropped, and the result of work that has is.
    pub async fn run<T: Send + 'static>(
        &self,
        owner: u64,
        length: Length,
        work: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, DeviceError> {
        let Some(threads) = self.threads else { return work() };
        let (sender, receiver) = oneshot::channel();
        let job = move || {
            if sender.is_closed() {
                return None;
            }
            let result = work();
            Some(Box::new(move || drop(sender.send(result))) as Tell)
        };
        let queue = self.queue.get_or_init(|| start(threads));
        let id = queue.count.fetch_add(1, Ordering::Relaxed);
        queue.jobs().push(owner, Job { id, length, work: Box::new(job) });
        queue.ready.notify_one();
        let _waiting = Waiting { queue, owner, id };
        receiver.await.unwrap_or_else(|_| Err(DeviceError::Failed("the computation died".into())))
    }

    /// Runs `work` on a thread of its own, which no other work can keep waiting and which ends by itself even when nobody
    /// waits for it any more. `None` when it died, or could not start.
    pub async fn apart<T: Send + 'static>(&self, name: &str, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.threads.is_none() {
            return Some(work());
        }
        let (sender, receiver) = oneshot::channel();
        thread::Builder::new().name(name.to_owned()).spawn(move || drop(sender.send(work()))).ok()?;
        receiver.await.ok()
    }
}

fn start(threads: usize) -> Arc<Queue> {
    let queue = Arc::new(Queue::default());
    let runtime = Handle::try_current().ok();
    for n in 0..threads {
        let (queue, runtime) = (Arc::clone(&queue), runtime.clone());
        let serve = move || serve(&queue, runtime.as_ref());
        if let Err(e) = thread::Builder::new().name(format!("compute-{n}")).spawn(serve) {
            error!("cannot start a compute thread: {e}");
        }
    }
    queue
}

impl Default for Compute {
    fn default() -> Self {
        Self::new()
    }
}

fn serve(queue: &Queue, runtime: Option<&Handle>) {
    // Works on the calling thread only and needs no privilege; without it the pool is merely less polite.
    let _ = rustix::process::nice(NICE);
    let mut done = Vec::with_capacity(GROUP);
    loop {
        let mut jobs = queue.jobs();
        let job = loop {
            match jobs.pop() {
                Some(job) => break job,
                // What made the queue long may have been taken by others, or given up.
                None if !done.is_empty() => {
                    drop(jobs);
                    tell(&mut done, runtime);
                    jobs = queue.jobs();
                }
                None => jobs = queue.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let many = jobs.len() > MANY;
        drop(jobs);
        if job.length == Length::Long {
            tell(&mut done, runtime);
        }
        // A panic must not shrink the pool; its caller learns that the computation died.
        done.extend(std::panic::catch_unwind(std::panic::AssertUnwindSafe(job.work)).ok().flatten());
        if !many || job.length == Length::Long || done.len() >= GROUP {
            tell(&mut done, runtime);
        }
    }
}

/// Tells all, several from within the runtime: from here each would wake a thread of it.
fn tell(done: &mut Vec<Tell>, runtime: Option<&Handle>) {
    match runtime {
        Some(runtime) if done.len() > 1 => {
            let done = std::mem::replace(done, Vec::with_capacity(GROUP));
            runtime.spawn(async move { done.into_iter().for_each(|tell| tell()) });
        }
        _ => done.drain(..).for_each(|tell| tell()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::{
        sync::mpsc,
        task::{Context, Waker},
    };

    #[test]
    fn work_that_nobody_waits_for_any_more_keeps_no_data() {
        let compute = Compute { threads: Some(1), queue: OnceLock::new() };
        let (release, held) = mpsc::channel::<()>();
        let data = Arc::new(());
        let kept = Arc::clone(&data);
        let mut long = Box::pin(compute.run(1, Length::Long, move || {
            let _ = held.recv();
            Ok(())
        }));
        let mut behind = Box::pin(compute.run(1, Length::Long, move || {
            drop(kept);
            Ok(())
        }));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(long.as_mut().poll(&mut cx).is_pending() && behind.as_mut().poll(&mut cx).is_pending());
        drop(behind);
        assert_eq!(Arc::strong_count(&data), 1);
        drop(release);
    }

    #[tokio::test]
    async fn who_waits_for_one_of_many_brief_jobs_is_told_whatever_comes_after_it() {
        let compute = Arc::new(Compute { threads: Some(1), queue: OnceLock::new() });
        // A job that lasts until the other end of its channel goes.
        let hold = || {
            let (held, hold) = mpsc::channel::<()>();
            let compute = Arc::clone(&compute);
            let work = move || Ok(hold.recv().is_err());
            (held, tokio::spawn(async move { compute.run(1, Length::Long, work).await }))
        };
        let (before, first) = hold();
        let brief: Vec<_> = (0..MANY + GROUP + 2)
            .map(|n| {
                let compute = Arc::clone(&compute);
                tokio::spawn(async move { compute.run(1, Length::Brief, move || Ok(n)).await })
            })
            .collect();
        let (behind, last) = hold();
        while compute.queue.get().is_none_or(|queue| queue.jobs().len() <= brief.len()) {
            tokio::task::yield_now().await;
        }
        drop(before);
        assert_eq!(first.await.unwrap(), Ok(true));
        for (n, brief) in brief.into_iter().enumerate() {
            assert_eq!(brief.await.unwrap(), Ok(n));
        }
        drop(behind);
        assert_eq!(last.await.unwrap(), Ok(true));
    }

    #[tokio::test]
    async fn who_waits_is_told_when_those_behind_give_up() {
        let compute = Arc::new(Compute { threads: Some(1), queue: OnceLock::new() });
        let (begun, has_begun) = mpsc::channel();
        let (go, stay) = mpsc::channel::<()>();
        let of_one = Arc::clone(&compute);
        let work = move || {
            let _ = begun.send(());
            Ok(stay.recv().is_err())
        };
        let one = tokio::spawn(async move { of_one.run(1, Length::Brief, work).await });
        let others: Vec<_> = (0..=MANY + 1)
            .map(|_| {
                let compute = Arc::clone(&compute);
                tokio::spawn(async move { compute.run(2, Length::Brief, || Ok(())).await })
            })
            .collect();
        while compute.queue.get().is_none_or(|queue| queue.jobs().len() < others.len()) {
            tokio::task::yield_now().await;
        }
        has_begun.recv().unwrap();
        for other in &others {
            other.abort();
        }
        for other in others {
            assert!(other.await.is_err());
        }
        drop(go);
        assert_eq!(one.await.unwrap(), Ok(true));
    }
}
