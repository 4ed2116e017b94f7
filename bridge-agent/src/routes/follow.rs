//! The desired routes of all sources, followed without a reconciler: for exports.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::watch;

use super::discovery::listen::saved_routes;
use super::discovery::registry::Rules;
use super::model::SourceKind;
use super::service::{Task, follow_file};
use super::setup::Setup;
use super::sources::{Desired, Merged, Publisher};

/// Between two looks at the saved pods of discovery, which also expire.
const DISCOVERED: Duration = Duration::from_secs(1);

/// Sources that are followed until this is dropped.
pub struct Follower {
    desired: Desired,
    changes: watch::Receiver<u64>,
    table: u32,
    kubernetes: Option<Publisher>,
    _tasks: Vec<Task>,
}

impl Follower {
    /// Starts, inside a tokio runtime.
    #[must_use]
    pub fn new(setup: &Setup) -> Self {
        let desired = Desired::default();
        let mut tasks = Vec::new();
        desired.register(SourceKind::Static).publish(setup.fixed.clone());
        if let Some(path) = &setup.file {
            let publisher = desired.register(SourceKind::File);
            tasks.push(Task::spawn(follow_file(path.clone(), publisher)));
        }
        if let Some((path, rules)) = &setup.discovered {
            let publisher = desired.register(SourceKind::Discovery);
            tasks.push(Task::spawn(follow_discovered(path.clone(), rules.clone(), publisher)));
        }
        let kubernetes = setup.kubernetes.then(|| desired.register(SourceKind::Kubernetes));
        let mut changes = desired.changes();
        changes.mark_changed();
        Self { desired, changes, table: setup.settings.table, kubernetes, _tasks: tasks }
    }

    /// Returns the publisher of the cluster's routes, if the configuration has a cluster. The caller asks the agent for them.
    #[must_use]
    pub fn kubernetes(&self) -> Option<Publisher> {
        self.kubernetes.clone()
    }

    /// Waits for a change, and returns the routes once every source has published. Cancel safe.
    pub async fn changed(&mut self) -> Merged {
        loop {
            // `desired` holds the sender: there is always another change to wait for.
            _ = self.changes.changed().await;
            let (merged, _) = self.desired.merged(self.table);
            if merged.silent.is_empty() {
                return merged;
            }
        }
    }
}

async fn follow_discovered(path: PathBuf, rules: Rules, publisher: Publisher) -> std::convert::Infallible {
    loop {
        publisher.publish(saved_routes(&path, &rules));
        tokio::time::sleep(DISCOVERED).await;
    }
}
