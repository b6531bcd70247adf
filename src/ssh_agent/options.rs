//! The drop-in's command line: getopt's rules over `cDdksTuUVE:a:O:P:t:`, and what each option means.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

use super::Failure;
use super::shell::Shell;
use super::socket::Place;
use crate::config::{DEFAULT_PROVIDERS, parse_time};
use crate::daemon::AgentOptions;
use crate::public_key::FingerprintHash;

/// What a usage error ends with.
pub(super) const USAGE: &str = "\
usage: ssh-agent [-c | -s] [-Dd] [-TU] [-a socket_path] [-E fingerprint_hash]
                 [-O option] [-P allowed_providers] [-t life]
       ssh-agent [-TU] [-a socket_path] [-E fingerprint_hash] [-O option]
                 [-P allowed_providers] [-t life] command [argument ...]
       ssh-agent [-c | -s] -k
       ssh-agent -u[u]
       ssh-agent -V";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// `-V`
    Version,
    /// `-k`
    Kill,
    /// `-u`, and with `any_name` `-uu`.
    Clean { any_name: bool },
    /// `-D`, and with `debug` `-d`.
    Foreground { debug: bool },
    /// No command.
    Daemon,
    /// A program and its arguments.
    Run(OsString, Vec<OsString>),
}

/// The command line, understood.
pub(super) struct CommandLine {
    pub(super) action: Action,
    pub(super) shell: Shell,
    pub(super) place: Place,
    pub(super) agent: AgentOptions,
    /// The options behind `agent` as they were given: another process parses them again to the same effect.
    pub(super) agent_args: Vec<OsString>,
}

impl CommandLine {
    /// Parses what follows the program's name. `login_shell` is $SHELL, which decides when nothing else does.
    pub(super) fn parse(
        args: impl IntoIterator<Item = OsString>,
        login_shell: Option<&OsStr>,
    ) -> Result<Self, Failure> {
        let mut seen = Seen::default();
        let mut agent_args = Vec::new();
        let mut agent = AgentOptions {
            default_lifetime: None,
            fingerprint_hash: FingerprintHash::default(),
            allowed_providers: DEFAULT_PROVIDERS.to_owned(),
            allow_remote_pkcs11: false,
            restrict_websafe: true,
            websafe_allow: None,
        };
        let mut parser = Parser::from_args(args);
        parser.set_short_equals(false);
        let command = loop {
            let option = match parser.next()? {
                None => break None,
                Some(Arg::Value(program)) => {
                    break Some((program, parser.raw_args()?.collect()));
                }
                Some(Arg::Long(_)) => return Err(usage("there are no long options")),
                Some(Arg::Short(option)) => option,
            };
            match option {
                'c' if seen.s => return Err(usage("-c and -s exclude each other")),
                's' if seen.c => return Err(usage("-c and -s exclude each other")),
                'd' | 'D' if seen.debug.is_some() => return Err(usage("-d or -D is given once")),
                'c' => seen.c = true,
                's' => seen.s = true,
                'd' => seen.debug = Some(true),
                'D' => seen.debug = Some(false),
                'k' => seen.kill = true,
                'u' => seen.clean += 1,
                'T' => seen.private = true,
                'U' => seen.keep_stale = true,
                'V' => {
                    seen.version = true;
                    break None;
                }
                'a' => seen.path = Some(PathBuf::from(parser.value()?)),
                'E' | 'O' | 'P' | 't' => {
                    let value = parser.value()?;
                    agent_args.extend([OsString::from(format!("-{option}")), value.clone()]);
                    seen.agent_option(option, &value.string()?, &mut agent)?;
                }
                _ => return Err(usage(&format!("-{option} is not an option"))),
            }
        };
        let shell = seen.shell(command.is_some(), login_shell);
        let action = seen.action(command)?;
        Ok(Self { action, shell, place: seen.place(), agent, agent_args })
    }
}

/// The options met so far.
#[derive(Default)]
struct Seen {
    c: bool,
    s: bool,
    kill: bool,
    version: bool,
    clean: u32,
    debug: Option<bool>,
    private: bool,
    keep_stale: bool,
    path: Option<PathBuf>,
    providers: bool,
}

impl Seen {
    fn agent_option(&mut self, option: char, value: &str, agent: &mut AgentOptions) -> Result<(), Failure> {
        match option {
            't' => agent.default_lifetime = lifetime(value)?,
            'E' => {
                agent.fingerprint_hash = FingerprintHash::from_name(value).ok_or_else(|| {
                    Failure::Value(format!("-E {value}: not a hash; sha256, sha384, sha512, sha1 and md5 are"))
                })?;
            }
            'P' if self.providers => {
                return Err(Failure::Value("-P is given once; separate patterns by commas".into()));
            }
            'P' => {
                self.providers = true;
                value.clone_into(&mut agent.allowed_providers);
            }
            _ => match (value, value.strip_prefix("websafe-allow=")) {
                ("no-restrict-websafe", _) => agent.restrict_websafe = false,
                ("allow-remote-pkcs11", _) => agent.allow_remote_pkcs11 = true,
                (_, Some(_)) if agent.websafe_allow.is_some() => {
                    return Err(Failure::Value("-O websafe-allow is given once; separate patterns by commas".into()));
                }
                (_, Some(list)) => agent.websafe_allow = Some(list.to_owned()),
                _ => {
                    return Err(Failure::Value(format!(
                        "-O {value}: not an option; no-restrict-websafe, allow-remote-pkcs11 and websafe-allow=LIST are"
                    )));
                }
            },
        }
        Ok(())
    }

    fn shell(&self, runs_command: bool, login_shell: Option<&OsStr>) -> Shell {
        let by_name = !runs_command && !self.s && login_shell.is_some_and(|s| s.as_encoded_bytes().ends_with(b"csh"));
        if self.c || by_name { Shell::Csh } else { Shell::Sh }
    }

    fn action(&self, command: Option<(OsString, Vec<OsString>)>) -> Result<Action, Failure> {
        if self.version {
            return Ok(Action::Version);
        }
        match command {
            Some(_) if self.c || self.s || self.kill || self.debug.is_some() || self.clean > 0 => {
                Err(usage("-c, -s, -k, -d, -D and -u go without a command"))
            }
            Some((program, arguments)) => Ok(Action::Run(program, arguments)),
            None if self.kill => Ok(Action::Kill),
            None if self.clean > 0 => Ok(Action::Clean { any_name: self.clean > 1 }),
            None => Ok(self.debug.map_or(Action::Daemon, |debug| Action::Foreground { debug })),
        }
    }

    fn place(self) -> Place {
        match self.path {
            _ if self.private => Place::Private,
            Some(path) => Place::At(path),
            None => Place::Home { clean: !self.keep_stale },
        }
    }
}

fn usage(why: &str) -> Failure {
    Failure::Usage(why.to_owned())
}

impl From<lexopt::Error> for Failure {
    fn from(error: lexopt::Error) -> Self {
        Failure::Usage(error.to_string())
    }
}

/// The lifetime behind `-t`: numbers with the units of sshd_config(5), seconds without one; 0 means none.
fn lifetime(text: &str) -> Result<Option<Duration>, Failure> {
    let time = parse_time(text).ok_or_else(|| usage("Invalid lifetime"))?;
    Ok((!time.is_zero()).then_some(time))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<CommandLine, Failure> {
        CommandLine::parse(line.split_whitespace().map(OsString::from), Some(OsStr::new("/bin/sh")))
    }

    #[test]
    fn lifetimes() {
        for (text, expected) in [
            ("90", Some(90)),
            ("1h30m", Some(5400)),
            ("1H30", Some(3630)),
            ("1w2d3h4m5s", Some(788_645)),
            ("0", Some(0)),
            ("2147483647", Some(i32::MAX.unsigned_abs())),
            ("2147483648", None),
            ("3551w", None),
            ("4294967296", None),
            ("", None),
            ("m", None),
            ("-5", None),
            ("5x", None),
            ("5é", None),
            ("1 h", None),
        ] {
            assert_eq!(parse_time(text), expected.map(|seconds: u32| Duration::from_secs(seconds.into())), "{text:?}");
        }
        assert_eq!(parse("-t 0").unwrap().agent.default_lifetime, None);
    }

    #[test]
    fn options_cluster_and_end_where_the_command_begins() {
        let line = parse("-TUt90 -Emd5 -a=x -P a,b -O websafe-allow=x*,y -Ono-restrict-websafe -- -c -d").unwrap();
        assert_eq!(line.action, Action::Run("-c".into(), vec!["-d".into()]));
        assert_eq!(line.place, Place::Private);
        assert_eq!(line.agent.default_lifetime, Some(Duration::from_secs(90)));
        assert_eq!(line.agent.fingerprint_hash, FingerprintHash::Md5);
        assert_eq!(line.agent.allowed_providers, "a,b");
        assert_eq!(line.agent.websafe_allow.as_deref(), Some("x*,y"));
        assert!(!line.agent.restrict_websafe && !line.agent.allow_remote_pkcs11);
        let again = CommandLine::parse(line.agent_args, None).unwrap();
        assert_eq!(again.agent.allowed_providers, "a,b");
        assert_eq!(again.agent.websafe_allow.as_deref(), Some("x*,y"));
        assert_eq!(parse("cmd -x").unwrap().action, Action::Run("cmd".into(), vec!["-x".into()]));
        assert_eq!(parse("-a=x").unwrap().place, Place::At("=x".into()));
        assert_eq!(parse("-U").unwrap().place, Place::Home { clean: false });
    }

    #[test]
    fn what_excludes_what() {
        for line in ["-cs", "-sc", "-dd", "-DD", "-dD", "-x", "-a", "--debug", "-t", "-t 5x", "-t -1"] {
            assert!(matches!(parse(line), Err(Failure::Usage(_))), "{line}");
        }
        for flag in ["-c", "-k", "-s", "-d", "-D", "-u"] {
            assert!(matches!(parse(&format!("{flag} true")), Err(Failure::Usage(_))), "{flag}");
        }
        for line in ["-E md4", "-O x", "-P a -P b", "-O websafe-allow=a -O websafe-allow=b"] {
            assert!(matches!(parse(line), Err(Failure::Value(_))), "{line}");
        }
        // As with getopt, -V acts when it is met.
        assert_eq!(parse("-V -x").unwrap().action, Action::Version);
        assert_eq!(parse("-uu").unwrap().action, Action::Clean { any_name: true });
        assert_eq!(parse("-ku").unwrap().action, Action::Kill);
    }

    #[test]
    fn the_login_shell_decides_when_nothing_else_does() {
        let shell = |line: &str| {
            CommandLine::parse(line.split_whitespace().map(OsString::from), Some(OsStr::new("/bin/tcsh")))
                .unwrap()
                .shell
        };
        assert_eq!((shell(""), shell("-s"), shell("true")), (Shell::Csh, Shell::Sh, Shell::Sh));
        assert_eq!(parse("-c").unwrap().shell, Shell::Csh);
    }
}
