//! `strongroom audit show`: what is in the audit log.

use std::collections::VecDeque;

use clap::Args;

use super::{Log, line::Wanted};
use crate::cli::{CliError, output::print};

/// Show what was done, the oldest first
///
/// With --json the lines are printed as they stand in the log.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Show {
    /// Only the last N of them
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    last: Option<u32>,
    #[command(flatten)]
    wanted: Wanted,
    #[command(flatten)]
    pub(super) log: Log,
}

const EXAMPLES: &str = "Examples:
  strongroom audit show --since 8h
  strongroom audit show --key work -n 20
  strongroom audit show --json | jq 'select(.outcome != \"ok\")'";

impl Show {
    pub(super) fn run(&self) -> Result<(), CliError> {
        self.log.run(async |found| {
            let filter = self.wanted.filter(&found).await?;
            let mut last = VecDeque::new();
            for number in found.numbers()? {
                filter.read(&found, (number, 0), self.log.connection.json, |line| match self.last {
                    None => print(&line),
                    Some(max) => {
                        if last.len() == max as usize {
                            last.pop_front();
                        }
                        last.push_back(line);
                        Ok(())
                    }
                })?;
            }
            last.iter().try_for_each(|line| print(line))
        })
    }
}
