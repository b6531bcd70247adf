//! Bytes from a socket between the daemon and a device's process, until they are whole frames. Knows lengths only.

use zeroize::{Zeroize, Zeroizing};

use super::wire::{self, FrameError};

/// What one read takes: many frames of the usual kind, so that a busy device costs few system calls.
pub(super) const READ_SIZE: usize = 16 * 1024;

/// Bytes that have arrived and that nobody has taken. They may be PINs and secrets: what is taken is wiped, and so is a
/// buffer that has become too small.
pub(super) struct Incoming {
    bytes: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
    /// Whether the last read brought all that there was room for.
    was_full: bool,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self { bytes: buffer(READ_SIZE), start: 0, end: 0, was_full: false }
    }

    /// What `read` makes of the first frame's body, once all of it is there.
    pub(super) fn take<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<Option<T>, FrameError> {
        let Some(len) = self.frame_len()? else { return Ok(None) };
        let Some(frame) = self.bytes[self.start..self.end].get_mut(..len) else { return Ok(None) };
        let taken = read(&frame[wire::HEADER..]);
        frame.zeroize();
        self.start += len;
        Ok(Some(taken))
    }

    /// Where the next bytes go, for [`Incoming::came`], when there is no frame to take: the rest of the first one at least.
    pub(super) fn room(&mut self) -> Result<&mut [u8], FrameError> {
        let (waiting, wanted) = (self.start..self.end, self.frame_len()?.unwrap_or(0).max(READ_SIZE));
        if waiting.is_empty() && self.bytes.len() == wanted {
            (self.start, self.end) = (0, 0);
        } else if waiting.is_empty() || self.bytes.len() - self.start < wanted {
            let mut other = buffer(wanted);
            other[..waiting.len()].copy_from_slice(&self.bytes[waiting.clone()]);
            (self.bytes, self.start, self.end) = (other, 0, waiting.len());
        }
        Ok(&mut self.bytes[self.end..])
    }

    /// So many bytes were put where [`Incoming::room`] said.
    pub(super) fn came(&mut self, n: usize) {
        let room = self.bytes.len() - self.end;
        self.was_full = n >= room;
        self.end += n.min(room);
    }

    /// Whether the last read brought all that there was room for, and may have left something in the socket.
    pub(super) fn was_full(&self) -> bool {
        self.was_full
    }

    /// The length of the first frame with its header, once that is there.
    fn frame_len(&self) -> Result<Option<usize>, FrameError> {
        let header = self.bytes[self.start..self.end].first_chunk();
        header.map(|header| Ok(wire::HEADER + wire::body_len(*header)?)).transpose()
    }
}

fn buffer(len: usize) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(vec![0; len])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Puts as many of these bytes as one read would, and returns the others.
    fn put<'a>(incoming: &mut Incoming, bytes: &'a [u8]) -> &'a [u8] {
        let room = incoming.room().unwrap();
        let n = room.len().min(bytes.len());
        assert!(n > 0);
        room[..n].copy_from_slice(&bytes[..n]);
        incoming.came(n);
        &bytes[n..]
    }

    fn framed(body: &[u8]) -> Vec<u8> {
        [&u32::try_from(body.len()).unwrap().to_be_bytes()[..], body].concat()
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_and_leave_nothing(
            lens in prop::collection::vec(prop_oneof![1usize..400, 15_000usize..40_000], 1..8),
            cuts in prop::collection::vec(1usize..9000, 1..20),
        ) {
            let bodies: Vec<Vec<u8>> = lens.iter().enumerate().map(|(n, len)| vec![n as u8 + 1; *len]).collect();
            let stream = bodies.iter().flat_map(|body| framed(body)).collect::<Vec<_>>();
            let (mut incoming, mut seen, mut rest) = (Incoming::new(), Vec::new(), &stream[..]);
            let mut cuts = cuts.into_iter().cycle();
            while !rest.is_empty() {
                let cut = cuts.next().unwrap().min(rest.len());
                let left = put(&mut incoming, &rest[..cut]).len();
                rest = &rest[cut - left..];
                while let Some(body) = incoming.take(<[u8]>::to_vec).unwrap() {
                    seen.push(body);
                }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert!(incoming.bytes.iter().all(|byte| *byte == 0), "wiped");
            incoming.room().unwrap();
            prop_assert_eq!(incoming.bytes.len(), READ_SIZE, "a long frame's memory is given back");
        }
    }

    #[test]
    fn what_announces_too_much_is_refused_before_there_is_memory_for_it() {
        let mut incoming = Incoming::new();
        put(&mut incoming, &[0xff; 4]);
        assert_eq!(incoming.take(<[u8]>::len), Err(FrameError::TooLong));
        assert!(matches!(incoming.room(), Err(FrameError::TooLong)));
    }
}
