//! As much of DER (X.690) as public keys, curves and certificates on tokens contain. Knows bytes and tags.

pub(super) const INTEGER: u8 = 0x02;
pub(super) const BIT_STRING: u8 = 0x03;
pub(super) const OCTET_STRING: u8 = 0x04;
pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
pub(super) const UTF8_STRING: u8 = 0x0c;
pub(super) const PRINTABLE_STRING: u8 = 0x13;
pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const SET: u8 = 0x31;
/// `[0]`, constructed: a certificate's version.
pub(super) const CONTEXT_0: u8 = 0xa0;

/// A cursor over elements that follow each other. Never allocates.
#[derive(Clone, Copy)]
pub(super) struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether everything has been read.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The tag of the next element.
    pub(super) fn tag(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// The contents of the next element, if it has this tag.
    pub(super) fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.tag()? != tag { None } else { self.any().map(|(_, contents)| contents) }
    }

    /// The next element, and its contents.
    pub(super) fn any(&mut self) -> Option<(&'a [u8], &'a [u8])> {
        let (&[_, first], rest) = self.0.split_first_chunk::<2>()?;
        let (len, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            // A length of up to four bytes: no attribute is longer.
            0x81..=0x84 => {
                let (len, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (len.iter().fold(0, |len, byte| len << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (contents, rest) = rest.split_at_checked(len)?;
        let whole = &self.0[..self.0.len() - rest.len()];
        self.0 = rest;
        Some((whole, contents))
    }

    /// What is inside the next element, if it has this tag.
    pub(super) fn inside(&mut self, tag: u8) -> Option<Self> {
        self.take(tag).map(Self)
    }
}

/// The contents of an element that is all there is.
pub(super) fn only(bytes: &[u8], tag: u8) -> Option<&[u8]> {
    let mut der = Der::new(bytes);
    let contents = der.take(tag)?;
    der.is_empty().then_some(contents)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn elements_are_read_one_after_another() {
        let mut der = Der::new(&[0x30, 3, 2, 1, 5, 4, 0x81, 1, 7]);
        assert_eq!(der.inside(SEQUENCE).and_then(|mut inner| inner.take(INTEGER)), Some(&[5][..]));
        assert_eq!(der.take(SEQUENCE), None);
        assert_eq!(der.any(), Some((&[4, 0x81, 1, 7][..], &[7][..])));
        assert!(der.is_empty());
        assert_eq!(only(&[4, 1, 7], OCTET_STRING), Some(&[7][..]));
        assert_eq!(only(&[4, 1, 7, 0], OCTET_STRING), None);
        assert_eq!(Der::new(&[4, 0x80, 0, 0]).any(), None);
        assert_eq!(Der::new(&[4, 0x84, 0xff, 0xff, 0xff, 0xff]).any(), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_end(bytes: Vec<u8>) {
            let mut der = Der::new(&bytes);
            while let Some((whole, contents)) = der.any() {
                prop_assert!(whole.len() >= contents.len() + 2);
            }
        }
    }
}
