//! Length-bounded frames (RFC 9987, section 3). Knows bytes and nothing of what they mean.

use thiserror::Error;
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

/// Bytes that wait for the rest of their frame. They may be private keys and PINs, so whatever leaves this buffer is
/// wiped, the places it grew out of included. It grows by what has arrived, never by what was announced.
#[derive(Default)]
pub struct Backlog(Vec<u8>);

impl Backlog {
    /// What is waiting.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Appends what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        let needed = self.0.len() + bytes.len();
        if needed > self.0.capacity() {
            let mut larger = Vec::with_capacity(needed.max(2 * self.0.len()));
            larger.extend_from_slice(&self.0);
            self.0.zeroize();
            self.0 = larger;
        }
        self.0.extend_from_slice(bytes);
    }

    /// Drops the first `n` bytes; an empty backlog holds no memory.
    pub fn consume(&mut self, n: usize) {
        if n == 0 {
            return;
        }
        let n = n.min(self.0.len());
        let left = self.0.len() - n;
        self.0.copy_within(n.., 0);
        self.0[left..].zeroize();
        self.0.truncate(left);
        if left == 0 {
            self.0 = Vec::new();
        }
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.0.zeroize();
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
