//! Builds the vault, listens, and serves until a signal: what `strongroom agent` and the drop-in have in common.
