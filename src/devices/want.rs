//! What a person is to do at a device, for whoever looks at it meanwhile. Knows neither device nor person.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Touch it.
    Touch,
    /// Connect it.
    Insert,
}

impl Deed {
    /// `touch` or `insert`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Touch => "touch",
            Self::Insert => "insert",
        }
    }
}

/// Something that somebody is to do, for a request that waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// What.
    pub deed: Deed,
    /// Whose request it is for.
    pub uid: u32,
    /// For that person: which key, for which program and host.
    pub text: String,
}

/// What is wanted of the people at one device. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Wants(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    last: u64,
    wants: Vec<(u64, Arc<Want>)>,
}

impl Wants {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets it be known until the returned value is dropped.
    pub(super) fn add(&self, want: Want) -> Wanted {
        let mut state = self.state();
        state.last += 1;
        let id = state.last;
        state.wants.push((id, Arc::new(want)));
        Wanted { wants: self.clone(), id }
    }

    /// What has been wanted the longest.
    pub(super) fn first(&self) -> Option<Arc<Want>> {
        self.state().wants.first().map(|(_, want)| Arc::clone(want))
    }
}

/// Something is wanted for as long as this lives.
#[must_use = "it is wanted for as long as this lives"]
pub struct Wanted {
    wants: Wants,
    id: u64,
}

impl fmt::Debug for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wanted({})", self.id)
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.wants.state().wants.retain(|(id, _)| *id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_want_is_known_until_it_is_met() {
        let wants = Wants::default();
        let want = |text: &str| Want { deed: Deed::Touch, uid: 0, text: text.to_owned() };
        let first = |wants: &Wants| wants.first().map(|want| want.text.clone());
        let (a, b) = (wants.add(want("a")), wants.add(want("b")));
        assert_eq!(first(&wants).as_deref(), Some("a"));
        drop(a);
        assert_eq!(first(&wants).as_deref(), Some("b"));
        drop(b);
        assert_eq!(first(&wants), None);
    }
}
