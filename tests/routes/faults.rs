//! Every change that a routing table can see, at random, and the final state.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use bridge_lab::agent::program;
use bridge_lab::netns::{Ns, SECONDS};
use bridge_lab::routes::own;
use bridge_lab::wait::until;
use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};

/// Without `BRIDGE_FAULT_ROUNDS`, which says how many: 1,000 are for a long look.
const ROUNDS: usize = 200;

/// A program inside; killed without warning when dropped.
struct Process(Child);

impl Process {
    /// `bridge-agent run` with routes of a file, and nothing else; its log is beside that file.
    fn start(ns: &Ns, cluster: &Path) -> Self {
        let directory = cluster.parent().unwrap().to_owned();
        // None of the next hops exists: their health is not tested here.
        let config = format!(
            "{{role: host, routes: {{file: {}, health: {{enabled: false}}}}, api: {{socket: {}}}}}",
            cluster.display(),
            directory.join("agent.sock").display()
        );
        std::fs::write(directory.join("bridge.yaml"), config).unwrap();
        Self(ns.enter(move || {
            let log = OpenOptions::new().create(true).append(true).open(directory.join("log")).unwrap();
            let mut command = Command::new(program().unwrap());
            command.arg("run").arg("--config").arg(directory.join("bridge.yaml"));
            command.arg("--pin-root").arg(directory.join("pins"));
            command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
        }))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL.
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The host: nodes are on eth0 and eth1; routes of others go through eth2, which never goes down.
fn host() -> (Ns, Ns) {
    let (host, lan) = (Ns::new(), Ns::new());
    for (index, third) in [31, 32, 33].into_iter().enumerate() {
        let device = format!("eth{index}");
        host.link(&device, &lan, &format!("lan{index}"));
        host.address(&device, &format!("192.168.{third}.67/24"));
        host.address(&device, &format!("fd{third}::67/64"));
        host.enter(move || {
            // An IPv6 address is otherwise lost when its link goes down.
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{device}/keep_addr_on_down"), "1").unwrap();
        });
    }
    (host, lan)
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Segment {
    to: IpNet,
    third: u8,
    last: u8,
}

impl Segment {
    fn via(&self) -> String {
        match self.to {
            IpNet::V4(_) => format!("192.168.{}.{}", self.third, self.last),
            IpNet::V6(_) => format!("fd{}::{}", self.third, self.last),
        }
    }

    fn line(&self) -> String {
        own(&self.to.to_string(), &self.via(), &format!("eth{}", self.third - 31))
    }
}

fn network(random: &mut StdRng) -> IpNet {
    let number = random.random_range(0..24);
    if random.random() {
        format!("10.200.{number}.0/24").parse().unwrap()
    } else {
        format!("fd00:200:{number}::/64").parse().unwrap()
    }
}

fn write_cluster(path: &Path, segments: &BTreeSet<Segment>) {
    let mut yaml = String::from("nodes:\n");
    for (index, segment) in segments.iter().enumerate() {
        _ = writeln!(
            yaml,
            "  - {{name: n{index}, addresses: ['{}'], podNetworks: ['{}']}}",
            segment.via(),
            segment.to
        );
    }
    if segments.is_empty() {
        yaml = "nodes: []\n".into();
    }
    // Sometimes read half-written by an agent that starts right now: in one step instead.
    let new = path.with_extension("new");
    std::fs::write(&new, yaml).unwrap();
    std::fs::rename(new, path).unwrap();
}

/// Returns routes of others.
fn foreign(ns: &Ns) -> BTreeSet<String> {
    ns.foreign_routes().into_iter().filter(|line| line.contains("metric 77 ")).collect()
}

#[test]
fn after_rounds_of_faults_the_table_is_as_planned_and_foreign_routes_as_others_left_them() {
    let seed = std::env::var("BRIDGE_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    let rounds = std::env::var("BRIDGE_FAULT_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    println!("BRIDGE_SEED={seed} repeats this run of {rounds} rounds");
    let (mut kills, mut checks, mut slowest) = (0, 0, Duration::ZERO);
    let begin = Instant::now();
    let mut random = StdRng::seed_from_u64(seed);
    let (host, _lan) = host();
    let directory = tempfile::tempdir().unwrap();
    let cluster = directory.path().join("cluster.yaml");
    let mut segments = BTreeSet::new();
    write_cluster(&cluster, &segments);
    let mut agent = Some(Process::start(&host, &cluster));
    // Networks others have routes to, and whether eth1 is up.
    let mut theirs = BTreeSet::<IpNet>::new();
    let mut up = true;
    for round in 1..=rounds {
        let mut batch = String::new();
        for _ in 0..random.random_range(1..4) {
            let to = network(&mut random);
            match random.random_range(0..8) {
                // Another program deletes one of ours.
                0 => _ = writeln!(batch, "route del {to} proto 98"),
                // Another program changes one of ours.
                1 => {
                    let via = if to.addr().is_ipv4() { "192.168.31.250" } else { "fd31::250" };
                    _ = writeln!(batch, "route replace {to} via {via} proto 98 metric 1024");
                }
                // An unwanted route with our protocol number.
                2 => {
                    let via = if to.addr().is_ipv4() { "192.168.33.9" } else { "fd33::9" };
                    _ = writeln!(
                        batch,
                        "route add {to} via {via} proto 98 metric {}",
                        random.random_range(1..5)
                    );
                }
                // Others' routes: beside ours, or in the way of ours. (`proto static` behind a `proto 98` of the same
                // batch becomes 98 in iproute2 6.1: its cache of names is overwritten by numbers.)
                3 => {
                    let to: IpNet = match (random.random_range(0..3), to) {
                        (0, to) => to,
                        (1, IpNet::V4(net)) => format!("{}/26", net.addr()).parse().unwrap(),
                        (1, IpNet::V6(net)) => format!("{}/80", net.addr()).parse().unwrap(),
                        (_, IpNet::V4(_)) => {
                            format!("10.7.{}.0/24", random.random_range(0..200)).parse().unwrap()
                        }
                        (_, IpNet::V6(_)) => {
                            format!("fd07:{}::/64", random.random_range(0..200)).parse().unwrap()
                        }
                    };
                    let via = if to.addr().is_ipv4() { "192.168.33.8" } else { "fd33::8" };
                    if theirs.insert(to) {
                        _ = writeln!(batch, "route add {to} via {via} proto 4 metric 77");
                    }
                }
                4 => {
                    let all: Vec<_> = theirs.iter().copied().collect();
                    if let Some(to) = all.choose(&mut random) {
                        theirs.remove(to);
                        _ = writeln!(batch, "route del {to} proto 4 metric 77");
                    }
                }
                // The cluster changes.
                5 => {
                    segments.retain(|segment: &Segment| segment.to != to);
                    if random.random_range(0..3) > 0 {
                        segments.insert(Segment {
                            to,
                            third: random.random_range(31..33),
                            last: random.random_range(10..20),
                        });
                    }
                    write_cluster(&cluster, &segments);
                }
                6 => {
                    up = !up;
                    _ = writeln!(batch, "link set eth1 {}", if up { "up" } else { "down" });
                }
                // The agent is killed, now or while it works, and started again, now or later.
                _ => {
                    kills += usize::from(agent.is_some());
                    agent = if agent.is_some() && random.random() {
                        None
                    } else {
                        drop(agent.take());
                        Some(Process::start(&host, &cluster))
                    }
                }
            }
        }
        let file = directory.path().join("batch");
        std::fs::write(&file, batch).unwrap();
        let file = file.to_str().unwrap().to_owned();
        // Much of it fails, as it would for anybody: there is no such route, the link is down.
        host.enter(move || _ = Command::new("ip").args(["-force", "-batch", &file]).output().unwrap());

        if round % 25 == 0 || round == rounds {
            if agent.is_none() {
                agent = Some(Process::start(&host, &cluster));
            }
            let expected: BTreeSet<_> = segments
                .iter()
                .filter(|segment| segment.third == 31 || up)
                .filter(|segment| {
                    !theirs.iter().any(|other| other.contains(&segment.to) || segment.to.contains(other))
                })
                .map(Segment::line)
                .collect();
            let mut found = BTreeSet::new();
            let start = Instant::now();
            while found != expected {
                assert!(
                    start.elapsed() < Duration::from_secs(20),
                    "round {round}: expected {expected:#?}, found {found:#?}, theirs {:#?}",
                    foreign(&host)
                );
                found = host.own_routes();
            }
            assert_eq!(foreign(&host).len(), theirs.len(), "round {round}: {theirs:?}");
            checks += 1;
            slowest = slowest.max(start.elapsed());
        }
    }
    println!(
        "{rounds} rounds in {:?}: {kills} kills, {checks} times quiet, at most {slowest:?} after the last fault",
        begin.elapsed()
    );
    drop(agent);
    for to in &theirs {
        host.ip(&format!(
            "route del {to} via {} proto 4 metric 77",
            if to.addr().is_ipv4() { "192.168.33.8" } else { "fd33::8" }
        ));
    }
    assert_eq!(foreign(&host), [].into());
}

#[test]
fn after_kill_and_restart_routes_are_compared_not_doubled() {
    let (host, _lan) = host();
    let directory = tempfile::tempdir().unwrap();
    let cluster = directory.path().join("cluster.yaml");
    let segment =
        |number: u8| Segment { to: format!("10.200.{number}.0/24").parse().unwrap(), third: 31, last: 17 };
    write_cluster(&cluster, &[segment(1), segment(2)].into());
    let agent = Process::start(&host, &cluster);
    until("both are there", SECONDS, || host.own_routes().len() == 2);
    drop(agent);
    assert_eq!(host.own_routes(), [segment(1).line(), segment(2).line()].into(), "routes outlive the agent");

    // Meanwhile one node leaves, one comes, one route is deleted; unchanged routes are not written again.
    write_cluster(&cluster, &[segment(2), segment(3)].into());
    let mut monitor = Process(host.enter(|| {
        Command::new("ip")
            .args(["-4", "monitor", "route"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }));
    // Monitoring has begun once it reports something.
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(monitor.0.stdout.take().unwrap()));
    let (said, hear) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        while let Some(Ok(line)) = lines.next() {
            _ = said.send(line)
        }
    });
    until("the monitor reports", SECONDS, || {
        host.ip("route replace 10.99.0.0/16 via 192.168.33.8 proto static");
        host.ip("route del 10.99.0.0/16");
        hear.try_recv().is_ok()
    });
    let _agent = Process::start(&host, &cluster);
    until("as wanted now", SECONDS, || host.own_routes() == [segment(2).line(), segment(3).line()].into());
    // News of our routes that the monitor receives before the end marker.
    host.ip("route add 10.98.0.0/16 via 192.168.33.8");
    let mut heard = Vec::new();
    loop {
        let line = hear.recv_timeout(SECONDS).unwrap();
        if line.starts_with("10.98.") {
            break;
        }
        if line.contains("10.200.") {
            heard.push(line.split_whitespace().take(2).collect::<Vec<_>>().join(" "));
        }
    }
    heard.sort();
    assert_eq!(heard, ["10.200.3.0/24 via", "Deleted 10.200.1.0/24"]);
    drop(monitor);
    reader.join().unwrap();
}

#[test]
fn a_cluster_file_is_followed_through_edits_renames_and_mistakes() {
    let (host, _lan) = host();
    let directory = tempfile::tempdir().unwrap();
    let cluster = directory.path().join("cluster.yaml");
    let _agent = Process::start(&host, &cluster);
    let node = |number: u8| {
        format!("nodes: [{{name: a, addresses: [192.168.31.17], podNetworks: [10.200.{number}.0/24]}}]")
    };
    let has = |number: u8| {
        let expected = own(&format!("10.200.{number}.0/24"), "192.168.31.17", "eth0");
        until(&expected, SECONDS, || host.own_routes() == [expected.clone()].into());
    };
    std::fs::write(&cluster, node(1)).unwrap();
    has(1);
    let new = directory.path().join("new");
    std::fs::write(&new, node(2)).unwrap();
    std::fs::rename(&new, &cluster).unwrap();
    has(2);
    // As Kubernetes does it: the directory behind a symlink is exchanged.
    for number in [3, 4] {
        let data = directory.path().join(format!("..{number}"));
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("cluster.yaml"), node(number)).unwrap();
        let link = directory.path().join("..tmp");
        std::os::unix::fs::symlink(&data, &link).unwrap();
        std::fs::rename(&link, directory.path().join("..data")).unwrap();
        if number == 3 {
            std::os::unix::fs::symlink("..data/cluster.yaml", &new).unwrap();
            std::fs::rename(&new, &cluster).unwrap();
        }
        has(number);
    }
    // A mistake, and a missing file, change nothing; the next valid file does.
    std::fs::remove_file(&cluster).unwrap();
    std::fs::write(&cluster, "nodes: [{name: a").unwrap();
    host.ip("route del 10.200.4.0/24 proto 98");
    has(4);
    std::fs::write(&cluster, node(5)).unwrap();
    has(5);
}
