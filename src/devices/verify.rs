//! placeholder
use super::{Input, Scheme, Signature};
pub fn verify(_: &[u8], _: Scheme, _: &Input<'_>, _: &Signature) -> bool {
    true
}
