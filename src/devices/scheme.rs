//! The names that schemes have on the wire and in the audit log. Knows no message.

use super::{DecryptScheme, DeriveScheme, Hash, Scheme};

/// The scheme of a plain sign request: with a sign request's flags, answered by an SSH signature.
pub const SSH: &str = "ssh";

/// Signature schemes that have a name of their own. The others sign as [`SSH`] only.
const SIGN: &[(&str, Scheme)] = &[
    ("rsa-pkcs1v15-sha1", Scheme::RsaPkcs1v15(Hash::Sha1)),
    ("rsa-pkcs1v15-sha256", Scheme::RsaPkcs1v15(Hash::Sha256)),
    ("rsa-pkcs1v15-sha384", Scheme::RsaPkcs1v15(Hash::Sha384)),
    ("rsa-pkcs1v15-sha512", Scheme::RsaPkcs1v15(Hash::Sha512)),
    ("rsa-pkcs1v15-raw", Scheme::RsaPkcs1v15Raw),
    ("rsa-pss-sha256", Scheme::RsaPss(Hash::Sha256)),
    ("rsa-pss-sha384", Scheme::RsaPss(Hash::Sha384)),
    ("rsa-pss-sha512", Scheme::RsaPss(Hash::Sha512)),
    ("ecdsa-sha256", Scheme::Ecdsa(Hash::Sha256)),
    ("ecdsa-sha384", Scheme::Ecdsa(Hash::Sha384)),
    ("ecdsa-sha512", Scheme::Ecdsa(Hash::Sha512)),
    ("ed25519", Scheme::Ed25519),
    ("ed25519-blinded-tor", Scheme::Ed25519BlindedTor),
];

const DECRYPT: &[(&str, DecryptScheme)] = &[
    ("rsa-oaep-sha1", DecryptScheme::RsaOaep(Hash::Sha1)),
    ("rsa-oaep-sha256", DecryptScheme::RsaOaep(Hash::Sha256)),
    ("rsa-pkcs1v15", DecryptScheme::RsaPkcs1v15),
];

const DERIVE: &[(&str, DeriveScheme)] = &[("ecdh", DeriveScheme::Ecdh), ("x25519", DeriveScheme::X25519)];

/// The scheme's name; `None` for what signs as [`SSH`] only, and for combinations that nobody uses.
pub fn sign_name(scheme: Scheme) -> Option<&'static str> {
    name(SIGN, scheme)
}

/// The scheme's name; `None` for combinations that nobody uses.
pub fn decrypt_name(scheme: DecryptScheme) -> Option<&'static str> {
    name(DECRYPT, scheme)
}

/// The scheme's name.
pub fn derive_name(scheme: DeriveScheme) -> Option<&'static str> {
    name(DERIVE, scheme)
}

/// The signature scheme with this name; [`SSH`] is none of them.
pub fn sign_scheme(name: &[u8]) -> Option<Scheme> {
    scheme(SIGN, name)
}

/// The decryption scheme with this name.
pub fn decrypt_scheme(name: &[u8]) -> Option<DecryptScheme> {
    scheme(DECRYPT, name)
}

/// The key agreement scheme with this name.
pub fn derive_scheme(name: &[u8]) -> Option<DeriveScheme> {
    scheme(DERIVE, name)
}

/// The names of all signature schemes but [`SSH`].
pub fn sign_names() -> impl Iterator<Item = &'static str> {
    SIGN.iter().map(|(name, _)| *name)
}

/// The names of all decryption schemes.
pub fn decrypt_names() -> impl Iterator<Item = &'static str> {
    DECRYPT.iter().map(|(name, _)| *name)
}

/// The names of all key agreement schemes.
pub fn derive_names() -> impl Iterator<Item = &'static str> {
    DERIVE.iter().map(|(name, _)| *name)
}

/// The hash whose digest may be given in place of the message.
pub fn hash(scheme: Scheme) -> Option<Hash> {
    match scheme {
        Scheme::RsaPkcs1v15(hash) | Scheme::RsaPss(hash) | Scheme::Ecdsa(hash) => Some(hash),
        Scheme::RsaPkcs1v15Raw | Scheme::Ed25519 | Scheme::Ed25519BlindedTor | Scheme::MlDsa44Ed25519 | Scheme::Sk => {
            None
        }
    }
}

fn name<T: Copy + PartialEq>(table: &[(&'static str, T)], wanted: T) -> Option<&'static str> {
    table.iter().find(|(_, scheme)| *scheme == wanted).map(|(name, _)| *name)
}

fn scheme<T: Copy>(table: &[(&str, T)], wanted: &[u8]) -> Option<T> {
    table.iter().find(|(name, _)| name.as_bytes() == wanted).map(|(_, scheme)| *scheme)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back_to_its_scheme() {
        for (name, scheme) in SIGN {
            assert_eq!((sign_name(*scheme), sign_scheme(name.as_bytes())), (Some(*name), Some(*scheme)));
        }
        for (name, scheme) in DECRYPT {
            assert_eq!((decrypt_name(*scheme), decrypt_scheme(name.as_bytes())), (Some(*name), Some(*scheme)));
        }
        for (name, scheme) in DERIVE {
            assert_eq!((derive_name(*scheme), derive_scheme(name.as_bytes())), (Some(*name), Some(*scheme)));
        }
        assert_eq!((sign_name(Scheme::Sk), sign_scheme(b"ssh"), sign_scheme(b"")), (None, None, None));
    }
}
