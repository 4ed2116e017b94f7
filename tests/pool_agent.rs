//! The agent's side of the pool: restarts, sweeps, leases for programs that bind themselves, and `exec`.

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bridge_agent::{
    api::Server,
    config,
    model::PortRange,
    pool::{
        KernelPool, Layout, Settings, attach,
        backend::Backend,
        checks, conntrack,
        layout::Occupied,
        masquerade,
        run::{self, Places},
        service::Service,
    },
    state::{Request, Shared, Status},
};
use bridge_common::pool::{
    FIRST_SLOT,
    bitmap::{self, Memory as _},
    slots::{self, Seat},
};
use bridge_lab::{
    agent,
    lab::{Family, Lab},
    pool::{Stand, end, finish, hold, in_cgroup, line, object, output, ports, python, serve},
    wait::eventually,
};

const PORTS: PortRange = PortRange { first: 61001, last: 61040 };
const SOON: Duration = Duration::from_secs(20);

fn settings() -> Result<Settings> {
    Ok(Settings { ports: vec![PORTS], destinations: vec!["192.168.31.0/24".parse()?], ..Settings::default() })
}

#[test]
fn the_hooks_go_on_without_the_agent_and_the_next_one_adopts_what_is_held() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let _server = serve(&lab.a().netns, 8080)?;
    let mut first = hold(&stand.cgroup, &lab.c1().netns, to, 15)?;
    let held = ports(&line(&mut first)?)?;
    // The agent is gone; a pod goes on connecting while another agent starts and replaces the hooks.
    let (base, cgroup) = (stand.base.clone(), stand.cgroup.clone());
    let busy = format!(
        r"
import socket, sys
n = 0
while not sys.stdin.closed and n < 4000:
    c = socket.socket(); c.settimeout(10); c.connect(('{}', 8080)); p = c.getsockname()[1]
    if not 61001 <= p <= 61040: print('outside', p); break
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0'); c.close(); n += 1
print(n)
",
        lab.a().v4
    );
    let mut command = stand.hooked(python(&busy));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let Stand { pool, .. } = stand;
    drop(pool);
    let busy = lab.c2().netns.spawn_command(command)?;
    let layout = Layout::plan(&settings()?, &Occupied::default())?;
    let mut pool = KernelPool::load(&object()?, &base, layout)?;
    let mount = attach::mount_point()?;
    pool.attach(&mount, cgroup.strip_prefix(&mount)?)?;
    let stand = Stand { pool, base, cgroup };
    ensure!(finish(busy, SOON)?.trim() == "4000", "every connect came from the pool, and none failed");
    let known: BTreeSet<u16> =
        stand.pool.walk()?.iter().map(|lease| stand.pool.layout().port(lease.index)).collect();
    ensure!(known == held, "{known:?} {held:?}");
    let mut rest = hold(&stand.cgroup, &lab.c1().netns, to, 15)?;
    let rest_ports = ports(&line(&mut rest)?);
    ensure!(rest_ports?.is_disjoint(&held));
    end(first)?;
    end(rest)?;
    stand.settled(SOON)?;
    // Another range inside the span is taken over; one beyond it is refused with a remedy.
    let Stand { pool, base, cgroup } = stand;
    drop(pool);
    let narrow = Settings { ports: vec![PortRange { first: 61005, last: 61006 }], ..settings()? };
    let pool = KernelPool::load(&object()?, &base, Layout::plan(&narrow, &Occupied::default())?)?;
    let mut more = hold(&cgroup, &lab.c2().netns, to, 3)?;
    ensure!(line(&mut more)? == libc::EADDRNOTAVAIL.to_string());
    drop(pool);
    let wide = Settings { ports: vec![PortRange { first: 50000, last: 61006 }], ..settings()? };
    let error = KernelPool::load(&object()?, &base, Layout::plan(&wide, &Occupied::default())?).unwrap_err();
    ensure!(error.to_string().contains("bridge-agent down"), "{error}");
    Ok(())
}

#[test]
fn warm_ports_cross_to_another_pod_when_conntrack_has_forgotten_them() -> Result<()> {
    let lab = Lab::builder().masquerade().build()?;
    // Without a share, so that the second pod may take all that the first one had.
    let stand = Stand::new(&lab, &Settings { quota: Some(40), ..settings()? })?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let _server = serve(&lab.a().netns, 8080)?;
    let mut first = hold(&stand.cgroup, &lab.c1().netns, to, 40)?;
    ports(&line(&mut first)?)?;
    end(first)?;
    stand.settled(SOON)?;
    let node = &lab.b().netns;
    let known = || node.run(conntrack::known);
    ensure!(known()?.iter().filter(|(destination, _)| destination.port() == 8080).count() >= 40);
    let Stand { mut pool, base, cgroup } = stand;
    let round = |pool: &mut KernelPool| -> Result<_> {
        let known = known()?;
        Ok(pool.sweep(|destination, port| known.contains(&(*destination, port)))?)
    };
    ensure!(round(&mut pool)?.cooled == 0, "touched lately");
    let swept = round(&mut pool)?;
    ensure!(swept.cooled == 0 && swept.kept == 40, "{swept:?}: conntrack still knows them");
    let stand = Stand { pool, base, cgroup };
    let mut second = hold(&stand.cgroup, &lab.c2().netns, to, 1)?;
    ensure!(line(&mut second)? == libc::EADDRNOTAVAIL.to_string());
    end(second)?;
    let mut forget = Command::new("conntrack");
    forget.arg("-F");
    node.output(forget)?;
    let Stand { mut pool, base, cgroup } = stand;
    let swept = round(&mut pool)?;
    ensure!(swept.cooled == 40 && swept.recovered == 0, "{swept:?}");
    let stand = Stand { pool, base, cgroup };
    let mut second = hold(&stand.cgroup, &lab.c2().netns, to, 40)?;
    ensure!(ports(&line(&mut second)?)?.len() == 40);
    end(second)?;
    stand.settled(SOON)?;
    Ok(())
}

#[test]
fn a_port_that_got_lost_is_found_and_slots_come_back() -> Result<()> {
    let lab = Lab::builder().build()?;
    let mut stand = Stand::new(&lab, &settings()?)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let _server = serve(&lab.a().netns, 8080)?;
    let mut holder = hold(&stand.cgroup, &lab.c1().netns, to, 5)?;
    let held = ports(&line(&mut holder)?)?;
    let geometry = stand.pool.layout().geometry();
    let slot = stand.pool.walk()?[0].slot;
    let index = |port: u16| stand.pool.layout().index(port).context("in the pool");
    let lost = (PORTS.first..=PORTS.last).find(|port| !held.contains(port)).context("a free port")?;
    let lost = index(lost)?;
    ensure!(bitmap::take(stand.pool.tables(), geometry.free(slot), lost));
    ensure!(stand.pool.sweep(|_, _| false)?.recovered == 0, "missing once is not lost");
    ensure!(stand.pool.sweep(|_, _| false)?.recovered == 1);
    ensure!(bitmap::is_free(stand.pool.tables(), geometry.free(slot), lost));
    end(holder)?;
    stand.settled(SOON)?;
    for _ in 0..3 {
        stand.pool.sweep(|_, _| false)?;
    }
    ensure!(stand.pool.tables().destinations()?.is_empty() && stand.pool.tables().owners()?.is_empty());
    let slots = stand.pool.layout().config.slots;
    let free = (FIRST_SLOT..slots)
        .filter(|slot| bitmap::is_free(stand.pool.tables(), bridge_common::pool::ALLOCATOR, *slot))
        .count();
    ensure!(free == (slots - FIRST_SLOT) as usize, "{free} of {slots} slots are free");
    Ok(())
}

#[test]
fn what_is_held_is_true_after_ports_left_and_came_back_and_after_an_agent_that_had_counted_wrong()
-> Result<()> {
    let lab = Lab::builder().build()?;
    let mut stand = Stand::new(&lab, &settings()?)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let _server = serve(&lab.a().netns, 8080)?;
    let mut staying = hold(&stand.cgroup, &lab.c1().netns, to, 5)?;
    ports(&line(&mut staying)?)?;
    let mut leaving = hold(&stand.cgroup, &lab.c1().netns, to, 4)?;
    ports(&line(&mut leaving)?)?;
    ensure!(stand.pool.held()?.held == 9 && stand.pool.sweep(|_, _| false)?.recovered == 0);
    end(leaving)?;
    eventually(SOON, || (stand.pool.held().ok()?.held == 5).then_some(())).context("ports are still held")?;
    // All but one leave the pool, and come back: most of those that were given back are nowhere.
    let cgroups = vec![stand.cgroup.strip_prefix(attach::mount_point()?)?.to_owned()];
    let all = Settings { cgroups, ..settings()? };
    let one = Settings { ports: vec![PortRange { first: 61040, last: 61040 }], ..all.clone() };
    for settings in [one, all] {
        stand.pool.change(&settings, Layout::plan(&settings, &Occupied::default())?)?;
    }
    let recovered = [stand.pool.sweep(|_, _| false)?.recovered, stand.pool.sweep(|_, _| false)?.recovered];
    ensure!(recovered[0] == 0 && recovered[1] >= 34, "{recovered:?}");
    let seat =
        stand.pool.walk()?.first().map(|lease| Seat { slot: lease.slot, owner_slot: lease.owner_slot });
    let seat = seat.context("a connection")?;
    let live = |pool: &KernelPool| {
        [seat.slot, seat.owner_slot].map(|slot| pool.tables().load(pool.layout().geometry().live(slot)))
    };
    // The destination counts its owner as well.
    ensure!(live(&stand.pool) == [6, 5], "{:?}", live(&stand.pool));

    // An agent that ended seats twice would have left this.
    for _ in 0..9 {
        slots::leave(stand.pool.tables(), seat);
    }
    ensure!(live(&stand.pool).map(u64::cast_signed) == [-3, -4] && stand.pool.held()?.held == 5);
    let Stand { pool, base, cgroup } = stand;
    drop(pool);
    let pool = KernelPool::load(&object()?, &base, Layout::plan(&settings()?, &Occupied::default())?)?;
    ensure!(live(&pool) == [6, 5] && pool.held()?.held == 5, "{:?} {:?}", live(&pool), pool.held()?);
    let stand = Stand { pool, base, cgroup };
    end(staying)?;
    stand.settled(SOON)?;
    ensure!(live(&stand.pool) == [1, 0] && stand.pool.held()?.held == 0, "{:?}", live(&stand.pool));
    Ok(())
}

/// An agent's API on a pool of the lab.
struct Served {
    service: Arc<Service>,
    socket: PathBuf,
    cgroup: PathBuf,
    _requests: tokio::sync::mpsc::Receiver<Request>,
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Served {
    fn new(lab: &Lab, stand: Stand) -> Result<Self> {
        let Stand { pool, cgroup, .. } = stand;
        let service = Service::new(Backend::kernel(pool), settings()?.destinations);
        let socket = lab.directory().join("pool.sock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let server = Server::bind(&socket, &config::Api::default())?;
        let (shared, requests) = Shared::new(Status::default());
        shared.set_pool(Some(Arc::clone(&service)));
        runtime.spawn(server.serve(shared));
        runtime.spawn(run::expire(Arc::clone(&service)));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        thread::spawn(move || runtime.block_on(stopped));
        Ok(Self { service, socket, cgroup, _requests: requests, _stop: stop })
    }

    fn kinds(&self) -> Result<Vec<&'static str>> {
        Ok(self.service.list()?.iter().map(|holding| holding.kind).collect())
    }

    fn becomes(&self, kinds: &[&str]) -> Result<()> {
        eventually(SOON, || self.kinds().ok().filter(|seen| seen == kinds))
            .with_context(|| format!("{:?} and not {kinds:?}", self.service.list()))?;
        Ok(())
    }
}

#[test]
fn a_lease_is_for_its_namespace_and_its_socket_takes_it_over() -> Result<()> {
    let lab = Lab::builder().build()?;
    let served = Served::new(&lab, Stand::new(&lab, &settings()?)?)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = lab.a().v4;
    // As any language does it: an HTTP call, a bind, a connect.
    let script = format!(
        r#"
import http.client, json, socket, sys
h = http.client.HTTPConnection('bridge')
h.sock = socket.socket(socket.AF_UNIX); h.sock.connect('{}')
h.request('POST', '/v1/leases', json.dumps(dict(destination='{to}:8080')))
port = json.load(h.getresponse())['leases'][0]['port']
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('', port))
print(port, flush=True)
sys.stdin.readline()
s.connect(('{to}', 8080))
print('connected', flush=True)
sys.stdin.readline()
h.close()
print('hung up', flush=True)
sys.stdin.read()
"#,
        served.socket.display()
    );
    let hooked = |script: &str| {
        let mut command = in_cgroup(&served.cgroup, python(script));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    };
    let mut client = lab.c1().netns.spawn_command(hooked(&script))?;
    let port: u16 = line(&mut client)?.parse()?;
    ensure!(PORTS.contains(port));
    served.becomes(&["lease"])?;
    let holding = served.service.list()?.remove(0);
    ensure!(holding.owner.pid == client.id() && holding.owner.command == "python3", "{holding:?}");
    ensure!(holding.owner.cgroup.as_deref().is_some_and(|cgroup| cgroup.ends_with("/pool")), "{holding:?}");
    // Another pod that binds the very port is refused.
    let thief = format!(
        "import socket, errno\ns = socket.socket(); s.bind(('', {port}))\ntry: s.connect(('{to}', 8080))\nexcept OSError as e: print(errno.errorcode[e.errno])"
    );
    ensure!(output(&lab.c2().netns, hooked(&thief), SOON)?.trim() == "EADDRNOTAVAIL");
    client.child().stdin.as_mut().context("a pipe")?.write_all(b"\n")?;
    ensure!(line(&mut client)? == "connected");
    served.becomes(&["lease", "socket"])?;
    client.child().stdin.as_mut().context("a pipe")?.write_all(b"\n")?;
    ensure!(line(&mut client)? == "hung up");
    // The lease is over, the connection is not: the port stays taken.
    served.becomes(&["socket"])?;
    ensure!(output(&lab.c2().netns, hooked(&thief), SOON)?.trim() == "EADDRNOTAVAIL");
    client.kill()?;
    served.becomes(&[])?;
    Ok(())
}

#[test]
fn a_killed_client_leaves_no_lease() -> Result<()> {
    let lab = Lab::builder().build()?;
    let served = Served::new(&lab, Stand::new(&lab, &settings()?)?)?;
    let script = format!(
        r"
import http.client, json, socket, time
h = http.client.HTTPConnection('bridge')
h.sock = socket.socket(socket.AF_UNIX); h.sock.connect('{}')
h.request('POST', '/v1/leases', json.dumps(dict(destination='192.168.31.67:443', count=10)))
h.getresponse().read()
time.sleep(1000)
",
        served.socket.display()
    );
    let mut clients = Vec::new();
    for pod in lab.pods() {
        let mut command = python(&script);
        command.stdin(Stdio::null());
        clients.push(pod.netns.spawn_command(command)?);
    }
    served.becomes(&["lease"; 20])?;
    for client in &mut clients {
        client.kill()?;
    }
    served.becomes(&[])
}

#[test]
fn a_lease_with_a_time_outlives_its_client_and_not_its_network_namespace() -> Result<()> {
    let lab = Lab::builder().build()?;
    let served = Served::new(&lab, Stand::new(&lab, &settings()?)?)?;
    // The second namespace is new, and ends with its process.
    let script = format!(
        r"
import ctypes, http.client, json, socket, sys
def lease():
    h = http.client.HTTPConnection('bridge')
    h.sock = socket.socket(socket.AF_UNIX); h.sock.connect('{}')
    h.request('POST', '/v1/leases', json.dumps(dict(destination='192.168.31.67:443', count=5, ttlMs=600000)))
    return h.getresponse().status
print(lease(), flush=True)
assert ctypes.CDLL(None).unshare(0x40000000) == 0
print(lease(), lease(), flush=True)
sys.stdin.read()
",
        served.socket.display()
    );
    let mut command = python(&script);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = lab.c1().netns.spawn_command(command)?;
    ensure!(line(&mut client)? == "201" && line(&mut client)? == "201 201");
    served.becomes(&["lease"; 15])?;
    end(client)?;
    served.becomes(&["lease"; 5])?;
    let left: Vec<_> = served.service.list()?.iter().filter_map(|holding| holding.id).collect();
    ensure!(left.iter().all(|id| *id <= 5), "{left:?}");
    Ok(())
}

#[test]
fn the_client_library_connects_from_a_leased_port() -> Result<()> {
    let lab = Lab::builder().build()?;
    let served = Served::new(&lab, Stand::new(&lab, &settings()?)?)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = SocketAddr::new(lab.a().v4.into(), 8080);
    let connector = bridge_client::Connector::agent_at(&served.socket);
    let refused = connector.connect("127.0.0.1:1".parse()?).unwrap_err();
    ensure!(refused.to_string().contains("not a destination of the pool"), "{refused}");
    // A lease is for the namespace that its client connects to the agent from, thread by thread.
    let acquire = || {
        bridge_client::Agent::at(&served.socket).acquire(to, bridge_client::Transport::Tcp, Duration::ZERO)
    };
    let inside = || lab.a().netns.run(acquire);
    let leases: Vec<_> = (0..40).map(|_| inside()).collect::<Result<_, _>>()?;
    ensure!(leases.iter().map(bridge_client::Lease::port).collect::<BTreeSet<_>>().len() == 40);
    let start = Instant::now();
    let full = connector.connect(to).unwrap_err();
    ensure!(std::io::Error::from(full).kind() == std::io::ErrorKind::AddrNotAvailable);
    ensure!(start.elapsed() < Duration::from_millis(200));
    drop(leases);
    served.becomes(&[])?;
    ensure!(acquire().is_err(), "all are warm with the LAN host");
    let stream = lab.a().netns.run(|| connector.connect(to))?;
    ensure!(PORTS.contains(stream.local_addr()?.port()) && stream.lease().is_some());
    drop(stream);
    served.becomes(&[])
}

#[test]
fn starting_keeps_the_ports_from_others_and_stopping_gives_them_back() -> Result<()> {
    let lab = Lab::builder().build()?;
    let places = Places { pins: lab.pin_directory()?, state: lab.directory() };
    let node = &lab.b().netns;
    let reserved = || node.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports"));
    node.set_sysctl("ipv4/ip_local_reserved_ports", "8080,61003")?;
    let settings = Settings { node_ports: Some(PortRange { first: 61031, last: 61040 }), ..settings()? };
    let start = |object: &[u8]| node.run(|| run::start(object, &settings, &places).context("start"));
    // 40 ports, of which one is reserved for another program and ten are NodePorts.
    let started = start(&object()?)?;
    let summary = started.service.summary()?;
    ensure!(summary.mode == "kernel" && summary.warnings.is_empty(), "{summary:?}");
    // While an agent holds it, it stays.
    ensure!(matches!(node.run(|| run::stop(&places)), Err(run::StopError::Locked(_))));
    ensure!(started.service.backend().layout().ports.len() == 29);
    ensure!(reserved()?.trim() == "8080,61001-61030", "{}", reserved()?);
    drop(started);
    // What the agent itself has reserved does not keep it from starting again.
    ensure!(start(&object()?)?.service.backend().layout().ports.len() == 29);
    node.run(|| run::stop(&places))?;
    ensure!(!places.pins.join(format!("pool-{}", bridge_common::pool::ABI_VERSION)).exists());
    ensure!(reserved()?.trim() == "8080,61003", "{}", reserved()?);
    // A kernel that does not take the object: the agent leases by itself.
    let started = start(b"not an object")?;
    ensure!(started.service.backend().name() == "userspace");
    node.run(|| run::stop(&places))?;
    Ok(())
}

#[test]
fn random_masquerade_is_warned_of_and_superseded_by_our_own() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let node = &lab.b().netns;
    let pods = lab.pod_network(0, Family::V4);
    let ports = &stand.pool.layout().ports;
    let nft = |script: &str| -> Result<()> {
        let mut child = Command::new("nft");
        child.args(["-f", "-"]).stdin(Stdio::piped());
        let mut process = node.spawn_command(child)?;
        process.child().stdin.take().context("a pipe")?.write_all(script.as_bytes())?;
        ensure!(process.wait(SOON)?.context("nft does not end")?.success(), "{script}");
        Ok(())
    };
    ensure!(node.run(|| checks::look(ports)).is_empty());
    nft(&format!(
        "table ip other {{ chain post {{ type nat hook postrouting priority srcnat; ip saddr {pods} masquerade fully-random; }}; }}"
    ))?;
    let warnings = node.run(|| checks::look(ports));
    ensure!(warnings.len() == 1 && warnings[0].problem.contains("fully-random"), "{warnings:?}");
    // Which port the LAN host sees, and which one the pod has.
    let listener = lab.a().netns.run(|| std::net::TcpListener::bind((lab.a().v4, 8080)))?;
    let connect = || -> Result<(u16, u16)> {
        let script = format!(
            "import socket; s = socket.create_connection(('{}', 8080), 10); print(s.getsockname()[1])",
            lab.a().v4
        );
        let own = output(&lab.c1().netns, stand.hooked(python(&script)), SOON)?.trim().parse()?;
        Ok((own, listener.accept()?.1.port()))
    };
    let (own, seen) = connect()?;
    ensure!(PORTS.contains(own) && !PORTS.contains(seen), "{own} became {seen}: the trouble is there");
    nft(&masquerade::script(&[pods], &settings()?.destinations, ports))?;
    for _ in 0..5 {
        let (own, seen) = connect()?;
        ensure!(PORTS.contains(own) && own == seen, "{own} became {seen}");
    }
    nft(masquerade::REMOVAL)?;
    nft(masquerade::REMOVAL)?;
    let (_, seen) = connect()?;
    ensure!(!PORTS.contains(seen), "the table is gone");
    Ok(())
}

#[test]
fn the_examples_in_other_languages_work() -> Result<()> {
    let lab = Lab::builder().build()?;
    let served = Served::new(&lab, Stand::new(&lab, &settings()?)?)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let examples = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../bridge-client/examples"));
    let compiled = lab.directory().join("connect");
    let mut compile = Command::new("cc");
    compile.args(["-Wall", "-Wextra", "-Werror", "-o"]).arg(&compiled).arg(examples.join("connect.c"));
    ensure!(compile.status()?.success(), "the C example does not compile");
    let mut python = Command::new("python3");
    python.arg(examples.join("connect.py"));
    let mut clients = vec![(Command::new(compiled), " "), (python, " ")];
    match go() {
        Some(go) => {
            let program = lab.directory().join("connect-go");
            let mut build = Command::new(go);
            build.args(["build", "-o"]).arg(&program).arg(examples.join("connect.go"));
            ensure!(build.status()?.success(), "the Go example does not compile");
            clients.push((Command::new(program), ":"));
        }
        None if env::var_os("CI").is_some() => bail!("there is no Go to compile connect.go"),
        None => eprintln!("NOT RUN: connect.go, since there is no Go"),
    }
    for (mut client, between) in clients {
        let what = format!("{client:?}");
        client.arg(&served.socket).args([lab.a().v4.to_string(), "8080".into()].join(between).split(' '));
        let said = output(&lab.c1().netns, client, SOON)?;
        let port: u16 = said.trim().rsplit(':').next().unwrap_or_default().parse()?;
        ensure!(PORTS.contains(port), "{what} came from {port}");
    }
    served.becomes(&[])
}

/// Go as `cargo xtask cluster` finds or installs it.
fn go() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let tools = PathBuf::from(env::var_os("HOME")?).join(".cache/bridge/tools");
    let installed = fs::read_dir(tools).into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
    let folders = env::split_paths(&path).chain(["/usr/local/go/bin".into()]).chain(installed);
    folders.map(|folder| folder.join("go")).find(|go| go.is_file())
}

#[test]
fn exec_gives_a_program_ports_and_passes_on_how_it_ends() -> Result<()> {
    let lab = Lab::builder().build()?;
    let stand = Stand::new(&lab, &settings()?)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let agent = agent::program()?;
    let base = stand.base.display().to_string();
    let exec = |options: &[&str], command: &[&str]| {
        let mut exec = Command::new(&agent);
        exec.args(["exec", "--pin-root", &base]).args(options).arg("--").args(command);
        exec.stdin(Stdio::null()).stdout(Stdio::piped());
        exec
    };
    let connect = format!(
        "import socket; s = socket.create_connection(('{}', 8080), 10); print(s.getsockname()[1])",
        lab.a().v4
    );
    let port = |options: &[&str]| -> Result<u16> {
        let text = output(&lab.c1().netns, exec(options, &["python3", "-c", &connect]), SOON)?;
        text.trim().parse().with_context(|| text.clone())
    };
    ensure!(PORTS.contains(port(&[])?), "the agent's destinations");
    ensure!(PORTS.contains(port(&["--destination", "192.168.31.67/32"])?), "a destination of its own");
    ensure!(!PORTS.contains(port(&["--destination", "198.51.100.0/24"])?), "another destination");
    ensure!(
        port(&["--destination", "192.168.31.0/24", "--ports", "40100-40101"])? / 2 == 20050,
        "without an agent"
    );
    let claims = stand.settled(SOON)?;
    ensure!(claims == 2, "{claims} claims in the agent's pool");

    let status = |command: &[&str]| -> Result<std::process::ExitStatus> {
        let mut process = lab.c1().netns.spawn_command(exec(&[], command))?;
        process.wait(SOON)?.context("did not end")
    };
    ensure!(status(&["sh", "-c", "exit 7"])?.code() == Some(7));
    ensure!(
        std::os::unix::process::ExitStatusExt::signal(&status(&["sh", "-c", "kill -TERM $$"])?) == Some(15)
    );
    ensure!(status(&["/nonexistent/program"])?.code() == Some(1));
    // A signal to `exec` reaches the program, which may see to it as it likes.
    let mut process = lab
        .c1()
        .netns
        .spawn_command(exec(&[], &["bash", "-c", "trap 'exit 3' USR1; echo ready; sleep 100 & wait"]))?;
    ensure!(line(&mut process)? == "ready");
    process.signal(rustix::process::Signal::USR1)?;
    ensure!(process.wait(SOON)?.context("did not end")?.code() == Some(3));
    Ok(())
}
