//! OpenSSH's way of asking: a program that gets the question as its argument and prints the answer. Knows what it prints.

use tokio::io::AsyncReadExt;
use zeroize::Zeroizing;

use super::{Kind, MAX_ANSWER, PromptError, program::Program};

/// Waits for the answer: the first line that it prints before it ends with 0.
pub(super) async fn converse(mut program: Program, kind: Kind) -> Result<Zeroizing<Vec<u8>>, PromptError> {
    if kind == Kind::Notice {
        // It has no answer that anybody would read.
        program.succeeds().await;
        return Ok(Zeroizing::default());
    }
    answer(&mut program).await.ok_or(PromptError::Denied)
}

/// Nothing unless it prints no more than it may.
async fn answer(program: &mut Program) -> Option<Zeroizing<Vec<u8>>> {
    let mut stdout = program.stdout()?;
    let mut answer = Zeroizing::new(vec![0; MAX_ANSWER + 1]);
    let mut len = 0;
    loop {
        match stdout.read(&mut answer[len..]).await.ok()? {
            0 => break,
            n => len += n,
        }
        if len > MAX_ANSWER {
            return None;
        }
    }
    let line = answer[..len].iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(len);
    answer.truncate(line);
    program.succeeds().await.then_some(answer)
}
