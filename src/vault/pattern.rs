//! OpenSSH's patterns (ssh_config(5), PATTERNS): `*`, `?`, and lists with `!`. Knows bytes only.

use std::cell::Cell;

/// How many steps matching may still take. A peer that writes both the text and the pattern could otherwise ask for
/// work that grows with the product of their lengths.
#[derive(Debug)]
pub struct Fuel(Cell<u64>);

impl Fuel {
    /// So many steps, each about a nanosecond.
    pub fn new(steps: u64) -> Self {
        Self(Cell::new(steps))
    }

    /// Whether nothing is left: from now on nothing matches.
    pub fn is_spent(&self) -> bool {
        self.0.get() == 0
    }

    /// [`matches()`], as long as the fuel lasts.
    pub fn matches(&self, text: &[u8], pattern: &[u8]) -> bool {
        let mut left = self.0.get();
        let matched = search(text, pattern, &mut left);
        self.0.set(left);
        matched && left > 0
    }
}

/// Whether `text` matches `pattern`. The work is at most the product of their lengths: for patterns of our own side.
pub fn matches(text: &[u8], pattern: &[u8]) -> bool {
    let mut left = u64::MAX;
    search(text, pattern, &mut left)
}

fn search(text: &[u8], pattern: &[u8], left: &mut u64) -> bool {
    let (mut t, mut p) = (0, 0);
    // Where the last `*` was, and how much of the text it has swallowed: the only place worth going back to.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if *left == 0 {
            return false;
        }
        *left -= 1;
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                t += 1;
                p += 1;
            }
            _ => match star {
                Some((at, swallowed)) => {
                    star = Some((at, swallowed + 1));
                    p = at + 1;
                    t = swallowed + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

/// Whether `text` matches a pattern of the comma-separated list, and none that `!` negates.
pub fn matches_list(text: &[u8], list: &[u8]) -> bool {
    if list.is_empty() {
        return false;
    }
    let mut found = false;
    // Behind a comma at the end there is no pattern, as OpenSSH reads it.
    for pattern in list.strip_suffix(b",").unwrap_or(list).split(|&b| b == b',') {
        match pattern.strip_prefix(b"!") {
            Some(negated) if matches(text, negated) => return false,
            Some(_) => {}
            None => found |= matches(text, pattern),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, in its most obvious form.
    fn model(text: &[u8], pattern: &[u8]) -> bool {
        match (text, pattern) {
            ([], []) => true,
            (_, [b'*', rest @ ..]) => (0..=text.len()).any(|n| model(&text[n..], rest)),
            ([_, text @ ..], [b'?', pattern @ ..]) => model(text, pattern),
            ([t, text @ ..], [p, pattern @ ..]) if t == p => model(text, pattern),
            _ => false,
        }
    }

    #[test]
    fn lists_and_negation() {
        for (text, list, expected) in [
            ("/usr/lib/x/y.so", "/usr/lib*/*,/usr/local/lib*/*", true),
            ("/usr/local/lib/y.so", "/usr/lib*/*,/usr/local/lib*/*", true),
            ("/opt/y.so", "/usr/lib*/*", false),
            ("a", "", false),
            ("", "", false),
            ("", "a,", false),
            ("", ",a", true),
            ("", "!,a", false),
            ("a", "!a,*", false),
            ("b", "!a,*", true),
            ("b", "!a", false),
        ] {
            assert_eq!(matches_list(text.as_bytes(), list.as_bytes()), expected, "{text} {list}");
        }
    }

    #[test]
    fn many_stars_are_no_work() {
        let pattern = b"*a".repeat(128);
        assert!(!matches(&[b'a'; 120], &pattern));
        assert!(matches(&[b'a'; 200], &pattern));
    }

    #[test]
    fn without_fuel_nothing_matches() {
        let fuel = Fuel::new(10);
        assert!(fuel.matches(b"abc", b"a*") && !fuel.is_spent());
        assert!(!fuel.matches(&[b'a'; 100], b"*a"));
        assert!(fuel.is_spent() && !fuel.matches(b"a", b"a") && !fuel.matches(b"", b""));
    }

    proptest! {
        #[test]
        fn as_the_model_says(text in "[ab]{0,8}", pattern in "[ab*?]{0,6}") {
            prop_assert_eq!(matches(text.as_bytes(), pattern.as_bytes()), model(text.as_bytes(), pattern.as_bytes()));
        }
    }
}
