//! What is being signed, read from the bytes: a login, an SSHSIG, anything else. Decides nothing.

use crate::{
    public_key::{Blob, Certificate, KeyError, KeyType},
    rfc4251::Reader,
};

const USERAUTH_REQUEST: u8 = 50;

/// What a signature over some data would be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// Logging in with this very key (RFC 4252, section 7).
    UserAuth(UserAuth<'a>),
    /// A signed file or commit (OpenSSH's PROTOCOL.sshsig).
    SshSig {
        /// What it is signed for: `git`, `file`, …
        namespace: &'a [u8],
    },
    /// Certifying a key (OpenSSH's PROTOCOL.certkeys).
    Certificate {
        /// What the certificate calls itself.
        key_id: &'a [u8],
    },
    /// Anything else: host key proofs, other protocols.
    Opaque,
}

/// A login request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserAuth<'a> {
    /// The SSH session it is for.
    pub session_id: &'a [u8],
    /// The user to log in as.
    pub user: &'a [u8],
    /// The server's key, where the request is bound to one (`publickey-hostbound-v00@openssh.com`).
    pub host_key: Option<&'a [u8]>,
}

impl<'a> Purpose<'a> {
    /// What `data` is, signed with the identity of this blob. Anything but an exact form is [`Purpose::Opaque`].
    pub fn read(data: &'a [u8], blob: &[u8]) -> Self {
        if let Ok(Some(userauth)) = read_userauth(data, blob) {
            Self::UserAuth(userauth)
        } else if let Ok(Some(namespace)) = read_sshsig(data) {
            Self::SshSig { namespace }
        } else if let Some(key_id) = read_certificate(data, blob) {
            Self::Certificate { key_id }
        } else {
            Self::Opaque
        }
    }

    /// Whether it is one of the two that a FIDO key of a web origin may sign: a login or an SSHSIG.
    pub fn is_ssh(&self) -> bool {
        matches!(self, Self::UserAuth(_) | Self::SshSig { .. })
    }
}

fn read_userauth<'a>(data: &'a [u8], blob: &[u8]) -> Result<Option<UserAuth<'a>>, KeyError> {
    let mut r = Reader::new(data);
    let session_id = r.string()?;
    if r.u8()? != USERAUTH_REQUEST {
        return Ok(None);
    }
    let (user, service, method) = (r.string()?, r.string()?, r.string()?);
    let signed = r.u8()?;
    let (algorithm, key) = (r.string()?, r.string()?);
    let host_key = match method {
        b"publickey" => None,
        b"publickey-hostbound-v00@openssh.com" => Some(r.string()?),
        _ => return Ok(None),
    };
    r.finish()?;
    let exact = service == b"ssh-connection" && signed == 1 && key == blob && is_algorithm_of(algorithm, blob)?;
    if let Some(host_key) = host_key {
        Blob::parse(host_key)?;
    }
    // OpenSSH reads names as C strings: a NUL could show a person another user than the server sees.
    Ok((exact && !session_id.is_empty() && !user.contains(&0)).then_some(UserAuth { session_id, user, host_key }))
}

/// Whether a signature algorithm's name belongs to the type of key or certificate in `blob`.
fn is_algorithm_of(algorithm: &[u8], blob: &[u8]) -> Result<bool, KeyError> {
    let name = Reader::new(blob).string()?;
    if name == algorithm {
        return Ok(true);
    }
    Ok(match KeyType::from_name(name) {
        Some((KeyType::Rsa, false)) => [&b"rsa-sha2-256"[..], b"rsa-sha2-512"].contains(&algorithm),
        Some((KeyType::Rsa, true)) => {
            [&b"rsa-sha2-256-cert-v01@openssh.com"[..], b"rsa-sha2-512-cert-v01@openssh.com"].contains(&algorithm)
        }
        Some((KeyType::SkEcdsa, false)) => algorithm == b"webauthn-sk-ecdsa-sha2-nistp256@openssh.com",
        _ => false,
    })
}

/// The namespace of an SSHSIG.
fn read_sshsig(data: &[u8]) -> Result<Option<&[u8]>, KeyError> {
    let Some(rest) = data.strip_prefix(b"SSHSIG") else { return Ok(None) };
    let mut r = Reader::new(rest);
    let (namespace, _reserved, hash, digest) = (r.string()?, r.string()?, r.string()?, r.string()?);
    r.finish()?;
    let is_name = |bytes: &[u8]| !bytes.is_empty() && !bytes.contains(&0);
    Ok((is_name(namespace) && is_name(hash) && !digest.is_empty()).then_some(namespace))
}

/// The key id of a certificate that this very key is asked to sign.
fn read_certificate<'a>(data: &'a [u8], blob: &[u8]) -> Option<&'a [u8]> {
    let certificate = Certificate::read_unsigned(data).ok()?;
    (certificate.signature_key == blob).then_some(certificate.key_id)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        public_key::{PublicKey, tests::blob as fixture},
        rfc4251::Put,
    };
    use proptest::prelude::*;

    pub(in crate::vault) fn key(byte: u8) -> Vec<u8> {
        PublicKey::Ed25519(&[byte; 32]).to_blob()
    }

    pub(in crate::vault) fn userauth(session_id: &[u8], user: &[u8], blob: &[u8], host_key: Option<&[u8]>) -> Vec<u8> {
        let mut data = Vec::new();
        data.put_string(session_id);
        data.push(USERAUTH_REQUEST);
        data.put_string(user);
        data.put_string(b"ssh-connection");
        data.put_string(host_key.map_or(&b"publickey"[..], |_| b"publickey-hostbound-v00@openssh.com"));
        data.push(1);
        data.put_string(b"ssh-ed25519");
        data.put_string(blob);
        if let Some(host_key) = host_key {
            data.put_string(host_key);
        }
        data
    }

    #[test]
    fn a_login_is_exact() {
        let (blob, host) = (key(1), key(2));
        let data = userauth(b"sid", b"root", &blob, Some(&host));
        let expected = UserAuth { session_id: b"sid", user: b"root", host_key: Some(&host) };
        assert_eq!(Purpose::read(&data, &blob), Purpose::UserAuth(expected));
        assert_eq!(Purpose::read(&data, &host), Purpose::Opaque, "another key");
        assert_eq!(Purpose::read(&[&data[..], &[0]].concat(), &blob), Purpose::Opaque, "left-over bytes");
        assert_eq!(Purpose::read(&data[..data.len() - 1], &blob), Purpose::Opaque, "too short");
        let nul = userauth(b"sid", b"ro\0ot", &blob, None);
        assert_eq!(Purpose::read(&nul, &blob), Purpose::Opaque, "a NUL in the user");
        assert_eq!(Purpose::read(&userauth(b"", b"root", &blob, None), &blob), Purpose::Opaque, "no session");
        let vague = userauth(b"sid", b"root", &blob, Some(b"no key"));
        assert_eq!(Purpose::read(&vague, &blob), Purpose::Opaque, "a host's key that is none");
        for (from, to) in [(&b"ssh-connection"[..], &b"ssh-confection"[..]), (b"publickey", b"publicjey")] {
            let at = data.windows(from.len()).position(|w| w == from).unwrap_or_default();
            let mut other = data.clone();
            other[at..at + to.len()].copy_from_slice(to);
            assert_eq!(Purpose::read(&other, &blob), Purpose::Opaque);
        }
    }

    #[test]
    fn the_algorithm_must_be_one_of_the_key() {
        let rsa = PublicKey::Rsa { e: &[3], n: &[0xff; 128] }.to_blob();
        for (algorithm, good) in [
            (&b"ssh-rsa"[..], true),
            (b"rsa-sha2-256", true),
            (b"rsa-sha2-512", true),
            (b"rsa-sha2-512-cert-v01@openssh.com", false),
            (b"ssh-ed25519", false),
        ] {
            assert_eq!(is_algorithm_of(algorithm, &rsa), Ok(good));
        }
    }

    #[test]
    fn an_sshsig_is_exact() {
        let mut data = b"SSHSIG".to_vec();
        for part in [&b"git"[..], b"", b"sha512", &[7; 64]] {
            data.put_string(part);
        }
        assert_eq!(Purpose::read(&data, &key(1)), Purpose::SshSig { namespace: b"git" });
        data.push(0);
        assert_eq!(Purpose::read(&data, &key(1)), Purpose::Opaque);
        let mut nul = b"SSHSIG".to_vec();
        for part in [&b"g\0t"[..], b"", b"sha512", &[7; 64]] {
            nul.put_string(part);
        }
        assert_eq!(Purpose::read(&nul, &key(1)), Purpose::Opaque, "a NUL in the namespace");
    }

    #[test]
    fn a_certificate_is_known_to_the_authority_that_signs_it() {
        let certificate = fixture("user_ed25519-cert");
        let Ok(Blob::Certificate(parsed)) = Blob::parse(&certificate) else { unreachable!() };
        // What is signed ends where the string of the signature begins.
        let signature = 4 + 4 + 11 + 4 + 64;
        let data = &certificate[..certificate.len() - signature];
        assert_eq!(Purpose::read(data, parsed.signature_key), Purpose::Certificate { key_id: parsed.key_id });
        assert_eq!(Purpose::read(data, &key(1)), Purpose::Opaque, "another authority");
        assert_eq!(Purpose::read(&certificate, parsed.signature_key), Purpose::Opaque, "with its signature");
        assert_eq!(Purpose::read(&data[..data.len() - 1], parsed.signature_key), Purpose::Opaque, "too short");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(data: Vec<u8>, blob: Vec<u8>) {
            let _ = Purpose::read(&data, &blob);
            let _ = Purpose::read(&[b"SSHSIG", &data[..]].concat(), &blob);
        }
    }
}
