//! Bytes ↔ requests and replies (RFC 9987, section 3). Knows the messages' shapes, not what is done about them.
//!
//! The codecs are our own because none on the registry can serve as an agent's: comments need not be UTF-8, sk
//! certificates and the ML-DSA composite must be read, and a request must cost no more memory than its frame.

use std::sync::Arc;

use thiserror::Error;

use super::{
    constraint::{ConstraintError, RawConstraints, read_constraints},
    message::Name,
};
use crate::{
    devices::{Hash, Signature, soft::SoftParts},
    public_key::{Blob, KeyError, KeyType, PublicKey},
    rfc4251::{Put, Reader, WireError},
    sys::rsa::RsaIntegers,
    vault::key::Identity,
};

/// Message numbers of RFC 9987, section 6.1.
pub mod number {
    /// The request failed, or is unknown.
    pub const FAILURE: u8 = 5;
    /// The request is done.
    pub const SUCCESS: u8 = 6;
    /// Protocol 1's remove-all, which OpenSSH still sends; treated as [`REMOVE_ALL`].
    pub const REMOVE_ALL_RSA: u8 = 9;
    /// List the identities.
    pub const REQUEST_IDENTITIES: u8 = 11;
    /// The list.
    pub const IDENTITIES_ANSWER: u8 = 12;
    /// Sign.
    pub const SIGN_REQUEST: u8 = 13;
    /// The signature.
    pub const SIGN_RESPONSE: u8 = 14;
    /// Add a key.
    pub const ADD_IDENTITY: u8 = 17;
    /// Remove a key.
    pub const REMOVE_IDENTITY: u8 = 18;
    /// Remove all keys.
    pub const REMOVE_ALL: u8 = 19;
    /// Add the keys of a token.
    pub const ADD_SMARTCARD: u8 = 20;
    /// Remove the keys of a token.
    pub const REMOVE_SMARTCARD: u8 = 21;
    /// Lock the agent.
    pub const LOCK: u8 = 22;
    /// Unlock it.
    pub const UNLOCK: u8 = 23;
    /// Add a key with constraints.
    pub const ADD_CONSTRAINED: u8 = 25;
    /// Add the keys of a token with constraints.
    pub const ADD_SMARTCARD_CONSTRAINED: u8 = 26;
    /// An extension, by name.
    pub const EXTENSION: u8 = 27;
    /// A known extension failed.
    pub const EXTENSION_FAILURE: u8 = 28;
    /// A known extension's answer.
    pub const EXTENSION_RESPONSE: u8 = 29;
}

/// Why a message's body could not be read, for the log.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    /// Fields are missing or left over.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The key is not one.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A constraint is unknown, doubled or malformed, so the key is refused.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// `ssh-dss`.
    #[error("DSA keys are not supported: make an Ed25519 key with `ssh-keygen -t ed25519`")]
    Dsa,
    /// The comment has a NUL byte.
    #[error("the comment has a NUL byte")]
    Comment,
    /// The certificate does not belong to the key.
    #[error("the certificate is not one of this key")]
    WrongCertificate,
    /// A path or PIN is not text.
    #[error("a path or PIN is not UTF-8 text")]
    NotText,
    /// Nobody here knows this number.
    #[error("unknown message {0}")]
    Unknown(u8),
}

/// A request, borrowed from its frame.
pub enum Request<'a> {
    /// Sign with a key.
    Sign(SignRequest<'a>),
    /// List the identities.
    List,
    /// Add a key, with its constraints if there are any.
    Add(Box<AddRequest<'a>>),
    /// Remove the identity with this blob.
    Remove(&'a [u8]),
    /// Remove all identities.
    RemoveAll,
    /// Add the keys of a PKCS#11 provider.
    AddSmartcard(SmartcardRequest<'a>),
    /// Remove the keys of a PKCS#11 provider.
    RemoveSmartcard(SmartcardRequest<'a>),
    /// Lock with this password.
    Lock(&'a [u8]),
    /// Unlock with this password.
    Unlock(&'a [u8]),
    /// An extension's name and body.
    Extension(&'a [u8], &'a [u8]),
}

/// SSH_AGENTC_SIGN_REQUEST.
#[derive(Clone, Copy)]
pub struct SignRequest<'a> {
    /// The identity's blob.
    pub blob: &'a [u8],
    /// What to sign.
    pub data: &'a [u8],
    /// Hash choice for RSA (RFC 9987, section 3.6.1); other bits are ignored.
    pub flags: u32,
}

/// SSH_AGENTC_ADD_IDENTITY and its constrained form.
pub struct AddRequest<'a> {
    /// The identity: the plain key's blob or the certificate.
    pub blob: Vec<u8>,
    /// The type of the key.
    pub key_type: KeyType,
    /// The private half.
    pub private: PrivateParts<'a>,
    /// Any bytes but NUL.
    pub comment: &'a [u8],
    /// What was asked to be enforced.
    pub constraints: RawConstraints<'a>,
}

/// The private half of a key that is being added.
pub enum PrivateParts<'a> {
    /// A key to hold in memory.
    Soft(SoftParts<'a>),
    /// A handle that an authenticator makes a key of.
    Sk {
        /// The public half.
        public: PublicKey<'a>,
        /// What the key is for, usually `ssh:`.
        application: &'a [u8],
        /// Whether a touch and a PIN are needed.
        flags: u8,
        /// The authenticator's handle.
        key_handle: &'a [u8],
        /// Empty today.
        reserved: &'a [u8],
    },
}

/// The body of the four smartcard messages.
pub struct SmartcardRequest<'a> {
    /// The provider's path.
    pub provider: &'a str,
    /// The PIN, possibly empty.
    pub pin: &'a str,
    /// Constraints for every key that is added.
    pub constraints: RawConstraints<'a>,
}

impl<'a> Request<'a> {
    /// Whether messages with this number may overlap with others of one connection.
    pub fn is_key_operation(body: &[u8]) -> bool {
        body.first() == Some(&number::SIGN_REQUEST) || our_message(body).is_some_and(Name::is_key_operation)
    }

    /// Whether the message brings secrets, whose bytes are wiped when it has been handled.
    pub fn is_secret(body: &[u8]) -> bool {
        use number::{
            ADD_CONSTRAINED, ADD_IDENTITY, ADD_SMARTCARD, ADD_SMARTCARD_CONSTRAINED, LOCK, REMOVE_SMARTCARD, UNLOCK,
        };
        our_message(body).is_some_and(Name::brings_secrets)
            || body.first().is_some_and(|n| {
                [
                    ADD_IDENTITY,
                    ADD_CONSTRAINED,
                    ADD_SMARTCARD,
                    ADD_SMARTCARD_CONSTRAINED,
                    REMOVE_SMARTCARD,
                    LOCK,
                    UNLOCK,
                ]
                .contains(n)
            })
    }

    /// Reads a frame's body. Bytes behind a complete request are ignored, as OpenSSH does, except where constraints
    /// are read to the end.
    pub fn read(body: &'a [u8]) -> Result<Self, RequestError> {
        let mut r = Reader::new(body);
        Ok(match r.u8()? {
            number::SIGN_REQUEST => Self::Sign(SignRequest { blob: r.string()?, data: r.string()?, flags: r.u32()? }),
            number::REQUEST_IDENTITIES => Self::List,
            // OpenSSH reads constraints behind either message.
            number::ADD_IDENTITY | number::ADD_CONSTRAINED => Self::Add(Box::new(read_add(&mut r)?)),
            number::REMOVE_IDENTITY => Self::Remove(r.string()?),
            number::REMOVE_ALL | number::REMOVE_ALL_RSA => Self::RemoveAll,
            number::ADD_SMARTCARD => Self::AddSmartcard(read_smartcard(&mut r)?),
            number::ADD_SMARTCARD_CONSTRAINED => {
                let mut request = read_smartcard(&mut r)?;
                request.constraints = read_constraints(&mut r)?;
                Self::AddSmartcard(request)
            }
            number::REMOVE_SMARTCARD => Self::RemoveSmartcard(read_smartcard(&mut r)?),
            number::LOCK => Self::Lock(r.string()?),
            number::UNLOCK => Self::Unlock(r.string()?),
            number::EXTENSION => Self::Extension(r.string()?, r.rest()),
            other => return Err(RequestError::Unknown(other)),
        })
    }
}

fn read_smartcard<'a>(r: &mut Reader<'a>) -> Result<SmartcardRequest<'a>, RequestError> {
    let mut text = || std::str::from_utf8(r.string()?).map_err(|_| RequestError::NotText);
    Ok(SmartcardRequest { provider: text()?, pin: text()?, constraints: RawConstraints::default() })
}

fn read_add<'a>(r: &mut Reader<'a>) -> Result<AddRequest<'a>, RequestError> {
    let name = r.string()?;
    if name.starts_with(b"ssh-dss") {
        return Err(RequestError::Dsa);
    }
    let (key_type, is_certificate) = KeyType::from_name(name).ok_or(KeyError::UnknownType)?;
    let certificate = if is_certificate { Some(r.string()?) } else { None };
    let certified = match certificate.map(Blob::parse).transpose()? {
        Some(Blob::Certificate(certificate)) if certificate.key.key_type() == key_type => {
            certificate.verify()?;
            Some(certificate.key)
        }
        Some(_) => return Err(RequestError::WrongCertificate),
        None => None,
    };
    let (public, private) = read_private(key_type, certified, r)?;
    let comment = r.string()?;
    if comment.contains(&0) {
        return Err(RequestError::Comment);
    }
    let blob = certificate.map_or_else(|| public.to_blob(), <[u8]>::to_vec);
    Ok(AddRequest { blob, key_type, private, comment, constraints: read_constraints(r)? })
}

/// Reads the private fields. With a certificate, RSA, ECDSA and sk keys leave out public values that it has; where a
/// value comes twice, both must be the same.
fn read_private<'a>(
    key_type: KeyType,
    certified: Option<PublicKey<'a>>,
    r: &mut Reader<'a>,
) -> Result<(PublicKey<'a>, PrivateParts<'a>), RequestError> {
    let same = |public: PublicKey<'a>| match certified {
        Some(key) if key != public => Err(RequestError::WrongCertificate),
        _ => Ok(public),
    };
    Ok(match (key_type, certified) {
        (KeyType::Ed25519, _) => {
            let (public, private) = read_ed25519(r)?;
            (same(PublicKey::Ed25519(public))?, PrivateParts::Soft(SoftParts::Ed25519 { seed: private, public }))
        }
        (KeyType::Ecdsa(curve), _) => {
            let public = match certified {
                Some(key) => key,
                None => PublicKey::read(key_type, r)?,
            };
            let PublicKey::Ecdsa(_, point) = public else { return Err(RequestError::WrongCertificate) };
            (public, PrivateParts::Soft(SoftParts::Ecdsa { curve, scalar: r.mpint()?, point }))
        }
        (KeyType::Rsa, _) => {
            let public = match certified {
                Some(key) => key,
                // Here the modulus comes first, other than in the blob.
                None => PublicKey::rsa(r.mpint()?, r.mpint()?)?,
            };
            let PublicKey::Rsa { e, n } = public else { return Err(RequestError::WrongCertificate) };
            let (d, iqmp, p, q) = (r.mpint()?, r.mpint()?, r.mpint()?, r.mpint()?);
            (public, PrivateParts::Soft(SoftParts::Rsa(RsaIntegers { n, e, d, iqmp, p, q })))
        }
        (KeyType::MlDsa44Ed25519, _) => {
            let public = PublicKey::read(key_type, r)?;
            let PublicKey::MlDsa44Ed25519(mldsa, ed25519) = public else { return Err(RequestError::WrongCertificate) };
            let parts = SoftParts::MlDsa44Ed25519 { seeds: r.string()?, public: (mldsa, ed25519) };
            (same(public)?, PrivateParts::Soft(parts))
        }
        (KeyType::Ed25519Expanded, _) => {
            let (public, secret) = (r.string()?, r.string()?);
            (PublicKey::Ed25519(public), PrivateParts::Soft(SoftParts::Ed25519Expanded { secret, public }))
        }
        (KeyType::X25519, _) => {
            let (public, secret) = (r.string()?, r.string()?);
            (PublicKey::X25519(public), PrivateParts::Soft(SoftParts::X25519 { secret, public }))
        }
        (KeyType::SkEd25519 | KeyType::SkEcdsa, _) => {
            let public = match (key_type, certified) {
                // The Ed25519 form repeats its point even beside a certificate, and both forms the application.
                (KeyType::SkEcdsa, Some(PublicKey::SkEcdsa(point, _))) => PublicKey::SkEcdsa(point, r.string()?),
                _ => PublicKey::read(key_type, r)?,
            };
            let public = same(public)?;
            let (PublicKey::SkEd25519(_, application) | PublicKey::SkEcdsa(_, application)) = public else {
                return Err(RequestError::WrongCertificate);
            };
            let (flags, key_handle, reserved) = (r.u8()?, r.string()?, r.string()?);
            (public, PrivateParts::Sk { public, application, flags, key_handle, reserved })
        }
    })
}

/// The private key of a message in which nothing follows it: the key's type, then its fields. None of an authenticator.
pub fn read_soft(bytes: &[u8]) -> Result<SoftParts<'_>, RequestError> {
    let mut r = Reader::new(bytes);
    match KeyType::from_name(r.string()?) {
        Some((key_type, false)) if !key_type.is_sk() => match read_private(key_type, None, &mut r)? {
            (_, PrivateParts::Soft(parts)) => r.finish().map(|()| parts).map_err(RequestError::from),
            (_, PrivateParts::Sk { .. }) => Err(KeyError::UnknownType.into()),
        },
        _ => Err(KeyError::UnknownType.into()),
    }
}

/// `string public, string seed ‖ public`: the public half comes twice and must be the same.
fn read_ed25519<'a>(r: &mut Reader<'a>) -> Result<(&'a [u8], &'a [u8]), RequestError> {
    let public = r.string()?;
    let (seed, again) =
        r.string()?.split_at_checked(32).ok_or(KeyError::Invalid("an Ed25519 private key has 64 bytes"))?;
    if public.len() != 32 || again != public {
        return Err(KeyError::Invalid("the two copies of the Ed25519 public key differ").into());
    }
    Ok((public, seed))
}

/// Flag of a sign request: RSA with SHA-256. It wins over [`RSA_SHA2_512`].
pub const RSA_SHA2_256: u32 = 2;
/// Flag of a sign request: RSA with SHA-512.
pub const RSA_SHA2_512: u32 = 4;

/// Appends a reply that is nothing but its number.
pub fn put_bare(out: &mut Vec<u8>, number: u8) {
    out.extend_from_slice(&[0, 0, 0, 1, number]);
}

/// Appends a frame whose body `write` appends.
pub(crate) fn put_frame(out: &mut Vec<u8>, number: u8, write: impl FnOnce(&mut Vec<u8>)) {
    patch_length(out, |out| {
        out.push(number);
        write(out);
    });
}

/// Appends a `uint32` length and what `write` appends, of which it is the length.
pub(super) fn patch_length(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.put_u32(0);
    write(out);
    let len = u32::try_from(out.len() - at - 4).unwrap_or(u32::MAX);
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Appends SSH_AGENT_SIGN_RESPONSE.
pub fn put_signature(out: &mut Vec<u8>, signature: &Signature) {
    put_frame(out, number::SIGN_RESPONSE, |out| patch_length(out, |out| put_signature_blob(out, signature)));
}

/// The hash that a sign request's flags ask of an RSA key (RFC 9987, section 3.6.1).
pub fn rsa_hash(flags: u32) -> Hash {
    match flags {
        flags if flags & RSA_SHA2_256 != 0 => Hash::Sha256,
        flags if flags & RSA_SHA2_512 != 0 => Hash::Sha512,
        _ => Hash::Sha1,
    }
}

/// The signature in SSH's own form: its algorithm's name and a string (RFC 4253, 6.6; RFC 5656, 3.1.2; RFC 8332).
pub fn put_signature_blob(out: &mut Vec<u8>, signature: &Signature) {
    match signature {
        Signature::Ed25519(bytes) => {
            out.put_string(KeyType::Ed25519.name().as_bytes());
            out.put_string(bytes);
        }
        Signature::Ecdsa(curve, bytes) => {
            out.put_string(KeyType::Ecdsa(*curve).name().as_bytes());
            let (r, s) = bytes.split_at(bytes.len() / 2);
            patch_length(out, |out| {
                out.put_mpint(r);
                out.put_mpint(s);
            });
        }
        Signature::Rsa(hash, bytes) => {
            out.put_string(match hash {
                Hash::Sha1 => b"ssh-rsa",
                Hash::Sha256 => b"rsa-sha2-256",
                // SSH has no name for SHA-384: no standard request asks for it.
                Hash::Sha384 | Hash::Sha512 => b"rsa-sha2-512",
            });
            out.put_string(bytes);
        }
        Signature::MlDsa44Ed25519(bytes) => {
            out.put_string(KeyType::MlDsa44Ed25519.name().as_bytes());
            out.put_string(bytes);
        }
        Signature::Sk(blob) | Signature::Plain(blob) => out.extend_from_slice(blob),
    }
}

/// OpenSSH's clients refuse a listing with more identities.
const MAX_LISTED: usize = 2048;

/// The whole frame of SSH_AGENT_IDENTITIES_ANSWER, without the keys that ssh has no use for. It stops where OpenSSH's clients would refuse it: at 2,048
/// identities or 256 KiB; `left_out` is told how many remain.
pub fn identities_answer(identities: &[Arc<Identity>], left_out: impl FnOnce(usize)) -> Vec<u8> {
    // The frame's length, its number and the count.
    const HEAD: usize = 4 + 1 + 4;
    let mut out = vec![0; HEAD];
    let mut count = 0;
    let offered = || identities.iter().filter(|identity| identity.is_offered());
    for identity in offered().take(MAX_LISTED) {
        let more = 8 + identity.blob.len() + identity.comment().len();
        if out.len() + more > super::frame::MAX_FRAME {
            break;
        }
        out.put_string(&identity.blob);
        out.put_string(identity.comment());
        count += 1;
    }
    let wanted = offered().count();
    if count < wanted {
        left_out(wanted - count);
    }
    let len = u32::try_from(out.len() - 4).unwrap_or(u32::MAX);
    out[..4].copy_from_slice(&len.to_be_bytes());
    out[4] = number::IDENTITIES_ANSWER;
    out[5..HEAD].copy_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
    out
}

/// Which of our messages a frame's body holds.
fn our_message(body: &[u8]) -> Option<Name> {
    let mut r = Reader::new(body);
    if r.u8().ok()? != number::EXTENSION {
        return None;
    }
    Name::from_bytes(r.string().ok()?)
}

/// Appends the answer to `query` (RFC 9987, section 3.8.1): its own name, then the names without a length in front.
pub fn put_query_answer<'n>(out: &mut Vec<u8>, names: impl Iterator<Item = &'n str>) {
    put_frame(out, number::EXTENSION_RESPONSE, |out| {
        out.put_string(b"query");
        names.for_each(|name| out.put_string(name.as_bytes()));
    });
}

/// `session-bind@openssh.com` (PROTOCOL.agent, section 1), borrowed.
pub struct SessionBind<'a> {
    /// The host's key or certificate.
    pub host_key: &'a [u8],
    /// The SSH session's identifier.
    pub session_id: &'a [u8],
    /// The host's signature over it.
    pub signature: &'a [u8],
    /// Whether the agent is forwarded through the host.
    pub forwarding: bool,
}

impl<'a> SessionBind<'a> {
    /// Reads the extension's body to its end.
    pub fn read(body: &'a [u8]) -> Result<Self, WireError> {
        let mut r = Reader::new(body);
        let bind =
            Self { host_key: r.string()?, session_id: r.string()?, signature: r.string()?, forwarding: r.bool()? };
        r.finish()?;
        Ok(bind)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ssh_agent_lib::proto::{AddIdentity, PrivateCredential};
    use ssh_encoding::Encode as _;
    use ssh_key::private::{Ed25519Keypair, KeypairData};

    fn added(seed: [u8; 32], comment: &str) -> (Vec<u8>, Vec<u8>) {
        let pair = Ed25519Keypair::from_seed(&seed);
        let blob = PublicKey::Ed25519(&pair.public.0).to_blob();
        let credential = PrivateCredential::Key { privkey: KeypairData::Ed25519(pair), comment: comment.to_owned() };
        let mut body = vec![number::ADD_IDENTITY];
        AddIdentity { credential }.encode(&mut body).unwrap();
        (body, blob)
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(number in 0u8..30, body: Vec<u8>) {
            let _ = Request::read(&body);
            let _ = Request::read(&[&[number][..], &body].concat());
            let _ = SessionBind::read(&body);
        }

        #[test]
        fn what_another_codec_adds_is_read(seed: [u8; 32], comment in "[^\0]{0,40}") {
            let (body, blob) = added(seed, &comment);
            let Ok(Request::Add(request)) = Request::read(&body) else { return Err(TestCaseError::fail("refused")) };
            prop_assert_eq!(&request.blob, &blob);
            prop_assert_eq!(request.comment, comment.as_bytes());
            let PrivateParts::Soft(parts) = &request.private else { return Err(TestCaseError::fail("not soft")) };
            prop_assert!(crate::devices::soft::SoftKey::new(parts).is_ok());
        }

        #[test]
        fn a_request_cut_short_is_refused(seed: [u8; 32], cut in 1usize..100) {
            let (body, _) = added(seed, "c");
            let cut = cut.min(body.len() - 1);
            prop_assert!(Request::read(&body[..body.len() - cut]).is_err());
        }
    }

    #[test]
    fn dsa_is_refused_in_words() {
        let mut body = vec![number::ADD_IDENTITY];
        body.put_string(b"ssh-dss");
        assert!(matches!(Request::read(&body), Err(RequestError::Dsa)));
    }
}
