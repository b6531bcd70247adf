//! In place of `cards`, where OpenPGP cards are left out of the program: there are none.

use std::sync::Arc;

use crate::{
    config::Config,
    reactor::Registry,
    vault::{Vault, store::KnownDevice},
};

/// No cards.
pub(super) struct Cards;

impl Cards {
    pub(super) fn new(_: &Arc<Vault>, _: &Registry) -> Self {
        Self
    }

    pub(super) fn find(&self, _: &Config, _: &[KnownDevice]) {}
}
