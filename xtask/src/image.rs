//! `cargo xtask image`: the agent's container image, without a daemon and without a registry.
//!
//! `deploy/Dockerfile` says what is in it; buildah builds it. The base is Debian's smallest system, made by debootstrap once and
//! kept; `--base` names an image of a registry instead.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    build, cmd,
    setup::{self, Scope},
    test,
    workspace::{self, Metadata},
};

const SUITE: &str = "bookworm";
const BASE: &str = "localhost/bridge-agent-base";
/// As in `deploy/kubernetes/kustomization.yaml`.
const NAME: &str = "localhost/bridge-agent";
/// The container that the tests run in.
const CONTAINER: &str = "bridge-agent-test";

/// `cargo xtask image`.
///
/// # Errors
/// Setup, the build or a test fails.
pub(crate) fn main(base: Option<&str>, run_tests: bool) -> Result<()> {
    let ready = setup::ensure(if run_tests { Scope::Test } else { Scope::Build })?;
    setup::programs(&setup::IMAGE)?;
    build::objects(&ready.ebpf)?;
    build::user_side(true, &["--package", "bridge-agent", "--bin", "bridge-agent"])?;

    let epoch = epoch()?;
    let images = Images { directory: workspace::root().join("target/image") };
    let base = match base {
        Some(base) => base.to_owned(),
        None => images.base()?,
    };
    let tag = format!("{NAME}:{}", version()?);
    let id = images.build(&base, &tag, epoch)?;
    images.runs(&tag)?;
    let archive = images.directory.join("bridge-agent.tar");
    // The archive is not written over.
    cmd::run(&mut cmd::as_root(Path::new("rm"), &["-f".into(), archive.clone().into()])?)?;
    images.run(&["push", "--quiet", &tag, &format!("oci-archive:{}:{tag}", archive.display())])?;
    let size = images.output(&["images", "--format", "{{.Size}}", &tag])?;
    println!("{tag}  {}  {}", size.trim(), id.trim());
    println!(
        "{}, for podman load, docker load, ctr images import, kind load image-archive",
        archive.display()
    );

    if run_tests {
        let again = images.build(&base, &format!("{NAME}:again"), epoch)?;
        ensure!(
            again == id,
            "built again from the same it is another image: {} and {}",
            id.trim(),
            again.trim()
        );
        println!("built again: the same");
        images.test(&tag)?;
    }
    Ok(())
}

/// The version of the workspace.
fn version() -> Result<String> {
    Metadata::read()?.version("bridge-agent").context("cargo metadata names no version")
}

/// The time that everything in the image has, in seconds since 1970: `$SOURCE_DATE_EPOCH`, else that of the last commit
/// (reproducible-builds.org/specs/source-date-epoch).
pub(crate) fn epoch() -> Result<u64> {
    let text = match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => cmd::output(
            cmd::command("git").args(["log", "-1", "--format=%ct"]).current_dir(workspace::root()),
        )
        .context("the time of the image is that of the last commit; else set SOURCE_DATE_EPOCH")?,
    };
    text.trim().parse().with_context(|| format!("SOURCE_DATE_EPOCH is {text:?}, not a number of seconds"))
}

/// Images and containers of ours, kept below `target`, apart from others of this machine.
struct Images {
    directory: PathBuf,
}

impl Images {
    fn buildah(&self, arguments: &[&str]) -> Result<Command> {
        let at = |name: &str| self.directory.join(name).into_os_string();
        // Without overlayfs and without a container of its own for each step: works in containers, too.
        let mut all = vec!["--storage-driver".into(), "vfs".into()];
        all.extend(["--root".into(), at("storage"), "--runroot".into(), at("run")]);
        all.extend(arguments.iter().map(Into::into));
        cmd::as_root(Path::new("buildah"), &all)
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        cmd::run(&mut self.buildah(arguments)?)
    }

    fn output(&self, arguments: &[&str]) -> Result<String> {
        cmd::output(&mut self.buildah(arguments)?)
    }

    /// The name of the base that debootstrap makes; it is made if it is not there.
    fn base(&self) -> Result<String> {
        if self.output(&["images", "--quiet", BASE]).is_ok_and(|id| !id.trim().is_empty()) {
            return Ok(BASE.to_owned());
        }
        let context = self.directory.join("base");
        let tree = context.join("tree");
        fs::create_dir_all(&context).with_context(|| context.display().to_string())?;
        // As debian:bookworm-slim is made: the smallest variant, without documentation, caches and logs.
        let script = "set -eu; rm -rf \"$1\"; debootstrap --variant=minbase \"$3\" \"$1\" >\"$2.log\" || \
             { tail -n 20 \"$2.log\" >&2; exit 1; }; cd \"$1\"; \
             for d in doc man locale info groff lintian linda; do rm -rf usr/share/$d/*; done; \
             rm -rf var/lib/apt/lists/* var/cache/apt/* var/cache/ldconfig/aux-cache var/log/* dev/* debootstrap; \
             rm -f etc/hostname etc/resolv.conf etc/machine-id; \
             tar --sort=name --mtime=@0 --numeric-owner -cf \"$2\" .; cd /; rm -rf \"$1\"";
        let archive = context.join("base.tar");
        let arguments = ["-c".into(), script.into(), "sh".into(), tree.into(), archive.into(), SUITE.into()];
        println!("debootstrap {SUITE}, once: about a minute");
        cmd::run(&mut cmd::as_root(Path::new("sh"), &arguments)?)?;
        let dockerfile = context.join("Dockerfile");
        fs::write(&dockerfile, "FROM scratch\nADD base.tar /\nCMD [\"sh\"]\n")?;
        let (dockerfile, context) = (dockerfile.display().to_string(), context.display().to_string());
        self.output(&[
            "build",
            "--quiet",
            "--timestamp",
            "0",
            "--tag",
            BASE,
            "--file",
            &dockerfile,
            &context,
        ])?;
        Ok(BASE.to_owned())
    }

    /// Builds the image, with the agent that was built last, and answers its id.
    fn build(&self, base: &str, tag: &str, epoch: u64) -> Result<String> {
        let context = self.directory.join("context");
        fs::create_dir_all(&context).with_context(|| context.display().to_string())?;
        let agent = Metadata::read()?.target_directory()?.join("release/bridge-agent");
        cmd::run(cmd::command("strip").arg("-o").arg(context.join("bridge-agent")).arg(&agent))?;
        let dockerfile = workspace::root().join("deploy/Dockerfile").display().to_string();
        let (base, epoch) = (format!("BASE={base}"), epoch.to_string());
        let mut arguments = vec!["build", "--quiet", "--isolation", "chroot", "--timestamp", &epoch];
        arguments.extend(["--build-arg", &base, "--tag", tag, "--file", &dockerfile]);
        // Packages are Debian's of the day: what was installed another day is not taken for it.
        arguments.push("--no-cache");
        let context = context.display().to_string();
        arguments.push(&context);
        self.output(&arguments)
    }

    /// The agent starts in its image: the libraries that it was linked with are there.
    fn runs(&self, tag: &str) -> Result<()> {
        self.container(tag)?;
        let run = self.output(&["run", "--isolation", "chroot", CONTAINER, "bridge-agent", "--version"]);
        self.remove_container();
        let said = run.context(
            "the agent does not run in its image: was it built on a system that is newer than the base? Name one by --base",
        )?;
        ensure!(said.starts_with("bridge-agent "), "{said}");
        Ok(())
    }

    fn container(&self, tag: &str) -> Result<()> {
        self.remove_container();
        self.output(&["from", "--name", CONTAINER, tag]).map(drop)
    }

    fn remove_container(&self) {
        // There may be none.
        let _ = self.output(&["rm", CONTAINER]);
    }

    /// Runs the tests of the image.
    fn test(&self, tag: &str) -> Result<()> {
        self.container(tag)?;
        let result = self.output(&["mount", CONTAINER]).and_then(|root| {
            let mut command = cmd::cargo();
            command.args(["test", "--package", "bridge-tests", "--test", "image", "--", "--ignored"]);
            command.current_dir(workspace::root()).env("BRIDGE_IMAGE", root.trim());
            if !cmd::is_root() {
                test::run_tests_by_sudo(&mut command)?;
            }
            cmd::run(&mut command)
        });
        self.remove_container();
        match result {
            Ok(()) => Ok(()),
            Err(error) => bail!("the image does not do what it should: {error:#}"),
        }
    }
}
