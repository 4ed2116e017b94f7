//! The maps of the pool. Sizes that depend on the configuration are set by the loader.

use aya_ebpf::{
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage},
    macros::btf_map,
};
use bridge_common::pool::{
    Config, Destination, Event, Grant, Granted, Lease, MAX_RESTS, Owner, Rest, RestingPort, counter,
};

/// `BPF_F_MMAPABLE`: the agent claims ports in the same words.
const MMAPABLE: usize = 1 << 10;
/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: usize = 1;

#[btf_map]
pub(crate) static POOL_CONFIG: Array<Config, 1> = Array::new();

/// See [`bridge_common::pool`]. The loader sets the size.
#[btf_map]
pub(crate) static POOL_WORDS: Array<u64, 1024, MMAPABLE> = Array::new();

/// Prefixes whose connections use the pool; IPv4 as v4-mapped. The value says nothing.
#[btf_map]
pub(crate) static POOL_NETWORKS: LpmTrie<[u8; 16], u32, 4096> = LpmTrie::new();

#[btf_map]
pub(crate) static POOL_DESTINATIONS: HashMap<Destination, u32, 65536, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static POOL_OWNERS: HashMap<Owner, u32, 65536, NO_PREALLOC> = HashMap::new();

/// Counts by a key of [`bridge_common::pool::shares`]; the agent corrects them in each sweep.
#[btf_map]
pub(crate) static POOL_SHARES: HashMap<u64, u64, 262_144, NO_PREALLOC> = HashMap::new();

#[btf_map]
pub(crate) static POOL_GRANTS: HashMap<Grant, Granted, 65536, NO_PREALLOC> = HashMap::new();

/// The place where the next `bind` of a TCP socket to port 0 looks for a port.
#[btf_map]
pub(crate) static POOL_BIND_CURSOR: Array<u64, 1> = Array::new();

/// See [`bridge_common::pool::uses`]. The loader sets the size.
#[btf_map]
pub(crate) static POOL_USES: Array<u64, 128, MMAPABLE> = Array::new();

/// Destinations by [`crate::uses::process`]: of TCP sockets that were bound before, and of UDP sockets that were connected again.
#[btf_map]
pub(crate) static POOL_BOUND_TO: LruHashMap<u64, Destination, 4096> = LruHashMap::new();

#[btf_map]
pub(crate) static POOL_RESTING: HashMap<RestingPort, Rest, { MAX_RESTS as usize }, NO_PREALLOC> =
    HashMap::new();

#[btf_map]
pub(crate) static POOL_LEASES: SkStorage<Lease> = SkStorage::new();

#[btf_map]
pub(crate) static POOL_COUNTERS: PerCpuArray<u64, { counter::COUNT as usize }> = PerCpuArray::new();

/// `CLOCK_MONOTONIC`, in nanoseconds, of the last event of each control group.
#[btf_map]
pub(crate) static POOL_LAST_EVENTS: LruHashMap<u64, u64, 4096> = LruHashMap::new();

#[btf_map]
pub(crate) static POOL_EVENTS: RingBuf<Event, 262_144> = RingBuf::new();

/// Adds one to a counter of [`counter`].
#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(value) = POOL_COUNTERS.get_ptr_mut(index) {
        // SAFETY: the pointer is to this CPU's element. A hook that preempts another one here may lose a count to it
        // only on a preemptible kernel; the atomic add keeps the sum right even then.
        unsafe { bridge_ebpf::atomic::fetch_add(value, 1) };
    }
}
