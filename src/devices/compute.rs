//! A few threads for arithmetic that takes long enough to be felt (RSA, P-521, ML-DSA). They run at a lower priority,
//! so that a flood of RSA leaves the quick signatures their microseconds. Knows no keys.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::oneshot;
use tracing::error;

use super::{DeviceError, turns::Turns};

/// Steps of niceness. Measured: enough for quick signatures to keep their rate beside a flood of RSA-4096, while
/// SCHED_IDLE would leave RSA nothing on a busy machine.
const NICE: i32 = 10;

struct Job {
    id: u64,
    work: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct Queue {
    /// Their number is bounded by what a connection may have in flight: they go when nobody waits for them.
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
        work: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, DeviceError> {
        let Some(threads) = self.threads else { return work() };
        let (sender, receiver) = oneshot::channel();
        let job = move || {
            if !sender.is_closed() {
                let _ = sender.send(work());
            }
        };
        let queue = self.queue.get_or_init(|| start(threads));
        let id = queue.count.fetch_add(1, Ordering::Relaxed);
        queue.jobs().push(owner, Job { id, work: Box::new(job) });
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
    for n in 0..threads {
        let queue = Arc::clone(&queue);
        if let Err(e) = thread::Builder::new().name(format!("compute-{n}")).spawn(move || serve(&queue)) {
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

fn serve(queue: &Queue) {
    // Works on the calling thread only and needs no privilege; without it the pool is merely less polite.
    let _ = rustix::process::nice(NICE);
    loop {
        let mut jobs = queue.jobs();
        let job = loop {
            match jobs.pop() {
                Some(job) => break job,
                None => jobs = queue.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(jobs);
        // A panic must not shrink the pool; its caller learns that the computation died.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job.work));
    }
}

#[cfg(test)]
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
        let mut long = Box::pin(compute.run(1, move || {
            let _ = held.recv();
            Ok(())
        }));
        let mut behind = Box::pin(compute.run(1, move || {
            drop(kept);
            Ok(())
        }));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(long.as_mut().poll(&mut cx).is_pending() && behind.as_mut().poll(&mut cx).is_pending());
        drop(behind);
        assert_eq!(Arc::strong_count(&data), 1);
        drop(release);
    }
}
