//! Changes around the agents: interfaces and namespaces that come and go, routes, rules that another program deletes.

use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::Context as _;

use super::{Course, REST};
use crate::{lab::Lab, wait::eventually};

pub(super) const INTERFACES: &str = "interfaces and namespaces come and go";
pub(super) const RULES_LOST: &str = "rules of iptables are deleted, and back";

const PAUSE: Duration = Duration::from_millis(500);

/// Flaps the interface of the second pod; pods come, and go together with their namespace.
pub(super) fn interfaces(lab: &Lab, course: &Course) {
    let (node, flapping) = (&lab.b().netns, &lab.c2().peer_interface);
    let number = AtomicU32::new(0);
    course.repeat(INTERFACES, PAUSE, || {
        node.ip(&format!("link set {flapping} down"))?;
        node.ip(&format!("link set {flapping} up"))?;
        let name = format!("calisoak{}", number.fetch_add(1, Ordering::Relaxed) % 100);
        let mut sleep = Command::new("unshare");
        sleep.args(["--net", "sleep", "60"]);
        let mut pod = node.spawn_command(sleep)?;
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let of_node = node.run(|| fs::read_link("/proc/thread-self/ns/net")).ok();
        let pid = pod.id().to_string();
        eventually(REST, || (namespace(&pid) != of_node).then_some(())).context("no namespace")?;
        node.ip(&format!("link add {name} type veth peer name eth0 netns {pid}"))?;
        node.ip(&format!("link set {name} up"))?;
        node.ip(&format!("route replace 10.200.1.222/32 dev {name}"))?;
        course.pause(PAUSE);
        pod.kill()?;
        let gone = || node.ip(&format!("link show dev {name}")).is_err().then_some(());
        eventually(REST, gone).with_context(|| format!("{name} is still there without its namespace"))
    });
}

/// Flushes a chain of bridge's, as another program might.
pub(super) fn faults(lab: &Lab, course: &Course) {
    let node = &lab.b().netns;
    let iptables = |arguments: &[&str]| {
        let mut command = Command::new("iptables-nft");
        command.args(["--wait", "10"]).args(arguments);
        node.output(command)
    };
    let rules = || iptables(&["-S", "BRIDGE-FORWARD"]).map_or(0, |text| text.lines().count());
    while course.pause(PAUSE) {
        // With a policy without iptables there are none.
        if course.node.load(Ordering::Relaxed) == 0 || rules() < 2 {
            continue;
        }
        let deleted = iptables(&["-F", "BRIDGE-FORWARD"]).map(drop);
        let back = || (rules() != 1).then_some(());
        let result = deleted.and_then(|()| eventually(REST, back).context("they do not come back"));
        // The policy may have changed to one without iptables meanwhile.
        let none = iptables(&["-S", "BRIDGE-FORWARD"]).is_err();
        course.count(RULES_LOST, 1, if none { Ok(()) } else { result });
    }
}
