//! The data types of RFC 4251, section 5, read from and written to byte slices. Knows nothing above them.
//!
//! Reading borrows: a [`Reader`] never allocates, whatever length the peer claims.

use thiserror::Error;

/// Why bytes are not the value that was expected.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// The bytes end before the value does, or a length points past their end.
    #[error("the message ends too early")]
    Truncated,
    /// Bytes are left over behind the last value.
    #[error("bytes are left over at the end")]
    Trailing,
    /// An mpint is negative, or not in its shortest form.
    #[error("an integer is negative or padded")]
    BadInteger,
    /// A text is not UTF-8.
    #[error("a text is not UTF-8")]
    NotText,
    /// A value is none that its place allows.
    #[error("a value is out of bounds")]
    OutOfBounds,
}

/// A cursor over borrowed bytes.
#[derive(Clone, Copy)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Starts at the first of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What has not been read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// Whether everything has been read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `n` bytes, without a length in front.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    /// `byte`.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        let (&first, tail) = self.0.split_first().ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(first)
    }

    /// `boolean`: every non-zero byte is true (RFC 4251).
    pub fn bool(&mut self) -> Result<bool, WireError> {
        Ok(self.u8()? != 0)
    }

    /// `uint32`.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(u32::from_be_bytes(*head))
    }

    /// `uint64`.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        let (head, tail) = self.0.split_first_chunk().ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(u64::from_be_bytes(*head))
    }

    /// `string`: a length and that many bytes of any kind.
    pub fn string(&mut self) -> Result<&'a [u8], WireError> {
        let len = self.u32()? as usize;
        self.take(len)
    }

    /// `mpint` that is not negative, as its magnitude without leading zeros.
    pub fn mpint(&mut self) -> Result<&'a [u8], WireError> {
        match self.string()? {
            [0, rest @ ..] if rest.first().is_some_and(|b| b & 0x80 != 0) => Ok(rest),
            [0, ..] => Err(WireError::BadInteger),
            [first, ..] if first & 0x80 != 0 => Err(WireError::BadInteger),
            bytes => Ok(bytes),
        }
    }

    /// Ends the reading: an error if anything is left.
    pub fn finish(self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Trailing) }
    }
}

/// Appends RFC 4251 values to a buffer.
pub trait Put {
    /// `uint32`.
    fn put_u32(&mut self, value: u32);
    /// `uint64`.
    fn put_u64(&mut self, value: u64);
    /// `string`.
    fn put_string(&mut self, bytes: &[u8]);
    /// `mpint` from an unsigned big-endian magnitude; leading zeros are dropped.
    fn put_mpint(&mut self, magnitude: &[u8]);
}

impl Put for Vec<u8> {
    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_string(&mut self, bytes: &[u8]) {
        self.put_u32(length(bytes.len()));
        self.extend_from_slice(bytes);
    }

    fn put_mpint(&mut self, magnitude: &[u8]) {
        let digits = &magnitude[magnitude.iter().take_while(|&&b| b == 0).count()..];
        let sign = digits.first().is_some_and(|b| b & 0x80 != 0);
        self.put_u32(length(digits.len() + usize::from(sign)));
        if sign {
            self.push(0);
        }
        self.extend_from_slice(digits);
    }
}

/// A length as the wire has it. Nothing in this program comes near 4 GiB: frames end at 256 KiB.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_mpint_has_one_form() {
        for (magnitude, wire) in [
            (&[][..], &[0, 0, 0, 0][..]),
            (&[0, 0, 1], &[0, 0, 0, 1, 1]),
            (&[0x80], &[0, 0, 0, 2, 0, 0x80]),
            (&[0x7f, 0xff], &[0, 0, 0, 2, 0x7f, 0xff]),
        ] {
            let mut out = Vec::new();
            out.put_mpint(magnitude);
            assert_eq!(out, wire);
        }
        for bad in [&[0, 0, 0, 1, 0x80][..], &[0, 0, 0, 1, 0], &[0, 0, 0, 2, 0, 1]] {
            assert_eq!(Reader::new(bad).mpint(), Err(WireError::BadInteger));
        }
    }

    proptest! {
        #[test]
        fn values_round_trip(string: Vec<u8>, magnitude: Vec<u8>, number: u32) {
            let mut out = Vec::new();
            out.put_string(&string);
            out.put_mpint(&magnitude);
            out.put_u32(number);
            let mut r = Reader::new(&out);
            prop_assert_eq!(r.string().unwrap(), &string[..]);
            let trimmed: Vec<u8> = magnitude.iter().copied().skip_while(|&b| b == 0).collect();
            prop_assert_eq!(r.mpint().unwrap(), &trimmed[..]);
            prop_assert_eq!(r.u32().unwrap(), number);
            prop_assert!(r.finish().is_ok());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let mut r = Reader::new(&bytes);
            while r.string().is_ok() || r.mpint().is_ok() || r.u64().is_ok() || r.u8().is_ok() {}
            prop_assert!(r.is_empty());
        }
    }
}
