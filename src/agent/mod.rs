//! The front: sockets and bytes on one side, calls of the vault on the other. Computes nothing, decides nothing.

pub mod constraint;
pub mod door;
pub mod extension;
pub mod frame;
pub mod message;
mod parcel;
mod service;
pub mod session;
pub mod ticket;
pub mod wire;
