//! Plans the operations that attach exactly the desired programs: a pure function `(desired, observed) -> operations`.

use std::{collections::BTreeSet, path::PathBuf};

use crate::model::{Hook, Target};

/// A pinned link, as found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) path: PathBuf,
    pub(super) interface: String,
    pub(super) hook: Hook,
    /// Index of the interface; 0: it is gone.
    pub(super) index: u32,
    /// Id of the program in it.
    pub(super) program: u32,
}

/// An operation towards the desired state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Forget a link whose interface is gone.
    Forget(Link),
    Rename(Link, PathBuf, String),
    Replace(Link),
    Attach(String, Hook, PathBuf),
    Detach(Link),
}

/// Returns the operations that attach exactly `wanted`, each with the program whose id `current` gives.
pub(super) fn plan(
    wanted: &[(Target, Hook)],
    links: Vec<Link>,
    current: impl Fn(Hook) -> u32,
    path_of: impl Fn(&str, Hook) -> PathBuf,
) -> Vec<Step> {
    let (alive, gone): (Vec<Link>, Vec<Link>) = links.into_iter().partition(|link| link.index != 0);
    let mut replace = Vec::new();
    let mut rename = Vec::new();
    let mut unwanted = Vec::new();
    let mut kept = BTreeSet::new();
    for link in alive {
        let target = wanted.iter().find(|(target, hook)| target.index == link.index && *hook == link.hook);
        match target {
            Some((target, hook)) if kept.insert((target.index, *hook)) => {
                if link.program != current(*hook) {
                    replace.push(Step::Replace(link.clone()));
                }
                let path = path_of(&target.name, *hook);
                if link.path != path {
                    rename.push((link, path, target.name.clone()));
                }
            }
            _ => unwanted.push(link),
        }
    }
    let attach = wanted
        .iter()
        .filter(|(target, hook)| !kept.contains(&(target.index, *hook)))
        .map(|(target, hook)| Step::Attach(target.name.clone(), *hook, path_of(&target.name, *hook)));
    // Unwanted attachments are removed last, unless their pin is in the way of another.
    let taken: BTreeSet<PathBuf> =
        rename.iter().map(|(_, to, _)| to.clone()).chain(attach.clone().filter_map(Step::pin)).collect();
    let (in_the_way, last): (Vec<Link>, Vec<Link>) =
        unwanted.into_iter().partition(|link| taken.contains(&link.path));
    gone.into_iter()
        .map(Step::Forget)
        .chain(replace)
        .chain(in_the_way.into_iter().map(Step::Detach))
        .chain(rename.into_iter().map(|(link, to, name)| Step::Rename(link, to, name)))
        .chain(attach)
        .chain(last.into_iter().map(Step::Detach))
        .collect()
}

impl Step {
    /// Name of the interface that this is about.
    pub(super) fn interface(&self) -> &str {
        match self {
            Self::Attach(interface, ..) | Self::Rename(_, _, interface) => interface,
            Self::Forget(link) | Self::Replace(link) | Self::Detach(link) => &link.interface,
        }
    }

    /// The pin that this makes.
    fn pin(self) -> Option<PathBuf> {
        match self {
            Self::Attach(_, _, path) | Self::Rename(_, path, _) => Some(path),
            Self::Forget(_) | Self::Replace(_) | Self::Detach(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Role;

    const NEW: u32 = 9;

    fn target(index: u32, name: &str) -> Target {
        Target {
            index,
            name: name.to_owned(),
            role: Role::External,
            link_header: 14,
            fast_path: 0,
            upper: 0,
            tunnel: false,
        }
    }

    fn link(name: &str, index: u32, program: u32) -> Link {
        let (interface, hook) = (name.to_owned(), Hook::ExternalIngress);
        Link { path: path(name, hook), interface, hook, index, program }
    }

    fn path(name: &str, hook: Hook) -> PathBuf {
        format!("/l/{name}-{}", hook.name()).into()
    }

    fn steps(wanted: &[Target], links: Vec<Link>) -> Vec<Step> {
        let wanted: Vec<_> = wanted.iter().map(|target| (target.clone(), Hook::ExternalIngress)).collect();
        plan(&wanted, links, |_| NEW, path)
    }

    #[test]
    fn what_is_as_wanted_is_left_alone() {
        assert_eq!(steps(&[target(1, "eth0")], vec![link("eth0", 1, NEW)]), []);
    }

    #[test]
    fn an_adopted_link_gets_the_new_program_and_is_not_detached() {
        let old = link("eth0", 1, 8);
        assert_eq!(steps(&[target(1, "eth0")], vec![old.clone()]), [Step::Replace(old)]);
    }

    #[test]
    fn a_recreated_interface_is_attached_afresh() {
        let dead = link("eth0", 0, NEW);
        let hook = Hook::ExternalIngress;
        let attach = Step::Attach("eth0".into(), hook, path("eth0", hook));
        assert_eq!(steps(&[target(2, "eth0")], vec![dead.clone()]), [Step::Forget(dead), attach]);
    }

    #[test]
    fn a_renamed_interface_keeps_its_link() {
        let old = link("eth0", 1, 8);
        let to = path("lan0", Hook::ExternalIngress);
        let expected = [Step::Replace(old.clone()), Step::Rename(old.clone(), to, "lan0".into())];
        assert_eq!(steps(&[target(1, "lan0")], vec![old]), expected);
    }

    #[test]
    fn an_unwanted_link_in_the_way_of_a_name_goes_first() {
        let (stays, goes) = (link("eth0", 1, NEW), link("lan0", 2, NEW));
        let expected = [
            Step::Detach(goes.clone()),
            Step::Rename(stays.clone(), path("lan0", Hook::ExternalIngress), "lan0".into()),
        ];
        assert_eq!(steps(&[target(1, "lan0")], vec![stays, goes]), expected);
    }

    #[test]
    fn new_links_come_before_old_ones_go() {
        let old = link("eth0", 1, NEW);
        let attach = Step::Attach("eth1".into(), Hook::ExternalIngress, path("eth1", Hook::ExternalIngress));
        assert_eq!(steps(&[target(2, "eth1")], vec![old.clone()]), [attach, Step::Detach(old)]);
    }
}
