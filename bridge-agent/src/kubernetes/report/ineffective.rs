//! Policies of namespaces where the configuration of the agents gives them no effect: a condition says so, written by the one agent
//! that writes conditions. No other agent reads them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};

use super::super::objects::{NamespacePolicyObject, key};
use super::super::resources::NAMESPACE_POLICIES_OFF;
use super::conditions::same;
use super::policies::{apply, not_accepted};

/// Pause after a failure. The role of an older version has no right to these policies.
const AGAIN: Duration = Duration::from_secs(60);
/// A condition that another client has changed is repeated at most this often.
const REPEAT: Duration = Duration::from_secs(60);
/// Objects in a page of a list.
const PAGE: u32 = 250;

/// Refuses each policy of a namespace in its condition, for as long as it is polled.
pub(super) async fn refuse(client: &Client) -> Infallible {
    let mut written: HashMap<Box<str>, (i64, Instant)> = HashMap::new();
    loop {
        let api = Api::<NamespacePolicyObject>::all(client.clone());
        let mut events = Box::pin(watcher(api, Config::default().page_size(PAGE)));
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::InitApply(policy) | Event::Apply(policy)) => {
                    let name = key(&policy);
                    let (generation, before) = policy.reported();
                    let conditions =
                        not_accepted(&before, generation, "NamespacePoliciesOff", NAMESPACE_POLICIES_OFF);
                    let recent = written
                        .get(&name)
                        .is_some_and(|(known, at)| *known == generation && at.elapsed() < REPEAT);
                    if recent || same(&before, &conditions) {
                        continue;
                    }
                    match apply(client, &name, &conditions).await {
                        Ok(()) => drop(written.insert(name, (generation, Instant::now()))),
                        Err(error) => {
                            tracing::debug!(policy = &*name, %error, "the agent cannot write the conditions of a policy");
                        }
                    }
                }
                Ok(Event::Delete(policy)) => drop(written.remove(&key(&policy))),
                Ok(Event::Init | Event::InitDone) => {}
                Err(error) => {
                    tracing::debug!(%error, "the agent cannot read the policies of namespaces");
                    break;
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}
