//! `bridge-agent rules`: the rules in force with their hits.

use clap::Args;

use super::{Error, Global, print, print_json, table};
use crate::datapath::Maps;

/// List the rules in force with their hits.
#[derive(Debug, Args)]
pub struct Rules {
    /// Only rules that have decided about a flow
    #[arg(long)]
    hit: bool,
}

impl Rules {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let mut rules = Maps::open(&global.pins())?.rule_counts()?;
        rules.retain(|rule| !self.hit || rule.packets > 0);
        if global.json {
            return print_json(&rules);
        }
        let mut table = table::table(&["rule", "direction", "action", "new flows", "bytes"]);
        for rule in rules {
            table.add_row([
                rule.name,
                rule.direction,
                rule.action,
                rule.packets.to_string(),
                rule.bytes.to_string(),
            ]);
        }
        print(&table::render(&table))
    }
}
