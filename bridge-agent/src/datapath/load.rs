//! Loads programs and maps, or adopts those that are pinned.

use crate::kernel::{
    bpf,
    pin_guard::PinGuard,
    pins::{self, Lock},
};
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Instant,
};

use aya::{Ebpf, EbpfLoader, maps::MapData, programs::SchedClassifier};
use aya_obj::{Object, generated::bpf_map_type};
use bridge_common::filter::{control::SLOTS, flow_cache};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    error::{Error, Result, load_error, program_error},
    maps::{self, DIGESTS, Digest, Maps, Table},
    object,
    pins::Pins,
};
use crate::model::Hook;

/// Options of the packet path.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it is pinned.
    pub pins: Pins,
    /// How many established TCP connections are remembered, and half as many flows of other protocols; only where the tables
    /// are not there yet.
    pub flows: u32,
    /// How many flows that wait for a reply are remembered; only where the table is not there yet.
    pub half_open: u32,
    /// How programs are attached.
    pub mechanism: Mechanism,
    /// Whether the programs write a debug log; see [`Datapath::forward_log`].
    pub debug: bool,
}

/// How programs are attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mechanism {
    /// By TCX, where the kernel has it.
    #[default]
    Best,
    /// By a filter of the clsact qdisc.
    Clsact,
}

/// The packet path, loaded by this process, which alone works on its pins.
#[derive(Debug)]
pub struct Datapath {
    pub(super) pins: Pins,
    pub(super) ebpf: Ebpf,
    /// Maps, read and written.
    pub maps: Maps,
    pub(super) templates: Templates,
    pub(super) tcx: bool,
    adopted: bool,
    debug: bool,
    pub(super) guard: PinGuard,
    /// Interfaces that could not be shielded, by index: why, and when that was.
    pub(super) shields: BTreeMap<u32, (String, Instant)>,
    lock: Lock,
}

/// Whether a map holds nothing between two packets, so that it belongs to its programs and is not pinned.
fn is_private(name: &str) -> bool {
    // Constants of the programs, which have a section as name; the debug log.
    name.starts_with('.') || matches!(name, "scratch" | FLOW_CACHE | ADDRESS_CACHE | "AYA_LOGS")
}

/// The map of the flow cache, sized by the number of CPUs.
const FLOW_CACHE: &str = "flow_cache";

/// The map of the properties of addresses, sized likewise.
const ADDRESS_CACHE: &str = "address_cache";

/// Maps whose size the configuration sets.
const SIZED: [&str; 4] = ["flows", "other_flows", "half_open", "overflow"];

/// The sizes of the caches of each CPU.
#[derive(Clone, Copy, Debug)]
pub struct CacheSize {
    entries: u32,
    sets: u32,
    addresses: u32,
}

impl CacheSize {
    /// Returns the size for the CPUs of this machine.
    ///
    /// # Errors
    ///
    /// [`Error::Path`]: they cannot be counted.
    pub fn of_machine() -> Result<Self> {
        let cpus = u32::try_from(maps::cpus()?).unwrap_or(u32::MAX);
        let sets = flow_cache::sets(cpus);
        let addresses = flow_cache::ADDRESSES.saturating_mul(cpus);
        Ok(Self { entries: sets.saturating_mul(cpus), sets, addresses })
    }

    /// Sets the size in the loader of the programs.
    pub fn apply<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader.map_max_entries(FLOW_CACHE, self.entries);
        loader.map_max_entries(ADDRESS_CACHE, self.addresses);
        loader.override_global("FLOW_CACHE_SETS", &self.sets, true);
    }
}

impl Datapath {
    /// Loads the programs and makes the maps, or adopts those that are pinned. Enforcement continues meanwhile.
    ///
    /// # Errors
    ///
    /// Everything of [`Error`]; the pins are as before then.
    pub fn load(options: &Options) -> Result<Self> {
        require_capabilities()?;
        let pins = options.pins.clone();
        pins.prepare_root()?;
        let lock = pins.lock()?;
        let adopted = pins.exist();
        let before = pins::entries(pins.directory())?;
        let result = Self::load_locked(options, adopted, lock);
        if result.is_err() && !adopted {
            let mut errors: Vec<Error> = Vec::new();
            pins::remove_tree_except(pins.directory(), &|path| before.iter().any(|p| p == path), &mut errors);
            for error in errors {
                tracing::warn!(%error, "left behind after a failed start");
            }
        }
        result
    }

    fn load_locked(options: &Options, adopted: bool, lock: Lock) -> Result<Self> {
        let pins = options.pins.clone();
        let mut object = Object::parse(object::ENFORCE).map_err(|error| load_error(error.into()))?;
        let other_flows = (options.flows / 2).max(1);
        let sizes = BTreeMap::from([
            (SIZED[0], options.flows),
            (SIZED[1], other_flows),
            (SIZED[2], options.half_open),
            (SIZED[3], (options.flows / 16).max(1)),
        ]);
        check_pins(&pins, &object, &sizes)?;
        pins.prepare_directories()?;
        // Without it nothing is known of the flows that are in the tables.
        let is_filter_lost = pins.map("flows").exists() && !pins.map("flow_filter").exists();

        let mut loader = EbpfLoader::new();
        // No program has relocations against the kernel's types.
        loader.btf(None);
        let names: Vec<String> = object.maps.keys().cloned().collect();
        for name in names.iter().filter(|name| !is_private(name)) {
            loader.map_pin_path(name.as_str(), pins.map(name));
        }
        for (name, entries) in &sizes {
            loader.map_max_entries(name, *entries);
        }
        let cache = CacheSize::of_machine()?;
        cache.apply(&mut loader);
        // With the level known at load time, the verifier takes the calls of the log out of the programs.
        let level = if options.debug { aya_log::Level::Debug as u8 } else { 0 };
        loader.override_global(aya_log::LEVEL, &level, true);
        crate::fault::point("load:directories");
        let mut ebpf = loader.load(object::ENFORCE).map_err(load_error)?;
        crate::fault::point("load:maps");
        for hook in Hook::ALL {
            let program = program(&mut ebpf, hook)?;
            bpf::without_signals(|| program.load()).map_err(|error| program_error(hook.name(), error))?;
        }
        if !pins.map(DIGESTS).exists() {
            let map = MapData::create(digests(), DIGESTS, None).map_err(Error::aya_map(DIGESTS))?;
            map.pin(pins.map(DIGESTS)).map_err(|error| Error::map(DIGESTS)(std::io::Error::other(error)))?;
        }
        crate::fault::point("load:programs");
        let templates = Templates::new(&mut object)?;
        let maps = Maps::open(&pins)?;
        if is_filter_lost {
            maps.flow_filter.fill();
        }
        let capacity = |name, map: &MapData| -> Result<u32> {
            Ok(map.info().map_err(Error::aya_map(name))?.max_entries())
        };
        maps.shares
            .set_limits([capacity("flows", &maps.flows)?, capacity("other_flows", &maps.other_flows)?]);
        let tcx = options.mechanism == Mechanism::Best && has_tcx();
        let mut guard = PinGuard::default();
        guard.keep_all(pins.directory())?;
        Ok(Self {
            pins,
            ebpf,
            maps,
            templates,
            tcx,
            adopted,
            debug: options.debug,
            guard,
            shields: BTreeMap::new(),
            lock,
        })
    }

    /// Restores pins that another process has removed, also into another BPF file system mounted at the same place. Returns
    /// how many.
    ///
    /// # Errors
    ///
    /// [`Error::NotBpffs`], [`Error::Path`]; [`Error::Locked`] if another agent has taken the pins. Attached programs stay
    /// attached while this process lives.
    pub fn restore_pins(&mut self) -> (usize, Result<()>) {
        match self.pins.renew(&mut self.lock) {
            Ok(()) => {
                let (restored, result) = self.guard.restore();
                (restored, result.map_err(Error::from))
            }
            Err(error) => (0, Err(error)),
        }
    }

    /// Forwards the programs' log to the `log` crate, in a task of the runtime, if [`Options::debug`] is set. Call after
    /// loading and attaching.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn forward_log(&mut self) -> Result<()> {
        if !self.debug {
            return Ok(());
        }
        let failed = |error: std::io::Error| Error::map("AYA_LOGS")(error);
        let logger = aya_log::EbpfLogger::init(&mut self.ebpf)
            .map_err(|error| failed(std::io::Error::other(error)))?;
        // SAFETY: the logger owns its descriptor, which stays open and the same for as long as it lives.
        let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
            .map_err(|error| failed(error.into()))?;
        tokio::spawn(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        });
        Ok(())
    }

    /// Whether maps were pinned before this process came.
    #[must_use]
    pub const fn adopted(&self) -> bool {
        self.adopted
    }

    /// Whether nothing was enforced yet, so that existing connections are unknown. `audit`: only audit mode is wanted.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn is_unseeded(&self, audit: bool) -> Result<bool> {
        let settings = self.maps.active_settings()?;
        // The first policy of a first start denies nothing; an agent killed at that point had not seeded yet.
        Ok(settings.generation == 0 || settings.generation == 1 && settings.audit == 1 && !audit)
    }

    /// Whether programs are attached by TCX links rather than filters of the clsact qdisc.
    #[must_use]
    pub const fn uses_tcx(&self) -> bool {
        self.tcx
    }
}

pub(super) fn program(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier> {
    ebpf.program_mut(hook.name())
        .and_then(|program| program.try_into().ok())
        .ok_or(Error::Kernel { feature: hook.name(), remedy: "the agent was built with another eBPF object" })
}

/// Probes TCX (Linux 6.6) by a query at an interface.
fn has_tcx() -> bool {
    /// `LOOPBACK_IFINDEX` (include/net/flow.h).
    const LO: u32 = 1;
    match bpf::tcx_programs(LO, Hook::ExternalIngress.tcx()) {
        Ok(_) => true,
        Err(error) => {
            tracing::info!(%error, "this kernel has no TCX: attaching by clsact");
            false
        }
    }
}

/// The map of [`Digest`]s.
fn digests() -> aya_obj::Map {
    let size = |bytes: usize| u32::try_from(bytes).expect("a digest is small");
    aya_obj::Map::new_from_params(
        bpf_map_type::BPF_MAP_TYPE_ARRAY as u32,
        size(size_of::<u32>()),
        size(size_of::<Digest>()),
        SLOTS,
        0,
    )
}

/// Compares every pin with the map that the object would make, before any is used.
fn check_pins(pins: &Pins, object: &Object, sizes: &BTreeMap<&str, u32>) -> Result<()> {
    let mut expected: Vec<(&str, &aya_obj::Map)> =
        object.maps.iter().map(|(name, map)| (name.as_str(), map)).collect();
    let digests = digests();
    expected.push((DIGESTS, &digests));
    expected.sort_by_key(|(name, _)| *name);
    for (name, map) in expected {
        let path = pins.map(name);
        if path.exists() {
            check_pin(&path, map, sizes.get(name).copied())?;
        }
    }
    Ok(())
}

fn check_pin(path: &Path, expected: &aya_obj::Map, configured_entries: Option<u32>) -> Result<()> {
    let foreign = |property, found: String, expected: String| {
        Err(Error::ForeignPin { path: path.to_owned(), property, found, expected })
    };
    let fd = bpf::obj_get(path).map_err(Error::path("opening", path))?;
    let kind = bpf::Kind::of(fd.as_fd()).map_err(Error::path("looking at", path))?;
    if kind != bpf::Kind::Map {
        return foreign("its kind", format!("{kind:?}"), format!("{:?}", bpf::Kind::Map));
    }
    let found = bpf::map_info(fd.as_fd()).map_err(Error::path("looking at", path))?;
    let properties = [
        ("its map type", found.type_, expected.map_type()),
        ("its key size", found.key_size, expected.key_size()),
        ("its value size", found.value_size, value_size(expected)),
        ("its flags", found.map_flags, expected.map_flags()),
    ];
    for (property, found, expected) in properties {
        if found != expected {
            return foreign(property, found.to_string(), expected.to_string());
        }
    }
    match configured_entries {
        Some(entries) if entries != found.max_entries => tracing::warn!(
            map = %path.display(), pinned = found.max_entries, configured = entries,
            "keeping the size of the pinned table: `bridge-agent down` before the next start applies the configured one"
        ),
        None if found.max_entries != expected.max_entries() => {
            return foreign("its size", found.max_entries.to_string(), expected.max_entries().to_string());
        }
        _ => {}
    }
    Ok(())
}

/// The kernel rather than the object sets the value size of maps of maps.
fn value_size(map: &aya_obj::Map) -> u32 {
    const MAPS_OF_MAPS: [u32; 2] =
        [bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS as u32, bpf_map_type::BPF_MAP_TYPE_HASH_OF_MAPS as u32];
    if MAPS_OF_MAPS.contains(&map.map_type()) { 4 } else { map.value_size() }
}

/// Reads the effective capabilities of this thread (capabilities(7)).
fn require_capabilities() -> Result<()> {
    const NEEDED: [(u32, &str); 3] = [(39, "CAP_BPF"), (12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON")];
    const CAP_SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string("/proc/thread-self/status")
        .map_err(Error::path("reading", "/proc/thread-self/status"))?;
    let Some(effective) = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
    else {
        return Ok(());
    };
    let has = |capability: u32| effective >> capability & 1 == 1;
    let missing: Vec<&str> = NEEDED
        .into_iter()
        // CAP_SYS_ADMIN includes the capabilities that Linux 5.8 split off it.
        .filter(|&(number, name)| !(has(number) || name != "CAP_NET_ADMIN" && has(CAP_SYS_ADMIN)))
        .map(|(_, name)| name)
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(Error::Capability { missing: missing.join(", ") }) }
}

/// Templates of the inner maps of a policy: the object's definitions, and its type information, by which `bpftool map dump`
/// prints fields by name.
#[derive(Debug)]
pub(super) struct Templates {
    inner: Vec<aya_obj::Map>,
    btf: Option<OwnedFd>,
}

impl Templates {
    fn new(object: &mut Object) -> Result<Self> {
        let inner = Table::ALL
            .into_iter()
            .map(|table| {
                object.maps.get(table.name()).and_then(aya_obj::Map::inner).ok_or(Error::Kernel {
                    feature: table.name(),
                    remedy: "the agent was built with another eBPF object",
                })
            })
            .collect::<Result<_>>()?;
        let btf = match aya::features().btf() {
            Some(features) => object
                .fixup_and_sanitize_btf(features)
                .map_err(|error| load_error(error.into()))?
                .and_then(|btf| bpf::btf_load(&btf.to_bytes()).ok()),
            None => None,
        };
        if btf.is_none() {
            tracing::warn!("this kernel takes no BTF: dumps of maps will show bytes instead of fields");
        }
        Ok(Self { inner, btf })
    }

    /// A new map for `table` of a policy, with room for `entries`.
    pub(super) fn create(&self, table: Table, entries: u32) -> Result<MapData, aya::maps::MapError> {
        let mut map = self.inner[table as usize].clone();
        map.set_max_entries(entries.max(1));
        MapData::create(map, table.name(), self.btf.as_ref().map(AsFd::as_fd))
    }
}
