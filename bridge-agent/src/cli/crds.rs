//! `bridge-agent crds`: the custom resource definitions, from the types that read the configuration file.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use super::{Error, Global, print, print_json};
use crate::kubernetes::{reference, resources};

/// Print the custom resource definitions for Kubernetes, or write them into a directory, without privileges
#[derive(Debug, Args)]
pub struct Crds {
    /// Write a file for each into this directory instead
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Replace the reference in this page, between its marks, instead
    #[arg(long, value_name = "FILE", conflicts_with = "directory")]
    reference: Option<PathBuf>,
}

impl Crds {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if let Some(page) = &self.reference {
            let failed = |source| Error::Stream { action: "cannot update the reference", source };
            let text = fs::read_to_string(page).map_err(failed)?;
            let no_marks = || Error::Format(format!("{} has no marks around a reference", page.display()));
            fs::write(page, reference::insert(&text).ok_or_else(no_marks)?).map_err(failed)?;
            return print(&format!("wrote the reference into {}\n", page.display()));
        }
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
            .map_err(|source| Error::Stream { action: "cannot write the definitions", source })?;
        let names: Vec<String> =
            definitions.iter().map(|(name, _)| directory.join(name).display().to_string()).collect();
        print(&format!("wrote {}\n", names.join(", ")))
    }
}
