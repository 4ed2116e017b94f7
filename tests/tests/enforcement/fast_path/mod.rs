//! Established flows past the network stack: what arrives is what would have arrived, and whatever changes is heard.

mod forwarding;
mod support;
