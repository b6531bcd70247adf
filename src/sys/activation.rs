//! The listening sockets that systemd passes by name (`sd_listen_fds_with_names(3)`).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use super::process;

/// Takes over every socket that was passed to this process, each with its name; none if `LISTEN_PID` names another
/// process or nothing was passed. Children do not inherit them.
///
/// For the start of `main`, before this program opens anything of its own, and once. Fails if the variables contradict
/// each other, or a descriptor is closed or is not a listening Unix stream socket.
pub fn named_listeners() -> io::Result<Vec<(String, UnixListener)>> {
    let take = |(number, name)| {
        // SAFETY: the descriptor is open, or the call above had failed to mark it close-on-exec. Nothing else in this
        // program owns it: LISTEN_PID says that it came from outside, for us, and each number comes once.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        Ok((name, process::listener(fd)?))
    };
    sd_notify::listen_fds_with_names()?.map(take).collect()
}
