//! Large policies, and those that are too large.

use std::net::IpAddr;
use std::time::Duration;

use bridge_common::filter::policy::class;
use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::examples::{policy, range, rule};
use super::generate::net;
use crate::model::{Action, Policy, Protocol, Rule};
use crate::policy::reference::{Packet, evaluate_model, evaluate_tables};
use crate::policy::{Error, MAX_INTERVALS, compile, compile_within};

fn address(base: &str, offset: u32) -> IpNet {
    let IpAddr::V4(base) = net(base).addr() else { panic!("{base} is an IPv4 prefix") };
    IpNet::from(IpAddr::from((u32::from(base) + offset).to_be_bytes()))
}

fn low_16_bits(number: u32) -> u16 {
    u16::try_from(number & 0xffff).expect("16 bits")
}

/// Each rule has its own LAN host, a port and a range; a tenth name pods too, a tenth deny.
fn device_rules(count: u32) -> Policy {
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Any];
    let rules = (0..count).map(|index| {
        let first = 1024 + low_16_bits(index * 7) % 60_000;
        Rule {
            external: Some(vec![address("10.0.0.0/8", index)]),
            pods: (index % 10 == 3).then(|| vec![address("10.200.0.0/16", index % 5_000)]),
            protocol: protocols[index as usize % 4],
            ports: vec![range(80, 80), range(first, first + 99)],
            action: if index % 10 == 5 { Action::Deny } else { Action::Allow },
            ..rule(&format!("device-{index}"))
        }
    });
    Policy { external: vec![net("10.0.0.0/9")], ..policy(rules.collect()) }
}

/// Every rule names neither side and has a wide range of ports, and source ports as `source_ports` says.
fn overlapping_rules(count: u32, mut source_ports: impl FnMut(u32) -> (u16, u16)) -> Policy {
    let mut random = StdRng::seed_from_u64(1);
    let rules = (0..count).map(|index| {
        let (first, last) = source_ports(index);
        let ports: [u16; 2] = random.random();
        Rule {
            ports: vec![range(ports[0].min(ports[1]), ports[0].max(ports[1]))],
            source_ports: vec![range(first, last)],
            ..rule(&format!("overlap-{index}"))
        }
    });
    policy(rules.collect())
}

#[test]
fn many_rules_are_still_judged_right() {
    let policy = device_rules(3_000);
    let tables = compile(&policy, &[]).expect("within limits");
    let mut decided = 0;
    for (index, rule) in (0..3_000).zip(&policy.rules).step_by(13) {
        let pod = rule.pods.as_ref().map_or_else(|| address("10.200.0.0/16", 9), |pods| pods[0]);
        for port in [79, 80, 81, rule.ports[1].first - 1, rule.ports[1].first, rule.ports[1].last, 65_535] {
            let packet = Packet {
                source: address("10.0.0.0/8", index).addr(),
                destination: pod.addr(),
                protocol: if rule.protocol == Protocol::Udp { class::UDP } else { class::TCP },
                source_port: 1,
                destination_port: port,
            };
            let verdict = evaluate_tables(&tables, &packet);
            assert_eq!(verdict, evaluate_model(&policy, &[], &packet), "{packet:?}");
            decided += u32::from(verdict.is_some());
        }
    }
    assert!(decided > 300, "{decided} packets were decided by a rule");
}

#[test]
fn too_many_pairs_name_the_rule_and_the_remedy() {
    let hosts: Vec<IpNet> = (0..2_100).map(|index| address("192.168.0.0/16", index)).collect();
    let pods: Vec<IpNet> = (0..2_100).map(|index| address("10.200.0.0/16", index)).collect();
    let both = |name: &str, external: &[IpNet], to: &[IpNet]| Rule {
        external: Some(external.to_vec()),
        pods: Some(to.to_vec()),
        ..rule(name)
    };
    let each = hosts[..2_000].chunks(1).zip(pods.chunks(1)).map(|(host, pod)| both("small", host, pod));
    let policy = policy(each.chain([both("everybody-to-all", &hosts, &pods)]).collect());
    let error = compile(&policy, &[]).expect_err("above four million pairs");
    let Error::TooManyPairs { pairs, rules } = &error else { panic!("{error}") };
    // On either side a class for each small rule, and one for addresses of the large rule alone.
    assert_eq!(*pairs, 2_001 * 2_001 + 2_000);
    assert!(rules.starts_with("everybody-to-all, small"), "{rules}");
    assert!(error.to_string().contains("leave out external or pods"), "{error}");
}

#[test]
fn too_many_overlaps_name_the_rules_and_the_remedy() {
    let policy = overlapping_rules(100, |index| (low_16_bits(index), low_16_bits(index)));
    let error = compile_within(&policy, &[], 1_000).expect_err("about 200 * 50 intervals");
    assert!(error.to_string().contains("overlap-0, overlap-1, overlap-2"), "{error}");
    assert!(error.to_string().contains("the same sourcePorts"), "{error}");
    compile(&policy, &[]).expect("well within the real limit");
}

#[test]
fn overlapping_ranges_with_the_same_source_ports_stay_small() {
    let policy = overlapping_rules(1_000, |_| (61_001, 61_100));
    let tables = compile_within(&policy, &[], 20_000).expect("one list of source ports, few winners");
    assert!(tables.narrows.len() <= 1_000, "{:?}", tables.stats());
}

/// `cargo test --release -p bridge-agent --lib policy::tests::limits::cost -- --ignored --nocapture`
#[test]
#[ignore = "prints figures; of use in a release build only"]
fn cost() {
    let random_ranges = |index: u32| {
        let mut random = StdRng::seed_from_u64(index.into());
        let ports: [u16; 2] = random.random();
        (ports[0].min(ports[1]), ports[0].max(ports[1]))
    };
    let cases = [
        ("1,000 devices", device_rules(1_000)),
        ("10,000 devices", device_rules(10_000)),
        ("100,000 devices", device_rules(100_000)),
        ("10,000 overlapping, one list of source ports", overlapping_rules(10_000, |_| (61_001, 61_100))),
        ("10,000 overlapping, any source ports", overlapping_rules(10_000, random_ranges)),
        (
            "10,000 overlapping, a source port each",
            overlapping_rules(10_000, |i| (low_16_bits(i), low_16_bits(i))),
        ),
        ("1,000 rules for a prefix, 10,000 devices in it", nested(1_000, 10_000)),
    ];
    for (name, policy) in cases {
        let before = resident();
        let start = processor_time();
        let tables = compile(&policy, &[]);
        let elapsed = processor_time() - start;
        let after = resident();
        println!("{name}: {elapsed:?}, resident {} KiB more", after.saturating_sub(before));
        match tables {
            Ok(tables) => println!("    {:?}", tables.stats()),
            Err(error) => println!("    {error}"),
        }
    }
    println!("at most {MAX_INTERVALS} intervals");
}

/// Rules for a wide prefix, with the rules of single devices inside it.
fn nested(wide: u32, devices: u32) -> Policy {
    let mut policy = device_rules(devices);
    policy.rules.extend((0..wide).map(|index| Rule {
        external: Some(vec![net("10.0.0.0/10")]),
        ports: vec![range(low_16_bits(index * 61), low_16_bits(index * 61) + 9)],
        ..rule(&format!("wide-{index}"))
    }));
    policy
}

/// Time this thread has run: others that run at the same time do not count.
fn processor_time() -> Duration {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").expect("procfs");
    let nanoseconds = statistics.split(' ').next().expect("time on the processor");
    Duration::from_nanos(nanoseconds.parse().expect("a number"))
}

/// Resident memory of this process, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
