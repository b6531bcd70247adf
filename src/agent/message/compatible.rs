//! Messages of other agents, which clients speak already: those of openpgp-card-ssh-agent (`…@metacode.biz`) and of
//! pivy-agent (`…@joyent.com`, `…@arekinath.github.io`). Knows their fields. A failure is a bare 28; it has no reason.

use super::RequestError;
use crate::{
    agent::wire::{number, put_frame},
    rfc4251::{Put, Reader, WireError},
};

macro_rules! names {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// The messages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Name {
            $($(#[$doc])* $variant,)*
        }

        impl Name {
            /// Every message.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in a frame, and in the answer to `query`.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

names! {
    /// Lists the keys that decrypt or agree on secrets.
    DecryptDeriveIds = "decrypt-derive-ids@metacode.biz",
    /// Decrypts with an RSA key, agrees on a secret with any other.
    DecryptDerive = "decrypt-derive@metacode.biz",
    /// Agrees on a secret with a NIST key.
    Ecdh = "ecdh@joyent.com",
    /// Signs a digest.
    SignPrehash = "sign-prehash@arekinath.github.io",
}

impl Name {
    /// The message with this name.
    pub fn from_bytes(name: &[u8]) -> Option<Self> {
        Self::ALL.iter().copied().find(|known| known.as_str().as_bytes() == name)
    }
}

/// A request, borrowed from its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// `decrypt-derive-ids@metacode.biz`
    DecryptDeriveIds,
    /// `decrypt-derive@metacode.biz`
    DecryptDerive {
        /// The key's blob. An X25519 key stands in an `ssh-ed25519` blob.
        key: &'a [u8],
        /// The ciphertext, or the peer's public key.
        data: &'a [u8],
    },
    /// `ecdh@joyent.com`
    Ecdh {
        /// The key's blob.
        key: &'a [u8],
        /// The peer's public key, as an SSH blob on the same curve.
        partner: &'a [u8],
    },
    /// `sign-prehash@arekinath.github.io`
    SignPrehash {
        /// The key's blob.
        key: &'a [u8],
        /// The digest.
        digest: &'a [u8],
    },
}

impl<'a> Request<'a> {
    /// Reads the body of the message with this name, to its end.
    pub fn read(name: Name, body: &'a [u8]) -> Result<Self, RequestError> {
        let mut r = Reader::new(body);
        let request = match name {
            Name::DecryptDeriveIds => Self::DecryptDeriveIds,
            Name::DecryptDerive => {
                let request = Self::DecryptDerive { key: r.string()?, data: r.string()? };
                no_flags(&mut r)?;
                request
            }
            Name::Ecdh => {
                // All fields stand in one string.
                let mut inner = Reader::new(r.string()?);
                let request = Self::Ecdh { key: inner.string()?, partner: inner.string()? };
                no_flags(&mut inner)?;
                inner.finish()?;
                request
            }
            Name::SignPrehash => {
                let request = Self::SignPrehash { key: r.string()?, digest: r.string()? };
                no_flags(&mut r)?;
                request
            }
        };
        r.finish()?;
        Ok(request)
    }

    /// The message that it is.
    pub fn name(&self) -> Name {
        match self {
            Self::DecryptDeriveIds => Name::DecryptDeriveIds,
            Self::DecryptDerive { .. } => Name::DecryptDerive,
            Self::Ecdh { .. } => Name::Ecdh,
            Self::SignPrehash { .. } => Name::SignPrehash,
        }
    }

    /// Appends the whole frame.
    pub fn put(&self, out: &mut Vec<u8>) {
        put_frame(out, number::EXTENSION, |out| {
            out.put_string(self.name().as_str().as_bytes());
            match self {
                Self::DecryptDeriveIds => {}
                Self::DecryptDerive { key, data: value } | Self::SignPrehash { key, digest: value } => {
                    put_fields(out, key, value);
                }
                Self::Ecdh { key, partner } => {
                    let mut inner = Vec::new();
                    put_fields(&mut inner, key, partner);
                    out.put_string(&inner);
                }
            }
        });
    }
}

/// No flag has been given a meaning.
fn no_flags(r: &mut Reader<'_>) -> Result<(), RequestError> {
    if r.u32()? == 0 { Ok(()) } else { Err(RequestError::Invalid("no flag of this message is known")) }
}

fn put_fields(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    out.put_string(key);
    out.put_string(value);
    out.put_u32(0);
}

/// Appends the answer to `decrypt-derive-ids@metacode.biz`: blobs and comments, as in a list of identities.
pub fn put_identities<'a>(out: &mut Vec<u8>, identities: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
    put_frame(out, number::EXTENSION_RESPONSE, |out| {
        out.put_string(Name::DecryptDeriveIds.as_str().as_bytes());
        out.put_u32(u32::try_from(identities.len()).unwrap_or(u32::MAX));
        for (blob, comment) in identities {
            out.put_string(blob);
            out.put_string(comment);
        }
    });
}

/// Appends the answer to one of the other three. pivy's clients want SSH_AGENT_SUCCESS with data behind it, and no name.
pub fn put_result(out: &mut Vec<u8>, name: Name, result: &[u8]) {
    // The buffer grows before the answer is in it, so that growing leaves no copy of a secret behind.
    out.reserve(4 + 1 + 4 + name.as_str().len() + 4 + result.len());
    match name {
        Name::DecryptDeriveIds | Name::DecryptDerive => put_frame(out, number::EXTENSION_RESPONSE, |out| {
            out.put_string(name.as_str().as_bytes());
            out.put_string(result);
        }),
        Name::Ecdh | Name::SignPrehash => put_frame(out, number::SUCCESS, |out| out.put_string(result)),
    }
}

/// Reads the answer to one of the three from a frame's body.
pub fn read_result(name: Name, body: &[u8]) -> Result<Option<&[u8]>, WireError> {
    let mut r = Reader::new(body);
    match (name, r.u8()?) {
        (Name::Ecdh | Name::SignPrehash, number::SUCCESS) => {}
        (Name::DecryptDerive, number::EXTENSION_RESPONSE) if r.string()? == name.as_str().as_bytes() => {}
        _ => return Ok(None),
    }
    r.string().map(Some)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_round_trip(key: Vec<u8>, value: Vec<u8>) {
            for request in [
                Request::DecryptDeriveIds,
                Request::DecryptDerive { key: &key, data: &value },
                Request::Ecdh { key: &key, partner: &value },
                Request::SignPrehash { key: &key, digest: &value },
            ] {
                let mut frame = Vec::new();
                request.put(&mut frame);
                let mut r = Reader::new(&frame[5..]);
                let name = Name::from_bytes(r.string().unwrap()).unwrap();
                prop_assert_eq!(Request::read(name, r.rest()), Ok(request));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(body: Vec<u8>) {
            for name in Name::ALL {
                let _ = Request::read(*name, &body);
                let _ = read_result(*name, &body);
            }
        }

        #[test]
        fn results_round_trip(result: Vec<u8>) {
            for name in [Name::DecryptDerive, Name::Ecdh, Name::SignPrehash] {
                let mut frame = Vec::new();
                put_result(&mut frame, name, &result);
                prop_assert_eq!(read_result(name, &frame[4..]), Ok(Some(&result[..])));
            }
        }
    }
}
