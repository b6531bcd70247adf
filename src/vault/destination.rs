//! Whether a path of hosts is one that a key's destination constraints allow (OpenSSH's PROTOCOL.agent, section 2, and
//! the rules of its agent). Pure; the time is an argument.

use super::{
    key::{Bind, Caller, Destination, Hop},
    pattern,
};
use crate::public_key::{Blob, Certificate, CertificateKind};

/// What the key would be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use<'a> {
    /// Being seen, removed or replaced.
    Listing,
    /// Logging in as this user at the last host.
    Login(&'a [u8]),
}

/// Whether the hosts that a caller is bound to allow this use. `Err` says what is against it, for the log.
pub fn permitted(
    destinations: &[Destination],
    caller: &Caller,
    purpose: Use<'_>,
    unix_now: u64,
) -> Result<(), &'static str> {
    if destinations.is_empty() {
        return Ok(());
    }
    let Some((last, before)) = caller.binds.split_last() else {
        return match (caller.bind_attempted, purpose) {
            (true, _) => Err("a session bind failed on this connection"),
            (false, Use::Listing) => Ok(()),
            (false, Use::Login(_)) => Err("the connection is not bound to an SSH session"),
        };
    };
    if before.iter().any(|bind| !bind.forwarding) {
        return Err("a host on the way is not one that forwards the agent");
    }
    if last.forwarding && purpose != Use::Listing {
        return Err("the last host was bound for forwarding, not for a login");
    }
    let mut from = None;
    for bind in &caller.binds {
        let user = match purpose {
            Use::Login(user) if std::ptr::eq(bind, last) => Some(user),
            _ => None,
        };
        if !destinations.iter().any(|d| is_step(d, from, Some(bind), user, unix_now)) {
            return Err("no destination constraint of the key allows this host or user");
        }
        from = Some(bind);
    }
    // A host beyond which the key is of no use has no reason to see it.
    if last.forwarding && !destinations.iter().any(|d| is_step(d, Some(last), None, None, unix_now)) {
        return Err("the key may be used to reach this host, not from it");
    }
    Ok(())
}

fn is_step(d: &Destination, from: Option<&Bind>, to: Option<&Bind>, user: Option<&[u8]>, unix_now: u64) -> bool {
    let starts = match from {
        None => d.from.host.is_empty() && d.from.keys.is_empty(),
        Some(bind) => is_host(&d.from, bind, unix_now),
    };
    starts
        && to.is_none_or(|bind| is_host(&d.to, bind, unix_now))
        && user.is_none_or(|user| d.to.user.is_empty() || pattern::matches(user, &d.to.user))
}

/// Whether the hop has the key, or the authority, of the host in `bind`: for showing its name, not for deciding.
pub fn names(hop: &Hop, bind: &Bind) -> bool {
    let blob = match Blob::parse(&bind.host_key) {
        Ok(Blob::Certificate(certificate)) => certificate.signature_key,
        _ => &bind.host_key,
    };
    hop.keys.iter().any(|key| *key.blob == *blob)
}

/// Whether the host that proved itself in `bind` is the one that the hop names.
fn is_host(hop: &Hop, bind: &Bind, unix_now: u64) -> bool {
    match Blob::parse(&bind.host_key) {
        Ok(Blob::Key(_)) => hop.keys.iter().any(|key| !key.is_ca && key.blob == bind.host_key),
        Ok(Blob::Certificate(certificate)) => {
            hop.keys.iter().any(|key| key.is_ca && *key.blob == *certificate.signature_key)
                && certifies_host(&certificate, &hop.host, unix_now)
        }
        Err(_) => false,
    }
}

/// Whether a certificate makes its holder the host of this name, now.
fn certifies_host(certificate: &Certificate<'_>, host: &[u8], unix_now: u64) -> bool {
    certificate.kind == CertificateKind::Host
        && (certificate.valid_after..certificate.valid_before).contains(&unix_now)
        && certificate.critical_options.is_empty()
        && certificate.principals.iter().any(|principal| pattern::matches(host, principal))
        && certificate.verify().is_ok_and(|algorithm| algorithm != b"ssh-rsa")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vault::{key::HostKey, purpose::tests::key};
    use ssh_key::certificate::{Builder, CertType};

    fn hop(user: &str, host: &str, key_bytes: &[u8]) -> Hop {
        Hop {
            user: user.as_bytes().into(),
            host: host.as_bytes().into(),
            keys: key_bytes.iter().map(|&b| HostKey { blob: key(b).into(), is_ca: false }).collect(),
        }
    }

    fn bind(key_byte: u8, forwarding: bool) -> Bind {
        Bind { host_key: key(key_byte).into(), session_id: [key_byte].into(), forwarding }
    }

    fn caller(binds: &[(u8, bool)]) -> Caller {
        let binds: Vec<Bind> = binds.iter().map(|&(k, f)| bind(k, f)).collect();
        Caller { bind_attempted: !binds.is_empty(), binds, ..Caller::default() }
    }

    #[test]
    fn the_rules_one_by_one() {
        // May log in to `a` (key 1) as anybody, and from there to `b` (key 2) as anyone called x….
        let to_a = Destination { from: Hop::default(), to: hop("", "a", &[1]) };
        let a_to_b = Destination { from: hop("", "a", &[1]), to: hop("x*", "b", &[2]) };
        let both = [to_a.clone(), a_to_b];
        let login = |destinations: &[Destination], binds: &[(u8, bool)], user: &str| {
            permitted(destinations, &caller(binds), Use::Login(user.as_bytes()), 0).is_ok()
        };
        let list = |destinations: &[Destination], binds: &[(u8, bool)]| {
            permitted(destinations, &caller(binds), Use::Listing, 0).is_ok()
        };
        assert!(login(&[], &[], "u"), "no constraints");
        assert!(!login(&both, &[], "u"), "not bound");
        assert!(login(&both, &[(1, false)], "u"));
        assert!(!login(&both, &[(2, false)], "xu"), "b from here");
        assert!(!login(&both, &[(1, true)], "u"), "bound for forwarding");
        assert!(login(&both, &[(1, true), (2, false)], "xu"));
        assert!(!login(&both, &[(1, true), (2, false)], "u"), "the user is checked at the last hop");
        assert!(!login(&both, &[(1, false), (2, false)], "xu"), "a was not bound for forwarding");
        assert!(!login(&both, &[(1, true), (1, false)], "u"), "a from a");
        assert!(list(&both, &[]) && list(&both, &[(1, true)]) && list(&both, &[(1, true), (2, false)]));
        assert!(!list(&[to_a], &[(1, true)]), "of no use beyond a");
        assert!(!list(&both, &[(1, true), (2, true)]), "of no use beyond b");
        assert!(!list(&both, &[(3, false)]), "a stranger");
        let failed = Caller { bind_attempted: true, ..Caller::default() };
        assert!(permitted(&both, &failed, Use::Listing, 0).is_err(), "a failed bind");
    }

    /// A host certificate of authority `ca`, made by another implementation.
    fn certificate(ca: u8, change: impl FnOnce(&mut Builder)) -> Vec<u8> {
        use ssh_key::private::Ed25519Keypair;
        let host = Ed25519Keypair::from_seed(&[9; 32]).public;
        let mut builder = Builder::new(vec![7; 16], host, 100, 200).unwrap();
        change(&mut builder);
        let ca = ssh_key::PrivateKey::from(Ed25519Keypair::from_seed(&[ca; 32]));
        builder.sign(&ca).unwrap().to_bytes().unwrap()
    }

    #[test]
    fn a_certificate_makes_a_host_under_every_condition() {
        let ca = ssh_key::private::Ed25519Keypair::from_seed(&[1; 32]).public.0;
        let ca_blob = crate::public_key::PublicKey::Ed25519(&ca).to_blob();
        let to = Hop {
            user: Box::default(),
            host: (*b"web.example.com").into(),
            keys: [HostKey { blob: ca_blob.into(), is_ca: true }].into(),
        };
        let destinations = [Destination { from: Hop::default(), to }];
        let allowed = |host_key: &[u8], now| {
            let bind = Bind { host_key: host_key.into(), session_id: [1].into(), forwarding: false };
            let caller = Caller { binds: vec![bind], bind_attempted: true, ..Caller::default() };
            permitted(&destinations, &caller, Use::Login(b"u"), now).is_ok()
        };
        let named = |name: &'static str| {
            move |b: &mut Builder| {
                b.cert_type(CertType::Host).unwrap().valid_principal(name).unwrap();
            }
        };
        let good = certificate(1, named("web.example.com"));
        assert!(allowed(&good, 150));
        assert!(allowed(&certificate(1, named("*.example.com")), 150), "a pattern");
        assert!(!allowed(&good, 99) && !allowed(&good, 200), "out of its time");
        assert!(!allowed(&certificate(2, named("web.example.com")), 150), "another authority");
        assert!(!allowed(&certificate(1, named("mail.example.com")), 150), "another host");
        assert!(
            !allowed(
                &certificate(1, |b| {
                    b.cert_type(CertType::Host).unwrap().all_principals_valid().unwrap();
                }),
                150
            ),
            "no principals"
        );
        let user = certificate(1, |b| {
            b.cert_type(CertType::User).unwrap().valid_principal("web.example.com").unwrap();
        });
        assert!(!allowed(&user, 150), "a user's certificate");
        let critical = certificate(1, |b| {
            named("web.example.com")(b);
            b.critical_option("force-command", "x").unwrap();
        });
        assert!(!allowed(&critical, 150), "a critical option");
        let mut forged = good;
        let at = forged.len() - 1;
        forged[at] ^= 1;
        assert!(!allowed(&forged, 150), "a forged signature");
    }

    #[test]
    fn an_authority_is_no_host() {
        let mut host = hop("", "a", &[1]);
        host.keys[0].is_ca = true;
        let destinations = [Destination { from: Hop::default(), to: host }];
        assert!(permitted(&destinations, &caller(&[(1, false)]), Use::Login(b"u"), 0).is_err());
    }
}
