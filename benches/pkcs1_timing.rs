//! Can the time of a PKCS#1 v1.5 decryption tell good padding from bad? This measures, and fails if it can.
//!
//! Method. One RSA-1024 key, whose arithmetic hides the least of what comes after it; as many ciphertexts with good
//! padding as with bad, the bad ones with a wrong first byte, a wrong second byte, a zero byte among the first eight of
//! the padding, or no zero byte at all, in equal parts. The length of a reply is no secret, and takes a little time: for each
//! bad ciphertext there is a good one whose message is as long as what stands in for the bad one. There are thousands of
//! each, since every number has a time of its own; with a few hundred the classes differ by which were drawn. The samples of
//! both are interleaved at random and taken on one thread, each the wall-clock time of one `SoftKey::operate`; the first tenth only warms up. The means
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
use support::{
    command, run,
    soft::{Soft, unhex},
};
use tempfile::TempDir;

const SAMPLES: usize = 200_000;
const MODULUS: usize = 128;
/// Of each class.
const CIPHERTEXTS: usize = 8192;
const LIMIT: f64 = 4.5;
const PERCENTILES: [usize; 6] = [10, 25, 50, 75, 90, 100];

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let samples = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(SAMPLES);
    let dir = TempDir::new().expect("a directory");
    let key = Soft::generate(dir.path(), "key", &["-t", "rsa", "-b", "1024"]);
    let pem = run(command("ssh-keygen", dir.path()).args(["-e", "-m", "PKCS8", "-f", "key.pub"])).ok();
    fs::write(dir.path().join("key.pem"), pem).unwrap();
    let bad = encrypt(dir.path(), (0..CIPHERTEXTS).map(spoilt));
    let lengths = bad.iter().map(|bad| key.decrypt(DecryptScheme::RsaPkcs1v15, b"", bad).expect("a message").len());
    let good = encrypt(dir.path(), lengths.map(padded));

    let mut times = [Vec::with_capacity(samples), Vec::with_capacity(samples)];
    let mut ciphertext = [0; MODULUS];
    for n in 0..samples {
        let [class, high, low] = random();
        let which = usize::from(u16::from_be_bytes([high, low])) % CIPHERTEXTS;
        // Both from the same place: where in memory a class lies is not what is asked.
        ciphertext.copy_from_slice(&[&good, &bad][usize::from(class & 1)][which]);
        let start = Instant::now();
        let result = key.decrypt(DecryptScheme::RsaPkcs1v15, b"", &ciphertext);
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

/// EMSA's counterpart for encryption: 0, 2, at least eight bytes that are not zero, 0, a message of this length.
fn padded(len: usize) -> Vec<u8> {
    let mut block: Vec<_> = random::<MODULUS>().into_iter().map(|byte| byte.max(1)).collect();
    (block[0], block[1], block[MODULUS - 1 - len]) = (0, 2, 0);
    block
}

fn spoilt(n: usize) -> Vec<u8> {
    let [len] = random();
    let mut block = padded(usize::from(len) % (MODULUS - 10));
    match n % 4 {
        0 => block[0] = 1,
        1 => block[1] = 1,
        2 => block[2 + n / 4 % 8] = 0,
        _ => block[2..].iter_mut().for_each(|byte| *byte = (*byte).max(1)),
    }
    block
}

/// The blocks to the public exponent, by Python, which takes no second for all of them.
fn encrypt(dir: &Path, blocks: impl Iterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    const PROGRAM: &str = "import sys\nn = int(sys.argv[1], 16)\nfor line in open('blocks'):\n    print('%0256x' % pow(int(line, 16), 65537, n))";
    let hex = |block: Vec<u8>| block.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    fs::write(dir.join("blocks"), blocks.map(hex).collect::<String>()).unwrap();
    let modulus = run(command("openssl", dir).args(["rsa", "-pubin", "-in", "key.pem", "-noout", "-modulus"])).ok();
    let modulus = modulus.trim().trim_start_matches("Modulus=");
    let lines = run(command("python3", dir).args(["-c", PROGRAM, modulus])).ok();
    lines.lines().map(unhex).collect()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).unwrap();
    bytes
}
