//! The keys of every run: made once, the same in each. Knows their messages and how their signatures are verified.

use std::sync::OnceLock;

use aws_lc_rs::{
    encoding::AsBigEndian,
    signature::{ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair},
};
use strongroom::{
    agent::wire::number,
    devices::{FoundKey, Scheme, Slot},
    public_key::PublicKey,
    rfc4251::Put,
};

/// Where a key is, and what its use takes.
pub const PLAIN: usize = 0;
pub const SPARE: usize = 1;
/// Slow: its signatures are made on the compute pool.
pub const SLOW: usize = 2;
/// Each use is confirmed by a person.
pub const CONFIRMED: usize = 3;
/// On the first device and in memory.
pub const DOUBLE: usize = 4;
/// On the first two devices, where there are two.
pub const SHARED: usize = 5;
/// How many keys are not on one device alone.
const COMMON: usize = 6;
/// Keys that come by `ssh-add`.
pub const SOFT: [usize; 5] = [PLAIN, SPARE, SLOW, CONFIRMED, DOUBLE];
pub const MAX_DEVICES: usize = 3;

/// The key that only this device has.
pub const fn own(device: usize) -> usize {
    COMMON + 2 * device
}

/// The one that wants a touch besides.
pub const fn touched(device: usize) -> usize {
    COMMON + 2 * device + 1
}

pub struct Key {
    pub blob: Vec<u8>,
    /// The body of the message that adds it.
    pub add: Vec<u8>,
    pair: Option<Ed25519KeyPair>,
}

impl Key {
    fn ed25519(number: usize) -> Self {
        let seed = [u8::try_from(number + 1).unwrap(); 32];
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
        let public = pair.public_key().as_ref();
        let blob = PublicKey::Ed25519(public).to_blob();
        let confirmed = number == CONFIRMED;
        let mut add = vec![if confirmed { number::ADD_CONSTRAINED } else { number::ADD_IDENTITY }];
        add.put_string(b"ssh-ed25519");
        add.put_string(public);
        add.put_string(&[&seed, public].concat());
        add.put_string(format!("key {number}").as_bytes());
        if confirmed {
            const SSH_AGENT_CONSTRAIN_CONFIRM: u8 = 2;
            add.push(SSH_AGENT_CONSTRAIN_CONFIRM);
        }
        Self { blob, add, pair: Some(pair) }
    }

    /// The only key that differs from run to run. Its signatures differ from use to use, too, so no trace shows them.
    fn p521() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P521_SHA512_FIXED_SIGNING).unwrap();
        let point = pair.public_key().as_ref();
        let [mut blob, mut add] = [vec![], vec![number::ADD_IDENTITY]];
        for out in [&mut blob, &mut add] {
            out.put_string(b"ecdsa-sha2-nistp521");
            out.put_string(b"nistp521");
            out.put_string(point);
        }
        add.put_mpint(pair.private_key().as_be_bytes().unwrap().as_ref());
        add.put_string(b"slow");
        Self { blob, add, pair: None }
    }

    pub fn verifies(&self, data: &[u8], signature: &[u8]) -> bool {
        PublicKey::parse(&self.blob).unwrap().verify(data, signature).is_ok()
    }

    /// What its device makes.
    pub fn sign(&self, data: &[u8]) -> Vec<u8> {
        self.pair.as_ref().unwrap().sign(data).as_ref().to_vec()
    }
}

pub fn all() -> &'static [Key] {
    static KEYS: OnceLock<Vec<Key>> = OnceLock::new();
    KEYS.get_or_init(|| {
        let make = |number| if number == SLOW { Key::p521() } else { Key::ed25519(number) };
        (0..own(MAX_DEVICES)).map(make).collect()
    })
}

/// The keys on a device, one of so many.
pub fn on_device(device: usize, of: usize) -> Vec<usize> {
    let mut keys = vec![own(device), touched(device)];
    if device == 0 {
        keys.push(DOUBLE);
    }
    if device < 2.min(of) {
        keys.push(SHARED);
    }
    keys
}

/// What a scan finds of a key.
pub fn found(device: usize, key: usize) -> FoundKey {
    FoundKey {
        slot: Slot([u8::try_from(key).unwrap()].as_slice().into()),
        blob: all()[key].blob.clone().into(),
        certificates: Vec::new(),
        label: format!("key {key}"),
        schemes: vec![Scheme::Ed25519],
        decrypts: Vec::new(),
        derives: Vec::new(),
        touch: key == touched(device),
        ssh: true,
        note: String::new(),
    }
}
