//! Routes as a whole: all configured sources and the reconciler, owned by the holder of a runtime.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use super::discovery;
use super::discovery::listen::{Handle, Listener, Options};
use super::event::RouteEvent;
use super::model::SourceKind;
use super::netlink::{Interest, Netlink};
use super::plan::{Plan, plan, withdraw};
use super::setup::{Error, Setup};
use super::sources::{ClusterFile, Desired, FileError, FileSource, Merged, Publisher, Source};
use super::status::{Counters, Snapshot};
use super::{Observed, Operation, Reconciler, Settings};

/// Between two attempts to watch a file whose directory is not there.
const AGAIN: Duration = Duration::from_secs(5);
/// Between two attempts to talk to a kernel that did not answer.
const REOPEN: Duration = Duration::from_secs(1);

/// Keeps the routes of a [`Setup`] true, in tasks of its own. Dropping it ends them and leaves the routes in the
/// kernel.
pub struct Service {
    setup: Setup,
    settings: watch::Sender<Settings>,
    desired: Desired,
    view: View,
    events: broadcast::Sender<RouteEvent>,
    file: Option<Task>,
    discovery: Option<(Task, Handle)>,
    _reconciler: Task,
}

/// What can be seen of a [`Service`], also from other threads.
#[derive(Clone)]
pub struct View {
    /// The state of every route, after each comparison.
    pub status: watch::Receiver<Arc<Snapshot>>,
    /// Counts of the reconciler.
    pub counters: Arc<Counters>,
    /// Why the kernel cannot be talked to, if that is so now.
    pub failure: watch::Receiver<Option<String>>,
    /// Discovery, if there is any.
    pub discovery: Option<Handle>,
}

/// Another [`Setup`], with everything done that can fail.
pub struct Change {
    setup: Setup,
    /// A listener on another address than the one of before.
    listener: Option<Listener>,
}

/// Ends with its owner.
pub(super) struct Task(JoinHandle<Infallible>);

impl Task {
    pub(super) fn spawn(work: impl Future<Output = Infallible> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Service {
    /// Opens everything; needs a tokio runtime whose threads are in the network namespace the routes belong to. Events go to
    /// `events`. Sources that are not part of the setup (Kubernetes) are added through
    /// [`Self::desired`].
    pub fn start(setup: Setup, events: broadcast::Sender<RouteEvent>) -> Result<Self, Error> {
        let desired = Desired::default();
        let reconciler = Reconciler::new(setup.settings.clone(), desired.clone())?.sending_to(events.clone());
        let (failed, failure) = watch::channel(None);
        let view =
            View { status: reconciler.status(), counters: reconciler.counters(), failure, discovery: None };
        let mut service = Self {
            setup: Setup { settings: setup.settings.clone(), ..Setup::default() },
            settings: reconciler.settings(),
            desired,
            view,
            events,
            file: None,
            discovery: None,
            _reconciler: Task::spawn(keep(reconciler, failed)),
        };
        // What keeps discovery from listening now, an address that comes later for instance, keeps nothing else from beginning.
        let listener = setup.discovery.as_ref().map(|options| {
            let status = service.view.status.clone();
            Listener::bind_eventually(options.clone(), status, service.events.clone())
        });
        service.commit(Change { setup, listener });
        Ok(service)
    }

    /// Does of a change of the setup what can fail; nothing else changes by that.
    pub fn prepare(&self, setup: Setup) -> Result<Change, Error> {
        let old = self.setup.discovery.as_ref().map(|options| options.listen);
        let new = setup.discovery.as_ref().filter(|options| Some(options.listen) != old);
        let listener = new.map(|options| {
            Listener::bind(options.clone(), self.view.status.clone(), self.events.clone())
                .map_err(|error| Error::Listen { address: options.listen, error })
        });
        Ok(Change { listener: listener.transpose()?, setup })
    }

    /// Carries out a change. The routes that both setups want are not touched.
    pub fn commit(&mut self, change: Change) {
        let Change { setup, listener } = change;
        // No task of this thread runs before all of it is done: the next comparison sees the whole of it.
        self.settings.send_if_modified(|settings| {
            let other = *settings != setup.settings;
            settings.clone_from(&setup.settings);
            other
        });
        self.desired.register(SourceKind::Static).publish(setup.fixed.clone());
        if setup.file != self.setup.file {
            self.file = None;
            match &setup.file {
                Some(path) => {
                    let publisher = self.desired.register(SourceKind::File);
                    self.file = Some(Task::spawn(follow_file(path.clone(), publisher)));
                }
                None => self.desired.unregister(SourceKind::File),
            }
        }
        match (self.setup.kubernetes, setup.kubernetes) {
            // The follower of the cluster publishes.
            (false, true) => drop(self.desired.register(SourceKind::Kubernetes)),
            (true, false) => self.desired.unregister(SourceKind::Kubernetes),
            (true, true) | (false, false) => {}
        }
        self.commit_discovery(setup.discovery.as_ref(), listener);
        self.setup = setup;
    }

    fn commit_discovery(&mut self, options: Option<&Options>, listener: Option<Listener>) {
        match (listener, options, &self.discovery) {
            (Some(listener), ..) => {
                let publisher = self.desired.register(SourceKind::Discovery);
                let handle = listener.handle();
                self.discovery = Some((Task::spawn(listen(listener, publisher)), handle));
            }
            (None, Some(options), Some((_, handle))) if Some(options) != self.setup.discovery.as_ref() => {
                handle.adopt(options.clone(), &self.desired.register(SourceKind::Discovery));
            }
            (None, None, Some(_)) => self.retire(SourceKind::Discovery),
            (None, ..) => {}
        }
        self.view.discovery = self.discovery.as_ref().map(|(_, handle)| handle.clone());
    }

    /// Stops a source and, with the next comparison, takes away the routes that only it wanted.
    pub fn retire(&mut self, kind: SourceKind) {
        match kind {
            SourceKind::Discovery => self.discovery = None,
            SourceKind::File => self.file = None,
            SourceKind::Static | SourceKind::Kubernetes => {}
        }
        self.desired.unregister(kind);
    }

    /// Waits until the kernel has been compared with what is wanted now.
    pub async fn compared(&self) {
        let version = *self.desired.changes().borrow();
        // The reconciler outlives this borrow: there is no end of its words to hear of.
        _ = self.view.status.clone().wait_for(|snapshot| snapshot.version() >= version).await;
    }

    /// Where further sources register.
    #[must_use]
    pub fn desired(&self) -> Desired {
        self.desired.clone()
    }

    /// To look at it.
    #[must_use]
    pub fn view(&self) -> View {
        self.view.clone()
    }
}

/// Runs the reconciler for good.
async fn keep(mut reconciler: Reconciler, failed: watch::Sender<Option<String>>) -> Infallible {
    loop {
        let error = reconciler.run().await;
        tracing::error!(%error, "routes cannot be looked after; trying again");
        failed.send_replace(Some(error.to_string()));
        loop {
            tokio::time::sleep(REOPEN).await;
            match reconciler.reopen() {
                Ok(()) => break,
                Err(error) => _ = failed.send_replace(Some(error.to_string())),
            }
        }
        failed.send_replace(None);
    }
}

/// Publishes the routes of a file at each change of it; begins again if it cannot be watched.
pub(super) async fn follow_file(path: PathBuf, publisher: Publisher) -> Infallible {
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
    /// Why the routes of `routes.file` are unknown, if the file does not exist: nothing is removed then.
    pub missing: Option<FileError>,
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
        let (merged, missing) = read_once(setup)?;
        let mut netlink = Netlink::open()?;
        let observed = netlink.observe(&Interest::of(&merged.routes, &setup.settings))?;
        let plan = plan(&merged.routes, &observed, &setup.settings, setup.kubernetes || missing.is_some());
        Ok(Self { merged, missing, observed, plan, netlink })
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

/// Reads every source that can be read without an agent. A `cluster.yaml` that does not exist has no routes; the second value
/// says so.
pub fn read_once(setup: &Setup) -> Result<(Merged, Option<FileError>), Error> {
    let mut missing = None;
    let desired = Desired::default();
    desired.register(SourceKind::Static).publish(setup.fixed.clone());
    if let Some(path) = &setup.file {
        match ClusterFile::read(path) {
            Ok(file) => _ = desired.register(SourceKind::File).publish(file.routes()),
            Err(error @ FileError::Read { .. }) if error.is_missing() => missing = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    if let Some((path, rules)) = &setup.discovered {
        desired.register(SourceKind::Discovery).publish(discovery::listen::saved_routes(path, rules));
    }
    Ok((desired.merged(setup.settings.table).0, missing))
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
