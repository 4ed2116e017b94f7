//! What stands in the tables after an apply, a refusal, a teardown.

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use bridge_agent::config::Scope;
use bridge_agent::firewall::{Firewall, Hits};
use bridge_agent::iptables::plan::RestoreLine;
use bridge_agent::iptables::ruleset::{Family, Table};
use bridge_agent::iptables::{Backend, Config, Error, Iptables, Programs, render};
use bridge_agent::model::{Direction, Mode, OnDeny, Policy, PortRange, Protocol, Rule};
use rustix::fs::{FlockOperation, flock};

use crate::support::{BACKENDS, FOREIGN, Host, alone, on_both, only, policy, rule};

#[test]
fn what_is_rendered_is_what_the_kernel_gives_back() {
    on_both(|host| {
        let variants = [
            policy(),
            Policy { on_deny: OnDeny::Drop, ..policy() },
            Policy { mode: Mode::Audit, ..policy() },
            Policy { node_ports: None, ..policy() },
        ];
        let mut firewall = host.firewall();
        for policy in variants {
            firewall.converge(&policy).expect("converge");
            for family in Family::ALL {
                let rendered = render::restore_input(&policy, &render::Options::default(), family);
                for table in Table::ALL {
                    let save = host.run(&format!("{}-save -t {table}", family.program()));
                    assert_eq!(rules_of(&save, table), rules_of(&rendered, table));
                }
            }
        }
    });
}

/// The rules of own chains in `table`, in order within each chain, without what is only a matter of spelling: chains
/// in an order of its own, quotes where they are needed, the default answer of REJECT.
fn rules_of(text: &str, table: Table) -> Vec<String> {
    let lines =
        text.lines().skip_while(|line| *line != format!("*{table}")).take_while(|line| *line != "COMMIT");
    let rules = lines.filter(|line| line.starts_with("-A BRIDGE-")).map(|line| {
        let implied = [" --reject-with icmp-port-unreachable", " --reject-with icmp6-port-unreachable"];
        implied.iter().fold(line.replace('"', ""), |line, implied| line.replace(implied, ""))
    });
    let mut rules: Vec<String> = rules.collect();
    rules.sort_by_key(|rule| rule.split(' ').nth(1).map(str::to_owned));
    rules
}

#[test]
fn a_second_converge_keeps_the_jumps_and_replaces_the_rest() {
    on_both(|host| {
        let mut firewall = host.firewall();
        firewall.converge(&policy()).expect("converge");
        let before = host.dump();
        let plan = firewall.plan(&policy(), &firewall.observe().expect("observe"));
        for restore in &plan.restores {
            let text = restore.text();
            assert!(!text.contains("\n-D ") && !text.contains("\n-I "), "the jump is in place:\n{text}");
        }
        firewall.converge(&policy()).expect("converge");
        assert_eq!(host.dump(), before);
        assert!(firewall.drift().expect("drift").is_none());

        let smaller = Policy { node_ports: None, ..policy() };
        firewall.converge(&smaller).expect("converge");
        assert!(!host.dump().contains("NODEPORT"), "chains that are not wanted any more go");
        let v4 = of_v4(&smaller);
        firewall.converge(&v4).expect("converge");
        assert!(!host.run("ip6tables-save").contains("BRIDGE"), "nothing is in scope over IPv6");
    });
}

/// The policy without its IPv6 networks.
fn of_v4(policy: &Policy) -> Policy {
    let v4 = |nets: &[ipnet::IpNet]| nets.iter().filter(|net| net.addr().is_ipv4()).copied().collect();
    Policy { pods: v4(&policy.pods), external: v4(&policy.external), ..policy.clone() }
}

#[test]
fn ten_thousand_rules_in_one_call() {
    on_both(|host| {
        let mut policy = policy();
        policy.rules = (0..10_000u16)
            .map(|n| Rule {
                external: Some(vec![format!("192.168.31.{}/32", n % 250 + 1).parse().expect("a prefix")]),
                source_ports: vec![PortRange { first: 61001, last: 61100 }],
                ..rule(&format!("rule-{n}"), Direction::Inbound, Protocol::Tcp, &[(n + 1000, n + 1000)])
            })
            .collect();
        let mut firewall = host.firewall();
        let plan = firewall.plan(&policy, &firewall.observe().expect("observe"));
        let filter: Vec<_> =
            plan.restores.iter().filter(|r| r.table == Table::Filter && r.family == Family::V4).collect();
        assert_eq!(filter.len(), 1);
        let begun = Instant::now();
        firewall.apply(&plan).expect("apply");
        eprintln!("10,000 rules applied in {:?}", begun.elapsed());
        firewall.verify(&policy).expect("verify");
        let saved = host.run("iptables-save -t filter");
        assert_eq!(saved.matches("-A BRIDGE-INBOUND -s ").count(), 10_000);
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    });
}

#[test]
fn teardown_leaves_the_tables_as_they_were() {
    for before in ["", FOREIGN] {
        on_both(|host| {
            if !before.is_empty() {
                host.feed("iptables-restore", before);
                host.feed("ip6tables-restore", &before.replace("198.51.100.0/24", "2001:db8::/32"));
            }
            let first = host.dump();
            let mut firewall = host.firewall();
            firewall.converge(&policy()).expect("converge");
            firewall.converge(&Policy { on_deny: OnDeny::Drop, ..policy() }).expect("converge");
            assert!(host.dump().contains("BRIDGE-FORWARD"));

            // As another agent would, that knows nothing of the first.
            let remains = host.firewall().teardown();
            assert!(remains.errors.is_empty(), "{:?}", remains.errors);
            let expected = match host.backend {
                Backend::Nft => first,
                // Tables of x_tables cannot be removed: they stay, empty, and that is said.
                Backend::Legacy => {
                    for table in
                        ["IPv4 table raw", "IPv6 table raw", "IPv4 table mangle", "IPv6 table mangle"]
                    {
                        assert!(
                            remains.notes.iter().any(|note| note.starts_with(table)),
                            "{:?}",
                            remains.notes
                        );
                    }
                    without_empty_tables(&first)
                }
            };
            let after = host.dump();
            let after = if host.backend == Backend::Legacy { without_empty_tables(&after) } else { after };
            assert_eq!(after, expected);
        });
    }
}

/// Leaves out tables that say no more than that they exist.
fn without_empty_tables(dump: &str) -> String {
    let tables = dump.split_inclusive("COMMIT\n");
    tables.filter(|table| table.lines().any(|l| l.starts_with("-A") || l.contains(" DROP "))).collect()
}

#[test]
fn a_table_that_no_policy_needs_any_more_goes_before_teardown() {
    alone(|| {
        let host = Host::new(Backend::Nft);
        let mut firewall = host.firewall();
        firewall.converge(&policy()).expect("converge");
        assert!(host.dump().contains("*mangle"));
        firewall.converge(&Policy { node_ports: None, ..policy() }).expect("converge");
        assert!(!host.dump().contains("*mangle"), "{}", host.dump());
    });
}

#[test]
fn a_table_that_another_program_uses_by_now_is_not_removed() {
    on_both(|host| {
        let mut firewall = host.firewall();
        firewall.converge(&policy()).expect("converge");
        host.run("iptables -A FORWARD -s 198.51.100.1/32 -j ACCEPT");
        let remains = firewall.teardown();
        assert!(remains.errors.is_empty(), "{:?}", remains.errors);
        assert!(
            remains.notes.iter().any(|note| note.starts_with("IPv4 table filter")),
            "{:?}",
            remains.notes
        );
        let dump = host.run("iptables-save");
        assert!(
            dump.contains("-A FORWARD -s 198.51.100.1/32 -j ACCEPT") && !dump.contains("BRIDGE"),
            "{dump}"
        );
    });
}

#[test]
fn a_refused_rule_is_named_and_the_rules_of_before_stay() {
    on_both(|host| {
        let mut firewall = host.firewall();
        firewall.converge(&policy()).expect("converge");
        let before = host.dump();
        let mut changed = policy();
        changed.rules.push(rule("another", Direction::Outbound, Protocol::Udp, &[(123, 123)]));
        for (line, by) in [
            // Understood by the program, refused by the kernel: a reset answers nothing but TCP.
            ("-A BRIDGE-INBOUND -p udp -j REJECT --reject-with tcp-reset", "kernel"),
            ("-A BRIDGE-INBOUND -m no-such-match -j DROP", "program"),
        ] {
            let mut plan = firewall.plan(&changed, &firewall.observe().expect("observe"));
            let filter = plan.restores.iter_mut().find(|r| r.table == Table::Filter).expect("table filter");
            let at = filter.lines.iter().position(|l| l.name == "devices-to-api").expect("the rule");
            filter.lines.insert(
                at,
                RestoreLine { text: line.into(), name: "the-bad-one".into(), hits: Hits::default() },
            );
            let error = firewall.apply(&plan).expect_err(by);
            let Error::Refused { rule, line: reported, .. } = &error else { panic!("{by}: {error}") };
            assert_eq!((rule.as_str(), reported.as_str()), ("the-bad-one", line), "{by}: {error}");
            assert!(error.to_string().contains("rule \"the-bad-one\" is refused, the rules are as before"));
            assert_eq!(host.dump(), before, "{by}");
        }
        firewall.converge(&changed).expect("without the bad line");
        assert!(host.dump().contains("another"));
    });
}

#[test]
fn a_held_lock_is_not_waited_for_without_end() {
    alone(|| {
        let host = Host::new(Backend::Legacy);
        let mut config = host.config();
        config.programs.lock_wait = Duration::from_secs(1);
        let mut firewall = Iptables::new(config).expect("a driver");
        firewall.converge(&policy()).expect("converge");
        let before = host.dump();
        let plan =
            firewall.plan(&Policy { node_ports: None, ..policy() }, &firewall.observe().expect("observe"));

        let lock =
            File::options().write(true).create(true).truncate(false).open(host.lock_file()).expect("open");
        flock(&lock, FlockOperation::LockExclusive).expect("lock");
        let begun = Instant::now();
        let error = firewall.apply(&plan).expect_err("the lock is held");
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
        assert!(matches!(error, Error::LockHeld { .. }), "{error}");
        assert!(error.to_string().contains("fuser -v /run/xtables.lock"), "{error}");
        drop(lock);
        assert_eq!(host.dump(), before);
        firewall.apply(&plan).expect("the lock is free again");
    });
}

#[test]
fn a_missing_program_is_told_when_it_is_needed() {
    for backend in BACKENDS {
        alone(|| {
            let host = Host::new(backend);
            let directory = tempfile::tempdir().expect("make a directory");
            let none = Config {
                programs: Programs { search: vec![directory.path().into()], ..host.config().programs },
                ..host.config()
            };
            let error = Iptables::new(none.clone()).expect_err("nothing is installed");
            assert!(error.to_string().contains("is not installed: install the package iptables"), "{error}");

            let (restore, save) =
                (format!("iptables-{}-restore", backend.name()), format!("iptables-{}-save", backend.name()));
            only(directory.path(), &[&restore, &save]);
            let mut firewall = Iptables::new(none).expect("iptables is there, ip6tables is not");
            let error = firewall.converge(&policy()).expect_err("the policy has IPv6");
            assert!(
                matches!(&error, Error::ProgramMissing { program } if program.starts_with("ip6tables")),
                "{error}"
            );
            let v4 = of_v4(&policy());
            firewall.converge(&v4).expect("the policy has no IPv6");
            assert!(firewall.teardown().errors.is_empty());
        });
    }
}

#[test]
fn rules_in_the_other_back_end_are_noticed_and_own_ones_moved() {
    on_both(|host| {
        let other = Host::new(host.backend.other());
        let mut before = other.firewall();
        before.converge(&policy()).expect("converge");
        other.run("iptables -A INPUT -s 198.51.100.1/32 -j ACCEPT");

        let mut firewall = host.firewall();
        let warning = firewall.choice().warning.clone().expect("a warning");
        let that = format!("1 rules stand in iptables-{}", other.backend.name());
        assert!(warning.contains(&that), "{warning}");
        firewall.converge(&policy()).expect("converge");
        assert!(host.dump().contains("BRIDGE-FORWARD"));
        let there = other.dump();
        assert!(!there.contains("BRIDGE") && there.contains("198.51.100.1/32"), "{there}");
    });
}

#[test]
fn what_the_kubelet_uses_is_used() {
    on_both(|host| {
        host.run("iptables -t mangle -N KUBE-IPTABLES-HINT");
        let config = Config { backend: None, ..host.config() };
        assert_eq!(Iptables::new(config).expect("a driver").choice().backend, host.backend);
    });
}

#[test]
fn a_table_that_iptables_cannot_show_is_told_and_not_touched() {
    alone(|| {
        let host = Host::new(Backend::Nft);
        let mut firewall = host.firewall();
        let nft = |input: &str| {
            host.write("rules.nft", input);
            let output =
                Command::new("nft").arg("-f").arg(host.root().join("rules.nft")).output().expect("start nft");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        // What an administrator of nftables may have put there: iptables knows no verdict maps, and no priority but 0.
        for chain in [
            "chain FORWARD { type filter hook forward priority 0; ct state vmap { new : accept, invalid : drop }; }",
            "chain FORWARD { type filter hook forward priority 5; ip saddr 192.0.2.1 accept; }",
        ] {
            nft(&format!("flush ruleset\ntable ip filter {{\n{chain}\n}}\n"));
            let before = nft("list ruleset");
            let error = firewall.converge(&policy()).expect_err("the table cannot be read");
            assert!(matches!(error, Error::Incompatible { table: Table::Filter, .. }), "{error}");
            assert!(error.to_string().contains("`nft list ruleset`"), "{error}");
            assert_eq!(nft("list ruleset"), before);
        }
    });
}

#[test]
fn strict_is_taken_by_the_kernel() {
    on_both(|host| {
        let mut config = host.config();
        config.options.scope = Scope::Strict;
        config.options.log_per_second = std::num::NonZeroU32::new(5);
        let mut firewall = Iptables::new(config).expect("a driver");
        firewall.converge(&policy()).expect("converge");
        let dump = host.dump();
        assert!(dump.contains("bridge:strict") && dump.contains("bridge denied: "), "{dump}");
    });
}
