//! The configured name of each interface that was chosen by its name: one that is renamed stays judged, also after a restart of
//! the agent.

use std::{
    collections::BTreeMap,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use crate::kernel::{
    backoff::Backoff,
    files::{self, Ownership},
    state_directory,
};

/// Configured names by index, in a file that lasts as long as the kernel.
#[derive(Debug)]
pub(super) struct Named {
    place: PathBuf,
    known: BTreeMap<u32, String>,
    unsaved: Backoff,
}

impl Named {
    /// Reads the names that an earlier agent of this boot has saved.
    pub(super) fn load(state: &Path) -> Self {
        let place = state.join("interfaces.json");
        let read =
            state_directory::open(&place).and_then(|file| Ok(serde_json::from_reader(BufReader::new(file))?));
        let known = read.unwrap_or_else(|error: io::Error| {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, file = %place.display(), "cannot read the names of interfaces");
            }
            BTreeMap::new()
        });
        Self { place, known, unsaved: Backoff::default() }
    }

    pub(super) fn known(&self) -> &BTreeMap<u32, String> {
        &self.known
    }

    /// Saves other names; tried again later if that fails.
    pub(super) fn set(&mut self, names: &BTreeMap<u32, String>) {
        if self.known != *names {
            self.known.clone_from(names);
            self.save();
        }
    }

    /// Saves the names, if that failed and it is time for another attempt.
    pub(super) fn try_again(&mut self) {
        if self.unsaved.is_due() {
            self.save();
        }
    }

    fn save(&mut self) {
        let text = serde_json::to_vec(&self.known).map_err(io::Error::other);
        let saved = text.and_then(|text| files::replace(&self.place, Ownership::Private, &text));
        self.unsaved.note(saved.is_ok());
        if let Err(error) = saved {
            tracing::warn!(%error, "cannot save the names of interfaces; the agent tries again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_by_the_next_agent_and_saved_again_after_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let names = BTreeMap::from([(7, "eth0".to_owned())]);
        let mut named = Named::load(directory.path());
        assert!(named.known().is_empty());
        // Something that cannot be replaced is in the way.
        std::fs::create_dir(directory.path().join("interfaces.json")).unwrap();
        named.set(&names);
        std::fs::remove_dir(directory.path().join("interfaces.json")).unwrap();
        assert!(Named::load(directory.path()).known().is_empty());
        while named.unsaved != Backoff::default() {
            named.try_again();
        }
        assert_eq!(*Named::load(directory.path()).known(), names);
    }
}
