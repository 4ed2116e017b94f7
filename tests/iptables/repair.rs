//! Changes by other programs to the rules are noticed and repaired.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bridge_agent::iptables::watch::Guard;
use bridge_agent::model::{Direction, Policy, Protocol};

use crate::support::{FOREIGN, Host, eventually, on_both, policy, rule};

/// How long damage may last.
const LIMIT: Duration = Duration::from_secs(1);
/// The same on a host that has much else to do, as one that runs all tests at once.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// Time is measured here: one test at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn guard(host: &Host, policy: Policy) -> Guard {
    Guard::start(host.firewall(), policy).expect("start")
}

/// Whether exactly the chains of `before` are there, the jump first.
fn whole(host: &Host, before: &str) -> bool {
    let own = |dump: &str| -> Vec<String> {
        let own = dump.lines().filter(|line| line.contains("BRIDGE-") && !line.contains("not for BRIDGE-"));
        own.map(|line| line.replace(":table-was-absent", "")).collect()
    };
    let dump = host.run("iptables-save -t filter");
    let first = dump.lines().find(|line| line.starts_with("-A FORWARD")).unwrap_or_default();
    own(&host.dump()) == own(before) && first.ends_with("-j BRIDGE-FORWARD")
}

/// The first two rules of BRIDGE-DENY the other way round.
const SWAP: &str = "*filter\n:BRIDGE-DENY - [0:0]\n\
                    -A BRIDGE-DENY -p udp -m comment --comment \"bridge:deny\" -j REJECT\n\
                    -A BRIDGE-DENY -p tcp -m comment --comment \"bridge:deny\" -j REJECT --reject-with tcp-reset\n\
                    -A BRIDGE-DENY -m comment --comment \"bridge:deny\" -j DROP\nCOMMIT\n";

#[test]
fn whatever_is_done_to_the_rules_is_mended_within_a_second() {
    let _turn = turn();
    on_both(|host| {
        host.feed("iptables-restore", FOREIGN);
        let guard = guard(host, policy());
        let before = host.dump();
        let damages: [(&str, &dyn Fn(), &str); 10] = [
            (
                "flush of an own chain",
                &|| drop(host.run("iptables -F BRIDGE-INBOUND")),
                "BRIDGE-INBOUND was changed",
            ),
            ("flush of FORWARD", &|| drop(host.run("iptables -F FORWARD")), "jump to bridge was removed"),
            ("flush of the table", &|| drop(host.run("iptables -F")), ""),
            (
                "deleted rule",
                &|| drop(host.run("iptables -D BRIDGE-OUTBOUND 5")),
                "BRIDGE-OUTBOUND was changed",
            ),
            (
                "added rule",
                &|| drop(host.run("iptables -I BRIDGE-INBOUND -j ACCEPT")),
                "BRIDGE-INBOUND was changed",
            ),
            (
                "rule replaced by one of the same size",
                &|| {
                    drop(host.run("iptables -R BRIDGE-FORWARD 1 -m conntrack --ctstate NEW -m comment --comment x -j RETURN"))
                },
                "BRIDGE-FORWARD was changed",
            ),
            (
                "two rules that changed places",
                &|| drop(host.feed("iptables-restore --noflush", SWAP)),
                "BRIDGE-DENY was changed",
            ),
            ("reordered jump", &|| drop(host.run("iptables -I FORWARD -j ACCEPT")), "no longer first"),
            ("another program's restore", &|| drop(host.feed("iptables-restore", FOREIGN)), ""),
            ("NodePorts", &|| drop(host.run("ip6tables -t mangle -F PREROUTING")), "IPv6 table mangle"),
        ];
        let mut times = Vec::new();
        for (number, (damage, act, reason)) in damages.into_iter().enumerate() {
            act();
            let took = eventually(damage, BUSY_LIMIT, || whole(host, &before));
            times.push(took);
            eprintln!("{damage}: mended after {took:?}");
            let repairs = u64::try_from(number).expect("small") + 1;
            eventually("the repair is counted", BUSY_LIMIT, || guard.status().repairs == repairs);
            let (_, found) = guard.status().last_repair.expect("a reason");
            assert!(found.contains(reason), "{damage}: {found}");
        }
        times.sort();
        assert!(times[times.len() / 2] < LIMIT, "{times:?}");
        let remains = guard.teardown();
        assert!(remains.errors.is_empty(), "{:?}", remains.errors);
        assert!(!host.dump().contains("BRIDGE-FORWARD"));
    });
}

#[test]
fn what_the_operator_adds_elsewhere_stays_and_is_no_reason_to_repair() {
    let _turn = turn();
    on_both(|host| {
        let guard = guard(host, policy());
        host.run("iptables -A FORWARD -s 198.51.100.1/32 -j ACCEPT");
        host.run("iptables -N OTHER");
        host.run("iptables -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT");
        host.run("iptables -F BRIDGE-INBOUND");
        eventually("the repair", BUSY_LIMIT, || guard.status().repairs == 1);
        let dump = host.dump();
        for kept in ["-A FORWARD -s 198.51.100.1/32 -j ACCEPT", ":OTHER -", "--dport 22 -j ACCEPT"] {
            assert!(dump.contains(kept), "{kept} in\n{dump}");
        }
    });
}

#[test]
fn an_update_is_no_drift_and_a_stopped_guard_leaves_the_rules() {
    let _turn = turn();
    on_both(|host| {
        let guard = guard(host, policy());
        for n in 0..5u16 {
            let mut next = policy();
            next.rules.push(rule(
                &format!("extra-{n}"),
                Direction::Outbound,
                Protocol::Tcp,
                &[(443 + n, 443 + n)],
            ));
            guard.update(next).expect("update");
        }
        host.run("iptables -F BRIDGE-INBOUND");
        eventually("the repair", BUSY_LIMIT, || guard.status().repairs == 1);
        assert!(host.dump().contains("extra-4"));
        drop(guard);
        assert!(host.dump().contains("extra-4"));
    });
}

#[test]
fn watching_ten_thousand_rules_costs_little() {
    let _turn = turn();
    on_both(|host| {
        let mut policy = policy();
        policy.rules = (0..10_000u16)
            .map(|n| rule(&format!("rule-{n}"), Direction::Inbound, Protocol::Tcp, &[(n * 2, n * 2)]))
            .collect();
        let guard = guard(host, policy);
        let watch = task("iptables-watch");
        // The first round reads everything; the later, endless rounds are measured. 10,000 rules in each family,
        // and hashing, which takes fifteen times as long without optimisation as with it.
        let mut last = cpu(watch);
        eventually("a quiet round", Duration::from_secs(20), || {
            std::thread::sleep(Duration::from_millis(1500));
            let now = cpu(watch);
            let used = now - std::mem::replace(&mut last, now);
            eprintln!("{:?} of CPU in 1.5 s", used);
            used < Duration::from_millis(250)
        });
        host.run("iptables -F BRIDGE-OUTBOUND");
        let took = eventually("the repair", BUSY_LIMIT, || guard.status().repairs == 1);
        eprintln!("10,000 rules mended after {took:?}");
    });
}

/// The number of this process's thread with that name, in the namespace of the calling one.
fn task(name: &str) -> u32 {
    // Other tests have threads of that name too, in namespaces of their own.
    let netns = |task: &str| std::fs::read_link(format!("/proc/{task}/ns/net")).ok();
    let here = netns("thread-self");
    let comm = |id: &u32| std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap_or_default();
    let mut found = None;
    eventually("the thread has its name", BUSY_LIMIT, || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("list threads");
        let mut ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse::<u32>().ok());
        found = ids.find(|id| comm(id).trim() == name && netns(&format!("self/task/{id}")) == here);
        found.is_some()
    });
    found.expect("the thread")
}

/// CPU time of a thread of this process.
fn cpu(task: u32) -> Duration {
    // linux/posix-timers_types.h: MAKE_THREAD_CPUCLOCK(task, CPUCLOCK_SCHED).
    let clock = (!i32::try_from(task).expect("a thread number") << 3) | 6;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the kernel to write to.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    Duration::new(time.tv_sec.try_into().expect("positive"), time.tv_nsec.try_into().expect("positive"))
}
