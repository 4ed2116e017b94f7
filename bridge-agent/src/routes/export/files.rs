//! Files of the programs that configure networks on Linux.

use std::fmt::Write;

use super::line::{ExportError, Format, Line};
use crate::routes::model::{PROTOCOL, TABLE_MAIN};

/// systemd.network(5), `[Route]`.
pub(super) fn systemd_networkd(lines: &[Line], dev: &str) -> Result<String, ExportError> {
    let mut text = format!(
        "# /etc/systemd/network/10-{dev}.network.d/bridge.conf, beside the `.network` file of {dev}; then `networkctl reload`.\n"
    );
    for line in lines {
        _ = write!(text, "\n# {}\n[Route]\nDestination={}\n", line.comment, line.to);
        match line.via.as_slice() {
            [] => text.push_str("Type=blackhole\n"),
            [only] => _ = writeln!(text, "Gateway={}", only.via),
            several => {
                for hop in several {
                    let dev = hop.dev.as_ref().map(|dev| format!("@{dev}")).unwrap_or_default();
                    _ = writeln!(text, "MultiPathRoute={}{dev} {}", hop.via, hop.weight);
                }
            }
        }
        _ = write!(text, "Metric={}\nTable={}\nProtocol={PROTOCOL}\n", line.metric, line.table);
    }
    Ok(text)
}

/// <https://netplan.readthedocs.io/en/stable/netplan-yaml/>, `routes`.
pub(super) fn netplan(lines: &[Line], dev: &str) -> Result<String, ExportError> {
    let mut text = format!(
        "# /etc/netplan/90-bridge.yaml, mode 600; then `netplan apply`. For an interface that is not Ethernet write its section instead.\nnetwork:\n  version: 2\n  ethernets:\n    {}:\n      routes:\n",
        serde_json::Value::from(dev)
    );
    for line in lines {
        line.not_mixed(Format::Netplan)?;
        _ = write!(text, "        # {}\n        - to: \"{}\"\n", line.comment, line.to);
        if line.via.is_empty() {
            text.push_str("          type: blackhole\n");
        } else {
            _ = writeln!(text, "          via: \"{}\"", line.only(Format::Netplan)?.via);
        }
        _ = writeln!(text, "          metric: {}", line.metric);
        if line.table != TABLE_MAIN {
            _ = writeln!(text, "          table: {}", line.table);
        }
    }
    Ok(text)
}

/// nm-settings-keyfile(5), `routeN` and `routeN_options`.
pub(super) fn network_manager(lines: &[Line]) -> Result<String, ExportError> {
    let mut text = String::from(
        "# For /etc/NetworkManager/system-connections/NAME.nmconnection, into the sections of the same name; then\n# `nmcli connection reload` and `nmcli device reapply DEV`. Numbers go on from those that are there.\n",
    );
    for (v6, section) in [(false, "ipv4"), (true, "ipv6")] {
        let mut lines = lines.iter().filter(|line| line.v6() == v6).enumerate().peekable();
        if lines.peek().is_none() {
            continue;
        }
        _ = writeln!(text, "\n[{section}]");
        for (index, line) in lines {
            line.not_mixed(Format::NetworkManager)?;
            let number = index + 1;
            let mut options = format!("table={}", line.table);
            let gateway = if line.via.is_empty() {
                options.push_str(",type=blackhole");
                // NetworkManager itself writes this where there is no next hop but a metric.
                if v6 { "::".to_owned() } else { "0.0.0.0".to_owned() }
            } else {
                line.only(Format::NetworkManager)?.via.to_string()
            };
            _ = write!(
                text,
                "# {}\nroute{number}={},{gateway},{}\nroute{number}_options={options}\n",
                line.comment, line.to, line.metric
            );
        }
    }
    Ok(text)
}

/// network-scripts of RHEL and its relatives: lines of `ip route add`.
pub(super) fn ifcfg(lines: &[Line], dev: &str) -> Result<String, ExportError> {
    let mut text = String::new();
    for (v6, prefix) in [(false, "route"), (true, "route6")] {
        let mut lines = lines.iter().filter(|line| line.v6() == v6).peekable();
        if lines.peek().is_none() {
            continue;
        }
        if !text.is_empty() {
            text.push('\n');
        }
        _ = writeln!(text, "# /etc/sysconfig/network-scripts/{prefix}-{dev}; then `ifup {dev}`.");
        for line in lines {
            _ = writeln!(text, "# {}", line.comment);
            let (kind, hops) = match line.via.as_slice() {
                [] => ("blackhole ", String::new()),
                [only] => (
                    "",
                    format!(" via {}{} dev {}", family(line), only.via, only.dev.as_deref().unwrap_or(dev)),
                ),
                several => {
                    let hop = |hop: &crate::routes::NextHop| {
                        format!(
                            " nexthop via {} dev {} weight {}",
                            hop.via,
                            hop.dev.as_deref().unwrap_or(dev),
                            hop.weight
                        )
                    };
                    line.not_mixed(Format::Ifcfg)?;
                    ("", several.iter().map(hop).collect())
                }
            };
            _ = writeln!(
                text,
                "{kind}{} proto {PROTOCOL} metric {} table {}{hops}",
                line.to, line.metric, line.table
            );
        }
    }
    Ok(text)
}

fn family(line: &Line) -> &'static str {
    if line.mixed() { "inet6 " } else { "" }
}
