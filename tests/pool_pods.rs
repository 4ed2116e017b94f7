//! Pods that take part in the pool by annotation: control groups as kubelet makes them, real connects from within.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{
    model::PortRange,
    pool::{KernelPool, Layout, Settings, backend::Backend, layout::Occupied, pods, service::Service},
};
use bridge_lab::{
    lab::{Family, Lab, Netns},
    pool::{end, hold, in_cgroup, line, object, output, ports, python, serve},
    wait::eventually,
};
use tokio::sync::{oneshot, watch};

const PORTS: PortRange = PortRange { first: 61001, last: 61040 };
const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;

fn settings() -> Result<Settings> {
    Ok(Settings { ports: vec![PORTS], destinations: vec!["192.168.31.0/24".parse()?], ..Settings::default() })
}

/// UID of a pod, by a number.
fn uid(n: u8) -> String {
    format!("1f0c3e9a-7a2b-4c5d-8e9f-0a1b2c3d4e{n:02x}")
}

/// The path of a pod's control group as kubelet names it with its systemd driver, class Burstable.
fn systemd(n: u8) -> String {
    let uid = uid(n).replace('-', "_");
    format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice")
}

/// The agent's part, on a thread of its own.
struct Keeper {
    service: Arc<Service>,
    pods: watch::Sender<pods::OptedIn>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Keeper {
    fn start(pool: KernelPool, root: &Path) -> Result<Self> {
        let service = Service::new(Backend::kernel(pool), settings()?.destinations);
        let (pods, opted) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let (root, shared) = (root.to_owned(), Arc::clone(&service));
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let work = async {
                tokio::select! {
                    () = pods::keep(shared, opted, Some(root)) => {}
                    _ = stopped => {}
                }
            };
            runtime.expect("a runtime").block_on(work);
        });
        Ok(Self { service, pods, stop: Some(stop), thread: Some(thread) })
    }

    fn take_part(&self, pods: &[u8]) {
        self.pods.send_replace(Some(pods.iter().map(|n| uid(*n)).collect::<BTreeSet<_>>()));
    }

    fn becomes(&self, hooked: usize, waiting: usize) -> Result<()> {
        let pods = || self.service.summary().map(|summary| (summary.pods.hooked, summary.pods.waiting));
        let there = eventually(SOON, || pods().ok().filter(|pods| *pods == (hooked, waiting)));
        there.map(drop).with_context(|| format!("{:?} and not {:?}", pods(), (hooked, waiting)))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has panicked: then the test has failed for that reason already.
            let _ = thread.join();
        }
    }
}

struct World {
    lab: Lab,
    /// In the place of the root of the hierarchy, which others use at the same time.
    root: PathBuf,
    base: PathBuf,
    _server: bridge_lab::lab::Process,
}

impl World {
    fn new() -> Result<Self> {
        let lab = Lab::builder().build()?;
        let (root, base) = (lab.cgroup("root")?, lab.pin_directory()?);
        let server = serve(&lab.a().netns, PORT)?;
        Ok(Self { lab, root, base, _server: server })
    }

    fn pool(&self) -> Result<KernelPool> {
        let layout = Layout::plan(&settings()?, &Occupied::default())?;
        let mut pool = KernelPool::load(&object()?, &self.base, layout)?;
        pool.set_networks(&settings()?.destinations)?;
        pool.set_cgroups(&[])?;
        Ok(pool)
    }

    /// Makes a pod's control group, with one of a container in it, whose path it answers.
    fn pod(&self, path: &str) -> Result<PathBuf> {
        let container = self.root.join(path).join("cri-containerd-0123.scope");
        fs::create_dir_all(&container)?;
        Ok(container)
    }

    /// The source port of a connection from a program in a container.
    fn connect(&self, container: &Path) -> Result<u16> {
        let script = format!(
            "import socket; print(socket.create_connection(('{}', {PORT}), 5).getsockname()[1])",
            self.lab.a().v4
        );
        let netns: &Netns = &self.lab.c1().netns;
        Ok(output(netns, in_cgroup(container, python(&script)), SOON)?.trim().parse()?)
    }

    fn is_pooled(&self, container: &Path) -> Result<bool> {
        Ok(PORTS.contains(self.connect(container)?))
    }

    /// Pods with pinned hooks.
    fn pins(&self) -> usize {
        let version = bridge_agent::pool::pins::directory(&self.base);
        let names = fs::read_dir(version).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with("pod-")).count()
    }
}

#[test]
fn a_pod_is_hooked_before_its_container_starts_and_unhooked_when_it_ends_or_says_no_more() -> Result<()> {
    let world = World::new()?;
    let keeper = Keeper::start(world.pool()?, &world.root)?;
    keeper.take_part(&[1, 2]);
    keeper.becomes(0, 2)?;

    // kubelet makes the group, and only then the container, which connects at once.
    for (n, path) in [(1_u8, systemd(1)), (2, format!("kubepods/pod{}", uid(2)))] {
        fs::create_dir_all(world.root.join(&path))?;
        keeper.becomes(usize::from(n), usize::from(2 - n))?;
        let container = world.pod(&path)?;
        ensure!(world.is_pooled(&container)?, "{path}");
    }
    // Its neighbour of the same class says nothing.
    let neighbour = world.pod(&systemd(3))?;
    ensure!(!world.is_pooled(&neighbour)?, "a pod that takes no part");
    keeper.take_part(&[1, 2, 3]);
    keeper.becomes(3, 0)?;
    ensure!(world.is_pooled(&neighbour)?, "the annotation came later");

    // A connection outlives the annotation, and its port is given back in the end.
    let to = SocketAddr::new(world.lab.a().ip(Family::V4), PORT);
    let mut held = hold(&neighbour, &world.lab.c1().netns, to, 5)?;
    ports(&line(&mut held)?)?;
    keeper.take_part(&[1, 2]);
    keeper.becomes(2, 0)?;
    ensure!(!world.is_pooled(&neighbour)?, "the annotation is gone");
    ensure!(world.pins() == 2);
    end(held)?;

    // The pod ends.
    let group = world.root.join(systemd(1));
    let gone = || {
        fs::remove_dir(group.join("cri-containerd-0123.scope")).and_then(|()| fs::remove_dir(&group)).is_ok()
    };
    ensure!(eventually(SOON, || gone().then_some(())).is_some(), "the group is busy");
    keeper.becomes(1, 1)?;
    ensure!(world.pins() == 1);
    Ok(())
}

#[test]
fn hooks_of_pods_stay_while_no_agent_runs_and_until_the_cluster_has_spoken() -> Result<()> {
    let world = World::new()?;
    let (one, two) = (world.pod(&systemd(1))?, world.pod(&systemd(2))?);
    let keeper = Keeper::start(world.pool()?, &world.root)?;
    keeper.take_part(&[1, 2]);
    keeper.becomes(2, 0)?;
    drop(keeper);
    ensure!(world.is_pooled(&one)? && world.is_pooled(&two)?, "without an agent");
    // The next agent does not know of any pod yet.
    let keeper = Keeper::start(world.pool()?, &world.root)?;
    ensure!(world.is_pooled(&one)? && world.is_pooled(&two)?, "the next agent has not heard of the cluster");
    // Meanwhile the one has taken its annotation back.
    keeper.take_part(&[2]);
    keeper.becomes(1, 0)?;
    ensure!(!world.is_pooled(&one)? && world.is_pooled(&two)?, "the cluster has spoken");
    keeper.take_part(&[]);
    keeper.becomes(0, 0)?;
    ensure!(!world.is_pooled(&two)? && world.pins() == 0);
    Ok(())
}

#[test]
fn many_pods_that_come_and_go_at_once_are_all_hooked() -> Result<()> {
    const PODS: u8 = 60;
    let world = World::new()?;
    let keeper = Keeper::start(world.pool()?, &world.root)?;
    keeper.take_part(&(0..PODS).collect::<Vec<_>>());
    keeper.becomes(0, PODS.into())?;
    for n in 0..PODS {
        world.pod(&systemd(n))?;
    }
    keeper.becomes(PODS.into(), 0)?;
    ensure!(world.pins() == usize::from(PODS));
    for n in 0..PODS / 2 {
        let group = world.root.join(systemd(n));
        fs::remove_dir(group.join("cri-containerd-0123.scope"))?;
        fs::remove_dir(group)?;
    }
    keeper.becomes((PODS / 2).into(), (PODS / 2).into())?;
    ensure!(world.is_pooled(&world.root.join(systemd(PODS - 1)).join("cri-containerd-0123.scope"))?);
    Ok(())
}

#[test]
fn a_pod_leaves_ports_to_another_one_that_has_not_connected_yet() -> Result<()> {
    let world = World::new()?;
    let (first, second) = (world.pod(&systemd(1))?, world.root.join(systemd(2)));
    let keeper = Keeper::start(world.pool()?, &world.root)?;
    keeper.take_part(&[1, 2]);
    keeper.becomes(1, 1)?;
    // An eighth of the ports is set aside for unconnected sockets.
    let most = |destination: u16| -> Result<String> {
        let script = format!(
            "import itertools, socket\nheld = []\nfor n in itertools.count():\n    \
             held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))\n    \
             try: held[n].connect(('192.168.31.200', {destination}))\n    except OSError: break\nprint(n)"
        );
        Ok(output(&world.lab.c1().netns, in_cgroup(&first, python(&script)), SOON)?.trim().to_owned())
    };
    ensure!(most(1)? == "35", "{} of 35", most(1)?);
    fs::create_dir_all(second.join("cri-containerd-0123.scope"))?;
    keeper.becomes(2, 0)?;
    ensure!(most(2)? == "30", "{} of 40", most(2)?);
    Ok(())
}
