//! Who is at the other end of a socket, beyond what SO_PEERCRED says.

use std::{fs, path::PathBuf};

/// The program that a process runs, where it can be read. The process may end and its number be taken by another, so
/// this is good for telling a person, and for refusing, never for allowing.
pub fn program(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}
