//! Network interfaces as they are written: a name, or a pattern of names.

use std::fmt;

use super::leaf::{Leaf, Problem, leaf, unprintable};

/// The longest interface name, in bytes: the kernel's `IFNAMSIZ` less its final zero byte.
const MAX_NAME: usize = 15;

/// The name of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InterfaceName(pub String);

leaf!(InterfaceName);

impl Leaf for InterfaceName {
    const FORMAT: &'static str = "interface-name";
    const EXAMPLE: &'static str = "eth0";

    fn parse(text: &str) -> Result<Self, Problem> {
        if text.contains('*') {
            return Err(Problem::new(
                format!("`{text}` is a pattern"),
                "write the name of one interface, such as eth0",
            ));
        }
        check(text)?;
        Ok(Self(text.into()))
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a network interface, in which every `*` stands for any number of characters, none included.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InterfacePattern(String);

leaf!(InterfacePattern);

impl InterfacePattern {
    /// The pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the shortest name that both match, if there is one; `*` if that is every name.
    pub(super) fn common(&self, other: &Self) -> Option<String> {
        let letters = |pattern: &Self| pattern.0.chars().collect::<Vec<char>>();
        let (a, b) = (letters(self), letters(other));
        // By the number of letters at the ends of both that are still to be matched.
        let mut shortest = vec![vec![None::<String>; b.len() + 1]; a.len() + 1];
        for (i, j) in (0..=a.len()).flat_map(|i| (0..=b.len()).map(move |j| (i, j))) {
            let (one, other) = ((i > 0).then(|| a[a.len() - i]), (j > 0).then(|| b[b.len() - j]));
            let rest = |i: usize, j: usize| shortest[i][j].clone();
            let with = |letter: char, rest: Option<String>| rest.map(|rest| format!("{letter}{rest}"));
            // A star stands for nothing more, or for one more letter of the other.
            let found = match (one, other) {
                (None, None) => [Some(String::new()), None],
                (Some('*'), None) => [rest(i - 1, j), None],
                (None, Some('*')) => [rest(i, j - 1), None],
                (Some('*'), Some('*')) => [rest(i - 1, j), rest(i, j - 1)],
                (Some('*'), Some(letter)) => [rest(i - 1, j), with(letter, rest(i, j - 1))],
                (Some(letter), Some('*')) => [rest(i, j - 1), with(letter, rest(i - 1, j))],
                (Some(one), Some(other)) if one == other => [with(one, rest(i - 1, j - 1)), None],
                _ => [None, None],
            };
            shortest[i][j] = found.into_iter().flatten().min_by_key(String::len);
        }
        let name = shortest[a.len()][b.len()].take().filter(|name| name.len() <= MAX_NAME)?;
        Some(if name.is_empty() { "*".to_owned() } else { name })
    }

    /// Whether `name` matches the whole pattern.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let Some((head, tail)) = self.0.split_once('*') else { return self.0 == name };
        let Some(mut rest) = name.strip_prefix(head) else { return false };
        let mut parts = tail.split('*').collect::<Vec<_>>();
        // `split` yields at least one part; the last one is anchored at the end, the others are found leftmost.
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

impl Leaf for InterfacePattern {
    const FORMAT: &'static str = "interface-pattern";
    const EXAMPLE: &'static str = "cali*";

    fn parse(text: &str) -> Result<Self, Problem> {
        check(text)?;
        Ok(Self(text.into()))
    }
}

impl fmt::Display for InterfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Refuses names that the kernel refuses (`dev_valid_name` in net/core/dev.c), and those that a shell would not quote.
fn check(text: &str) -> Result<(), Problem> {
    const HELP: &str = "write a name such as eth0, or a pattern such as \"cali*\"";
    let name_bytes = text.bytes().filter(|byte| *byte != b'*').count();
    if text.is_empty() {
        return Err(Problem::new("the interface name is empty", HELP));
    }
    if name_bytes > MAX_NAME {
        return Err(Problem::new(
            format!("`{text}` is longer than an interface name can be"),
            format!("shorten it to {MAX_NAME} bytes"),
        ));
    }
    if text.contains("**") {
        let mut mended = text.to_owned();
        while mended.contains("**") {
            mended = mended.replace("**", "*");
        }
        return Err(Problem::new(format!("`{text}` has stars side by side"), format!("write \"{mended}\"")));
    }
    if let Some(problem) = unprintable(text) {
        return Err(problem);
    }
    let bad = text.chars().find(|c| c.is_whitespace() || matches!(c, '/' | ':'));
    match bad {
        Some(c) => Err(Problem::new(format!("`{text}` contains {c:?}, which no interface name can"), HELP)),
        None if matches!(text, "." | "..") => {
            Err(Problem::new(format!("`{text}` cannot be an interface name"), HELP))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn star_stands_for_any_number_of_characters() {
        let matches = |pattern: &str, name: &str| InterfacePattern::parse(pattern).unwrap().matches(name);
        assert!(matches("cali*", "cali123") && matches("cali*", "cali"));
        assert!(!matches("cali*", "xcali1") && !matches("eth0", "eth01"));
        assert!(matches("*", "lo") && matches("*0", "eth0") && !matches("*0", "eth1"));
        assert!(matches("a*b*c", "aXbYc") && matches("a*b*c", "abc") && !matches("a*b*c", "acb"));
        assert!(!matches("ab*ba", "aba"), "the two ends may not share characters");
        assert!(matches("*a*a", "aa") && !matches("*a*a", "a"));
    }

    #[test]
    fn two_patterns_have_a_name_in_common_or_none() {
        let common = |a: &str, b: &str| {
            let parse = |text: &str| InterfacePattern::parse(text).unwrap();
            let (there, back) = (parse(a).common(&parse(b)), parse(b).common(&parse(a)));
            assert_eq!(there.is_some(), back.is_some(), "{a} {b}");
            if let Some(name) = there.as_ref().filter(|name| *name != "*") {
                assert!(parse(a).matches(name) && parse(b).matches(name), "{a} {b}: {name}");
            }
            there
        };
        for (a, b, name) in [
            ("eth0", "eth0", "eth0"),
            ("eth*", "eth0", "eth0"),
            ("eth*", "*0", "eth0"),
            ("*", "*", "*"),
            ("*", "lo", "lo"),
            ("a*c", "*b*", "abc"),
            ("cali*", "*", "cali"),
        ] {
            assert_eq!(common(a, b).as_deref(), Some(name), "{a} {b}");
        }
        for (a, b) in
            [("eth0", "eth1"), ("eth*", "cali*"), ("*0", "*1"), ("abcdefgh*", "*ijklmnop"), ("a", "ab*")]
        {
            assert_eq!(common(a, b), None, "{a} {b}");
        }
    }

    #[test]
    fn names_the_kernel_refuses_are_refused() {
        assert_eq!(InterfacePattern::parse("a***b").unwrap_err().help, "write \"a*b\"");
        for bad in ["", ".", "..", "eth 0", "a/b", "eth0:1", "abcdefghijklmnop", "a\n"] {
            assert!(InterfacePattern::parse(bad).is_err(), "{bad:?}");
        }
        assert!(InterfacePattern::parse("abcdefghijklmno").is_ok());
        assert!(InterfaceName::parse("cali*").is_err());
    }
}
