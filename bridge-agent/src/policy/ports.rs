//! What rules say by port: functions from (protocol, destination port, source port) to the rule that wins.
//!
//! Such a function is held as a partition of the destination ports; where source ports matter, a cell of it stands
//! for a partition of the source ports. All are interned, so equal functions are held once and compared by number.
//! "A deny wins, then the lowest index" is a minimum of ranks, so functions of parts of a set can be merged.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use bridge_common::policy::{protocol, reference};

use super::intern::Interner;
use crate::model::{Action, PortRange, Protocol, Rule};

/// A rank (the lower wins), or [`BY_SOURCE`] and the number of a partition of the source ports.
pub(super) type Cell = u32;
/// The rank of "no rule matches".
const NO_RULE: Cell = 1 << 30;
/// Marks a cell that is no rank.
pub(super) const BY_SOURCE: Cell = 1 << 31;

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

/// Ports from `first` up to the next interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Interval {
    pub(super) first: u16,
    pub(super) cell: Cell,
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

/// Every partition and every table (five partitions, by [`protocol`]) there is. Number 0 of both says "no rule".
pub(super) struct Ports {
    partitions: Interner<Partition>,
    tables: Interner<[u32; protocol::COUNT]>,
    merged_partitions: HashMap<(u32, u32), u32>,
    merged_tables: HashMap<(u32, u32), u32>,
    /// How many more intervals may be computed.
    budget: usize,
}

impl Ports {
    pub(super) fn new(budget: usize) -> Self {
        Self {
            partitions: Interner::new(Rc::from([Interval { first: 0, cell: NO_RULE }])),
            tables: Interner::new([0; protocol::COUNT]),
            merged_partitions: HashMap::new(),
            merged_tables: HashMap::new(),
            budget,
        }
    }

    pub(super) fn partition(&self, number: u32) -> &Partition {
        self.partitions.value(number)
    }

    pub(super) fn partition_count(&self) -> usize {
        self.partitions.values().len()
    }

    pub(super) fn roots(&self, table: u32) -> [u32; protocol::COUNT] {
        *self.tables.value(table)
    }

    /// The table of `rules`, each with its index.
    pub(super) fn table(&mut self, rules: &[(u32, &Rule)]) -> Result<u32, Exhausted> {
        let mut roots = [0; protocol::COUNT];
        let mut before: Vec<(Vec<u32>, u32)> = Vec::new();
        for (protocol, root) in roots.iter_mut().enumerate() {
            let chosen = || rules.iter().filter(|(_, rule)| matches(rule, protocol));
            let indexes: Vec<u32> = chosen().map(|&(index, _)| index).collect();
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

    /// The table that says what all of `tables` say together.
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
        let mut roots = [0; protocol::COUNT];
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

    /// Takes from the budget what `intervals` of them, or as much work, cost.
    pub(super) fn spend(&mut self, intervals: usize) -> Result<(), Exhausted> {
        self.budget = self.budget.checked_sub(intervals).ok_or(Exhausted)?;
        Ok(())
    }

    /// The partition of the destination ports by `claims`, whose ranks are distinct.
    pub(super) fn sweep(&mut self, claims: &[Claim<'_>]) -> Result<u32, Exhausted> {
        let mut sources: Interner<Cow<'_, [PortRange]>> = Interner::new(Cow::Borrowed(&[PortRange::ALL]));
        let mut events = Vec::with_capacity(2 * claims.len());
        for claim in claims {
            let source = sources.number(normalise(claim.source_ports)) as usize;
            for range in normalise(claim.ports).iter() {
                events.push(Event { port: range.first, opens: true, rank: claim.rank, source });
                if let Some(port) = range.last.checked_add(1) {
                    events.push(Event { port, opens: false, rank: claim.rank, source });
                }
            }
        }
        events.sort_unstable_by_key(|event| event.port);

        let mut active =
            Active { by_source: vec![BTreeSet::new(); sources.values().len()], best: BTreeSet::new() };
        let mut intervals = Vec::with_capacity(events.len() + 1);
        if events.first().is_none_or(|event| event.port > 0) {
            intervals.push(Interval { first: 0, cell: NO_RULE });
        }
        for at_one_port in events.chunk_by(|a, b| a.port == b.port) {
            for event in at_one_port {
                active.apply(event);
            }
            let cell = self.active_cell(&active, sources.values())?;
            push(&mut intervals, at_one_port[0].port, cell);
        }
        self.intern(intervals)
    }

    /// What the rules that are active at one destination port say by source port: the best rule takes its source
    /// ports, the next what is left, until nothing is.
    fn active_cell(&mut self, active: &Active, sources: &[Cow<'_, [PortRange]>]) -> Result<Cell, Exhausted> {
        let Some(&(best, source)) = active.best.first() else { return Ok(NO_RULE) };
        if source == ANY_SOURCE {
            return Ok(best);
        }
        let mut free = BTreeMap::from([(0_u16, u16::MAX)]);
        let mut taken = Vec::new();
        for &(rank, source) in &active.best {
            for range in sources[source].iter() {
                self.spend(1)?;
                while let Some((&first, &last)) = free.range(..=range.last).next_back()
                    && last >= range.first
                {
                    free.remove(&first);
                    if first < range.first {
                        free.insert(first, range.first - 1);
                    }
                    if last > range.last {
                        free.insert(range.last + 1, last);
                    }
                    taken.push(Interval { first: first.max(range.first), cell: rank });
                }
            }
            if free.is_empty() {
                break;
            }
        }
        taken.extend(free.keys().map(|&first| Interval { first, cell: NO_RULE }));
        taken.sort_unstable_by_key(|interval| interval.first);
        let mut intervals = Vec::with_capacity(taken.len());
        for interval in taken {
            push(&mut intervals, interval.first, interval.cell);
        }
        let partition = self.intern(intervals)?;
        Ok(self.cell(partition))
    }
}

/// Number of the list of all source ports.
const ANY_SOURCE: usize = 0;

/// From `port` on, a rule claims (or no longer claims) the destination port for the source ports `source`.
struct Event {
    port: u16,
    opens: bool,
    rank: Cell,
    source: usize,
}

/// The rules that claim the destination port the sweep is at.
struct Active {
    /// Their ranks, by list of source ports.
    by_source: Vec<BTreeSet<Cell>>,
    /// The best of each list: all others of the list are hidden behind it.
    best: BTreeSet<(Cell, usize)>,
}

impl Active {
    fn apply(&mut self, event: &Event) {
        let ranks = &mut self.by_source[event.source];
        let before = ranks.first().copied();
        if event.opens {
            ranks.insert(event.rank);
        } else {
            ranks.remove(&event.rank);
        }
        let after = ranks.first().copied();
        if before != after {
            before.map(|rank| self.best.remove(&(rank, event.source)));
            after.map(|rank| self.best.insert((rank, event.source)));
        }
    }
}

/// Whether `rule` speaks of the protocol with number `of` in [`protocol`].
fn matches(rule: &Rule, of: usize) -> bool {
    match rule.protocol {
        Protocol::Tcp => of == protocol::TCP,
        Protocol::Udp => of == protocol::UDP,
        Protocol::Sctp => of == protocol::SCTP,
        Protocol::Icmp => of == protocol::ICMP,
        Protocol::Any => {
            let has_ports = matches!(of, protocol::TCP | protocol::UDP | protocol::SCTP);
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
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    Cow::Owned(merged)
}

fn push(intervals: &mut Vec<Interval>, first: u16, cell: Cell) {
    if intervals.last().is_none_or(|last| last.cell != cell) {
        intervals.push(Interval { first, cell });
    }
}
