//! Administration of OpenPGP cards. Knows who may, and that no PIN which a card refused goes to it again; what a card is,
//! the driver knows.

use std::future::Future;

use secrecy::SecretString;
use tracing::{info, warn};

use super::{Vault, key::Caller, pins::present, policy::Refusal, store::MarkError};
use crate::devices::{CardChange, CardPin, CardStatus, Device, DeviceError, Patience};

/// Administration is rare, and what comes of it decides about all that waits.
const PATIENT: Patience = Patience { deadline: None, waits_for_place: true };

/// Under what the marks of a token's PIN stand: the user's under its serial, as those of all devices.
pub(super) fn marks_of(serial: &str, pin: CardPin) -> String {
    match pin {
        CardPin::User => serial.to_owned(),
        CardPin::ResetCode | CardPin::Admin => format!("{serial} {}", pin.as_str()),
    }
}

impl Vault {
    /// What an OpenPGP card says of itself.
    pub async fn card_status(&self, caller: &Caller, device: &str) -> Result<CardStatus, Refusal> {
        self.check_owner(caller)?;
        let device = self.device(device).ok_or(Refusal::NoSuchDevice)?;
        Ok(device.card_status(caller.connection, PATIENT).await?)
    }

    /// Changes an OpenPGP card. When this completes, the keyring and the state file have what came of it. A PIN that was
    /// changed, or whose old value was refused, is not known here any more.
    pub async fn change_card(&self, caller: &Caller, device: &str, change: CardChange) -> Result<(), Refusal> {
        self.check_owner(caller)?;
        let device = self.maker(device)?;
        let name = change.name();
        let authority = change.authority().map(|(pin, secret)| (pin, secret.clone()));
        let becomes_new = match &change {
            CardChange::SetPin { pin, .. } => vec![*pin],
            CardChange::ResetPin { .. } => vec![CardPin::User],
            CardChange::FactoryReset { .. } => CardPin::ALL.to_vec(),
            CardChange::SetTouch { .. } | CardChange::SetSignaturePin { .. } | CardChange::SetText { .. } => Vec::new(),
        };
        if becomes_new.contains(&CardPin::User) {
            self.forget_accepted_pin(&device);
        }
        let serial = present(&device).await?.serial;
        let work = async { Ok(device.change_card(caller.connection, change, PATIENT).await?) };
        match authority {
            Some((pin, secret)) => self.sent_once(&device, pin, &secret, work).await?,
            None => work.await?,
        }
        for pin in becomes_new {
            // What was refused before may be the right one from now on.
            if let Err(error) = self.store.forget_pins(&marks_of(&serial, pin)).await {
                warn!(device = device.name(), "the marks of the old {} PIN stay: {error}", pin.as_str());
            }
        }
        self.catch_up(&device).await;
        info!(device = device.name(), "card administered: {name}");
        Ok(())
    }

    /// Does work that sends a PIN to a card, unless the card has refused this PIN before.
    pub(super) async fn sent_once<T>(
        &self,
        device: &Device,
        pin: CardPin,
        secret: &SecretString,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let serial = present(device).await?.serial;
        let turn = self.pin_turn(device, &marks_of(&serial, pin)).await?;
        if present(device).await?.serial != serial {
            return Err(DeviceError::Absent.into());
        }
        let attempt = match turn.begin(secret, true).await {
            Ok(attempt) => attempt,
            Err(MarkError::Refused) => return Err(Refusal::PinRefusedBefore(device.name().to_owned())),
            Err(error) => return Err(Refusal::NoPin(error.to_string())),
        };
        let result = work.await;
        // What else went wrong leaves open whether a try was spent: whoever types it again allows that.
        let marked = match &result {
            Ok(_) => attempt.accepted().await,
            Err(Refusal::Device(DeviceError::PinWrong { .. } | DeviceError::PinBlocked)) => attempt.refused().await,
            Err(_) => Ok(()),
        };
        if let Err(error) = marked {
            warn!(device = device.name(), "the {} PIN stays marked as uncertain: {error}", pin.as_str());
        }
        result
    }
}
