//! Soft keys for tests: of ssh-keygen's making, and of the bytes of an ADD_IDENTITY request.

use std::{fs, path::Path, process::Command};

use base64ct::{Base64, Encoding};
use strongroom::{
    agent::wire::{PrivateParts, Request, number::ADD_IDENTITY},
    devices::{DecryptScheme, DeriveScheme, DeviceError, Input, Operation, Scheme, Signature, soft::SoftKey},
    public_key::{KeyType, PublicKey},
    rfc4251::Reader,
};
use zeroize::Zeroizing;

use super::{command, keygen, run, with_suffix};

/// A soft key and the blob of its plain public key.
pub struct Soft {
    pub key: SoftKey,
    pub blob: Vec<u8>,
}

impl Soft {
    /// A new key; `options` are ssh-keygen's. Its public half is in `dir/name.pub`.
    pub fn generate(dir: &Path, name: &str, options: &[&str]) -> Self {
        from_openssh_file(&keygen(dir, name, options))
    }

    /// The key in a file of any form that ssh-keygen reads, which it rewrites in its own, with the public half beside it.
    pub fn convert(dir: &Path, name: &str, file: &str) -> Self {
        let path = dir.join(name);
        fs::copy(file, &path).unwrap();
        run(Command::new("chmod").arg("600").arg(&path)).ok();
        run(command("ssh-keygen", dir).args(["-q", "-p", "-P", "", "-N", "", "-f"]).arg(&path)).ok();
        let public = run(command("ssh-keygen", dir).arg("-yf").arg(&path)).ok();
        fs::write(with_suffix(&path, ".pub"), public).unwrap();
        from_openssh_file(&path)
    }

    /// The key in the fields of an ADD_IDENTITY request, from the name of its type to its comment.
    pub fn from_request(fields: &[u8]) -> Self {
        let body = [&[ADD_IDENTITY], fields].concat();
        let Ok(Request::Add(request)) = Request::read(&body) else { panic!("the request is refused") };
        let PrivateParts::Soft(parts) = &request.private else { panic!("it is no soft key") };
        Self { key: SoftKey::new(parts).unwrap(), blob: request.blob.clone() }
    }

    /// The type in the public key's blob.
    pub fn key_type(&self) -> KeyType {
        PublicKey::parse(&self.blob).unwrap().key_type()
    }

    pub fn sign(&self, scheme: Scheme, input: Input<'_>) -> Result<Signature, DeviceError> {
        self.key.operate(&Operation::Sign { scheme, input }).map(|outcome| outcome.signature().unwrap())
    }

    pub fn decrypt(
        &self,
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let operation = Operation::Decrypt { scheme, label: label.into(), ciphertext: ciphertext.into() };
        self.key.operate(&operation).map(|outcome| outcome.secret().unwrap())
    }

    pub fn derive(&self, scheme: DeriveScheme, peer: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        self.key.operate(&Operation::Derive { scheme, peer: peer.into() }).map(|outcome| outcome.secret().unwrap())
    }
}

/// The key in a file of OpenSSH's form without passphrase (PROTOCOL.key), whatever its type's name: its private section
/// has two check integers, then the fields of an ADD_IDENTITY request.
pub fn from_openssh_file(path: &Path) -> Soft {
    let text = fs::read_to_string(path).unwrap();
    let base64: String = text.lines().filter(|line| !line.starts_with('-')).collect();
    let bytes = Base64::decode_vec(&base64).unwrap();
    let mut r = Reader::new(bytes.strip_prefix(b"openssh-key-v1\0").unwrap());
    for _ in ["cipher", "derivation", "its options"] {
        r.string().unwrap();
    }
    assert_eq!(r.u32(), Ok(1));
    let _public = r.string().unwrap();
    let private = r.string().unwrap();
    let mut fields = Reader::new(&private[8..]);
    let others = match fields.string().unwrap() {
        b"ssh-rsa" => 7,
        name if name.starts_with(b"ecdsa") => 4,
        _ => 3,
    };
    // Behind the comment, which is the last of them, there is padding.
    for _ in 0..others {
        fields.string().unwrap();
    }
    Soft::from_request(&private[8..private.len() - fields.rest().len()])
}

/// A message to sign.
pub fn message(bytes: &[u8]) -> Input<'_> {
    Input::Message(bytes.into())
}

/// A digest to sign.
pub fn digest(bytes: &[u8]) -> Input<'_> {
    Input::Digest(bytes.into())
}

/// The bytes that a text in hexadecimal stands for.
pub fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}
