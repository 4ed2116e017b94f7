//! The report of this node to the cluster.
//!
//! Every agent writes its own `BridgeNode`. One agent, which holds a Lease, writes the conditions of all policies, so that
//! agents of different versions never overwrite each other.

mod conditions;
mod event;
mod ineffective;
mod lease;
mod node;
mod policies;

use std::time::{Duration, Instant};

use kube::Client;
use tokio::sync::watch;

use self::event::Events;
use self::lease::Lease;
use self::node::Node;
use self::policies::Policies;
use super::connect::{self, cause};
use super::engines::Engines;
use super::saved::Saved;
use super::state::State;
use crate::config::Kubernetes;
use crate::kernel::backoff::Backoff;

/// Changes within this time become one write.
const COALESCE: Duration = Duration::from_millis(50);
/// The use of the port pool is checked this often.
const CHECK: Duration = Duration::from_secs(15);
/// Pause after the cluster was saved: this many times the time that it took, within these bounds.
const SAVING_SHARE: u32 = 20;
const SAVING: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Time between two attempts to write.
const RETRY: Duration = Duration::from_secs(5);

/// Writes until it is dropped.
pub(super) async fn run(
    section: Kubernetes,
    node: Option<String>,
    state: State,
    engines: watch::Receiver<Engines>,
    saved: Option<Saved>,
) {
    let Some(node) = node else { return };
    tokio::join!(save(saved, &state), write(&section, &node, &state, engines));
}

/// Saves the cluster after each change that was applied.
async fn save(saved: Option<Saved>, state: &State) {
    let Some(saved) = saved else { return };
    let mut applied = state.applied();
    let mut on_disk = None;
    let mut again = Backoff::default();
    // The sender is part of the state.
    loop {
        let retry = tokio::time::sleep(again.pause());
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            () = retry, if again != Backoff::default() => {}
        }
        let version = state.version();
        if !state.is_synced() || on_disk == Some(version) {
            continue;
        }
        let start = Instant::now();
        let saved = saved.save(|| state.cluster());
        let first = again == Backoff::default();
        again.note(saved.is_ok());
        match saved {
            Ok(()) => on_disk = Some(version),
            Err(error) if first => {
                tracing::warn!(%error, "the agent cannot save the cluster for its next start; it tries again")
            }
            Err(error) => tracing::debug!(%error, "the agent still cannot save the cluster"),
        }
        // Changes within this time become one file: writing all of a large cluster after each would take most of the time.
        tokio::time::sleep((start.elapsed() * SAVING_SHARE).clamp(SAVING.0, SAVING.1)).await;
    }
}

async fn write(section: &Kubernetes, node: &str, state: &State, engines: watch::Receiver<Engines>) {
    loop {
        // Credentials may have been renewed, so each attempt reads them.
        if let Ok((client, _)) = connect::connect(section).await {
            let events = Events::new(client.clone(), node);
            tokio::select! {
                () = write_node(&client, node, state, engines.clone(), &events) => {}
                () = write_policies(&client, section, node, state, &events) => {}
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Writes the `BridgeNode` until the API server refuses it.
async fn write_node(
    client: &Client,
    name: &str,
    state: &State,
    mut engines: watch::Receiver<Engines>,
    events: &Events,
) {
    let mut node = Node::new(client.clone(), name);
    let mut applied = state.applied();
    let mut deleted = node.watch();
    loop {
        let current = engines.borrow_and_update().clone();
        events.of_node(&current).await;
        applied.borrow_and_update();
        if let Err(error) = node.write(state, &current).await {
            tracing::warn!(error = cause(&error), "the agent cannot write its BridgeNode");
            return;
        }
        tokio::select! {
            _ = applied.changed() => {}
            _ = engines.changed() => {}
            () = deleted.recv() => node.forget(),
            () = tokio::time::sleep(CHECK) => {}
        }
        tokio::time::sleep(COALESCE).await;
    }
}

/// Writes the conditions of policies while this agent holds the Lease.
async fn write_policies(client: &Client, section: &Kubernetes, node: &str, state: &State, events: &Events) {
    let mut lease = Lease::new(client.clone(), node);
    let mut warned = false;
    loop {
        let start = Instant::now();
        let nodes = state.cluster().nodes.len();
        match lease.acquire(nodes).await {
            Ok(true) => {
                let mut policies = Policies::new(client.clone(), state.clone());
                tokio::select! {
                    () = policies.run(&mut lease, events) => {}
                    never = ineffective::refuse(client), if !section.namespace_policies => match never {},
                }
            }
            Ok(false) => {}
            Err(error) if !warned => {
                warned = true;
                tracing::warn!(
                    error = cause(&error),
                    "the agent cannot hold the Lease for conditions of policies"
                );
            }
            Err(_) => {}
        }
        tokio::time::sleep(lease.poll().saturating_sub(start.elapsed())).await;
    }
}
