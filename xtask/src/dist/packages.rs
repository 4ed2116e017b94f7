//! Packages for Debian and RPM systems, from one tree of files.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{Architecture, Dist};
use crate::{cmd, workspace};

/// Units of deploy/systemd that both packages install.
pub(super) const UNITS: [&str; 2] = ["bridge-agent.service", "bridge-nftables.service"];

/// Writes the .deb and the .rpm of each architecture into `dist.out`.
pub(super) fn build(dist: &Dist) -> Result<()> {
    let generated = generate(dist)?;
    for architecture in dist.architectures.iter().copied() {
        tree(dist, architecture, &generated)?;
        rpm(dist, architecture, &dist.version, &dist.out)?;
        // Debian keeps completions of zsh elsewhere, and adds its control files to the tree.
        deb(dist, architecture, &dist.version, &dist.out)?;
    }
    Ok(())
}

/// Returns the folder into which the agent has written its man pages and completions.
fn generate(dist: &Dist) -> Result<PathBuf> {
    let folder = dist.work.join("generated");
    remove(&folder)?;
    let mut agent = dist.run(*dist.architectures.first().context("no architecture")?);
    cmd::run(agent.args(["generate", "--directory"]).arg(&folder))?;
    Ok(folder)
}

/// Removes a folder that may be missing.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| folder.display().to_string())
        }
        _ => Ok(()),
    }
}

/// Returns a unit of deploy/systemd with the paths of a package.
fn packaged(unit: &str) -> Result<String> {
    let unit = unit
        .replace("/usr/local/bin/", "/usr/bin/")
        .replace("/usr/local/share/doc/bridge/", "/usr/share/doc/bridge-agent/docs/")
        .replace(": copy to /etc/systemd/system, the binary to /usr/local/bin.", ".")
        .replace(": copy to /etc/systemd/system.", ".");
    ensure!(!unit.contains("/usr/local") && !unit.contains("copy to"), "the unit names /usr/local:\n{unit}");
    Ok(unit)
}

/// Makes the tree that both packages install.
fn tree(dist: &Dist, architecture: Architecture, generated: &Path) -> Result<()> {
    let root = dist.tree(architecture);
    remove(&root)?;
    let install = |from: &Path, to: &str, mode: u32| -> Result<()> {
        let to = root.join(to);
        fs::create_dir_all(to.parent().context("a file without a folder")?)?;
        fs::copy(from, &to).with_context(|| from.display().to_string())?;
        fs::set_permissions(&to, Permissions::from_mode(mode))?;
        Ok(())
    };
    let source = |path: &str| workspace::root().join(path);
    install(&dist.binary(architecture), "usr/bin/bridge-agent", 0o755)?;
    for (from, to) in [
        ("preset", "system-preset/90-bridge-agent.preset"),
        ("sysusers", "../sysusers.d/bridge-agent.conf"),
        ("tmpfiles", "../tmpfiles.d/bridge-agent.conf"),
    ] {
        let to = format!("usr/lib/systemd/{to}").replace("systemd/../", "");
        install(&source(&format!("deploy/packages/bridge-agent.{from}")), &to, 0o644)?;
    }
    for name in UNITS {
        let text = fs::read_to_string(source(&format!("deploy/systemd/{name}")))?;
        let path = root.join("usr/lib/systemd/system").join(name);
        fs::create_dir_all(path.parent().context("a file without a folder")?)?;
        fs::write(&path, packaged(&text)?)?;
    }
    for page in fs::read_dir(generated.join("man"))? {
        let page = page?;
        let to = format!("usr/share/man/man1/{}", page.file_name().to_string_lossy());
        install(&page.path(), &to, 0o644)?;
        // Without the name and the time of the file in it.
        cmd::run(cmd::command("gzip").args(["-9n"]).arg(root.join(to)))?;
    }
    let completions = generated.join("completions");
    install(
        &completions.join("bash/bridge-agent"),
        "usr/share/bash-completion/completions/bridge-agent",
        0o644,
    )?;
    install(&completions.join("zsh/_bridge-agent"), "usr/share/zsh/site-functions/_bridge-agent", 0o644)?;
    install(
        &completions.join("fish/bridge-agent.fish"),
        "usr/share/fish/vendor_completions.d/bridge-agent.fish",
        0o644,
    )?;
    let documentation = "usr/share/doc/bridge-agent";
    for (folder, to, ending) in [("deploy/examples", "examples", "yaml"), ("docs", "docs", "md")] {
        for file in fs::read_dir(source(folder))? {
            let path = file?.path();
            if path.extension().is_some_and(|extension| extension == ending) && !path.ends_with("SUMMARY.md")
            {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                install(&path, &format!("{documentation}/{to}/{name}"), 0o644)?;
            }
        }
    }
    install(&source("deploy/bridge.schema.json"), &format!("{documentation}/bridge.schema.json"), 0o644)?;
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        install(&source(licence), &format!("{documentation}/{licence}"), 0o644)?;
    }
    // Every folder and file has the modes and the time that a package has, whatever umask this runs under.
    let date = format!("@{}", dist.epoch);
    cmd::run(cmd::command("find").arg(&root).args(["-type", "d", "-exec", "chmod", "0755", "{}", "+"]))?;
    cmd::run(cmd::command("find").arg(&root).args(["-exec", "touch", "-h", "-d", &date, "{}", "+"]))?;
    Ok(())
}

/// Returns the path of the .deb of `version` in `out`.
pub(super) fn deb_path(architecture: Architecture, version: &str, out: &Path) -> PathBuf {
    out.join(format!("bridge-agent_{version}_{}.deb", architecture.debian()))
}

/// Returns the path of the .rpm of `version` in `out`.
pub(super) fn rpm_path(architecture: Architecture, version: &str, out: &Path) -> PathBuf {
    out.join(format!("bridge-agent-{version}-1.{}.rpm", architecture.machine()))
}

/// Writes a .deb of `version` into `out`.
pub(super) fn deb(dist: &Dist, architecture: Architecture, version: &str, out: &Path) -> Result<PathBuf> {
    let tree = &dist.tree(architecture);
    let root = tree.with_extension("deb");
    remove(&root)?;
    cmd::run(cmd::command("cp").arg("-a").arg(tree).arg(&root))?;
    let zsh = root.join("usr/share/zsh");
    fs::rename(zsh.join("site-functions"), zsh.join("vendor-completions"))?;
    let documentation = root.join("usr/share/doc/bridge-agent");
    let mut copyright = String::from("License: MIT OR Apache-2.0\n");
    for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
        copyright += &format!("\n{}", fs::read_to_string(documentation.join(licence))?);
    }
    fs::write(documentation.join("copyright"), copyright)?;
    let control = root.join("DEBIAN");
    fs::create_dir(&control)?;
    let size: u64 = cmd::output(cmd::command("du").args(["-sk", "--apparent-size"]).arg(&root))?
        .split_whitespace()
        .next()
        .context("du prints no size")?
        .parse()?;
    let fields = format!(
        "Package: bridge-agent\nVersion: {version}\nArchitecture: {}\nMaintainer: bridge developers <bridge@localhost>\n\
         Installed-Size: {size}\nRecommends: iptables, nftables\nSection: net\nPriority: optional\n\
         Description: allowed ports between LAN hosts and Kubernetes pods\n \
         Puts routes to pod networks on LAN hosts, enforces port ranges between LAN\n \
         and pods in eBPF and iptables (default deny), and gives clients source\n \
         ports from an allowed range.\n",
        architecture.debian()
    );
    fs::write(control.join("control"), fields)?;
    for script in ["postinst", "prerm", "postrm"] {
        fs::copy(workspace::root().join("deploy/packages").join(script), control.join(script))?;
        fs::set_permissions(control.join(script), Permissions::from_mode(0o755))?;
    }
    let package = deb_path(architecture, version, out);
    let mut build = cmd::command("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(&root).arg(&package);
    cmd::run(build.env("SOURCE_DATE_EPOCH", dist.epoch.to_string()))?;
    Ok(package)
}

/// Writes a .rpm of `version` into `out`.
pub(super) fn rpm(dist: &Dist, architecture: Architecture, version: &str, out: &Path) -> Result<PathBuf> {
    let tree = dist.tree(architecture);
    let top = dist.work.join("rpm").join(architecture.machine());
    remove(&top)?;
    let mut build = cmd::command("rpmbuild");
    build.args(["-bb", "--quiet", "--target", &format!("{}-linux", architecture.machine())]);
    for (name, value) in [
        ("_topdir", top.display().to_string()),
        ("_rpmdir", top.join("out").display().to_string()),
        ("bridge_version", version.to_owned()),
        ("bridge_tree", tree.display().to_string()),
        // Another machine builds the same bytes.
        ("_buildhost", "reproducible".to_owned()),
        ("use_source_date_epoch_as_buildtime", "1".to_owned()),
        ("clamp_mtime_to_source_date_epoch", "1".to_owned()),
        // The tree is complete: nothing is stripped or compressed again.
        ("__os_install_post", "%{nil}".to_owned()),
        ("_build_id_links", "none".to_owned()),
    ] {
        build.args(["--define", &format!("{name} {value}")]);
    }
    build.arg(workspace::root().join("deploy/packages/bridge-agent.spec"));
    cmd::run(build.env("SOURCE_DATE_EPOCH", dist.epoch.to_string()))?;
    let package = rpm_path(architecture, version, out);
    let built = top.join("out").join(architecture.machine()).join(package.file_name().unwrap_or_default());
    fs::copy(&built, &package).with_context(|| built.display().to_string())?;
    Ok(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_packaged_listed_and_enabled_with_the_agent() -> Result<()> {
        let read = |path: &str| fs::read_to_string(workspace::root().join("deploy").join(path));
        let (spec, preset) = (read("packages/bridge-agent.spec")?, read("packages/bridge-agent.preset")?);
        for file in fs::read_dir(workspace::root().join("deploy/systemd"))? {
            let name = file?.file_name().to_string_lossy().into_owned();
            assert!(UNITS.contains(&name.as_str()), "no package installs {name}");
            packaged(&read(&format!("systemd/{name}"))?).with_context(|| name.clone())?;
            assert!(spec.contains(&format!("\n/usr/lib/systemd/system/{name}\n")), "{name}: {spec}");
            assert!(preset.contains(&format!("disable {name}\n")), "{name}: {preset}");
        }
        // Enabling the agent enables the rules of the boot.
        assert!(read("systemd/bridge-agent.service")?.contains("\nAlso=bridge-nftables.service\n"));
        Ok(())
    }
}
