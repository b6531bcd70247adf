//! What `unlock`, `lock` and `forget` are about: the store, a device by its id, or a key and so what holds it.

use super::{CliError, key_name};
use crate::{
    agent::message::{PinState, Target},
    client::{Client, Device, Key},
    vault::STORE,
};

/// The store, a device, as far as it is known, or a key.
pub(super) enum Aim {
    Store,
    Device(Box<Device>),
    Key(Box<Key>),
}

impl Aim {
    /// The store, the device with this id, or the key with this name.
    pub(super) async fn find(client: &Client, name: &str) -> Result<Self, CliError> {
        if name == STORE {
            return Ok(Self::Store);
        }
        match client.devices().await?.into_iter().find(|device| device.id == name) {
            Some(device) => Ok(Self::Device(Box::new(device))),
            None => Ok(Self::Key(Box::new(key_name::resolve(client, name).await?))),
        }
    }

    /// The store where it is to be unlocked or locked; else the only device that has a PIN, or that wants it now where there
    /// are several.
    pub(super) async fn only(client: &Client, wanted: PinState) -> Result<Self, CliError> {
        let of_store = if wanted == PinState::Needed { "locked" } else { "open" };
        // Who is not its owner, or asks an older daemon, has devices only.
        if client.store().await.is_ok_and(|store| store.state == of_store) {
            return Ok(Self::Store);
        }
        let mut devices = client.devices().await?;
        devices.retain(|device| device.pin != PinState::None);
        if devices.len() > 1 {
            devices.retain(|device| device.pin == wanted);
        }
        match devices.len() {
            0 => Err(CliError::Usage("no store and no device could be meant; name one".to_owned())),
            1 => Ok(Self::Device(Box::new(devices.swap_remove(0)))),
            _ => {
                let ids: Vec<_> = devices.iter().map(|device| device.id.as_str()).collect();
                Err(CliError::Usage(format!("several devices may be meant; name one of {}", ids.join(", "))))
            }
        }
    }

    /// As the protocol has it.
    pub(super) fn target(&self) -> Target<'_> {
        match self {
            Self::Store => Target::Store,
            Self::Device(device) => Target::Device(&device.id),
            Self::Key(key) => Target::Key(&key.blob),
        }
    }

    /// What a person calls it.
    pub(super) fn label(&self) -> &str {
        match self {
            Self::Store => STORE,
            Self::Device(device) => &device.id,
            Self::Key(key) => key_name::label(key),
        }
    }

    /// The PIN tries that are left, where that is known.
    pub(super) fn tries_left(&self) -> Option<u32> {
        match self {
            Self::Device(device) => device.tries_left,
            Self::Key(_) | Self::Store => None,
        }
    }

    /// Whether a passphrase of the store is meant.
    pub(super) fn is_store(&self) -> bool {
        match self {
            Self::Store => true,
            Self::Key(key) => key.places.iter().any(|place| place.device == STORE),
            Self::Device(_) => false,
        }
    }
}
