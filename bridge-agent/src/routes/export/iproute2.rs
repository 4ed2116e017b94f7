//! `ip -batch`.

use std::fmt::Write;

use ipnet::IpNet;

use super::line::Line;
use crate::routes::model::{NextHop, PROTOCOL};

/// `replace`, so that the same batch can be run again; with our protocol number, so that an agent that comes later
/// takes the routes over.
pub(super) fn batch(lines: &[Line]) -> String {
    let mut text = format!(
        "# Apply with `ip -batch FILE`; take away with `ip route flush proto {PROTOCOL}` and `ip -6 route flush proto {PROTOCOL}`.\n"
    );
    for line in lines {
        _ = writeln!(text, "# {}", line.comment);
        let kind = if line.via.is_empty() { "blackhole " } else { "" };
        _ = write!(
            text,
            "route replace {kind}{} proto {PROTOCOL} metric {} table {}",
            line.to, line.metric, line.table
        );
        match line.via.as_slice() {
            [only] => text.push_str(&hop(line.to, only)),
            several => {
                for one in several {
                    _ = write!(text, " nexthop{} weight {}", hop(line.to, one), one.weight);
                }
            }
        }
        text.push('\n');
    }
    text
}

fn hop(to: IpNet, hop: &NextHop) -> String {
    let family = if matches!(to, IpNet::V4(_)) && hop.via.is_ipv6() { "inet6 " } else { "" };
    let dev = hop.dev.as_ref().map(|dev| format!(" dev {dev}")).unwrap_or_default();
    format!(" via {family}{}{dev}", hop.via)
}
