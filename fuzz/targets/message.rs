//! Our messages and the compatible ones are read or refused, and mean the same when written again; answers are read or
//! refused without a claimed length costing memory.
//!
//! Input: a frame's body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::{
    agent::{
        message::{
            Answer, Cancelled, Checked, Collected, DeviceEntry, KeyEntry, Made, Name, Page, RefusalEntry, Request,
            compatible, read_reply,
        },
        wire::number,
    },
    devices::CardStatus,
    rfc4251::{Reader, WireError},
    vault::audit::Head,
};
use zeroize::Zeroizing;

/// An answer that reads has the length it claims, and reads again. A macro, since what is read again lives shorter.
macro_rules! answer {
    ($answer:ty, $name:expr, $body:expr) => {
        if let Ok(Ok(answer)) = read_reply::<$answer>($name, $body) {
            let mut out = Vec::new();
            answer.put(&mut out);
            assert_eq!(out.len(), answer.encoded_len());
            assert!(<$answer>::read(&mut Reader::new(&out)).is_ok());
        }
    };
}

fuzz_target!(|body: &[u8]| {
    answer!(Page<KeyEntry<'_>>, Name::Keys, body);
    answer!(Page<DeviceEntry<'_>>, Name::Devices, body);
    answer!(Vec<RefusalEntry<'_>>, Name::Why, body);
    answer!(Collected, Name::Collect, body);
    answer!(Cancelled, Name::Cancel, body);
    answer!(Head, Name::Audit, body);
    answer!(Zeroizing<Vec<u8>>, Name::Sign, body);
    answer!(Made<'_>, Name::Generate, body);
    answer!(Checked<'_>, Name::Check, body);
    answer!(CardStatus, Name::CardStatus, body);
    for name in compatible::Name::ALL {
        let _ = compatible::read_result(*name, body);
    }
    let Ok((name, fields)) = extension(body) else { return };
    if let Some(name) = Name::from_bytes(name)
        && let Ok(request) = Request::read(name, fields)
    {
        let (mut once, mut twice) = (Vec::new(), Vec::new());
        request.put(&mut once);
        let (again, fields) = extension(&once[4..]).expect("what we wrote");
        assert_eq!(again, name.as_str().as_bytes());
        match Request::read(name, fields) {
            Ok(request) => request.put(&mut twice),
            Err(error) => panic!("{name:?} does not read again: {error}"),
        }
        assert_eq!(once, twice);
    }
    if let Some(name) = compatible::Name::from_bytes(name)
        && let Ok(request) = compatible::Request::read(name, fields)
    {
        let mut out = Vec::new();
        request.put(&mut out);
        let (_, fields) = extension(&out[4..]).expect("what we wrote");
        assert_eq!(compatible::Request::read(name, fields), Ok(request));
    }
});

fn extension(body: &[u8]) -> Result<(&[u8], &[u8]), WireError> {
    let mut r = Reader::new(body);
    if r.u8()? != number::EXTENSION {
        return Err(WireError::Truncated);
    }
    Ok((r.string()?, r.rest()))
}
