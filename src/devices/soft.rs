//! Keys in this process's memory.
/// stub
#[derive(Debug)]
pub struct SoftKey;
