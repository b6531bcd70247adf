//! What a connection has submitted and not yet collected. Knows numbers, sizes and results; no key and no bytes of the
//! wire.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::task::{self, AbortHandle, JoinError, JoinSet};
use zeroize::Zeroizing;

use super::message::{Cancelled, Code, Failure};
use crate::vault::budget::Budget;

/// Tickets of one connection.
pub const MAX_TICKETS: usize = 16_384;
/// Bytes of requests and results of one connection's tickets.
pub const MAX_BYTES: usize = 16 << 20;
/// What a ticket counts for besides its request and result, in bytes.
const OVERHEAD: usize = 256;

/// What came of a ticket: the operation's bytes, or why there are none.
pub type Outcome = Result<Zeroizing<Vec<u8>>, Failure>;

/// The tickets of one connection. They end with it.
pub struct Tickets {
    uid: u32,
    budget: Arc<Budget>,
    running: JoinSet<(u64, Outcome)>,
    open: HashMap<u64, Open>,
    finished: VecDeque<(u64, Outcome)>,
    /// What all open tickets count for.
    bytes: usize,
}

struct Open {
    /// None when it is finished.
    task: Option<AbortHandle>,
    bytes: usize,
}

impl Tickets {
    /// None yet, for a connection of this uid.
    pub fn new(uid: u32, budget: Arc<Budget>) -> Self {
        Self { uid, budget, running: JoinSet::new(), open: HashMap::new(), finished: VecDeque::new(), bytes: 0 }
    }

    /// Makes room for a ticket whose request and result have so many bytes. It must be followed by [`Tickets::run`] or
    /// [`Tickets::finish`].
    pub fn reserve(&mut self, id: u64, bytes: usize) -> Result<(), Failure> {
        self.settle();
        if self.open.contains_key(&id) {
            return Err(Failure::new(Code::BadRequest, "a ticket with this id is open: collect or cancel it first"));
        }
        let bytes = bytes.saturating_add(OVERHEAD);
        if self.open.len() >= MAX_TICKETS || self.bytes.saturating_add(bytes) > MAX_BYTES {
            return Err(Failure::new(Code::Busy, "too many tickets are open on this connection: collect some first"));
        }
        if !self.budget.take(self.uid, bytes) {
            return Err(Failure::new(Code::Busy, "the tickets of all your connections take too much memory"));
        }
        self.bytes += bytes;
        self.open.insert(id, Open { task: None, bytes });
        Ok(())
    }

    /// Has the ticket done by a task of its own.
    pub fn run(&mut self, id: u64, work: impl Future<Output = Outcome> + Send + 'static) {
        let task = self.running.spawn(async move { (id, work.await) });
        if let Some(open) = self.open.get_mut(&id) {
            open.task = Some(task);
        }
    }

    /// Finishes a ticket that took no time.
    pub fn finish(&mut self, id: u64, outcome: Outcome) {
        self.finished.push_back((id, outcome));
    }

    /// Ready when at least one ticket is finished; otherwise the context is woken when one is.
    pub fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            self.settle();
            if !self.finished.is_empty() {
                return Poll::Ready(());
            }
            match self.running.poll_join_next_with_id(cx) {
                Poll::Ready(Some(joined)) => self.joined(joined),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Takes over all that tasks have finished. Whatever depends on it calls this first, and each new ticket does: what
    /// cancelled tasks leave behind would otherwise pile up on a connection that never collects.
    pub fn settle(&mut self) {
        // Polling would stop when the connection's turn is over, with results left that are there.
        while let Some(joined) = self.running.try_join_next_with_id() {
            self.joined(joined);
        }
    }

    fn joined(&mut self, joined: Result<(task::Id, (u64, Outcome)), JoinError>) {
        match joined {
            Ok((task, (id, outcome))) => {
                // A ticket that was cancelled, and perhaps its number used again, has another task or none.
                if let Some(open) = self.open.get_mut(&id)
                    && open.task.as_ref().is_some_and(|open| open.id() == task)
                {
                    open.task = None;
                    self.finished.push_back((id, outcome));
                }
            }
            Err(error) if error.is_cancelled() => {}
            Err(error) => {
                let task = error.id();
                let died = self.open.iter_mut().find(|(_, open)| open.task.as_ref().is_some_and(|t| t.id() == task));
                if let Some((id, open)) = died {
                    open.task = None;
                    let failure = Failure::new(Code::Failed, "the operation died");
                    self.finished.push_back((*id, Err(failure)));
                }
            }
        }
    }

    /// Takes the next finished ticket, if `fits` says that there is room for its outcome.
    pub fn take(&mut self, fits: impl FnOnce(&Outcome) -> bool) -> Option<(u64, Outcome)> {
        if !fits(&self.finished.front()?.1) {
            return None;
        }
        let (id, outcome) = self.finished.pop_front()?;
        self.close(id);
        Some((id, outcome))
    }

    /// Whether a finished ticket waits to be collected.
    pub fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Gives a ticket up, whatever has become of it.
    pub fn cancel(&mut self, id: u64) -> Cancelled {
        self.settle();
        let Some(open) = self.open.get(&id) else { return Cancelled::Unknown };
        let cancelled = match &open.task {
            Some(task) => {
                task.abort();
                Cancelled::Abandoned
            }
            None => {
                self.finished.retain(|(other, _)| *other != id);
                Cancelled::Finished
            }
        };
        self.close(id);
        cancelled
    }

    fn close(&mut self, id: u64) {
        if let Some(open) = self.open.remove(&id) {
            self.bytes -= open.bytes;
            self.budget.give_back(self.uid, open.bytes);
        }
    }
}

impl Drop for Tickets {
    fn drop(&mut self) {
        self.budget.give_back(self.uid, self.bytes);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::future::{pending, poll_fn};

    fn tickets(budget: &Arc<Budget>) -> Tickets {
        Tickets::new(7, Arc::clone(budget))
    }

    fn done(byte: u8) -> Outcome {
        Ok(Zeroizing::new(vec![byte]))
    }

    #[tokio::test]
    async fn tickets_are_collected_in_the_order_in_which_they_finish() {
        let mut tickets = tickets(&Arc::default());
        let (release, held) = tokio::sync::oneshot::channel::<()>();
        tickets.reserve(1, 10).unwrap();
        tickets.run(1, async move {
            let _ = held.await;
            done(1)
        });
        tickets.reserve(2, 10).unwrap();
        tickets.finish(2, done(2));
        poll_fn(|cx| tickets.poll_finished(cx)).await;
        assert_eq!(tickets.take(|_| true), Some((2, done(2))));
        assert_eq!(tickets.take(|_| true), None);
        release.send(()).unwrap();
        poll_fn(|cx| tickets.poll_finished(cx)).await;
        assert_eq!(tickets.take(|_| false), None, "what does not fit stays");
        assert_eq!(tickets.take(|_| true), Some((1, done(1))));
        assert_eq!(tickets.bytes, 0);
    }

    #[tokio::test]
    async fn a_number_is_free_again_only_when_its_ticket_is_gone() {
        let mut tickets = tickets(&Arc::default());
        tickets.reserve(1, 10).unwrap();
        tickets.run(1, pending());
        assert_eq!(tickets.reserve(1, 10).unwrap_err().code, Code::BadRequest);
        assert_eq!(tickets.cancel(1), Cancelled::Abandoned);
        assert_eq!(tickets.cancel(1), Cancelled::Unknown);
        tickets.reserve(1, 10).unwrap();
        tickets.run(1, async { done(9) });
        poll_fn(|cx| tickets.poll_finished(cx)).await;
        assert_eq!(tickets.cancel(1), Cancelled::Finished);
        assert!(!tickets.has_finished());
    }

    #[tokio::test]
    async fn the_answer_of_a_cancelled_ticket_is_not_another_ones() {
        let mut tickets = tickets(&Arc::default());
        tickets.reserve(1, 0).unwrap();
        tickets.run(1, async { done(1) });
        // It has not begun, and ends in the moment of its abortion or not.
        assert_eq!(tickets.cancel(1), Cancelled::Abandoned);
        tickets.reserve(1, 0).unwrap();
        tickets.run(1, async { done(2) });
        poll_fn(|cx| tickets.poll_finished(cx)).await;
        assert_eq!(tickets.take(|_| true), Some((1, done(2))));
    }

    /// More than Tokio lets a task poll in one turn.
    const MANY: u64 = 1000;

    #[tokio::test]
    async fn all_that_have_finished_are_there_at_once() {
        let mut tickets = tickets(&Arc::default());
        let ended = Arc::new(());
        for id in 0..MANY {
            let running = Arc::clone(&ended);
            tickets.reserve(id, 0).unwrap();
            tickets.run(id, async move {
                drop(running);
                done(0)
            });
        }
        while Arc::strong_count(&ended) > 1 {
            tokio::task::yield_now().await;
        }
        poll_fn(|cx| tickets.poll_finished(cx)).await;
        assert_eq!(std::iter::from_fn(|| tickets.take(|_| true)).count() as u64, MANY);
    }

    #[tokio::test]
    async fn cancelled_tickets_leave_nothing() {
        let mut tickets = tickets(&Arc::default());
        for _ in 0..MANY {
            tickets.reserve(1, 0).unwrap();
            tickets.run(1, pending());
            tickets.cancel(1);
            tokio::task::yield_now().await;
        }
        assert!(tickets.running.len() < 3, "{} tasks", tickets.running.len());
    }

    #[tokio::test]
    async fn numbers_and_bytes_are_bounded_and_given_back() {
        let budget = Arc::default();
        let mut one = tickets(&budget);
        for id in 0..MAX_TICKETS as u64 {
            one.reserve(id, 0).unwrap();
            one.finish(id, done(0));
        }
        assert_eq!(one.reserve(1 << 40, 0).unwrap_err().code, Code::Busy);
        drop(one);
        let mut all: Vec<_> = (0..5).map(|_| tickets(&budget)).collect();
        let most = MAX_BYTES - OVERHEAD;
        assert_eq!(all[0].reserve(1, most + 1).unwrap_err().code, Code::Busy);
        for tickets in &mut all[..4] {
            tickets.reserve(1, most).unwrap();
        }
        assert_eq!(all[4].reserve(1, 0).unwrap_err().code, Code::Busy, "the uid has no more");
        assert_eq!(all[0].cancel(1), Cancelled::Finished);
        all[4].reserve(1, most).unwrap();
        drop(all);
        assert_eq!(budget.taken(7), 0);
    }

    #[tokio::test]
    async fn a_ticket_that_dies_says_so() {
        let mut tickets = tickets(&Arc::default());
        tickets.reserve(3, 0).unwrap();
        tickets.run(3, async { std::panic::resume_unwind(Box::new(())) });
        poll_fn(|cx| tickets.poll_finished(cx)).await;
        let (id, outcome) = tickets.take(|_| true).unwrap();
        assert_eq!((id, outcome.unwrap_err().code), (3, Code::Failed));
    }
}
