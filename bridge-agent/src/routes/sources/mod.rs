//! Where desired routes come from, behind one interface, merged by a stated precedence.
//!
//! A source publishes *all* its routes each time something changes, so differences need no tracking. The
//! precedence is the order of [`SourceKind`]: static configuration, file, Kubernetes, discovery.

mod file;
mod fixed;
mod merge;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use tokio::sync::watch;

pub use file::{ClusterFile, FileError, FileSource, Node, Pod};
pub use fixed::static_routes;
pub use merge::{Merged, Shadowed};
use merge::{Words, merge};

use super::model::{DesiredRoute, SourceKind};

/// Something that knows routes and keeps them published until it is dropped.
pub trait Source: Send {
    /// Which place in the precedence it takes.
    fn kind(&self) -> SourceKind;

    /// Publishes for as long as there are changes. Returning does not withdraw the published routes.
    fn run(
        self: Box<Self>,
        publisher: Publisher,
    ) -> Pin<Box<dyn Future<Output = Result<(), SourceError>> + Send>>;
}

/// Why a source ended.
#[derive(Debug, Error)]
#[error("source {kind}: {reason}")]
pub struct SourceError {
    /// Which one.
    pub kind: SourceKind,
    /// The fault to check.
    pub reason: String,
}

/// Collects the routes of all sources.
#[derive(Clone, Debug)]
pub struct Desired {
    words: Arc<Mutex<Words>>,
    version: Arc<watch::Sender<u64>>,
}

impl Default for Desired {
    fn default() -> Self {
        Self { words: Arc::default(), version: Arc::new(watch::Sender::new(0)) }
    }
}

impl Desired {
    /// Announces a source. Until it has published, unwanted own routes are kept: they are probably its.
    #[must_use]
    pub fn register(&self, kind: SourceKind) -> Publisher {
        self.words().entry(kind).or_insert(None);
        self.version.send_modify(|version| *version += 1);
        Publisher { desired: self.clone(), kind }
    }

    /// Takes a source out, with everything it wants.
    pub fn unregister(&self, kind: SourceKind) {
        self.words().remove(&kind);
        self.version.send_modify(|version| *version += 1);
    }

    /// Changes whenever a source publishes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Returns the routes of all sources, and their version; `default_table` is the table of a route that names none.
    #[must_use]
    pub fn merged(&self, default_table: u32) -> (Merged, u64) {
        let words = self.words();
        (merge(&words, default_table), *self.version.borrow())
    }

    fn words(&self) -> std::sync::MutexGuard<'_, Words> {
        // A panic in between leaves a complete word of each source.
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The voice of one source.
#[derive(Clone, Debug)]
pub struct Publisher {
    desired: Desired,
    kind: SourceKind,
}

impl Publisher {
    /// Replaces all routes of this source. Publishing the same again wakes no receiver.
    ///
    /// Returns the first version of all sources that includes this; see [`super::Snapshot::version`].
    pub fn publish(&self, routes: Vec<DesiredRoute>) -> u64 {
        let mut words = self.desired.words();
        let word = words.entry(self.kind).or_default();
        let same = word
            .as_ref()
            .is_some_and(|old| old.len() == routes.len() && old.iter().map(|route| &**route).eq(&routes));
        if !same {
            *word = Some(routes.into_iter().map(Arc::new).collect());
            self.desired.version.send_modify(|version| *version += 1);
        }
        *self.desired.version.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_is_a_change() {
        let desired = Desired::default();
        let publisher = desired.register(SourceKind::Static);
        assert_eq!(desired.merged(254).0.silent, [SourceKind::Static]);
        let changes = desired.changes();
        let route = DesiredRoute::forward(
            "10.1.0.0/16".parse().unwrap(),
            "192.0.2.1".parse().unwrap(),
            SourceKind::Static,
            "",
        );
        publisher.publish(vec![route.clone()]);
        assert!(changes.has_changed().unwrap());
        let mut changes = desired.changes();
        changes.mark_unchanged();
        publisher.publish(vec![route]);
        assert!(!changes.has_changed().unwrap());
        assert_eq!(desired.merged(254).0.silent, []);
    }
}
