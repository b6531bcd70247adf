//! Pure decisions over identities, callers and purposes; the time is an argument. Knows no I/O.
