//! `strongroom audit tail`: the end of the audit log, and what is added to it.

use std::{collections::VecDeque, time::Duration};

use clap::Args;

use super::{
    Found, Log,
    line::{Filter, Wanted},
};
use crate::{
    cli::{CliError, output::print, watch},
    vault::audit::path_of,
};

/// How often the files are looked at.
const PAUSE: Duration = Duration::from_millis(250);

/// Show the last lines, and go on with those that are added, until Ctrl-C
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Tail {
    /// Begin with the last N
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    last: u32,
    #[command(flatten)]
    wanted: Wanted,
    #[command(flatten)]
    pub(super) log: Log,
}

const EXAMPLES: &str = "Examples:
  strongroom audit tail
  strongroom audit tail -n 0 --key work --json";

impl Tail {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.log.run(async |found| {
            let filter = self.wanted.filter(&found).await?;
            let json = self.log.connection.json;
            let mut place = self.begin(&found, &filter, json)?;
            watch::lines(PAUSE, async || {
                let mut text = String::new();
                loop {
                    let mut add = |line: String| {
                        text.push_str(&line);
                        Ok(())
                    };
                    place.1 = filter.read(&found, place, json, &mut add)?;
                    // A file is whole when there is a next one, so it is read to its end once more.
                    if !path_of(&found.directory, place.0 + 1).exists() {
                        return Ok(text);
                    }
                    filter.read(&found, place, json, &mut add)?;
                    place = (place.0 + 1, 0);
                }
            })
            .await
        })
    }

    /// Prints the last lines, and gives the place behind them: a file and how much of it was read.
    fn begin(&self, found: &Found, filter: &Filter, json: bool) -> Result<(u64, u64), CliError> {
        let numbers = found.numbers()?;
        let mut lines = VecDeque::new();
        let mut place = None;
        for number in numbers.into_iter().rev() {
            let mut of_file = Vec::new();
            let end = filter.read(found, (number, 0), json, |line| {
                of_file.push(line);
                Ok(())
            })?;
            place.get_or_insert((number, end));
            for line in of_file.into_iter().rev() {
                lines.push_front(line);
            }
            if lines.len() >= self.last as usize {
                break;
            }
        }
        let skipped = lines.len().saturating_sub(self.last as usize);
        lines.iter().skip(skipped).try_for_each(|line| print(line))?;
        Ok(place.unwrap_or_default())
    }
}
