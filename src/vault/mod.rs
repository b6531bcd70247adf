//! stub
pub mod key;
pub mod policy;
pub mod purpose;
