//! `bridge-agent crds`: the custom resource definitions, from the types that read the configuration file.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use super::{Error, Global, print, print_json};
use crate::kubernetes::resources;

/// Print the custom resource definitions for Kubernetes, or write them into a directory; needs no privilege.
#[derive(Debug, Args)]
pub struct Crds {
    /// Write a file for each into this directory instead
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl Crds {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let definitions = resources::definitions().map_err(|error| Error::Format(error.to_string()))?;
        let Some(directory) = &self.directory else {
            if global.json {
                return print_json(&resources::objects());
            }
            let documents: Vec<String> = definitions.into_iter().map(|(_, yaml)| yaml).collect();
            return print(&documents.join("---\n"));
        };
        fs::create_dir_all(directory)
            .and_then(|()| {
                definitions.iter().try_for_each(|(name, yaml)| fs::write(directory.join(name), yaml))
            })
            .map_err(|source| Error::Stream { action: "cannot write the definitions", source })
    }
}
