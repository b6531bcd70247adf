//! What every driver must show, whatever device it is for. A new driver is a [`Subject`](subject::Subject), with more of
//! that file's traits where its devices have PINs, can be pulled or can be made to fail, and a line in the list below.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod behaviours;
#[cfg(feature = "openpgp")]
mod openpgp;
mod opensc;
mod pkcs11;
mod room;
mod scripted;
mod soft;
mod subject;
#[path = "../support/mod.rs"]
mod support;
mod verify;

/// A test for each behaviour of each group.
macro_rules! conform {
    ($($name:ident: $subject:ty => $($group:ident)+;)+) => {
        $(mod $name {
            use super::*;
            type Subject = $subject;
            type Beside = Subject;
            use alone as run;
            $(group!($group);)+
        })+
    };
}

/// The same for two subjects, both put to each behaviour at once.
#[cfg(feature = "openpgp")]
macro_rules! conform_at_once {
    ($($name:ident: $one:ty, $other:ty => $($group:ident)+;)+) => {
        $(mod $name {
            use super::*;
            type Subject = $one;
            type Beside = $other;
            use openpgp::at_once as run;
            $(group!($group);)+
        })+
    };
}

/// One subject, with nothing beside it.
async fn alone(one: impl Future<Output = ()>, _: impl Future<Output = ()>) {
    one.await;
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
    (schemes) => {
        behaviours! {
            lists_its_keys
            signs_with_every_scheme_it_claims
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
    (life) => {
        behaviours! {
            makes_names_and_deletes_keys
            takes_a_key_that_was_made_elsewhere
            wants_its_pin_before_it_makes_a_key
        }
    };
    (labels) => {
        behaviours! { keeps_keys_that_are_renamed_while_it_is_looked_at }
    };
    (no_life) => {
        behaviours! { says_that_it_makes_no_keys }
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
            Box::pin(run(behaviours::$behaviour::<Subject>(), behaviours::$behaviour::<Beside>())).await;
        })+
    };
}

conform! {
    soft_in_process: soft::Soft => keys no_life;
    pkcs11_nss: pkcs11::Nss => keys;
    pkcs11_softhsm: pkcs11::Soft => keys life labels;
    pkcs11_tpm: pkcs11::OnTpm => keys;
    opensc_25519: opensc::Others25519 => keys removal;
    opensc_25519_sig: opensc::Sign25519 => keys removal;
    opensc_p256: opensc::OthersP256 => keys removal;
    opensc_p384: opensc::OthersP384 => schemes;
    opensc_p521: opensc::OthersP521 => schemes;
    opensc_rsa2048: opensc::OthersRsa2048 => schemes;
    scripted_in_process: scripted::InProcess => keys pin removal faults life;
    scripted_in_a_child: scripted::InChild => keys pin removal faults life;
}

// Two cards at once, in one vault and behind one pcscd.
#[cfg(feature = "openpgp")]
conform_at_once! {
    openpgp_25519_and_p256: openpgp::Curve25519, openpgp::P256 => keys pin removal no_life;
    openpgp_p384_and_p521: openpgp::P384, openpgp::P521 => schemes;
    openpgp_rsa2048_and_rsa4096: openpgp::Rsa2048, openpgp::Rsa4096 => schemes;
}
