//! Ranges of ports that get into each other's way: the pool's, the NodePorts', and those that the kernel gives away.

use std::fs;

use crate::{
    config::{Config, PortPool},
    model::{parse_ephemeral, parse_ranges},
    nodeport_range::conflicts::{self, Surroundings},
};

/// Returns the faults of the ranges, in this network namespace at this time, each with its remedy; logs them, too.
pub(super) fn look(config: &Config) -> Vec<String> {
    let read = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    let warnings = overlaps(config, &read("ip_local_port_range"), &read("ip_local_reserved_ports"));
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    warnings
}

/// The pool against the ephemeral ports is for the pool to say: it reserves its ports.
fn overlaps(config: &Config, ephemeral: &str, reserved: &str) -> Vec<String> {
    let Some(node_ports) = &config.node_ports else { return Vec::new() };
    let around = Surroundings {
        pool: config.port_pool.as_ref().map(PortPool::available).unwrap_or_default(),
        ephemeral: parse_ephemeral(ephemeral),
        reserved: parse_ranges(reserved),
        ..Surroundings::default()
    };
    let range = node_ports.range.0;
    let text = |conflict: conflicts::Conflict| {
        format!("of the NodePorts {range}, {}; {}", conflict.problem, conflict.remedy)
    };
    conflicts::find(range, &around).into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(sections: &str) -> Vec<String> {
        let text = format!(
            "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24]}}\n{sections}"
        );
        overlaps(&crate::config::parse(&text, None).unwrap().config, "32768\t60999\n", "8080\n")
    }

    #[test]
    fn each_overlap_is_said_and_nothing_else() {
        assert_eq!(warnings(""), [""; 0]);
        assert_eq!(warnings("nodePorts: {range: 30000-32767}\nportPool: {ports: 61001-61100}\n"), [""; 0]);
        let both = warnings("nodePorts: {range: 30000-32768}\nportPool: {ports: 32767-32768}\n");
        assert!(both[0].starts_with("of the NodePorts 30000-32768, 32767-32768 are in portPool"), "{both:?}");
        assert!(both[1].contains(" 32768 are in net.ipv4.ip_local_port_range"), "{both:?}");
        assert!(both[1].ends_with("ip_local_reserved_ports=8080,32768"), "{both:?}");
        assert_eq!(both.len(), 2);
    }
}
