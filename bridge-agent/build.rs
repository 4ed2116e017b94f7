//! Finds the eBPF objects that `src/datapath/object.rs` embeds.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// The folder of the objects; unset, `target/bpf`.
const OBJECTS: &str = "BRIDGE_BPF_OBJECTS";

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("bridge-agent lies in the workspace");
    let objects = env::var_os(OBJECTS).map_or_else(|| root.join("target/bpf"), PathBuf::from);
    let bins = root.join("bridge-ebpf/src");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={OBJECTS}");
    println!("cargo::rerun-if-changed={}", bins.display());

    // One object for each binary of bridge-ebpf, whose source is src/NAME/main.rs.
    let entries = fs::read_dir(&bins).unwrap_or_else(|error| panic!("{}: {error}", bins.display()));
    for entry in entries {
        let entry = entry.unwrap_or_else(|error| panic!("{}: {error}", bins.display()));
        if !entry.path().join("main.rs").exists() {
            continue;
        }
        let object = objects.join(entry.file_name());
        println!("cargo::rerun-if-changed={}", object.display());
        if !object.exists() {
            println!(
                "cargo::error=the eBPF object {} has not been built: run `cargo xtask build`",
                object.strip_prefix(root).unwrap_or(&object).display()
            );
        }
    }
    println!("cargo::rustc-env={OBJECTS}={}", objects.display());
}
