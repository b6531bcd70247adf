//! What is being signed, read from the bytes: a login, an SSHSIG, anything else. Decides nothing.
