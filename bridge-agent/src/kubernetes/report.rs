//! What the agent of a node writes into the cluster: its `BridgeNode`, and a condition into each policy.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;

use super::connect;
use super::engines::Engines;
use super::follow::State;
use super::objects::NodeObject;
use super::resources::{ACCEPTED, BridgeNode, BridgeNodeSpec, BridgeNodeStatus, BridgePolicy, PoolUse};
use super::saved::Saved;
use crate::config::Kubernetes;
use crate::kernel::time;

/// How often it is looked whether interfaces or the use of the pool have changed.
const LOOK: Duration = Duration::from_secs(15);
/// Between two attempts to write.
const AGAIN: Duration = Duration::from_secs(5);
/// So many errors are told.
const ERRORS: usize = 10;
/// For each node of the cluster, how long its agents together wait before one writes a condition: the first one to
/// do so spares the others.
const FOR_EACH_NODE: Duration = Duration::from_millis(1);
/// And at most.
const LONGEST: Duration = Duration::from_secs(2);

/// Writes for as long as it is polled.
pub(super) async fn run(
    section: Kubernetes,
    node: Option<String>,
    state: State,
    engines: watch::Receiver<Engines>,
    saved: Option<Saved>,
) {
    let Some(node) = node else { return };
    let mut client = None;
    let mut writer = Writer { node, told: None, warned: BTreeSet::new() };
    let mut on_disk = None;
    let mut due = Instant::now() + LOOK;
    loop {
        // Whichever comes first.
        drop(tokio::time::timeout_at(due.into(), state.news()).await);
        due = Instant::now() + LOOK;
        if let Some(saved) = &saved
            && state.synced()
            && on_disk != Some(state.version())
        {
            let version = state.version();
            let result = saved.save(&state.cluster());
            match result {
                Ok(()) => on_disk = Some(version),
                Err(error) => tracing::warn!(%error, "what is known of the cluster cannot be saved"),
            }
        }
        if client.is_none() {
            client = connect::connect(&section).await.ok().map(|(client, _)| client);
        }
        let Some(connected) = &client else { continue };
        if let Err(error) = writer.write(connected, &state, &engines).await {
            if writer.warned.insert(error.to_string()) {
                tracing::warn!(%error, "what this agent does cannot be written into the cluster");
            }
            client = None;
            due = Instant::now() + AGAIN;
        }
    }
}

struct Writer {
    node: String,
    /// What was written last.
    told: Option<BridgeNodeStatus>,
    /// What was complained about already.
    warned: BTreeSet<String>,
}

impl Writer {
    async fn write(
        &mut self,
        client: &Client,
        state: &State,
        engines: &watch::Receiver<Engines>,
    ) -> kube::Result<()> {
        // What keeps the one from being written is no reason to leave the other.
        let node = self
            .tell(client, {
                let engines = engines.borrow().clone();
                status(state, engines)
            })
            .await;
        if state.synced() {
            write_conditions(client, state).await?;
        }
        node
    }

    async fn tell(&mut self, client: &Client, status: BridgeNodeStatus) -> kube::Result<()> {
        if self.told.as_ref() != Some(&status) {
            self.write_node(client, &status).await?;
            self.told = Some(status);
        }
        Ok(())
    }

    async fn write_node(&self, client: &Client, status: &BridgeNodeStatus) -> kube::Result<()> {
        let nodes = Api::<BridgeNode>::all(client.clone());
        // A pool that is gone must go: `null` says so in a merge.
        let mut value = json!({ "status": status });
        if status.pool.is_none() {
            value["status"]["pool"] = serde_json::Value::Null;
        }
        let patch = Patch::Merge(value);
        match nodes.patch_status(&self.node, &PatchParams::default(), &patch).await {
            Err(error) if is_absent(&error) => {
                let mut object = BridgeNode::new(&self.node, BridgeNodeSpec {});
                // It goes with its node.
                let owner = Api::<NodeObject>::all(client.clone()).get_opt(&self.node).await?;
                object.metadata.owner_references =
                    owner.and_then(|node| kube::Resource::owner_ref(&node, &())).map(|owner| vec![owner]);
                nodes.create(&PostParams::default(), &object).await?;
                nodes.patch_status(&self.node, &PatchParams::default(), &patch).await.map(drop)
            }
            result => result.map(drop),
        }
    }
}

fn is_absent(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn status(state: &State, engines: Engines) -> BridgeNodeStatus {
    let applied = state.applied();
    let pods = state.cluster().pods.len();
    let mut errors = applied.remarks;
    errors.extend(applied.error);
    errors.extend(engines.errors);
    let pool = engines.pool.and_then(|pool| pool.summary().ok());
    BridgeNodeStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        mode: match (engines.mode, engines.names.is_empty()) {
            (_, true) => "none".to_owned(),
            (mode, _) if mode.is_empty() => "enforce".to_owned(),
            (mode, _) => mode,
        },
        engines: engines.names.join(","),
        current: applied.current,
        generation: engines.generation.into(),
        policy_count: count(applied.policies.len()),
        policies: applied.policies,
        interfaces: engines.interfaces,
        pods: count(pods),
        error_count: count(errors.len()),
        errors: errors.into_iter().take(ERRORS).collect(),
        pool: pool.map(|pool| {
            let (held, available) = (pool.held, pool.available);
            PoolUse {
                usage: format!("{held}/{available}"),
                held: i64::try_from(held).unwrap_or(i64::MAX),
                available: available.into(),
            }
        }),
    }
}

/// The API has no unsigned numbers.
fn count(of: usize) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}

/// Tells of each policy whether it is followed, where its status does not say so already.
async fn write_conditions(client: &Client, state: &State) -> kube::Result<()> {
    if untold(state).is_empty() {
        return Ok(());
    }
    let nodes = u32::try_from(state.cluster().nodes.len()).unwrap_or(u32::MAX);
    let most = FOR_EACH_NODE.saturating_mul(nodes).min(LONGEST);
    tokio::time::sleep(most.mul_f64(rand::random_range(0.0..1.0))).await;
    let policies = Api::<BridgePolicy>::all(client.clone());
    for (name, condition) in untold(state) {
        let patch = Patch::Merge(json!({ "status": { "conditions": [condition] } }));
        match policies.patch_status(&name, &PatchParams::default(), &patch).await {
            // Deleted meanwhile.
            Err(error) if is_absent(&error) => {}
            result => drop(result?),
        }
    }
    Ok(())
}

fn untold(state: &State) -> Vec<(String, serde_json::Value)> {
    let cluster = state.cluster();
    let untold = cluster.policies.iter().filter(|(_, policy)| {
        let told = policy.told.as_ref().map(|told| (told.generation, told.accepted));
        told != Some((policy.generation, policy.rules.is_ok()))
    });
    let condition = |policy: &super::cluster::Policy| {
        let accepted = policy.rules.is_ok();
        let (reason, message) = match &policy.rules {
            Ok(rules) => ("Valid", format!("{} rules", rules.len())),
            Err(reason) => ("Invalid", reason.clone()),
        };
        // When it was last different, as the conventions of the API have it.
        let before = policy.told.as_ref().filter(|told| told.accepted == accepted);
        let since = before.map_or_else(time::wall_clock, |told| told.since.clone());
        json!({
            "type": ACCEPTED,
            "status": if accepted { "True" } else { "False" },
            "observedGeneration": policy.generation,
            "reason": reason,
            "message": message,
            "lastTransitionTime": since,
        })
    };
    untold.map(|(name, policy)| (name.to_owned(), condition(policy))).collect()
}
