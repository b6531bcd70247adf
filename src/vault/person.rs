//! What a request wants a person to do at a device: touch it, or put it in. Told on the screen, in the list of devices and
//! in the log. Knows devices and prompts; decides nothing.

use std::sync::Arc;

use tokio::task::JoinSet;
use tracing::info;

use super::{
    Vault,
    key::{Caller, Identity},
    policy,
};
use crate::{
    devices::{Deed, Device, FoundKey, Health, Input, Operation, Want, Wanted},
    prompt::Notice,
};

/// Something is asked of a person for as long as this lives.
pub(super) struct Asking {
    _wanted: Wanted,
    _notice: Option<Notice>,
}

impl Vault {
    /// Asks whoever is at a device to do something for this operation.
    pub(super) fn ask_for(
        &self,
        deed: Deed,
        device: &Device,
        key: &FoundKey,
        identity: &Identity,
        caller: &Arc<Caller>,
        operation: &Operation<'_>,
    ) -> Asking {
        let data = match operation {
            Operation::Sign { input: Input::Message(data), .. } => data,
            _ => &[][..],
        };
        caller.program();
        let text = policy::device_notice(deed, device, key, identity, caller, data, &self.settings().rules);
        let line = text.replace('\n', "; ");
        info!(device = device.name(), uid = caller.uid, "{line}");
        let wanted = device.want(Want { deed, uid: caller.uid, text: line });
        Asking { _wanted: wanted, _notice: self.prompter.notice(caller.uid, &text) }
    }
}

/// Completes when one of these devices is not absent any more.
pub(super) async fn any_is_back(devices: impl Iterator<Item = &Device>) {
    // They end with this.
    let mut waiting: JoinSet<()> = devices
        .map(|device| {
            let mut states = device.watch();
            async move { drop(states.wait_for(|state| state.health != Health::Absent).await) }
        })
        .collect();
    waiting.join_next().await;
}
