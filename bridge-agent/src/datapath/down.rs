//! Removes every trace.

use std::path::Path;

use super::{
    clsact,
    error::{Error, Result},
    load::Datapath,
    pins::{Pins, detach},
};
use crate::kernel::pins;

/// The result of [`down`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Removed {
    /// Programs detached from interfaces.
    pub attachments: usize,
    /// Pinned maps.
    pub maps: usize,
}

/// Detaches every program and removes every pin below the root, of every version of bridge, except those that `spare`
/// names. Continues after errors; may be called when there is nothing to remove.
///
/// # Errors
///
/// [`pins::Error::Locked`] while an agent runs, which would restore everything; otherwise those of the pins that remain.
pub fn down(pins: &Pins, spare: &dyn Fn(&Path) -> bool) -> (Removed, Result<()>) {
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
    pins::remove_tree_except(pins.root(), spare, &mut errors);
    drop(lock);
    (removed, Error::collect(errors))
}

/// Removes everything that a start of this version has made, and nothing that another version enforces.
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

impl Datapath {
    /// Removes everything that other versions of bridge have left. Call once this one enforces. Returns how many programs were
    /// detached.
    ///
    /// # Errors
    ///
    /// Those of the pins that remain.
    pub fn remove_other_versions(&self) -> Result<usize> {
        let pins = &self.pins;
        let mut removed = Removed::default();
        let mut errors = Vec::new();
        for version in pins.versions()?.into_iter().filter(|version| version.directory() != pins.directory())
        {
            errors.extend(clsact::hand_over_qdiscs(&version, pins).err());
            remove_version(&version, &mut removed, &mut errors);
        }
        Error::collect(errors).map(|()| removed.attachments)
    }
}

fn remove_version(pins: &Pins, removed: &mut Removed, errors: &mut Vec<Error>) {
    // First: behind it, packets are to be judged as long as it drops any.
    match pins::entries(&pins.shields()) {
        Ok(links) => {
            for link in links {
                crate::fault::point("down:shield");
                match detach(&link, None) {
                    Ok(()) => removed.attachments += 1,
                    Err(error) => errors.push(error),
                }
            }
        }
        Err(error) => errors.push(error.into()),
    }
    match pins.attached_links() {
        Ok(links) => {
            for link in links {
                crate::fault::point("down:detach");
                match detach(&link.path, None) {
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
