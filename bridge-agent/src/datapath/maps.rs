//! The pinned maps, opened. This alone needs no running agent.

use crate::kernel::{
    bpf,
    mapping::{SharedCounters, SharedWord},
};
use std::fmt;

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use bridge_common::filter::{
    address::Address,
    control::{Control, SLOTS, Settings},
    counters::Counters,
    denial::DenialSet,
    event::EventBudget,
    fast_path::Outcomes,
    flow_cache::STAMPS,
    interface::Interface,
    policy::{RuleHits, RuleInfo},
    shield::Shielded,
};

use super::{
    error::{Error, Result},
    fast_path::FastPath,
    flow_filter::FlowFilterMap,
    pins::Pins,
    shares::Shares,
};

/// The tables that a policy is made of, each of which has an inner map per slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Table {
    Addresses4,
    Addresses6,
    Origins,
    Pairs,
    RuleSets,
    Narrows,
    Pages,
    RuleHits,
    RuleInfo,
}

impl Table {
    pub(super) const ALL: [Self; 9] = [
        Self::Addresses4,
        Self::Addresses6,
        Self::Origins,
        Self::Pairs,
        Self::RuleSets,
        Self::Narrows,
        Self::Pages,
        Self::RuleHits,
        Self::RuleInfo,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Addresses4 => "addresses4",
            Self::Addresses6 => "addresses6",
            Self::Origins => "origins",
            Self::Pairs => "pairs",
            Self::RuleSets => "rule_sets",
            Self::Narrows => "narrows",
            Self::Pages => "pages",
            Self::RuleHits => "rule_hits",
            Self::RuleInfo => "rule_info",
        }
    }
}

/// Name of the map that the agent keeps beside those of the object: a digest of the tables of each slot.
pub(super) const DIGESTS: &str = "digests";

/// SHA-256 of the tables of a policy.
pub(super) type Digest = [u8; 32];

/// The pinned maps.
pub struct Maps {
    pub(super) pins: Pins,
    control: SharedWord,
    pub(super) settings: Array<MapData, Settings>,
    pub(super) digests: Array<MapData, Digest>,
    pub(super) outer: Vec<ArrayOfMaps<MapData>>,
    pub(super) flows: MapData,
    pub(super) other_flows: MapData,
    pub(super) overflow: MapData,
    pub(super) half_open: MapData,
    pub(super) shares: Shares,
    pub(super) flow_filter: FlowFilterMap,
    pub(super) flow_stamps: SharedCounters,
    fast_path: FastPath,
    pub(super) outcomes: PerCpuArray<MapData, Outcomes>,
    pub(super) counters: PerCpuArray<MapData, Counters>,
    pub(super) audited: PerCpuArray<MapData, Counters>,
    pub(super) denials: PerCpuArray<MapData, DenialSet>,
    pub(super) event_budget: PerCpuArray<MapData, EventBudget>,
    pub(super) shielded: PerCpuArray<MapData, Shielded>,
    pub(super) interfaces: HashMap<MapData, u32, Interface>,
    pub(super) hosted: HashMap<MapData, Address, u32>,
    pub(super) tunnels: HashMap<MapData, u32, u32>,
}

/// Tables that packets or interfaces fill. Those of a policy are made as large as it needs.
const FILLED: [&str; 6] = ["flows", "other_flows", "overflow", "half_open", "fragments", "interfaces"];

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    pub map: &'static str,
    /// Entries, alive or not.
    pub entries: u64,
    /// Maximum number of entries.
    pub capacity: u32,
}

/// A policy that takes itself back unless it is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Trial {
    /// Number of the active policy.
    pub generation: u32,
    /// Number of the policy that is active from the deadline on.
    pub fallback: u32,
    /// Whole seconds until then, rounded up.
    pub seconds_left: u64,
    /// The deadline, in milliseconds of `CLOCK_MONOTONIC`.
    #[serde(skip)]
    pub deadline: u64,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").field("pins", &self.pins).finish_non_exhaustive()
    }
}

impl Maps {
    /// Opens the maps under `pins`.
    ///
    /// # Errors
    ///
    /// [`Error::NotRunning`] if there are none, [`Error::Incomplete`] if one is missing, [`Error::Map`] if one may not be
    /// opened.
    pub fn open(pins: &Pins) -> Result<Self> {
        match pins.map("control").try_exists() {
            Ok(true) => {}
            Ok(false) => return Err(Error::NotRunning(pins.root().to_owned())),
            Err(error) => return Err(Error::path("looking at", pins.directory())(error)),
        }
        Self::open_all(pins).map_err(|error| match error {
            Error::Map { map, source } if source.kind() == std::io::ErrorKind::NotFound => {
                Error::Incomplete { root: pins.root().to_owned(), map }
            }
            error => error,
        })
    }

    fn open_all(pins: &Pins) -> Result<Self> {
        let control = SharedWord::new(data(pins, "control")?.fd(), 0).map_err(Error::map("control"))?;
        Ok(Self {
            control,
            settings: typed(pins, "settings")?,
            digests: typed(pins, DIGESTS)?,
            outer: Table::ALL.into_iter().map(|table| typed(pins, table.name())).collect::<Result<_>>()?,
            flows: data(pins, "flows")?,
            other_flows: data(pins, "other_flows")?,
            overflow: data(pins, "overflow")?,
            half_open: data(pins, "half_open")?,
            shares: Shares::open(&data(pins, "shares")?)?,
            flow_filter: FlowFilterMap::open(&data(pins, "flow_filter")?)?,
            flow_stamps: SharedCounters::new(data(pins, "flow_stamps")?.fd(), STAMPS)
                .map_err(Error::map("flow_stamps"))?,
            fast_path: FastPath::open(&data(pins, "fast_path")?)?,
            outcomes: typed(pins, "outcomes")?,
            counters: typed(pins, "counters")?,
            audited: typed(pins, "audited")?,
            denials: typed(pins, "denials")?,
            event_budget: typed(pins, "event_budget")?,
            shielded: typed(pins, "shielded")?,
            interfaces: typed(pins, "interfaces")?,
            hosted: typed(pins, "hosted")?,
            tunnels: typed(pins, "tunnels")?,
            pins: pins.clone(),
        })
    }

    /// Where they are pinned.
    #[must_use]
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Returns the word that selects the active policy.
    #[must_use]
    pub fn control(&self) -> Control {
        Control { word: self.control.load() }
    }

    /// Whether flows may take the fast path.
    #[must_use]
    pub const fn fast_path(&self) -> &FastPath {
        &self.fast_path
    }

    pub(super) fn set_control(&self, control: Control) {
        self.control.store(control.word);
        self.fast_path.forget_paths();
    }

    /// The policy on trial, if one is.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn trial(&self) -> Result<Option<Trial>> {
        let (control, now) = (self.control(), now());
        let left = control.deadline().saturating_sub(now / 1_000_000);
        if left == 0 {
            return Ok(None);
        }
        let generation = |slot| self.settings(slot).map(|settings| settings.generation);
        Ok(Some(Trial {
            generation: generation(control.slot_at(now))?,
            fallback: generation(control.fallback())?,
            seconds_left: left.div_ceil(1000),
            deadline: control.deadline(),
        }))
    }

    /// Returns the active slot.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.control().slot_at(now())
    }

    /// Settings of the policy in `slot`; with generation 0 if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn settings(&self, slot: u32) -> Result<Settings> {
        self.settings.get(&slot, 0).map_err(Error::aya_map("settings"))
    }

    /// Returns the settings of the active policy; with generation 0 if there has never been one.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn active_settings(&self) -> Result<Settings> {
        self.settings(self.slot())
    }

    /// Returns the interfaces that programs are attached to, each with its hooks; from the pins, which name an
    /// interface also after it has vanished.
    ///
    /// # Errors
    ///
    /// [`Error::Path`].
    pub fn attached_interfaces(&self) -> Result<Vec<String>> {
        let mut attached = self.pins.attached_links()?;
        attached.extend(self.pins.attached_filters()?);
        Ok(attached.into_iter().map(|pin| format!("{} {}", pin.interface, pin.hook.name())).collect())
    }

    /// Returns how full each table is that packets or interfaces fill, by name. Expired entries count until the kernel
    /// needs their room: of the tables of flows, [`Maps::count_flows`] returns the number alive.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn fill(&self) -> Result<Vec<Fill>> {
        let mut fills = Vec::new();
        for name in FILLED {
            let map = data(&self.pins, name)?;
            let info = bpf::map_info(bpf::fd(&map)).map_err(Error::map(name))?;
            let mut entries = 0;
            let (key, value) = (info.key_size as usize, info.value_size as usize);
            bpf::for_each_raw(bpf::fd(&map), key, value, |_, _| entries += 1).map_err(Error::map(name))?;
            fills.push(Fill { map: name, entries, capacity: info.max_entries });
        }
        Ok(fills)
    }

    /// The ring buffer of events. Who reads takes: with two readers, each gets a part.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn events(&self) -> Result<RingBuf<MapData>> {
        typed(&self.pins, "events")
    }

    /// Reads something of the policy in a slot, and its number; again if another one was written there meanwhile.
    ///
    /// # Errors
    ///
    /// Those of `read`.
    pub(super) fn of_one_policy<T>(
        &self,
        slot: impl Fn() -> u32,
        read: impl Fn(u32) -> Result<T>,
    ) -> Result<(u32, T)> {
        // Writing takes longer than reading.
        const TRIES: usize = 5;
        let mut tries = 0;
        loop {
            let slot = slot();
            let before = self.settings(slot)?.generation;
            let result = read(slot);
            tries += 1;
            // Who writes a slot takes the number away first, and puts the new one there last.
            if before > 0 && self.settings(slot)?.generation == before || tries == TRIES {
                return Ok((before, result?));
            }
        }
    }

    /// The rules of the policy in `slot`, by index.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn rule_info(&self, slot: u32) -> Result<Vec<RuleInfo>> {
        let mut rules = Vec::with_capacity(self.settings(slot)?.rule_count as usize);
        self.each_rule(slot, |_, rule| rules.push(rule))?;
        Ok(rules)
    }

    /// As [`Self::rule_info`], one after the other, with their indexes.
    pub(super) fn each_rule(&self, slot: u32, mut visit: impl FnMut(usize, RuleInfo)) -> Result<()> {
        let count = self.settings(slot)?.rule_count as usize;
        let mut index = 0;
        self.each_inner_value(slot, Table::RuleInfo, |rule: RuleInfo| {
            if index < count {
                visit(index, rule);
            }
            index += 1;
        })
    }

    /// Returns the hits of the rules of the policy in `slot`, by index, summed over CPUs and the migrated counts.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn rule_hits(&self, slot: u32) -> Result<Vec<RuleHits>> {
        let count = self.settings(slot)?.rule_count as usize;
        let mut sums = vec![RuleHits::default(); count];
        if count > 0 {
            let mut index = 0;
            self.each_inner_value(slot, Table::RuleHits, |hits: RuleHits| {
                let sum: &mut RuleHits = &mut sums[index % count];
                sum.packets += hits.packets;
                sum.bytes += hits.bytes;
                index += 1;
            })?;
        }
        Ok(sums)
    }

    /// Visits every value of one of the arrays that a policy is made of, by index; none if the slot was never written.
    fn each_inner_value<V: aya::Pod>(&self, slot: u32, table: Table, mut visit: impl FnMut(V)) -> Result<()> {
        let path = self.pins.table(slot, table.name());
        if !path.exists() {
            return Ok(());
        }
        let map = MapData::from_pin(path).map_err(Error::aya_map(table.name()))?;
        bpf::for_each(bpf::fd(&map), |_: u32, value| visit(value)).map_err(Error::map(table.name()))
    }

    /// Number of the latest policy; 0: there has never been one.
    pub(super) fn last_generation(&self) -> Result<u32> {
        (0..SLOTS).try_fold(0, |last, slot| Ok(last.max(self.settings(slot)?.generation)))
    }
}

/// How many CPUs the kernel has room for: as many elements it keeps of a map by CPU.
///
/// # Errors
///
/// [`Error::Path`].
pub(super) fn cpus() -> Result<usize> {
    aya::util::nr_cpus().map_err(|(path, error)| Error::path("counting the CPUs in", path)(error))
}

pub use crate::kernel::clock::monotonic_ns as now;

fn data(pins: &Pins, name: &'static str) -> Result<MapData> {
    MapData::from_pin(pins.map(name)).map_err(Error::aya_map(name))
}

pub(super) fn typed<T: TryFrom<Map, Error = MapError>>(pins: &Pins, name: &'static str) -> Result<T> {
    Map::from_map_data(data(pins, name)?).and_then(T::try_from).map_err(Error::aya_map(name))
}
