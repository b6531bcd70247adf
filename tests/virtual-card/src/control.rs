//! What a test tells the card, by argument and by lines on standard input, and what the card tells back on standard output.

use std::{
    collections::HashMap,
    process,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use trussed::platform::UserInterface;
use trussed_core::types::consent::Level;

/// The card's finger and its faults, shared with the thread that reads standard input.
#[derive(Clone, Default)]
pub struct Control(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    touch: Touch,
    wanted: bool,
    delays: HashMap<u8, Duration>,
    exit_on: Option<u8>,
    hang_on: Option<u8>,
}

#[derive(Default)]
enum Touch {
    #[default]
    Always,
    Never,
    Once,
}

impl Control {
    /// Obeys one command: `touch always|never|once`, `delay INS:MS`, `exit-on INS|none`, `hang-on INS|none`. Instructions
    /// are in hexadecimal. What hangs goes on when `hang-on` is said again.
    pub fn obey(&self, command: &str, value: &str) -> Result<(), String> {
        let mut state = self.lock();
        match command {
            "touch" => {
                state.touch = match value {
                    "always" => Touch::Always,
                    "never" => Touch::Never,
                    "once" => Touch::Once,
                    _ => return Err(format!("touch {value}?")),
                }
            }
            "delay" => {
                let (instruction, ms) = value.split_once(':').ok_or("delay INS:MS")?;
                let ms = ms.parse().map_err(|error| format!("{ms}: {error}"))?;
                state.delays.insert(byte(instruction)?, Duration::from_millis(ms));
            }
            "exit-on" => state.exit_on = optional(value)?,
            "hang-on" => state.hang_on = optional(value)?,
            _ => return Err(format!("{command}?")),
        }
        self.0.1.notify_all();
        Ok(())
    }

    /// Does what is to go wrong with this instruction.
    pub fn fault(&self, instruction: u8) {
        let mut state = self.lock();
        if let Some(delay) = state.delays.get(&instruction).copied() {
            drop(state);
            thread::sleep(delay);
            state = self.lock();
        }
        if state.exit_on == Some(instruction) {
            println!("exit {instruction:02x}");
            process::exit(0);
        }
        if state.hang_on == Some(instruction) {
            println!("hang {instruction:02x}");
            let _going_on = self.0.1.wait_while(state, |state| state.hang_on == Some(instruction)).expect("no panic");
        }
    }

    /// A command begins: it has not wanted a touch yet.
    pub fn begin(&self) {
        self.lock().wanted = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().expect("no panic")
    }
}

impl UserInterface for Control {
    fn check_user_presence(&mut self) -> Level {
        let mut state = self.lock();
        if !state.wanted {
            state.wanted = true;
            println!("touch");
        }
        match state.touch {
            Touch::Always => Level::Normal,
            Touch::Never => Level::None,
            Touch::Once => {
                state.touch = Touch::Never;
                Level::Normal
            }
        }
    }
}

/// A byte in hexadecimal.
pub fn byte(text: &str) -> Result<u8, String> {
    u8::from_str_radix(text, 16).map_err(|error| format!("{text}: {error}"))
}

fn optional(text: &str) -> Result<Option<u8>, String> {
    if text == "none" { Ok(None) } else { byte(text).map(Some) }
}
