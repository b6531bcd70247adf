//! What can be had of an agent that speaks the standard messages only (RFC 9987, sections 3.5 and 3.6). Knows how
//! signatures of named schemes are hidden in SSH's (RFC 4253, RFC 5656, RFC 8332, RFC 8709).

use std::{num::NonZeroU32, time::Duration};

use zeroize::Zeroizing;

use super::{
    ClientError, Key, PROMPT,
    connection::{self, Link},
};
use crate::{
    agent::{
        constraint::{CONFIRM, LIFETIME},
        message::{Code, Failure, How, KeyUse, ReplyError, scheme},
        wire::{RSA_SHA2_256, RSA_SHA2_512, number, put_frame},
    },
    devices::{Hash, Input, Operation, Scheme},
    key_file::KeyFile,
    public_key::{Blob, KeyType, ecdsa_fixed},
    rfc4251::{Put, Reader},
};

/// Lists the keys, a certificate under its key.
pub(super) async fn keys(link: &Link) -> Result<Vec<Key>, ClientError> {
    let body = link.message(vec![0, 0, 0, 1, number::REQUEST_IDENTITIES].into(), PROMPT).await?;
    let mut r = Reader::new(&body);
    match r.u8().map_err(ReplyError::from)? {
        number::IDENTITIES_ANSWER => {}
        number::FAILURE => return Err(refused("the agent refuses to list its keys, and does not say why")),
        _ => return Err(ReplyError::Unexpected.into()),
    }
    let mut keys: Vec<Key> = Vec::new();
    for _ in 0..r.u32().map_err(ReplyError::from)? {
        let (blob, comment) = (r.string().map_err(ReplyError::from)?, r.string().map_err(ReplyError::from)?);
        add(&mut keys, blob, comment);
    }
    Ok(keys)
}

/// SSH_AGENTC_ADD_IDENTITY, or SSH_AGENTC_ADD_ID_CONSTRAINED where there are constraints.
pub(super) fn add_request(
    key: &KeyFile,
    comment: &str,
    lifetime: Option<NonZeroU32>,
    confirm: bool,
) -> Zeroizing<Vec<u8>> {
    let constrained = lifetime.is_some() || confirm;
    // Room from the start: a buffer that grows leaves copies behind.
    let mut out = Zeroizing::new(Vec::with_capacity(key.fields().len() + comment.len() + 32));
    put_frame(&mut out, if constrained { number::ADD_CONSTRAINED } else { number::ADD_IDENTITY }, |out| {
        out.extend_from_slice(key.fields());
        out.put_string(comment.as_bytes());
        if let Some(seconds) = lifetime {
            out.push(LIFETIME);
            out.put_u32(seconds.get());
        }
        if confirm {
            out.push(CONFIRM);
        }
    });
    out
}

fn add(keys: &mut Vec<Key>, blob: &[u8], comment: &[u8]) {
    let parsed = Blob::parse(blob);
    let (plain, certificate) = match &parsed {
        Ok(Blob::Certificate(certificate)) => (certificate.key.to_blob(), Some(blob.to_vec())),
        _ => (blob.to_vec(), None),
    };
    if let Some(known) = keys.iter_mut().find(|key| key.blob == plain) {
        known.certificates.extend(certificate);
        return;
    }
    let schemes = parsed.iter().flat_map(|blob| schemes(blob.key().key_type())).filter_map(scheme::sign_name);
    keys.push(Key {
        blob: plain,
        certificates: certificate.into_iter().collect(),
        comment: String::from_utf8_lossy(comment).into_owned(),
        operations: vec!["sign".to_owned()],
        signs: [scheme::SSH].into_iter().chain(schemes).map(str::to_owned).collect(),
        ..Key::default()
    });
}

/// The schemes that a plain sign request can be made to use.
fn schemes(key_type: KeyType) -> Vec<Scheme> {
    match key_type {
        KeyType::Ed25519 => vec![Scheme::Ed25519],
        KeyType::Ecdsa(curve) => vec![Scheme::Ecdsa(Hash::of_curve(curve))],
        KeyType::Rsa => vec![Scheme::RsaPkcs1v15(Hash::Sha256), Scheme::RsaPkcs1v15(Hash::Sha512)],
        _ => Vec::new(),
    }
}

/// How a plain sign request is made to sign in a scheme.
pub(super) struct Hidden {
    /// The request's.
    pub(super) flags: u32,
    algorithm: &'static str,
    key_type: KeyType,
}

impl Hidden {
    /// For a key with this blob, or a certificate's. `None` where the scheme is hidden in no signature of SSH's.
    pub(super) fn find(key: &[u8], scheme: Scheme) -> Option<Self> {
        let key_type = Blob::parse(key).ok()?.key().key_type();
        if !schemes(key_type).contains(&scheme) {
            return None;
        }
        let (flags, algorithm) = match scheme {
            Scheme::RsaPkcs1v15(Hash::Sha512) => (RSA_SHA2_512, "rsa-sha2-512"),
            Scheme::RsaPkcs1v15(_) => (RSA_SHA2_256, "rsa-sha2-256"),
            _ => (0, key_type.name()),
        };
        Some(Self { flags, algorithm, key_type })
    }

    /// The signature in the scheme's own form, out of an SSH signature blob.
    pub(super) fn unwrap(&self, blob: &[u8]) -> Result<Vec<u8>, ReplyError> {
        let mut r = Reader::new(blob);
        let (algorithm, body) = (r.string()?, r.string()?);
        r.finish()?;
        if algorithm != self.algorithm.as_bytes() {
            return Err(ReplyError::Unexpected);
        }
        match self.key_type {
            KeyType::Ecdsa(curve) => ecdsa_fixed(curve, body).map_err(|_| ReplyError::Unexpected),
            _ => Ok(body.to_vec()),
        }
    }
}

/// Signs, if that is what is asked and the scheme is `ssh`, or one that is hidden in it.
pub(super) async fn operate(
    link: &Link,
    task: KeyUse<'_>,
    deadline: Option<Duration>,
) -> Result<Zeroizing<Vec<u8>>, ClientError> {
    let time = connection::patience(deadline);
    let (scheme, message) = match &task.how {
        How::Ssh { flags, data } => return sign(link, task.key, data, *flags, time).await,
        How::Operation(Operation::Sign { scheme, input: Input::Message(message) }) => (*scheme, message),
        How::Operation(Operation::Sign { .. }) => return Err(ClientError::Unsupported("sign with a digest")),
        How::Operation(_) => return Err(ClientError::Unsupported(task.name().short())),
    };
    let Some(hidden) = Hidden::find(task.key, scheme) else {
        return Err(ClientError::Unsupported(scheme::sign_name(scheme).unwrap_or("sign")));
    };
    let signature = sign(link, task.key, message, hidden.flags, time).await?;
    Ok(hidden.unwrap(&signature)?.into())
}

/// SSH_AGENTC_SIGN_REQUEST: an SSH signature blob.
async fn sign(
    link: &Link,
    key: &[u8],
    data: &[u8],
    flags: u32,
    time: Duration,
) -> Result<Zeroizing<Vec<u8>>, ClientError> {
    let mut body = vec![number::SIGN_REQUEST];
    body.put_string(key);
    body.put_string(data);
    body.put_u32(flags);
    let mut frame = Vec::new();
    frame.put_string(&body);
    let reply = link.message(frame.into(), time).await?;
    let mut r = Reader::new(&reply);
    match r.u8().map_err(ReplyError::from)? {
        number::SIGN_RESPONSE => Ok(r.string().map_err(ReplyError::from)?.to_vec().into()),
        number::FAILURE => Err(refused("the agent refuses to sign, and does not say why")),
        _ => Err(ReplyError::Unexpected.into()),
    }
}

/// An agent of another make said no. It gives no reason.
pub(super) fn refused(message: &str) -> ClientError {
    ClientError::Refused(Failure::new(Code::Failed, message))
}
