//! Established flows past the network stack: what arrives is what would have arrived, and whatever changes is heard.

mod abstention;
mod conntrack;
mod forwarding;
mod leaving;
mod support;
