//! BIRD 2 (<https://bird.nic.cz/doc/bird-2.17.1.html>, "Static").

use std::fmt::Write;

use super::line::Line;
use crate::routes::model::TABLE_MAIN;

/// One static protocol for each address family. BIRD's kernel protocol decides table and metric on export, so they
/// are stated as a remark and set as attribute.
pub(super) fn config(lines: &[Line]) -> String {
    let mut text = String::from(
        "# Include this from bird.conf, beside a kernel protocol for each family (metric 0 lets krt_metric through):\n\
         # protocol kernel { ipv4 { export where source = RTS_STATIC; }; metric 0; merge paths on; }\n\
         # protocol kernel { ipv6 { export where source = RTS_STATIC; }; metric 0; merge paths on; }\n",
    );
    for (v6, family) in [(false, "ipv4"), (true, "ipv6")] {
        let mut lines = lines.iter().filter(|line| line.v6() == v6).peekable();
        if lines.peek().is_none() {
            continue;
        }
        _ = writeln!(text, "\nprotocol static bridge_{family} {{\n\t{family};");
        for line in lines {
            _ = write!(text, "\t# {}", line.comment);
            if line.table != TABLE_MAIN {
                _ = write!(text, "; meant for kernel table {}", line.table);
            }
            _ = write!(text, "\n\troute {}", line.to);
            if line.via.is_empty() {
                text.push_str(" blackhole");
            }
            for hop in &line.via {
                _ = write!(text, " via {}", hop.via);
                if let Some(dev) = &hop.dev {
                    // A quoted symbol: interface names have dots and dashes.
                    _ = write!(text, "%'{dev}'");
                }
                if line.via.len() > 1 {
                    _ = write!(text, " weight {}", hop.weight);
                }
            }
            _ = writeln!(text, " {{ krt_metric = {}; }};", line.metric);
        }
        text.push_str("}\n");
    }
    text
}
