//! A reconciler in a network namespace, and how fast it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use bridge_agent::routes::sources::Desired;
use bridge_agent::routes::{Counters, DesiredRoute, Reconciler, RouteEvent, Settings, Snapshot, SourceKind};
use tokio::sync::{broadcast, oneshot, watch};

use crate::netns::{Ns, SECONDS};

/// The line [`Ns::own_routes`] gives for an ordinary route of the main table.
#[must_use]
pub fn own(to: &str, via: &str, dev: &str) -> String {
    let to = to.strip_suffix("/32").or_else(|| to.strip_suffix("/128")).unwrap_or(to);
    format!("unicast {to} via {via} dev {dev} metric 1024 table main")
}

/// A static route.
#[must_use]
pub fn want(to: &str, via: &str) -> DesiredRoute {
    DesiredRoute::forward(to.parse().unwrap(), via.parse().unwrap(), SourceKind::Static, "")
}

/// A reconciler on a thread of its own; stops when dropped, and leaves its routes.
pub struct Agent {
    /// Its desired routes.
    pub desired: Desired,
    /// Its status.
    pub status: watch::Receiver<Arc<Snapshot>>,
    /// Its counters.
    pub counters: Arc<Counters>,
    /// Its events from the start.
    pub events: broadcast::Receiver<RouteEvent>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    /// Starts it inside.
    #[must_use]
    pub fn start(ns: &Ns, settings: Settings, desired: Desired) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let wishes = desired.clone();
        let thread = ns.spawn(move || {
            hurry();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let mut reconciler = Reconciler::new(settings, wishes).unwrap();
                ready
                    .send((reconciler.status(), reconciler.counters(), reconciler.events().subscribe()))
                    .unwrap();
                tokio::select! {
                    error = reconciler.run() => panic!("the reconciler ended: {error}"),
                    _ = stopped => {}
                }
            });
        });
        let (status, counters, events) = started.recv().unwrap();
        Self { desired, status, counters, events, stop: Some(stop), thread: Some(thread) }
    }

    /// One static source that wants these.
    #[must_use]
    pub fn with_static(ns: &Ns, settings: Settings, routes: Vec<DesiredRoute>) -> Self {
        let desired = Desired::default();
        desired.register(SourceKind::Static).publish(routes);
        Self::start(ns, settings, desired)
    }

    /// Changes the routes of the static source.
    pub fn publish(&self, routes: Vec<DesiredRoute>) {
        self.desired.register(SourceKind::Static).publish(routes);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.take().map(|stop| stop.send(()));
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking()
            && let Some(Err(panic)) = ended
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Polls until bridge's routes are exactly these.
#[track_caller]
pub fn eventually_own(ns: &Ns, expected: &[String]) {
    let expected: BTreeSet<_> = expected.iter().cloned().collect();
    let start = Instant::now();
    loop {
        let found = ns.own_routes();
        if found == expected {
            return;
        }
        assert!(start.elapsed() < SECONDS, "expected {expected:#?}, found {found:#?}");
    }
}

/// Raises the priority of the calling thread, so that other work does not disturb the measured times.
pub fn hurry() {
    let thread = rustix::thread::gettid();
    rustix::process::setpriority_process(Some(thread), -19).expect("a higher priority takes CAP_SYS_NICE");
}
