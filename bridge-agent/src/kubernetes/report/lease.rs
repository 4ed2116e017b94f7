//! The Lease whose holder writes the conditions of policies.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease as Object, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};

/// The name of the Lease.
const NAME: &str = "bridge-agent";
/// The namespace where the credentials name none.
const NAMESPACE: &str = "bridge-system";
/// A holder that has not renewed it for this long loses it.
const DURATION: Duration = Duration::from_secs(15);
/// The holder renews it this often.
pub(super) const RENEW: Duration = Duration::from_secs(5);
/// Agents poll it less often in large clusters: at most one of them every 10 ms.
const POLL_PER_NODE: Duration = Duration::from_millis(10);

/// The Lease, as this agent sees it.
pub(super) struct Lease {
    api: Api<Object>,
    holder: String,
    /// The version that was read last, and the time when it was first read. Clocks of other nodes are not compared.
    seen: Option<(String, Instant)>,
    poll: Duration,
}

impl Lease {
    pub(super) fn new(client: Client, holder: &str) -> Self {
        let namespace = match client.default_namespace() {
            "default" => NAMESPACE.to_owned(),
            namespace => namespace.to_owned(),
        };
        let api = Api::namespaced(client, &namespace);
        Self { api, holder: holder.to_owned(), seen: None, poll: RENEW }
    }

    /// Time until the next attempt to acquire it.
    pub(super) const fn poll(&self) -> Duration {
        self.poll
    }

    /// Acquires or renews the Lease. Returns whether this agent holds it.
    pub(super) async fn acquire(&mut self, nodes: usize) -> kube::Result<bool> {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        self.poll = RENEW.max(POLL_PER_NODE.saturating_mul(nodes)).mul_f64(rand::random_range(0.8..1.0));
        let Some(found) = self.api.get_opt(NAME).await? else {
            let object = Object {
                metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
                spec: Some(self.spec(None)),
            };
            return taken(self.api.create(&PostParams::default(), &object).await);
        };
        let version = found.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => Instant::now(),
        };
        self.seen = Some((version, since));
        let spec = found.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if !holder.is_empty() && holder != self.holder && since.elapsed() < DURATION {
            return Ok(false);
        }
        let object = Object { spec: Some(self.spec(Some(spec))), ..found };
        taken(self.api.replace(NAME, &PostParams::default(), &object).await)
    }

    fn spec(&self, before: Option<LeaseSpec>) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        let before = before.unwrap_or_default();
        let is_ours = before.holder_identity.as_ref() == Some(&self.holder);
        LeaseSpec {
            acquire_time: if is_ours { before.acquire_time } else { now.clone() },
            holder_identity: Some(self.holder.clone()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0) + i32::from(!is_ours)),
            renew_time: now,
            ..LeaseSpec::default()
        }
    }
}

/// Whether a write succeeded; another agent may have been faster.
fn taken(written: kube::Result<Object>) -> kube::Result<bool> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}
