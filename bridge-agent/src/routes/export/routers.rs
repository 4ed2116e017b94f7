//! Routers of other makers: MikroTik RouterOS 7, Cisco IOS, FRR and OpenWrt.

use std::fmt::Write;
use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::line::{ExportError, Format, Line};
use crate::routes::model::{NextHop, TABLE_MAIN};

/// Routers compare routes by distance, from 1 to 254. A metric above that is for Linux, and is left out.
const MAX_DISTANCE: u32 = 254;

/// RouterOS 7: <https://help.mikrotik.com/docs/spaces/ROS/pages/328084/IP+Routing>. Running it again replaces the routes.
pub(super) fn routeros(lines: &[Line]) -> Result<String, ExportError> {
    let format = Format::Routeros;
    let mut text = String::from(
        "# Apply with `/import file-name=FILE`; remove with the next two lines.\n\
         /ip/route/remove [find comment~\"^bridge \"]\n\
         /ipv6/route/remove [find comment~\"^bridge \"]\n",
    );
    for line in lines {
        check(line, format, false)?;
        let menu = if line.v6() { "/ipv6/route" } else { "/ip/route" };
        let mut add = |target: &str| {
            _ = write!(text, "{menu}/add dst-address={} {target}", line.to);
            if let Some(distance) = distance(line) {
                _ = write!(text, " distance={distance}");
            }
            _ = writeln!(text, " comment=\"bridge {}\"", routeros_quoted(&line.comment));
        };
        if line.via.is_empty() {
            add("blackhole");
        }
        for hop in &line.via {
            let dev = hop.dev.as_ref().map(|dev| format!("%{}", routeros_quoted(dev))).unwrap_or_default();
            add(&format!("gateway=\"{}{dev}\"", hop.via));
        }
    }
    Ok(text)
}

/// Inside double quotes, `$` begins a variable and `[` a command.
fn routeros_quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '"' | '\\' | '$' | '[' | ']' | '?') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted
}

/// Cisco IOS and IOS XE: `ip route` and `ipv6 route` of the configuration.
pub(super) fn ios(lines: &[Line]) -> Result<String, ExportError> {
    let format = Format::Ios;
    let mut text = String::from("! Paste in configuration mode. Remove with the same lines after `no`.\n");
    for line in lines {
        check(line, format, false)?;
        _ = writeln!(text, "! {}", line.comment);
        let to = match line.to {
            IpNet::V4(to) => format!("ip route {} {}", to.network(), to.netmask()),
            IpNet::V6(to) => format!("ipv6 route {to}"),
        };
        let distance = distance(line).map(|distance| format!(" {distance}")).unwrap_or_default();
        let null = ["Null0".to_owned()];
        let hops: Vec<String> = line.via.iter().map(dev_before).collect();
        for hop in if hops.is_empty() { &null[..] } else { &hops } {
            _ = writeln!(text, "{to} {hop}{distance}");
        }
    }
    Ok(text)
}

/// FRR: the configuration of staticd, <https://docs.frrouting.org/en/latest/static.html>.
pub(super) fn frr(lines: &[Line]) -> Result<String, ExportError> {
    let format = Format::Frr;
    let mut text = String::from("! Load with `vtysh -f FILE`. Remove with the same lines after `no`.\n");
    for line in lines {
        check(line, format, true)?;
        _ = writeln!(text, "! {}", line.comment);
        let to = format!("{} {}", if line.v6() { "ipv6 route" } else { "ip route" }, line.to);
        let mut rest = distance(line).map(|distance| format!(" {distance}")).unwrap_or_default();
        if line.table != TABLE_MAIN {
            _ = write!(rest, " table {}", line.table);
        }
        let blackhole = ["blackhole".to_owned()];
        let hops: Vec<String> = line.via.iter().map(dev_after).collect();
        for hop in if hops.is_empty() { &blackhole[..] } else { &hops } {
            _ = writeln!(text, "{to} {hop}{rest}");
        }
    }
    Ok(text)
}

/// OpenWrt: sections of `/etc/config/network`. `dev` is a logical interface, such as `lan`.
pub(super) fn openwrt(lines: &[Line], dev: &str) -> Result<String, ExportError> {
    let mut text = String::from(
        "# Append to /etc/config/network, then `service network reload`. Interfaces are those of that file, such as lan.\n",
    );
    for line in lines {
        line.not_mixed(Format::Openwrt)?;
        _ = writeln!(text, "\n# {}", line.comment);
        _ = writeln!(text, "config {}", if line.v6() { "route6" } else { "route" });
        let mut option = |name: &str, value: &str| {
            _ = writeln!(text, "\toption {name} '{}'", value.replace('\'', r"'\''"));
        };
        let hop = if line.via.is_empty() { None } else { Some(line.only(Format::Openwrt)?) };
        option("interface", hop.and_then(|hop| hop.dev.as_deref()).unwrap_or(dev));
        option("target", &line.to.to_string());
        match hop {
            Some(hop) => option("gateway", &hop.via.to_string()),
            None => option("type", "blackhole"),
        }
        option("metric", &line.metric.to_string());
        if line.table != TABLE_MAIN {
            option("table", &line.table.to_string());
        }
    }
    Ok(text)
}

/// DHCP option 121 (RFC 3442), which gives routes to every client of a LAN: for dnsmasq, and as hexadecimal for any other
/// server.
pub(super) fn dhcp(lines: &[Line]) -> Result<String, ExportError> {
    let format = Format::DhcpOption121;
    let mut routes = Vec::new();
    let mut bytes = Vec::new();
    for line in lines {
        let IpNet::V4(to) = line.to else {
            return Err(ExportError::Inexpressible { format, what: "the IPv6 network", to: line.to });
        };
        line.not_mixed(format)?;
        main_table(line, format)?;
        let via = line.only(format)?.via;
        routes.push(format!("{to},{via}"));
        bytes.push(to.prefix_len());
        bytes.extend(&to.network().octets()[..usize::from(to.prefix_len()).div_ceil(8)]);
        if let std::net::IpAddr::V4(via) = via {
            bytes.extend(Ipv4Addr::octets(&via));
        }
    }
    if bytes.len() > usize::from(u8::MAX) {
        return Err(ExportError::TooLong { format, length: bytes.len() });
    }
    if routes.is_empty() {
        // An empty option would take the router of option 3 from the clients.
        return Ok("# There are no routes, and no option 121.\n".to_owned());
    }
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!(
        "# A client that takes option 121 ignores option 3: add the default route, 0.0.0.0/0 and the router, where it is\n\
         # needed (RFC 3442). dnsmasq:\n\
         dhcp-option=option:classless-static-route,{}\n\
         # Any other server, option 121 as hexadecimal:\n\
         # {}\n",
        routes.join(","),
        hex.join(":")
    ))
}

/// Refuses a route with weights, with another family's next hop, or with another table unless the format has `tables`.
fn check(line: &Line, format: Format, tables: bool) -> Result<(), ExportError> {
    // FRR takes an IPv6 address in `ip route` for the name of an interface, without an error.
    line.not_mixed(format)?;
    if !tables {
        main_table(line, format)?;
    }
    if line.via.iter().any(|hop| hop.weight != line.via[0].weight) {
        return Err(ExportError::Inexpressible { format, what: "the weights", to: line.to });
    }
    Ok(())
}

fn main_table(line: &Line, format: Format) -> Result<(), ExportError> {
    if line.table == TABLE_MAIN {
        return Ok(());
    }
    Err(ExportError::Inexpressible { format, what: "the routing table", to: line.to })
}

fn distance(line: &Line) -> Option<u32> {
    (1..=MAX_DISTANCE).contains(&line.metric).then_some(line.metric)
}

fn dev_before(hop: &NextHop) -> String {
    hop.dev.as_ref().map_or_else(|| hop.via.to_string(), |dev| format!("{dev} {}", hop.via))
}

fn dev_after(hop: &NextHop) -> String {
    hop.dev.as_ref().map_or_else(|| hop.via.to_string(), |dev| format!("{} {dev}", hop.via))
}
