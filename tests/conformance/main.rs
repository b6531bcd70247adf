//! What every driver must show, whatever device it is for. A new driver is a [`Subject`](subject::Subject), with more of
//! that file's traits where its devices have PINs, can be pulled or can be made to fail, and a line in the list below.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod behaviours;
mod scripted;
mod soft;
mod subject;
mod verify;

/// A test for each behaviour of each group.
macro_rules! conform {
    ($($name:ident: $subject:ty => $($group:ident)+;)+) => {
        $(mod $name {
            use super::*;
            type Subject = $subject;
            $(group!($group);)+
        })+
    };
}

macro_rules! group {
    (keys) => {
        behaviours! {
            lists_its_keys
            signs_with_every_scheme_it_claims
            refuses_what_it_does_not_claim
            knows_which_keys_it_has
            never_answers_one_request_with_anothers_result
        }
    };
    (pin) => {
        behaviours! {
            asks_for_a_pin_and_no_try
            counts_tries_one_by_one
            is_blocked_when_no_try_is_left
        }
    };
    (removal) => {
        behaviours! { survives_removal_and_return }
    };
    (faults) => {
        behaviours! {
            answers_by_its_deadline_when_it_hangs
            is_caught_when_it_lies
            comes_back_when_it_dies
        }
    };
}

macro_rules! behaviours {
    ($($behaviour:ident)+) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $behaviour() {
            Box::pin(behaviours::$behaviour::<Subject>()).await;
        })+
    };
}

conform! {
    soft_in_process: soft::Soft => keys;
    scripted_in_process: scripted::InProcess => keys pin removal faults;
    scripted_in_a_child: scripted::InChild => keys pin removal faults;
}
