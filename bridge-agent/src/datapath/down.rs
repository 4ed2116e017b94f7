//! Removes every trace.

use super::{
    attach, clsact,
    error::{Error, Result},
    pins::{self, Pins},
};
use crate::pool;

/// What [`down`] has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Removed {
    /// Programs detached from interfaces.
    pub attachments: usize,
    /// Pinned maps.
    pub maps: usize,
}

/// Detaches every program and removes every map of the packet path, of this version of bridge and of others. Goes on after errors; may
/// be called when there is nothing to remove.
///
/// # Errors
///
/// [`Error::Locked`] while an agent runs, which would put everything back; otherwise what could not be removed,
/// beside what could.
pub fn down(pins: &Pins) -> (Removed, Result<()>) {
    let mut removed = Removed::default();
    if !pins.root().exists() {
        return (removed, Ok(()));
    }
    let lock = match pins.lock() {
        Ok(lock) => lock,
        Err(error) => return (removed, Err(error)),
    };
    let mut errors = Vec::new();
    match pins.versions() {
        Ok(versions) => {
            for (place, version) in versions.iter().enumerate() {
                if let Some(next) = versions.get(place + 1) {
                    errors.extend(clsact::hand_over_qdiscs(version, next).err());
                }
                remove_version(version, &mut removed, &mut errors);
            }
        }
        Err(error) => errors.push(error),
    }
    // What the port pool has here is no part of the packet path.
    pins::remove_tree_except(pins.root(), &pool::pins::is_of_a_pool, &mut errors);
    drop(lock);
    (removed, Error::collect(errors))
}

/// Removes what a start of this version has made, and nothing that another version enforces.
///
/// # Errors
///
/// As of [`down`].
pub fn undo(pins: &Pins) -> Result<()> {
    let lock = pins.lock()?;
    let (mut removed, mut errors) = (Removed::default(), Vec::new());
    remove_version(pins, &mut removed, &mut errors);
    drop(lock);
    Error::collect(errors)
}

/// Removes what another version of bridge has left, once this one enforces in its place.
pub(super) fn remove_other_versions(pins: &Pins) -> Result<usize> {
    let mut removed = Removed::default();
    let mut errors = Vec::new();
    for version in pins.versions()?.into_iter().filter(|version| version.directory() != pins.directory()) {
        errors.extend(clsact::hand_over_qdiscs(&version, pins).err());
        remove_version(&version, &mut removed, &mut errors);
    }
    Error::collect(errors).map(|()| removed.attachments)
}

fn remove_version(pins: &Pins, removed: &mut Removed, errors: &mut Vec<Error>) {
    match pins.attached_links() {
        Ok(links) => {
            for link in links {
                crate::fault::point("down:detach");
                match attach::detach(&link.path, None) {
                    Ok(()) => removed.attachments += 1,
                    Err(error) => errors.push(error),
                }
            }
        }
        Err(error) => errors.push(error),
    }
    match pins.attached_filters() {
        Ok(filters) => {
            for filter in filters {
                match clsact::remove(pins, &filter) {
                    Ok(()) => removed.attachments += 1,
                    Err(error) => errors.push(error),
                }
            }
        }
        Err(error) => errors.push(error),
    }
    clsact::remove_qdiscs(pins, errors);
    removed.maps += pins::entries(pins.directory())
        .map_or(0, |entries| entries.iter().filter(|path| !path.is_dir()).count());
    crate::fault::point("down:maps");
    pins::remove_tree(pins.directory(), errors);
}
