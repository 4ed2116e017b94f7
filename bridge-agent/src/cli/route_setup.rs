//! The routes of the configuration, for commands that do not ask an agent.

use super::{Error, Global};
use crate::config;
use crate::routes::{Setup, sources::FileError};

/// Reads the configuration and its sources.
pub(super) fn setup(global: &Global) -> Result<Setup, Error> {
    let loaded = config::load(&global.config)?;
    Ok(Setup::offline(&loaded.config, &global.state_directory().boot())?)
}

/// Says that the routes of a file are missing, and that the others are shown.
pub(super) fn warn(missing: Option<&FileError>) {
    if let Some(error) = missing {
        eprintln!("warning: {error}; its routes are left out");
    }
}
