//! A few threads for arithmetic that takes long enough to be felt (RSA, P-521, ML-DSA). They run at a lower priority,
//! so that a flood of RSA leaves the quick signatures their microseconds. Knows no keys.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tracing::error;

use super::DeviceError;

/// Jobs that may wait at once; more callers wait for a place, in the order they came, up to their own deadline.
const QUEUE: usize = 1024;

/// Steps of niceness. Measured: enough for quick signatures to keep their rate beside a flood of RSA-4096, while
/// SCHED_IDLE would leave RSA nothing on a busy machine.
const NICE: i32 = 10;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    ready: Condvar,
}

/// The pool. Its threads start with its first job and live as long as the process.
pub struct Compute {
    threads: usize,
    places: Arc<Semaphore>,
    queue: OnceLock<Arc<Queue>>,
}

impl Compute {
    /// A pool of one thread for each core.
    pub fn new() -> Self {
        Self {
            threads: thread::available_parallelism().map_or(1, usize::from),
            places: Arc::new(Semaphore::new(QUEUE)),
            queue: OnceLock::new(),
        }
    }

    /// Runs `work` on the pool. When the caller gives up, work that has not begun is dropped, and the result of work
    /// that has is.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, DeviceError> {
        let place = Arc::clone(&self.places).acquire_owned().await.map_err(|_| DeviceError::Busy)?;
        let (sender, receiver) = oneshot::channel();
        self.push(Box::new(move || finish(place, sender, work)));
        receiver.await.unwrap_or_else(|_| Err(DeviceError::Failed("the computation died".into())))
    }

    fn push(&self, job: Job) {
        let queue = self.queue.get_or_init(|| self.start());
        queue.jobs.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        queue.ready.notify_one();
    }

    fn start(&self) -> Arc<Queue> {
        let queue = Arc::new(Queue::default());
        for n in 0..self.threads {
            let queue = Arc::clone(&queue);
            if let Err(e) = thread::Builder::new().name(format!("compute-{n}")).spawn(move || serve(&queue)) {
                error!("cannot start a compute thread: {e}");
            }
        }
        queue
    }
}

impl Default for Compute {
    fn default() -> Self {
        Self::new()
    }
}

fn finish<T>(
    place: OwnedSemaphorePermit,
    sender: oneshot::Sender<Result<T, DeviceError>>,
    work: impl FnOnce() -> Result<T, DeviceError>,
) {
    if !sender.is_closed() {
        let result = work();
        // Free the place first, so that whoever reads the result finds it free.
        drop(place);
        let _ = sender.send(result);
    }
}

fn serve(queue: &Queue) {
    // Works on the calling thread only and needs no privilege; without it the pool is merely less polite.
    let _ = rustix::process::nice(NICE);
    loop {
        let mut jobs = queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let job = loop {
            match jobs.pop_front() {
                Some(job) => break job,
                None => jobs = queue.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(jobs);
        // A panic must not shrink the pool; its caller learns that the computation died.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
    }
}
