//! Can the time of a PKCS#1 v1.5 decryption tell good padding from bad? This measures, and fails if it can.
//!
//! Method. One RSA-1024 key, whose arithmetic hides the least of what comes after it; as many ciphertexts with good
//! padding as with bad, the bad ones with a wrong first byte, a wrong second byte, a zero byte among the first eight of
//! the padding, or no zero byte at all, in equal parts. Messages with good padding have random lengths, as those that
//! stand in for bad padding do: the length of a reply is no secret. The samples of both classes are interleaved at random
//! and taken on one thread, each the wall-clock time of one `SoftKey::operate`; the first tenth only warms up. The means
//! are compared by Welch's t-test, over all samples and over those below several percentiles of both classes together,
//! since what interrupts a process hides small differences (dudect: Reparaz, Balasch and Verbauwhede, 2017). A |t| above
//! 4.5 in any of them fails. The difference that would have been found is printed: it shrinks with the square root of
//! the number of samples.
//!
//! `cargo bench --bench pkcs1_timing [-- SAMPLES]`, best on a machine that does nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use aws_lc_rs::rand;
use strongroom::devices::DecryptScheme;
use support::{command, run, soft::Soft};
use tempfile::TempDir;

const SAMPLES: usize = 200_000;
const MODULUS: usize = 128;
/// Of each class.
const CIPHERTEXTS: usize = 256;
const LIMIT: f64 = 4.5;
const PERCENTILES: [usize; 6] = [10, 25, 50, 75, 90, 100];

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let samples = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(SAMPLES);
    let dir = TempDir::new().expect("a directory");
    let key = Soft::generate(dir.path(), "key", &["-t", "rsa", "-b", "1024"]);
    let pem = run(command("ssh-keygen", dir.path()).args(["-e", "-m", "PKCS8", "-f", "key.pub"])).ok();
    fs::write(dir.path().join("key.pem"), pem).unwrap();
    let good: Vec<_> = (0..CIPHERTEXTS).map(|_| encrypt(dir.path(), &padded())).collect();
    let bad: Vec<_> = (0..CIPHERTEXTS).map(|n| encrypt(dir.path(), &spoilt(n))).collect();

    let mut times = [Vec::new(), Vec::new()];
    for n in 0..samples {
        let [class, which] = random();
        let ciphertext = [&good, &bad][usize::from(class & 1)][usize::from(which)].as_slice();
        let start = Instant::now();
        let result = key.decrypt(DecryptScheme::RsaPkcs1v15, b"", ciphertext);
        let time = start.elapsed();
        result.expect("no padding is an error");
        if n >= samples / 10 {
            times[usize::from(class & 1)].push(time);
        }
    }

    let [good, bad] = times;
    let mut all: Vec<_> = good.iter().chain(&bad).copied().collect();
    all.sort_unstable();
    println!("{} decryptions, median {:?}", all.len(), all[all.len() / 2]);
    let mut told_apart = false;
    for percentile in PERCENTILES {
        let crop = all[all.len() * percentile / 100 - 1];
        let (difference, error) = compare(&good, &bad, crop);
        let t = difference / error;
        println!(
            "up to percentile {percentile:3}: good - bad = {difference:8.1} ns, t = {t:5.2}; \
             {:.0} ns would have been found",
            LIMIT * error
        );
        told_apart |= t.abs() > LIMIT;
    }
    if told_apart {
        println!("FAILED: the time tells good padding from bad");
        return ExitCode::FAILURE;
    }
    println!("ok: the time does not tell good padding from bad");
    ExitCode::SUCCESS
}

/// The difference of the means of what is at most `crop`, and its standard error, both in nanoseconds.
fn compare(good: &[Duration], bad: &[Duration], crop: Duration) -> (f64, f64) {
    let [good, bad] = [good, bad].map(|times| {
        let times: Vec<_> = times.iter().filter(|t| **t <= crop).map(|t| t.as_secs_f64() * 1e9).collect();
        let n = times.len() as f64;
        let mean = times.iter().sum::<f64>() / n;
        let variance = times.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (mean, variance / n)
    });
    (good.0 - bad.0, (good.1 + bad.1).sqrt())
}

/// EMSA's counterpart for encryption: 0, 2, at least eight bytes that are not zero, 0, the message.
fn padded() -> Vec<u8> {
    let [len] = random();
    let zero = MODULUS - 1 - usize::from(len) % (MODULUS - 10);
    let mut block: Vec<_> = random::<MODULUS>().into_iter().map(|byte| byte.max(1)).collect();
    (block[0], block[1], block[zero]) = (0, 2, 0);
    block
}

fn spoilt(n: usize) -> Vec<u8> {
    let mut block = padded();
    match n % 4 {
        0 => block[0] = 1,
        1 => block[1] = 1,
        2 => block[2 + n / 4 % 8] = 0,
        _ => block[2..].iter_mut().for_each(|byte| *byte = (*byte).max(1)),
    }
    block
}

fn encrypt(dir: &Path, block: &[u8]) -> Vec<u8> {
    fs::write(dir.join("block"), block).unwrap();
    let options = "pkeyutl -encrypt -pubin -inkey key.pem -pkeyopt rsa_padding_mode:none -in block -out ciphertext";
    run(command("openssl", dir).args(options.split(' '))).ok();
    fs::read(dir.join("ciphertext")).unwrap()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).unwrap();
    bytes
}
