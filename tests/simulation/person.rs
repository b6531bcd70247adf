//! The person at the prompt: says yes, no or nothing, soon, late or never, and knows the PINs more or less. Knows the text
//! of questions only.

use std::{
    fmt,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use secrecy::SecretString;
use strongroom::prompt::{Asker, Asking, PromptError};
use tokio::time::sleep;

use crate::{
    device::{RIGHT_PIN, Token, WRONG_PINS},
    random::Random,
    world::World,
};

pub struct Person {
    random: Mutex<Random>,
    tokens: Vec<Arc<Token>>,
    world: Arc<World>,
}

impl fmt::Debug for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Person")
    }
}

enum Mind {
    Yes,
    No,
    Nothing,
}

impl Person {
    pub fn new(seed: u64, tokens: Vec<Arc<Token>>, world: Arc<World>) -> Self {
        Self { random: Mutex::new(Random::part(seed, 100)), tokens, world }
    }

    /// What the person will say, and after how long.
    fn mind(&self) -> (Mind, Duration) {
        let random = &mut *self.random.lock().unwrap();
        let mind = match random.between(0, 10) {
            0..7 => Mind::Yes,
            7..9 => Mind::No,
            _ => Mind::Nothing,
        };
        let after = if random.percent(80) { random.between(1, 5_000) } else { random.between(5_000, 90_000) };
        (mind, Duration::from_millis(after))
    }
}

async fn answer((mind, after): (Mind, Duration)) -> Result<(), PromptError> {
    sleep(after).await;
    match mind {
        Mind::Yes => Ok(()),
        Mind::No => Err(PromptError::Denied),
        Mind::Nothing => pending().await,
    }
}

impl Asker for Person {
    fn confirm(&self, text: &str) -> Asking<Result<(), PromptError>> {
        self.world.event(&format!("a person is asked: {}", text.lines().next().unwrap_or_default()));
        let (answer, world) = (answer(self.mind()), Arc::clone(&self.world));
        Box::pin(async move {
            answer.await?;
            world.event("a person says yes");
            world.said_yes();
            Ok(())
        })
    }

    fn pin(&self, text: &str) -> Asking<Result<SecretString, PromptError>> {
        let named = |device: &usize| text.contains(&format!("device{device}"));
        let device = (0..self.tokens.len()).find(named).unwrap();
        self.world.event(&format!("a person is asked for the PIN of device {device}"));
        let answer = answer(self.mind());
        let pin = {
            let random = &mut *self.random.lock().unwrap();
            if random.percent(70) { RIGHT_PIN } else { random.pick(&WRONG_PINS) }
        };
        let token = Arc::clone(&self.tokens[device]);
        Box::pin(async move {
            answer.await?;
            token.typed(pin);
            Ok(SecretString::from(pin))
        })
    }

    fn notice(&self, _: &str) -> Asking<()> {
        self.world.event("a notice is shown");
        Box::pin(pending())
    }
}
