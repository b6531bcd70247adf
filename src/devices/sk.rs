//! Keys in FIDO authenticators, through OpenSSH's `ssh-sk-helper`. Knows the helper's protocol; asks nobody for a PIN.
/// stub
#[derive(Debug)]
pub struct SkKey;
