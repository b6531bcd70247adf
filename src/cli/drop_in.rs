//! `strongroom ssh-agent` as `--help` and the completions show it. It is never parsed here: `main` hands its arguments
//! to `ssh_agent` as they are, since they follow getopt's rules and ssh-agent's exit codes.

use clap::{Arg, ArgAction, Command, ValueHint};

/// The options in ssh-agent's own order: its letter, the name of its value if it takes one, what it does.
const OPTIONS: [(&str, Option<&str>, &str); 14] = [
    ("a", Some("PATH"), "Listen at this socket"),
    ("c", None, "Print C-shell commands"),
    ("D", None, "Stay in the foreground"),
    ("d", None, "Stay in the foreground and log everything to standard error"),
    ("E", Some("HASH"), "Show fingerprints with this hash: md5, sha1, sha256, sha384 or sha512"),
    ("k", None, "Stop the agent that SSH_AGENT_PID names"),
    ("O", Some("OPTION"), "no-restrict-websafe, allow-remote-pkcs11 or websafe-allow=LIST"),
    ("P", Some("PATTERNS"), "The provider libraries that may be loaded"),
    ("s", None, "Print Bourne-shell commands"),
    ("T", None, "Put the socket in a new directory below $TMPDIR"),
    ("t", Some("TIME"), "How long a key lives that is added without a lifetime"),
    ("U", None, "Leave stale sockets where they are"),
    ("u", None, "Remove the stale sockets below ~/.ssh/agent and exit"),
    ("V", None, "Print the version on standard error"),
];

pub(super) fn command() -> Command {
    let options = OPTIONS.map(|(letter, value, help)| {
        let arg = Arg::new(letter).short(letter.chars().next()).help(help);
        match value {
            Some(name) => arg.value_name(name),
            None => arg.action(ArgAction::SetTrue),
        }
    });
    Command::new("ssh-agent")
        .about("Take the place of OpenSSH's ssh-agent: its options, its output, its exit codes")
        .disable_help_flag(true)
        .args(options)
        .arg(
            Arg::new("command")
                .value_name("COMMAND")
                .num_args(0..)
                .trailing_var_arg(true)
                .value_hint(ValueHint::CommandWithArguments)
                .help("Run this command with the agent; the agent ends when it does"),
        )
}
