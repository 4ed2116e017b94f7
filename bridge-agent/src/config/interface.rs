//! Network interfaces as they are written: a name, or a pattern of names.

use std::fmt;

use super::leaf::{Leaf, Problem, leaf};

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
    let bad = text.chars().find(|c| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':'));
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
    fn names_the_kernel_refuses_are_refused() {
        for bad in ["", ".", "..", "eth 0", "a/b", "eth0:1", "abcdefghijklmnop", "a\n"] {
            assert!(InterfacePattern::parse(bad).is_err(), "{bad:?}");
        }
        assert!(InterfacePattern::parse("abcdefghijklmno").is_ok());
        assert!(InterfaceName::parse("cali*").is_err());
    }
}
