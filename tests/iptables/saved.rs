//! Saved rules, restored by the system's own program with no agent running.

use bridge_agent::firewall::Firewall;
use bridge_agent::iptables::Iptables;
use bridge_agent::model::Policy;

use crate::support::{FOREIGN, on_both, policy};

const FILES: [(&str, &str); 4] = [
    ("iptables-restore", "etc/sysconfig/iptables"),
    ("ip6tables-restore", "etc/sysconfig/ip6tables"),
    ("iptables-restore", "etc/iptables/rules.v4"),
    ("ip6tables-restore", "etc/iptables/rules.v6"),
];

#[test]
fn a_restore_of_the_file_alone_gives_the_same_chains() {
    on_both(|host| {
        for services in [&FILES[..2], &FILES[2..]] {
            let (v4, v6) = (services[0].1, services[1].1);
            host.write(v4, FOREIGN);
            host.feed("iptables-restore", FOREIGN);
            let mut firewall = host.firewall();
            firewall.converge(&policy()).expect("converge");
            let saved = firewall.save(&policy()).expect("save");
            assert_eq!(saved, [v4, v6].map(|file| host.root().join(file)));
            let running = host.dump();

            // As a reboot would.
            for program in ["iptables", "ip6tables"] {
                for table in ["raw", "mangle", "filter"] {
                    host.run(&format!("{program} -t {table} -F"));
                    host.run(&format!("{program} -t {table} -X"));
                }
            }
            assert!(!host.dump().contains("BRIDGE"));
            for (restore, file) in services {
                host.feed(restore, &host.read(file));
            }
            // A table that was there before has nothing in its jump to say otherwise after a reboot.
            assert_eq!(host.dump(), running.replace(":table-was-absent", ""));

            let remains = firewall.teardown();
            assert!(remains.errors.is_empty(), "{:?}", remains.errors);
            assert_eq!(host.read(v4), FOREIGN);
            assert!(!host.root().join(v6).exists(), "was not there before");
            std::fs::remove_file(host.root().join(v4)).expect("remove");
        }
    });
}

#[test]
fn another_policy_replaces_the_saved_one() {
    on_both(|host| {
        host.write("etc/iptables/rules.v4", FOREIGN);
        let firewall = host.firewall();
        firewall.save(&policy()).expect("save");
        assert!(host.read("etc/iptables/rules.v4").contains("BRIDGE-NODEPORT"));
        firewall.save(&Policy { node_ports: None, ..policy() }).expect("save");
        let text = host.read("etc/iptables/rules.v4");
        assert!(!text.contains("BRIDGE-NODEPORT") && text.contains("BRIDGE-FORWARD"), "{text}");
    });
}

#[test]
fn never_is_honoured() {
    on_both(|host| {
        host.write("etc/iptables/rules.v4", FOREIGN);
        let mut config = host.config();
        config.saving.enabled = false;
        let firewall = Iptables::new(config).expect("a driver");
        assert!(firewall.save(&policy()).expect("save").is_empty());
        assert_eq!(host.read("etc/iptables/rules.v4"), FOREIGN);
    });
}
