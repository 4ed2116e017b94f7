//! Every map of the packet path.

use aya_ebpf::{
    btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use bridge_common::filter::{
    address::Address,
    control::{Control, SLOTS, Settings},
    counters::Counters,
    denial::{self, DenialSet},
    event::{Event, EventBudget},
    fast_path::{self, Lease},
    flow::{Flow, FlowKey, FragmentKey},
    flow_cache::{ADDRESSES, MAX_SETS, STAMPS},
    flow_filter,
    interface::Interface,
    policy::{
        AddressInfo, PairKey, PairSets, PortIntervals, PortPage, RuleHits, RuleInfo, RuleSet, direction,
    },
    shares,
    shield::Shielded,
};
use bridge_ebpf::{apart, protocol};

use crate::{
    cache_set::{Place, Set},
    packet::Packet,
    sides::Sides,
    values::{CachedAddress, FibLookup},
};

const SLOT_COUNT: usize = SLOTS as usize;
const NO_PREALLOC: usize = 1; // BPF_F_NO_PREALLOC
const MMAPABLE: usize = 1 << 10; // BPF_F_MMAPABLE
/// Inner arrays of any length may take the template's place (`array_map_meta_equal`, kernel/bpf/arraymap.c).
const ANY_LENGTH: usize = 1 << 12; // BPF_F_INNER_MAP

/// The active slot.
#[btf_map(name = "control")]
pub(crate) static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();

/// By slot.
#[btf_map(name = "settings")]
pub(crate) static SETTINGS: Array<Settings, SLOT_COUNT> = Array::new();

// The compiled policy, by slot. The agent makes the inner maps, as large as the policy needs.

/// IPv4 prefixes of pods, LAN hosts and the node.
#[btf_map(name = "addresses4")]
pub(crate) static ADDRESSES4: ArrayOfMaps<LpmTrie<[u8; 4], AddressInfo, 1>, SLOT_COUNT> = ArrayOfMaps::new();
/// IPv6 prefixes of pods, LAN hosts and the node.
#[btf_map(name = "addresses6")]
pub(crate) static ADDRESSES6: ArrayOfMaps<LpmTrie<[u8; 16], AddressInfo, 1>, SLOT_COUNT> = ArrayOfMaps::new();
/// Properties of addresses, by their number.
#[btf_map(name = "origins")]
pub(crate) static ORIGINS: ArrayOfMaps<Array<AddressInfo, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// Sets of the rules that name both sides.
#[btf_map(name = "pairs")]
pub(crate) static PAIRS: ArrayOfMaps<HashMap<PairKey, PairSets, 1>, SLOT_COUNT> = ArrayOfMaps::new();
/// Sets of rules, by protocol.
#[btf_map(name = "rule_sets")]
pub(crate) static RULE_SETS: ArrayOfMaps<Array<RuleSet, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// Port lookups with few intervals.
#[btf_map(name = "narrows")]
pub(crate) static NARROWS: ArrayOfMaps<Array<PortIntervals, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// Port lookups with many intervals.
#[btf_map(name = "pages")]
pub(crate) static PAGES: ArrayOfMaps<Array<PortPage, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// By CPU and rule; see `Settings::rule_count`.
#[btf_map(name = "rule_hits")]
pub(crate) static RULE_HITS: ArrayOfMaps<Array<RuleHits, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// Names of the rules, for readers of maps.
#[btf_map(name = "rule_info")]
pub(crate) static RULE_INFO: ArrayOfMaps<Array<RuleInfo, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();

/// Established TCP connections. The loader sets the size.
#[btf_map(name = "flows")]
static FLOWS: LruHashMap<FlowKey, Flow, 262_144> = LruHashMap::new();
/// Flows of other protocols of which packets of both directions were seen: apart, so that a flood of them evicts no
/// connection that is silent. The loader sets the size.
#[btf_map(name = "other_flows")]
static OTHER_FLOWS: LruHashMap<FlowKey, Flow, 131_072> = LruHashMap::new();
/// Established flows of all protocols beyond the share of their initiator: see `bridge_common::filter::shares`. The loader sets
/// the size.
#[btf_map(name = "overflow")]
static OVERFLOW: LruHashMap<FlowKey, Flow, 16_384> = LruHashMap::new();
/// See `bridge_common::filter::shares`.
#[btf_map(name = "shares")]
static SHARES: Array<u64, { shares::LENGTH as usize }, MMAPABLE> = Array::new();
/// Flows without a reply: apart, so that a flood of them evicts no established flow.
#[btf_map(name = "half_open")]
pub(crate) static HALF_OPEN: LruHashMap<FlowKey, Flow, 65_536> = LruHashMap::new();
/// See `bridge_common::filter::flow_filter`.
#[btf_map(name = "flow_filter")]
pub(crate) static FLOW_FILTER: Array<[u64; flow_filter::HALVES], { flow_filter::LENGTH as usize }, MMAPABLE> =
    Array::new();
/// Hosts between which a first fragment was let through, with the time of the last one.
#[btf_map(name = "fragments")]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, u64, 16_384> = LruHashMap::new();

/// The flow cache, CPU by CPU. The loader sets the size.
///
/// The flag aligns the sets to cache lines.
#[btf_map(name = "flow_cache")]
pub(crate) static FLOW_CACHE: Array<Set, { MAX_SETS as usize }, MMAPABLE> = Array::new();
/// Properties of addresses, CPU by CPU. The loader sets the size.
#[btf_map(name = "address_cache")]
pub(crate) static ADDRESS_CACHE: Array<CachedAddress, { ADDRESSES as usize }, MMAPABLE> = Array::new();
/// See `bridge_common::filter::flow_cache`.
#[btf_map(name = "flow_stamps")]
pub(crate) static FLOW_STAMPS: Array<u64, { STAMPS as usize }, MMAPABLE> = Array::new();

/// Judged packets, by direction.
#[btf_map(name = "counters")]
pub(crate) static COUNTERS: PerCpuArray<Counters, { direction::COUNT }> = PerCpuArray::new();
/// Packets that passed but would have been denied, by direction.
#[btf_map(name = "audited")]
pub(crate) static AUDITED: PerCpuArray<Counters, { direction::COUNT }> = PerCpuArray::new();

/// Whether flows may take the fast path.
#[btf_map(name = "fast_path")]
pub(crate) static FAST_PATH: Array<fast_path::Control, 1, MMAPABLE> = Array::new();
/// Paths past the network stack.
#[btf_map(name = "paths")]
pub(crate) static PATHS: Array<fast_path::Path, { fast_path::PATHS as usize }> = Array::new();
/// Packets of established flows, by direction and by use of the fast path.
#[btf_map(name = "outcomes")]
pub(crate) static OUTCOMES: PerCpuArray<fast_path::Outcomes, { direction::COUNT }> = PerCpuArray::new();

/// Sampled verdicts.
#[btf_map(name = "events")]
pub(crate) static EVENTS: RingBuf<Event, { 1 << 20 }> = RingBuf::new();
/// Connections with a FIN of a LAN host that the pod has not acknowledged yet.
#[btf_map(name = "ends")]
pub(crate) static ENDS: RingBuf<FlowKey, { 1 << 18 }> = RingBuf::new();
/// Classes of denied connections, set by set.
#[btf_map(name = "denials")]
pub(crate) static DENIALS: PerCpuArray<DenialSet, { denial::SETS as usize }> = PerCpuArray::new();
/// The rate limit of events.
#[btf_map(name = "event_budget")]
pub(crate) static EVENT_BUDGET: PerCpuArray<EventBudget, 1> = PerCpuArray::new();
/// Packets that the shield dropped, and those that it left to the hook behind it.
#[btf_map(name = "shielded")]
pub(crate) static SHIELDED: PerCpuArray<Shielded, 1> = PerCpuArray::new();

/// Index of the interface that leads to a pod of this node, by the pod's address.
#[btf_map(name = "hosted")]
pub(crate) static HOSTED: HashMap<Address, u32, 65_536, NO_PREALLOC> = HashMap::new();

/// Outer packets of this node's tunnels, by `bridge_common::filter::interface::tunnel`.
#[btf_map(name = "tunnels")]
pub(crate) static TUNNELS: HashMap<u32, u32, 64> = HashMap::new();

/// Interfaces that the programs are attached to, and bridges above them, by index.
#[btf_map(name = "interfaces")]
pub(crate) static INTERFACES: HashMap<u32, Interface, 4096> = HashMap::new();

/// Working memory of a program, too large for its stack. A CPU judges one packet at a time.
#[btf_map(name = "scratch")]
pub(crate) static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Returns the established flow with this key.
#[inline(always)]
pub(crate) fn established(key: &FlowKey) -> Option<*mut Flow> {
    let flow = if key.protocol == protocol::TCP {
        FLOWS.get_ptr_mut(key)
    } else {
        let flow = OTHER_FLOWS.get_ptr_mut(key);
        apart();
        flow
    };
    if flow.is_some() || !has_overflow() { flow } else { OVERFLOW.get_ptr_mut(key) }
}

/// Enters an established flow, whose `last_seen` is now: beyond its initiator's share in the table `overflow`.
#[inline(always)]
pub(crate) fn insert_established(key: &FlowKey, flow: &Flow) -> bool {
    let is_tcp = key.protocol == protocol::TCP;
    if !take_share(key, flow, is_tcp) {
        // Before the entry: the agent sets it back when it has seen the table empty.
        if let Some(stamp) = SHARES.get_ptr_mut(shares::STAMP) {
            // SAFETY: a valid element; a whole word is written.
            unsafe { stamp.write_volatile(flow.last_seen) };
        }
        let inserted = OVERFLOW.insert(key, flow, 0).is_ok();
        apart();
        return inserted;
    }
    if is_tcp {
        return FLOWS.insert(key, flow, 0).is_ok();
    }
    let inserted = OTHER_FLOWS.insert(key, flow, 0).is_ok();
    apart();
    inserted
}

/// Whether the initiator has room in its share of the table; counts the entry.
#[inline(always)]
fn take_share(key: &FlowKey, flow: &Flow, is_tcp: bool) -> bool {
    let initiator = key.end(flow.initiator);
    let limit = shares::LIMITS + u32::from(!is_tcp);
    let (Some(seed), Some(limit)) = (SHARES.get(shares::SEED), SHARES.get(limit)) else { return true };
    let Some(count) = SHARES.get_ptr_mut(shares::counter(initiator, is_tcp, *seed)) else { return true };
    // SAFETY: a valid element. CPUs that write at the same time count one entry less, until the agent corrects it.
    unsafe {
        if *count >= *limit {
            return false;
        }
        *count += 1;
    }
    true
}

/// Whether the table `overflow` has entries.
#[inline(always)]
fn has_overflow() -> bool {
    SHARES.get(shares::STAMP).is_some_and(|stamp| *stamp != 0)
}

/// Removes an established flow.
#[inline(always)]
pub(crate) fn remove_established(key: &FlowKey) {
    if key.protocol == protocol::TCP {
        let _ = FLOWS.remove(key);
    } else {
        let _ = OTHER_FLOWS.remove(key);
        apart();
    }
    if has_overflow() {
        let _ = OVERFLOW.remove(key);
        apart();
    }
}

/// Value of [`SCRATCH`].
#[repr(C)]
pub(crate) struct Scratch {
    pub(crate) packet: Packet,
    /// The packet that an ICMP error quotes.
    pub(crate) quoted: Packet,
    pub(crate) sides: Sides,
    /// The flow to be entered.
    pub(crate) flow: Flow,
    /// The place of the packet's flow in the cache.
    pub(crate) place: Place,
    pub(crate) route: Route,
    pub(crate) fragment: FragmentKey,
    pub(crate) fib: FibLookup,
}

/// How [`crate::fast_path::forward`] passed a packet.
#[repr(C)]
pub(crate) struct Route {
    /// Holds if `kind` is [`Route::PATH`].
    pub(crate) lease: Lease,
    pub(crate) kind: u64,
}

impl Route {
    /// To the network stack, which may still teach a path.
    pub(crate) const UNKNOWN: u64 = 0;
    /// To the network stack; there is no fast path.
    pub(crate) const STACK: u64 = 1;
    /// By a path.
    pub(crate) const PATH: u64 = 2;
}

/// Returns the working memory of this CPU.
#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: a valid element, of this CPU alone; each subprogram takes it once and writes to other parts of it than
    // its caller reads.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}
