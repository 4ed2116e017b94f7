//! Gives every connection to a destination of the pool a source port of the pool.
//!
//! The life of a port: a program calls `connect` ([`connect`]), a port is claimed in the bitmap of the destination and
//! bound ([`claim`]); the claim is noted in the socket's own storage. When the socket is both closed as a file and in
//! state CLOSE ([`release`]), the port becomes warm: free again, for the same namespace only, until the agent sees that
//! conntrack has forgotten it.

#![no_std]
#![no_main]
#![expect(
    clippy::cast_possible_truncation,
    reason = "the kernel keeps 16-bit ports in 32-bit context fields, and takes sizes of small structs as int"
)]

mod bind;
mod bind_tcp;
mod claim;
mod connect;
mod create;
mod iter;
mod maps;
mod refuse;
mod release;
mod rest;
mod sock;
mod tables;
mod uses;

bridge_ebpf::license!();
