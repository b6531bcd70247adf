//! The limit: how many signatures the arithmetic alone makes in a second, on as many threads as there are cores.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RSA_PKCS1_SHA256, RsaKeyPair},
};

const MESSAGE: [u8; 600] = [0x5a; 600];

/// What signs.
pub enum Signer {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

impl Signer {
    /// A new key of ssh-keygen's type: `ed25519`, `ecdsa`, or `rsa` with the bits behind it.
    pub fn new(name: &str) -> Self {
        let rsa = |size| Self::Rsa(RsaKeyPair::generate(size).expect("a key"));
        match name {
            "ed25519" => Self::Ed25519(Ed25519KeyPair::generate().expect("a key")),
            "p256" => Self::P256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key")),
            "rsa2048" => rsa(KeySize::Rsa2048),
            "rsa3072" => rsa(KeySize::Rsa3072),
            "rsa4096" => rsa(KeySize::Rsa4096),
            _ => panic!("no such key: {name}"),
        }
    }

    fn sign(&self, random: &SystemRandom) {
        match self {
            Self::Ed25519(key) => drop(key.sign(&MESSAGE)),
            Self::P256(key) => drop(key.sign(random, &MESSAGE).expect("a signature")),
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, random, &MESSAGE, &mut signature).expect("a signature");
            }
        }
    }

    /// Signatures a second on so many threads.
    pub fn rate(&self, threads: usize, window: Duration) -> f64 {
        let (ready, over, count) = (Barrier::new(threads + 1), AtomicBool::new(false), AtomicU64::new(0));
        let mut elapsed = Duration::ZERO;
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let random = SystemRandom::new();
                    self.sign(&random);
                    ready.wait();
                    let mut own = 0;
                    while !over.load(Ordering::Relaxed) {
                        self.sign(&random);
                        own += 1;
                    }
                    count.fetch_add(own, Ordering::Relaxed);
                });
            }
            ready.wait();
            let start = Instant::now();
            thread::sleep(window);
            over.store(true, Ordering::Relaxed);
            elapsed = start.elapsed();
        });
        count.load(Ordering::Relaxed) as f64 / elapsed.as_secs_f64()
    }
}
