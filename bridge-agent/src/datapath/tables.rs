//! Writes a compiled policy beside the active one, and switches to it by one store.
//!
//! A slot is written only after a grace period since it was last active, so no packet ever finds tables of two policies
//! in it.

use crate::kernel::{bpf, pins};
use std::{
    collections::HashMap,
    io,
    time::{Duration, Instant},
};

use aya::{
    Pod,
    maps::{MapData, lpm_trie::Key},
};
use bridge_common::filter::{
    address::Address,
    control::{Control, SLOTS, Settings},
    policy::{RuleHits, RuleInfo},
};
use ipnet::IpNet;
use sha2::{Digest as _, Sha256};
use zerocopy::IntoBytes as _;

use super::{
    error::{Error, Result},
    load::Datapath,
    maps::{Digest, Maps, Table, cpus, now},
};
use crate::policy::Tables;

/// Settings beside the rules; written into [`Settings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Behaviour {
    /// Nanoseconds by [`bridge_common::filter::flow::state`].
    pub timeouts: [u64; bridge_common::filter::flow::state::COUNT],
    /// Denied packets pass, and are counted and reported as they would have been.
    pub audit: bool,
    /// Denied packets are answered.
    pub reject: bool,
    /// Events each CPU may send in a second.
    pub events_per_second: u32,
    /// Answers to denied packets each CPU may send in a second.
    pub answers_per_second: u32,
    /// New flows that were let through are reported too.
    pub report_allowed: bool,
}

/// Result of publishing a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It was active already; nothing was written, every counter continues.
    Unchanged {
        /// Number of the policy.
        generation: u32,
    },
    /// It is active now.
    Switched {
        /// Number of the policy.
        generation: u32,
        /// Time from the first write to the switch.
        took: Duration,
    },
}

impl Published {
    /// Returns the number of the active policy.
    #[must_use]
    pub const fn generation(self) -> u32 {
        match self {
            Self::Unchanged { generation } | Self::Switched { generation, .. } => generation,
        }
    }
}

impl Datapath {
    /// Activates a policy, unless the same one is active already.
    ///
    /// With `trial`, the former policy becomes active again after that time, unless [`Datapath::confirm`] comes first;
    /// the kernel side does this with or without an agent.
    ///
    /// # Errors
    ///
    /// [`Error::Table`], [`Error::Map`], [`Error::Unconfirmed`]. The active policy stays.
    pub fn publish(
        &mut self,
        tables: &Tables,
        behaviour: &Behaviour,
        trial: Option<Duration>,
    ) -> Result<Published> {
        let start = Instant::now();
        let wanted = Wanted::new(tables, behaviour);
        let control = self.maps.control();
        let active = control.slot_at(now());
        let on_trial = is_trial(control);
        let there = self.compare(active, &wanted)?;
        if on_trial && !there.same {
            return Err(Error::Unconfirmed);
        }
        if !on_trial {
            // The fallback may have become active by its deadline: make that final. (The kernel side's clock lags a
            // little behind ours: without this it might still read the slot that is written next.)
            self.maps.set_control(Control::slot(active));
        }
        if there.same {
            return Ok(Published::Unchanged { generation: there.generation });
        }
        // Where no trial needs it, the third slot stays empty.
        let target = unused(active, active);
        let generation = self.write(target, active, &wanted, there)?;
        let next = match trial {
            None => Control::slot(target),
            Some(time) => {
                let deadline = now() / 1_000_000 + u64::try_from(time.as_millis()).unwrap_or(u64::MAX >> 16);
                Control::until(target, active, deadline)
            }
        };
        self.switch(next, active, &wanted, there, start).map(|took| Published::Switched { generation, took })
    }

    /// Replaces the policy on trial by `on_trial`, and the former one by `former`. The deadline stays the same, and at
    /// each moment one of the former policies, the old or the new, returns at it.
    ///
    /// # Errors
    ///
    /// [`Error::Table`], [`Error::Map`]; [`Error::NoTrial`] if its time is over.
    pub fn replace_trial(
        &mut self,
        on_trial: (&Tables, &Behaviour),
        former: (&Tables, &Behaviour),
    ) -> Result<Published> {
        let start = Instant::now();
        let control = self.maps.control();
        if !is_trial(control) {
            return Err(Error::NoTrial);
        }
        let (active, mut fallback, deadline) =
            (control.slot_on_trial(), control.fallback(), control.deadline());
        let wanted = Wanted::new(former.0, former.1);
        let there = self.compare(fallback, &wanted)?;
        if !there.same {
            let target = unused(active, fallback);
            self.write(target, fallback, &wanted, there)?;
            self.maps.set_control(Control::until(active, target, deadline));
            crate::fault::point("publish:former");
            fallback = target;
        }
        let wanted = Wanted::new(on_trial.0, on_trial.1);
        let there = self.compare(active, &wanted)?;
        if there.same {
            return Ok(Published::Unchanged { generation: there.generation });
        }
        let target = unused(active, fallback);
        let generation = self.write(target, active, &wanted, there)?;
        let next = Control::until(target, fallback, deadline);
        self.switch(next, active, &wanted, there, start).map(|took| Published::Switched { generation, took })
    }

    /// Returns the difference between the policy in a slot and the wanted one.
    fn compare(&self, slot: u32, wanted: &Wanted<'_>) -> Result<There> {
        let settings = self.maps.settings(slot)?;
        let generation = settings.generation;
        let same_tables = generation != 0 && self.digest(slot)? == wanted.digest;
        let same = same_tables && settings == wanted.settings(generation);
        Ok(There { generation, same_tables, same })
    }

    /// Writes a policy into a slot that is neither active nor may become active by itself. Tables and counters that it
    /// shares with the policy in `like` are taken over. Returns its number.
    fn write(&mut self, target: u32, like: u32, wanted: &Wanted<'_>, there: There) -> Result<u32> {
        let last = self.maps.last_generation()?;
        let generation = last.checked_add(1).unwrap_or(1);
        let filled = if there.same_tables {
            self.share(like)?
        } else {
            self.fill(wanted.tables, &Carried::new(&self.maps, like, &wanted.tables.rules)?)?
        };
        // The process of the last switch, if there was one, may have been killed before the grace period was over.
        if last > 0 {
            quiesce(&self.maps, like)?;
        }
        crate::fault::point("publish:filled");
        self.install(target, filled, wanted.settings(generation), wanted.digest)?;
        crate::fault::point("publish:installed");
        Ok(generation)
    }

    /// Activates the policy that was written last, in the place of the one in `active`. Returns the time that it took.
    fn switch(
        &mut self,
        next: Control,
        active: u32,
        wanted: &Wanted<'_>,
        there: There,
        start: Instant,
    ) -> Result<Duration> {
        self.maps.set_control(next);
        crate::fault::point("publish:switched");
        let took = start.elapsed();
        if !there.same_tables && there.generation > 0 {
            // Packets under way have counted on the old policy until now.
            let target = next.slot_on_trial();
            quiesce(&self.maps, target)?;
            let hits = self.table(target, Table::RuleHits)?;
            let carried = Carried::new(&self.maps, active, &wanted.tables.rules)?;
            carried.write(&hits).map_err(Error::map(Table::RuleHits.name()))?;
        }
        Ok(took)
    }

    /// Makes a policy on trial final.
    ///
    /// Returns the state that [`Datapath::rollback`] needs to put it on trial again.
    ///
    /// # Errors
    ///
    /// [`Error::NoTrial`] if its time was over: the former policy is active again.
    pub fn confirm(&mut self) -> Result<Control> {
        let control = self.maps.control();
        if !is_trial(control) {
            return Err(Error::NoTrial);
        }
        self.maps.set_control(Control::slot(control.slot_on_trial()));
        Ok(control)
    }

    /// Returns the present state for [`Datapath::rollback`].
    #[must_use]
    pub fn checkpoint(&self) -> Control {
        let control = self.maps.control();
        if is_trial(control) { control } else { Control::slot(control.slot_at(now())) }
    }

    /// Activates the policies of an earlier control word again. No policy must have been written since but one that was
    /// active.
    pub fn rollback(&mut self, control: Control) {
        self.maps.set_control(control);
    }

    /// Activates the policy before the one on trial now, if there is one on trial.
    pub fn fall_back(&mut self) {
        let control = self.maps.control();
        if is_trial(control) {
            self.maps.set_control(Control::slot(control.fallback()));
        }
    }

    fn digest(&self, slot: u32) -> Result<Digest> {
        self.maps.digests.get(&slot, 0).map_err(Error::aya_map("digests"))
    }

    /// The inner maps of a slot, to be used by the other one too: the policies differ in settings alone.
    fn share(&self, slot: u32) -> Result<Vec<(Table, MapData)>> {
        Table::ALL.into_iter().map(|table| Ok((table, self.table(slot, table)?))).collect()
    }

    fn table(&self, slot: u32, table: Table) -> Result<MapData> {
        MapData::from_pin(self.pins.table(slot, table.name())).map_err(Error::aya_map(table.name()))
    }

    /// Makes the inner maps of a policy.
    fn fill(&self, tables: &Tables, carried: &Carried) -> Result<Vec<(Table, MapData)>> {
        let mut v4 = Vec::new();
        let mut v6 = Vec::new();
        for (prefix, info) in &tables.addresses {
            let length = u32::from(prefix.prefix_len());
            match prefix {
                IpNet::V4(prefix) => v4.push((Key::new(length, prefix.network().octets()), *info)),
                IpNet::V6(prefix) => v6.push((Key::new(length, prefix.network().octets()), *info)),
            }
        }
        let filled = vec![
            (Table::Addresses4, self.keyed(Table::Addresses4, v4)?),
            (Table::Addresses6, self.keyed(Table::Addresses6, v6)?),
            (Table::Origins, self.array(Table::Origins, &tables.origins)?),
            (Table::Pairs, self.keyed(Table::Pairs, tables.pairs.clone())?),
            (Table::RuleSets, self.array(Table::RuleSets, &tables.rule_sets)?),
            (Table::Narrows, self.array(Table::Narrows, &tables.narrows)?),
            (Table::Pages, self.array(Table::Pages, &tables.pages)?),
            (Table::RuleInfo, self.array(Table::RuleInfo, &tables.rules)?),
            (Table::RuleHits, self.hits(carried)?),
        ];
        Ok(filled)
    }

    fn keyed<K: Pod, V: Pod>(&self, table: Table, entries: Vec<(K, V)>) -> Result<MapData> {
        let (keys, values): (Vec<K>, Vec<V>) = entries.into_iter().unzip();
        self.filled(table, keys.len(), &keys, &values)
    }

    fn array<V: Pod>(&self, table: Table, values: &[V]) -> Result<MapData> {
        self.filled(table, values.len(), &indices(values.len()), values)
    }

    /// A row of counters per CPU, and one more for earlier counts, which no CPU writes to.
    fn hits(&self, carried: &Carried) -> Result<MapData> {
        let rows = carried.cpus + 1;
        let map = self.filled::<u32, RuleHits>(Table::RuleHits, rows * carried.hits.len(), &[], &[])?;
        carried.write(&map).map_err(Error::map(Table::RuleHits.name()))?;
        Ok(map)
    }

    fn filled<K: Pod, V: Pod>(&self, table: Table, room: usize, keys: &[K], values: &[V]) -> Result<MapData> {
        let failed = |source| Error::Table { table: table.name(), entries: room, source };
        let entries = u32::try_from(room).map_err(|error| failed(io::Error::other(error)))?;
        let map = self.templates.create(table, entries).map_err(|error| match error {
            aya::maps::MapError::CreateError { io_error, .. } => failed(io_error),
            error => failed(io::Error::other(error)),
        })?;
        bpf::update_batch(bpf::fd(&map), keys, values).map_err(failed)?;
        Ok(map)
    }

    /// Puts inner maps and settings into an inactive slot.
    fn install(
        &mut self,
        slot: u32,
        filled: Vec<(Table, MapData)>,
        settings: Settings,
        digest: Digest,
    ) -> Result<()> {
        // Until everything is in place, the slot holds no policy.
        let mut set =
            |settings| self.maps.settings.set(slot, settings, 0).map_err(Error::aya_map("settings"));
        set(Settings { generation: 0, ..settings })?;
        // Each update of an outer map waits for a grace period of its own: side by side they share one.
        let mut outer: HashMap<&str, _> =
            Table::ALL.iter().map(|table| table.name()).zip(self.maps.outer.iter_mut()).collect();
        let errors: Vec<Error> = std::thread::scope(|scope| {
            let workers: Vec<_> = filled
                .iter()
                .filter_map(|(table, inner)| Some((table.name(), inner, outer.remove(table.name())?)))
                .map(|(name, inner, outer)| {
                    scope.spawn(move || outer.set(slot, inner, 0).map_err(Error::aya_map(name)))
                })
                .collect();
            workers
                .into_iter()
                .filter_map(|worker| {
                    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).err()
                })
                .collect()
        });
        Error::collect(errors)?;
        crate::fault::point("publish:outer");
        for (table, inner) in &filled {
            let path = self.pins.table(slot, table.name());
            pins::remove(&path)?;
            inner.pin(&path).map_err(|error| Error::map(table.name())(io::Error::other(error)))?;
            let kept = bpf::fd(inner).try_clone_to_owned().map_err(Error::map(table.name()))?;
            self.guard.keep(path, kept);
        }
        self.maps.settings.set(slot, settings, 0).map_err(Error::aya_map("settings"))?;
        self.maps.digests.set(slot, digest, 0).map_err(Error::aya_map("digests"))
    }
}

/// A policy that is to be in a slot.
struct Wanted<'a> {
    tables: &'a Tables,
    behaviour: &'a Behaviour,
    digest: Digest,
}

impl<'a> Wanted<'a> {
    fn new(tables: &'a Tables, behaviour: &'a Behaviour) -> Self {
        Self { tables, behaviour, digest: digest(tables) }
    }

    fn settings(&self, generation: u32) -> Settings {
        settings(self.tables, self.behaviour, generation)
    }
}

/// The policy in a slot, compared with the wanted one.
#[derive(Clone, Copy)]
struct There {
    /// Number of the policy; 0: there is none.
    generation: u32,
    same_tables: bool,
    /// Both tables and settings.
    same: bool,
}

/// Hits that rules of the same name had in the policy before.
struct Carried {
    cpus: usize,
    /// By index of the rule in the new policy.
    hits: Vec<RuleHits>,
}

impl Carried {
    fn new(maps: &Maps, old: u32, rules: &[RuleInfo]) -> Result<Self> {
        let cpus = cpus()?;
        let old_rules = maps.rule_info(old)?;
        // Flows that a rule would have decided about are not added to those that it decides about.
        let key = |rule: &RuleInfo| (rule.name, rule.audit);
        let old_hits: HashMap<([u8; 64], u32), RuleHits> =
            old_rules.iter().map(key).zip(maps.rule_hits(old)?).collect();
        let hits = rules.iter().map(|rule| old_hits.get(&key(rule)).copied().unwrap_or_default()).collect();
        Ok(Self { cpus, hits })
    }

    /// Writes the row behind those of the CPUs.
    fn write(&self, map: &MapData) -> io::Result<()> {
        let row: Vec<u32> = indices((self.cpus + 1) * self.hits.len()).split_off(self.cpus * self.hits.len());
        bpf::update_batch(bpf::fd(map), &row, &self.hits)
    }
}

/// A slot that is neither of the two.
fn unused(one: u32, other: u32) -> u32 {
    (0..SLOTS).find(|slot| *slot != one && *slot != other).expect("there are three")
}

/// Returns whether the active policy will roll back by itself.
fn is_trial(control: Control) -> bool {
    control.deadline() > now() / 1_000_000
}

fn indices(count: usize) -> Vec<u32> {
    (0..u32::try_from(count).unwrap_or(u32::MAX)).collect()
}

/// Waits until no packet reads any slot but `active`.
fn quiesce(maps: &Maps, active: u32) -> Result<()> {
    if bpf::grace_period().is_ok() {
        return Ok(());
    }
    // Where membarrier is unavailable: writing an outer map waits too (maybe_wait_bpf_programs,
    // kernel/bpf/syscall.c), also if the value is unchanged.
    let path = maps.pins().table(active, Table::RuleInfo.name());
    if !path.exists() {
        return Ok(());
    }
    let name = Table::RuleInfo.name();
    let inner = MapData::from_pin(path).map_err(Error::aya_map(name))?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&bpf::fd(&inner));
    let outer = MapData::from_pin(maps.pins().map(name)).map_err(Error::aya_map(name))?;
    bpf::update(bpf::fd(&outer), &active, &fd, 0).map_err(Error::map(name))
}

fn settings(tables: &Tables, behaviour: &Behaviour, generation: u32) -> Settings {
    Settings {
        timeouts: behaviour.timeouts,
        generation,
        audit: behaviour.audit.into(),
        reject: behaviour.reject.into(),
        events_per_second: behaviour.events_per_second,
        answers_per_second: behaviour.answers_per_second,
        report_allowed: behaviour.report_allowed.into(),
        global_sets: tables.global_sets,
        node_ports: tables.node_ports,
        node_port_root: tables.node_port_root,
        rule_count: tables.rule_count,
        has_audited: tables.rules.iter().any(|rule| rule.audit != 0).into(),
        pair_count: u32::try_from(tables.pairs.len()).unwrap_or(u32::MAX),
        padding: 0,
    }
}

/// Returns the digest by which the tables of two policies are equal.
fn digest(tables: &Tables) -> Digest {
    let mut hash = Sha256::new();
    // Both lists are sorted.
    for (prefix, info) in &tables.addresses {
        hash.update(Address::from(prefix.addr()).octets);
        hash.update([prefix.prefix_len(), prefix.max_prefix_len()]);
        hash.update(info.as_bytes());
    }
    for (key, sets) in &tables.pairs {
        hash.update(key.as_bytes());
        hash.update(sets.as_bytes());
    }
    for table in [
        tables.rule_sets.as_bytes(),
        tables.narrows.as_bytes(),
        tables.pages.as_bytes(),
        tables.rules.as_bytes(),
    ] {
        hash.update((table.len() as u64).to_le_bytes());
        hash.update(table);
    }
    hash.update(tables.global_sets.as_bytes());
    hash.update(tables.node_ports.as_bytes());
    hash.update(tables.node_port_root.to_ne_bytes());
    hash.finalize().into()
}
