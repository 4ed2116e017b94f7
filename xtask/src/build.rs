//! `cargo xtask build`: the eBPF objects, then the agent that embeds them.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    cmd,
    setup::{self, Scope, toolchain::EbpfToolchain},
    workspace::{self, Metadata},
};

const PACKAGE: &str = "bridge-ebpf";
const TARGET: &str = "bpfel-unknown-none";

/// Variables that cargo and rustup set for our own toolchain, and those that would change the kernel-side build.
const FOREIGN_ENVIRONMENT: [&str; 8] = [
    "CARGO",
    "CARGO_ENCODED_RUSTFLAGS",
    "LD_LIBRARY_PATH",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Beginnings of the variables that stand for settings in cargo's configuration.
const FOREIGN_SETTINGS: [&str; 4] = ["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_", "CARGO_UNSTABLE_"];

/// `cargo xtask build`.
///
/// # Errors
/// Setup or a build fails.
pub(crate) fn main(release: bool) -> Result<()> {
    let ready = setup::ensure(Scope::Build)?;
    objects(&ready.ebpf)?;
    user_side(release, &["--package", "bridge-agent"])
}

/// Builds the user side's `packages` (arguments of cargo), optimised if `release`.
///
/// # Errors
/// The build fails.
pub(crate) fn user_side(release: bool, packages: &[&str]) -> Result<()> {
    let mut cargo = cmd::cargo();
    cargo.arg("build").args(packages).current_dir(workspace::root());
    if release {
        cargo.arg("--release");
    }
    cmd::run(&mut cargo)
}

/// Builds binary `bin` of `package`, and the agent beside it; returns where it is.
///
/// # Errors
/// The build fails.
pub(crate) fn program(release: bool, package: &str, bin: &str) -> Result<PathBuf> {
    user_side(
        release,
        &["--package", package, "--package", "bridge-agent", "--bin", bin, "--bin", "bridge-agent"],
    )?;
    let profile = if release { "release" } else { "debug" };
    Ok(Metadata::read()?.target_directory()?.join(profile).join(bin))
}

/// Builds tests of `package`, and the agent beside them; returns where each of them is, in their order.
///
/// # Errors
/// The build fails.
pub(crate) fn tests<'a>(package: &str, tests: &[&'a str]) -> Result<Vec<(&'a str, PathBuf)>> {
    user_side(false, &["--package", "bridge-agent", "--package", "bridge-lab", "--bins"])?;
    let mut cargo = cmd::cargo();
    cargo.args(["test", "--no-run", "--message-format", "json-render-diagnostics", "--package", package]);
    cargo.args(tests.iter().flat_map(|test| ["--test", test])).current_dir(workspace::root());
    let output = cmd::output(&mut cargo)?;
    let messages: Vec<Value> = output.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let executable = |test: &str| {
        let artifact =
            messages.iter().find(|m| m["target"]["name"] == test && m["executable"].is_string())?;
        artifact["executable"].as_str().map(PathBuf::from)
    };
    tests
        .iter()
        .map(|test| Ok((*test, executable(test).with_context(|| format!("no test {test}"))?)))
        .collect()
}

/// Builds the kernel side into [`workspace::objects`], touching only changed files.
///
/// # Errors
/// The build fails, or a file cannot be written.
pub(crate) fn objects(toolchain: &EbpfToolchain) -> Result<()> {
    cmd::run(&mut ebpf_cargo(toolchain, &toolchain.cargo, "build")?)?;
    let bins = Metadata::read()?.bins(PACKAGE);
    let built = workspace::root().join("target/ebpf").join(TARGET).join("release");
    publish(&built, &workspace::objects(), &bins)
}

/// Checks the kernel side by clippy, warnings as errors.
///
/// # Errors
/// There are warnings or errors.
pub(crate) fn lint_objects(toolchain: &EbpfToolchain) -> Result<()> {
    // Called directly: `cargo clippy` would look in CARGO_HOME first and find rustup's proxy there.
    let clippy = toolchain.cargo.with_file_name("cargo-clippy");
    let mut command = ebpf_cargo(toolchain, &clippy, "clippy")?;
    cmd::run(command.env("CARGO", &toolchain.cargo).args(["--", "-D", "warnings"]))
}

/// Whether an environment variable would change the kernel-side build.
fn is_foreign(name: &str) -> bool {
    FOREIGN_ENVIRONMENT.contains(&name)
        || FOREIGN_SETTINGS.iter().any(|beginning| name.starts_with(beginning))
}

/// Runs `program` (a cargo, or a subcommand of it) with `action` on the kernel side.
fn ebpf_cargo(toolchain: &EbpfToolchain, program: &Path, action: &str) -> Result<Command> {
    let mut command = cmd::command(program);
    for (name, _) in env::vars_os().filter(|(name, _)| is_foreign(&name.to_string_lossy())) {
        command.env_remove(name);
    }
    command.current_dir(workspace::root()).env("RUSTC", &toolchain.rustc);
    // An incremental build is another program: rustc inlines nothing then.
    command.env("CARGO_INCREMENTAL", "0");
    if toolchain.stable {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    // Debug information becomes BTF, whose source paths an operator sees: relative ones.
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        "-Cdebuginfo=2".into(),
        // LLVM alone inlines: with rustc's MIR inliner before it, the verifier's cost is half as high again, and stacks
        // exceed 512 bytes.
        "-Zinline-mir=no".into(),
        format!("-Clinker={}", toolchain.linker.display()),
        "-Clink-arg=--btf".into(),
        format!("--remap-path-prefix={}=/cargo", workspace::cargo_home()?.display()),
        format!("--remap-path-prefix={}=.", workspace::root().display()),
    ];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    command.args([
        action,
        "--package",
        PACKAGE,
        "--bins",
        "--target",
        TARGET,
        "-Z",
        "build-std=core",
        "--release",
    ]);
    command.args(["--target-dir", "target/ebpf"]);
    Ok(command)
}

/// Makes `to` hold exactly the files `names` of `from`. Equal files are left untouched, so that cargo does not rebuild
/// the crates that embed them.
fn publish(from: &Path, to: &Path, names: &[String]) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for name in names {
        let (source, target) = (from.join(name), to.join(name));
        let object = fs::read(&source).with_context(|| source.display().to_string())?;
        if fs::read(&target).is_ok_and(|present| present == object) {
            continue;
        }
        // A build that is interrupted here must not leave half an object.
        let temporary = to.join(format!(".{name}.new"));
        fs::write(&temporary, object).with_context(|| temporary.display().to_string())?;
        fs::rename(&temporary, &target).with_context(|| target.display().to_string())?;
    }
    let names: BTreeSet<_> = names.iter().map(String::as_str).collect();
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(|name| names.contains(name)) {
            fs::remove_file(entry.path()).with_context(|| entry.path().display().to_string())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_setting_of_the_environment_reaches_the_kernel_side() {
        let names = ["RUSTFLAGS", "CARGO_PROFILE_RELEASE_LTO", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"];
        assert!(names.into_iter().all(is_foreign));
        assert!(!["PATH", "HOME", "CARGO_HOME", "CARGO_NET_OFFLINE"].into_iter().any(is_foreign));

        let toolchain = EbpfToolchain {
            name: "rustc".into(),
            cargo: "cargo".into(),
            rustc: "rustc".into(),
            stable: true,
            linker: "bpf-linker".into(),
        };
        let command = ebpf_cargo(&toolchain, Path::new("cargo"), "build").unwrap();
        let incremental = command.get_envs().find(|(name, _)| *name == "CARGO_INCREMENTAL");
        assert_eq!(incremental, Some(("CARGO_INCREMENTAL".as_ref(), Some("0".as_ref()))));
    }

    #[test]
    fn publishing_writes_changed_files_and_removes_old_ones() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(&from).unwrap();
        fs::create_dir_all(&to).unwrap();
        fs::write(from.join("same"), "1").unwrap();
        fs::write(from.join("changed"), "2").unwrap();
        fs::write(to.join("same"), "1").unwrap();
        fs::write(to.join("changed"), "1").unwrap();
        fs::write(to.join("gone"), "1").unwrap();
        let same = || fs::metadata(to.join("same")).unwrap().modified().unwrap();
        let before = same();

        publish(&from, &to, &["same".into(), "changed".into()]).unwrap();

        assert_eq!(same(), before);
        assert_eq!(fs::read(to.join("changed")).unwrap(), b"2");
        assert_eq!(fs::read_dir(&to).unwrap().count(), 2);
    }

    #[test]
    fn a_missing_object_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = publish(folder.path(), &folder.path().join("to"), &["enforce".into()]).unwrap_err();
        assert!(format!("{error:#}").contains("enforce"), "{error:#}");
    }
}
