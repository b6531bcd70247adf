//! GnuPG's way of asking: a pinentry, spoken to in lines of the Assuan protocol. Knows its commands and answers.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{ChildStdin, ChildStdout},
};
use zeroize::Zeroizing;

use super::{Kind, MAX_ANSWER, PromptError, Unavailable, program::Program};

/// The longest line, with its end (Assuan manual, 3.1).
const MAX_LINE: usize = 1000;
/// `GPG_ERR_CANCELED`, `GPG_ERR_NOT_CONFIRMED` and `GPG_ERR_FULLY_CANCELED`: what a person decided.
const DECIDED: [u32; 3] = [99, 114, 198];
/// `GPG_ERR_TIMEOUT`
const TIMED_OUT: u32 = 62;
/// What of an error's number says what happened; the rest says where.
const ERROR_CODE: u32 = 0xffff;

/// Asks, and waits for the answer.
pub(super) async fn converse(mut program: Program, text: &str, kind: Kind) -> Result<Zeroizing<Vec<u8>>, PromptError> {
    let (Some(stdin), Some(stdout)) = (program.stdin(), program.stdout()) else {
        return Err(program.unusable("it cannot be spoken to").into());
    };
    let mut line = Lines { stdin, stdout, read: Zeroizing::new(Vec::with_capacity(MAX_LINE + MAX_ANSWER)) };
    // It greets, whatever it is; a program that says nothing is none.
    line.answer(&program).await.map_err(|_| program.unusable("it is no pinentry"))?;
    for (name, variable) in [("ttyname", "GPG_TTY"), ("ttytype", "TERM"), ("lc-ctype", "LC_CTYPE")] {
        if let Some(value) = program.variable(variable).and_then(|value| value.into_string().ok()) {
            line.try_command(&program, &format!("OPTION {name}={}", encoded(&value))).await?;
        }
    }
    line.try_command(&program, "SETTITLE Strongroom").await?;
    line.command(&program, &format!("SETDESC {}", encoded(text))).await?;
    match kind {
        Kind::Secret(label) => {
            line.try_command(&program, &format!("SETPROMPT {label}")).await?;
            line.command(&program, "GETPIN").await
        }
        Kind::Confirm => {
            line.command(&program, "CONFIRM").await?;
            Ok(Zeroizing::default())
        }
        Kind::Notice => line.command(&program, "MESSAGE").await,
    }
}

/// The two ends of the conversation.
struct Lines {
    stdin: ChildStdin,
    stdout: ChildStdout,
    /// What was read and not yet looked at. It never grows: that would leave copies of secrets behind.
    read: Zeroizing<Vec<u8>>,
}

impl Lines {
    async fn command(&mut self, program: &Program, command: &str) -> Result<Zeroizing<Vec<u8>>, PromptError> {
        let sent = self.stdin.write_all(format!("{command}\n").as_bytes()).await;
        sent.map_err(|_| ended(program))?;
        self.answer(program).await
    }

    /// A command that some pinentries do not know.
    async fn try_command(&mut self, program: &Program, command: &str) -> Result<(), PromptError> {
        match self.command(program, command).await {
            Err(PromptError::Unavailable(reason)) if reason != ended(program) => Ok(()),
            other => other.map(drop),
        }
    }

    /// What stands in the lines `D` before the line `OK`.
    async fn answer(&mut self, program: &Program) -> Result<Zeroizing<Vec<u8>>, PromptError> {
        let mut data = Zeroizing::new(Vec::with_capacity(MAX_ANSWER));
        loop {
            let line = self.line().await.ok_or_else(|| ended(program))?;
            let text = std::str::from_utf8(&line).unwrap_or_default();
            let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
            match word {
                "OK" => return Ok(data),
                "D" => decode(rest, &mut data).ok_or(PromptError::Denied)?,
                "ERR" => return Err(refusal(program, rest)),
                // Comments and progress.
                _ => {}
            }
        }
    }

    async fn line(&mut self) -> Option<Zeroizing<Vec<u8>>> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = Zeroizing::new(self.read[..end].to_vec());
                self.read.drain(..=end);
                return Some(line);
            }
            if self.read.len() >= MAX_LINE {
                return None;
            }
            let mut chunk = Zeroizing::new([0; MAX_ANSWER]);
            let room = self.read.capacity() - self.read.len();
            let room = room.min(chunk.len());
            match self.stdout.read(&mut chunk[..room]).await.ok()? {
                0 => return None,
                n => self.read.extend_from_slice(&chunk[..n]),
            }
        }
    }
}

fn ended(program: &Program) -> Unavailable {
    program.unusable("it ended before it answered")
}

/// `ERR`'s number and words.
fn refusal(program: &Program, rest: &str) -> PromptError {
    let (number, words) = rest.split_once(' ').unwrap_or((rest, "no reason"));
    match number.parse::<u32>().map(|number| number & ERROR_CODE) {
        Ok(code) if DECIDED.contains(&code) => PromptError::Denied,
        Ok(TIMED_OUT) => PromptError::TimedOut,
        _ => program.unusable(&super::harmless(words)).into(),
    }
}

/// A text in one line, cut where a line must end.
fn encoded(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '%' => out.push_str("%25"),
            '\n' => out.push_str("%0A"),
            '\r' => out.push_str("%0D"),
            c => out.push(c),
        }
        if out.len() > MAX_LINE - 32 {
            out.push('…');
            break;
        }
    }
    out
}

/// Undoes the percent signs of a line `D`; `None` for what is none, or too long.
fn decode(text: &str, out: &mut Zeroizing<Vec<u8>>) -> Option<()> {
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            byte => byte,
        };
        if out.len() == MAX_ANSWER {
            return None;
        }
        out.push(byte);
    }
    Some(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn texts_fit_into_a_line_and_back() {
        assert_eq!(encoded("100 %\nof it"), "100 %25%0Aof it");
        assert!(encoded(&"ü%".repeat(2000)).len() < MAX_LINE - 16);
        let mut out = Zeroizing::new(Vec::new());
        decode("a%25b%0Ac%c3%BC", &mut out).unwrap();
        assert_eq!(*out, "a%b\ncü".as_bytes());
        assert!(decode("%4", &mut out).is_none());
        assert!(decode("%zz", &mut out).is_none());
        assert!(decode(&"x".repeat(MAX_ANSWER + 1), &mut out).is_none());
    }
}
