//! How the allocator treats large blocks.
#![allow(unsafe_code)]

use std::sync::Once;

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
