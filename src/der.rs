//! As much of DER (X.690) as public keys and signatures need. Knows tags and lengths, nothing of what they mean.

use thiserror::Error;

/// INTEGER
pub const INTEGER: u8 = 0x02;
/// BIT STRING
pub const BIT_STRING: u8 = 0x03;
/// NULL
pub const NULL: u8 = 0x05;
/// OBJECT IDENTIFIER
pub const OID: u8 = 0x06;
/// SEQUENCE
pub const SEQUENCE: u8 = 0x30;

/// The bytes are not the value that was expected.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("it is not the DER that was expected")]
pub struct DerError;

/// A cursor over borrowed bytes.
#[derive(Clone, Copy)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Starts at the first of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The tag of the next value.
    pub fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// The contents of the next value, whose tag must be this.
    pub fn value(&mut self, tag: u8) -> Result<&'a [u8], DerError> {
        let (&found, rest) = self.0.split_first().ok_or(DerError)?;
        let (&first, rest) = rest.split_first().ok_or(DerError)?;
        let (len, rest) = match first {
            short @ 0..=0x7f => (usize::from(short), rest),
            // Four bytes of length are more than any file here has.
            0x81..=0x84 => {
                let (digits, rest) = rest.split_at_checked(usize::from(first - 0x80)).ok_or(DerError)?;
                let len = digits.iter().fold(0, |len, digit| len << 8 | usize::from(*digit));
                if len < 0x80 || digits[0] == 0 {
                    return Err(DerError);
                }
                (len, rest)
            }
            _ => return Err(DerError),
        };
        let (value, rest) = rest.split_at_checked(len).ok_or(DerError)?;
        if found != tag {
            return Err(DerError);
        }
        self.0 = rest;
        Ok(value)
    }

    /// The next value, tag and length included; the cursor stays before it.
    pub fn whole(&self, tag: u8) -> Result<&'a [u8], DerError> {
        let mut ahead = *self;
        ahead.value(tag)?;
        Ok(&self.0[..self.0.len() - ahead.0.len()])
    }

    /// What is inside the next SEQUENCE.
    pub fn sequence(&mut self) -> Result<Reader<'a>, DerError> {
        self.value(SEQUENCE).map(Reader)
    }

    /// An INTEGER that is not negative, as its magnitude without leading zeros.
    pub fn unsigned(&mut self) -> Result<&'a [u8], DerError> {
        match self.value(INTEGER)? {
            [0] => Ok(&[]),
            [0, rest @ ..] if rest[0] & 0x80 != 0 => Ok(rest),
            [] | [0, ..] => Err(DerError),
            [first, ..] if first & 0x80 != 0 => Err(DerError),
            digits => Ok(digits),
        }
    }

    /// A BIT STRING of whole bytes.
    pub fn bits(&mut self) -> Result<&'a [u8], DerError> {
        self.value(BIT_STRING)?.strip_prefix(&[0]).ok_or(DerError)
    }

    /// Ends the reading: an error if anything is left.
    pub fn finish(self) -> Result<(), DerError> {
        if self.0.is_empty() { Ok(()) } else { Err(DerError) }
    }
}

/// Appends a value.
pub fn put(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    let len = value.len();
    let bytes = len.to_be_bytes();
    let digits = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
    if let [short @ 0..=0x7f] = digits {
        out.push(*short);
    } else if digits.is_empty() {
        out.push(0);
    } else {
        out.push(0x80 | digits.len() as u8);
        out.extend_from_slice(digits);
    }
    out.extend_from_slice(value);
}

/// Appends an INTEGER from an unsigned big-endian magnitude.
pub fn put_unsigned(out: &mut Vec<u8>, magnitude: &[u8]) {
    let digits = &magnitude[magnitude.iter().take_while(|byte| **byte == 0).count()..];
    let sign = digits.first().is_none_or(|byte| byte & 0x80 != 0);
    put(out, INTEGER, &[if sign { &[0][..] } else { &[] }, digits].concat());
}

/// `r ‖ s` as an ECDSA-Sig-Value (RFC 3279, section 2.2.3).
pub fn ecdsa_signature(fixed: &[u8]) -> Vec<u8> {
    let (r, s) = fixed.split_at(fixed.len() / 2);
    let mut integers = Vec::with_capacity(fixed.len() + 8);
    put_unsigned(&mut integers, r);
    put_unsigned(&mut integers, s);
    let mut out = Vec::with_capacity(integers.len() + 3);
    put(&mut out, SEQUENCE, &integers);
    out
}

/// An ECDSA-Sig-Value as `r ‖ s`, each of this length.
pub fn read_ecdsa_signature(der: &[u8], scalar_len: usize) -> Result<Vec<u8>, DerError> {
    let mut r = Reader::new(der);
    let mut integers = r.sequence()?;
    r.finish()?;
    let mut fixed = Vec::with_capacity(2 * scalar_len);
    for _ in ["r", "s"] {
        let half = integers.unsigned()?;
        fixed.resize(fixed.len() + scalar_len.checked_sub(half.len()).ok_or(DerError)?, 0);
        fixed.extend_from_slice(half);
    }
    integers.finish()?;
    Ok(fixed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn signatures_are_what_openssl_writes() {
        assert_eq!(ecdsa_signature(&[0, 1, 0x80, 0]), [0x30, 8, 2, 1, 1, 2, 3, 0, 0x80, 0]);
        let long = ecdsa_signature(&[0xff; 132]);
        assert_eq!((&long[..6], long.len()), (&[0x30, 0x81, 138, 2, 67, 0][..], 141));
    }

    #[test]
    fn a_length_has_one_form() {
        for bad in [&[4, 0x81, 0x7f][..], &[4, 0x80], &[4, 0x82, 0, 0x80], &[4, 0x85, 1, 1, 1, 1, 1], &[4, 2, 0], &[4]]
        {
            assert_eq!(Reader::new(bad).value(4), Err(DerError));
        }
        for bad in [&[2, 0][..], &[2, 1, 0x80], &[2, 2, 0, 1]] {
            assert_eq!(Reader::new(bad).unsigned(), Err(DerError));
        }
    }

    proptest! {
        #[test]
        fn values_round_trip(value in prop::collection::vec(any::<u8>(), 0..70_000), magnitude: Vec<u8>) {
            let mut out = Vec::new();
            put(&mut out, 4, &value);
            put_unsigned(&mut out, &magnitude);
            let mut r = Reader::new(&out);
            prop_assert_eq!(r.value(4), Ok(&value[..]));
            let digits: Vec<u8> = magnitude.iter().copied().skip_while(|byte| *byte == 0).collect();
            prop_assert_eq!(r.unsigned(), Ok(&digits[..]));
            prop_assert_eq!(r.finish(), Ok(()));
        }

        #[test]
        fn signatures_round_trip(fixed in prop::collection::vec(any::<u8>(), 132)) {
            prop_assert_eq!(read_ecdsa_signature(&ecdsa_signature(&fixed), 66), Ok(fixed));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = read_ecdsa_signature(&bytes, 32);
            let mut r = Reader::new(&bytes);
            while let Some(tag) = r.peek() {
                if r.whole(tag).is_err() || r.value(tag).is_err() {
                    break;
                }
            }
        }
    }
}
