//! `strongroom completions`: what the shells need to complete our command line.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use clap_complete::Shell;

use super::{CliError, command};

/// Print the completions for a shell
#[derive(Args)]
#[command(hide = true)]
pub(super) struct Completions {
    /// The shell to complete in
    shell: Supported,
}

/// The shells that the project tests its completions with.
#[derive(Clone, Copy, ValueEnum)]
enum Supported {
    Bash,
    Zsh,
    Fish,
}

impl Completions {
    pub(super) fn run(self) -> Result<(), CliError> {
        io::stdout().write_all(&script(self.shell)).map_err(CliError::Output)
    }
}

fn script(shell: Supported) -> Vec<u8> {
    let shell = match shell {
        Supported::Bash => Shell::Bash,
        Supported::Zsh => Shell::Zsh,
        Supported::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "strongroom", &mut script);
    script
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_shell_learns_the_subcommands_and_their_options() {
        for shell in Supported::value_variants() {
            let script = String::from_utf8(script(*shell)).unwrap();
            for word in ["ssh-agent", "socket", "config", "agent"] {
                assert!(script.contains(word), "{word} is missing");
            }
        }
    }
}
