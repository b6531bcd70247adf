//! `strongroom why`: the last refusals, and their reasons.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::json;

use super::{
    CliError,
    connection::Connection,
    output::{print, print_json},
};
use crate::{client::Refusal, prompt::harmless};

/// Say why requests were refused, the newest first
///
/// Those of all your programs are shown, those of ssh and git too, which are told of no reason themselves.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Why {
    /// Show at most N
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    max: u32,
    #[command(flatten)]
    pub(super) connection: Connection,
}

const EXAMPLES: &str = "Examples:
  strongroom why
  strongroom why -n 1 --json";

impl Why {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.connection.run(async |client| {
            let refusals = client.why(true, self.max).await?;
            if !self.connection.json {
                return print(&text(&refusals, SystemTime::now()));
            }
            let value = |refusal: &Refusal| {
                json!({
                    "unix_ms": refusal.unix_ms,
                    "message": refusal.message,
                    "key": refusal.key,
                    "caller": refusal.caller,
                    "code": refusal.code.as_str(),
                    "reason": refusal.reason,
                })
            };
            print_json(&json!({ "refusals": refusals.iter().map(value).collect::<Vec<_>>() }))
        })
    }
}

fn text(refusals: &[Refusal], now: SystemTime) -> String {
    if refusals.is_empty() {
        return "Nothing was refused.\n".to_owned();
    }
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let entry = |refusal: &Refusal| {
        let age = age(now.saturating_sub(Duration::from_millis(refusal.unix_ms)));
        let [message, key, caller, reason] =
            [&refusal.message, &refusal.key, &refusal.caller, &refusal.reason].map(|text| harmless(text));
        let with = if key.is_empty() { String::new() } else { format!(" with {key}") };
        format!("{age} ago: {message}{with}\n  asked by {caller}\n  {}: {reason}\n", refusal.code.as_str())
    };
    refusals.iter().map(entry).collect::<Vec<_>>().join("\n")
}

/// About how long, in the largest unit that fits.
fn age(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
