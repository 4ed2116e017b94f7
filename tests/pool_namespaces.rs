//! A pod that makes network namespaces, or keeps its slots and ports, leaves as many to other pods.

use std::{
    collections::BTreeSet, fs, io::Write as _, os::unix::fs::MetadataExt as _, path::Path, process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::{
    model::PortRange,
    pool::{Settings, attach},
};
use bridge_common::pool::{MAX_RESTS, Refusal, counter, shares, slots::Tables as _};
use bridge_lab::{
    lab::{Lab, Netns, Process},
    pool::{Stand, end, in_cgroup, line, output, python, serve},
    wait::eventually,
};

const SOON: Duration = Duration::from_secs(60);

const PRELUDE: &str = r"
import ctypes, json, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
";

/// A second control group whose connections use the pool.
fn second_group(lab: &Lab, stand: &mut Stand) -> Result<std::path::PathBuf> {
    let group = lab.cgroup("victim")?;
    let mount = attach::mount_point()?;
    stand.pool.attach(&mount, group.strip_prefix(&mount)?)?;
    Ok(group)
}

/// Runs a hooked program that prints one line and keeps its sockets until its standard input ends.
fn hold(netns: &Netns, group: &Path, script: &str) -> Result<(Process, String)> {
    let mut command = in_cgroup(group, python(&format!("{PRELUDE}{script}\nsys.stdin.read()")));
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = netns.spawn_command(command)?;
    let text = line(&mut process)?;
    Ok((process, text))
}

#[test]
fn many_namespaces_of_a_pod_leave_slots_to_others() -> Result<()> {
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    // So wide that the table has room for about 2,200 destinations.
    let ports = vec![PortRange { first: 2048, last: 62000 }];
    let mut stand = Stand::new(&lab, &Settings { ports, destinations, ..Settings::default() })?;
    let victims = second_group(&lab, &mut stand)?;
    // No route leads out of a new namespace; the socket has its slots nevertheless, as long as it is open.
    let script = r"
held = []
for netns in range(30):
    assert ctypes.CDLL(None).unshare(0x40000000) == 0
    for n in range(300):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.append(s)
        if code(lambda: s.connect(('192.168.31.200', 1 + netns * 300 + n))) == 'EADDRNOTAVAIL': break
print(len(held), flush=True)
";
    let (hostile, _) = hold(&lab.c1().netns, &stand.cgroup, script)?;
    ensure!(stand.counter(counter::REFUSALS + Refusal::SHARE.0)? > 0);
    let script = format!(
        "{PRELUDE}held = []\ndef one(n):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    held.append(s)\n    \
         s.connect(('192.168.31.201', n))\nprint(json.dumps([code(lambda: one(n)) for n in range(1, 61)]))"
    );
    let seen: Vec<String> =
        serde_json::from_str(&output(&lab.c2().netns, in_cgroup(&victims, python(&script)), SOON)?)?;
    ensure!(seen.iter().all(|code| code == "connected"), "{seen:?}");
    ensure!(stand.counter(counter::REFUSALS + Refusal::TABLE_FULL.0)? == 0);
    end(hostile)
}

#[test]
fn a_pod_that_keeps_its_udp_sockets_leaves_ports_to_others() -> Result<()> {
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = PortRange { first: 61001, last: 62000 };
    let mut stand = Stand::new(&lab, &Settings { ports: vec![ports], destinations, ..Settings::default() })?;
    let victims = second_group(&lab, &mut stand)?;
    let mut events = stand.pool.take_events().context("no events")?;
    // The highest eighth, 125 ports, is for these.
    let script = |namespaces: u32, count: u32| {
        format!(
            "held = []\nfor n in range({namespaces}):\n    if n: assert ctypes.CDLL(None).unshare(0x40000000) == 0\n    for _ in range({count}):\n        \
             s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n        s.bind(('', 0))\n        held.append(s)\n\
             print(json.dumps([s.getsockname()[1] for s in held]), flush=True)"
        )
    };
    let of_pool = |text: &str| -> Result<BTreeSet<u16>> {
        Ok(serde_json::from_str::<Vec<u16>>(text)?.into_iter().filter(|port| ports.contains(*port)).collect())
    };
    let (one, text) = hold(&lab.c1().netns, &stand.cgroup, &script(1, 300))?;
    let own = of_pool(&text)?;
    ensure!((90..=95).contains(&own.len()), "{} ports of 125", own.len());
    ensure!(stand.counter(counter::REFUSALS + Refusal::SHARE.0)? > 0 && events.next().is_some());
    // A sixteenth is left, however many namespaces the pod has.
    let (two, text) = hold(&lab.c1().netns, &stand.cgroup, &script(20, 30))?;
    let all = own.len() + of_pool(&text)?.difference(&own).count();
    ensure!(all <= 119, "{all} ports of 125");
    let (three, text) = hold(&lab.c2().netns, &victims, &script(1, 3))?;
    let others = of_pool(&text)?;
    ensure!(others.len() == 3 && others.is_disjoint(&own), "{others:?}");
    [one, two, three].into_iter().try_for_each(end)
}

#[test]
fn a_pod_with_its_share_of_ports_at_rest_leaves_room_to_others() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = vec![PortRange { first: 61001, last: 61064 }];
    let settings = Settings { ports, destinations, ..Settings::default() };
    let mut stand = Stand::new(&lab, &settings)?;
    let victims = second_group(&lab, &mut stand)?;
    lab.a2().netns.set_sysctl("ipv4/tcp_timestamps", "0")?;
    let _server = serve(&lab.a2().netns, 8080)?;
    // As if this many ports of the pod rested, towards other destinations.
    let group = fs::metadata(&stand.cgroup)?.ino();
    for _ in 0..MAX_RESTS / 4 * 3 {
        stand.pool.tables().extend_share(shares::resting(group));
        stand.pool.tables().extend_share(shares::ALL_RESTING);
    }
    let script = format!(
        "{PRELUDE}def one():\n    with socket.create_connection(('{}', 8080)) as s:\n        s.shutdown(socket.SHUT_WR)\n        s.recv(1)\n\
         print([code(one) for _ in range(4)].count('connected'))",
        lab.a2().v4
    );
    let seen = output(&lab.c1().netns, stand.hooked(python(&script)), SOON)?;
    ensure!(seen.trim() != "0");
    let denied = stand.counter(counter::RESTS_DENIED)?;
    ensure!(denied > 0 && stand.counter(counter::RESTS)? == 0, "{denied}");
    let seen = output(&lab.c2().netns, in_cgroup(&victims, python(&script)), SOON)?;
    ensure!(seen.trim() == "4", "{seen}");
    ensure!((stand.counter(counter::RESTS)?, stand.counter(counter::RESTS_DENIED)?) == (4, denied));
    Ok(())
}

#[test]
fn a_pod_that_keeps_the_ports_of_a_destination_leaves_some_to_others() -> Result<()> {
    const CONNECT: &str = "def one(kind, held):\n    s = socket.socket(socket.AF_INET, kind)\n    s.setblocking(False)\n    held.append(s)\n    \
        result = code(lambda: s.connect(('192.168.31.200', 53)))\n    return result != 'EADDRNOTAVAIL'\n";
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = vec![PortRange { first: 61001, last: 61064 }];
    let settings = Settings { ports, destinations, bind_udp: false, ..Settings::default() };
    let mut stand = Stand::new(&lab, &settings)?;
    let victims = second_group(&lab, &mut stand)?;
    let all = |kind: &str| {
        format!("{CONNECT}held = []\nwhile one(socket.{kind}, held): pass\nprint(len(held) - 1, flush=True)")
    };
    let number = |kind: &str, n: u32| {
        format!("{CONNECT}print([one(socket.{kind}, []) for _ in range({n})].count(True), flush=True)")
    };
    let kinds = ["SOCK_DGRAM", "SOCK_STREAM"];
    // Alone, it may take all.
    for kind in kinds {
        let (alone, text) = hold(&lab.c1().netns, &stand.cgroup, &all(kind))?;
        ensure!(text == "64", "{kind}: {text} of 64 ports");
        end(alone)?;
    }
    stand.settled(SOON)?;
    for _ in 0..2 {
        stand.pool.sweep(|_, _| false)?;
    }
    let (idle, text) = hold(
        &lab.c2().netns,
        &victims,
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.connect(('192.168.31.201', 53))\nprint(1, flush=True)",
    )?;
    ensure!(text == "1");
    for kind in kinds {
        let (hostile, text) = hold(&lab.c1().netns, &stand.cgroup, &all(kind))?;
        ensure!(text == "48", "{kind}: {text} of 64 ports beside another pod");
        let (victim, text) = hold(&lab.c2().netns, &victims, &number(kind, 12))?;
        ensure!(text == "12", "{kind}: {text} of 12 connects of the other pod");
        [hostile, victim].into_iter().try_for_each(end)?;
    }
    ensure!(stand.counter(counter::REFUSALS + Refusal::SHARE.0)? == 2);
    end(idle)?;
    // It counts for some time after its slots are gone.
    stand.settled(SOON)?;
    let mut retired = 0;
    for _ in 0..4 {
        retired += stand.pool.sweep(|_, _| false)?.retired;
    }
    ensure!(retired >= 4, "{retired} slots");
    let (hostile, text) = hold(&lab.c1().netns, &stand.cgroup, &all("SOCK_STREAM"))?;
    ensure!(text == "48", "{text} of 64 ports while another pod is idle");
    end(hostile)
}

/// A pod that replaces another one does not share with it.
#[test]
fn a_pod_that_has_ended_leaves_all_ports_but_those_that_conntrack_knows() -> Result<()> {
    const CONNECT: &str = "def one(held):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    held.append(s)\n    \
        s.connect(('192.168.31.200', 53))\n";
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = vec![PortRange { first: 61001, last: 61064 }];
    let settings = Settings { ports, destinations, bind_udp: false, ..Settings::default() };
    let mut stand = Stand::new(&lab, &settings)?;
    let replaced = second_group(&lab, &mut stand)?;
    let all = format!(
        "{CONNECT}held = []\nwhile code(lambda: one(held)) == 'connected': pass\nprint(len(held) - 1, flush=True)"
    );
    let once = format!("{CONNECT}one([])\nprint(1, flush=True)");
    let (process, _) = hold(&lab.c2().netns, &replaced, &once)?;
    end(process)?;
    stand.settled(SOON)?;
    let take_all = |stand: &mut Stand| -> Result<String> {
        stand.pool.sweep(|_, _| true)?;
        let (process, text) = hold(&lab.c1().netns, &stand.cgroup, &all)?;
        end(process)?;
        stand.settled(SOON)?;
        Ok(text)
    };
    let beside = take_all(&mut stand)?;
    ensure!(beside == "48", "{beside} of 63 ports beside another pod");
    eventually(SOON, || fs::remove_dir(&replaced).ok()).context("its control group does not end")?;
    let alone = take_all(&mut stand)?;
    ensure!(alone == "63", "{alone} of 63 ports after the other pod has ended");
    Ok(())
}

#[test]
fn unconnected_udp_leaves_a_port_to_others_however_few_there_are() -> Result<()> {
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    // Two are set aside for it.
    let ports = vec![PortRange { first: 61001, last: 61016 }];
    let mut stand = Stand::new(&lab, &Settings { ports, destinations, ..Settings::default() })?;
    let victims = second_group(&lab, &mut stand)?;
    let script = "held = []\nfor n in range(30):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    s.bind(('', 0))\n    held.append(s)\n\
                  print(len([s for s in held if 61001 <= s.getsockname()[1] <= 61016]), flush=True)";
    let (hostile, text) = hold(&lab.c1().netns, &stand.cgroup, script)?;
    ensure!(text == "1", "{text} of 2 ports");
    let (victim, text) = hold(&lab.c2().netns, &victims, &script.replace("range(30)", "range(1)"))?;
    ensure!(text == "1", "{text}");
    [hostile, victim].into_iter().try_for_each(end)
}

#[test]
fn the_quota_counts_ports_that_are_kept_from_others_in_all_namespaces_of_a_pod() -> Result<()> {
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = vec![PortRange { first: 61001, last: 61064 }];
    let settings = Settings { ports, destinations, quota: Some(4), bind_udp: false, ..Settings::default() };
    let mut stand = Stand::new(&lab, &settings)?;
    let victims = second_group(&lab, &mut stand)?;
    let connect = "def one(held):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    result = code(lambda: s.connect(('192.168.31.200', 53)))\n    \
                   if held is not None and result != 'EADDRNOTAVAIL': held.append(s)\n    return result\n";
    // Ports that the pod has used and closed are kept for it: it gets those again, and no more than four.
    let script = format!(
        "{PRELUDE}{connect}def burst(n):\n    held = []\n    results = [one(held) for _ in range(n)]\n    \
         return results.count('connected'), sorted(s.getsockname()[1] for s in held)\n\
         print(json.dumps([burst(6) for _ in range(5)]))"
    );
    let text = output(&lab.c1().netns, stand.hooked(python(&script)), SOON)?;
    let bursts: Vec<(u32, Vec<u16>)> = serde_json::from_str(&text)?;
    ensure!(bursts.iter().all(|burst| burst.0 == 4 && burst.1 == bursts[0].1), "{bursts:?}");
    ensure!(stand.counter(counter::REFUSALS + Refusal::QUOTA.0)? == 10);
    // All namespaces of the pod together get twice as many.
    let script = format!(
        "{connect}held = []\nfor _ in range(10):\n    assert ctypes.CDLL(None).unshare(0x40000000) == 0\n    \
         while one(held) != 'EADDRNOTAVAIL': pass\nprint(len(held), flush=True)"
    );
    let (hostile, text) = hold(&lab.c1().netns, &stand.cgroup, &script)?;
    ensure!(text == "4", "{text} ports beside those of the first namespace");
    let (other, text) = hold(
        &lab.c2().netns,
        &victims,
        &format!("{connect}print([one([]) for _ in range(4)].count('connected'), flush=True)"),
    )?;
    ensure!(text == "4", "{text}");
    end(hostile)?;
    end(other)
}

/// The kernel does not change the port of a socket that is connected again: it must be free there.
#[test]
fn a_udp_socket_is_connected_again_to_a_destination_that_another_pod_has_filled() -> Result<()> {
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = vec![PortRange { first: 61001, last: 61512 }];
    let settings = Settings { ports, destinations, bind_udp: false, ..Settings::default() };
    let mut stand = Stand::new(&lab, &settings)?;
    let victims = second_group(&lab, &mut stand)?;
    let udp = "def udp(port):\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    s.connect(('192.168.31.200', port))\n    return s\n";
    // The first ones are there before, the others come after.
    let script = format!(
        "{udp}early = [udp(53) for _ in range(8)]\nprint(len(early), flush=True)\nsys.stdin.readline()\n\
         def again(s): s.connect(('192.168.31.200', 54))\nresults = [code(lambda: again(s)) for s in early]\n\
         for s in early: s.close()\ndef late():\n    with udp(53) as s: again(s)\n\
         results += [code(late) for _ in range(20)]\nprint(json.dumps([n for n, x in enumerate(results) if x != 'connected']), flush=True)"
    );
    let (mut victim, text) = hold(&lab.c2().netns, &victims, &script)?;
    ensure!(text == "8", "{text}");
    // The share of the pod, of which no namespace has more than three quarters.
    let script = "held = []\ndef one():\n    held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))\n    held[-1].connect(('192.168.31.200', 54))\n\
         for netns in range(8):\n    if netns: assert ctypes.CDLL(None).unshare(0x40000000) == 0\n    \
         while code(one) != 'EADDRNOTAVAIL': pass\n    held.pop()\nprint(len(held), flush=True)";
    let (hostile, text) = hold(&lab.c1().netns, &stand.cgroup, script)?;
    ensure!(text == "480", "{text} of 512 ports");
    writeln!(victim.child().stdin.as_mut().context("a pipe")?)?;
    let text = line(&mut victim)?;
    ensure!(text == "[]", "{text}: refused, of 8 early ones and 20 late ones");
    end(victim)?;
    end(hostile)
}

/// Makes one network namespace after the other, in which the address of the destination answers with an RST, and connects from
/// each.
const NAMESPACES: &str = r"
import fcntl, os, struct
def address(to):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8916, struct.pack('16sHH4s8x', b'lo', 2, 0, socket.inet_aton(to)))
        fcntl.ioctl(s, 0x8914, struct.pack('16sH', b'lo', 0x49))
def storm(to, port):
    assert ctypes.CDLL(None).unshare(0x40000000) == 0
    address(to)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for _ in range(4):
            with socket.socket(socket.AF_INET, kind) as s: code(lambda: s.connect((to, port)))
";

/// A namespace whose slot goes to another destination leaves its ports to all.
#[test]
fn a_storm_of_namespaces_and_destinations_fails_no_connect_of_another_pod() -> Result<()> {
    let lab = Lab::builder().build()?;
    let destinations = vec!["192.168.31.0/24".parse()?];
    let ports = vec![PortRange { first: 61001, last: 61064 }];
    let settings = Settings { ports, destinations, ..Settings::default() };
    let mut stand = Stand::new(&lab, &settings)?;
    let victims = second_group(&lab, &mut stand)?;
    let _server = serve(&lab.a().netns, 8080)?;
    let to = lab.a().v4;
    // One socket takes slots for as many destinations as it may, again and again, beside new namespaces.
    let script = format!(
        "{NAMESPACES}import itertools, select\nports = itertools.cycle(range(1, 60000))\n\
         def spread(n):\n    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    for port in itertools.islice(ports, n): code(lambda: one.connect(('192.168.31.200', port)))\n\
         spread(32000)\nprint('ready', flush=True)\nn = 0\n\
         while not select.select([0], [], [], 0)[0]:\n    storm('{to}', 8080)\n    spread(2000)\n    n += 1\nprint(n, flush=True)"
    );
    let (mut storm, _) = hold(&lab.c1().netns, &stand.cgroup, &script)?;
    let script = format!(
        "import time\nheld = []\ndef one(n):\n    s = socket.socket()\n    held.append(s)\n    s.settimeout(10)\n    s.bind(('', 0))\n    \
         s.connect(('{to}', 8080))\n    while len(held) > n // 340: held.pop(0).close()\n    time.sleep(0.01)\n\
         results = [code(lambda: one(n)) for n in range(1020)]\nprint(json.dumps({{x: results.count(x) for x in set(results)}}), flush=True)"
    );
    let (victim, text) = hold(&lab.c2().netns, &victims, &script)?;
    end(victim)?;
    drop(storm.child().stdin.take());
    let namespaces: u32 = line(&mut storm)?.parse()?;
    ensure!(namespaces > 0);
    end(storm)?;
    let mut recovered = 0;
    for _ in 0..2 {
        recovered += stand.pool.sweep(|_, _| false)?.recovered;
    }
    ensure!(recovered == 0, "{recovered} ports had got lost");
    ensure!(text == "{\"connected\": 1020}", "{text}");
    Ok(())
}
