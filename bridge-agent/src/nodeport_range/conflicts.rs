//! Finds conflicts of a NodePort range with this node (pure).

use serde::Serialize;

use super::listeners::Listener;
use crate::model::{PortRange, PortSet};

/// How many listeners are named; the rest is counted.
const NAMED: usize = 8;

/// Uses of ports on this node.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// The source ports of the pool.
    pub pool: Vec<PortRange>,
    /// `net.ipv4.ip_local_port_range`.
    pub ephemeral: Option<PortRange>,
    /// `net.ipv4.ip_local_reserved_ports`: not ephemeral.
    pub reserved: Vec<PortRange>,
    /// Sockets that listen.
    pub listeners: Vec<Listener>,
    /// The NodePort of the service `kubernetes`, if kube-apiserver has one configured.
    pub own_port: Option<u16>,
}

/// Something that speaks against a range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Conflict {
    /// The conflict and its consequence.
    pub problem: String,
    /// The remedy, as an imperative clause.
    pub remedy: String,
}

/// All that speaks against `range`.
#[must_use]
pub fn find(range: PortRange, around: &Surroundings) -> Vec<Conflict> {
    let conflict = |problem: String, remedy: String| Some(Conflict { problem, remedy });
    let common = |ranges: &[PortRange]| {
        let mut common: PortSet = [range].into_iter().collect();
        common.keep_all(&ranges.iter().copied().collect());
        common
    };
    let mut found = Vec::new();

    let pool = common(&around.pool);
    found.extend((!pool.is_empty()).then(|| pool.to_string()).and_then(|ports| {
        conflict(
            format!(
                "{ports} are in portPool.ports: kube-proxy would take answers to connections from these ports for \
                 requests to a NodePort"
            ),
            "choose a range outside the pool, or take these ports out of portPool.ports first".into(),
        )
    }));

    let mut ephemeral = common(around.ephemeral.as_slice());
    ephemeral.remove_all(&around.reserved.iter().copied().collect());
    found.extend((!ephemeral.is_empty()).then(|| ephemeral.to_string()).and_then(|ports| {
        let reserved: PortSet = around.reserved.iter().copied().chain(ephemeral.ranges()).collect();
        conflict(
            format!(
                "{ports} are in net.ipv4.ip_local_port_range: the kernel gives them to programs of this node, whose \
                 connections a NodePort would cut"
            ),
            format!(
                "choose a range outside, or reserve them: sysctl -w net.ipv4.ip_local_reserved_ports={}",
                reserved
            ),
        )
    }));

    let mut listeners: Vec<&Listener> = around
        .listeners
        .iter()
        .filter(|listener| range.contains(listener.address.port()) && !listener.holds_node_ports())
        .collect();
    listeners.sort_by_key(|listener| (listener.address.port(), listener.protocol));
    let more = listeners.len().saturating_sub(NAMED);
    let named: Vec<_> = listeners.iter().take(NAMED).map(ToString::to_string).collect();
    found.extend(listeners.first().and_then(|first| {
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        conflict(
            format!(
                "something listens there ({}{more}): a service with that NodePort would take its clients",
                named.join(", ")
            ),
            format!(
                "stop it, have it listen elsewhere, or choose a range without port {}",
                first.address.port()
            ),
        )
    }));

    found.extend(around.own_port.filter(|port| !range.contains(*port)).and_then(|port| {
        conflict(
            format!("--kubernetes-service-node-port={port} is outside: kube-apiserver would not start"),
            "choose a range that holds it, or change that flag first".into(),
        )
    }));
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodeport_range::listeners::Protocol;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    fn listener(port: u16, command: Option<&str>) -> Listener {
        Listener {
            protocol: Protocol::Tcp,
            address: ([0, 0, 0, 0], port).into(),
            inode: 1,
            owner: command.map(|command| (7, command.to_owned())),
        }
    }

    #[test]
    fn a_range_that_touches_nothing_is_free_at_both_ends() {
        let around = Surroundings {
            pool: vec![range(61001, 61100)],
            ephemeral: Some(range(32768, 60999)),
            reserved: vec![],
            listeners: vec![
                listener(29999, None),
                listener(32768, None),
                listener(30080, Some("kube-proxy")),
            ],
            own_port: Some(32767),
        };
        assert_eq!(find(range(30000, 32767), &around), []);
        // One port more on either side meets one thing each.
        let problems = |range| find(range, &around).iter().map(|c| c.problem.clone()).collect::<Vec<_>>();
        let below = problems(range(29999, 32767));
        assert!(below.len() == 1 && below[0].contains("TCP 0.0.0.0:29999"), "{below:?}");
        let above = problems(range(30000, 32768));
        assert!(above.len() == 2 && above[0].starts_with("32768 are in net.ipv4.ip_local"), "{above:?}");
        assert!(problems(range(61100, 61200))[0].starts_with("61100 are in portPool"), "pool");
        let without = problems(range(30000, 32766));
        assert!(
            without.len() == 1 && without[0].contains("kubernetes-service-node-port=32767"),
            "{without:?}"
        );
    }

    #[test]
    fn reserved_ports_are_not_ephemeral() {
        let mut around = Surroundings { ephemeral: Some(range(32768, 60999)), ..Surroundings::default() };
        around.reserved = vec![range(8080, 8080), range(40000, 40009)];
        assert_eq!(find(range(40000, 40009), &around), []);
        let found = find(range(40000, 40010), &around);
        assert!(found[0].problem.starts_with("40010 are"), "{found:?}");
        assert!(found[0].remedy.ends_with("ip_local_reserved_ports=8080,40000-40010"), "{found:?}");
    }

    #[test]
    fn many_listeners_are_counted_and_the_first_ones_named() {
        let listeners = (0..10).map(|i| listener(30009 - i, Some("sshd"))).collect();
        let found = find(range(30000, 30009), &Surroundings { listeners, ..Surroundings::default() });
        let problem = &found[0].problem;
        assert!(problem.contains("0.0.0.0:30007 (sshd, pid 7) and 2 more"), "{problem}");
        assert!(!problem.contains("30008"), "{problem}");
        assert!(found[0].remedy.ends_with("without port 30000"), "{found:?}");
    }
}
