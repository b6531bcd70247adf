//! The lines that a shell evaluates. Knows sh and csh, and nothing of agents.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whose syntax the lines have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shell {
    /// sh and everything that descends from it.
    Sh,
    /// csh, tcsh.
    Csh,
}

impl Shell {
    /// The line that exports a variable. The value is taken as it is: see [`Shell::quote`].
    pub(super) fn set(self, name: &str, value: &[u8]) -> Vec<u8> {
        let (before, after) = match self {
            Shell::Sh => (format!("{name}="), format!("; export {name};\n")),
            Shell::Csh => (format!("setenv {name} "), ";\n".to_owned()),
        };
        [before.as_bytes(), value, after.as_bytes()].concat()
    }

    /// The line that takes a variable away.
    pub(super) fn unset(self, name: &str) -> String {
        match self {
            Shell::Sh => format!("unset {name};\n"),
            Shell::Csh => format!("unsetenv {name};\n"),
        }
    }

    /// A path as the shell reads it back. OpenSSH's form (double quotes around white space, a backslash before
    /// `\ ' "`) wherever that means the same path; single quotes where a shell would read something else, or run it.
    pub(super) fn quote(self, path: &Path) -> Vec<u8> {
        let path = path.as_os_str().as_bytes();
        let space = path.iter().any(|&b| is_space(b));
        let faithful = path.iter().all(|&b| match b {
            b'\'' => !space,
            b'\\' | b'"' => !space || self == Shell::Sh,
            _ => is_space(b) || is_plain(b),
        });
        let mut out = Vec::with_capacity(path.len() + 2);
        if !faithful {
            out.push(b'\'');
            for &b in path {
                if b == b'\'' {
                    out.extend_from_slice(br"'\''");
                } else {
                    out.push(b);
                }
            }
            out.push(b'\'');
            return out;
        }
        if space {
            out.push(b'"');
        }
        for &b in path {
            if matches!(b, b'\\' | b'\'' | b'"') {
                out.push(b'\\');
            }
            out.push(b);
        }
        if space {
            out.push(b'"');
        }
        out
    }
}

fn is_space(b: u8) -> bool {
    b == b' ' || b == b'\t'
}

/// Bytes that no shell treats specially in the middle of a word.
fn is_plain(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"/._-+,:=@%".contains(&b) || !b.is_ascii()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_as_openssh_does() {
        for (path, sh) in [
            ("/home/a/.ssh/agent/s.x.agent.y", "/home/a/.ssh/agent/s.x.agent.y"),
            ("/a b", "\"/a b\""),
            ("/a\tb", "\"/a\tb\""),
            (r"/a'b", r"/a\'b"),
            (r#"/a"b\"#, r#"/a\"b\\"#),
            (r#"/a "b\"#, r#""/a \"b\\""#),
        ] {
            assert_eq!(Shell::Sh.quote(Path::new(path)), sh.as_bytes(), "{path}");
        }
    }

    #[test]
    fn every_path_survives_sh() {
        for path in ["/a b'c", "/$(false)`false`", "/a;b&c|d<e>f", "/*?[x]{y}~#!", "/a\nb", "/ \\\"", "/é \t"] {
            let line = Shell::Sh.set("P", &Shell::Sh.quote(Path::new(path)));
            let script = [&line[..], br#"printf %s "$P""#].concat();
            let script = String::from_utf8(script).unwrap();
            let out = std::process::Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
            assert_eq!(out.stdout, path.as_bytes(), "{script}");
        }
    }

    #[test]
    fn csh_reads_no_backslash_between_double_quotes() {
        assert_eq!(Shell::Csh.quote(Path::new("/a b")), b"\"/a b\"");
        assert_eq!(Shell::Csh.quote(Path::new("/a \"b")), b"'/a \"b'");
        assert_eq!(Shell::Csh.set("P", b"x"), b"setenv P x;\n");
    }
}
