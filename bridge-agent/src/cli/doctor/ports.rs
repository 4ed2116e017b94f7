//! The port pool against other users of ports.

use super::{context::Context, finding::Finding};
use crate::{
    config::Config,
    model::{PortRange, PortSet},
    nodeport_range::listeners,
    pool::checks,
};

/// The default of kube-apiserver's `--service-node-port-range`.
const NODE_PORTS: PortRange = PortRange { first: 30_000, last: 32_767 };

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    const CHECK: &str = "ports";
    let Some(pool) = context.config.as_ref().and_then(|config| config.port_pool.as_ref()) else {
        return vec![Finding::not_run(CHECK, "no portPool is configured")];
    };
    let ports: PortSet = pool.available().into_iter().collect();
    let mut findings: Vec<Finding> = checks::look(&ports)
        .into_iter()
        .filter(|warning| !(warning.masquerade && pool.masquerade))
        .map(|warning| Finding::warn(name(&warning.problem), warning.problem, warning.remedy))
        .collect();
    if findings.is_empty() {
        findings.push(Finding::ok("ports.settings", "no port of the pool is given to other programs"));
    }
    findings.push(occupied(&ports));
    findings.extend(context.node().map(|config| node_ports(config, &ports)));
    findings
}

/// Compares with the range that the cluster takes NodePorts from.
fn node_ports(config: &Config, ports: &PortSet) -> Finding {
    const CHECK: &str = "ports.node-ports";
    let range = config.node_ports.as_ref().map_or(NODE_PORTS, |node_ports| node_ports.range.0);
    match (range.first..=range.last).filter(|port| ports.contains(*port)).count() {
        0 => Finding::ok(CHECK, format!("the pool has no port of the NodePort range {range}")),
        count => Finding::warn(
            CHECK,
            format!("{count} ports of the pool are in the NodePort range {range}"),
            "an answer to such a port can be taken for a request to a NodePort: take others in portPool.ports",
        ),
    }
}

/// Name of the check that a problem belongs to.
fn name(problem: &str) -> &'static str {
    match problem {
        text if text.contains("tcp_timestamps") => "ports.timestamps",
        text if text.contains("ip_local_port_range") => "ports.ephemeral",
        _ => "ports.masquerade",
    }
}

fn occupied(ports: &PortSet) -> Finding {
    const CHECK: &str = "ports.listeners";
    match listeners::read(|port| ports.contains(port)) {
        Err(error) => Finding::not_run(CHECK, format!("sockets cannot be listed: {error}")),
        Ok(listeners) => match listeners.first() {
            None => Finding::ok(CHECK, "no program listens on a port of the pool"),
            Some(first) => Finding::warn(
                CHECK,
                format!("{} sockets on ports of the pool, such as {first}", listeners.len()),
                "the pool cannot give these ports: move the program to another port, or take the port out of portPool.ports",
            ),
        },
    }
}
