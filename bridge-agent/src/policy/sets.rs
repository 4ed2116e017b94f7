//! From port tables to the form the kernel reads.

use std::collections::HashMap;
use std::rc::Rc;

use bridge_common::filter::policy::{INTERVALS, PortIntervals, PortPage, RuleSet, class, reference};

use super::intern::Interner;
use super::interval::{BY_SOURCE, Cell, Interval};
use super::ports::{Ports, leaf};
use super::tables::{Error, MAX_PAGES, Tables};

/// Entries of a page, without those that repeat the one before.
type Runs = Rc<[(u8, u32)]>;

/// Writes each table, partition and page once.
pub(super) struct Emitter<'a> {
    ports: &'a Ports,
    rule_sets: Vec<RuleSet>,
    /// Index in `rule_sets`, by table.
    sets: HashMap<u32, u32>,
    narrows: Vec<PortIntervals>,
    pages: Interner<Runs>,
    /// By partition; 0: not written yet.
    references: Vec<u32>,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(ports: &'a Ports) -> Self {
        Self {
            ports,
            rule_sets: vec![RuleSet::default()],
            sets: HashMap::from([(0, 0)]),
            narrows: Vec::new(),
            pages: Interner::new(Rc::from([(0, 0)])),
            references: vec![0; ports.partition_count()],
        }
    }

    /// Index of the rule set for `table`.
    pub(super) fn set(&mut self, table: u32) -> u32 {
        if let Some(&known) = self.sets.get(&table) {
            return known;
        }
        let all = self.ports.roots(table).map(|partition| self.root(partition));
        let [mut roots, mut audited] = [[0; class::COUNT]; 2];
        roots.copy_from_slice(&all[..class::COUNT]);
        audited.copy_from_slice(&all[class::COUNT..]);
        let index = u32::try_from(self.rule_sets.len()).expect("no more sets than tables");
        self.rule_sets.push(RuleSet { roots, audited });
        self.sets.insert(table, index);
        index
    }

    /// The reference for a partition of the destination ports.
    pub(super) fn root(&mut self, partition: u32) -> u32 {
        match **self.ports.partition(partition) {
            // A cell that depends on the source port is no root: a root is resolved by destination port.
            [only] if only.cell < BY_SOURCE => leaf(only.cell),
            _ => self.lookup(partition),
        }
    }

    /// The tables that are made here; the others are empty.
    pub(super) fn finish(self) -> Result<Tables, Error> {
        let pages = self.pages.values().len();
        if pages > MAX_PAGES {
            return Err(Error::TooManyPages { pages });
        }
        let pages = self.pages.values().iter().map(|runs| {
            let mut page = PortPage { references: [0; 256] };
            for (index, &(first, reference)) in runs.iter().enumerate() {
                let end = runs.get(index + 1).map_or(256, |&(next, _)| usize::from(next));
                page.references[usize::from(first)..end].fill(reference);
            }
            page
        });
        let pages = pages.collect();
        Ok(Tables { rule_sets: self.rule_sets, narrows: self.narrows, pages, ..Tables::default() })
    }

    fn lookup(&mut self, partition: u32) -> u32 {
        let known = self.references[partition as usize];
        if known != 0 {
            return known;
        }
        let intervals = self.ports.partition(partition);
        let reference =
            if intervals.len() <= INTERVALS { self.narrow(intervals) } else { self.wide(intervals) };
        self.references[partition as usize] = reference;
        reference
    }

    fn reference(&mut self, cell: Cell) -> u32 {
        if cell < BY_SOURCE { leaf(cell) } else { self.lookup(cell ^ BY_SOURCE) }
    }

    fn narrow(&mut self, intervals: &[Interval]) -> u32 {
        let mut narrow = PortIntervals { first: [0; INTERVALS], references: [0; INTERVALS], padding: 0 };
        for slot in 0..INTERVALS {
            let interval = intervals[slot.min(intervals.len() - 1)];
            narrow.first[slot] = interval.first;
            narrow.references[slot] = self.reference(interval.cell);
        }
        let index = u32::try_from(self.narrows.len()).expect("no more than partitions");
        self.narrows.push(narrow);
        reference::INTERVALS | index
    }

    fn wide(&mut self, intervals: &[Interval]) -> u32 {
        let mut directory: Vec<(u8, u32)> = Vec::new();
        let mut rest = intervals;
        let mut current = 0;
        for block in 0..=u8::MAX {
            let mut runs: Vec<(u8, u32)> = vec![(0, current)];
            while let Some((interval, after)) = rest.split_first()
                && interval.first.to_be_bytes()[0] == block
            {
                rest = after;
                current = self.reference(interval.cell);
                let low = interval.first.to_be_bytes()[1];
                if low == 0 {
                    runs[0].1 = current;
                } else {
                    runs.push((low, current));
                }
            }
            let entry = match *runs {
                [(_, uniform)] => uniform,
                _ => reference::PAGE | self.pages.number(Rc::from(runs)),
            };
            if directory.last().is_none_or(|&(_, last)| last != entry) {
                directory.push((block, entry));
            }
        }
        reference::DIRECTORY | self.pages.number(Rc::from(directory))
    }
}
