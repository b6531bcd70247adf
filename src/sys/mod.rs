//! What the system needs: the clock, process hygiene, descriptors, foreign arithmetic. The only place with `unsafe`.

pub mod activation;
pub mod clock;
pub mod ed25519;
pub mod memory;
pub mod peer;
pub mod pkcs11;
pub mod process;
pub mod rsa;
pub mod socket_file;
pub mod spawn;
