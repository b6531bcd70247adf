//! Questions to a person through askpass: confirmation, PIN, a notice to touch. Knows no key and no vault.
