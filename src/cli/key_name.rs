//! Which key a word means: its name, a fingerprint, its key identifier, its comment, or a file with its public half.

use std::path::Path;

use super::{CliError, output::unhex, public_key_file::PublicKeyFile};
use crate::{
    client::{Client, Key},
    prompt::harmless,
    public_key::{FingerprintHash, PublicKey, fingerprint},
    spki,
};

/// Puts in front of the examples of a help what a KEY is.
pub(super) fn with_names(examples: &str) -> String {
    format!("{NAMES}\n\n{examples}")
}

const NAMES: &str = "A KEY is looked for in this order: its name in the vault; a fingerprint (SHA256:…, MD5:…, SHA1:…, \
    SHA384:…, SHA512:…) or key identifier (40 hexadecimal digits); its comment; a file with the public key (.pub, PEM, DER) \
    or a certificate. A word that begins with `/`, `./` or `../` is always a file.";

/// The listed key that this name means.
pub(super) async fn resolve(client: &Client, name: &str) -> Result<Key, CliError> {
    find(client.keys().await?, name)
}

/// The one of these keys that this name means.
pub(super) fn find(keys: Vec<Key>, name: &str) -> Result<Key, CliError> {
    let is = |test: &dyn Fn(&Key) -> bool| keys.iter().filter(|key| test(key)).cloned().collect::<Vec<_>>();
    let mut found = Vec::new();
    if !is_path(name) {
        found = is(&|key| !name.is_empty() && key.name == name);
        if found.is_empty() {
            found = is(&|key| is_fingerprint(&key.blob, name));
        }
        if found.is_empty() {
            found = is(&|key| !name.is_empty() && key.comment == name);
        }
    }
    if found.is_empty() && is_file(name) {
        let wanted = PublicKeyFile::read(Path::new(name))?.blob;
        found = is(&|key| key.blob == wanted);
    }
    match found.len() {
        0 => Err(CliError::NoSuchKey(name.to_owned())),
        1 => Ok(found.swap_remove(0)),
        _ => {
            let describe = |key: &Key| format!("  {}  {}", sha256(key), harmless(label(key)));
            Err(CliError::Ambiguous { name: name.to_owned(), candidates: found.iter().map(describe).collect() })
        }
    }
}

/// Whether the word can only mean a file, or one is there. Fingerprints have slashes, too.
pub(super) fn is_file(name: &str) -> bool {
    is_path(name) || Path::new(name).is_file()
}

fn is_path(name: &str) -> bool {
    ["/", "./", "../"].iter().any(|start| name.starts_with(start))
}

/// Its SHA-256 fingerprint.
pub(super) fn sha256(key: &Key) -> String {
    fingerprint(&key.blob, FingerprintHash::Sha256)
}

/// What a person calls it.
pub(super) fn label(key: &Key) -> &str {
    if key.name.is_empty() { &key.comment } else { &key.name }
}

fn is_fingerprint(blob: &[u8], name: &str) -> bool {
    if let Some(id) = unhex(name).filter(|id| id.len() == 20) {
        let own = PublicKey::parse(blob).ok().and_then(|key| spki::key_identifier(&key));
        return own.is_some_and(|own| own[..] == id[..]);
    }
    if name.len() == 47 && name.matches(':').count() == 15 {
        return fingerprint(blob, FingerprintHash::Md5)
            .strip_prefix("MD5:")
            .is_some_and(|own| own.eq_ignore_ascii_case(name));
    }
    let Some((hash, digits)) = name.split_once(':') else { return false };
    match FingerprintHash::from_name(hash) {
        Some(FingerprintHash::Md5) => fingerprint(blob, FingerprintHash::Md5).eq_ignore_ascii_case(name),
        Some(hash) => fingerprint(blob, hash).split_once(':').is_some_and(|own| own.1 == digits.trim_end_matches('=')),
        None => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(byte: u8, name: &str, comment: &str) -> Key {
        let blob = PublicKey::Ed25519(&[byte; 32]).to_blob();
        Key { blob, name: name.to_owned(), comment: comment.to_owned(), ..Key::default() }
    }

    #[test]
    fn a_key_has_many_names() {
        let keys = || vec![key(1, "vote", "shared"), key(2, "", "shared"), key(3, "", "vote"), key(4, "", "x y")];
        let found = |name: &str| find(keys(), name).map(|key| key.blob[19]);
        assert_eq!(found("vote").unwrap(), 1, "a name goes before a comment");
        assert_eq!(found("x y").unwrap(), 4);
        for hash in ["md5", "sha1", "sha256", "sha384", "sha512"] {
            let print = fingerprint(&keys()[1].blob, FingerprintHash::from_name(hash).unwrap());
            assert_eq!(found(&print).unwrap(), 2, "{print}");
        }
        let md5 = fingerprint(&keys()[1].blob, FingerprintHash::Md5);
        assert_eq!(found(md5.strip_prefix("MD5:").unwrap()).unwrap(), 2);
        assert_eq!(found(&md5.to_lowercase()).unwrap(), 2);
        let id = spki::key_identifier(&PublicKey::Ed25519(&[4; 32])).unwrap();
        assert_eq!(found(&super::super::output::hex(&id).to_uppercase()).unwrap(), 4);
    }

    #[test]
    fn an_unclear_name_lists_whom_it_may_mean() {
        let keys = vec![key(1, "vote", "shared"), key(2, "", "shared")];
        let Err(CliError::Ambiguous { candidates, .. }) = find(keys.clone(), "shared") else { unreachable!() };
        assert!(candidates[0].contains(&sha256(&keys[0])) && candidates[1].contains(&sha256(&keys[1])));
        for nobody in ["", "nobody", "SHA256:", "MD5:", ":", "/nowhere/x", &"0".repeat(40)] {
            assert!(find(keys.clone(), nobody).is_err(), "{nobody}");
        }
    }
}
