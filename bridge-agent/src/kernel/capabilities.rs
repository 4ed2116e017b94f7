//! Capabilities of the running agent: it drops every other one (capabilities(7)) before it does anything, and neither
//! it nor a program that it starts can get one back.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Each is needed, and tested to be (`tests/privileges.rs`, `tests/daemonset.rs`):
/// programs, maps and pins; programs that read packets through pointers; hooks, iptables, routes, connection tracking and
/// sysctls of the network; iptables-legacy; and for root, whose files these may not be, the group of the socket, the
/// configuration and keys of other users.
const KEPT: CapabilitySet = CapabilitySet::BPF
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE);

/// The capability that included those of BPF before Linux 5.8.
const SYS_ADMIN: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// Drops unneeded capabilities. Call before there is a second thread: each has capabilities of its own.
///
/// CAP_SYS_ADMIN stays for an agent that `takes_over` from another version of the ABI, until its next start: the kernel
/// shows the type information of maps only with it (`BPF_BTF_GET_FD_BY_ID`, kernel/bpf/syscall.c).
///
/// # Errors
/// Of `capget(2)`, `capset(2)` and `prctl(2)`.
pub fn give_up(takes_over: bool) -> io::Result<()> {
    let before = capabilities(None)?;
    let split = CapabilitySet::BPF.union(CapabilitySet::PERFMON);
    // A process that has only CAP_SYS_ADMIN keeps that.
    let kept = if before.permitted.contains(split) && !takes_over { KEPT } else { KEPT.union(SYS_ADMIN) };
    // First: it takes CAP_SETPCAP, without which the bounding set stays the same, and no_new_privs prevents a gain by
    // any program.
    for capability in CapabilitySet::all().difference(kept).iter() {
        if before.effective.contains(CapabilitySet::SETPCAP)
            && capability_is_in_bounding_set(capability).unwrap_or(false)
        {
            remove_capability_from_bounding_set(capability)?;
        }
    }
    let after = CapabilitySets {
        effective: before.effective.intersection(kept),
        permitted: before.permitted.intersection(kept),
        // Ambient ones, that a service user's iptables lives on, are of these.
        inheritable: before.inheritable.intersection(kept),
    };
    set_capabilities(None, after)?;
    set_no_new_privs(true)?;
    tracing::debug!(kept = ?after.permitted, "dropped unneeded capabilities");
    Ok(())
}
