//! Packages for Debian and RPM systems, from one tree of files.

use std::{
    ffi::OsString,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use super::{Architecture, Dist};
use crate::{cmd, workspace};

/// Suite of the root that packages are tested in.
const SUITE: &str = "bookworm";

/// Writes the .deb and the .rpm of each architecture into `dist.out`.
pub(super) fn build(dist: &Dist) -> Result<()> {
    let generated = generate(dist)?;
    for architecture in Architecture::ALL {
        let tree = tree(dist, architecture, &generated)?;
        rpm(dist, architecture, &tree)?;
        // Debian keeps completions of zsh elsewhere, and adds its control files to the tree.
        deb(dist, architecture, &tree)?;
    }
    Ok(())
}

/// Returns the folder into which the agent has written its man pages and completions.
fn generate(dist: &Dist) -> Result<PathBuf> {
    let folder = dist.work.join("generated");
    remove(&folder)?;
    cmd::run(cmd::command(dist.binary(Architecture::X86_64)).args(["generate", "--directory"]).arg(&folder))?;
    Ok(folder)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| folder.display().to_string())
        }
        _ => Ok(()),
    }
}

/// Makes the tree that both packages install; returns its folder.
fn tree(dist: &Dist, architecture: Architecture, generated: &Path) -> Result<PathBuf> {
    let root = dist.work.join("tree").join(architecture.machine());
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
    let unit = fs::read_to_string(source("deploy/systemd/bridge-agent.service"))?;
    let unit = unit
        .replace("/usr/local/bin/", "/usr/bin/")
        .replace("/usr/local/share/doc/bridge/", "/usr/share/doc/bridge-agent/docs/")
        .replace(": copy to /etc/systemd/system, the binary to /usr/local/bin.", ".");
    ensure!(!unit.contains("/usr/local"), "the unit names /usr/local");
    let path = root.join("usr/lib/systemd/system/bridge-agent.service");
    fs::create_dir_all(path.parent().context("a file without a folder")?)?;
    fs::write(&path, unit)?;
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
            if path.extension().is_some_and(|extension| extension == ending) {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                install(&path, &format!("{documentation}/{to}/{name}"), 0o644)?;
            }
        }
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        install(&source(licence), &format!("{documentation}/{licence}"), 0o644)?;
    }
    // Every folder and file has the modes and the time that a package has, whatever umask this runs under.
    let date = format!("@{}", dist.epoch);
    cmd::run(cmd::command("find").arg(&root).args(["-type", "d", "-exec", "chmod", "0755", "{}", "+"]))?;
    cmd::run(cmd::command("find").arg(&root).args(["-exec", "touch", "-h", "-d", &date, "{}", "+"]))?;
    Ok(root)
}

fn deb(dist: &Dist, architecture: Architecture, tree: &Path) -> Result<()> {
    let root = tree.with_extension("deb");
    remove(&root)?;
    cmd::run(cmd::command("cp").arg("-a").arg(tree).arg(&root))?;
    let zsh = root.join("usr/share/zsh");
    fs::rename(zsh.join("site-functions"), zsh.join("vendor-completions"))?;
    fs::copy(
        root.join("usr/share/doc/bridge-agent/LICENSE-MIT"),
        root.join("usr/share/doc/bridge-agent/copyright"),
    )?;
    let control = root.join("DEBIAN");
    fs::create_dir(&control)?;
    let size: u64 = cmd::output(cmd::command("du").args(["-sk"]).arg(&root))?
        .split_whitespace()
        .next()
        .context("du prints no size")?
        .parse()?;
    let fields = format!(
        "Package: bridge-agent\nVersion: {}\nArchitecture: {}\nMaintainer: bridge developers <bridge@localhost>\n\
         Installed-Size: {size}\nRecommends: iptables, nftables\nSection: net\nPriority: optional\n\
         Description: allowed ports between LAN hosts and Kubernetes pods\n \
         Puts routes to pod networks on LAN hosts, enforces port ranges between LAN\n \
         and pods in eBPF and iptables (default deny), and gives clients source\n \
         ports from an allowed range.\n",
        dist.version,
        architecture.debian()
    );
    fs::write(control.join("control"), fields)?;
    for script in ["postinst", "prerm", "postrm"] {
        fs::copy(workspace::root().join("deploy/packages").join(script), control.join(script))?;
        fs::set_permissions(control.join(script), Permissions::from_mode(0o755))?;
    }
    let package = dist.out.join(format!("bridge-agent_{}_{}.deb", dist.version, architecture.debian()));
    let mut build = cmd::command("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(&root).arg(&package);
    cmd::run(build.env("SOURCE_DATE_EPOCH", dist.epoch.to_string()))
}

fn rpm(dist: &Dist, architecture: Architecture, tree: &Path) -> Result<()> {
    let top = dist.work.join("rpm").join(architecture.machine());
    remove(&top)?;
    let mut build = cmd::command("rpmbuild");
    build.args(["-bb", "--quiet", "--target", &format!("{}-linux", architecture.machine())]);
    for (name, value) in [
        ("_topdir", top.display().to_string()),
        ("_rpmdir", top.join("out").display().to_string()),
        ("bridge_version", dist.version.clone()),
        ("bridge_tree", tree.display().to_string()),
        // What is built here is built elsewhere to the same bytes.
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
    let name = format!("bridge-agent-{}-1.{}.rpm", dist.version, architecture.machine());
    fs::copy(top.join("out").join(architecture.machine()).join(&name), dist.out.join(&name)).context(name)?;
    Ok(())
}

/// A Debian root in `dist.work`, made by debootstrap once and copied for each run.
struct Root(PathBuf);

impl Root {
    fn new(dist: &Dist) -> Result<Self> {
        let base = dist.work.join(format!("root-{SUITE}"));
        if !base.join("etc/debian_version").exists() {
            println!("debootstrap {SUITE}, once: about a minute");
            let arguments = ["--variant=minbase".into(), SUITE.into(), base.clone().into_os_string()];
            cmd::run(&mut cmd::as_root(Path::new("debootstrap"), &arguments)?)?;
        }
        let root = dist.work.join("root");
        let arguments = ["-rf".into(), root.clone().into_os_string()];
        cmd::run(&mut cmd::as_root(Path::new("rm"), &arguments)?)?;
        let arguments = ["-a".into(), base.into_os_string(), root.clone().into_os_string()];
        cmd::run(&mut cmd::as_root(Path::new("cp"), &arguments)?)?;
        Ok(Self(root))
    }

    /// Runs a shell command in the root; returns its output.
    fn run(&self, script: &str) -> Result<String> {
        let arguments: Vec<OsString> =
            vec![self.0.clone().into_os_string(), "sh".into(), "-euc".into(), script.into()];
        cmd::output(&mut cmd::as_root(Path::new("chroot"), &arguments)?).with_context(|| script.to_owned())
    }

    fn copy(&self, file: &Path) -> Result<()> {
        let name = file.file_name().context("a package without a name")?;
        let arguments = [file.into(), self.0.join(name).into_os_string()];
        cmd::run(&mut cmd::as_root(Path::new("cp"), &arguments)?)
    }
}

/// Installs, reinstalls, removes and purges the .deb in a bare Debian root, and reads the .rpm back with rpm's own tools.
pub(super) fn test(dist: &Dist) -> Result<()> {
    let root = Root::new(dist)?;
    let deb = format!("bridge-agent_{}_amd64.deb", dist.version);
    root.copy(&dist.out.join(&deb))?;
    root.run(&format!("dpkg -i /{deb}"))?;
    let version = root.run("bridge-agent --version")?;
    ensure!(version.trim() == format!("bridge-agent {}", dist.version), "{version}");
    root.run("bridge-agent check --config /usr/share/doc/bridge-agent/examples/node.yaml")?;
    root.run("test \"$(stat -c %a /etc/bridge)\" = 700; test -s /usr/share/man/man1/bridge-agent.1.gz")?;
    root.run("cp /usr/share/doc/bridge-agent/examples/node.yaml /etc/bridge/bridge.yaml")?;
    root.run(&format!("dpkg -i /{deb}; test -s /etc/bridge/bridge.yaml"))?;
    root.run("dpkg -r bridge-agent; test -s /etc/bridge/bridge.yaml; ! command -v bridge-agent")?;
    root.run("dpkg -P bridge-agent; ! test -e /etc/bridge; ! test -e /var/lib/bridge")?;
    let left = root.run("find / -xdev -name '*bridge-agent*' -not -name '*.deb' -not -path '/proc/*'")?;
    if !left.trim().is_empty() {
        bail!("a purge leaves {}", left.split_whitespace().collect::<Vec<_>>().join(", "));
    }
    for architecture in Architecture::ALL {
        let rpm = dist.out.join(format!("bridge-agent-{}-1.{}.rpm", dist.version, architecture.machine()));
        let query = |what: &[&str]| cmd::output(cmd::command("rpm").args(what).arg(&rpm));
        ensure!(query(&["-qp", "--qf", "%{ARCH}"])? == architecture.machine());
        let files = query(&["-qpl"])?;
        for file in ["/usr/bin/bridge-agent", "/usr/lib/systemd/system/bridge-agent.service"] {
            ensure!(files.lines().any(|line| line == file), "{} lacks {file}", rpm.display());
        }
        query(&["--checksig", "--nosignature"])?;
    }
    let rpm = dist.out.join(format!("bridge-agent-{}-1.x86_64.rpm", dist.version));
    let install = dist.work.join("rpm-root");
    let arguments = ["-rf".into(), install.clone().into_os_string()];
    cmd::run(&mut cmd::as_root(Path::new("rm"), &arguments)?)?;
    let arguments: Vec<OsString> = vec![
        "--root".into(),
        install.clone().into_os_string(),
        "--install".into(),
        "--noscripts".into(),
        "--nodeps".into(),
        rpm.into_os_string(),
    ];
    fs::create_dir_all(&install)?;
    cmd::run(&mut cmd::as_root(Path::new("rpm"), &arguments)?)?;
    let version = cmd::output(cmd::command(install.join("usr/bin/bridge-agent")).arg("--version"))?;
    ensure!(version.trim() == format!("bridge-agent {}", dist.version), "{version}");
    Ok(())
}
