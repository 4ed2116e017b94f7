//! Programs of others at the hooks that bridge is at.
//!
//! A packet that takes the fast path does not meet those behind bridge's own where it comes in, nor, if it goes straight
//! to the other end of an interface, any of those where it would go out.

use crate::kernel::bpf;
use std::{io, os::fd::AsFd as _};

use bridge_common::filter::fast_path::ability;
use netlink_packet_route::tc::TcMessage;

use super::{
    clsact,
    error::{Error, Result},
    load::Datapath,
    pins::Pins,
};
use crate::model::{Hook, Role, Target};

impl Datapath {
    /// Lets packets take the fast path by those interfaces that allow it: none where a program of others must see them.
    /// Call after [`Datapath::attach`], and again from time to time, since the kernel sends no notification of
    /// programs.
    ///
    /// Returns the abilities of each interface, bits of [`ability`], in the order of `targets`.
    ///
    /// # Errors
    ///
    /// [`Error::Map`], [`Error::Attach`]. Abilities that could not be determined are not allowed.
    pub fn allow_fast_path(&mut self, targets: &[Target]) -> (Vec<u32>, Result<()>) {
        let mut errors = Vec::new();
        let mut changed = false;
        let mut abilities = Vec::with_capacity(targets.len());
        let own = if self.tcx { self.program_ids() } else { Ok(Vec::new()) };
        let own = own.map_err(|error| errors.push(error)).ok();
        for target in targets {
            let ability = own.as_ref().map_or(Ok(0), |own| self.ability(target, own));
            let fast_path = ability.unwrap_or_else(|error| {
                errors.push(error);
                0
            });
            abilities.push(fast_path);
            let found = self.maps.interfaces.get(&target.index, 0);
            let wanted = target.entry(fast_path, found.as_ref().map_or(0, |found| found.bound));
            match found {
                Ok(found) if found == wanted => continue,
                _ => {}
            }
            changed = true;
            if let Err(error) = self.maps.interfaces.insert(target.index, wanted, 0) {
                errors.push(Error::aya_map("interfaces")(error));
            }
        }
        if changed {
            self.maps.fast_path().forget_paths();
        }
        (abilities, Error::collect(errors))
    }

    fn ability(&self, target: &Target, own: &[(Hook, u32)]) -> Result<u32> {
        if target.fast_path == 0 || target.role == Role::Gateway {
            return Ok(0);
        }
        let (ingress, egress) = match target.role {
            Role::External => (Hook::ExternalIngress, Hook::ExternalEgress),
            Role::Internal | Role::Bridge | Role::Gateway => (Hook::InternalIngress, Hook::InternalEgress),
            // Packets to the pod leave by the bridge.
            Role::Port => (Hook::InternalIngress, Hook::InternalIngress),
        };
        let mut fast_path = target.fast_path;
        if self.foreign(target, ingress, own)?.behind {
            fast_path &= !ability::INPUT;
        }
        if fast_path & ability::PEER != 0 && self.foreign(target, egress, own)?.any {
            fast_path &= !ability::PEER;
        }
        Ok(fast_path)
    }

    fn foreign(&self, target: &Target, hook: Hook, own: &[(Hook, u32)]) -> Result<Foreign> {
        let failed = |error: io::Error| Error::attach(&target.name, hook.name(), error);
        let filters = foreign_filters(target.index, hook).map_err(failed)?;
        let mut foreign = Foreign { behind: filters, any: filters };
        if self.tcx {
            let own = own.iter().find(|(of, _)| *of == hook).map(|(_, id)| *id);
            let ids = bpf::tcx_programs(target.index, hook.tcx()).map_err(failed)?;
            let place = ids.iter().position(|id| Some(*id) == own);
            foreign.any |= ids.len() > 1;
            // Where bridge's own program is missing, everything is behind it.
            foreign.behind |= place.is_none_or(|place| place + 1 < ids.len());
        }
        Ok(foreign)
    }
}

/// Counts programs of others that see packets before bridge's own, over the hooks of an interface. None of them counts where
/// bridge is not attached: it attaches itself before them.
///
/// # Errors
///
/// Of `bpf(2)` and netlink.
pub fn programs_before(pins: &Pins, target: &Target) -> io::Result<usize> {
    let mut before = 0;
    for hook in target.role.hooks() {
        let own = match bpf::obj_get(&pins.link(&target.name, *hook)) {
            Ok(link) => Some(bpf::tcx_link_info(link.as_fd())?.0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        before += match own {
            Some(own) => {
                let ids = bpf::tcx_programs(target.index, hook.tcx())?;
                ids.iter().position(|id| *id == own).unwrap_or(0)
            }
            None => {
                let filters = clsact::filters(target.index, hook.attach_type())?;
                let own = |filter: &&TcMessage| clsact::is_own(filter.header.handle.into());
                filters.iter().position(|filter| own(&filter)).unwrap_or(0)
            }
        };
    }
    Ok(before)
}

/// Whether there are programs of others at a hook.
struct Foreign {
    /// Behind bridge's own.
    behind: bool,
    /// Wherever.
    any: bool,
}

/// Whether the clsact or ingress qdisc has filters that are not bridge's.
fn foreign_filters(index: u32, hook: Hook) -> io::Result<bool> {
    let filters = clsact::filters(index, hook.attach_type())?;
    Ok(filters.iter().any(|filter| !clsact::is_own(filter.header.handle.into())))
}
