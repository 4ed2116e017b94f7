//! Judges packets between pods and LAN hosts.

#![no_std]
#![no_main]

mod maps;

use aya_ebpf::{macros::classifier, programs::TcContext};

/// Go on with the next program, and with the stack after the last (`TCX_NEXT`, and `TC_ACT_UNSPEC` for clsact).
const NEXT: i32 = -1;

/// LAN -> pod, and LAN -> node on a NodePort.
#[classifier]
pub fn external_ingress(_ctx: TcContext) -> i32 {
    maps::CONTROL.get(0).map_or(NEXT, |_| NEXT)
}

/// Pod -> LAN, with the pod's own address.
#[classifier]
pub fn internal_ingress(_ctx: TcContext) -> i32 {
    NEXT
}

/// Node -> pod: observes.
#[classifier]
pub fn internal_egress(_ctx: TcContext) -> i32 {
    NEXT
}

/// Node -> LAN: observes replies from NodePorts.
#[classifier]
pub fn external_egress(_ctx: TcContext) -> i32 {
    NEXT
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
