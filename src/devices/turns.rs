//! A queue in which owners take turns, so that a flood of one holds up the others by one job apiece. Knows no jobs.

use std::collections::VecDeque;

/// Jobs by who wants them, in the order of their turns.
pub struct Turns<T> {
    owners: VecDeque<(u64, VecDeque<T>)>,
    len: usize,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { owners: VecDeque::new(), len: 0 }
    }
}

impl<T> Turns<T> {
    /// Adds a job behind the others of its owner.
    pub fn push(&mut self, owner: u64, job: T) {
        self.len += 1;
        match self.owners.iter_mut().find(|(other, _)| *other == owner) {
            Some((_, jobs)) => jobs.push_back(job),
            None => self.owners.push_back((owner, VecDeque::from([job]))),
        }
    }

    /// Takes the job whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        self.pop_if(|_| true)
    }

    /// Takes the first job that `may` go, of the first owner whose next one may.
    pub fn pop_if(&mut self, may: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.owners.iter().position(|(_, jobs)| jobs.front().is_some_and(&may))?;
        let (owner, mut jobs) = self.owners.remove(at)?;
        let job = jobs.pop_front()?;
        self.len -= 1;
        if !jobs.is_empty() {
            self.owners.push_back((owner, jobs));
        }
        Some(job)
    }

    /// Takes the job whose turn it is, if it `may` go; no other goes before it.
    pub fn pop_next_if(&mut self, may: impl Fn(&T) -> bool) -> Option<T> {
        let is_next = self.owners.front().and_then(|(_, jobs)| jobs.front()).is_some_and(may);
        if is_next { self.pop() } else { None }
    }

    /// Puts a job of `owner` back that was taken, before those that it `precedes`: of its owner, and of those whose turn is next.
    /// What is put back is in the same order whichever comes first.
    pub fn put_back(&mut self, owner: u64, job: T, precedes: impl Fn(&T, &T) -> bool) {
        self.len += 1;
        let at = self.owners.iter().position(|(other, _)| *other == owner);
        let (_, mut jobs) = at.and_then(|at| self.owners.remove(at)).unwrap_or_default();
        let place = jobs.iter().position(|other| precedes(&job, other)).unwrap_or(jobs.len());
        jobs.insert(place, job);
        let waits = |(_, others): &(u64, VecDeque<T>)| {
            jobs.front().zip(others.front()).is_some_and(|(own, other)| precedes(own, other))
        };
        let turn = self.owners.iter().position(waits).unwrap_or(self.owners.len());
        self.owners.insert(turn, (owner, jobs));
    }

    /// Takes the first job of `owner` that `which` picks.
    pub fn remove(&mut self, owner: u64, which: impl Fn(&T) -> bool) -> Option<T> {
        let at = self.owners.iter().position(|(other, _)| *other == owner)?;
        let jobs = &mut self.owners[at].1;
        let job = jobs.iter().position(which).and_then(|n| jobs.remove(n))?;
        if jobs.is_empty() {
            self.owners.remove(at);
        }
        self.len -= 1;
        Some(job)
    }

    /// Of the jobs that `which` picks, takes the last of the owner with the most, if that has two more than `owner` at least.
    pub fn crowd_out(&mut self, owner: u64, which: impl Fn(&T) -> bool) -> Option<T> {
        let count = |jobs: &VecDeque<T>| jobs.iter().filter(|job| which(job)).count();
        let own = self.owners.iter().find(|(other, _)| *other == owner).map_or(0, |(_, jobs)| count(jobs));
        let counts = self.owners.iter().map(|(_, jobs)| count(jobs)).enumerate();
        let (at, _) = counts.max_by_key(|(_, count)| *count).filter(|(_, most)| *most >= own + 2)?;
        let jobs = &mut self.owners[at].1;
        let job = jobs.iter().rposition(which).and_then(|n| jobs.remove(n))?;
        self.len -= 1;
        Some(job)
    }

    /// Takes all jobs.
    pub fn take(&mut self) -> impl Iterator<Item = T> + use<T> {
        self.len = 0;
        std::mem::take(&mut self.owners).into_iter().flat_map(|(_, jobs)| jobs)
    }

    /// How many jobs wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled() -> Turns<&'static str> {
        let mut turns = Turns::default();
        for (owner, job) in [(1, "a1"), (1, "a2"), (1, "a3"), (2, "b1"), (3, "c1"), (2, "b2")] {
            turns.push(owner, job);
        }
        turns
    }

    #[test]
    fn owners_take_turns() {
        let mut turns = filled();
        let order: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        assert!(turns.is_empty());
    }

    #[test]
    fn who_may_not_go_lets_others_go_first_and_keeps_its_order() {
        let mut turns = filled();
        assert_eq!(turns.pop_if(|job| !job.starts_with('a')), Some("b1"));
        assert_eq!(turns.pop_if(|job| *job == "a2"), None, "behind one that waits");
        let order: Vec<_> = std::iter::from_fn(|| turns.pop_if(|_| true)).collect();
        assert_eq!(order, ["a1", "c1", "b2", "a2", "a3"]);
        assert_eq!(turns.len(), 0);
    }

    #[test]
    fn who_is_next_lets_nobody_go_first() {
        let mut turns = filled();
        assert_eq!(turns.pop_next_if(|job| *job == "b1"), None);
        assert_eq!(turns.pop_next_if(|job| *job == "a1"), Some("a1"));
        assert_eq!(turns.pop_next_if(|_| true), Some("b1"));
        assert_eq!(Turns::<u8>::default().pop_next_if(|_| true), None);
    }

    #[test]
    fn what_is_put_back_goes_next_whichever_comes_first() {
        // In the order in which they came.
        let came = |job: &str| ["a1", "a2", "a3", "b1", "c1", "b2"].iter().position(|other| *other == job);
        for first in 0..24 {
            let mut turns = filled();
            let mut taken: Vec<_> =
                [1, 2, 3, 1].into_iter().zip(std::iter::repeat_with(|| turns.pop()).flatten()).collect();
            for n in [first / 6, first / 2 % 3, first % 2, 0] {
                let (owner, job) = taken.remove(n);
                turns.put_back(owner, job, |a, b| came(a) < came(b));
            }
            assert_eq!(turns.len(), 6);
            let order: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
            assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        }
    }

    #[test]
    fn who_has_the_most_makes_room_for_who_has_less() {
        let mut turns = filled();
        assert_eq!(turns.crowd_out(2, |_| true), None, "two beside three");
        assert_eq!(turns.crowd_out(1, |_| true), None, "for itself");
        assert_eq!(turns.crowd_out(3, |job| *job != "a3"), None, "two beside one");
        assert_eq!(turns.crowd_out(3, |_| true), Some("a3"));
        assert_eq!(turns.crowd_out(4, |_| false), None);
        assert_eq!(turns.crowd_out(4, |job| job.starts_with('b')), Some("b2"));
        assert_eq!(turns.len(), 4);
        let order: Vec<_> = std::iter::from_fn(|| turns.pop()).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2"]);
    }

    #[test]
    fn a_job_that_is_removed_leaves_the_others_their_order() {
        let mut turns = filled();
        assert_eq!(turns.remove(1, |job| *job == "a2"), Some("a2"));
        assert_eq!(turns.remove(3, |job| *job == "c1"), Some("c1"));
        assert_eq!(turns.remove(3, |job| *job == "c1"), None);
        assert_eq!(turns.len(), 4);
        assert_eq!(turns.take().collect::<Vec<_>>(), ["a1", "a3", "b1", "b2"]);
        assert_eq!((turns.len(), turns.pop()), (0, None));
    }
}
