//! A line of the audit log as people read it, and which lines are wanted. Knows the fields of docs/audit.md.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Map, Value};

use super::Found;
use crate::{
    cli::CliError,
    config::parse_time,
    prompt::harmless,
    vault::audit::{Lines, Piece, date, path_of},
};

/// Which lines are wanted.
#[derive(Args)]
pub(super) struct Wanted {
    /// Only what was done with KEY
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Only what is younger than TIME (90s, 15m, 8h, 7d) or was done since then (2026-11-25, 2026-11-25T08:00Z; UTC)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
}

/// What [`Wanted`] means, once the names in it are known.
pub(super) struct Filter {
    key: Option<String>,
    since: Option<String>,
}

impl Wanted {
    pub(super) async fn filter(&self, found: &Found) -> Result<Filter, CliError> {
        let key = match &self.key {
            Some(name) => Some(found.fingerprint(name).await?),
            None => None,
        };
        Ok(Filter { key, since: self.since.clone() })
    }
}

/// The beginning of a line's `time`, in the log's own form, from a time or an age.
fn since(text: &str) -> Result<String, String> {
    if let Some(age) = parse_time(text) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        return Ok(date(now.saturating_sub(age).as_secs()));
    }
    const FORM: &str = "0000-00-00T00:00:00.000";
    let time = text.strip_suffix('Z').unwrap_or(text);
    let fits = |(c, form): (char, char)| if form == '0' { c.is_ascii_digit() } else { c == form };
    if [10, 16, 19, 23].contains(&time.len()) && time.chars().zip(FORM.chars()).all(fits) {
        return Ok(time.to_owned());
    }
    Err("a time is an age like 90s, 8h or 7d, or a date like 2026-11-25 or 2026-11-25T08:00Z".to_owned())
}

impl Filter {
    /// The line's fields, if it is wanted and a line at all.
    pub(super) fn pick(&self, line: &[u8]) -> Option<Map<String, Value>> {
        let fields: Map<String, Value> = serde_json::from_slice(line).ok()?;
        let text = |name: &str| fields.get(name).and_then(Value::as_str);
        let is_young = self.since.as_deref().is_none_or(|since| text("time").is_some_and(|time| time >= since));
        let is_about = self.key.as_deref().is_none_or(|key| text("key") == Some(key));
        (is_young && is_about).then_some(fields)
    }

    /// The wanted lines of a file from a place in it on, each as it is to be printed, and where the file goes on.
    pub(super) fn read(
        &self,
        found: &Found,
        (number, offset): (u64, u64),
        json: bool,
        mut each: impl FnMut(String) -> Result<(), CliError>,
    ) -> Result<u64, CliError> {
        let path = path_of(&found.directory, number);
        let mut lines = Lines::open(&path, offset).map_err(|e| found.failed(&path, e))?;
        let mut end = offset;
        loop {
            match lines.next_piece().map_err(|e| found.failed(&path, e))? {
                Piece::Line(line) => {
                    if let Some(fields) = self.pick(line) {
                        let raw = || String::from_utf8_lossy(line).into_owned() + "\n";
                        each(if json { raw() } else { shown(&fields) })?;
                    }
                }
                Piece::TooLong => {}
                // What is being written is read when it is whole.
                Piece::Incomplete(_) | Piece::End => return Ok(end),
            }
            end = lines.offset;
        }
    }
}

/// One line for people.
fn shown(fields: &Map<String, Value>) -> String {
    let text = |name: &str| fields.get(name).and_then(Value::as_str).map(harmless);
    let number = |name: &str| fields.get(name).and_then(Value::as_u64);
    let mut words = vec![text("time").unwrap_or_default().replace('T', " ").replace('Z', "")];
    words.push(text("operation").unwrap_or_default());
    words.push(text("outcome").unwrap_or_default());
    words.extend(number("count").map(|count| format!("{count} times")));
    words.extend(text("key"));
    words.extend(match (text("purpose").as_deref(), text("user"), text("namespace"), text("key_id")) {
        (Some("login"), Some(user), ..) => {
            let host = text("host").map(|host| format!(" to {host}")).unwrap_or_default();
            Some(format!("login as {user}{host}"))
        }
        (Some("sshsig"), _, Some(namespace), _) => Some(format!("sshsig for {namespace}")),
        (Some("certificate"), _, _, Some(id)) => Some(format!("certificate {id}")),
        (purpose, ..) => purpose.map(str::to_owned),
    });
    words.extend(text("scheme"));
    words.extend(text("device").map(|device| format!("on {device}")));
    words.extend(number("uid").map(|uid| {
        let process = number("pid").map(|pid| format!(" ({pid})")).unwrap_or_default();
        format!("by {}{process} of uid {uid}", text("program").unwrap_or_else(|| "a process".to_owned()))
    }));
    words.extend(number("latency_us").map(|us| format!("{}.{:03} ms", us / 1000, us % 1000)));
    words.join("  ") + "\n"
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"seq":7,"time":"2026-11-25T03:04:05.678Z","uid":1000,"pid":42,"program":"/usr/bin/ssh","door":"ssh","connection":3,"key":"SHA256:abc","operation":"sign","scheme":"ed25519","purpose":"login","user":"root\\","host":"SHA256:def","device":"memory","outcome":"ok","latency_us":1234,"previous":"00"}"#;

    fn filter(key: Option<&str>, since: Option<&str>) -> Filter {
        Filter { key: key.map(str::to_owned), since: since.map(str::to_owned) }
    }

    #[test]
    fn a_line_reads_well() {
        let fields = filter(None, None).pick(LINE.as_bytes()).unwrap();
        assert_eq!(
            shown(&fields),
            "2026-11-25 03:04:05.678  sign  ok  SHA256:abc  login as root\\ to SHA256:def  ed25519  on memory  by \
             /usr/bin/ssh (42) of uid 1000  1.234 ms\n"
        );
        let start =
            br#"{"seq":1,"time":"2026-11-25T03:04:05.678Z","operation":"start","outcome":"ok","previous":"00"}"#;
        assert_eq!(shown(&filter(None, None).pick(start).unwrap()), "2026-11-25 03:04:05.678  start  ok\n");
    }

    #[test]
    fn lines_are_wanted_by_key_and_time() {
        let wants = |key, since| filter(key, since).pick(LINE.as_bytes()).is_some();
        assert!(wants(None, None) && wants(Some("SHA256:abc"), Some("2026-11-25")));
        assert!(!wants(Some("SHA256:ab"), None) && !wants(None, Some("2026-11-25T03:05")));
        assert!(filter(None, None).pick(b"{\"seq\":1").is_none());
    }

    #[test]
    fn a_time_is_an_age_or_a_date() {
        for good in ["2026-11-25", "2026-11-25T08:00Z", "2026-11-25T08:00:01", "2026-11-25T08:00:01.500Z"] {
            assert_eq!(since(good).unwrap(), good.trim_end_matches('Z'));
        }
        assert_eq!(since("8h").unwrap().len(), 19);
        for bad in ["", "yesterday", "2026-11-2", "2026-11-25 08:00", "2026-11-25T08", "8y"] {
            assert!(since(bad).is_err(), "{bad:?}");
        }
    }
}
