//! `bridge-agent nodeport-range`: which ports the cluster takes NodePorts from.

use std::{
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{DEFAULT_CONFIG, Error, Global, print, print_json};
use crate::{
    config::{Config, PortItem, leaf::Leaf as _},
    model::PortRange,
    nodeport_range::{self, conflicts, manifest, store, surroundings},
};

/// Show or change kube-apiserver's --service-node-port-range in its static pod manifest.
#[derive(Debug, Args)]
pub struct NodeportRange {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the active range
    Show(Manifest),
    /// Change the range: comments and order stay, a backup is kept, kubelet restarts kube-apiserver
    Set(Set),
}

#[derive(Debug, Args)]
struct Manifest {
    /// The static pod manifest of kube-apiserver, YAML or JSON
    #[arg(long, value_name = "PATH", default_value = "/etc/kubernetes/manifests/kube-apiserver.yaml")]
    manifest: PathBuf,
}

#[derive(Debug, Args)]
struct Set {
    #[command(flatten)]
    manifest: Manifest,
    /// The first and the last port, such as 30000-32767
    #[arg(value_name = "RANGE", value_parser = range)]
    range: PortRange,
    /// Print the change as a unified diff, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Where the manifest of before is kept; never the directory that kubelet watches. Left out: bridge-backup beside that
    #[arg(long, value_name = "DIR")]
    backup_dir: Option<PathBuf>,
}

fn range(text: &str) -> Result<PortRange, String> {
    PortItem::parse(text).map(|item| item.0).map_err(|problem| problem.to_string())
}

impl NodeportRange {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match &self.action {
            Action::Show(at) => show(global, &at.manifest),
            Action::Set(set) => set.run(global),
        }
    }
}

fn show(global: &Global, path: &Path) -> Result<(), Error> {
    let found = manifest::read(&store::read(path)?, path)?;
    let range = written(found.range);
    if global.json {
        let set = found.written.is_some();
        return print_json(&json!({ "ok": true, "manifest": path, "range": range, "set": set }));
    }
    let source = if found.written.is_some() { "" } else { " (the default; the manifest has no flag)" };
    print(&format!("{range}{source}\n"))
}

impl Set {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let path = &self.manifest.manifest;
        let old = store::read(path)?;
        let found = manifest::read(&old, path)?;
        let config = configuration(global)?;
        let pool = config.as_ref().and_then(|config| config.port_pool.as_ref());
        let around = surroundings::look(pool, found.own_port, self.range)?;
        let conflicts = conflicts::find(self.range, &around);
        if !conflicts.is_empty() {
            return Err(nodeport_range::Error::Conflicts { range: self.range, conflicts }.into());
        }
        // Where the flag says the same in other words (30000+2767), nothing is to be done either.
        let new = if found.range == self.range && found.written.is_some() {
            old.clone()
        } else {
            manifest::with_range(&old, path, self.range)?
        };
        let name = path.display().to_string();
        let diff = similar::TextDiff::from_lines(&old, &new).unified_diff().header(&name, &name).to_string();
        let changed = new != old;
        let mut backup = None;
        if changed && !self.dry_run {
            let directory = self.backup_dir.clone().unwrap_or_else(|| store::backup_directory(path));
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            backup = Some(store::replace(path, &old, &new, &directory, now)?);
        }
        let remarks = self.remarks(config.as_ref(), global);
        if global.json {
            return print_json(&json!({
                "ok": true,
                "manifest": path,
                "before": written(found.range),
                "range": written(self.range),
                "changed": changed,
                "dryRun": self.dry_run,
                "diff": diff,
                "backup": backup,
                "remarks": remarks,
            }));
        }
        let mut text = match (&backup, changed) {
            (_, false) => format!("{name}: the range is {} already\n", written(self.range)),
            (None, true) => diff,
            (Some(backup), true) => format!(
                "{name}: {} is now {}; the file of before is {}\nkubelet restarts kube-apiserver. With several nodes in the \
                 control plane, do the same on each.\n",
                written(found.range),
                written(self.range),
                backup.display()
            ),
        };
        // A diff is for `patch`, too.
        if !self.dry_run {
            text += &remarks.iter().map(|remark| format!("{remark}\n")).collect::<String>();
        }
        print(&text)
    }

    fn remarks(&self, config: Option<&Config>, global: &Global) -> Vec<String> {
        let path = global.config.display();
        let Some(config) = config else {
            return vec![format!("there is no {path} here, so no port pool was looked at")];
        };
        let other = config.node_ports.as_ref().filter(|node_ports| node_ports.range.0 != self.range);
        let remark = |range: PortRange| {
            format!(
                "{path} has nodePorts.range {range}: write \"{}\" there, on every node",
                written(self.range)
            )
        };
        other.map(|node_ports| remark(node_ports.range.0)).into_iter().collect()
    }
}

/// Only where the configuration usually is, it need not be: the control plane may have no agent.
fn configuration(global: &Global) -> Result<Option<Config>, Error> {
    Ok(surroundings::configuration(&global.config, global.config == Path::new(DEFAULT_CONFIG))?)
}

/// Always both ends, as kube-apiserver has it.
fn written(range: PortRange) -> String {
    format!("{}-{}", range.first, range.last)
}
