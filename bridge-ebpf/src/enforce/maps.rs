//! Every map of the packet path.

use aya_ebpf::{
    btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use bridge_common::filter::{
    control::{Control, SLOTS, Settings},
    counters::Counters,
    event::{Event, EventBudget},
    fast_path,
    flow::{ClientKey, Flow, FlowKey},
    flow_cache::{MOST_SETS, STAMPS},
    interface::Interface,
    policy::{AddressInfo, Narrow, Page, PairKey, PairSets, RuleHits, RuleInfo, RuleSet, direction},
};

use crate::{
    cache::{Place, Set},
    packet::Packet,
    scope::Scope,
};

const SLOT_COUNT: usize = SLOTS as usize;
const MMAPABLE: usize = 1 << 10; // BPF_F_MMAPABLE
/// Inner arrays of any length may take the template's place (`array_map_meta_equal`, kernel/bpf/arraymap.c).
const ANY_LENGTH: usize = 1 << 12; // BPF_F_INNER_MAP

/// Which slot is in force.
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
/// Sets of the rules that name both sides.
#[btf_map(name = "pairs")]
pub(crate) static PAIRS: ArrayOfMaps<HashMap<PairKey, PairSets, 1>, SLOT_COUNT> = ArrayOfMaps::new();
/// What a set says, by protocol.
#[btf_map(name = "rule_sets")]
pub(crate) static RULE_SETS: ArrayOfMaps<Array<RuleSet, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// Port lookup, few intervals.
#[btf_map(name = "narrows")]
pub(crate) static NARROWS: ArrayOfMaps<Array<Narrow, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// Port lookup, many intervals.
#[btf_map(name = "pages")]
pub(crate) static PAGES: ArrayOfMaps<Array<Page, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// By CPU and rule; see `Settings::rule_count`.
#[btf_map(name = "rule_hits")]
pub(crate) static RULE_HITS: ArrayOfMaps<Array<RuleHits, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();
/// For readers of maps only.
#[btf_map(name = "rule_info")]
pub(crate) static RULE_INFO: ArrayOfMaps<Array<RuleInfo, 1, ANY_LENGTH>, SLOT_COUNT> = ArrayOfMaps::new();

/// Flows of which packets of both directions were seen. The loader sets the size.
#[btf_map(name = "flows")]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow, 262_144> = LruHashMap::new();
/// Flows that wait for a reply: apart, so that a flood of them evicts no established flow.
#[btf_map(name = "half_open")]
pub(crate) static HALF_OPEN: LruHashMap<FlowKey, Flow, 65_536> = LruHashMap::new();
/// LAN hosts whose packets to a NodePort were let through, with the time of the last one; an odd nanosecond: by audit
/// mode alone.
#[btf_map(name = "node_port_peers")]
pub(crate) static NODE_PORT_PEERS: LruHashMap<ClientKey, u64, 65_536> = LruHashMap::new();

/// What each CPU has lately let through; sets of the first CPU before those of the next. The loader sets the size.
///
/// To be mapped into nobody's memory, but so its sets begin with a cache line.
#[btf_map(name = "flow_cache")]
pub(crate) static FLOW_CACHE: Array<Set, { MOST_SETS as usize }, MMAPABLE> = Array::new();
/// See `bridge_common::filter::flow_cache`.
#[btf_map(name = "flow_stamps")]
pub(crate) static FLOW_STAMPS: Array<u64, { STAMPS as usize }, MMAPABLE> = Array::new();

/// Packets judged, by direction.
#[btf_map(name = "counters")]
pub(crate) static COUNTERS: PerCpuArray<Counters, { direction::COUNT }> = PerCpuArray::new();
/// Packets that passed but would have been denied, by direction.
#[btf_map(name = "audited")]
pub(crate) static AUDITED: PerCpuArray<Counters, { direction::COUNT }> = PerCpuArray::new();

/// Whether flows may take the fast path.
#[btf_map(name = "fast_path")]
pub(crate) static FAST_PATH: Array<fast_path::Control, 1, MMAPABLE> = Array::new();
/// The ways that flows take past the network stack.
#[btf_map(name = "paths")]
pub(crate) static PATHS: Array<fast_path::Path, { fast_path::PATHS as usize }> = Array::new();
/// Packets of established flows, by direction: whether they took the fast path, and why not.
#[btf_map(name = "outcomes")]
pub(crate) static OUTCOMES: PerCpuArray<fast_path::Outcomes, { direction::COUNT }> = PerCpuArray::new();

/// Verdicts, sampled.
#[btf_map(name = "events")]
pub(crate) static EVENTS: RingBuf<Event, { 1 << 20 }> = RingBuf::new();
/// The rate limit of events.
#[btf_map(name = "event_budget")]
pub(crate) static EVENT_BUDGET: PerCpuArray<EventBudget, 1> = PerCpuArray::new();

/// Interfaces that the programs are attached to, by index.
#[btf_map(name = "interfaces")]
pub(crate) static INTERFACES: HashMap<u32, Interface, 4096> = HashMap::new();

/// What a program works on: more than its stack holds. One packet is judged at a time on a CPU.
#[btf_map(name = "scratch")]
pub(crate) static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Value of [`SCRATCH`].
#[repr(C)]
pub(crate) struct Scratch {
    pub(crate) packet: Packet,
    /// The packet that an ICMP error quotes.
    pub(crate) quoted: Packet,
    pub(crate) scope: Scope,
    /// A flow that is about to be entered.
    pub(crate) flow: Flow,
    /// Where the packet's flow would be in the cache.
    pub(crate) place: Place,
}

/// What this CPU works on.
#[inline(always)]
pub(crate) fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: a valid element, of this CPU alone; each subprogram takes it once and writes to other parts of it than
    // its caller reads.
    SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}
