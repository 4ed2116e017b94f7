//! Where things lie in this repository.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::cmd;

/// The folder of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// Where the eBPF objects go that bridge-agent embeds.
pub(crate) fn objects() -> PathBuf {
    root().join("target/bpf")
}

/// Returns the folder in which cargo keeps the sources of dependencies.
///
/// # Errors
/// The environment names none.
pub(crate) fn cargo_home() -> Result<PathBuf> {
    let given = env::var_os("CARGO_HOME").map(PathBuf::from);
    given
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME names a folder: set HOME")
}

/// Output of `cargo metadata`.
pub(crate) struct Metadata(serde_json::Value);

impl Metadata {
    /// Asks cargo.
    ///
    /// # Errors
    /// cargo fails.
    pub(crate) fn read() -> Result<Self> {
        let mut cargo = cmd::cargo();
        cargo.args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(root());
        Self::parse(&cmd::output(&mut cargo)?)
    }

    fn parse(json: &str) -> Result<Self> {
        serde_json::from_str(json).map(Self).context("cargo metadata wrote something other than JSON")
    }

    /// The target triple of this machine.
    ///
    /// # Errors
    /// rustc fails.
    pub(crate) fn host() -> Result<String> {
        let version = cmd::output(cmd::command(cmd::rustc_path()).arg("-vV"))?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: "));
        host.map(str::to_owned).context("rustc -vV names no host")
    }

    /// cargo's target directory.
    ///
    /// # Errors
    /// cargo has stopped telling it.
    pub(crate) fn target_directory(&self) -> Result<PathBuf> {
        self.0["target_directory"]
            .as_str()
            .map(PathBuf::from)
            .context("cargo metadata names no target directory")
    }

    /// The version of `package`.
    pub(crate) fn version(&self, package: &str) -> Option<String> {
        let packages = self.0["packages"].as_array()?;
        packages.iter().find(|p| p["name"] == package)?["version"].as_str().map(str::to_owned)
    }

    /// The names of the binaries of `package`.
    pub(crate) fn bins(&self, package: &str) -> Vec<String> {
        let array = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
        array(&self.0["packages"])
            .into_iter()
            .filter(|p| p["name"] == package)
            .flat_map(|p| array(&p["targets"]))
            .filter(|target| array(&target["kind"]).iter().any(|kind| kind == "bin"))
            .filter_map(|target| target["name"].as_str().map(str::to_owned))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_of_one_package() {
        let metadata = Metadata::parse(
            r#"{"target_directory": "/t", "packages": [
                {"name": "a", "version": "1.2.3", "targets": [{"name": "a", "kind": ["lib"]}, {"name": "x", "kind": ["bin"]}]},
                {"name": "b", "targets": [{"name": "y", "kind": ["bin"]}]}]}"#,
        )
        .unwrap();
        assert_eq!(metadata.bins("a"), ["x"]);
        assert_eq!(metadata.version("a").as_deref(), Some("1.2.3"));
        assert_eq!(metadata.target_directory().unwrap(), Path::new("/t"));
    }
}
