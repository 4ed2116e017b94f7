//! The cheap question whether anything in the tables has changed, for each back end.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use super::error::Error;
use super::kernel::{self, Legacy, Nft, Outline};
use super::programs::Backend;
use super::ruleset::{Family, Table};

/// Looks at the content of x_tables tables whose outline is as it was leave this many times their own duration free,
/// up to [`CONTENT_LONGEST`]. With few rules that is in every round.
const CONTENT_SHARE: u32 = 40;
const CONTENT_LONGEST: Duration = Duration::from_millis(600);

/// The cheap question, and the sockets to ask it.
#[derive(Debug)]
pub(super) enum Question {
    Nft(Nft),
    Legacy(Box<LegacyTables>),
}

/// Anything that is equal as long as nothing changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Generation(u32),
    Tables(BTreeMap<(Family, Table), (Outline, u64)>),
}

/// The outlines of tables are asked for in every round, their content in some.
#[derive(Debug, Default)]
pub(super) struct LegacyTables {
    sockets: BTreeMap<Family, Legacy>,
    known: BTreeMap<(Family, Table), (Outline, u64)>,
    /// When the content was last read, and how long after that it is to be read again.
    read: Option<(Instant, Duration)>,
}

impl Question {
    pub(super) fn open(backend: Backend) -> Result<Self, Error> {
        match backend {
            Backend::Nft => Nft::open()
                .map(Self::Nft)
                .map_err(|source| Error::Kernel { request: "open a socket to nf_tables".into(), source }),
            Backend::Legacy => {
                // A kernel without IPv6 has no tables of it either.
                let sockets =
                    Family::ALL.into_iter().filter_map(|f| Some((f, Legacy::open(f).ok()?))).collect();
                Ok(Self::Legacy(Box::new(LegacyTables { sockets, ..LegacyTables::default() })))
            }
        }
    }

    pub(super) fn ask(&mut self) -> io::Result<Answer> {
        match self {
            Self::Nft(nft) => nft.generation().map(Answer::Generation),
            Self::Legacy(tables) => tables.ask().map(Answer::Tables),
        }
    }
}

impl LegacyTables {
    fn ask(&mut self) -> io::Result<BTreeMap<(Family, Table), (Outline, u64)>> {
        // A rule replaced by another of the same size, or two that changed places, show in the content alone.
        let read = self.read.is_none_or(|(last, pause)| last.elapsed() >= pause);
        let begun = Instant::now();
        let mut now = BTreeMap::new();
        for (family, socket) in &self.sockets {
            let there = kernel::legacy_tables(*family);
            for table in Table::ALL.into_iter().filter(|table| there.iter().any(|name| name == table.name()))
            {
                let outline = socket.outline(table)?;
                let content = match self.known.get(&(*family, table)) {
                    Some((known, content)) if !read && *known == outline => *content,
                    _ => socket.fingerprint(table, &outline)?,
                };
                now.insert((*family, table), (outline, content));
            }
        }
        if read {
            self.read = Some((begun, (begun.elapsed() * CONTENT_SHARE).min(CONTENT_LONGEST)));
        }
        self.known.clone_from(&now);
        Ok(now)
    }
}
