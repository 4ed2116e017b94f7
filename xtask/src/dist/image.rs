//! The container image for every architecture as one OCI archive: the static binary, iptables of both backends, nft, and their
//! libraries from Debian's packages. It has no shell and no package manager.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Architecture, Dist, debian};
use crate::{cmd, setup::cache};

/// Debian's packages of the programs, and those that their libraries are in.
const PACKAGES: [&str; 15] = [
    "iptables",
    "nftables",
    "libbsd0",
    "libc6",
    "libedit2",
    "libgmp10",
    "libip4tc2",
    "libip6tc2",
    "libjansson4",
    "libmd0",
    "libmnl0",
    "libnftables1",
    "libnftnl11",
    "libtinfo6",
    "libxtables12",
];
const PROGRAMS: [&str; 3] = ["xtables-nft-multi", "xtables-legacy-multi", "nft"];
/// The largest image, unpacked, in bytes.
const MAX_SIZE: u64 = 60_000_000;
const NAME: &str = "localhost/bridge-agent";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub(super) fn path(dist: &Dist) -> PathBuf {
    dist.out.join(format!("bridge-agent-{}-image.tar", dist.version))
}

fn root(dist: &Dist, architecture: Architecture) -> PathBuf {
    dist.work.join("image").join(architecture.machine())
}

/// Writes the archive, whose index names an image for each architecture.
pub(super) fn build(dist: &Dist) -> Result<()> {
    let layout = dist.work.join("image/layout");
    drop(fs::remove_dir_all(&layout));
    fs::create_dir_all(layout.join("blobs/sha256"))?;
    let created =
        cmd::output(cmd::command("date").args(["-u", "-d", &format!("@{}", dist.epoch), "+%FT%TZ"]))?;
    let mut manifests = Vec::new();
    for architecture in dist.architectures.iter().copied() {
        let root = root(dist, architecture);
        fill(dist, architecture, &root)?;
        let (layer, content) = pack(dist, &root, &layout)?;
        let config = json!({
            "architecture": architecture.debian(), "os": "linux", "created": created.trim(),
            "config": {
                "Entrypoint": ["/usr/local/bin/bridge-agent"], "Cmd": ["run"],
                "Env": ["PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Labels": {"org.opencontainers.image.version": dist.version, "org.opencontainers.image.licenses": "MIT OR Apache-2.0"},
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{content}")]},
            "history": [{"created": created.trim(), "created_by": "cargo xtask dist"}],
        });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": blob(&layout, "application/vnd.oci.image.config.v1+json", &config)?, "layers": [layer],
        });
        let mut named = blob(&layout, MANIFEST, &manifest)?;
        named["platform"] = json!({"architecture": architecture.debian(), "os": "linux"});
        manifests.push(named);
    }
    let list = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    let mut list = blob(&layout, INDEX, &list)?;
    list["annotations"] = json!({
        "io.containerd.image.name": format!("{NAME}:{}", dist.version),
        "org.opencontainers.image.ref.name": dist.version,
    });
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [list]});
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar(dist, &layout, &path(dist))
}

/// Packs `folder` into `archive` without a trace of this machine or this moment.
fn tar(dist: &Dist, folder: &Path, archive: &Path) -> Result<()> {
    let mut tar = cmd::command("tar");
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", dist.epoch)).arg("-C").arg(folder).arg("-cf").arg(archive).arg(".");
    cmd::run(&mut tar)
}

/// Packs `root` as a layer; returns its descriptor, and the checksum of its content.
fn pack(dist: &Dist, root: &Path, layout: &Path) -> Result<(Value, String)> {
    let archive = root.with_extension("tar");
    tar(dist, root, &archive)?;
    let size = fs::metadata(&archive)?.len();
    ensure!(size <= MAX_SIZE, "the image has {size} bytes, more than {MAX_SIZE}");
    let content = sum(&archive)?;
    let packed = layout.join("layer");
    let script = "gzip -9n <\"$1\" >\"$2\"";
    cmd::run(cmd::command("sh").args(["-euc", script, "sh"]).arg(&archive).arg(&packed))?;
    fs::remove_file(&archive)?;
    let descriptor = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": format!("sha256:{}", sum(&packed)?), "size": fs::metadata(&packed)?.len(),
    });
    fs::rename(&packed, layout.join("blobs/sha256").join(sum(&packed)?))?;
    Ok((descriptor, content))
}

fn sum(file: &Path) -> Result<String> {
    let sum = cmd::output(cmd::command("sha256sum").arg(file))?;
    Ok(sum.split_whitespace().next().context("sha256sum prints no sum")?.to_owned())
}

/// Writes a value as a blob; returns its descriptor.
fn blob(layout: &Path, media_type: &str, value: &Value) -> Result<Value> {
    let text = value.to_string();
    let file = layout.join("blob");
    fs::write(&file, &text)?;
    let digest = sum(&file)?;
    fs::rename(&file, layout.join("blobs/sha256").join(&digest))?;
    Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": text.len()}))
}

/// Fills `root` with the content of the image.
fn fill(dist: &Dist, architecture: Architecture, root: &Path) -> Result<()> {
    drop(fs::remove_dir_all(root));
    let system = packages(architecture)?;
    let copy = |from: &Path, to: &Path| -> Result<()> {
        fs::create_dir_all(to.parent().context("a file without a folder")?)?;
        cmd::run(cmd::command("cp").arg("-a").arg(from).arg(to))
    };
    let sbin = Path::new("usr/sbin");
    for program in PROGRAMS {
        copy(&system.join(sbin).join(program), &root.join(sbin).join(program))?;
    }
    for suffix in ["", "-save", "-restore"] {
        for family in ["iptables", "ip6tables"] {
            for (name, program) in [("", "nft"), ("-nft", "nft"), ("-legacy", "legacy")] {
                let link = root.join(sbin).join(format!("{family}{name}{suffix}"));
                symlink(format!("xtables-{program}-multi"), link)?;
            }
        }
    }
    let triplet = format!("{}-linux-gnu", architecture.machine());
    // The loader and libraries; what the packages have beside them (locales, gconv, tools) is left out.
    for folder in ["lib64", "lib", &format!("lib/{triplet}"), &format!("usr/lib/{triplet}")] {
        let Ok(entries) = fs::read_dir(system.join(folder)) else { continue };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(".so") && !entry.file_type()?.is_dir() {
                copy(&entry.path(), &root.join(folder).join(&name))?;
            }
        }
    }
    let modules = format!("usr/lib/{triplet}/xtables");
    copy(&system.join(&modules), &root.join(&modules))?;
    for package in PACKAGES {
        let copyright = format!("usr/share/doc/{package}/copyright");
        copy(&system.join(&copyright), &root.join(&copyright))?;
    }
    copy(&dist.binary(architecture), &root.join("usr/local/bin/bridge-agent"))?;
    for folder in [
        "etc/bridge",
        "run/bridge",
        "var/lib/bridge",
        "host/proc/sys/net",
        "host/sys/fs/cgroup",
        "proc",
        "sys",
        "dev",
        "tmp",
    ] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::write(root.join("run/xtables.lock"), "")?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/usr/sbin/nologin\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    cmd::run(cmd::command("chmod").args(["-R", "u=rwX,go=rX"]).arg(root))?;
    fs::set_permissions(root.join("tmp"), Permissions::from_mode(0o1777))?;
    Ok(())
}

/// Fetches and unpacks Debian's packages for `architecture`, unless that was done before; nothing is installed.
fn packages(architecture: Architecture) -> Result<PathBuf> {
    let root = cache()?.join("image").join(architecture.debian());
    if !root.exists() {
        eprintln!(
            "setup: fetching iptables and nftables for {}: they are in the image",
            architecture.debian()
        );
        debian::unpack(architecture, &PACKAGES, &root)?;
    }
    Ok(root)
}

/// Runs the programs of each image in its root, the foreign ones in emulation; returns the root of this machine's image.
pub(super) fn test(dist: &Dist) -> Result<PathBuf> {
    let mut native = None;
    for architecture in dist.architectures.iter().copied() {
        let root = tempfile::Builder::new().prefix("image").tempdir_in(&dist.work)?.keep();
        unpack(dist, architecture, &root)?;
        let mut emulator = Vec::new();
        if !architecture.is_native() {
            let name = format!("qemu-{}-static", architecture.machine());
            let program = cmd::find_program(&name).with_context(|| format!("there is no {name}"))?;
            fs::copy(program, root.join("emulator"))?;
            emulator.push("/emulator".into());
        }
        // iptables and nft open a netlink socket of nf_tables even for their version, which the emulator does not have: there,
        // the loader lists their libraries.
        let [iptables, nft] = match architecture.is_native() {
            true => {
                [("/usr/sbin/iptables --version", "nf_tables"), ("/usr/sbin/nft --version", "nftables v")]
            }
            false => [
                ("/lib/ld-linux-aarch64.so.1 --list /usr/sbin/iptables", "libnftnl.so"),
                ("/lib/ld-linux-aarch64.so.1 --list /usr/sbin/nft", "libnftables.so"),
            ],
        };
        for (command, expected) in [
            ("/usr/local/bin/bridge-agent --version", dist.version.as_str()),
            iptables,
            ("/usr/sbin/ip6tables-legacy --version", "legacy"),
            nft,
        ] {
            let mut words = vec![root.clone().into_os_string()];
            words.extend(emulator.iter().cloned());
            words.extend(command.split(' ').map(Into::into));
            let said = cmd::output(&mut cmd::as_root(Path::new("chroot"), &words)?)?;
            ensure!(said.contains(expected), "{command} in the image for {}: {said}", architecture.debian());
        }
        if architecture.is_native() {
            native = Some(root);
        } else {
            fs::remove_dir_all(&root)?;
        }
    }
    native.context("no image for this machine was built")
}

/// Unpacks the layer of an image from the archive, found as a runtime finds it: through the index.
fn unpack(dist: &Dist, architecture: Architecture, root: &Path) -> Result<()> {
    let layout = tempfile::tempdir_in(&dist.work)?;
    cmd::run(cmd::command("tar").arg("-xf").arg(path(dist)).arg("-C").arg(layout.path()))?;
    let file = |descriptor: &Value| -> Result<PathBuf> {
        let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        let digest = digest.context("a descriptor without a digest")?;
        let file = layout.path().join("blobs/sha256").join(digest);
        ensure!(sum(&file)? == digest, "{digest} is another blob");
        ensure!(descriptor["size"].as_u64() == Some(fs::metadata(&file)?.len()), "{digest} has another size");
        Ok(file)
    };
    let read = |path: &Path| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let index = read(&layout.path().join("index.json"))?;
    let list = read(&file(&index["manifests"][0])?)?;
    let ours = |manifest: &&Value| manifest["platform"]["architecture"] == architecture.debian();
    let manifest = list["manifests"].as_array().and_then(|manifests| manifests.iter().find(ours));
    let manifest =
        read(&file(manifest.with_context(|| format!("no image for {}", architecture.debian()))?)?)?;
    file(&manifest["config"])?;
    let layer = file(&manifest["layers"][0])?;
    cmd::run(&mut cmd::as_root(
        Path::new("tar"),
        &["-xzf".into(), layer.into(), "-C".into(), root.to_path_buf().into()],
    )?)
}
