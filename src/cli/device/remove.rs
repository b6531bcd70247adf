//! `strongroom device remove`: takes a device out of the configuration file.

use clap::Args;
use serde_json::json;

use super::{
    super::{
        CliError,
        output::{print, print_json},
    },
    File, how_to_reload,
};

/// Take a device out of the configuration file
///
/// The token and its keys stay as they are.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Remove {
    /// The device's name
    name: String,
    #[command(flatten)]
    file: File,
}

const EXAMPLES: &str = "Examples:
  strongroom device remove hsm";

impl Remove {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let mut file = self.file.open()?;
        let Some(entry) = file.remove_device(&self.name) else {
            let names: Vec<_> = file.config().devices.iter().map(|device| device.name.clone()).collect();
            return Err(CliError::NoSuchDevice { name: self.name.clone(), file: file.path().to_owned(), names });
        };
        file.save()?;
        if self.file.json {
            return print_json(&json!({ "device": self.name, "file": file.path().to_string_lossy(), "entry": entry }));
        }
        print(&format!("Taken out of {}:\n\n{entry}\n{}", file.path().display(), how_to_reload(file.path())))
    }

    pub(super) fn json(&self) -> bool {
        self.file.json
    }
}
