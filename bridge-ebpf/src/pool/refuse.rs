//! Saying no, with a reason.

use aya_ebpf::{
    EbpfContext, Global,
    bindings::bpf_sock_addr,
    helpers::generated::{bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_ktime_get_ns, bpf_set_retval},
    programs::{SockAddrContext, SockContext},
};
use bridge_common::pool::{Destination, Refusal, counter};

use crate::{
    maps::{POOL_EVENTS, POOL_LAST_EVENTS, count},
    sock::netns_cookie,
};

/// What a hook answers: the call goes on.
pub(crate) const PASS: i32 = 1;
const REFUSE: i32 = 0;
const EPROTONOSUPPORT: i32 = 93;
const EADDRNOTAVAIL: i32 = 99;

/// Minimum time between two events of a control group, in nanoseconds, so that the events of others have room; the counters
/// see all.
const EVENT_INTERVAL_NS: u64 = 10_000_000;

/// Whether the kernel has `bpf_set_retval` (Linux 5.18). Without it the program sees EPERM. Set by the loader.
#[unsafe(no_mangle)]
static POOL_HAS_SET_RETVAL: Global<u8> = Global::new(1);

/// Counts and reports a refusal; the program will see EADDRNOTAVAIL.
#[inline(always)]
pub(crate) fn refuse(ctx: &SockAddrContext, destination: &Destination, refusal: Refusal) -> i32 {
    count(counter::REFUSALS + refusal.0);
    report_connect(ctx.sock_addr, destination, refusal.0);
    answer(EADDRNOTAVAIL)
}

/// Counts and reports that the pool had no port; the call goes on without one.
#[inline(always)]
pub(crate) fn note_refusal(ctx: &SockAddrContext, destination: &Destination, refusal: Refusal) {
    count(counter::REFUSALS + refusal.0);
    report_connect(ctx.sock_addr, destination, refusal.0);
}

/// Counts and reports that a socket is not created; the program will see EPROTONOSUPPORT.
#[inline(always)]
pub(crate) fn refuse_socket(ctx: &SockContext, refusal: Refusal) -> i32 {
    count(counter::REFUSALS + refusal.0);
    report(ctx, &Destination::ANY_UDP, refusal);
    answer(EPROTONOSUPPORT)
}

/// Counts and reports that the kernel refused a connection after the pool had bound its port.
#[inline(always)]
pub(crate) fn note_failure(ctx: &SockContext, destination: &Destination) {
    count(counter::CONNECT_FAILURES);
    count(counter::REFUSALS + Refusal::KERNEL.0);
    report(ctx, destination, Refusal::KERNEL);
}

/// [`note_failure`], found when the program connects the same socket again.
#[inline(always)]
pub(crate) fn note_earlier_failure(ctx: &SockAddrContext, destination: &Destination) {
    count(counter::CONNECT_FAILURES);
    count(counter::REFUSALS + Refusal::KERNEL.0);
    report_connect(ctx.sock_addr, destination, Refusal::KERNEL.0);
}

#[inline(always)]
fn answer(error: i32) -> i32 {
    if POOL_HAS_SET_RETVAL.load() != 0 {
        // SAFETY: the helper takes a number.
        unsafe { bpf_set_retval(-error) };
    }
    REFUSE
}

/// [`report`], as a function: its frame of the stack ends before others begin.
#[inline(never)]
extern "C" fn report_connect(context: *mut bpf_sock_addr, destination: &Destination, refusal: u32) {
    report(&SockAddrContext::new(context), destination, Refusal(refusal));
}

#[inline(always)]
fn report(ctx: &impl EbpfContext, destination: &Destination, refusal: Refusal) {
    // SAFETY: the helper takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the helper takes no argument.
    let group = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: a pointer to a map's value; that another hook may write in between costs one event more or less.
    let last = POOL_LAST_EVENTS.get_ptr(group).map(|last| unsafe { last.read_volatile() });
    if last.is_some_and(|last| now.wrapping_sub(last) < EVENT_INTERVAL_NS) {
        return count(counter::EVENTS_LOST);
    }
    // An error can only mean that another hook of the group reports now.
    let _ = POOL_LAST_EVENTS.insert(group, now, 0);
    let Some(mut entry) = POOL_EVENTS.reserve(0) else { return count(counter::EVENTS_LOST) };
    let event = entry.as_mut_ptr();
    // SAFETY: memory of the ring buffer, of an event's size; every field is written. In place: the stack is short.
    unsafe {
        (*event).time_ns = now;
        (*event).netns_cookie = netns_cookie(ctx);
        (*event).cgroup_id = group;
        (*event).refusal = refusal.0;
        (*event).pid = ctx.tgid();
        (*event).uid = ctx.uid();
        (*event).destination = *destination;
        bpf_get_current_comm((&raw mut (*event).comm).cast(), 16);
    }
    entry.submit(0);
}
