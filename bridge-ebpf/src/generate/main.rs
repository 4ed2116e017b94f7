//! The packet source of the benchmarks, and the counter of arrived packets. Not part of the agent.
//!
//! `generate` runs by `BPF_PROG_TEST_RUN` with `BPF_F_TEST_XDP_LIVE_FRAMES`: each run makes a frame and sends it by an
//! interface, whose other end takes it for one that came in by a wire. The kernel uses a frame's page again as the last
//! receiver left it, so every frame is written whole. `sink` at an interface counts packets that arrive, and drops them.
//! `drop_tc` and `drop_xdp` are the cheapest firewalls there can be: they drop the packets to one address.

#![no_std]
#![no_main]
#![expect(
    missing_docs,
    unreachable_pub,
    reason = "the attribute of a program adds a function that only the loader reaches"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "sums are folded, addresses are split, and serial numbers wrap around"
)]

mod plan;

use aya_ebpf::{
    Global,
    bindings::xdp_action,
    btf_maps::{Array, HashMap, PerCpuArray},
    helpers::generated::{bpf_map_lookup_percpu_elem, bpf_redirect, bpf_skb_load_bytes},
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use plan::{FRAME, Plan, SINKS};

/// The plan of the packets.
#[btf_map(name = "plan")]
static PLAN: Array<Plan, 1> = Array::new();

/// The number of the next frame. Frames are made on one CPU, and one run does not interrupt another.
#[btf_map(name = "serial")]
static SERIAL: Array<u64, 1> = Array::new();

/// Destination addresses that end in a sink; zero is none.
#[btf_map(name = "sinks")]
static SINK: Array<[u8; 4], SINKS> = Array::new();

/// Packets that arrived, by sink.
#[btf_map(name = "arrived")]
static ARRIVED: PerCpuArray<u64, SINKS> = PerCpuArray::new();

const ETH_P_IP: u16 = 0x0800;
const ETHERNET: usize = 14;
const IP_CHECKSUM: usize = ETHERNET + 10;
const IP_SOURCE: usize = ETHERNET + 12;
const IP_DESTINATION: usize = ETHERNET + 16;
const TCP: usize = ETHERNET + 20;
const TCP_CHECKSUM: usize = TCP + 16;

#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    try_generate(&ctx).unwrap_or(xdp_action::XDP_ABORTED)
}

#[inline(always)]
fn try_generate(ctx: &XdpContext) -> Option<u32> {
    let (data, end) = (ctx.data(), ctx.data_end());
    if data + FRAME > end {
        return None;
    }
    let plan = PLAN.get(0)?;
    let serial = SERIAL.get_ptr_mut(0)?;
    // SAFETY: a valid element without another writer at this time.
    let number = unsafe { *serial };
    if number >= plan.end || is_ahead(plan, number) {
        return Some(xdp_action::XDP_DROP);
    }
    // SAFETY: likewise.
    unsafe { *serial = number + 1 };
    let flow = number % u64::from(plan.flows).max(1);
    let ports = u64::from(plan.ports).max(1);
    let (address, port) = (
        plan.first_address.wrapping_add((flow / ports) as u32),
        plan.first_port.wrapping_add((flow % ports) as u16),
    );

    let (at_address, at_port) =
        if plan.destination == 0 { (IP_SOURCE, TCP) } else { (IP_DESTINATION, TCP + 2) };
    // RFC 1071: the sum does not depend on the order, so the plan has that of all the rest.
    let varied = (address >> 16) + (address & 0xffff);
    let ip = checksum(plan.ip_sum + varied);
    let tcp = checksum(plan.tcp_sum + varied + u32::from(port));
    let frame = data as *mut u8;
    // SAFETY: all of it lies within the FRAME bytes that were compared with the end of the frame. Packets begin at a
    // multiple of eight here, and where one does not, the processors that run this do not mind.
    unsafe {
        *frame.cast::<[u64; FRAME / 8]>() = plan.frame;
        put(frame.add(at_address), (address >> 16) as u16);
        put(frame.add(at_address + 2), address as u16);
        put(frame.add(at_port), port);
        put(frame.add(IP_CHECKSUM), ip);
        put(frame.add(TCP_CHECKSUM), tcp);
    }
    // SAFETY: a helper without pointers.
    u32::try_from(unsafe { bpf_redirect(plan.interface, 0) }).ok()
}

/// Whether too many packets are on their way.
#[inline(always)]
fn is_ahead(plan: &Plan, number: u64) -> bool {
    if plan.window == 0 {
        return false;
    }
    let map = (&raw const ARRIVED).cast_mut().cast();
    let mut arrived = 0_u64;
    for cpu in plan.cpus {
        // SAFETY: a map of the kind that the helper takes, and a key of its type.
        let on_cpu = unsafe { bpf_map_lookup_percpu_elem(map, (&raw const plan.sink).cast(), cpu) };
        // SAFETY: a valid element, or null; another CPU may write to it meanwhile, a word at a time.
        arrived += unsafe { on_cpu.cast::<u64>().as_ref() }.copied().unwrap_or(0);
    }
    number >= arrived.wrapping_sub(plan.arrived).saturating_add(plan.window)
}

/// Writes a number in network byte order.
///
/// # Safety
/// There is room for it at `at`, which is even.
#[inline(always)]
unsafe fn put(at: *mut u8, number: u16) {
    // SAFETY: the caller's promise.
    unsafe { *at.cast::<u16>() = number.to_be() }
}

/// Returns the checksum of a `sum` below 65536 times 65536.
#[inline(always)]
fn checksum(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    !(sum as u16)
}

/// Go on with the next program (`TCX_NEXT`).
const NEXT: i32 = -1;
const DROP: i32 = 2; // TC_ACT_SHOT

#[classifier]
pub fn sink(ctx: TcContext) -> i32 {
    let mut address = [0_u8; 4];
    let at = u32::try_from(IP_DESTINATION).unwrap_or_default();
    // SAFETY: the context of a packet has this field.
    if unsafe { (*ctx.skb.skb).protocol } != u32::from(ETH_P_IP.to_be()) {
        return NEXT;
    }
    // SAFETY: as many bytes as the array has.
    let loaded = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), at, address.as_mut_ptr().cast(), 4) };
    if loaded < 0 {
        return NEXT;
    }
    for index in 0..SINKS {
        let Ok(index) = u32::try_from(index) else { return NEXT };
        if SINK.get(index).is_some_and(|sink| *sink != [0; 4] && *sink == address)
            && let Some(arrived) = ARRIVED.get_ptr_mut(index)
        {
            // SAFETY: a valid element, of this CPU alone.
            unsafe { *arrived += 1 };
            return DROP;
        }
    }
    NEXT
}

/// Measure of [`reference`]: a table with a key as large as that of a flow.
#[btf_map(name = "measure")]
static MEASURE: HashMap<[u64; 5], u64, 1024> = HashMap::new();

/// Lookups of [`reference`].
const LOOKUPS: u64 = 16;

/// Looks keys up that are not there: the unit of the budget of packets, which no other machine and no other load changes.
#[classifier]
pub fn reference(_ctx: TcContext) -> i32 {
    let mut found = 0;
    for number in 0..LOOKUPS {
        // SAFETY: only tested.
        found += i32::from(unsafe { MEASURE.get([number, 1, 2, 3, 4]) }.is_some());
    }
    found
}

/// The address whose packets [`drop_tc`] and [`drop_xdp`] drop, as it lies in the header. Set by the loader.
#[unsafe(no_mangle)]
static DROPPED: Global<u32> = Global::new(0);

#[classifier]
pub fn drop_tc(ctx: TcContext) -> i32 {
    if is_dropped(ctx.data(), ctx.data_end()) { DROP } else { NEXT }
}

#[xdp]
pub fn drop_xdp(ctx: XdpContext) -> u32 {
    if is_dropped(ctx.data(), ctx.data_end()) { xdp_action::XDP_DROP } else { xdp_action::XDP_PASS }
}

/// Whether a frame is an IPv4 packet to [`DROPPED`].
#[inline(always)]
fn is_dropped(data: usize, end: usize) -> bool {
    if data + IP_DESTINATION + 4 > end {
        return false;
    }
    // SAFETY: within the frame, by the comparison above; for the alignment see `try_generate`.
    let (ether_type, halves) = unsafe {
        let frame = data as *const u8;
        (*frame.add(12).cast::<u16>(), *frame.add(IP_DESTINATION).cast::<[u16; 2]>())
    };
    let destination = u32::from(halves[1]) << 16 | u32::from(halves[0]);
    ether_type == ETH_P_IP.to_be() && destination == DROPPED.load()
}

bridge_ebpf::license!();
