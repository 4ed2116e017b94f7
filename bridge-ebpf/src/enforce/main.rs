//! Judges packets between pods and LAN hosts.
//!
//! The path of a packet is [`judge::judge`]: parse ([`packet`]), flow table ([`track`]), scope ([`scope`]), policy
//! ([`policy`]), verdict ([`report`], [`reject`]).

#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![expect(
    missing_docs,
    unreachable_pub,
    reason = "the attribute of a program adds a function that only the loader reaches"
)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key by value would be copied onto a stack of 512 bytes"
)]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "header lengths, directions and results of helpers are small, whatever the type of the register"
)]

mod cache;
mod fast_path;
mod judge;
mod maps;
mod mark;
mod packet;
mod paths;
mod policy;
mod reject;
mod report;
mod scope;
mod track;

use aya_ebpf::{macros::classifier, programs::TcContext};
use judge::Hook;

/// Go on with the next program, and with the stack after the last (`TCX_NEXT`, and `TC_ACT_UNSPEC` for clsact).
const NEXT: i32 = -1;

/// LAN -> pod, and LAN -> node on a NodePort.
#[classifier]
pub fn external_ingress(ctx: TcContext) -> i32 {
    judge::judge(ctx.skb.skb, Hook::External)
}

/// Pod -> LAN, with the pod's own address.
#[classifier]
pub fn internal_ingress(ctx: TcContext) -> i32 {
    judge::judge(ctx.skb.skb, Hook::Internal)
}

/// Node -> pod: observes.
#[classifier]
pub fn internal_egress(ctx: TcContext) -> i32 {
    judge::observe_to_pod(ctx.skb.skb);
    NEXT
}

/// Node -> LAN: observes replies from NodePorts.
#[classifier]
pub fn external_egress(ctx: TcContext) -> i32 {
    judge::observe_to_lan(ctx.skb.skb);
    NEXT
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
