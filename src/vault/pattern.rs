//! OpenSSH's patterns (ssh_config(5), PATTERNS): `*`, `?`, and lists with `!`. Knows bytes only.

/// Whether `text` matches `pattern`. Linear in the product of their lengths, whatever the pattern.
pub fn matches(text: &[u8], pattern: &[u8]) -> bool {
    let (mut t, mut p) = (0, 0);
    // Where the last `*` was, and how much of the text it has swallowed: the only place worth going back to.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
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
    let mut found = false;
    for pattern in list.split(|&b| b == b',') {
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
            ("", "", true),
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

    proptest! {
        #[test]
        fn as_the_model_says(text in "[ab]{0,8}", pattern in "[ab*?]{0,6}") {
            prop_assert_eq!(matches(text.as_bytes(), pattern.as_bytes()), model(text.as_bytes(), pattern.as_bytes()));
        }
    }
}
