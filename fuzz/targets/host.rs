//! Frames between the daemon and a device's process: what either side reads, it reads the same when written again.
//!
//! Input: a byte that is even for a frame from the daemon and odd for one from the process, then the frame's body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::devices::host::wire::{Frame, Request, decode_answer, decode_request, encode_answer, encode_call};

fuzz_target!(|input: &[u8]| {
    let Some((&side, body)) = input.split_first() else { return };
    if side % 2 == 0 {
        if let Ok((id, Request::Call(call))) = decode_request(body) {
            let frame = encode_call(id, &call).expect("what was read is within bounds");
            assert_eq!(body_of(&frame), body);
        }
    } else if let Ok((id, answer)) = decode_answer(body) {
        // Not always the same bytes: the texts of errors come out harmless. But then they stay as they are.
        let once = encode_answer(id, &answer);
        let (again, answer) = decode_answer(body_of(&once)).expect("what we write we read");
        assert_eq!(again, id);
        assert_eq!(once, encode_answer(again, &answer));
    }
});

fn body_of(frame: &Frame) -> &[u8] {
    &frame[4..]
}
