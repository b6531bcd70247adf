//! The answer to `audit`: how far the audit log is written. Knows its fields; reads no log.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

use super::Answer;
use crate::{
    rfc4251::{Put, Reader, WireError},
    vault::audit::{Head, Position},
};

impl Answer<'_> for Head {
    fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.directory.as_os_str().as_bytes());
        put_position(out, self.last);
        out.put_u64(self.file);
        out.put_u64(self.length);
        out.put_u64(self.oldest_file);
        put_position(out, self.before_oldest);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            directory: OsStr::from_bytes(r.string()?).into(),
            last: read_position(r)?,
            file: r.u64()?,
            length: r.u64()?,
            oldest_file: r.u64()?,
            before_oldest: read_position(r)?,
        })
    }
}

fn put_position(out: &mut Vec<u8>, Position { seq, hash }: Position) {
    out.put_u64(seq);
    out.put_string(&hash);
}

fn read_position(r: &mut Reader<'_>) -> Result<Position, WireError> {
    let (seq, hash) = (r.u64()?, r.string()?);
    Ok(Position { seq, hash: hash.try_into().map_err(|_| WireError::Truncated)? })
}
