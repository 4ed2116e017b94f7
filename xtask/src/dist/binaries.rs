//! The static binaries and their bill of materials.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{Architecture, Dist, zig};
use crate::{
    cmd,
    setup::{self, toolchain::EbpfToolchain},
    workspace,
};

/// The largest binary that is shipped, in bytes.
const MAX_SIZE: u64 = 16 << 20;

/// Builds the binary of each architecture into `dist.out`, stripped, with its list of dependencies embedded.
pub(super) fn build(dist: &Dist, toolchain: &EbpfToolchain) -> Result<()> {
    let zig = zig::ensure()?;
    let auditable = setup::auditable()?;
    for architecture in Architecture::ALL {
        let mut cargo = cargo(dist, toolchain, architecture);
        let path = [zig.clone().into_os_string(), auditable.parent().map(Into::into).unwrap_or_default()];
        let path =
            env::join_paths(path.into_iter().map(Into::into).chain(env::split_paths(&cmd::search_path())))?;
        cmd::run(cargo.env("PATH", path))?;
        let built = dist.work.join(architecture.target()).join("release/bridge-agent");
        let shipped = dist.binary(architecture);
        let sections = ["--strip-all", "--keep-section=.dep-v0", "-o"];
        cmd::run(cmd::command("llvm-strip").args(sections).arg(&shipped).arg(&built))?;
        fs::set_permissions(&shipped, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// The command that builds the agent for `architecture`.
fn cargo(dist: &Dist, toolchain: &EbpfToolchain, architecture: Architecture) -> Command {
    let mut cargo = cmd::command(&toolchain.cargo);
    cargo.args([
        "auditable",
        "zigbuild",
        "--release",
        "--locked",
        "--package",
        "bridge-agent",
        "--bin",
        "bridge-agent",
    ]);
    cargo.args(["-Z", "build-std=std,panic_unwind", "--target", architecture.target(), "--target-dir"]);
    cargo.arg(&dist.work).current_dir(workspace::root());
    // The paths of this machine would make the binaries differ from those of another.
    let home = env::var("CARGO_HOME").or_else(|_| env::var("HOME").map(|home| format!("{home}/.cargo")));
    let flags = [
        "-Clink-self-contained=no".to_owned(),
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={}=/bridge", workspace::root().display()),
        format!("--remap-path-prefix={}=/cargo", home.unwrap_or_default()),
    ];
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env_remove("RUSTFLAGS");
    cargo.env("RUSTC", &toolchain.rustc).env("CARGO", &toolchain.cargo);
    cargo.env("SOURCE_DATE_EPOCH", dist.epoch.to_string());
    if toolchain.stable {
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    cargo
}

/// Writes the bill of materials (CycloneDX, JSON) from the list of dependencies embedded in each binary.
pub(super) fn bill_of_materials(dist: &Dist) -> Result<()> {
    let converter = setup::auditable_to_cyclonedx()?;
    for architecture in Architecture::ALL {
        let binary = dist.binary(architecture);
        let bill = cmd::output(cmd::command(&converter).arg(&binary))?;
        let parsed: serde_json::Value =
            serde_json::from_str(&bill).context("the bill of materials is not JSON")?;
        let components = parsed["components"].as_array().map_or(0, Vec::len);
        ensure!(
            components > 100,
            "the bill of materials lists {components} components: dependencies are missing"
        );
        fs::write(binary.with_extension(format!("{}.cdx.json", architecture.machine())), bill)?;
    }
    Ok(())
}

/// Checks that each binary is static, small enough, and runs: the foreign one under user emulation.
pub(super) fn test(dist: &Dist) -> Result<()> {
    let mut objects = Vec::new();
    for architecture in Architecture::ALL {
        let binary = dist.binary(architecture);
        let kind = cmd::output(cmd::command("file").arg("--brief").arg(&binary))?;
        ensure!(kind.contains("static"), "{} is not static: {kind}", binary.display());
        let size = fs::metadata(&binary)?.len();
        ensure!(size <= MAX_SIZE, "{} has {size} bytes, more than {MAX_SIZE}", binary.display());
        let run = |arguments: &[&str]| {
            let mut command = match architecture.machine() == env::consts::ARCH {
                true => cmd::command(&binary),
                false => {
                    let mut emulator = cmd::command(format!("qemu-{}-static", architecture.machine()));
                    emulator.arg(&binary);
                    emulator
                }
            };
            cmd::output(command.args(arguments).current_dir(workspace::root()))
        };
        ensure!(run(&["--version"])?.trim() == format!("bridge-agent {}", dist.version));
        for example in ["node", "host"] {
            let file = format!("deploy/examples/{example}.yaml");
            run(&["check", "--config", &file])?;
        }
        objects.push(run(&[
            "rules",
            "render",
            "--format",
            "iptables",
            "--config",
            "deploy/examples/node.yaml",
        ])?);
        if run(&["check", "--config", "Cargo.toml"]).is_ok() {
            bail!("{} accepts a file that is no configuration", binary.display());
        }
    }
    ensure!(objects[0] == objects[1], "the two architectures render different rules from one configuration");
    Ok(())
}
