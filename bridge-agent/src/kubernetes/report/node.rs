//! The `BridgeNode` of this node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client, Resource};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::super::engines::Engines;
use super::super::objects::{BridgeNodeMeta, NodeObject};
use super::super::resources::{BridgeNodeStatus, Condition, GROUP, MANAGER, PoolUse, VERSION};
use super::super::state::State;
use super::conditions::{condition, now, truth};

/// An agent that has not written its heartbeat for a few of these is dead or cut off.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(60);
/// Errors and refused policies that are listed; the others are counted.
const LISTED: usize = 10;

/// Writes the object, and notices its deletion.
pub(super) struct Node {
    client: Client,
    name: String,
    /// Written last, and when.
    written: Option<(BridgeNodeStatus, Instant)>,
}

/// Notifies of the deletion of the object.
pub(super) struct Deleted {
    notify: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Deleted {
    pub(super) async fn recv(&mut self) {
        self.notify.notified().await;
    }
}

impl Drop for Deleted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    pub(super) fn new(client: Client, name: &str) -> Self {
        Self { client, name: name.to_owned(), written: None }
    }

    /// Watches the object.
    pub(super) fn watch(&self) -> Deleted {
        let notify = Arc::new(Notify::new());
        let sender = Arc::clone(&notify);
        let selector = format!("metadata.name={}", self.name);
        let api = Api::<BridgeNodeMeta>::all(self.client.clone());
        let task = tokio::spawn(async move {
            let mut events = Box::pin(watcher(api, Config::default().fields(&selector)));
            let mut listed = false;
            while let Some(event) = events.next().await {
                match event {
                    Ok(Event::Init) => listed = false,
                    Ok(Event::InitApply(_)) => listed = true,
                    Ok(Event::InitDone) if listed => {}
                    Ok(Event::InitDone | Event::Delete(_)) => sender.notify_one(),
                    Ok(Event::Apply(_)) => {}
                    // The heartbeat finds a deleted object as well.
                    Err(_) => tokio::time::sleep(HEARTBEAT).await,
                }
            }
        });
        Deleted { notify, task }
    }

    /// Has the next write happen whether or not anything changed.
    pub(super) fn forget(&mut self) {
        self.written = None;
    }

    /// Writes the status if it changed, or if a heartbeat is due.
    pub(super) async fn write(&mut self, state: &State, engines: &Engines) -> kube::Result<()> {
        let before =
            self.written.as_ref().map(|(status, _)| status.conditions.as_slice()).unwrap_or_default();
        let mut status = status(state, engines, before);
        if let Some((written, since)) = &self.written {
            status.heartbeat_time.clone_from(&written.heartbeat_time);
            if *written == status && since.elapsed() < HEARTBEAT {
                return Ok(());
            }
        }
        status.heartbeat_time = now();
        self.apply(&status).await?;
        self.written = Some((status, Instant::now()));
        Ok(())
    }

    async fn apply(&self, status: &BridgeNodeStatus) -> kube::Result<()> {
        let nodes = Api::<BridgeNodeMeta>::all(self.client.clone());
        let object = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": "BridgeNode",
            "metadata": { "name": self.name },
            "status": status,
        });
        let (patch, parameters) = (Patch::Apply(&object), PatchParams::apply(MANAGER).force());
        match nodes.patch_status(&self.name, &parameters, &patch).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(error)) if error.code == 404 => {
                self.create().await?;
                nodes.patch_status(&self.name, &parameters, &patch).await.map(drop)
            }
            // Version 0.1 wrote `engines` as a text, with which the object no longer matches its schema.
            Err(kube::Error::Api(error)) if !matches!(error.code, 401 | 403 | 409) => {
                let reset = json!({ "status": null });
                nodes.patch_status(&self.name, &PatchParams::default(), &Patch::Merge(&reset)).await?;
                nodes.patch_status(&self.name, &parameters, &patch).await.map(drop)
            }
            Err(error) => Err(error),
        }
    }

    async fn create(&self) -> kube::Result<()> {
        // Deleted together with its Node. Without the right to read that, the object has no owner.
        let owner = match Api::<NodeObject>::all(self.client.clone()).get_opt(&self.name).await {
            Err(kube::Error::Api(error)) if error.code == 403 => None,
            owner => owner?.and_then(|node| node.owner_ref(&())),
        };
        let resource = ApiResource::erase::<BridgeNodeMeta>(&());
        let nodes = Api::<DynamicObject>::all_with(self.client.clone(), &resource);
        let mut object = DynamicObject::new(&self.name, &resource).data(json!({ "spec": {} }));
        object.metadata.owner_references = owner.map(|owner| vec![owner]);
        match nodes.create(&PostParams::default(), &object).await {
            Err(kube::Error::Api(error)) if error.code == 409 => Ok(()),
            result => result.map(drop),
        }
    }
}

fn status(state: &State, engines: &Engines, before: &[Condition]) -> BridgeNodeStatus {
    let applied = state.applied().borrow().clone();
    let cluster = state.status();
    let pods = cluster.pods;
    let refused = applied.refused;
    let mut errors: Vec<String> = applied.error.iter().cloned().collect();
    errors.extend(state.failures());
    errors.extend(engines.errors.iter().cloned());
    errors.extend(refused.iter().map(ToString::to_string));
    let pool = engines.pool.as_ref().and_then(|pool| pool.summary().ok());
    let current = match (&applied.error, cluster.current) {
        (Some(error), _) => (false, "NotApplied", error.clone()),
        (None, false) if state.is_refused() => (false, "WatchRefused", state.failures().join("; ")),
        (None, false) => (false, "NotListed", format!("not listed yet: {}", cluster.waiting_for.join(", "))),
        (None, true) => (true, "Applied", String::new()),
    };
    let ready = match engines.unready.is_empty() {
        true => (true, "Enforcing", String::new()),
        false => (false, "NotEnforcing", engines.unready.join("; ")),
    };
    let healthy = match (&engines.divergence, engines.errors.is_empty()) {
        (Some(divergence), _) => (false, "EnginesDiverge", divergence.clone()),
        (None, false) => (false, "EngineFailed", engines.errors.join("; ")),
        (None, true) => (true, "EnginesAgree", String::new()),
    };
    let conditions = [("Ready", ready), ("Current", current), ("DatapathHealthy", healthy)];
    let conditions = conditions
        .map(|(kind, (holds, reason, message))| condition(before, kind, truth(holds), 0, reason, &message));
    BridgeNodeStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        heartbeat_time: String::new(),
        mode: match (engines.mode.as_str(), engines.names.is_empty()) {
            (_, true) => "none".to_owned(),
            ("", _) => "enforce".to_owned(),
            (mode, _) => mode.to_owned(),
        },
        engines: engines.names.iter().map(ToString::to_string).collect(),
        policy_generation: engines.generation.into(),
        policy_count: count(applied.policies.len()),
        policy_hash: applied.sets.cluster,
        namespace_policy_hash: applied.sets.namespaces,
        refused_set: if refused.len() > LISTED { applied.sets.refused } else { String::new() },
        refused_count: count(refused.len()),
        refused_policies: refused.into_iter().take(LISTED).collect(),
        interfaces: engines.interfaces.clone(),
        pods: count(pods),
        error_count: count(errors.len()),
        errors: errors.into_iter().take(LISTED).collect(),
        remarks: applied.remarks.into_iter().take(LISTED).collect(),
        pool: pool.map(|pool| PoolUse {
            usage: format!("{}/{}", pool.held, pool.available),
            held: i64::try_from(pool.held).unwrap_or(i64::MAX),
            available: pool.available.into(),
        }),
        conditions: conditions.into(),
    }
}

/// The API has no unsigned numbers.
fn count(of: usize) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}
