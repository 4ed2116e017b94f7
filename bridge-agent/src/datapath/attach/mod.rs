//! Attaches the programs to interfaces, first in order, and keeps them there.
//!
//! Attached programs live on without the agent: a TCX link by its pin, a clsact filter by itself. A start adopts them
//! and replaces the program inside, so there is no moment without enforcement.

pub(super) mod order;
mod plan;

use crate::kernel::bpf;
use std::{io, os::fd::AsFd, path::Path};

use aya::programs::{
    ProgramError,
    links::{FdLink, LinkError, PinnedLink},
    tc::SchedClassifierLink,
};
use rustix::fs::{CWD, RenameFlags};

use self::plan::{Link, Step, plan};
use super::{
    change::{Action, Change},
    clsact,
    error::{Error, Result, errno},
    load::{Datapath, program},
    pins::{Attached, attached_link, detach, pinned_program},
};
use crate::kernel::netlink::interface_name;
use crate::kernel::pins;
use crate::model::{Hook, Target};

impl Datapath {
    /// Attaches to exactly these interfaces; may be called whenever anything changes. Errors with one interface do not
    /// affect the others.
    ///
    /// # Errors
    ///
    /// [`Error::Attach`] and [`Error::Path`], more than one in [`Error::Several`]; the other operations are done.
    pub fn attach(&mut self, targets: &[Target]) -> (Vec<Change>, Result<()>) {
        let mut changes = Vec::new();
        let mut errors = Vec::new();
        if let Err(error) = self.write_interfaces(targets) {
            return (changes, Err(error));
        }
        let wanted: Vec<(Target, Hook)> = targets
            .iter()
            .flat_map(|target| target.role.hooks().iter().map(|hook| (target.clone(), *hook)))
            .collect();
        if self.tcx {
            self.attach_links(&wanted, &mut changes, &mut errors);
            self.remove_filters(|_, _| false, &mut changes, &mut errors);
        } else {
            self.attach_filters(&wanted, &mut changes, &mut errors);
        }
        if let Err(error) = self.forget_interfaces(targets) {
            errors.push(error);
        }
        (changes, Error::collect(errors))
    }

    /// Writes the properties of each interface before the kernel side sees a packet of it.
    fn write_interfaces(&mut self, targets: &[Target]) -> Result<()> {
        targets.iter().try_for_each(|target| {
            // Allowed abilities and bound families stay until the next check.
            let known = self.maps.interfaces.get(&target.index, 0).unwrap_or_default();
            let value = target.entry(known.fast_path, known.bound);
            self.maps.interfaces.insert(target.index, value, 0).map_err(Error::aya_map("interfaces"))
        })
    }

    fn forget_interfaces(&mut self, targets: &[Target]) -> Result<()> {
        let known: Vec<u32> =
            self.maps.interfaces.keys().collect::<Result<_, _>>().map_err(Error::aya_map("interfaces"))?;
        for index in known.into_iter().filter(|index| targets.iter().all(|target| target.index != *index)) {
            match self.maps.interfaces.remove(&index).map_err(Error::aya_map("interfaces")) {
                Err(Error::Map { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn attach_links(
        &mut self,
        wanted: &[(Target, Hook)],
        changes: &mut Vec<Change>,
        errors: &mut Vec<Error>,
    ) {
        let (links, current) = match (self.links(), self.program_ids()) {
            (Ok(links), Ok(current)) => (links, current),
            (links, current) => {
                errors.extend(links.err());
                errors.extend(current.err());
                return;
            }
        };
        let current = |hook: Hook| current.iter().find(|(of, _)| *of == hook).map_or(0, |(_, id)| *id);
        for step in plan(wanted, links, current, |interface, hook| self.pins.link(interface, hook)) {
            crate::fault::point("attach:step");
            let about = step.interface().to_owned();
            match self.apply(step, wanted) {
                Ok(change) => changes.push(change),
                Err(error) if has_gone(wanted, &about) => tell_gone(&about, &error),
                Err(error) => errors.push(error),
            }
        }
    }

    fn links(&self) -> Result<Vec<Link>> {
        self.guard
            .within(&self.pins.links())
            .filter_map(|(path, link)| Some((attached_link(path.to_owned())?, link)))
            .map(|(Attached { path, interface, hook, .. }, link)| {
                let (program, index) = bpf::tcx_link_info(link).map_err(Error::path("looking at", &path))?;
                Ok(Link { path, interface, hook, index, program })
            })
            .collect()
    }

    pub(super) fn program_ids(&mut self) -> Result<Vec<(Hook, u32)>> {
        Hook::ALL
            .into_iter()
            .map(|hook| {
                let info = program(&mut self.ebpf, hook)?
                    .info()
                    .map_err(|error| super::error::program_error(hook.name(), error))?;
                Ok((hook, info.id()))
            })
            .collect()
    }

    fn apply(&mut self, step: Step, wanted: &[(Target, Hook)]) -> Result<Change> {
        let change = |interface: String, hook, action| Ok(Change { interface, hook, action });
        // 0 is that of no interface.
        let index = |name: &str| {
            wanted.iter().find(|(target, _)| target.name == name).map_or(0, |(target, _)| target.index)
        };
        match step {
            Step::Forget(link) | Step::Detach(link) => {
                detach(&link.path, self.guard.release(&link.path))?;
                change(link.interface, link.hook, Action::Removed)
            }
            Step::Rename(link, path, interface) => {
                // Overwriting another pin would detach its link.
                rustix::fs::renameat_with(CWD, &link.path, CWD, &path, RenameFlags::NOREPLACE)
                    .map_err(|error| Error::path("renaming", &link.path)(error.into()))?;
                if let Some(kept) = self.guard.release(&link.path) {
                    self.guard.keep(path, kept);
                }
                change(interface, link.hook, Action::Renamed)
            }
            Step::Replace(link) => match self.replace(&link.path, link.hook) {
                Ok(()) => change(link.interface, link.hook, Action::Replaced),
                // The interface has gone, and come again, since it was looked at.
                Err(error) if errno(&error) == Some(libc::ENOLINK) => {
                    self.guard.release(&link.path);
                    pins::remove(&link.path)?;
                    self.attach_link((&link.interface, index(&link.interface)), link.hook, &link.path)?;
                    change(link.interface, link.hook, Action::Attached)
                }
                Err(error) => Err(Error::attach(&link.interface, link.hook.name(), error)),
            },
            Step::Attach(interface, hook, path) => {
                self.attach_link((&interface, index(&interface)), hook, &path)?;
                change(interface, hook, Action::Attached)
            }
        }
    }

    fn replace(&mut self, path: &Path, hook: Hook) -> std::result::Result<(), ProgramError> {
        let link_error = |error: LinkError| match error {
            LinkError::SyscallError(error) => ProgramError::SyscallError(error),
            error => ProgramError::IOError(io::Error::other(error)),
        };
        let program =
            program(&mut self.ebpf, hook).map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
        let link: FdLink = PinnedLink::from_pin(path).map_err(link_error)?.into();
        let link: SchedClassifierLink = link.try_into().map_err(link_error)?;
        let id = program.attach_to_link(link)?;
        // Dropping the descriptor leaves the link to its pin.
        drop(program.take_link(id)?);
        Ok(())
    }

    fn attach_link(&mut self, (interface, index): (&str, u32), hook: Hook, path: &Path) -> Result<()> {
        let program = program(&mut self.ebpf, hook)?;
        let program = program
            .fd()
            .map_err(|error| Error::attach(interface, hook.name(), super::error::chain(&error)))?;
        let link = bpf::tcx_attach(program.as_fd(), index, hook.tcx())
            .map_err(|error| Error::attach(interface, hook.name(), error))?;
        // A process that dies before the pin is made leaves nothing attached. If the pin cannot be made, the interface
        // is judged nevertheless, for as long as this process lives.
        let pinned = bpf::obj_pin(link.as_fd(), path);
        self.guard.keep(path.to_owned(), link);
        pinned.map_err(Error::path("pinning", path))
    }

    fn attach_filters(
        &mut self,
        wanted: &[(Target, Hook)],
        changes: &mut Vec<Change>,
        errors: &mut Vec<Error>,
    ) {
        for (target, hook) in wanted {
            match self.attach_filter(target, *hook) {
                Ok(Some(action)) => {
                    changes.push(Change { interface: target.name.clone(), hook: *hook, action })
                }
                Ok(None) => {}
                Err(error) if has_gone(wanted, &target.name) => tell_gone(&target.name, &error),
                Err(error) => errors.push(error),
            }
        }
        self.remove_filters(
            |index, hook| wanted.iter().any(|(target, wanted)| (target.index, *wanted) == (index, hook)),
            changes,
            errors,
        );
    }

    fn attach_filter(&mut self, target: &Target, hook: Hook) -> Result<Option<Action>> {
        let failed =
            |error: ProgramError| Error::attach(&target.name, hook.name(), super::error::chain(&error));
        let path = self.pins.filter(target.index, &target.name, hook);
        let qdisc = self.pins.qdisc(target.index, &target.name);
        clsact::ensure_qdisc(&target.name, &qdisc)
            .map_err(|error| Error::attach(&target.name, hook.name(), error))?;
        if qdisc.exists() {
            self.guard.keep_directory(&qdisc);
        }
        let program = program(&mut self.ebpf, hook)?;
        let id = program.info().map_err(failed)?.id();
        let action = clsact::put(&self.pins, program, id, target, hook)?;
        if action.is_none() && pinned_program(&path) == Some(id) {
            return Ok(None);
        }
        pins::remove(&path)?;
        program
            .pin(&path)
            .map_err(|error| Error::attach(&target.name, hook.name(), super::error::chain(&error)))?;
        self.guard.keep_pinned(path)?;
        Ok(Some(action.unwrap_or(Action::Replaced)))
    }

    fn remove_filters(
        &mut self,
        keep: impl Fn(u32, Hook) -> bool,
        changes: &mut Vec<Change>,
        errors: &mut Vec<Error>,
    ) {
        match self.pins.attached_filters() {
            Ok(filters) => {
                for filter in
                    filters.into_iter().filter(|filter| !keep(filter.index.unwrap_or(0), filter.hook))
                {
                    self.guard.release(&filter.path);
                    match clsact::remove(&self.pins, &filter) {
                        Ok(()) => changes.push(Change {
                            interface: filter.interface,
                            hook: filter.hook,
                            action: Action::Removed,
                        }),
                        Err(error) => errors.push(error),
                    }
                }
            }
            Err(error) => errors.push(error),
        }
    }
}

/// Returns whether an interface has changed since it was chosen. The watch of interfaces is notified, and chooses
/// again; a pod that ends in this moment prevents no start.
fn has_gone(wanted: &[(Target, Hook)], name: &str) -> bool {
    let target = wanted.iter().find(|(target, _)| target.name == name);
    target.is_some_and(|(target, _)| interface_name(target.index).as_deref() != Some(name))
}

fn tell_gone(interface: &str, error: &Error) {
    tracing::debug!(interface, %error, "the interface has gone");
}
