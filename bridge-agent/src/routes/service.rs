//! Routes as a whole: all configured sources and the reconciler, to be owned by whoever has a runtime.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use super::discovery;
use super::discovery::listen::{DiscoveryCounters, Listener};
use super::model::SourceKind;
use super::netlink::{Interest, Netlink};
use super::plan::{Plan, plan, withdraw};
use super::setup::{Error, Setup};
use super::sources::{ClusterFile, Desired, FileSource, Merged, Publisher, Source};
use super::status::{Counters, RouteEvent, Snapshot};
use super::{Observed, Operation, Reconciler};

/// Between two attempts to watch a file whose directory is not there.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps the routes of a [`Setup`] true for as long as it runs. Dropping it leaves them in the kernel.
pub struct Service {
    reconciler: Reconciler,
    desired: Desired,
    sources: JoinSet<Infallible>,
    discovery: Option<Arc<DiscoveryCounters>>,
}

impl Service {
    /// Opens everything; needs a tokio runtime, and the network namespace the routes belong to. Sources that are not
    /// part of the setup (Kubernetes) are added through [`Self::desired`] before [`Self::run`].
    pub async fn start(setup: Setup) -> Result<Self, Error> {
        let desired = Desired::default();
        let reconciler = Reconciler::new(setup.settings, desired.clone())?;
        let mut sources = JoinSet::new();
        desired.register(SourceKind::Static).publish(setup.fixed);
        if let Some(path) = setup.file {
            sources.spawn(follow_file(path, desired.register(SourceKind::File)));
        }
        let mut counters = None;
        if let Some(options) = setup.discovery {
            let address = options.listen;
            let listener = Listener::bind(options, reconciler.status(), reconciler.happenings());
            let listener = listener.await.map_err(|error| Error::Listen { address, error })?;
            counters = Some(listener.counters());
            sources.spawn(listen(listener, desired.register(SourceKind::Discovery)));
        }
        Ok(Self { reconciler, desired, sources, discovery: counters })
    }

    /// Where further sources register.
    #[must_use]
    pub fn desired(&self) -> Desired {
        self.desired.clone()
    }

    /// The state of every route, after each comparison.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.reconciler.status()
    }

    /// Events from here on.
    #[must_use]
    pub fn happenings(&self) -> broadcast::Receiver<RouteEvent> {
        self.reconciler.happenings().subscribe()
    }

    /// Counts of the reconciler.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.reconciler.counters()
    }

    /// Counts of discovery, if there is any.
    #[must_use]
    pub fn discovery_counters(&self) -> Option<Arc<DiscoveryCounters>> {
        self.discovery.clone()
    }

    /// Runs until the kernel can no longer be talked to.
    pub async fn run(&mut self) -> Error {
        self.reconciler.run().await.into()
    }

    /// Ends all sources and leaves the routes: for a configuration that has changed, start another one after this,
    /// which compares what is there and takes up what discovery had saved.
    pub async fn stop(mut self) {
        self.sources.shutdown().await;
    }

    /// Stops a source and takes away the routes that only it wanted.
    pub fn retire(&mut self, kind: SourceKind) -> Result<(), Error> {
        if kind == SourceKind::Discovery {
            self.sources.abort_all();
        }
        self.desired.unregister(kind);
        self.reconciler.sync_now()?;
        Ok(())
    }
}

async fn follow_file(path: PathBuf, publisher: Publisher) -> Infallible {
    loop {
        let source = Box::new(FileSource::new(&path));
        if let Err(error) = source.run(publisher.clone()).await {
            tracing::warn!(%error, "trying again");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn listen(listener: Listener, publisher: Publisher) -> Infallible {
    if let Err(error) = Box::new(listener).run(publisher).await {
        tracing::error!(%error, "discovery has ended; what it knew stays until the agent is started again");
    }
    std::future::pending().await
}

/// What is wanted and what is there at one moment, without an agent.
pub struct Comparison {
    /// What all sources want that can be asked without an agent.
    pub merged: Merged,
    /// What is there.
    pub observed: Observed,
    /// What is to be done.
    pub plan: Plan,
    netlink: Netlink,
}

impl Comparison {
    /// Reads static routes, the file, and what discovery had saved, and compares once. Routes of the API server are
    /// only known to the running agent: if there are any, nothing unwanted is touched.
    pub fn new(setup: &Setup) -> Result<Self, Error> {
        let merged = read_once(setup)?;
        let mut netlink = Netlink::open()?;
        let observed = netlink.observe(&Interest::of(&merged.routes, &setup.settings))?;
        let plan = plan(&merged.routes, &observed, &setup.settings, setup.kubernetes);
        Ok(Self { merged, observed, plan, netlink })
    }

    /// Carries out the plan. What the kernel refused: operation and reason.
    pub fn apply(&mut self) -> Result<Vec<(Operation, String)>, Error> {
        apply(&mut self.netlink, &self.plan.operations)
    }

    /// As rows.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let pending = self.plan.operations.iter().map(Operation::key).collect();
        Snapshot::compared(self.merged.clone(), self.plan.verdicts.clone(), pending, self.observed.clone())
    }
}

/// Everything wanted that can be read without an agent.
pub fn read_once(setup: &Setup) -> Result<Merged, Error> {
    let desired = Desired::default();
    desired.register(SourceKind::Static).publish(setup.fixed.clone());
    if let Some(path) = &setup.file {
        desired.register(SourceKind::File).publish(ClusterFile::read(path)?.routes());
    }
    if let Some(options) = &setup.discovery {
        desired.register(SourceKind::Discovery).publish(discovery::listen::saved_routes(options));
    }
    Ok(desired.merged(setup.settings.table).0)
}

/// All own routes of the network namespace, and what takes them away.
pub fn withdrawal() -> Result<(Observed, Vec<Operation>), Error> {
    let observed = Netlink::open()?.observe(&Interest::default())?;
    let operations = withdraw(&observed);
    Ok((observed, operations))
}

/// Carries out operations planned by [`withdrawal`]. What the kernel refused: operation and reason.
pub fn carry_out(operations: &[Operation]) -> Result<Vec<(Operation, String)>, Error> {
    apply(&mut Netlink::open()?, operations)
}

fn apply(netlink: &mut Netlink, operations: &[Operation]) -> Result<Vec<(Operation, String)>, Error> {
    let failures = netlink.apply(operations)?;
    Ok(failures
        .into_iter()
        .map(|failure| (operations[failure.index].clone(), failure.error.to_string()))
        .collect())
}
