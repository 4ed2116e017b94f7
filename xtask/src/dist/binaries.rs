//! The static binaries and their bill of materials.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{Architecture, Dist, zig};
use crate::{
    cmd,
    setup::{self, toolchain::EbpfToolchain},
    workspace,
};

/// The largest binary that is shipped, in bytes.
const MAX_SIZE: usize = 16 << 20;

/// Builds the binary of each architecture into `dist.out`, stripped, with its list of dependencies embedded.
pub(super) fn build(dist: &Dist, toolchain: &EbpfToolchain) -> Result<()> {
    strip_objects(dist)?;
    let zig = zig::ensure()?;
    let auditable = setup::auditable()?;
    let tools = [Some(zig.as_path()), auditable.parent()];
    let path: Vec<_> = tools.into_iter().flatten().map(Path::to_owned).collect();
    let path = env::join_paths(path.into_iter().chain(env::split_paths(&cmd::search_path())))?;
    for architecture in &dist.architectures {
        cmd::run(cargo(dist, toolchain, *architecture)?.env("PATH", &path))?;
        let built = dist.work.join(architecture.target()).join("dist/bridge-agent");
        let shipped = dist.binary(*architecture);
        fs::copy(&built, &shipped).with_context(|| built.display().to_string())?;
        fs::set_permissions(&shipped, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Writes the eBPF objects without DWARF, of which nothing reads more than the BTF that is made of it, to be embedded.
fn strip_objects(dist: &Dist) -> Result<()> {
    let folder = dist.objects();
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for object in fs::read_dir(workspace::objects())? {
        let object = object?;
        let mut strip = cmd::command("llvm-objcopy");
        let stripped = folder.join(object.file_name());
        let part = stripped.with_extension("part");
        cmd::run(strip.arg("--strip-debug").arg(object.path()).arg(&part))?;
        // An equal file is left untouched: otherwise cargo builds the agent again.
        if fs::read(&stripped).is_ok_and(|present| fs::read(&part).is_ok_and(|new| new == present)) {
            fs::remove_file(&part)?;
        } else {
            fs::rename(&part, &stripped)?;
        }
    }
    Ok(())
}

/// Returns the command that builds the agent for `architecture`.
fn cargo(dist: &Dist, toolchain: &EbpfToolchain, architecture: Architecture) -> Result<Command> {
    let mut cargo = cmd::command(&toolchain.cargo);
    cargo.args(["auditable", "zigbuild", "--profile", "dist", "--locked"]);
    cargo.args(["--package", "bridge-agent", "--bin", "bridge-agent"]);
    cargo.args(["-Z", "build-std=std,panic_unwind", "--target", architecture.target(), "--target-dir"]);
    cargo.arg(&dist.work).current_dir(workspace::root());
    // Paths of this machine would make the binary differ from that of another; the last prefix that matches counts.
    let home = workspace::cargo_home()?;
    let source = cmd::output(cmd::command(&toolchain.rustc).args(["--print", "sysroot"]))?;
    let renamed = [
        (source.trim(), "/rust"),
        (&home.to_string_lossy(), "/cargo"),
        (&workspace::root().to_string_lossy(), "/bridge"),
        (&dist.work.to_string_lossy(), "/target"),
    ];
    let mut flags = vec!["-Clink-self-contained=no".to_owned(), "-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(renamed.map(|(from, to)| format!("--remap-path-prefix={from}={to}")));
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env_remove("RUSTFLAGS");
    cargo.env("RUSTC", &toolchain.rustc).env("CARGO", &toolchain.cargo);
    cargo.env("BRIDGE_BPF_OBJECTS", dist.objects());
    cargo.env("CARGO_INCREMENTAL", "0").env("SOURCE_DATE_EPOCH", dist.epoch.to_string());
    if toolchain.stable {
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    Ok(cargo)
}

/// Writes the bill of materials (CycloneDX, JSON) from the list of dependencies embedded in each binary.
pub(super) fn bill_of_materials(dist: &Dist) -> Result<()> {
    let converter = setup::auditable_to_cyclonedx()?;
    for architecture in dist.architectures.iter().copied() {
        let binary = dist.binary(architecture);
        let bill = cmd::output(cmd::command(&converter).arg(&binary))?;
        let parsed: serde_json::Value =
            serde_json::from_str(&bill).context("the bill of materials is not JSON")?;
        let components = parsed["components"].as_array().map_or(0, Vec::len);
        ensure!(
            components > 100,
            "the bill of materials lists {components} components: dependencies are missing"
        );
        let mut name = binary.into_os_string();
        name.push(".cdx.json");
        fs::write(&name, bill)?;
    }
    Ok(())
}

/// Checks that each binary is static, small, complete, free of paths of this machine, and runs in a root that holds
/// nothing else: the foreign one under user emulation.
pub(super) fn test(dist: &Dist) -> Result<()> {
    let mut rules = Vec::new();
    for architecture in dist.architectures.iter().copied() {
        let binary = dist.binary(architecture);
        let name = binary.display();
        let kind = cmd::output(cmd::command("file").arg("--brief").arg(&binary))?;
        ensure!(kind.contains("static") && kind.contains("stripped"), "{name}: {kind}");
        let bytes = fs::read(&binary)?;
        let size = bytes.len();
        ensure!(size <= MAX_SIZE, "{name} has {size} bytes, more than {MAX_SIZE}");
        for object in fs::read_dir(dist.objects())? {
            let object = object?.path();
            ensure!(contains(&bytes, &fs::read(&object)?), "{name} lacks the object {}", object.display());
        }
        for folder in [workspace::root(), &workspace::cargo_home()?] {
            let folder = folder.as_os_str().as_encoded_bytes();
            ensure!(!contains(&bytes, folder), "{name} names {}", String::from_utf8_lossy(folder));
        }
        rules.push(in_bare_root(dist, architecture)?);
    }
    ensure!(rules.iter().all(|text| *text == rules[0]), "the architectures render different rules");
    Ok(())
}

/// Returns whether `bytes` has `wanted` in it.
fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Runs the binary in a root that holds it and the examples and nothing else; returns the rules that it renders.
fn in_bare_root(dist: &Dist, architecture: Architecture) -> Result<String> {
    let root = tempfile::tempdir()?;
    fs::copy(dist.binary(architecture), root.path().join("bridge-agent"))?;
    let mut command = vec!["/bridge-agent"];
    if architecture.machine() != env::consts::ARCH {
        let emulator = cmd::find_program("qemu-aarch64-static").context("qemu-aarch64-static")?;
        fs::copy(emulator, root.path().join("qemu"))?;
        command.insert(0, "/qemu");
    }
    for example in ["node.yaml", "host.yaml"] {
        let from = workspace::root().join("deploy/examples").join(example);
        fs::copy(from, root.path().join(example))?;
    }
    fs::write(root.path().join("none.yaml"), "no: configuration\n")?;
    let run = |arguments: &[&str]| {
        let words = [&[root.path().to_str().unwrap_or_default()], command.as_slice(), arguments].concat();
        let words: Vec<_> = words.into_iter().map(Into::into).collect();
        cmd::output(&mut cmd::as_root(Path::new("chroot"), &words)?)
    };
    ensure!(run(&["--version"])?.trim() == format!("bridge-agent {}", dist.version));
    run(&["--help"])?;
    run(&["check", "--config", "/node.yaml"])?;
    run(&["check", "--config", "/host.yaml"])?;
    ensure!(run(&["check", "--config", "/none.yaml"]).is_err(), "a file that is no configuration is valid");
    run(&["generate", "--directory", "/generated"])?;
    ensure!(root.path().join("generated/man/bridge-agent-run.1").exists(), "no man page");
    run(&["rules", "render", "--format", "iptables", "--config", "/node.yaml"])
}
