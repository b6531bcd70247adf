//! Command chaining and GET RESPONSE (ISO 7816-4) around opcard, which wants whole commands and gives whole answers.

use iso7816::{Command, Instruction, Status};
use vpicc::VSmartCard;

use crate::control::Control;

/// The longest command and answer, as opcard says in its extended length information.
const LONGEST: usize = 7609;

/// A card in a reader.
pub struct Transport<T: opcard::Client> {
    card: opcard::Card<T>,
    control: Control,
    chain: Option<Command<LONGEST>>,
    answer: Vec<u8>,
}

impl<T: opcard::Client> Transport<T> {
    /// The card with nothing under way.
    pub fn new(card: opcard::Card<T>, control: Control) -> Self {
        Self { card, control, chain: None, answer: Vec::new() }
    }

    fn answer(&mut self, apdu: &[u8]) -> Result<(Vec<u8>, Status), Status> {
        let command = Command::<LONGEST>::try_from(apdu).map_err(|error| {
            log::warn!("no APDU: {apdu:02x?}: {error:?}");
            Status::WrongLength
        })?;
        if command.instruction() == Instruction::GetResponse {
            return Ok(self.next(command.expected()));
        }
        let last = command.class().chain().last_or_only();
        let whole = match self.chain.take() {
            Some(mut chain) => {
                chain.extend_from_command(&command).map_err(|_| Status::WrongLength)?;
                chain
            }
            None => command,
        };
        self.answer.clear();
        if !last {
            self.chain = Some(whole);
            return Ok((Vec::new(), Status::Success));
        }
        let mut answer = heapless::Vec::<u8, LONGEST>::new();
        self.control.begin();
        self.card.handle(whole.as_view(), &mut answer)?;
        self.answer = answer.to_vec();
        Ok(self.next(whole.expected()))
    }

    /// At most `length` bytes of what is left of the answer.
    fn next(&mut self, length: usize) -> (Vec<u8>, Status) {
        let rest = self.answer.split_off(length.min(self.answer.len()));
        let part = std::mem::replace(&mut self.answer, rest);
        let status = match self.answer.len() {
            0 => Status::Success,
            rest => Status::MoreAvailable(u8::try_from(rest).unwrap_or(u8::MAX)),
        };
        (part, status)
    }

    fn forget(&mut self) {
        self.chain = None;
        self.answer.clear();
        self.card.reset();
    }
}

impl<T: opcard::Client> VSmartCard for Transport<T> {
    fn power_on(&mut self) {
        println!("power on");
    }

    fn power_off(&mut self) {
        println!("power off");
        self.forget();
    }

    fn reset(&mut self) {
        println!("reset");
        self.forget();
    }

    fn execute(&mut self, apdu: &[u8]) -> Vec<u8> {
        let instruction = apdu.get(1).copied().unwrap_or(0);
        self.control.fault(instruction);
        let (mut answer, status) = self.answer(apdu).unwrap_or_else(|status| (Vec::new(), status));
        let status: [u8; 2] = status.into();
        answer.extend_from_slice(&status);
        let header = apdu.get(..4).unwrap_or(apdu);
        println!("apdu {instruction:02x} {:02x}{:02x} {header:02x?} {}", status[0], status[1], apdu.len());
        answer
    }
}
