//! Agents, reloads, kills and traffic together, for long: connections both ways, the port pool, reloads, trials,
//! clients of the API, routes, interfaces that come and go, faults. Afterwards a search for leftovers.
//!
//! In the first half the agents are also killed and started again. In the second they live on, so that the resources
//! that an agent accumulates show.

mod agents;
mod clients;
mod ledger;
mod surroundings;
mod traffic;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

pub use self::ledger::Finding;
use self::ledger::{Bare, Ids, Node};
use crate::{agent::Agent, lab::Lab, wait::eventually};

/// Interval at which the kernel objects of the agents are noted.
const LOOK: Duration = Duration::from_millis(500);
/// How long everything may take to come to rest.
const REST: Duration = Duration::from_secs(30);

/// Everything that is done; each of it at least once, or the soak was none.
const WORK: [&str; 19] = [
    agents::RELOAD,
    agents::REFUSED,
    agents::KILL,
    agents::STOP,
    agents::REVERT,
    agents::EXPIRE,
    agents::SECOND,
    agents::ROUTES,
    agents::ROUTE_LOST,
    clients::READ,
    clients::LEASE,
    clients::EXEC,
    traffic::HELD,
    traffic::INBOUND,
    traffic::OUTBOUND,
    traffic::DENIED,
    traffic::POOL,
    surroundings::INTERFACES,
    surroundings::RULES_LOST,
];

/// How often something was done, and how often it failed.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How often.
    pub done: u64,
    /// How often in vain.
    pub failed: u64,
    /// The first failure.
    pub why: Option<String>,
}

/// Result of a soak.
#[derive(Debug)]
pub struct Outcome {
    /// The work that was done.
    pub work: BTreeMap<&'static str, Tally>,
    /// The results of the search for leftovers.
    pub findings: Vec<Finding>,
}

impl Outcome {
    /// Whether everything was done, nothing failed, and nothing was left behind.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        WORK.iter().all(|work| self.work.get(work).is_some_and(|tally| tally.done > 0))
            && self.work.values().all(|tally| tally.failed == 0)
            && self.findings.iter().all(|finding| finding.ok)
    }
}

/// State shared by the concurrent workers.
#[derive(Debug)]
struct Course {
    end: Instant,
    /// From then on no agent is killed.
    half: Instant,
    /// Process ids of the agents on the node and on the LAN host; 0 while one is not there.
    node: AtomicU32,
    host: AtomicU32,
    work: Mutex<BTreeMap<&'static str, Tally>>,
}

impl Course {
    fn new(time: Duration) -> Self {
        let begun = Instant::now();
        Self {
            end: begun + time,
            half: begun + time / 2,
            node: AtomicU32::new(0),
            host: AtomicU32::new(0),
            work: Mutex::default(),
        }
    }

    fn kills(&self) -> bool {
        Instant::now() < self.half
    }

    /// Lets time pass; whether it is to be gone on after that.
    fn pause(&self, time: Duration) -> bool {
        let left = self.end.saturating_duration_since(Instant::now());
        thread::sleep(time.min(left));
        Instant::now() < self.end
    }

    fn count(&self, name: &'static str, times: u64, result: Result<()>) {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let tally = work.entry(name).or_default();
        tally.done += times;
        if let Err(error) = result {
            tally.failed += 1;
            eprintln!("{name}: {error:#}");
            tally.why.get_or_insert_with(|| format!("{error:#}"));
        }
    }

    /// Does something again and again, with `pause` in between.
    fn repeat(&self, name: &'static str, pause: Duration, mut work: impl FnMut() -> Result<()>) {
        while self.pause(pause) {
            self.count(name, 1, work());
        }
    }
}

/// Does everything for `time`.
///
/// # Errors
/// The lab fails, or an agent does not start at first; not that something fails later, or is left behind.
pub fn run(time: Duration) -> Result<Outcome> {
    let lab = Lab::builder().pods(2).conntrack().build()?;
    let cgroup = lab.cgroup("clients")?;
    let stand = traffic::Stand::new(&lab)?;
    let bare = Bare::of(&lab)?;
    let usual = agents::node(&cgroup, &agents::Policy::USUAL)?;
    let mut node = Agent::start(&lab, lab.b(), &usual)?;
    let mut host = Agent::start(&lab, lab.a(), &agents::host(0))?;
    let (ids, course) = (Ids::default(), Course::new(time));
    course.node.store(node.pid(), Ordering::Relaxed);
    course.host.store(host.pid(), Ordering::Relaxed);
    let before = Node::of(&lab, &node)?;
    let client = clients::Client::new(&node);
    stand.connect_from_pool(&lab, &cgroup)?;

    let samples = thread::scope(|scope| {
        let (course, lab, cgroup, ids) = (&course, &lab, &cgroup, &ids);
        stand.start(scope, lab, course);
        let at_node = scope.spawn(|| agents::work_on_node(&mut node, lab, cgroup, course));
        let at_host = scope.spawn(|| agents::work_on_host(&mut host, lab, course));
        scope.spawn(|| client.work(lab, course));
        scope.spawn(|| surroundings::interfaces(lab, course));
        scope.spawn(|| surroundings::faults(lab, course));
        while course.pause(LOOK) {
            ids.note(&[&course.node, &course.host]);
        }
        let join = |thread: thread::ScopedJoinHandle<'_, Result<Vec<ledger::Sample>>>, work| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?.context(work)
        };
        let (at_node, at_host) = (join(at_node, "on the node"), join(at_host, "on the LAN host"));
        anyhow::Ok([("node", at_node?), ("LAN host", at_host?)])
    })?;

    let mut findings: Vec<Finding> =
        samples.iter().flat_map(|(which, samples)| ledger::gathered(which, samples, time)).collect();
    node.reload(&usual)?;
    let mut after = Node::of(&lab, &node)?;
    eventually(REST, || {
        after = Node::of(&lab, &node).ok()?;
        (after == before).then_some(())
    });
    findings.extend(before.compare(&after));
    node.stop()?;
    node.run(&["down"])?;
    host.stop()?;
    host.run(&["down"])?;
    findings.extend(bare.compare(&Bare::of(&lab)?));
    findings.push(ids.finding(REST)?);
    let work = course.work.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Outcome { work, findings })
}
