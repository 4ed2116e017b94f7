//! Network namespaces without names: they are gone when the last descriptor is closed, also after a crash.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_agent::routes::sources::Desired;
use bridge_agent::routes::{Counters, DesiredRoute, Reconciler, RouteEvent, Settings, Snapshot, SourceKind};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use tokio::sync::{broadcast, oneshot, watch};

/// A network namespace, with loopback up.
pub(crate) struct Ns {
    file: Arc<File>,
}

impl Ns {
    pub(crate) fn new() -> Self {
        let file = std::thread::spawn(|| {
            // SAFETY: only the network namespace of this thread changes; no descriptor or memory is unshared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace takes CAP_SYS_ADMIN");
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        let ns = Self { file: Arc::new(file) };
        ns.ip("link set lo up");
        // Link-local addresses too are usable at once, and nothing changes by itself later.
        ns.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
        ns
    }

    /// Where other programs find it, as long as this process lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs `body` on a thread inside.
    pub(crate) fn enter<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(body).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let file = self.file.clone();
        std::thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            body()
        })
    }

    /// A program inside; it must succeed.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> String {
        let (program, arguments) =
            (program.to_owned(), arguments.iter().map(ToString::to_string).collect::<Vec<_>>());
        self.enter(move || {
            let output = Command::new(&program).args(&arguments).output().unwrap();
            assert!(
                output.status.success(),
                "{program} {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        })
    }

    /// `ip` with these words.
    pub(crate) fn ip(&self, words: &str) -> String {
        self.run("ip", &words.split_whitespace().collect::<Vec<_>>())
    }

    /// A veth pair: `mine` in here, `theirs` in there, both up.
    pub(crate) fn link(&self, mine: &str, there: &Self, theirs: &str) {
        self.ip(&format!("link add {mine} type veth peer name {theirs} netns {}", there.path()));
        self.ip(&format!("link set {mine} up"));
        there.ip(&format!("link set {theirs} up"));
    }

    /// An address; IPv6 is usable at once, without duplicate address detection.
    pub(crate) fn address(&self, device: &str, net: &str) {
        let nodad = if net.contains(':') { " nodad" } else { "" };
        self.ip(&format!("address add {net} dev {device}{nodad}"));
        // The kernel makes an IPv6 address usable from a work queue.
        let address = net.split('/').next().unwrap();
        eventually("the address is usable", SECONDS, || {
            self.ip("-6 route show table local").contains(address)
                || self.ip("-4 route show table local").contains(address)
        });
    }

    /// bridge's routes, as another program reads them: `ip -json route`, one line each.
    pub(crate) fn own_routes(&self) -> BTreeSet<String> {
        self.routes(|protocol| protocol == "98")
    }

    /// Everybody else's.
    pub(crate) fn foreign_routes(&self) -> BTreeSet<String> {
        self.routes(|protocol| protocol != "98")
    }

    fn routes(&self, wanted: impl Fn(&str) -> bool) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for family in ["-4", "-6"] {
            let json = self.ip(&format!("-json -details {family} route show table all"));
            let routes: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
            for route in routes.iter().filter(|route| wanted(route["protocol"].as_str().unwrap_or_default()))
            {
                found.insert(line(route));
            }
        }
        found
    }
}

fn line(route: &serde_json::Value) -> String {
    let text =
        |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let hop = |hop: &serde_json::Value| {
        let via = if hop["via"].is_object() { text(&hop["via"]["host"]) } else { text(&hop["gateway"]) };
        format!(" via {via} dev {}", text(&hop["dev"]))
    };
    let mut line = format!("{} {}", text(&route["type"]), text(&route["dst"]));
    match route["nexthops"].as_array() {
        Some(hops) => {
            let mut hops: Vec<_> =
                hops.iter().map(|one| format!("{} weight {}", hop(one), one["weight"])).collect();
            hops.sort();
            line.push_str(&hops.concat());
        }
        None if route["type"] == "blackhole" => {}
        None => line.push_str(&hop(route)),
    }
    line + &format!(" metric {} table {}", text(&route["metric"]), text(&route["table"]))
}

/// The line [`Ns::own_routes`] gives for an ordinary route of the main table.
pub(crate) fn own(to: &str, via: &str, dev: &str) -> String {
    let to = to.strip_suffix("/32").or_else(|| to.strip_suffix("/128")).unwrap_or(to);
    format!("unicast {to} via {via} dev {dev} metric 1024 table main")
}

pub(crate) fn want(to: &str, via: &str) -> DesiredRoute {
    DesiredRoute::forward(to.parse().unwrap(), via.parse().unwrap(), SourceKind::Static, "")
}

/// A reconciler on a thread of its own; stops when dropped, and leaves its routes.
pub(crate) struct Agent {
    pub(crate) desired: Desired,
    pub(crate) status: watch::Receiver<Arc<Snapshot>>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) happenings: broadcast::Receiver<RouteEvent>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    pub(crate) fn start(ns: &Ns, settings: Settings, desired: Desired) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let wishes = desired.clone();
        let thread = ns.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let mut reconciler = Reconciler::new(settings, wishes).unwrap();
                ready
                    .send((reconciler.status(), reconciler.counters(), reconciler.happenings().subscribe()))
                    .unwrap();
                tokio::select! {
                    error = reconciler.run() => panic!("the reconciler ended: {error}"),
                    _ = stopped => {}
                }
            });
        });
        let (status, counters, happenings) = started.recv().unwrap();
        Self { desired, status, counters, happenings, stop: Some(stop), thread: Some(thread) }
    }

    /// One static source that wants these.
    pub(crate) fn with_static(ns: &Ns, settings: Settings, routes: Vec<DesiredRoute>) -> Self {
        let desired = Desired::default();
        desired.register(SourceKind::Static).publish(routes);
        Self::start(ns, settings, desired)
    }

    pub(crate) fn publish(&self, routes: Vec<DesiredRoute>) {
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

/// Polls until `condition` holds; how long it took.
#[track_caller]
pub(crate) fn eventually(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    loop {
        if condition() {
            return start.elapsed();
        }
        assert!(start.elapsed() < deadline, "not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_micros(500));
    }
}

pub(crate) const SECONDS: Duration = Duration::from_secs(5);

#[track_caller]
pub(crate) fn eventually_own(ns: &Ns, expected: &[String]) {
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

/// Both sides know each other's hardware address: no packet has to wait for ARP or neighbour discovery.
pub(crate) fn acquaint(ns: &Ns, address: &str) {
    let to = address.to_owned();
    ns.enter(move || {
        let any = if to.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
        std::net::UdpSocket::bind(any).unwrap().send_to(b"", (to.as_str(), 9)).unwrap();
    });
    eventually("the neighbour answers", SECONDS, || {
        ns.ip(&format!("neigh show {address}")).contains("lladdr")
    });
}
