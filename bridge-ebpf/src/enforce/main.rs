//! Judges packets between pods and LAN hosts.
//!
//! The path of a packet is [`judge::ingress`]: cache ([`cache`]), headers ([`parse`]), flow table ([`track`]), scope
//! ([`scope`]), policy ([`policy`]), verdict ([`verdict`]).

#![no_std]
#![no_main]
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

mod action;
mod active;
mod addresses;
mod cache;
mod cache_set;
mod fast_path;
mod fib;
mod flow_filter;
mod fragments;
mod hook;
mod judge;
mod maps;
mod mark;
mod packet;
mod parse;
mod paths;
mod policy;
mod refusals;
mod reject;
mod report;
mod scope;
mod shield;
mod sides;
mod track;
mod values;
mod verdict;

use aya_ebpf::{
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use hook::Hook;

/// LAN to node, in the driver: a shield in front of [`external_ingress`].
#[xdp(frags)]
pub fn external_shield(ctx: XdpContext) -> u32 {
    shield::shield(ctx.ctx)
}

/// LAN to pod, and LAN to a NodePort of this node.
#[classifier]
pub fn external_ingress(ctx: TcContext) -> i32 {
    judge::ingress(ctx.skb.skb, Hook::EXTERNAL_INGRESS)
}

/// Pod to LAN, with the pod's own address.
#[classifier]
pub fn internal_ingress(ctx: TcContext) -> i32 {
    judge::ingress(ctx.skb.skb, Hook::INTERNAL_INGRESS)
}

/// Node to pod.
#[classifier]
pub fn internal_egress(ctx: TcContext) -> i32 {
    judge::egress(ctx.skb.skb, Hook::INTERNAL_EGRESS)
}

/// Node to LAN.
#[classifier]
pub fn external_egress(ctx: TcContext) -> i32 {
    judge::egress(ctx.skb.skb, Hook::EXTERNAL_EGRESS)
}

bridge_ebpf::license!();
