//! Established flows past the network stack: packets arrive unchanged, and every change is followed.

mod abstention;
mod conntrack;
mod forwarding;
mod leaving;
mod support;
