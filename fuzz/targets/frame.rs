//! Frames come out of the backlog the same, wherever the stream is cut.
//!
//! Input: a count, that many lengths of pieces (taken in turns), the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::agent::frame::{Backlog, FrameError, MAX_FRAME, first};

fuzz_target!(|input: &[u8]| {
    let Some((&count, rest)) = input.split_first() else { return };
    let (cuts, stream) = rest.split_at(rest.len().min(count.into()));
    let (whole, end) = in_one_piece(stream);
    let (mut backlog, mut seen, mut stopped) = (Backlog::default(), 0, None);
    let mut cuts =
        cuts.iter().map(|&n| usize::from(n).max(1)).chain([usize::MAX]).collect::<Vec<_>>().into_iter().cycle();
    let mut rest = stream;
    while !rest.is_empty() && stopped.is_none() {
        let (head, tail) = rest.split_at(cuts.next().map_or(rest.len(), |n| n.min(rest.len())));
        rest = tail;
        backlog.push(head);
        loop {
            match first(backlog.bytes()) {
                Ok(Some(body)) => {
                    assert_eq!(Some(&body), whole.get(seen));
                    let len = body.len();
                    backlog.consume(4 + len);
                    seen += 1;
                }
                Ok(None) => break,
                Err(e) => {
                    stopped = Some(e);
                    break;
                }
            }
        }
    }
    assert_eq!((seen, stopped), (whole.len(), end));
});

fn in_one_piece(mut stream: &[u8]) -> (Vec<&[u8]>, Option<FrameError>) {
    let mut bodies = Vec::new();
    loop {
        match first(stream) {
            Ok(Some(body)) => {
                assert!(!body.is_empty() && body.len() <= MAX_FRAME);
                bodies.push(body);
                stream = &stream[4 + body.len()..];
            }
            Ok(None) => return (bodies, None),
            Err(e) => return (bodies, Some(e)),
        }
    }
}
