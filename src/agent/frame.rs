//! Length-bounded frames (RFC 9987, section 3). Knows bytes, when they came, and nothing of what they mean.

use std::{collections::VecDeque, time::Duration};

use thiserror::Error;
use tokio::time::Instant;
use zeroize::Zeroize;

/// The longest message body, as in OpenSSH; a longer one costs its connection.
pub const MAX_FRAME: usize = 256 * 1024;

/// A frame that breaks the rules.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// A message without even a type.
    #[error("an empty message")]
    Empty,
    /// A length above [`MAX_FRAME`].
    #[error("a message of {0} bytes, more than 262144")]
    TooLong(u32),
}

/// The body of the first frame in `bytes`, or `None` when it is not complete yet. The frame takes 4 bytes more.
#[inline]
pub fn first(bytes: &[u8]) -> Result<Option<&[u8]>, FrameError> {
    let Some((head, rest)) = bytes.split_first_chunk::<4>() else {
        return Ok(None);
    };
    match u32::from_be_bytes(*head) {
        0 => Err(FrameError::Empty),
        long if long as usize > MAX_FRAME => Err(FrameError::TooLong(long)),
        len => Ok(rest.get(..len as usize)),
    }
}

/// Appends to a buffer that may hold secrets: what it grew out of is wiped.
pub(super) fn append(buffer: &mut Vec<u8>, bytes: &[u8]) {
    let needed = buffer.len() + bytes.len();
    if needed > buffer.capacity() {
        let mut larger = Vec::with_capacity(needed.max(2 * buffer.len()));
        larger.extend_from_slice(buffer);
        buffer.zeroize();
        *buffer = larger;
    }
    buffer.extend_from_slice(bytes);
}

/// What arrives within this counts as having come at once: the memory for times is bounded by time.
const MOMENT: Duration = Duration::from_millis(1);

/// Bytes that wait for the rest of their frame. They may be private keys and PINs, so whatever leaves this buffer is
/// wiped, the places it grew out of included. It grows by what has arrived, never by what was announced.
#[derive(Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    /// How many bytes have left it since it was made.
    consumed: usize,
    /// Which of all bytes had arrived when, by the number of the one behind the last.
    arrivals: VecDeque<(usize, Instant)>,
}

impl Backlog {
    /// What is waiting.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends what arrives now.
    pub fn push(&mut self, bytes: &[u8]) {
        self.push_at(bytes, Instant::now());
    }

    fn push_at(&mut self, bytes: &[u8], now: Instant) {
        append(&mut self.bytes, bytes);
        let end = self.consumed + self.bytes.len();
        match self.arrivals.back_mut() {
            Some((last, at)) if now.duration_since(*at) < MOMENT => *last = end,
            _ => self.arrivals.push_back((end, now)),
        }
    }

    /// When the first `n` bytes had arrived, to a millisecond; now for bytes that have not.
    pub fn arrived(&self, n: usize) -> Instant {
        let at = self.arrivals.partition_point(|(end, _)| *end < self.consumed + n);
        self.arrivals.get(at).map_or_else(Instant::now, |(_, at)| *at)
    }

    /// Drops the first `n` bytes; an empty backlog holds no memory.
    pub fn consume(&mut self, n: usize) {
        if n == 0 {
            return;
        }
        let n = n.min(self.bytes.len());
        let left = self.bytes.len() - n;
        self.bytes.copy_within(n.., 0);
        self.bytes[left..].zeroize();
        self.bytes.truncate(left);
        self.consumed += n;
        while self.arrivals.front().is_some_and(|(end, _)| *end <= self.consumed) {
            self.arrivals.pop_front();
        }
        if left == 0 {
            *self = Self::default();
        }
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bounds_are_exact() {
        assert_eq!(first(&[0, 0, 0, 0]), Err(FrameError::Empty));
        assert_eq!(first(&[0, 0, 0]), Ok(None));
        assert_eq!(first(&[0, 4, 0, 0]), Ok(None));
        assert_eq!(first(&[0, 4, 0, 1]), Err(FrameError::TooLong(262_145)));
        assert_eq!(first(&[255; 5]), Err(FrameError::TooLong(u32::MAX)));
        assert_eq!(first(&[0, 0, 0, 1, 11, 9]), Ok(Some(&[11][..])));
    }

    #[test]
    fn bytes_have_the_time_of_their_arrival() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut backlog = Backlog::default();
        backlog.push_at(&[1; 10], at(0));
        backlog.push_at(&[2; 10], at(5));
        backlog.push_at(&[3; 10], at(9));
        let times = |backlog: &Backlog, ends: &[usize]| ends.iter().map(|n| backlog.arrived(*n)).collect::<Vec<_>>();
        assert_eq!(times(&backlog, &[1, 10, 11, 20, 30]), [at(0), at(0), at(5), at(5), at(9)]);
        backlog.consume(15);
        assert_eq!(times(&backlog, &[1, 5, 6, 15]), [at(5), at(5), at(9), at(9)]);
        backlog.consume(15);
        backlog.push_at(&[4], at(20));
        assert_eq!(backlog.arrived(1), at(20));
        for _ in 0..1000 {
            backlog.push_at(&[5], at(20));
        }
        assert_eq!(backlog.arrivals.len(), 1);
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..8),
            cuts in prop::collection::vec(1usize..50, 1..40),
        ) {
            let stream: Vec<u8> = bodies
                .iter()
                .flat_map(|b| [&u32::try_from(b.len()).unwrap().to_be_bytes()[..], b].concat())
                .collect();
            let (mut backlog, mut seen, mut rest) = (Backlog::default(), Vec::new(), &stream[..]);
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let (head, tail) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                rest = tail;
                backlog.push(head);
                while let Some(body) = first(backlog.bytes()).unwrap().map(<[u8]>::to_vec) {
                    backlog.consume(4 + body.len());
                    seen.push(body);
                }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert!(backlog.bytes().is_empty());
        }
    }
}
