//! Extension messages ↔ vault calls: `query` and OpenSSH's `session-bind`.

use thiserror::Error;

use super::wire::SessionBind;
use crate::{
    public_key::{Blob, KeyError},
    rfc4251::WireError,
    vault::key::{Bind, Caller},
};

/// Lists the extensions (RFC 9987, section 3.8.1).
pub const QUERY: &str = "query";
/// Binds the connection to an SSH session (OpenSSH's PROTOCOL.agent, section 1).
pub const SESSION_BIND: &str = "session-bind@openssh.com";

/// OpenSSH's bounds.
const MAX_BINDS: usize = 16;
const MAX_SESSION_ID: usize = 128;

/// Why a session was not bound. From then on the connection counts as remote all the same.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BindError {
    /// The message is malformed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The host's key or signature is no good.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A session identifier longer than any hash.
    #[error("the session identifier is longer than 128 bytes")]
    LongSessionId,
    /// The connection was bound for a login already.
    #[error("the connection is bound for a login already")]
    NotForwarding,
    /// One session cannot belong to two hosts.
    #[error("the session is bound to another host's key")]
    OtherKey,
    /// Too many hops.
    #[error("the connection is bound to 16 sessions already")]
    TooMany,
}

/// Binds the caller's connection to one more SSH session, if the host proves that it is its own.
pub fn session_bind(caller: &mut Caller, body: &[u8]) -> Result<(), BindError> {
    // Whatever comes of it: who tries to bind is an ssh that may carry other machines' requests.
    caller.bind_attempted = true;
    let bind = SessionBind::read(body)?;
    if bind.session_id.len() > MAX_SESSION_ID {
        return Err(BindError::LongSessionId);
    }
    verify(&bind)?;
    for earlier in &caller.binds {
        if !earlier.forwarding {
            return Err(BindError::NotForwarding);
        }
        if *earlier.session_id == *bind.session_id {
            return if *earlier.host_key == *bind.host_key { Ok(()) } else { Err(BindError::OtherKey) };
        }
    }
    if caller.binds.len() == MAX_BINDS {
        return Err(BindError::TooMany);
    }
    caller.binds.push(Bind {
        host_key: bind.host_key.into(),
        session_id: bind.session_id.into(),
        forwarding: bind.forwarding,
    });
    Ok(())
}

fn verify(bind: &SessionBind<'_>) -> Result<(), KeyError> {
    let host = Blob::parse(bind.host_key)?;
    if let Blob::Certificate(certificate) = &host {
        certificate.verify()?;
    }
    host.key().verify(bind.session_id, bind.signature).map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{public_key::PublicKey, rfc4251::Put};
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

    struct Host(Ed25519KeyPair);

    impl Host {
        fn new(seed: u8) -> Self {
            Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
        }

        fn bind(&self, session_id: &[u8], forwarding: bool) -> Vec<u8> {
            let (mut signature, mut body) = (Vec::new(), Vec::new());
            signature.put_string(b"ssh-ed25519");
            signature.put_string(self.0.sign(session_id).as_ref());
            body.put_string(&PublicKey::Ed25519(self.0.public_key().as_ref()).to_blob());
            body.put_string(session_id);
            body.put_string(&signature);
            body.push(forwarding.into());
            body
        }
    }

    #[test]
    fn the_rules_of_binding() {
        let (a, b) = (Host::new(1), Host::new(2));
        let mut caller = Caller::default();
        assert_eq!(session_bind(&mut caller, &a.bind(b"one", true)), Ok(()));
        assert_eq!(session_bind(&mut caller, &a.bind(b"one", true)), Ok(()), "the same again");
        assert_eq!(caller.binds.len(), 1);
        assert_eq!(session_bind(&mut caller, &b.bind(b"one", true)), Err(BindError::OtherKey));
        let mut forged = a.bind(b"two", true);
        let at = forged.len() - 2;
        forged[at] ^= 1;
        assert_eq!(session_bind(&mut caller, &forged), Err(BindError::Key(KeyError::BadSignature)));
        assert_eq!(session_bind(&mut caller, &a.bind(&[7; 129], true)), Err(BindError::LongSessionId));
        assert_eq!(session_bind(&mut caller, &b.bind(b"two", false)), Ok(()));
        assert_eq!(session_bind(&mut caller, &b.bind(b"three", false)), Err(BindError::NotForwarding));
        let mut crowded = Caller::default();
        for n in 0..16 {
            assert_eq!(session_bind(&mut crowded, &a.bind(&[n], true)), Ok(()));
        }
        assert_eq!(session_bind(&mut crowded, &a.bind(b"17", true)), Err(BindError::TooMany));
    }

    #[test]
    fn a_failed_attempt_marks_the_connection() {
        let mut caller = Caller::default();
        assert!(session_bind(&mut caller, b"nonsense").is_err());
        assert!(caller.bind_attempted && caller.binds.is_empty());
    }
}
