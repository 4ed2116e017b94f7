//! Discovery from end to end: a masqueraded pod announces itself to a host that has no route to it.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;
use bridge_agent::routes::discovery::listen::{DiscoveryCounters, Listener, Options};
use bridge_agent::routes::discovery::message::{Answer, Key, Message, Status};
use bridge_agent::routes::discovery::probe::{self, probe};
use bridge_agent::routes::discovery::registry::Rules;
use bridge_agent::routes::discovery::sniff::Sniffer;
use bridge_agent::routes::sources::{Desired, Source as _};
use bridge_agent::routes::{Reconciler, Settings, SourceKind};
use bridge_lab::lab::{Family, Lab, Netns};
use bridge_lab::traffic::{icmp, tcp};
use bridge_lab::wait::eventually;
use tokio::sync::oneshot;

const SECONDS: Duration = Duration::from_secs(5);

fn key(text: &str) -> Key {
    Key::new(text.as_bytes()).unwrap()
}

/// `discover listen` on host A.
struct Host {
    address: SocketAddr,
    counters: Arc<DiscoveryCounters>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn start(
        lab: &Lab,
        family: Family,
        rules: Rules,
        check: bool,
        state: Option<std::path::PathBuf>,
    ) -> Self {
        let address = lab.a().at(family, 12345);
        let options = Options { listen: address, key: key("the key of the tests"), rules, check, state };
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, started) = std::sync::mpsc::channel();
        let netns = lab.a().netns.clone();
        let thread = std::thread::spawn(move || {
            netns.run_async(|| async {
                let desired = Desired::default();
                let mut reconciler = Reconciler::new(Settings::default(), desired.clone()).unwrap();
                // A child that another test is just forking holds the socket of an earlier run until it execs.
                let (mut bound, mut waited) = (None, 0);
                while bound.is_none() {
                    match Listener::bind(options.clone(), reconciler.status(), reconciler.events()) {
                        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && waited < 100 => {
                            waited += 1;
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        outcome => bound = Some(outcome.unwrap()),
                    }
                }
                let listener = bound.unwrap();
                ready.send(listener.handle().counters()).unwrap();
                let publisher = desired.register(SourceKind::Discovery);
                tokio::select! {
                    error = reconciler.run() => panic!("{error}"),
                    ended = Box::new(listener).run(publisher) => panic!("{ended:?}"),
                    _ = stopped => {}
                }
            });
        });
        Self { address, counters: started.recv().unwrap(), stop: Some(stop), thread: Some(thread) }
    }

    fn expect(&self, accepted: u64, refused: u64, unauthentic: u64) {
        let counters = || {
            [&self.counters.accepted, &self.counters.refused, &self.counters.unauthentic]
                .map(|one| one.load(Ordering::Relaxed))
        };
        let expected = [accepted, refused, unauthentic];
        assert!(
            eventually(SECONDS, || (counters() == expected).then_some(())).is_some(),
            "{:?} is not {expected:?}",
            counters()
        );
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.take().map(|stop| stop.send(()));
        self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn options(host: SocketAddr) -> probe::Options {
    probe::Options {
        host,
        key: key("the key of the tests"),
        address: None,
        check_port: 0,
        lifetime: Duration::from_secs(60),
        name: "c1".into(),
        timeout: Duration::from_secs(8),
    }
}

fn probe_from(netns: &Netns, options: probe::Options) -> Result<Answer, String> {
    netns.run_async(|| async move { probe(&options).await.map_err(|error| error.to_string()) })
}

fn own_routes(lab: &Lab, family: Family) -> String {
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    lab.a().netns.ip(&format!("{flag} route show proto 98")).unwrap()
}

#[test]
fn a_pod_is_reached_after_it_announced_itself_until_it_expires() -> Result<()> {
    for family in Family::BOTH {
        let lab = Lab::builder().without_routes().masquerade().build()?;
        let host = Host::start(&lab, family, Rules::default(), true, None);
        let (pod, node) = (lab.c1().ip(family), lab.b().ip(family));
        let server = tcp::Server::echo(&lab.c1().netns, lab.c1().at(family, 40002))?;
        assert!(!icmp::echo(&lab.a().netns, pod, Duration::from_millis(300))?.succeeded(), "no route yet");

        let answer =
            probe_from(&lab.c1().netns, probe::Options { lifetime: Duration::ZERO, ..options(host.address) })
                .unwrap();
        assert_eq!((answer.status, answer.egress), (Status::Accepted, Some(node)), "{answer:?}");
        assert_eq!(answer.lifetime, 5, "the shortest there is");
        assert!(own_routes(&lab, family).contains(&format!("{pod} via {node} dev {}", lab.a().interface)));
        let mut connection = tcp::Client::new(&lab.a().netns).connect(server.address())?.reached()?;
        connection.round_trip(SECONDS)?;

        // Not renewed.
        let gone = eventually(Duration::from_secs(10), || own_routes(&lab, family).is_empty().then_some(()));
        assert!(gone.is_some(), "{}", own_routes(&lab, family));
        assert_eq!(host.counters.expired.load(Ordering::Relaxed), 1);
    }
    Ok(())
}

#[test]
fn another_key_and_noise_and_silence_lead_to_nothing() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    let host = Host::start(&lab, Family::V4, Rules::default(), true, None);
    let wrong = probe::Options { key: key("another key, as long"), ..options(host.address) };
    let error = probe_from(&lab.c1().netns, wrong).unwrap_err();
    assert!(error.contains("compare the key files"), "{error}");
    lab.c1().netns.run(|| {
        TcpStream::connect(host.address).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    });
    host.expect(0, 0, 2);
    assert_eq!(own_routes(&lab, Family::V4), "");
    Ok(())
}

#[test]
fn a_recorded_announcement_is_refused_in_another_connection() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    let host = Host::start(&lab, Family::V4, Rules::default(), false, None);
    // A recorder between pod and host: the pod talks to a relay on the node, which talks to the host.
    let relay = lab.b().netns.run(|| std::net::TcpListener::bind((lab.b().ip(Family::V4), 9999)).unwrap());
    let upstream = lab.b().netns.run(|| TcpStream::connect(host.address).unwrap());
    let recorder = std::thread::spawn(move || {
        let (mut pod, _) = relay.accept().unwrap();
        let mut host = upstream;
        let mut hello = [0; 24];
        host.read_exact(&mut hello).unwrap();
        pod.write_all(&hello).unwrap();
        let mut announcement = [0; 512];
        let length = pod.read(&mut announcement).unwrap();
        host.write_all(&announcement[..length]).unwrap();
        let mut answer = [0; 512];
        let size = host.read(&mut answer).unwrap();
        pod.write_all(&answer[..size]).unwrap();
        announcement[..length].to_vec()
    });
    let relayed = probe::Options { host: lab.b().at(Family::V4, 9999), ..options(host.address) };
    let answer = probe_from(&lab.c1().netns, relayed).unwrap();
    assert_eq!(answer.status, Status::Accepted, "a fresh message passes: {answer:?}");
    let recorded = recorder.join().unwrap();
    host.expect(1, 0, 0);

    let replayed = lab.c2().netns.run(|| {
        let mut stream = TcpStream::connect(host.address).unwrap();
        let mut hello = [0; 24];
        stream.read_exact(&mut hello).unwrap();
        stream.write_all(&recorded).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    });
    let Message::Answer(answer) = Message::parse(&replayed, &key("the key of the tests"))? else { panic!() };
    assert_eq!(answer.status, Status::Refused);
    assert!(answer.text.contains("replay"), "{}", answer.text);
    host.expect(1, 1, 0);
    Ok(())
}

#[test]
fn a_pod_that_cannot_be_reached_back_gets_no_route() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    let host = Host::start(&lab, Family::V4, Rules::default(), true, None);
    // It holds the key and claims its neighbour's address.
    let claimed: IpAddr = lab.c2().ip(Family::V4);
    let netns = lab.c1().netns.clone();
    netns.ip(&format!("address add {claimed}/32 dev lo"))?;
    let answer =
        probe_from(&netns, probe::Options { address: Some(claimed), ..options(host.address) }).unwrap();
    assert_eq!(answer.status, Status::Refused, "{answer:?}");
    assert!(answer.text.contains("no proof from"), "{}", answer.text);
    host.expect(0, 1, 0);
    let gone = eventually(SECONDS, || own_routes(&lab, Family::V4).is_empty().then_some(()));
    assert!(gone.is_some(), "{}", own_routes(&lab, Family::V4));
    Ok(())
}

#[test]
fn idle_connections_without_the_key_keep_no_pod_out() -> Result<()> {
    let lab = Lab::builder().second_host().without_routes().masquerade().build()?;
    let host = Host::start(&lab, Family::V4, Rules::default(), true, None);
    // From a host of the LAN, and from a pod behind the same node.
    for netns in [&lab.a2().netns, &lab.c2().netns] {
        let connect = || (0..300).map(|_| TcpStream::connect(host.address)).collect::<Result<Vec<_>, _>>();
        let _idle = netns.run(connect)?;
        let answer = probe_from(&lab.c1().netns, options(host.address)).unwrap();
        assert_eq!(answer.status, Status::Accepted, "{answer:?}");
    }
    Ok(())
}

#[test]
fn a_holder_of_the_key_cannot_divert_a_known_pod() -> Result<()> {
    let lab = Lab::builder().second_host().without_routes().masquerade().build()?;
    let host = Host::start(&lab, Family::V4, Rules::default(), true, None);
    assert_eq!(probe_from(&lab.c1().netns, options(host.address)).unwrap().status, Status::Accepted);
    let installed = own_routes(&lab, Family::V4);
    // It has the pod's address, so it could even answer the check.
    let pod = lab.c1().ip(Family::V4);
    let thief = lab.a2().netns.clone();
    thief.ip(&format!("address add {pod}/32 dev lo"))?;
    let answer = probe_from(&thief, probe::Options { address: Some(pod), ..options(host.address) }).unwrap();
    assert_eq!(answer.status, Status::Refused, "{answer:?}");
    assert!(answer.text.contains(&format!("is bound to {}", lab.b().ip(Family::V4))), "{}", answer.text);
    assert_eq!(own_routes(&lab, Family::V4), installed);
    assert_eq!(probe_from(&lab.c1().netns, options(host.address)).unwrap().status, Status::Accepted);
    Ok(())
}

#[test]
fn what_the_planner_refuses_the_pod_is_told() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    let rules = Rules { pods: vec!["10.9.0.0/16".parse()?], ..Rules::default() };
    let host = Host::start(&lab, Family::V4, rules, true, None);
    let answer = probe_from(&lab.c1().netns, options(host.address)).unwrap();
    assert!(answer.text.contains("lies in none of `networks.pods`"), "{answer:?}");
    drop(host);
    let host = Host::start(&lab, Family::V4, Rules::default(), true, None);
    lab.a().netns.ip("route add 10.200.0.0/16 via 192.168.31.1 proto static")?;
    let answer = probe_from(&lab.c1().netns, options(host.address)).unwrap();
    assert!(answer.text.contains("overlaps `10.200.0.0/16 via 192.168.31.1"), "{answer:?}");
    assert_eq!(own_routes(&lab, Family::V4), "");
    Ok(())
}

#[test]
fn what_was_discovered_outlives_a_restart_of_the_host() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    let directory = tempfile::tempdir()?;
    let state = directory.path().join("discovered.json");
    let host = Host::start(&lab, Family::V4, Rules::default(), true, Some(state.clone()));
    assert_eq!(probe_from(&lab.c1().netns, options(host.address)).unwrap().status, Status::Accepted);
    let installed = own_routes(&lab, Family::V4);
    drop(host);
    // Only one of the two is known when the next run begins.
    lab.a().netns.ip("route add 10.200.1.99/32 via 192.168.31.17 proto 98")?;
    let _host = Host::start(&lab, Family::V4, Rules::default(), true, Some(state));
    let compared = eventually(SECONDS, || (own_routes(&lab, Family::V4) == installed).then_some(()));
    assert!(compared.is_some(), "{}", own_routes(&lab, Family::V4));
    Ok(())
}

#[test]
fn sniffing_shows_the_node_from_which_a_pod_connects() -> Result<()> {
    let lab = Lab::builder().without_routes().masquerade().build()?;
    for family in Family::BOTH {
        let (to, other) = (lab.a().at(family, 7000), lab.a().at(family, 7001));
        let attempt = lab.a().netns.run_async(|| async {
            let mut sniffer = Sniffer::open(7000).unwrap();
            let pod = lab.c1().netns.clone();
            // Nothing listens on either port; the unwanted one comes first.
            let connect = tokio::task::spawn_blocking(move || {
                pod.run(|| [other, to].map(|to| TcpStream::connect(to).is_err()))
            });
            let attempt = tokio::time::timeout(SECONDS, sniffer.next()).await.expect("a SYN").unwrap();
            assert_eq!(connect.await.unwrap(), [true, true]);
            attempt
        });
        assert_eq!((attempt.from.ip(), attempt.to), (lab.b().ip(family), to));
    }
    Ok(())
}
