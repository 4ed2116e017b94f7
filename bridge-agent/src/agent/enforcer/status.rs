//! The state of the packet path as the status shows it.

use super::{Enforcer, names};
use crate::{
    datapath::Published,
    state::{AttachedInterface, Enforcement},
};

impl Enforcer {
    pub(in crate::agent) fn status(&self) -> Enforcement {
        let interfaces = self
            .chosen
            .targets
            .iter()
            .zip(self.abilities.iter().chain(std::iter::repeat(&0)))
            .map(|(target, abilities)| AttachedInterface {
                name: target.name.clone(),
                index: target.index,
                role: if target.tunnel {
                    "tunnel".to_owned()
                } else {
                    format!("{:?}", target.role).to_lowercase()
                },
                fast_path: names(*abilities),
                xdp: self.shields.get(&target.index).map(ToString::to_string),
            })
            .collect();
        Enforcement {
            mode: if self.desired.behaviour.audit { "audit" } else { "enforce" }.to_owned(),
            generation: self.generation(),
            tables: self.stats,
            switched_in_us: match self.published {
                Some(Published::Switched { took, .. }) => u64::try_from(took.as_micros()).ok(),
                _ => None,
            },
            mechanism: if self.datapath.uses_tcx() { "tcx" } else { "clsact" }.to_owned(),
            adopted: self.datapath.adopted(),
            seeded: self.seeded,
            interfaces,
            fast_path: self.fast_path.status().clone(),
            pins_restored: self.pins_restored,
            programs_restored: self.programs_restored,
            displaced: self.displaced.iter().map(ToString::to_string).collect(),
            misled: self.chosen.misled.clone(),
            remarks: self.unpinned.iter().chain(&self.chosen.remarks).cloned().collect(),
        }
    }
}
