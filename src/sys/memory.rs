//! What memory goes back to the system: large blocks, and code that only the start needed.
#![allow(unsafe_code)]

use std::{fs, io, ops::Range, sync::Once};

use rustix::mm::{Advice, madvise};

/// Blocks from this size on come from the system and go back to it, in bytes.
const LARGE: i32 = 1 << 20;

/// From the first call on, large blocks are returned to the system when they are freed. Left to itself, glibc learns
/// from the first one to keep the next, for each thread anew: 24 MiB for each attempt to unlock.
pub fn return_large_blocks() {
    static ONCE: Once = Once::new();
    // SAFETY: mallopt takes numbers only and locks the allocator itself.
    ONCE.call_once(|| unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    });
}

/// Takes the program's code out of this process's memory. What runs again comes back from the system's cache of files, a few
/// dozen pages for requests; what only the start needed, most of it, stays out.
pub fn release_code() -> io::Result<()> {
    let here = release_code as fn() -> io::Result<()> as usize;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let code = maps.lines().filter_map(executable).find(|range| range.contains(&here));
    let code = code.ok_or(io::ErrorKind::NotFound)?;
    let start = std::ptr::with_exposed_provenance_mut(code.start);
    // SAFETY: the range is the whole mapping of the file that this very function is in, without the right to write: every
    // page of it is as in the file, and is read from there again when it is next wanted.
    unsafe { madvise(start, code.len(), Advice::LinuxDontNeed) }?;
    Ok(())
}

/// The addresses of a line of /proc/PID/maps, if what is there is a file's, and can be run and not written.
fn executable(line: &str) -> Option<Range<usize>> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let address = |digits| usize::from_str_radix(digits, 16).ok();
    // Rights, offset, device and inode.
    let mut fields = rest.split(' ');
    let is_code = fields.next() == Some("r-xp") && fields.nth(2).is_some_and(|inode| inode != "0");
    is_code.then_some(address(start)?..address(end)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_taken_for_code() {
        assert_eq!(executable("10a0-20b0 r-xp 00001000 08:01 42 /usr/bin/strongroom"), Some(0x10a0..0x20b0));
        for line in [
            "10a0-20b0 r--p 0 08:01 42 /x",
            "10a0-20b0 rwxp 0 08:01 42 /x",
            "10a0-20b0 r-xp 0 00:00 0",
            "10a0 r-xp",
            "z-20b0 r-xp 0 0:0 1",
            "",
        ] {
            assert_eq!(executable(line), None, "{line}");
        }
    }

    #[test]
    fn the_program_goes_on_without_its_code_in_memory() {
        release_code().unwrap();
        assert_eq!((0..1000).sum::<u32>(), 499_500);
    }
}
