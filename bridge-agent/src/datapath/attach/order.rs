//! Compares the attached programs and their order with those wanted: the kernel sends no notification of either.

use crate::model::{Hook, Target};
use std::{fmt, io};

use super::super::{
    clsact,
    error::{Error, Result},
    load::Datapath,
    pins::detach,
};
use crate::kernel::bpf;

/// A program that does not see every packet of its hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Displaced {
    /// Name of the interface.
    pub interface: String,
    /// The hook.
    pub hook: Hook,
    /// What is wrong.
    pub how: Displacement,
}

/// See [`Displaced::how`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Displacement {
    /// The program is not attached.
    Missing,
    /// A program of others comes first, and decides which packets bridge sees.
    Behind,
}

impl fmt::Display for Displaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interface, hook, how } = self;
        let problem = match how {
            Displacement::Missing => "is not attached",
            Displacement::Behind => "is behind a program of others",
        };
        write!(f, "{interface} {} {problem}", hook.name())
    }
}

impl Datapath {
    /// Returns the programs that are missing, or not the first ones at their hooks.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`]: the kernel did not say. Interfaces that have gone are no error.
    pub fn displaced(&mut self, targets: &[Target]) -> Result<Vec<Displaced>> {
        let own = self.program_ids()?;
        let mut displaced = Vec::new();
        for target in targets {
            for &hook in target.role.hooks() {
                let found = if self.tcx {
                    let own = own.iter().find(|(of, _)| *of == hook).map(|(_, id)| *id);
                    bpf::tcx_programs(target.index, hook.tcx()).map(|ids| place(&ids, |id| Some(*id) == own))
                } else {
                    clsact::filters(target.index, hook.attach_type())
                        .map(|filters| place(&filters, |filter| clsact::is_own(filter.header.handle.into())))
                };
                let interface = || target.name.clone();
                match found {
                    Ok(None) => {}
                    Ok(Some(how)) => displaced.push(Displaced { interface: interface(), hook, how }),
                    Err(error) if has_gone(&error) => {}
                    Err(error) => return Err(Error::attach(&target.name, hook.name(), error)),
                }
            }
        }
        Ok(displaced)
    }

    /// Detaches the programs that others come before, so that [`Datapath::attach`] attaches them as the first ones. In between,
    /// packets pass the hook unjudged, and are judged at the other border.
    ///
    /// # Errors
    ///
    /// [`Error::Path`]. Filters of the clsact qdisc stay: their place is given by a priority that bridge's has already.
    pub fn give_way(&mut self, displaced: &[Displaced]) -> Result<()> {
        for Displaced { interface, hook, how } in displaced {
            if self.tcx && *how == Displacement::Behind {
                let path = self.pins.link(interface, *hook);
                detach(&path, self.guard.release(&path))?;
            }
        }
        Ok(())
    }
}

/// Returns what is wrong with the place of bridge's own program in a list; `None`: it is the first.
fn place<T>(programs: &[T], is_own: impl Fn(&T) -> bool) -> Option<Displacement> {
    match programs.iter().position(is_own) {
        Some(0) => None,
        Some(_) => Some(Displacement::Behind),
        None => Some(Displacement::Missing),
    }
}

fn has_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_place_is_right() {
        let own = |id: &u32| *id == 7;
        assert_eq!(place(&[7, 1], own), None);
        assert_eq!(place(&[1, 7], own), Some(Displacement::Behind));
        assert_eq!(place(&[1], own), Some(Displacement::Missing));
        assert_eq!(place(&[], own), Some(Displacement::Missing));
    }
}
