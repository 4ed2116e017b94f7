//! Loads the hooks of the pool, pins the objects that must outlive the agent, and adopts pinned ones.

use std::{
    collections::{HashMap, HashSet},
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Instant,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use bridge_common::pool::{
    self, Config, Destination, Lease, Owner,
    bitmap::Memory as _,
    counter, shares,
    slots::{self, Seat},
    uses,
};
use bridge_common::protocol;
use ipnet::IpNet;

pub use super::error::KernelPoolError;
use super::{
    Layout, Settings, attach,
    clients::Clients,
    held::Held,
    pins, programs,
    sweep::{self, Sweeper, Swept, View},
    tables::{KernelTables, lock},
    walk::Walker,
    words::Words,
};
use crate::kernel::{
    clock,
    pin_guard::PinGuard,
    pins::{self as kernel_pins, Lock, PinRoot},
};

/// The result of [`KernelPool::holders`].
#[derive(Default)]
struct Holders {
    /// Every port (slot of the destination, index) that a socket or a lease of the agent holds, or that rests, and the owner's slot.
    held: HashMap<(u32, u32), u32>,
    /// Every socket that has a port.
    sockets: Vec<Lease>,
}

/// The pool in the kernel.
pub struct KernelPool {
    pub(super) ebpf: Ebpf,
    config: Array<MapData, Config>,
    tables: Arc<KernelTables>,
    networks: LpmTrie<MapData, [u8; 16], u32>,
    counters: PerCpuArray<MapData, u64>,
    walker: Result<Walker, String>,
    sweeper: Sweeper,
    events: Option<RingBuf<MapData>>,
    layout: Layout,
    clients: Clients,
    pub(super) pins: PathBuf,
    /// Directories of links of pods that this agent has hooked.
    pub(super) pods: HashSet<PathBuf>,
    /// Pins of this agent.
    pub(super) kept: PinGuard,
    /// Of the agent; `None` for who joined its pool.
    lock: Option<Lock>,
}

impl fmt::Debug for KernelPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelPool")
            .field("layout", &self.layout)
            .field("pins", &self.pins)
            .finish_non_exhaustive()
    }
}

impl KernelPool {
    /// Loads the object and pins its maps below `base`; maps that are pinned there already are used again, with all
    /// that they hold.
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn load(object: &[u8], base: &Path, layout: Layout) -> Result<Self, KernelPoolError> {
        let pins = pins::directory(base);
        pins::make_directory(&pins)?;
        let lock = PinRoot::new(&pins).lock()?;
        let pinned = pinned_config(&pins.join("POOL_CONFIG"))?;
        let layout = match &pinned {
            Some(config) => layout.fit_into(config)?,
            None => layout,
        };
        let mut pool = Self::open(object, pins, layout, true)?;
        pool.lock = Some(lock);
        if pinned.is_none() {
            pool.layout.initialise(&*pool.tables);
        }
        // Last: a process that finds a configuration finds everything that it refers to.
        pool.write_config()?;
        pool.adopt()?;
        for name in pins::shapes(0, 0).map(|shape| shape.name) {
            pool.keep_pinned(pool.pins.join(name))?;
        }
        Ok(pool)
    }

    /// Loads hooks that claim in the pool that an agent has pinned below `base`: for the agent's networks (`share`), or
    /// for networks of their own ([`KernelPool::set_networks`]). `None`: there is no pool.
    ///
    /// # Errors
    /// [`KernelPoolError`].
    pub fn join(object: &[u8], base: &Path, share: bool) -> Result<Option<Self>, KernelPoolError> {
        let pins = pins::directory(base);
        match pinned_config(&pins.join("POOL_CONFIG"))? {
            Some(config) => Self::open(object, pins, Layout::of(config), share).map(Some),
            None => Ok(None),
        }
    }

    fn open(object: &[u8], pins: PathBuf, layout: Layout, all: bool) -> Result<Self, KernelPoolError> {
        let total = layout.geometry().total(layout.config.slots);
        let mut loader = EbpfLoader::new();
        let uses = uses::words(layout.config.words);
        loader.map_max_entries("POOL_WORDS", total).map_max_entries("POOL_USES", uses);
        for shape in pins::shapes(total, uses) {
            let path = pins.join(shape.name);
            pins::check(&path, &shape)?;
            if all || shape.name != "POOL_NETWORKS" {
                loader.map_pin_path(shape.name, path);
            }
        }
        let has_set_retval = u8::from(has_set_retval());
        loader.override_global("POOL_HAS_SET_RETVAL", &has_set_retval, true);
        let has_mptcp = u8::from(has_mptcp());
        loader.override_global("POOL_HAS_MPTCP", &has_mptcp, true);
        let rest = time_wait_ns(clock::tick_ns());
        loader.override_global("POOL_REST_NS", &rest, true);
        let mut ebpf = loader.load(object)?;
        programs::load_programs(&mut ebpf)?;
        let mut words = |name, count| match ebpf.take_map(name) {
            Some(Map::Array(map)) => Words::map(map.fd(), count).map_err(KernelPoolError::Mmap),
            _ => Err(KernelPoolError::Missing(name)),
        };
        let (words, uses) = (words("POOL_WORDS", total)?, words("POOL_USES", uses)?);
        let tables = KernelTables {
            geometry: layout.geometry(),
            layout: Mutex::new(layout.clone()),
            words,
            uses,
            miscounted: Mutex::default(),
            destinations: Mutex::new(take(&mut ebpf, "POOL_DESTINATIONS")?),
            owners: Mutex::new(take(&mut ebpf, "POOL_OWNERS")?),
            shares: Mutex::new(take(&mut ebpf, "POOL_SHARES")?),
            grants: Mutex::new(take(&mut ebpf, "POOL_GRANTS")?),
            resting: Mutex::new(take(&mut ebpf, "POOL_RESTING")?),
        };
        let config = take(&mut ebpf, "POOL_CONFIG")?;
        let networks = take(&mut ebpf, "POOL_NETWORKS")?;
        let counters = take(&mut ebpf, "POOL_COUNTERS")?;
        let walker = Walker::load(&mut ebpf);
        let events = Some(take(&mut ebpf, "POOL_EVENTS")?);
        let sweeper = Sweeper::default();
        let (pods, kept, lock) = (HashSet::new(), PinGuard::default(), None);
        Ok(Self {
            ebpf,
            config,
            tables: Arc::new(tables),
            networks,
            counters,
            walker,
            sweeper,
            events,
            layout,
            clients: Clients::default(),
            pins,
            pods,
            kept,
            lock,
        })
    }

    pub(super) fn keep_pinned(&mut self, path: PathBuf) -> Result<(), KernelPoolError> {
        let kept = self.kept.keep_pinned(path.clone());
        kept.map_err(|error| KernelPoolError::Link { path, reason: error.to_string() })
    }

    /// Restores removed pins; returns their number. The hooks stay for as long as this process lives.
    ///
    /// # Errors
    /// The first pin that cannot be restored, or the lock.
    pub fn restore_pins(&mut self) -> (usize, kernel_pins::Result<()>) {
        match self.lock.as_mut().map(|lock| lock.renew(&PinRoot::new(&self.pins))) {
            Some(Ok(())) => self.kept.restore(),
            Some(Err(error)) => (0, Err(error)),
            None => (0, Ok(())),
        }
    }

    /// Leaves everything to its pins.
    pub fn let_go(&mut self) {
        self.kept = PinGuard::default();
    }

    /// Switches to other ports and settings: held ports stay held, ports that left are not given out again, and the
    /// sweep finds those that are new towards a destination in use.
    ///
    /// # Errors
    /// [`KernelPoolError::Layout`] and [`KernelPoolError::Cgroup`] before anything was changed; else errors of the
    /// kernel.
    pub fn change(&mut self, settings: &Settings, layout: Layout) -> Result<(), KernelPoolError> {
        let layout = layout.fit_into(&self.layout.config)?;
        self.set_cgroups(&settings.cgroups)?;
        self.set_networks(&settings.destinations)?;
        self.layout = layout;
        self.write_config()?;
        self.write_templates();
        self.withdraw_ports()
    }

    /// Says whether several pods take part, so that each leaves ports to others from its first one, without a quota.
    ///
    /// # Errors
    /// A system call fails.
    pub fn set_several_pods(&mut self, several: bool) -> Result<(), KernelPoolError> {
        self.clients.several_pods = several;
        self.write_config()
    }

    fn write_config(&mut self) -> Result<(), KernelPoolError> {
        let quota = &mut self.layout.config.quota;
        if *quota & shares::SHARE != 0 {
            *quota = *quota & !shares::OTHERS | if self.clients.are_several() { shares::OTHERS } else { 0 };
        }
        lock(&self.tables.layout).clone_from(&self.layout);
        let set = self.config.set(0, self.layout.config, 0);
        set.map_err(|source| KernelPoolError::Map { name: "POOL_CONFIG", source })
    }

    fn write_templates(&self) {
        let geometry = self.layout.geometry();
        for slot in 0..pool::FIRST_SLOT {
            let (map, ports) = (geometry.free(slot), self.layout.template(slot));
            for word in 0..geometry.words {
                let bits = ports.word((self.layout.config.base / 64 + word) as usize);
                self.tables.store(map.word(word), bits);
                let (summary, bit) = (map.at + word / 64, 1 << (word % 64));
                if bits == 0 {
                    self.tables.fetch_and(summary, !bit);
                } else {
                    self.tables.fetch_or(summary, bit);
                }
            }
        }
        self.tables.store(geometry.ports(), u64::from(self.layout.ports.len()));
    }

    /// Takes ports that are in no template any more out of every place that they are given out from. Those that are new
    /// are found by the sweep.
    fn withdraw_ports(&self) -> Result<(), KernelPoolError> {
        let geometry = self.layout.geometry();
        let destinations = self.tables.destinations().map_err(map("POOL_DESTINATIONS"))?;
        let owners = self.tables.owners().map_err(map("POOL_OWNERS"))?;
        for (destination, slot) in &destinations {
            let ports = self.layout.template(slots::template(destination));
            let warm = owners.iter().filter(|(owner, _)| owner.slot == *slot).map(|(_, slot)| slot);
            for place in warm.chain([slot]) {
                for word in 0..geometry.words {
                    let bits = ports.word((self.layout.config.base / 64 + word) as usize);
                    let before = self.tables.fetch_and(geometry.free(*place).word(word), bits);
                    if place != slot {
                        let gone = u64::from((before & !bits).count_ones());
                        self.tables.fetch_add(geometry.owned(*place), gone.wrapping_neg());
                    }
                }
            }
        }
        Ok(())
    }

    /// Repairs the state that an earlier agent left: its templates, its grants, slots that it was taking back.
    fn adopt(&self) -> Result<(), KernelPoolError> {
        self.write_templates();
        let destinations = self.tables.destinations().map_err(map("POOL_DESTINATIONS"))?;
        let owners = self.tables.owners().map_err(map("POOL_OWNERS"))?;
        // Without the walk a count that is repaired begins at zero.
        let held = self.holders().unwrap_or_default().held;
        sweep::repair(&*self.tables, &held, &destinations, &owners);
        self.withdraw_ports()?;
        for (grant, granted) in self.tables.grants().map_err(map("POOL_GRANTS"))? {
            if self.tables.revoke(&grant) {
                let seat = Seat { slot: granted.slot, owner_slot: granted.owner_slot };
                slots::release(&*self.tables, seat, grant.index());
            }
        }
        Ok(())
    }

    /// The ports that are held, and the sockets that have one.
    fn holders(&self) -> Result<Holders, KernelPoolError> {
        // Grants first: a port that a socket takes over meanwhile is found at the socket.
        let grants = self.tables.grants().map_err(map("POOL_GRANTS"))?;
        let mut held: HashMap<_, _> = grants
            .iter()
            .map(|(grant, granted)| ((granted.slot, grant.index()), granted.owner_slot))
            .collect();
        // A port that rests is held by its rest; one that a hook wakes meanwhile is in a bitmap when that is read.
        let resting = self.tables.resting().map_err(map("POOL_RESTING"))?;
        held.extend(resting.iter().map(|(port, rest)| ((port.slot, port.index), rest.owner_slot)));
        let sockets = self.walk_with(pool::LEASE_HELD | pool::LEASE_BOUND)?;
        let holders = sockets.iter().filter(|lease| lease.state & pool::LEASE_HELD != 0);
        held.extend(holders.map(|lease| ((lease.slot, lease.index), lease.owner_slot)));
        Ok(Holders { held, sockets })
    }

    /// How many ports are held, and how many are warm. Those held are counted at those who hold them, sockets and leases;
    /// on a kernel without that count, by the claims that are live, and not by destination.
    ///
    /// # Errors
    /// A system call fails.
    pub fn held(&self) -> Result<Held, KernelPoolError> {
        let geometry = self.layout.geometry();
        let (held, busiest) = match self.holders() {
            Ok(Holders { held, .. }) => {
                let mut of_destination = HashMap::<u32, u64>::new();
                held.keys().for_each(|(slot, _)| *of_destination.entry(*slot).or_default() += 1);
                (held.len() as u64, of_destination.into_values().max().unwrap_or(0))
            }
            Err(KernelPoolError::Walk(_)) => (self.live_claims()?, 0),
            Err(error) => return Err(error),
        };
        let owners = self.tables.owners().map_err(map("POOL_OWNERS"))?;
        let warm = |slot: u32| {
            let words = (0..geometry.words).map(move |word| self.tables.load(geometry.free(slot).word(word)));
            words.map(|word| u64::from(word.count_ones())).sum::<u64>()
        };
        Ok(Held { held, warm: owners.iter().map(|(_, slot)| warm(*slot)).sum(), busiest })
    }

    /// Counts the claims of owners: those of a destination include its owners.
    fn live_claims(&self) -> Result<u64, KernelPoolError> {
        let owners = self.tables.owners().map_err(map("POOL_OWNERS"))?;
        let live = |slot| self.tables.load(self.layout.geometry().live(slot));
        // One below zero can only be wrong.
        Ok(owners.iter().map(|(_, slot)| live(*slot)).filter(|live| live.cast_signed() > 0).sum())
    }

    /// The ring buffer of [`bridge_common::pool::Event`]; can be had once.
    pub fn take_events(&mut self) -> Option<RingBuf<MapData>> {
        self.events.take()
    }

    /// One round of [`super::sweep`].
    ///
    /// # Errors
    /// [`KernelPoolError::Walk`] if this kernel cannot list the ports of sockets: then nothing is done.
    pub fn sweep(&mut self, known: impl FnMut(&Destination, u16) -> bool) -> Result<Swept, KernelPoolError> {
        // Without the walk nothing is done: marks stay where they are.
        self.walker.as_ref().map_err(|reason| KernelPoolError::Walk(reason.clone()))?;
        let owners = self.tables.owners().map_err(map("POOL_OWNERS"))?;
        let gone = self.note_clients(&owners);
        self.write_config()?;
        let touched = sweep::marks(&*self.tables, &owners);
        let counted = self.tables.counted_shares().map_err(map("POOL_SHARES"))?;
        let Holders { held, sockets } = self.holders()?;
        let destinations = self.tables.destinations().map_err(map("POOL_DESTINATIONS"))?;
        let owners = self.tables.owners().map_err(map("POOL_OWNERS"))?;
        let view = View { touched: &touched, held: &held, destinations: &destinations, owners: &owners };
        let swept = self.sweeper.round(&*self.tables, &self.layout, &view, known);
        let quota = self.layout.config.quota;
        let corrected = self.tables.correct_shares(quota, (&sockets, &counted), &gone);
        corrected.map_err(map("POOL_SHARES"))?;
        let kept = |protocol| sweep::kept(&*self.tables, &self.layout, &destinations, protocol);
        self.tables.correct_uses(&sockets, [protocol::TCP, protocol::UDP].map(|p| (p, kept(p))));
        Ok(swept)
    }

    /// Notes who uses the pool. Returns the owners that do not any more: their control group has gone, and they have no socket.
    fn note_clients(&mut self, owners: &[(Owner, u32)]) -> HashSet<Owner> {
        let ids = attach::mount_point().ok().and_then(|mount| attach::ids(&mount));
        // 0: not known.
        let is_gone = |group| group != 0 && ids.as_ref().is_some_and(|ids| !ids.contains(&group));
        let (tables, geometry) = (&*self.tables, self.layout.geometry());
        let (gone, present): (Vec<_>, Vec<_>) = owners.iter().copied().partition(|(_, slot)| {
            is_gone(slots::group_of(tables, *slot)) && tables.load(geometry.live(*slot)) == 0
        });
        let clients =
            present.iter().map(|(owner, slot)| (owner.netns_cookie, slots::group_of(tables, *slot)));
        self.clients.note(clients, is_gone, Instant::now());
        gone.into_iter().map(|(owner, _)| owner).collect()
    }

    /// Every port that a socket holds now, in all network namespaces.
    ///
    /// # Errors
    /// [`KernelPoolError::Walk`]: this kernel cannot list them.
    pub fn walk(&self) -> Result<Vec<Lease>, KernelPoolError> {
        self.walk_with(pool::LEASE_HELD)
    }

    fn walk_with(&self, state: u64) -> Result<Vec<Lease>, KernelPoolError> {
        let walker = self.walker.as_ref().map_err(|reason| KernelPoolError::Walk(reason.clone()))?;
        walker.walk(state).map_err(|error| KernelPoolError::Walk(error.to_string()))
    }

    /// The tables that the hooks and the agent change together.
    #[must_use]
    pub fn tables(&self) -> &KernelTables {
        &self.tables
    }

    /// The same, for use beside a sweep, which holds this.
    #[must_use]
    pub(super) fn shared_tables(&self) -> Arc<KernelTables> {
        Arc::clone(&self.tables)
    }

    /// The ports of the pool.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Makes these, and no others, the networks whose connections use the pool.
    ///
    /// # Errors
    /// What the kernel says; what was asked for before an error may be there already.
    pub fn set_networks(&mut self, networks: &[IpNet]) -> Result<(), KernelPoolError> {
        let map = |source| KernelPoolError::Map { name: "POOL_NETWORKS", source };
        let wanted: Vec<_> = networks.iter().map(network_key).collect();
        let there: Vec<_> = self.networks.keys().collect::<Result<_, _>>().map_err(map)?;
        // First the new ones: a network that is in both stays covered all the time.
        for key in &wanted {
            self.networks.insert(key, 1, 0).map_err(map)?;
        }
        let same =
            |a: &Key<[u8; 16]>, b: &Key<[u8; 16]>| a.prefix_len() == b.prefix_len() && a.data() == b.data();
        for key in there.iter().filter(|key| !wanted.iter().any(|w| same(w, key))) {
            self.networks.remove(key).map_err(map)?;
        }
        Ok(())
    }

    /// The sum over all CPUs of every counter of [`counter`].
    ///
    /// # Errors
    /// A system call fails.
    pub fn counters(&self) -> Result<[u64; counter::COUNT as usize], KernelPoolError> {
        let mut sums = [0; counter::COUNT as usize];
        for (index, sum) in (0..).zip(&mut sums) {
            let per_cpu = self
                .counters
                .get(&index, 0)
                .map_err(|source| KernelPoolError::Map { name: "POOL_COUNTERS", source })?;
            *sum = per_cpu.iter().sum();
        }
        Ok(sums)
    }
}

/// Removes every pin of the pool below `base`, whatever version made it: hooks, claims and all. Established connections
/// live on.
///
/// # Errors
/// [`KernelPoolError::Link`]; no pins is no error.
pub fn remove(base: &Path) -> Result<(), KernelPoolError> {
    remove_directories(base, pins::PREFIX)
}

/// Removes the pools that `bridge-agent exec --ports` made below `base`.
///
/// # Errors
/// As [`remove`].
pub fn remove_of_exec(base: &Path) -> Result<(), KernelPoolError> {
    remove_directories(base, pins::EXEC_PREFIX)
}

fn remove_directories(base: &Path, prefix: &'static str) -> Result<(), KernelPoolError> {
    for path in attach::entries(base, prefix) {
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(KernelPoolError::Link { path, reason: error.to_string() });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a hook can choose the error that a program sees (Linux 5.18). A probe that fails says nothing: the kernel
/// will say so itself.
fn has_set_retval() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or(true)
}

/// Whether the hooks can distinguish subflows of MPTCP from other sockets (Linux 5.19 with `CONFIG_MPTCP`).
fn has_mptcp() -> bool {
    let helper = is_helper_supported(ProgramType::SockOps, BpfHelper::BPF_FUNC_skc_to_mptcp_sock);
    helper.unwrap_or(false) && Path::new("/proc/sys/net/mptcp").exists()
}

/// Returns how long the kernel may keep a tuple in TIME_WAIT, for a timer tick of this length.
///
/// Its timer wheel rounds a timeout up to a multiple of 8^n ticks, the coarser the longer it is (kernel/time/timer.c): 60 s
/// become up to 62 s at 250 Hz, and 65 s at 100 Hz.
fn time_wait_ns(tick_ns: u64) -> u64 {
    let ticks = pool::TIME_WAIT_NS / tick_ns.max(1);
    let mut granule = 1;
    while ticks >= 63 * granule {
        granule *= 8;
    }
    // One tick for the begin of the timer, some for the work that removes the tuple.
    pool::TIME_WAIT_NS + (granule + 1) * tick_ns + 50_000_000
}

/// For `map_err`.
fn map(name: &'static str) -> impl Fn(MapError) -> KernelPoolError {
    move |source| KernelPoolError::Map { name, source }
}

fn take<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, KernelPoolError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(KernelPoolError::Missing(name))?;
    M::try_from(map).map_err(|source| KernelPoolError::Map { name, source })
}

fn pinned_config(path: &Path) -> Result<Option<Config>, KernelPoolError> {
    let map = |source| KernelPoolError::Map { name: "POOL_CONFIG", source };
    let Some(shape) = pins::shapes(0, 0).into_iter().find(|shape| path.ends_with(shape.name)) else {
        return Ok(None);
    };
    if !pins::check(path, &shape)? {
        return Ok(None);
    }
    let pinned = MapData::from_pin(path).and_then(Map::from_map_data).map_err(map)?;
    let config = Array::<_, Config>::try_from(pinned).map_err(map)?.get(&0, 0).map_err(map)?;
    // All zeros: an agent ended between making the map and filling it.
    Ok((config.words != 0).then_some(config))
}

/// The key of a prefix; IPv4 as v4-mapped.
fn network_key(network: &IpNet) -> Key<[u8; 16]> {
    match network {
        IpNet::V4(net) => Key::new(96 + u32::from(net.prefix_len()), net.network().to_ipv6_mapped().octets()),
        IpNet::V6(net) => Key::new(u32::from(net.prefix_len()), net.network().octets()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_wait_lasts_until_the_timer_wheel_reaches_it() {
        let seconds = |hz: u64| time_wait_ns(1_000_000_000 / hz) / 1_000_000;
        // 512 ticks at 100, 250 and 300 Hz, 4,096 at 1,000 Hz.
        assert_eq!([100, 250, 300, 1000].map(seconds), [65_180, 62_102, 61_759, 64_147]);
    }
}
