//! Who is at the other end of a socket, beyond what SO_PEERCRED says.

use std::{fs, path::PathBuf};

/// The program that a process runs, where it can be read. The process may end and its number be taken by another, so
/// this is good for telling a person, and for refusing, never for allowing.
pub fn program(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// The short name of a process, which every user can read and which the process can change.
pub fn short_name(pid: i32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}
