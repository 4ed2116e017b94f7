//! Events: the changes that an operator must hear of.

use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

use super::super::connect::cause;
use super::super::engines::Engines;
use super::super::resources::{GROUP, MANAGER, VERSION};

/// The namespace of events about objects without one.
const NAMESPACE: &str = "default";
/// The longest note that the API server takes.
const MAX_NOTE: usize = 1024;

/// Writes events. One that cannot be written is lost: it repeats a condition or a log line.
pub(super) struct Events {
    client: Client,
    node: String,
    /// The engines, and the refusals of the pool, at the last call.
    before: Mutex<Option<(Engines, u64)>>,
}

impl Events {
    pub(super) fn new(client: Client, node: &str) -> Self {
        Self { client, node: node.to_owned(), before: Mutex::default() }
    }

    /// Reports that a policy was refused.
    pub(super) async fn policy_rejected(&self, policy: &str, note: &str) {
        let kind = if policy.contains('/') { "BridgeNamespacePolicy" } else { "BridgePolicy" };
        self.write(kind, policy, "PolicyRejected", "Validate", note).await;
    }

    /// Reports changes of the engines and the pool since the last call.
    pub(super) async fn of_node(&self, now: &Engines) {
        let refusals = now
            .pool
            .as_ref()
            .and_then(|pool| pool.summary().ok())
            .map_or(0, |pool| pool.counters.refusals.exhausted + pool.leases.refusals.exhausted);
        let seen = Some((now.clone(), refusals));
        let before =
            std::mem::replace(&mut *self.before.lock().unwrap_or_else(PoisonError::into_inner), seen);
        // The first call knows no change.
        let Some((before, refused_before)) = before else { return };
        let node = self.node.clone();
        let mut events = Vec::new();
        if now.trial_expired != before.trial_expired && now.trial_expired.is_some() {
            let note = "the configuration on trial was not confirmed; the one before it is active again";
            events.push(("TrialExpired", "Revert", note.to_owned()));
        }
        if let (Some(divergence), None) = (&now.divergence, &before.divergence) {
            events.push(("EngineDiverged", "Compare", divergence.clone()));
        }
        if refusals > refused_before {
            let note = format!("{refusals} connects and leases found no free port so far");
            events.push(("PoolExhausted", "Allocate", note));
        }
        for (reason, action, note) in events {
            self.write("BridgeNode", &node, reason, action, &note).await;
        }
    }

    async fn write(&self, kind: &str, name: &str, reason: &str, action: &str, note: &str) {
        // The event of an object is in its namespace.
        let (namespace, name) = match name.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, name),
        };
        let event = Event {
            metadata: ObjectMeta { generate_name: Some(format!("{name}-")), ..ObjectMeta::default() },
            action: Some(action.to_owned()),
            event_time: Some(MicroTime(Timestamp::now())),
            note: Some(note[..note.floor_char_boundary(MAX_NOTE)].to_owned()),
            reason: Some(reason.to_owned()),
            regarding: Some(ObjectReference {
                api_version: Some(format!("{GROUP}/{VERSION}")),
                kind: Some(kind.to_owned()),
                name: Some(name.to_owned()),
                namespace: namespace.map(str::to_owned),
                ..ObjectReference::default()
            }),
            reporting_controller: Some(format!("{GROUP}/{MANAGER}")),
            reporting_instance: Some(self.node.clone()),
            type_: Some("Warning".to_owned()),
            ..Event::default()
        };
        let api = Api::<Event>::namespaced(self.client.clone(), namespace.unwrap_or(NAMESPACE));
        if let Err(error) = api.create(&PostParams::default(), &event).await {
            tracing::warn!(error = cause(&error), reason, "the agent cannot write an Event");
        }
    }
}
