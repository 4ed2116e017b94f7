//! Follows the objects of one kind: list, watch, and list again where a watch has fallen behind.
//!
//! The thin part: [`Table`](super::cluster::Table) interprets the events.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::{Api, Client};

use super::connect::cause;
use super::objects::{Followed, PodObject, key};
use super::state::State;

/// How long until the first next attempt, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// While something fails, how long a watch may be silent before the server is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(1);
/// Number of refusals in a row after which the credentials are read again.
const REFUSALS: u32 = 3;
/// Seconds after which a watch is started again: a server that has vanished silently is noticed then.
const WATCH_SECONDS: u32 = 120;
/// Number of failures in a row after which everything is listed again: the server may have another past (a restored
/// etcd).
const PATIENCE: u32 = 8;

/// How the objects of one kind are asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Query {
    /// Restricts them.
    pub(super) field_selector: Option<String>,
    /// Few objects, found by an index that only the server's cache has: pods of one node. Everything else is read in
    /// pages, so that never more than one page is in memory.
    pub(super) from_cache: bool,
    /// Where it is normal that there is no such resource: until it is looked again whether it has come.
    pub(super) absent: Option<Duration>,
}

/// After this time a definition that is not there is gone, although objects of it are known.
const GONE: Duration = Duration::from_secs(60);

/// Objects in a page of a list.
const PAGE: u32 = 250;

impl Query {
    fn config(&self) -> Config {
        let config = Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        let config = if self.from_cache { config.any_semantic() } else { config };
        match &self.field_selector {
            Some(selector) => config.fields(selector),
            None => config,
        }
    }
}

/// Follows until the credentials are refused.
pub(super) async fn follow<T: Followed>(client: Client, query: Query, state: State) {
    let (mut failures, mut refusals) = (0_u32, 0);
    let mut missing_since = None;
    loop {
        let mut events = Box::pin(watcher(Api::<T>::all(client.clone()), query.config()));
        loop {
            let next = if failures == 0 {
                events.next().await
            } else if let Ok(next) = tokio::time::timeout(SILENCE, events.next()).await {
                next
            } else {
                // A watch that goes on where it was broken off says nothing until something happens.
                if client.apiserver_version().await.is_ok() {
                    (failures, refusals) = (0, 0);
                    state.recovered(T::NAME);
                }
                continue;
            };
            let error = match next {
                // A list begins before anything is asked: that says nothing yet.
                Some(Ok(Event::Init)) => {
                    state.change(|cluster| {
                        T::table(cluster).begin();
                        false
                    });
                    continue;
                }
                Some(Ok(event)) => {
                    (failures, refusals, missing_since) = (0, 0, None);
                    state.recovered(T::NAME);
                    take_in::<T>(event, &state);
                    continue;
                }
                Some(Err(error)) => error,
                None => break,
            };
            if let (Some(again), Some(404)) = (query.absent, code(&error)) {
                // Who deletes a definition deletes its objects first. A server that has just started does not know its
                // definitions yet: the known objects stay until that can no longer be it.
                let gone = *missing_since.get_or_insert_with(Instant::now);
                if T::table(&mut state.cluster()).len() == 0 || gone.elapsed() > GONE {
                    (failures, refusals) = (0, 0);
                    state.recovered(T::NAME);
                    state.change(|cluster| T::table(cluster).absent());
                    state.set_listed(T::NAME);
                    tokio::time::sleep(again).await;
                    break;
                }
            }
            if code(&error) == Some(410) {
                // The watcher lists again by itself where the server requests it in the middle of a watch.
                tracing::debug!(resource = T::NAME, "the watch is too far behind: listing again");
                if matches!(error, watcher::Error::WatchStartFailed(_)) {
                    break;
                }
                continue;
            }
            failures += 1;
            refusals = if code(&error) == Some(401) { refusals + 1 } else { 0 };
            state.failed(T::NAME, reason::<T>(&error, &state), code(&error).is_some());
            if code(&error) == Some(403) && (T::OPTIONAL || T::table(&mut state.cluster()).is_known()) {
                state.go_without(T::NAME);
            }
            if refusals == REFUSALS {
                return;
            }
            tokio::time::sleep(backoff(failures)).await;
            if failures.is_multiple_of(PATIENCE) {
                break;
            }
        }
    }
}

fn take_in<T: Followed>(event: Event<T>, state: &State) {
    let complete = matches!(event, Event::InitDone);
    // Many policies take long to read: nothing else waits for that.
    match event {
        Event::Init => {}
        Event::InitApply(object) => {
            let (key, kept) = (key(&object), object.keep());
            T::table(&mut state.cluster()).listed(key, kept);
        }
        Event::InitDone => state.change(|cluster| T::table(cluster).complete()),
        Event::Apply(mut object) => {
            let key = key(&object);
            if T::table(&mut state.cluster()).get_mut(&key).is_some_and(|known| object.refresh(known)) {
                return;
            }
            let kept = object.keep();
            state.change(|cluster| T::table(cluster).apply(key, kept));
        }
        Event::Delete(object) => state.change(|cluster| T::table(cluster).apply(key(&object), None)),
    }
    if complete {
        state.set_listed(T::NAME);
    }
}

/// The status code of an answer of the API server.
fn code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}

/// Returns the text for a failure; for a missing right, with the right and the manifest that has it.
fn reason<T: Followed>(error: &watcher::Error, state: &State) -> String {
    let cause = cause(error);
    if code(error) != Some(403) {
        return cause;
    }
    let (group, plural) = (T::group(&()), T::plural(&()));
    let resource = if group.is_empty() { plural.into_owned() } else { format!("{plural}.{group}") };
    // Only nodes follow pods.
    let manifest = if state.expects(PodObject::NAME) { "rbac.yaml" } else { "lan-host.yaml" };
    format!(
        "{cause}; the account needs the right to list and watch {resource}: apply deploy/kubernetes/{manifest} of this version"
    )
}

/// Doubles each time, and differs from agent to agent, so that not all of a cluster come at once.
fn backoff(failures: u32) -> Duration {
    let (first, most) = BACKOFF;
    let full = first.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(most);
    full.mul_f64(rand::random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_and_never_stop() {
        for failures in 1..100 {
            let wait = backoff(failures);
            assert!(wait >= BACKOFF.0 / 2 && wait <= BACKOFF.1, "{failures}: {wait:?}");
        }
        assert!(backoff(1) <= BACKOFF.0);
        assert!(backoff(20) >= BACKOFF.1 / 2);
    }
}
