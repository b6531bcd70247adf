//! Passphrases of the encrypted store: asked for on the terminal, or read from standard input; how long a new one takes to
//! guess. Knows no store.

use std::io::{self, Read};

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{CliError, terminal, unlock};
use crate::{
    agent::message::{Code, MAX_SECRET, Request},
    client::{Client, ClientError, Reply},
};

/// How often a passphrase is asked for.
const ATTEMPTS: usize = 3;
// Whoever has the state file makes 4000 guesses a second, on a thousand machines with a few tries a second each, and finds
// a passphrase after half of them: so many are too few for a longer time than that, as a power of two, in tenths.
const AN_HOUR: u32 = 248;
const A_MONTH: u32 = 343;
const TEN_YEARS: u32 = 412;
const A_THOUSAND_YEARS: u32 = 478;

/// Where the store's passphrase comes from when a command takes it.
#[derive(Args)]
pub(super) struct Proof {
    /// Read the store's passphrase, or its recovery key, from the first line of standard input
    #[arg(long)]
    passphrase_stdin: bool,
}

impl Proof {
    /// Typed on the terminal.
    pub(super) fn typed() -> Self {
        Self { passphrase_stdin: false }
    }

    /// From the first line of standard input.
    pub(super) fn stdin() -> Self {
        Self { passphrase_stdin: true }
    }

    /// Sends a request, and once more with the passphrase where the daemon wants it.
    pub(super) async fn ask<'a>(
        &self,
        client: &Client,
        request: impl Fn(Option<SecretString>) -> Request<'a>,
    ) -> Result<Reply, CliError> {
        let reply = client.request(&request(None)).await?;
        match reply.read::<()>() {
            Err(ClientError::Refused(failure)) if failure.code == Code::ProofRequired => {}
            _ => return Ok(reply),
        }
        self.give(client, |proof| request(Some(proof))).await
    }

    /// Sends a request that always carries the passphrase; a wrong one is asked for again.
    pub(super) async fn give<'a>(
        &self,
        client: &Client,
        request: impl Fn(SecretString) -> Request<'a>,
    ) -> Result<Reply, CliError> {
        if self.passphrase_stdin {
            return Ok(client.request(&request(unlock::read_line()?)).await?);
        }
        let mut attempt = 1;
        loop {
            let again = if attempt == 1 { "" } else { "That is not it. " };
            let proof = typed(&format!("{again}Passphrase of the store: "))?;
            let reply = client.request(&request(proof)).await?;
            match reply.read::<()>() {
                Err(ClientError::Refused(failure)) if failure.code == Code::WrongPassword && attempt < ATTEMPTS => {
                    attempt += 1;
                }
                _ => return Ok(reply),
            }
        }
    }
}

/// What was typed at this question.
pub(super) fn typed(question: &str) -> Result<SecretString, CliError> {
    let typed = terminal::ask(question).map_err(CliError::NoTerminal)?;
    unlock::line(&typed)
}

/// A new passphrase: from the first line of standard input, or typed twice, with word on how strong it is.
pub(super) fn new_passphrase(from_stdin: bool) -> Result<SecretString, CliError> {
    if from_stdin { unlock::read_line() } else { typed_twice("New passphrase: ") }
}

/// A passphrase for something else than the store, typed twice.
pub(super) fn new_passphrase_of(what: &str) -> Result<SecretString, CliError> {
    typed_twice(&format!("Passphrase of {what}: "))
}

fn typed_twice(question: &str) -> Result<SecretString, CliError> {
    loop {
        let once = typed(question)?;
        terminal::tell(&format!("{}\n", strength(once.expose_secret()))).map_err(CliError::NoTerminal)?;
        let again = typed("The same again: ")?;
        if once.expose_secret() == again.expose_secret() {
            return Ok(once);
        }
        terminal::tell("The two differ.\n").map_err(CliError::NoTerminal)?;
    }
}

/// Two lines of standard input.
pub(super) fn two_lines() -> Result<(SecretString, SecretString), CliError> {
    // As many as two may have; the buffer must not grow, which would leave parts of it behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(2 * MAX_SECRET + 8));
    let failed = |source| CliError::File { path: "-".into(), source };
    io::stdin().lock().take(2 * MAX_SECRET as u64 + 6).read_to_end(&mut bytes).map_err(failed)?;
    let mut lines = bytes.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut next = || unlock::line(lines.next().unwrap_or_default());
    Ok((next()?, next()?))
}

/// How long guessing takes, at most, in words.
fn strength(passphrase: &str) -> String {
    let (word, time) = match bits(passphrase) {
        bits if bits < AN_HOUR => ("Very weak", "an hour"),
        bits if bits < A_MONTH => ("Weak", "a month"),
        bits if bits < TEN_YEARS => ("Fair", "ten years"),
        bits if bits < A_THOUSAND_YEARS => ("Good", "a thousand years"),
        _ => return "Strong: whoever steals the file needs more than a thousand years.".to_owned(),
    };
    let more = if word == "Good" { "" } else { " Five or six words by chance are better." };
    format!("{word}: whoever steals the file may need less than {time}.{more}")
}

/// An upper estimate of how many guesses it takes, as a power of two, in tenths. Words count as from a list of 8,000,
/// repeated and neighbouring characters almost nothing, all others by the kinds of characters that there are.
fn bits(passphrase: &str) -> u32 {
    const WORD: u32 = 130;
    let pool: u32 = [
        (26, char::is_ascii_lowercase as fn(&char) -> bool),
        (26, char::is_ascii_uppercase),
        (10, char::is_ascii_digit),
        (33, |c| c.is_ascii() && !c.is_ascii_alphanumeric()),
        (100, |c| !c.is_ascii()),
    ]
    .into_iter()
    .filter(|(_, of)| passphrase.chars().any(|c| of(&c)))
    .map(|(size, _)| size)
    .sum();
    let each = logarithm(pool.max(2));
    let mut bits = 0;
    for word in passphrase.split_inclusive(|c: char| !c.is_alphabetic()) {
        let mut own = 0;
        let mut before: Option<char> = None;
        for c in word.chars() {
            let near = before.is_some_and(|before| u32::from(before).abs_diff(u32::from(c)) <= 1);
            own += if near { 10 } else { each };
            before = Some(c);
        }
        // A word of any length is a word, in whatever case.
        bits += if word.chars().filter(|c| c.is_alphabetic()).count() >= 3 { own.min(WORD + 20) } else { own };
    }
    bits
}

/// The binary logarithm in tenths, straight between the powers of two. The whole program would load libm for a better one.
fn logarithm(n: u32) -> u32 {
    let whole = n.ilog2();
    10 * whole + (((n - (1 << whole)) * 10) >> whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_and_chance_count_and_patterns_do_not() {
        for weak in ["1234", "aaaaaaaaaaaaaaaaaaaa", "password", "Password1", "abcdefghijklmnop", "secret12"] {
            assert!(bits(weak) < 330, "{weak}: {}", bits(weak));
        }
        for strong in ["correct horse battery staple lamp river", "x7#Qp!m2Zr&9vK", "tX4+qLw0)fhB1%z"] {
            assert!(bits(strong) > 640, "{strong}: {}", bits(strong));
        }
        assert!(strength("1234").starts_with("Very weak: "));
        assert!(strength("correct horse battery staple lamp river").starts_with("Strong: "));
    }
}
