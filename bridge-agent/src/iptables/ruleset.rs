//! Tables, chains and rules, each rule with the configured name that errors refer to.

use std::fmt;

/// The prefix of every own chain. Chains without it are never touched, except for the jumps to own chains.
pub const CHAIN_PREFIX: &str = "BRIDGE-";

/// Whether `chain` is one of bridge's.
#[must_use]
pub fn is_own(chain: &str) -> bool {
    chain.starts_with(CHAIN_PREFIX)
}

/// An address family; each has a program of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4, `iptables`.
    V4,
    /// IPv6, `ip6tables`.
    V6,
}

impl Family {
    /// Both, in the order they are applied.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `iptables` or `ip6tables`.
    #[must_use]
    pub const fn program(self) -> &'static str {
        match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A table that bridge has chains in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// Before connection tracking: a packet refused there leaves no trace in it.
    Raw,
    /// Before address translation: a packet to a NodePort still has the node's address.
    Mangle,
    /// Decides; the only table in which the kernel allows REJECT.
    Filter,
}

impl Table {
    /// All, in the order they are applied.
    pub const ALL: [Self; 3] = [Self::Raw, Self::Mangle, Self::Filter];

    /// As iptables names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Filter => "filter",
        }
    }

    /// The built-in chains, in the order of the hooks.
    #[must_use]
    pub const fn hooks(self) -> &'static [&'static str] {
        match self {
            Self::Raw => &["PREROUTING", "OUTPUT"],
            Self::Mangle => &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"],
            Self::Filter => &["INPUT", "FORWARD", "OUTPUT"],
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One rule of an own chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Matches, with a leading blank each; empty for a rule that matches everything.
    pub matches: String,
    /// The configured name of the rule, or `bridge:...` for a rule of bridge's own.
    pub name: String,
    /// `-j CHAIN`, `-g CHAIN` or a target with its options; empty for a rule that only counts.
    pub target: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -m comment --comment \"{}\"", self.matches, self.name)?;
        if !self.target.is_empty() {
            write!(f, " {}", self.target)?;
        }
        Ok(())
    }
}

/// An own chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Begins with [`CHAIN_PREFIX`]; at most 28 bytes.
    pub name: String,
    /// In the order they are tried.
    pub lines: Vec<Line>,
}

/// The first rule of a built-in chain, which jumps to an own chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jump {
    /// A built-in chain.
    pub hook: &'static str,
    /// The rule itself.
    pub line: Line,
}

/// The rules of bridge in one table of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRules {
    /// Which table.
    pub table: Table,
    /// One at most for each built-in chain.
    pub jumps: Vec<Jump>,
    /// Every chain that a jump or another chain leads to.
    pub chains: Vec<Chain>,
}

/// The rules of bridge in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// Which family.
    pub family: Family,
    /// In the order they are applied; a table that is not listed holds no rule of bridge.
    pub tables: Vec<TableRules>,
}

impl Ruleset {
    /// Returns the wanted rules of `table`, if there are any.
    #[must_use]
    pub fn table(&self, table: Table) -> Option<&TableRules> {
        self.tables.iter().find(|rules| rules.table == table)
    }
}
