//! Whether a path of hosts is one that a key's destination constraints allow (OpenSSH's PROTOCOL.agent, section 2, and
//! the rules of its agent). Pure; the time is an argument.

use std::cell::OnceCell;

use super::{
    key::{Bind, Caller, Destination, Hop},
    pattern::Fuel,
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

/// Steps of pattern matching that one request may take: tens of milliseconds, and far beyond what real keys need.
const MATCHING_STEPS: u64 = 1 << 25;

/// The hosts between the agent and a caller, read once for all the keys that one request is about.
pub struct Route<'a> {
    caller: &'a Caller,
    unix_now: u64,
    hosts: OnceCell<Vec<Host<'a>>>,
    fuel: Fuel,
}

/// A host as it proved itself in a bind.
enum Host<'a> {
    /// By a plain key.
    Key(&'a [u8]),
    /// By a certificate that is good now, for the hosts it names.
    Certificate(Box<Certificate<'a>>),
    /// By nothing that counts.
    Unknown,
}

impl<'a> Route<'a> {
    /// The route of this caller, at this time. Costs nothing until a key has constraints.
    pub fn new(caller: &'a Caller, unix_now: u64) -> Self {
        Self { caller, unix_now, hosts: OnceCell::new(), fuel: Fuel::new(MATCHING_STEPS) }
    }

    /// Who is at the end of it.
    pub fn caller(&self) -> &'a Caller {
        self.caller
    }

    /// Whether the hosts on the route allow this use. `Err` says what is against it, for the log.
    pub fn permits(&self, destinations: &[Destination], purpose: Use<'_>) -> Result<(), &'static str> {
        if destinations.is_empty() {
            return Ok(());
        }
        let Some((last, before)) = self.caller.binds.split_last() else {
            return match (self.caller.bind_attempted, purpose) {
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
        let hosts = self
            .hosts
            .get_or_init(|| self.caller.binds.iter().map(|bind| Host::read(&bind.host_key, self.unix_now)).collect());
        let mut from = None;
        for (n, host) in hosts.iter().enumerate() {
            let user = match purpose {
                Use::Login(user) if n + 1 == hosts.len() => Some(user),
                _ => None,
            };
            if !destinations.iter().any(|d| self.is_step(d, from, Some(host), user)) {
                return Err(self.no_step("no destination constraint of the key allows this host or user"));
            }
            from = Some(host);
        }
        // A host beyond which the key is of no use has no reason to see it.
        if last.forwarding && !destinations.iter().any(|d| self.is_step(d, from, None, None)) {
            return Err(self.no_step("the key may be used to reach this host, not from it"));
        }
        Ok(())
    }

    fn is_step(&self, d: &Destination, from: Option<&Host<'_>>, to: Option<&Host<'_>>, user: Option<&[u8]>) -> bool {
        let starts = match from {
            None => d.from.host.is_empty() && d.from.keys.is_empty(),
            Some(host) => self.is_host(&d.from, host),
        };
        starts
            && to.is_none_or(|host| self.is_host(&d.to, host))
            && user.is_none_or(|user| d.to.user.is_empty() || self.fuel.matches(user, &d.to.user))
    }

    /// Whether `host` is the one that the hop names.
    fn is_host(&self, hop: &Hop, host: &Host<'_>) -> bool {
        match host {
            Host::Key(blob) => hop.keys.iter().any(|key| !key.is_ca && *key.blob == **blob),
            Host::Certificate(certificate) => {
                hop.keys.iter().any(|key| key.is_ca && *key.blob == *certificate.signature_key)
                    && certificate.principals.iter().any(|principal| self.fuel.matches(&hop.host, principal))
            }
            Host::Unknown => false,
        }
    }

    fn no_step(&self, reason: &'static str) -> &'static str {
        if self.fuel.is_spent() {
            "its constraints are too much work to compare with this host or user"
        } else {
            reason
        }
    }
}

/// Whether the hop has the key, or the authority, of the host in `bind`: for showing its name, not for deciding.
pub fn names(hop: &Hop, bind: &Bind) -> bool {
    let blob = match Blob::parse(&bind.host_key) {
        Ok(Blob::Certificate(certificate)) => certificate.signature_key,
        _ => &bind.host_key,
    };
    hop.keys.iter().any(|key| *key.blob == *blob)
}

impl<'a> Host<'a> {
    /// A certificate is verified here again, so that nothing depends on who recorded the bind.
    fn read(host_key: &'a [u8], unix_now: u64) -> Self {
        match Blob::parse(host_key) {
            Ok(Blob::Key(_)) => Self::Key(host_key),
            Ok(Blob::Certificate(certificate))
                if certificate.kind == CertificateKind::Host
                    && (certificate.valid_after..certificate.valid_before).contains(&unix_now)
                    && certificate.critical_options.is_empty()
                    && certificate.verify().is_ok_and(|algorithm| algorithm != b"ssh-rsa") =>
            {
                Self::Certificate(certificate)
            }
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        public_key::{PublicKey, tests::blob},
        rfc4251::Put,
        vault::{key::HostKey, purpose::tests::key},
    };
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

    fn permitted(
        destinations: &[Destination],
        caller: &Caller,
        purpose: Use<'_>,
        unix_now: u64,
    ) -> Result<(), &'static str> {
        Route::new(caller, unix_now).permits(destinations, purpose)
    }

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

    fn certified(host: &str, authority: &str) -> [Destination; 1] {
        let keys = [HostKey { blob: blob(authority).into(), is_ca: true }].into();
        let to = Hop { host: host.as_bytes().into(), keys, ..Hop::default() };
        [Destination { from: Hop::default(), to }]
    }

    #[test]
    fn certificates_of_hosts() {
        const VALID: u64 = 1_700_000_000;
        for (certificate, host, authority, now, good) in [
            ("host_ed25519", "host.example.com", "ca_ed25519", VALID, true),
            ("host_ecdsa256", "host.example.com", "ca_ed25519", VALID, true),
            ("host_ecdsa521", "host.example.com", "ca_ed25519", VALID, true),
            ("host_rsa", "host.example.com", "ca_ed25519", VALID, true),
            ("host_rsa_sha512", "host.example.com", "ca_rsa", VALID, true),
            ("host_ed25519", "a.wild.example.com", "ca_ed25519", VALID, true),
            ("host_ed25519", "wild.example.com", "ca_ed25519", VALID, false),
            ("host_ed25519", "other.example.com", "ca_ed25519", VALID, false),
            ("host_ed25519", "host.example.com", "ca_rsa", VALID, false),
            ("host_ed25519", "host.example.com", "ca_ed25519", 1_577_836_799, false),
            ("host_ed25519", "host.example.com", "ca_ed25519", 1_577_836_800, true),
            ("host_ed25519", "host.example.com", "ca_ed25519", 1_893_455_999, true),
            ("host_ed25519", "host.example.com", "ca_ed25519", 1_893_456_000, false),
            ("user_ed25519", "alice", "ca_ed25519", VALID, false),
            ("host_no_principals", "host.example.com", "ca_ed25519", VALID, false),
            ("host_critical", "host.example.com", "ca_ed25519", VALID, false),
            ("host_rsa_sha1", "host.example.com", "ca_rsa", VALID, false),
        ] {
            let host_key: Box<[u8]> = blob(&format!("{certificate}-cert")).into();
            let bind = |host_key| Bind { host_key, session_id: [1].into(), forwarding: false };
            let caller = |host_key| Caller { binds: vec![bind(host_key)], bind_attempted: true, ..Caller::default() };
            let allowed = |host_key, d: &[Destination]| permitted(d, &caller(host_key), Use::Login(b"u"), now).is_ok();
            let mut destinations = certified(host, authority);
            assert_eq!(allowed(host_key.clone(), &destinations), good, "{certificate} {host} {authority} {now}");
            destinations[0].to.keys[0].is_ca = false;
            assert!(!allowed(host_key.clone(), &destinations), "an authority that is not said to be one");
            let mut forged = host_key;
            *forged.last_mut().unwrap() ^= 1;
            assert!(!allowed(forged, &certified(host, authority)), "a forged certificate");
        }
    }

    /// A certificate with these principals, by an authority that anybody can make.
    fn made_up(principals: &[Vec<u8>]) -> (Vec<u8>, Vec<u8>) {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap();
        let authority = PublicKey::Ed25519(pair.public_key().as_ref()).to_blob();
        let (mut names, mut body, mut signature) = (Vec::new(), Vec::new(), Vec::new());
        principals.iter().for_each(|name| names.put_string(name));
        body.put_string(b"ssh-ed25519-cert-v01@openssh.com");
        body.put_string(&[0; 32]);
        body.put_string(&[5; 32]);
        body.extend_from_slice(&[0; 8]);
        body.put_u32(2);
        body.put_string(b"id");
        body.put_string(&names);
        body.extend_from_slice(&[0; 8]);
        body.extend_from_slice(&[0xff; 8]);
        body.put_string(b"");
        body.put_string(b"");
        body.put_string(b"");
        body.put_string(&authority);
        signature.put_string(b"ssh-ed25519");
        signature.put_string(pair.sign(&body).as_ref());
        body.put_string(&signature);
        (body, authority)
    }

    /// The work that one key and one certificate, each within a frame, can make of one question.
    #[test]
    fn patterns_of_a_peer_are_bounded_work() {
        let evil = [&b"*"[..], &b"a".repeat(900), b"b"].concat();
        let (host_key, authority) = made_up(&vec![evil; 200]);
        let keys: Box<[HostKey]> = [HostKey { blob: authority.into(), is_ca: true }].into();
        let to = Hop { host: b"a".repeat(200_000).into(), keys, ..Hop::default() };
        let destinations = [Destination { from: Hop::default(), to }];
        let bind = Bind { host_key: host_key.into(), session_id: [1].into(), forwarding: false };
        let caller = Caller { binds: vec![bind], bind_attempted: true, ..Caller::default() };
        let route = Route::new(&caller, 1);
        assert!(route.permits(&destinations, Use::Listing).is_err() && route.fuel.is_spent(), "hosts");
        // The user of a login comes from the data that is to be signed.
        let pattern = [&b"*"[..], &b"a".repeat(254), b"b"].concat();
        let to = Hop { user: pattern.into(), ..hop("", "a", &[1]) };
        let destinations = vec![Destination { from: Hop::default(), to }; 500];
        let (caller, user) = (self::caller(&[(1, false)]), b"a".repeat(200_000));
        let route = Route::new(&caller, 1);
        assert!(route.permits(&destinations, Use::Login(&user)).is_err() && route.fuel.is_spent(), "users");
    }

    #[test]
    fn an_authority_is_no_host() {
        let mut host = hop("", "a", &[1]);
        host.keys[0].is_ca = true;
        let destinations = [Destination { from: Hop::default(), to: host }];
        assert!(permitted(&destinations, &caller(&[(1, false)]), Use::Login(b"u"), 0).is_err());
    }
}
