//! The connection to a card by PC/SC, as openpgp-card wants it. Knows readers, and no command of a card.
//!
//! It is shared and never resets the card by itself: other programs keep what they have verified. Nothing in PC/SC has a
//! timeout, so that all of this can hang with the card.

use std::{
    ffi::{CStr, CString},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use card_backend::{CardBackend, CardCaps, CardTransaction, PinType, SmartcardError};
use pcsc::{Card, Context, Disposition, Error, Protocols, ReaderState, Scope, ShareMode, State};

use super::card::Identity;
use crate::devices::DeviceError;

/// How long a card's removal may take to be noticed by its reader.
const NOTICED: Duration = Duration::from_millis(300);
/// The application identifier's beginning (OpenPGP card, 4.2.1).
pub(super) const OPENPGP: [u8; 6] = [0xd2, 0x76, 0x00, 0x01, 0x24, 0x01];
/// Asks for the whole of it (4.4.1).
pub(super) const GET_AID: [u8; 5] = [0x00, 0xca, 0x00, 0x4f, 0x00];
/// What to say when nobody answers where pcscd listens.
pub(super) const NO_SERVICE: &str =
    "pcscd, the smart card service, does not answer; start it: `systemctl start pcscd.socket`";

/// What the connection has seen, and who waits for it.
#[derive(Default)]
pub(super) struct Observed {
    /// The last error of PC/SC, which openpgp-card keeps as text only.
    fault: Mutex<Option<Error>>,
    /// How often somebody else has reset the card.
    resets: AtomicU64,
    turn: Mutex<Turn>,
}

/// Where the thread that owns the card is.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Turn {
    /// At work, or idle.
    #[default]
    Ours,
    /// Waiting until another program ends its transaction.
    Waiting,
    /// The same, and nobody waits for what comes of it.
    GivenUp,
}

impl Observed {
    /// The last error since this was last asked.
    pub(super) fn take_fault(&self) -> Option<Error> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// How often somebody else has reset the card so far.
    pub(super) fn resets(&self) -> u64 {
        self.resets.load(Ordering::Relaxed)
    }

    /// Gives up waiting for the card, if another program is what is waited for. True: nothing has been begun.
    pub(super) fn give_up(&self) -> bool {
        let mut turn = self.turn();
        if *turn != Turn::Ours {
            *turn = Turn::GivenUp;
        }
        *turn == Turn::GivenUp
    }

    /// Whether another program's transaction is waited for.
    pub(super) fn is_waiting(&self) -> bool {
        *self.turn() != Turn::Ours
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, error: Error) -> SmartcardError {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        match error {
            Error::NotTransacted => SmartcardError::NotTransacted,
            other => SmartcardError::Error(other.to_string()),
        }
    }
}

/// An open connection. Dropping it leaves the card as it is; pcscd powers it off when nobody else has it.
pub(super) struct Link {
    /// None only while it is being dropped.
    card: Option<Card>,
    reader: CString,
    observed: Arc<Observed>,
}

impl Link {
    /// Connects to the card in a reader.
    pub(super) fn connect(reader: &CStr, observed: &Arc<Observed>) -> Result<Self, Error> {
        let context = Context::establish(Scope::User)?;
        let card = context.connect(reader, ShareMode::Shared, Protocols::ANY)?;
        Ok(Self { card: Some(card), reader: reader.to_owned(), observed: Arc::clone(observed) })
    }

    /// Has a card forget that PINs were verified. One that does not know how to is reset, which other programs notice.
    pub(super) fn unverify(identity: &Identity) -> Result<(), Error> {
        let context = Context::establish(Scope::User)?;
        let mut card = context.connect(&identity.reader, ShareMode::Shared, Protocols::ANY)?;
        let has_forgotten = forget_verified(&mut card, &identity.ident);
        // With one that does not answer, a reset may hang pcscd.
        let disposition = if has_forgotten == Ok(false) { Disposition::ResetCard } else { Disposition::LeaveCard };
        has_forgotten.and(disconnect(card, disposition))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // An error: there is nothing more to leave.
        let _ = self.card.take().map(|card| disconnect(card, Disposition::LeaveCard));
    }
}

impl CardBackend for Link {
    fn limit_card_caps(&self, caps: CardCaps) -> CardCaps {
        // Known not to pass on commands of extended length.
        if !self.reader.as_bytes().starts_with(b"ACS ACR122U") {
            return caps;
        }
        CardCaps::new(
            false,
            caps.chaining_support(),
            caps.max_cmd_bytes(),
            caps.max_rsp_bytes(),
            caps.pw1_max_len(),
            caps.pw3_max_len(),
        )
    }

    /// Waits for as long as another program has a transaction.
    fn transaction(
        &mut self,
        application: Option<&[u8]>,
    ) -> Result<Box<dyn CardTransaction + Send + Sync + '_>, SmartcardError> {
        let observed = &*self.observed;
        let Some(card) = &mut self.card else { return Err(observed.note(Error::InvalidHandle)) };
        let mut was_reset = false;
        *observed.turn() = Turn::Waiting;
        let begun = begin(card, &mut was_reset);
        let given_up = std::mem::take(&mut *observed.turn()) == Turn::GivenUp;
        if was_reset {
            observed.resets.fetch_add(1, Ordering::Relaxed);
        }
        let mut exchange = Exchange { transaction: begun.map_err(|error| observed.note(error))?, observed, was_reset };
        if given_up {
            return Err(observed.note(Error::SharingViolation));
        }
        if was_reset && let Some(application) = application {
            exchange.select(application)?;
        }
        Ok(Box::new(exchange))
    }
}

/// Ends a connection. Dropped by itself, it would reset the card.
pub(super) fn disconnect(card: Card, disposition: Disposition) -> Result<(), Error> {
    card.disconnect(disposition).map_err(|(card, error)| {
        // The service or the card is gone, and the handle with it.
        std::mem::forget(card);
        error
    })
}

/// Begins a transaction; after a reset by others, on a connection that is made anew.
pub(super) fn begin<'a>(mut card: &'a mut Card, was_reset: &mut bool) -> Result<pcsc::Transaction<'a>, Error> {
    loop {
        match card.transaction2() {
            Ok(transaction) => return Ok(transaction),
            Err((same, Error::ResetCard)) => {
                *was_reset = true;
                same.reconnect(ShareMode::Shared, Protocols::ANY, Disposition::LeaveCard)?;
                card = same;
            }
            Err((_, error)) => return Err(error),
        }
    }
}

/// Commands and their answers, while nobody else's come between. Ends when it is dropped.
struct Exchange<'a> {
    transaction: pcsc::Transaction<'a>,
    observed: &'a Observed,
    was_reset: bool,
}

impl CardTransaction for Exchange<'_> {
    fn transmit(&mut self, command: &[u8], buffer: usize) -> Result<Vec<u8>, SmartcardError> {
        let mut answer = vec![0; buffer.max(2)];
        let len = self.transaction.transmit(command, &mut answer).map_err(|error| self.observed.note(error))?.len();
        answer.truncate(len);
        Ok(answer)
    }

    // The PIN comes from the vault: a reader's own keys are not used.

    fn feature_pinpad_verify(&self) -> bool {
        false
    }

    fn feature_pinpad_modify(&self) -> bool {
        false
    }

    fn pinpad_verify(&mut self, _: PinType, _: &Option<CardCaps>) -> Result<Vec<u8>, SmartcardError> {
        Err(SmartcardError::Error("the keys of the reader are not used".to_owned()))
    }

    fn pinpad_modify(&mut self, _: PinType, _: &Option<CardCaps>) -> Result<Vec<u8>, SmartcardError> {
        Err(SmartcardError::Error("the keys of the reader are not used".to_owned()))
    }

    fn was_reset(&self) -> bool {
        self.was_reset
    }
}

/// Whether the card with this manufacturer and serial has no PIN verified any more: it forgets them on command (OpenPGP card,
/// 7.2.2), or with its application when another one is selected. Cards before 3.1 are not told to: they may take it for a
/// wrong PIN.
fn forget_verified(card: &mut Card, ident: &str) -> Result<bool, Error> {
    let transaction = begin(card, &mut false)?;
    let aid = exchange(&transaction, &GET_AID)?.unwrap_or_default();
    if ident_of(&aid).is_none_or(|there| there != ident) {
        return Ok(true);
    }
    let version = aid.strip_prefix(&OPENPGP).and_then(|rest| rest.first_chunk::<2>());
    if version.is_none_or(|version| *version < [3, 1]) {
        return Ok(false);
    }
    for pin in [0x81, 0x82, 0x83] {
        let has_obeyed = exchange(&transaction, &[0x00, 0x20, 0xff, pin])?.is_some();
        // Without a PIN it only asks, and is refused: some cards do not look at what comes before.
        if !has_obeyed || exchange(&transaction, &[0x00, 0x20, 0x00, pin])?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Sends a command, and fetches its answer: `None` where the card refuses.
pub(super) fn exchange(transaction: &pcsc::Transaction<'_>, command: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    let mut buffer = [0; 264];
    let mut command = command.to_vec();
    let mut answer = Vec::new();
    // Each status below is followed by an end or by another status: a card that goes on for ever is none of ours.
    for _ in 0..4 {
        let (data, status) = match transaction.transmit(&command, &mut buffer)?.split_last_chunk::<2>() {
            Some((data, status)) => (data, *status),
            None => return Ok(None),
        };
        answer.extend_from_slice(data);
        match status {
            [0x90, 0x00] => return Ok(Some(answer)),
            // There is more; or so much is there.
            [0x61, more] => command = vec![0x00, 0xc0, 0x00, 0x00, more],
            [0x6c, all] => {
                if let Some(expected) = command.last_mut() {
                    *expected = all;
                }
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// The manufacturer and serial in an application identifier.
pub(super) fn ident_of(aid: &[u8]) -> Option<String> {
    let [_, _, manufacturer @ .., _, _] = aid.strip_prefix(&OPENPGP)? else { return None };
    let [m1, m2, s1, s2, s3, s4] = *manufacturer else { return None };
    Some(format!("{:04X}:{:08X}", u16::from_be_bytes([m1, m2]), u32::from_be_bytes([s1, s2, s3, s4])))
}

/// The number of the card in a reader: it is another one each time that a card is put in. Disturbs nobody.
pub(super) fn insertion(reader: &CStr) -> Result<u32, DeviceError> {
    // What breaks here breaks the connection, too: what was inside it has an outcome that nobody knows.
    let context = Context::establish(Scope::User).map_err(|_| DeviceError::Restarted)?;
    let mut states = [ReaderState::new(reader, State::UNAWARE)];
    match context.get_status_change(Duration::ZERO, &mut states) {
        Ok(()) | Err(Error::Timeout) => {}
        Err(Error::UnknownReader | Error::ReaderUnavailable | Error::NoReadersAvailable) => {
            return Err(DeviceError::Absent);
        }
        Err(_) => return Err(DeviceError::Restarted),
    }
    let [state] = &states;
    if state.event_state().contains(State::PRESENT) { Ok(state.event_count()) } else { Err(DeviceError::Absent) }
}

/// Whether the card that was in a reader has gone, or goes while its end is being noticed: a transaction breaks before
/// the reader says why.
pub(super) fn is_gone_soon(reader: &CStr) -> bool {
    let Ok(context) = Context::establish(Scope::User) else { return false };
    let mut states = [ReaderState::new(reader, State::UNAWARE)];
    for patience in [Duration::ZERO, NOTICED] {
        match context.get_status_change(patience, &mut states) {
            Ok(()) | Err(Error::Timeout) => {}
            Err(error) => return is_removal(error),
        }
        if !states[0].event_state().contains(State::PRESENT) {
            return true;
        }
        states[0].sync_current_state();
    }
    false
}

/// Why there is no connection to the card in a reader.
pub(super) fn not_connected(error: Error) -> DeviceError {
    match error {
        error if is_service_gone(error) => DeviceError::Failed(NO_SERVICE.to_owned()),
        Error::SharingViolation => DeviceError::InUse,
        // It went while it was taken up.
        Error::NotTransacted => DeviceError::Absent,
        error if is_removal(error) => DeviceError::Absent,
        Error::UnresponsiveCard | Error::UnpoweredCard | Error::UnsupportedCard | Error::ProtoMismatch => {
            DeviceError::Failed("the card does not answer its reader; take it out and put it in again".to_owned())
        }
        error => DeviceError::Failed(format!("the card cannot be reached: {error}")),
    }
}

/// Whether pcscd is not there, or went in the middle of something.
pub(super) fn is_service_gone(error: Error) -> bool {
    matches!(error, Error::NoService | Error::ServiceStopped | Error::CommError | Error::InvalidHandle)
}

/// Whether the card or its reader has gone.
pub(super) fn is_removal(error: Error) -> bool {
    matches!(
        error,
        Error::RemovedCard
            | Error::NoSmartcard
            | Error::UnknownReader
            | Error::ReaderUnavailable
            | Error::NoReadersAvailable
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_identifier_names_the_card() {
        let aid = [&OPENPGP[..], &[3, 4, 0x00, 0x06, 0x12, 0x34, 0x56, 0x78, 0, 0]].concat();
        assert_eq!(ident_of(&aid).as_deref(), Some("0006:12345678"));
        assert_eq!(ident_of(&aid[..15]), None);
        assert_eq!(ident_of(&[0xa0; 16]), None);
    }
}
