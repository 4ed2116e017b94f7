//! Places in a configuration.

use std::fmt;

/// Where a value stands in a configuration. Built on the stack while walking, spelled out only for a finding.
#[derive(Clone, Copy, Debug)]
pub enum Path<'a> {
    /// The whole configuration.
    Root,
    /// The value of a key.
    Key(&'a Path<'a>, &'a str),
    /// An element of a list, from 0.
    Index(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    /// The value of `key` below this.
    #[must_use]
    pub const fn key(&'a self, key: &'a str) -> Self {
        Path::Key(self, key)
    }

    /// The element at `index` of this list.
    #[must_use]
    pub const fn index(&'a self, index: usize) -> Self {
        Path::Index(self, index)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Key(Path::Root, key) => f.write_str(key),
            Path::Key(parent, key) => write!(f, "{parent}.{key}"),
            Path::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}
