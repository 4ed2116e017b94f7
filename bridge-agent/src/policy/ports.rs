//! Rules by port: functions from (protocol, destination port, source port) to the rule that wins.
//!
//! Such a function is held as a partition of the destination ports; where source ports matter, a cell of it stands
//! for a partition of the source ports. All are interned, so equal functions are held once and compared by number.
//! "A deny wins, then the lowest index" is a minimum of ranks, so functions of parts of a set can be merged.

use std::borrow::Cow;
use std::collections::HashMap;
use std::rc::Rc;

use bridge_common::filter::policy::{class, reference};

use super::envelope::Envelope;
use super::intern::Interner;
use super::interval::{BY_SOURCE, Cell, Interval, NO_RULE, push};
use crate::model::{Action, PortRange, Protocol, Rule};

/// The rank of rule `index`, which is below [`reference::RULE`].
pub(super) const fn rank(index: u32, action: Action) -> Cell {
    match action {
        Action::Deny => index + 1,
        Action::Allow => reference::DENY | (index + 1),
    }
}

/// The leaf for a rank.
pub(super) const fn leaf(rank: Cell) -> u32 {
    if rank == NO_RULE { 0 } else { rank ^ reference::DENY }
}

/// The first interval begins at port 0; neighbours have different cells.
pub(super) type Partition = Rc<[Interval]>;

/// The ports that a rule claims for its rank; empty stands for all, as in the model.
#[derive(Clone, Copy)]
pub(super) struct Claim<'a> {
    pub(super) rank: Cell,
    pub(super) ports: &'a [PortRange],
    pub(super) source_ports: &'a [PortRange],
}

/// The budget of intervals is used up.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Exhausted;

/// The partitions of a table: by [`protocol`] those of the rules that decide, then those of the rules in audit mode.
pub(super) type Roots = [u32; 2 * class::COUNT];

/// Every partition and every table there is. Number 0 of both says "no rule".
pub(super) struct Ports {
    partitions: Interner<Partition>,
    tables: Interner<Roots>,
    merged_partitions: HashMap<(u32, u32), u32>,
    merged_tables: HashMap<(u32, u32), u32>,
    /// How many more intervals may be computed.
    budget: usize,
    /// Index of the first rule in audit mode.
    first_audited: u32,
}

impl Ports {
    pub(super) fn new(budget: usize, first_audited: u32) -> Self {
        Self {
            partitions: Interner::new(Rc::from([Interval { first: 0, cell: NO_RULE }])),
            tables: Interner::new([0; 2 * class::COUNT]),
            merged_partitions: HashMap::new(),
            merged_tables: HashMap::new(),
            budget,
            first_audited,
        }
    }

    pub(super) fn partition(&self, number: u32) -> &Partition {
        self.partitions.value(number)
    }

    pub(super) fn partition_count(&self) -> usize {
        self.partitions.values().len()
    }

    pub(super) fn roots(&self, table: u32) -> Roots {
        *self.tables.value(table)
    }

    /// The table of `rules`, each with its index.
    pub(super) fn table(&mut self, rules: &[(u32, &Rule)]) -> Result<u32, Exhausted> {
        let mut roots = [0; 2 * class::COUNT];
        let mut before: Vec<(Vec<u32>, u32)> = Vec::new();
        let first_audited = self.first_audited;
        for (number, root) in roots.iter_mut().enumerate() {
            let (protocol, audited) = (number % class::COUNT, number >= class::COUNT);
            let chosen = || {
                rules.iter().filter(move |(index, rule)| {
                    (*index >= first_audited) == audited && matches(rule, protocol)
                })
            };
            let indexes: Vec<u32> = chosen().map(|&(index, _)| index).collect();
            if indexes.is_empty() {
                continue;
            }
            if let Some((_, same)) = before.iter().find(|(others, _)| *others == indexes) {
                *root = *same;
                continue;
            }
            let claims: Vec<Claim<'_>> = chosen()
                .map(|&(index, rule)| Claim {
                    rank: rank(index, rule.action),
                    ports: &rule.ports,
                    source_ports: &rule.source_ports,
                })
                .collect();
            *root = self.sweep(&claims)?;
            before.push((indexes, *root));
        }
        Ok(self.tables.number(roots))
    }

    /// Returns the table that combines `tables`.
    pub(super) fn merge_all(&mut self, mut tables: Vec<u32>) -> Result<u32, Exhausted> {
        // In pairs, not one after the other: n log n instead of n squared.
        while tables.len() > 1 {
            tables.sort_unstable();
            tables.dedup();
            let merged: Result<Vec<u32>, Exhausted> = tables
                .chunks(2)
                .map(|pair| if let &[a, b] = pair { self.merge_tables(a, b) } else { Ok(pair[0]) })
                .collect();
            tables = merged?;
        }
        Ok(tables.pop().unwrap_or(0))
    }

    fn merge_tables(&mut self, a: u32, b: u32) -> Result<u32, Exhausted> {
        if a == 0 || a == b {
            return Ok(b);
        }
        if b == 0 {
            return Ok(a);
        }
        let key = (a.min(b), a.max(b));
        if let Some(&known) = self.merged_tables.get(&key) {
            return Ok(known);
        }
        let (left, right) = (self.roots(a), self.roots(b));
        let mut roots = [0; 2 * class::COUNT];
        for (index, root) in roots.iter_mut().enumerate() {
            *root = self.merge_partitions(left[index], right[index])?;
        }
        let merged = self.tables.number(roots);
        self.merged_tables.insert(key, merged);
        Ok(merged)
    }

    fn merge_partitions(&mut self, a: u32, b: u32) -> Result<u32, Exhausted> {
        if a == 0 || a == b {
            return Ok(b);
        }
        if b == 0 {
            return Ok(a);
        }
        let key = (a.min(b), a.max(b));
        if let Some(&known) = self.merged_partitions.get(&key) {
            return Ok(known);
        }
        let (left, right) = (Rc::clone(self.partition(a)), Rc::clone(self.partition(b)));
        let mut intervals = Vec::with_capacity(left.len() + right.len());
        let (mut i, mut j) = (0, 0);
        loop {
            let cell = self.merge_cells(left[i].cell, right[j].cell)?;
            push(&mut intervals, left[i].first.max(right[j].first), cell);
            match (left.get(i + 1), right.get(j + 1)) {
                (None, None) => break,
                (Some(_), None) => i += 1,
                (None, Some(_)) => j += 1,
                (Some(l), Some(r)) => {
                    i += usize::from(l.first <= r.first);
                    j += usize::from(r.first <= l.first);
                }
            }
        }
        let merged = self.intern(intervals)?;
        self.merged_partitions.insert(key, merged);
        Ok(merged)
    }

    fn merge_cells(&mut self, a: Cell, b: Cell) -> Result<Cell, Exhausted> {
        if a < BY_SOURCE && b < BY_SOURCE {
            return Ok(a.min(b));
        }
        let (a, b) = (self.by_source(a)?, self.by_source(b)?);
        let merged = self.merge_partitions(a, b)?;
        Ok(self.cell(merged))
    }

    /// The partition of the source ports that `cell` stands for.
    fn by_source(&mut self, cell: Cell) -> Result<u32, Exhausted> {
        if cell < BY_SOURCE { self.intern(vec![Interval { first: 0, cell }]) } else { Ok(cell ^ BY_SOURCE) }
    }

    /// The cell that stands for a partition of the source ports.
    fn cell(&self, partition: u32) -> Cell {
        match **self.partition(partition) {
            [only] => only.cell,
            _ => BY_SOURCE | partition,
        }
    }

    fn intern(&mut self, intervals: Vec<Interval>) -> Result<u32, Exhausted> {
        self.spend(intervals.len())?;
        Ok(self.partitions.number(Rc::from(intervals)))
    }

    /// Charges the budget for `intervals`, or for as much work.
    pub(super) fn spend(&mut self, intervals: usize) -> Result<(), Exhausted> {
        self.budget = self.budget.checked_sub(intervals).ok_or(Exhausted)?;
        Ok(())
    }

    /// The partition of the destination ports by `claims`, whose ranks are distinct.
    pub(super) fn sweep(&mut self, claims: &[Claim<'_>]) -> Result<u32, Exhausted> {
        let sources: Vec<Cow<'_, [PortRange]>> =
            claims.iter().map(|claim| normalise(claim.source_ports)).collect();
        let mut events = Vec::with_capacity(2 * claims.len());
        for (claim, index) in claims.iter().zip(0..) {
            for range in normalise(claim.ports).iter() {
                events.push(Event { port: range.first, claim: index, claims: true });
                events.extend(range.last.checked_add(1).map(|port| Event {
                    port,
                    claim: index,
                    claims: false,
                }));
            }
        }
        events.sort_unstable_by_key(|event| event.port);

        let mut envelope = Envelope::new(sources.iter().flat_map(|ranges| ranges.iter()));
        let mut intervals = Vec::with_capacity(events.len() + 1);
        if events.first().is_none_or(|event| event.port > 0) {
            intervals.push(Interval { first: 0, cell: NO_RULE });
        }
        for at_one_port in events.chunk_by(|a, b| a.port == b.port) {
            for event in at_one_port {
                self.spend(sources[event.claim].len())?;
                for range in sources[event.claim].iter() {
                    envelope.apply(*range, claims[event.claim].rank, event.claims);
                }
            }
            let winners = envelope.winners();
            let cell = match *winners {
                [everywhere] => everywhere.cell,
                _ => BY_SOURCE | self.intern(winners)?,
            };
            push(&mut intervals, at_one_port[0].port, cell);
        }
        self.intern(intervals)
    }
}

/// From `port` on, a claim of that index holds, or no longer holds.
struct Event {
    port: u16,
    claim: usize,
    claims: bool,
}

/// Whether `rule` speaks of the protocol with number `of` in [`protocol`].
fn matches(rule: &Rule, of: usize) -> bool {
    match rule.protocol {
        Protocol::Tcp => of == class::TCP,
        Protocol::Udp => of == class::UDP,
        Protocol::Sctp => of == class::SCTP,
        Protocol::Icmp => of == class::ICMP,
        Protocol::Any => {
            let has_ports = matches!(of, class::TCP | class::UDP | class::SCTP);
            has_ports || rule.ports.is_empty() && rule.source_ports.is_empty()
        }
    }
}

/// The same ports in ascending ranges that neither overlap nor touch.
fn normalise(ranges: &[PortRange]) -> Cow<'_, [PortRange]> {
    if ranges.is_empty() {
        return Cow::Borrowed(&[PortRange::ALL]);
    }
    let apart = |pair: &[PortRange]| u32::from(pair[0].last) + 1 < u32::from(pair[1].first);
    if ranges.windows(2).all(apart) {
        return Cow::Borrowed(ranges);
    }
    Cow::Owned(PortRange::join(ranges))
}
