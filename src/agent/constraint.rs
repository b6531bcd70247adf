//! The constraints behind a key that is added (RFC 9987, section 3.2.7, and OpenSSH's PROTOCOL.agent). What is not
//! understood to the last byte refuses the key.

use thiserror::Error;

use crate::{
    rfc4251::{Put, Reader, WireError},
    vault::key::{Destination, Hop, HostKey},
};

/// SSH_AGENT_CONSTRAIN_LIFETIME
pub const LIFETIME: u8 = 1;
/// SSH_AGENT_CONSTRAIN_CONFIRM
pub const CONFIRM: u8 = 2;
const EXTENSION: u8 = 255;

/// OpenSSH's bounds.
const MAX_DESTINATIONS: usize = 1024;
const MAX_CERTIFICATES: usize = 1024;
const MAX_USER_PATTERN: usize = 256;

/// Why constraints refuse their key.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ConstraintError {
    /// A value is cut short or left over.
    #[error("a key constraint is malformed: {0}")]
    Wire(#[from] WireError),
    /// A number that nobody here can enforce.
    #[error("constraint {0} is not known")]
    Unknown(u8),
    /// An extension that nobody here can enforce.
    #[error("a constraint extension is not known")]
    UnknownExtension,
    /// The same constraint twice: which of them would count?
    #[error("the constraint `{0}` comes twice")]
    Twice(&'static str),
    /// A constraint that does not go with this kind of key.
    #[error("the constraint `{0}` does not go with this kind of key")]
    Misplaced(&'static str),
    /// A value out of its bounds.
    #[error("a key constraint is invalid: {0}")]
    Invalid(&'static str),
}

/// Constraints as they were sent.
#[derive(Debug, Default)]
pub struct RawConstraints<'a> {
    /// Seconds.
    pub lifetime: Option<u32>,
    /// Ask before each use.
    pub confirm: bool,
    /// `restrict-destination-v00@openssh.com`
    pub destinations: Option<Box<[Destination]>>,
    /// `sk-provider@openssh.com`
    pub sk_provider: Option<&'a str>,
    /// `associated-certs-v00@openssh.com`
    pub associated_certs: Option<AssociatedCerts<'a>>,
}

/// Certificates for the keys of a token.
#[derive(Debug)]
pub struct AssociatedCerts<'a> {
    /// Whether the plain keys are left out.
    pub cert_only: bool,
    /// The certificates' blobs.
    pub blobs: Vec<&'a [u8]>,
}

/// Reads constraints up to the end of the message.
pub fn read_constraints<'a>(r: &mut Reader<'a>) -> Result<RawConstraints<'a>, ConstraintError> {
    let mut all = RawConstraints::default();
    while !r.is_empty() {
        match r.u8()? {
            LIFETIME => once("lifetime", &mut all.lifetime, r.u32()?)?,
            CONFIRM if all.confirm => return Err(ConstraintError::Twice("confirm")),
            CONFIRM => all.confirm = true,
            EXTENSION => match r.string()? {
                b"restrict-destination-v00@openssh.com" => {
                    once("restrict-destination", &mut all.destinations, read_destinations(r.string()?)?)?;
                }
                b"sk-provider@openssh.com" => {
                    let provider = std::str::from_utf8(r.string()?)
                        .map_err(|_| ConstraintError::Invalid("the provider's path is not UTF-8"))?;
                    once("sk-provider", &mut all.sk_provider, provider)?;
                }
                b"associated-certs-v00@openssh.com" => {
                    once("associated-certs", &mut all.associated_certs, read_certificates(r)?)?;
                }
                _ => return Err(ConstraintError::UnknownExtension),
            },
            other => return Err(ConstraintError::Unknown(other)),
        }
    }
    Ok(all)
}

fn once<T>(name: &'static str, place: &mut Option<T>, value: T) -> Result<(), ConstraintError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(ConstraintError::Twice(name)),
    }
}

fn read_certificates<'a>(r: &mut Reader<'a>) -> Result<AssociatedCerts<'a>, ConstraintError> {
    let cert_only = r.bool()?;
    let mut list = Reader::new(r.string()?);
    let mut blobs = Vec::new();
    while !list.is_empty() {
        if blobs.len() == MAX_CERTIFICATES {
            return Err(ConstraintError::Invalid("more than 1024 certificates"));
        }
        blobs.push(list.string()?);
    }
    Ok(AssociatedCerts { cert_only, blobs })
}

/// Reads the value of `restrict-destination-v00@openssh.com`. An empty one leaves the key unconstrained.
pub fn read_destinations(value: &[u8]) -> Result<Box<[Destination]>, ConstraintError> {
    let mut list = Reader::new(value);
    let mut destinations = Vec::new();
    while !list.is_empty() {
        if destinations.len() == MAX_DESTINATIONS {
            return Err(ConstraintError::Invalid("more than 1024 destinations"));
        }
        let mut r = Reader::new(list.string()?);
        let (from, to) = (read_hop(r.string()?)?, read_hop(r.string()?)?);
        reserved(&mut r)?;
        r.finish()?;
        if !from.user.is_empty() || from.host.is_empty() != from.keys.is_empty() {
            return Err(ConstraintError::Invalid("a destination starts at a host without a key, or at a user"));
        }
        if to.host.is_empty() || to.keys.is_empty() {
            return Err(ConstraintError::Invalid("a destination leads to a host without a name or a key"));
        }
        destinations.push(Destination { from, to });
    }
    Ok(destinations.into_boxed_slice())
}

/// Appends what [`read_destinations`] reads.
pub fn put_destinations(out: &mut Vec<u8>, destinations: &[Destination]) {
    for Destination { from, to } in destinations {
        let mut step = Vec::new();
        for hop in [from, to] {
            let mut end = Vec::new();
            [&hop.user[..], &hop.host, b""].into_iter().for_each(|field| end.put_string(field));
            for key in &hop.keys {
                end.put_string(&key.blob);
                end.push(key.is_ca.into());
            }
            step.put_string(&end);
        }
        step.put_string(b"");
        out.put_string(&step);
    }
}

fn read_hop(bytes: &[u8]) -> Result<Hop, ConstraintError> {
    let mut r = Reader::new(bytes);
    let (user, host) = (r.string()?, r.string()?);
    reserved(&mut r)?;
    if user.len() > MAX_USER_PATTERN || user.contains(&0) || host.contains(&0) {
        return Err(ConstraintError::Invalid("a destination's user or host is too long or has a NUL"));
    }
    let mut keys = Vec::new();
    while !r.is_empty() {
        // A host's key of a type unknown here is kept: it matches nothing, since no bind with it is ever accepted.
        keys.push(HostKey { blob: r.string()?.into(), is_ca: r.bool()? });
    }
    Ok(Hop { user: user.into(), host: host.into(), keys: keys.into_boxed_slice() })
}

/// A field that a later version may fill with a condition that we would not enforce.
fn reserved(r: &mut Reader<'_>) -> Result<(), ConstraintError> {
    if r.string()?.is_empty() { Ok(()) } else { Err(ConstraintError::UnknownExtension) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{public_key::PublicKey, rfc4251::Put};
    use proptest::prelude::*;
    use ssh_agent_lib::proto::extension::{DestinationConstraint, HostTuple, KeySpec, RestrictDestination};
    use ssh_encoding::Encode as _;

    fn extension(name: &str, value: &[u8]) -> Vec<u8> {
        let mut out = vec![EXTENSION];
        out.put_string(name.as_bytes());
        out.extend_from_slice(value);
        out
    }

    fn refused(bytes: &[u8]) -> ConstraintError {
        read_constraints(&mut Reader::new(bytes)).unwrap_err()
    }

    #[test]
    fn what_is_not_understood_refuses() {
        assert_eq!(refused(&[1, 0, 0, 0, 5, 1, 0, 0, 0, 5]), ConstraintError::Twice("lifetime"));
        assert_eq!(refused(&[2, 2]), ConstraintError::Twice("confirm"));
        assert_eq!(refused(&[3, 0, 0, 0, 1]), ConstraintError::Unknown(3));
        assert_eq!(refused(&[1, 0, 0]), ConstraintError::Wire(WireError::Truncated));
        assert_eq!(refused(&extension("new@example.com", &[])), ConstraintError::UnknownExtension);
        let mut provider = Vec::new();
        provider.put_string(b"internal");
        let provider = extension("sk-provider@openssh.com", &provider);
        assert_eq!(refused(&[&provider[..], &provider].concat()), ConstraintError::Twice("sk-provider"));
        let all = [&provider[..], &[2, 1, 0, 0, 0, 9]].concat();
        let all = read_constraints(&mut Reader::new(&all)).unwrap();
        assert_eq!((all.sk_provider, all.confirm, all.lifetime), (Some("internal"), true, Some(9)));
    }

    #[test]
    fn associated_certificates_as_openssh_writes_them() {
        let (mut list, mut value) = (Vec::new(), vec![1]);
        list.put_string(b"one");
        list.put_string(b"two");
        value.put_string(&list);
        let bytes = extension("associated-certs-v00@openssh.com", &value);
        let certs = read_constraints(&mut Reader::new(&bytes)).unwrap().associated_certs.unwrap();
        assert_eq!((certs.cert_only, &certs.blobs[..]), (true, &[&b"one"[..], b"two"][..]));
    }

    fn tuple(user: &str, host: &str, keys: &[u8]) -> HostTuple {
        let keys = keys
            .iter()
            .map(|&b| KeySpec { keyblob: ssh_key::public::Ed25519PublicKey([b; 32]).into(), is_ca: b % 2 == 0 })
            .collect();
        HostTuple { username: user.into(), hostname: host.into(), keys }
    }

    fn encoded(from: HostTuple, to: HostTuple) -> Vec<u8> {
        let mut out = Vec::new();
        RestrictDestination { constraints: vec![DestinationConstraint { from, to }] }.encode(&mut out).unwrap();
        out
    }

    #[test]
    fn destinations_are_checked() {
        let origin = || tuple("", "", &[]);
        assert!(read_destinations(&encoded(origin(), tuple("u", "h", &[1]))).is_ok());
        for (from, to) in [
            (tuple("u", "", &[]), tuple("", "h", &[1])),
            (tuple("", "f", &[]), tuple("", "h", &[1])),
            (tuple("", "", &[1]), tuple("", "h", &[1])),
            (origin(), tuple("", "", &[1])),
            (origin(), tuple("", "h", &[])),
            (origin(), tuple(&"u".repeat(257), "h", &[1])),
        ] {
            assert!(matches!(read_destinations(&encoded(from, to)), Err(ConstraintError::Invalid(_))));
        }
        let mut filled = encoded(origin(), tuple("", "h", &[1]));
        // The last reserved field, filled with a byte: the lengths around it grow by one.
        filled[3] += 1;
        let at = filled.len() - 1;
        filled[at] = 1;
        filled.push(b'x');
        assert_eq!(read_destinations(&filled), Err(ConstraintError::UnknownExtension));
        assert_eq!(read_destinations(&[]), Ok(Box::default()));
    }

    proptest! {
        #[test]
        fn another_codec_agrees(user in "[a-z*]{0,8}", host in "[a-z.]{1,8}", keys in prop::collection::vec(any::<u8>(), 1..4)) {
            let bytes = encoded(tuple("", "from", &keys), tuple(&user, &host, &keys));
            let read = read_destinations(&bytes).unwrap();
            prop_assert_eq!(&*read[0].to.user, user.as_bytes());
            prop_assert_eq!(&*read[0].to.host, host.as_bytes());
            let mut written = Vec::new();
            put_destinations(&mut written, &read);
            prop_assert_eq!(written, bytes);
            for (key, byte) in read[0].from.keys.iter().zip(&keys) {
                prop_assert_eq!(&*key.blob, PublicKey::Ed25519(&[*byte; 32]).to_blob());
                prop_assert_eq!(key.is_ca, byte % 2 == 0);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = read_constraints(&mut Reader::new(&bytes));
            let _ = read_destinations(&bytes);
        }
    }
}
