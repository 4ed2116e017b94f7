//! Messages about a wrong configuration: exactly these words, at exactly these places.

use insta::assert_snapshot;

use super::{MINIMAL, parse};
use crate::config::report::Severity;
use crate::config::{Diagnostic, load};

/// One line per finding: `LINE:COLUMN TEXT: MESSAGE; HELP`.
fn findings(text: &str) -> String {
    let diagnostics = match parse(text, None) {
        Ok(loaded) => loaded.warnings,
        Err(errors) => errors.0,
    };
    let line = |diagnostic: &Diagnostic| {
        let level = if diagnostic.severity == Severity::Warning { "warning: " } else { "" };
        let place = match &diagnostic.place {
            Some(place) => format!("{}:{} {}", place.line, place.column, place.text),
            None => "nowhere".into(),
        };
        format!("{level}{place}: {}; {}", diagnostic.message, diagnostic.help)
    };
    diagnostics.list.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Findings in `rules`, after two lines that are right.
fn rules(text: &str) -> String {
    findings(&format!("{MINIMAL}rules:\n{text}"))
}

#[test]
fn all_mistakes_are_shown_at_once_with_their_lines() {
    let text = r#"role: node
networks:
  pods: [10.200.1.0/24]
  external: [192.168.31.7/24]
enforcment: {mode: audit}
rules:
  - name: api
    direction: inbound
    protocol: tcp
    ports: [40002, "60100-60001", 70000]
  - {name: api, direction: in, protocol: icmp, ports: 80}
  - {name: other, direction: outbound, protocol: icmp, ports: 80}
nodePorts: {allow: [30080, 29999]}
"#;
    let error = parse(text, Some("bridge.yaml".as_ref())).unwrap_err();
    assert_snapshot!(error);
}

#[test]
fn a_family_of_pods_that_external_lacks_is_warned_of() {
    let nets = |pods: &str, external: &str| {
        findings(&format!("role: node\nnetworks: {{pods: [{pods}], external: [{external}]}}\n"))
    };
    assert_snapshot!(nets("10.200.1.0/24, 'fd20:1::/64'", "192.168.31.0/24"), @"warning: 2:60 [192.168.31.0/24]: pods have IPv6 networks and `external` names none, so no rule covers IPv6; add the IPv6 networks of the LAN to `external`");
    assert_snapshot!(nets("10.200.1.0/24, 'fd20:1::/64'", "'fd31::/64'"), @"warning: 2:60 ['fd31::/64']: pods have IPv4 networks and `external` names none, so no rule covers IPv4; add the IPv4 networks of the LAN to `external`");
    assert_snapshot!(nets("10.200.1.0/24, 'fd20:1::/64'", "192.168.31.0/24, 'fd31::/64'"), @"");
    assert_snapshot!(nets("10.200.1.0/24", "192.168.31.0/24, 'fd31::/64'"), @"");
}

#[test]
fn unknown_keys_get_a_suggestion() {
    assert_snapshot!(findings(&format!("{MINIMAL}rule: []\nenforcement: {{ondeny: drop, colour: red}}\nmode: audit\nnode-ports: {{}}\n")), @r"
    3:1 rule: unknown key `rule`; did you mean `rules`?
    4:15 ondeny: unknown key `ondeny`; did you mean `onDeny`?
    4:29 colour: unknown key `colour`; remove it, or write one of: engines, events, fastPath, flows, interfaces, iptables, mode, nftables, onDeny, scope, syslog, timeouts, xdp
    5:1 mode: unknown key `mode`; write it under `api` or `enforcement`
    6:1 node-ports: unknown key `node-ports`; did you mean `nodePorts`?
    ");
}

#[test]
fn unknown_values_get_a_suggestion() {
    assert_snapshot!(findings("role: nod\nenforcement: {mode: audited, engines: [ebpf, nftable], onDeny: []}\n"), @r"
    1:7 nod: `nod` is not known here; did you mean `node`?
    2:21 audited: `audited` is not known here; write one of: enforce, audit
    2:46 nftable: `nftable` is not known here; did you mean `nftables`?
    2:64 []: `onDeny` should be a single value, not a list; write reject
    ");
}

#[test]
fn ports_in_one_list_are_disjoint() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: tcp, ports: [1-100, 100-200, 80, 80, 300]}\n"), @r#"
    4:65 100-200: 100-200 overlaps 1-100 in the same list; write "1-200" for both, or make them disjoint
    4:74 80: 80 overlaps 1-100 in the same list; write "1-100" for both, or make them disjoint
    4:78 80: 80 overlaps 1-100 in the same list; write "1-100" for both, or make them disjoint
    "#);
}

#[test]
fn ports_are_1_to_65535_and_not_inverted() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: tcp, ports: [0, 65536, 9-1, http, -1], sourcePorts: []}\n"), @r#"
    4:58 0: port 0 in `0` is reserved and never used on the wire; write ports from 1 to 65535
    4:61 65536: port 65536 in `65536` is above 65535; write ports from 1 to 65535
    4:68 9-1: port range `9-1` ends before it begins; write "1-9"
    4:73 http: `http` is not a port or a range of ports; write a number such as 40002, or a range such as "60001-60100", both ends included
    4:79 -1: `-1` is not a port or a range of ports; write a number such as 40002, or a range such as "60001-60100", both ends included
    4:97 []: the list of ports is empty; name at least one port, or remove the key
    "#);
}

#[test]
fn ports_are_required_for_protocols_that_have_them() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: tcp}\n  - {name: b, direction: inbound, protocol: udp, sourcePorts: 53}\n  - {name: c, direction: inbound, protocol: sctp}\n  - {name: d, direction: inbound, protocol: tcp, port: [80]}\n  - {name: e, direction: inbound, protocol: tcp, ports:}\n  - {name: f, direction: inbound, protocol: icmp}\n  - {name: g, direction: inbound, protocol: any}\n  - {name: h, direction: inbound, protocol: tcp, ports: ['1-65535']}\n"), @r#"
    4:5 {name: a, direction: inbound, protocol: tcp}: rule `a` has no `ports`; write `ports`, such as ports: [40002]; for all of them: ports: ["1-65535"]
    5:5 {name: b, direction: inbound, protocol: udp, sourcePorts: 53}: rule `b` has no `ports`; write `ports`, such as ports: [40002]; for all of them: ports: ["1-65535"]
    6:5 {name: c, direction: inbound, protocol: sctp}: rule `c` has no `ports`; write `ports`, such as ports: [40002]; for all of them: ports: ["1-65535"]
    7:50 port: unknown key `port`; did you mean `ports`?
    8:55 : `ports` has no value; write ["60001-60100"], or remove it
    "#);
}

#[test]
fn numbers_with_leading_zeros_are_refused() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: tcp, external: [192.168.031.0/24], ports: [010, '0080-90', 0x50]}\n"), @r"
    4:61 192.168.031.0/24: `192.168.031.0/24` has a number with a leading zero, which some readers take for octal; write 192.168.31.0/24 if the numbers are decimal
    4:88 010: `010` in `010` has a leading zero, which some readers take for octal; write 10 if it is decimal
    4:93 '0080-90': `0080` in `0080-90` has a leading zero, which some readers take for octal; write 80 if it is decimal
    4:104 0x50: `0x50` is hexadecimal; write 80, which is decimal
    ");
}

#[test]
fn selectors_have_requirements_that_a_pod_can_meet() {
    let rule = |keys: &str| {
        findings(&format!(
            "{MINIMAL}kubernetes: {{}}\nrules: [{{name: a, direction: inbound, protocol: any, {keys}}}]\n"
        ))
    };
    assert_snapshot!(rule("podSelector: {}, namespaceSelector: {matchLabels: {}}"), @r"
    4:67 {}: an empty `podSelector` selects every pod; leave it out, or write `matchLabels` or `matchExpressions`
    4:90 {matchLabels: {}}: an empty `namespaceSelector` selects every namespace; leave it out, or write `matchLabels` or `matchExpressions`
    ");
    assert_snapshot!(rule("podSelector: {matchLabel: {app: api}}"), @r"
    4:68 matchLabel: unknown key `matchLabel`; did you mean `matchLabels`?
    ");
    assert_snapshot!(rule("podSelector: {matchLabels: {app: 'not a label!', 'not a key!': x}, matchExpressions: [{key: '', operator: NotIn, values: [x]}]}"), @r"
    4:87 'not a label!': `not a label!` is not a label value, so no pod can have it; write at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends
    4:117 x: `not a key!` is not a label key, so no pod can have it; write at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends, after an optional DNS name and `/`, such as app.kubernetes.io/name
    4:146 '': `` is not a label key, so no pod can have it; write at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends, after an optional DNS name and `/`, such as app.kubernetes.io/name
    ");
}

#[test]
fn an_allow_that_a_deny_covers_is_warned_of() {
    assert_snapshot!(rules("  - {name: all, direction: inbound, protocol: any, action: deny}\n  - {name: web, direction: inbound, protocol: tcp, ports: [443]}\n  - {name: ping, direction: inbound, protocol: icmp}\n  - {name: out, direction: outbound, protocol: any}\n"), @r"
    warning: 5:5 {name: web, direction: inbound, protocol: tcp, ports: [443]}: rule `web` never matches: `all` denies all of it; remove `web`, or narrow `all`; a deny wins over every allow
    warning: 6:5 {name: ping, direction: inbound, protocol: icmp}: rule `ping` never matches: `all` denies all of it; remove `ping`, or narrow `all`; a deny wins over every allow
    ");
    // Each of these has a flow that no deny matches.
    assert_snapshot!(rules("  - {name: low, direction: inbound, protocol: tcp, ports: ['1-1023'], action: deny}\n  - {name: net, direction: inbound, protocol: any, external: [192.168.31.0/25], action: deny}\n  - {name: port, direction: inbound, protocol: any, ports: [7], action: deny}\n  - {name: a, direction: inbound, protocol: tcp, ports: ['1023-1024']}\n  - {name: b, direction: inbound, protocol: tcp, ports: [1024], external: [192.168.31.0/24]}\n  - {name: c, direction: inbound, protocol: icmp}\n"), @"");
    assert_snapshot!(rules("  - {name: low, direction: inbound, protocol: tcp, ports: ['1-99', '100-1023'], pods: [10.200.1.0/25], action: deny}\n  - {name: a, direction: inbound, protocol: tcp, ports: ['80-200'], pods: [10.200.1.64/26], sourcePorts: [9]}\n"), @r"
    warning: 5:5 {name: a, direction: inbound, protocol: tcp, ports: ['80-200'], pods: [10.200.1.64/26], sourcePorts: [9]}: rule `a` never matches: `low` denies all of it; remove `a`, or narrow `low`; a deny wins over every allow
    ");
}

#[test]
fn ports_need_a_protocol_with_ports() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: icmp, ports: 80, sourcePorts: [81]}\n"), @r"
    4:58 80: ICMP has no ports, so rule `a` can have none; remove `ports`, or write the protocol the ports belong to: tcp, udp or sctp
    4:75 [81]: ICMP has no ports, so rule `a` can have none; remove `sourcePorts`, or write the protocol the ports belong to: tcp, udp or sctp
    ");
}

#[test]
fn networks_do_not_overlap_and_have_no_host_bits() {
    assert_snapshot!(findings("role: node\nnetworks:\n  pods: [10.0.0.0/8, 10.200.1.0/24, fd00::/64]\n  external: [10.1.0.0/16, 'fd00::1/64', 192.168.31.1]\n  nodes: [172.16.0.1]\n"), @r"
    warning: 3:22 10.200.1.0/24: 10.200.1.0/24 is already covered by 10.0.0.0/8 in the same list; remove it
    4:14 10.1.0.0/16: 10.1.0.0/16 overlaps the pod network 10.0.0.0/8; write networks that share no address: one address cannot be both a pod and a LAN host
    4:27 'fd00::1/64': `fd00::1/64` has bits set after its first 64; write fd00::/64 for the network, or fd00::1/128 for this one address
    4:41 192.168.31.1: `192.168.31.1` has no prefix length; write 192.168.31.1/32 for this one address, or the prefix of its network
    ");
}

#[test]
fn nodes_do_not_enclose_a_network_of_hosts_or_pods() {
    let of = |nodes: &str| {
        findings(&format!(
            "role: node\nnetworks:\n  pods: [10.200.1.0/24, 'fd00:1::/64']\n  external: [192.168.31.0/24, 192.168.40.9/32, 'fd31::/64']\n  nodes: [{nodes}]\n"
        ))
    };
    for nodes in [
        "0.0.0.0/0",
        "'::/0'",
        "192.168.31.0/24",
        "192.168.0.0/16",
        "10.200.1.0/24",
        "10.0.0.0/8",
        "'fd31::/64'",
        "192.168.31.0/25, 192.168.31.128/25",
        "192.168.40.8/30",
    ] {
        let text = of(nodes);
        assert!(
            text.contains("and nodes are not restricted") && !text.contains("warning"),
            "{nodes}: {text}"
        );
    }
    for nodes in
        ["192.168.31.17", "192.168.31.16/28", "10.200.1.1", "192.168.40.9", "192.168.31.16/31, 'fd31::17'"]
    {
        assert_eq!(of(nodes), "", "{nodes}");
    }
    assert_snapshot!(of("192.168.0.0/16, 172.16.0.0/12, 10.200.0.0/16"), @r"
    5:11 192.168.0.0/16: 192.168.0.0/16 makes nodes of all of the external network 192.168.31.0/24: every LAN host there would count as a node, and nodes are not restricted; write the addresses of the nodes one by one, such as `nodes: [192.168.31.17]`
    warning: 5:27 172.16.0.0/12: 172.16.0.0/12 lies in no network of `pods` or `external`, so this changes nothing; remove it, or correct it
    5:42 10.200.0.0/16: 10.200.0.0/16 makes nodes of all of the pod network 10.200.1.0/24: every pod there would count as a node, and nodes are not restricted; write the addresses of the nodes one by one, such as `nodes: [192.168.31.17]`
    ");
    // Pods of the cluster are not known here.
    let learned = "role: node\nkubernetes: {}\nnetworks: {external: [192.168.31.0/24], nodes: [0.0.0.0/0]}\n";
    assert!(findings(learned).contains("and nodes are not restricted"), "{}", findings(learned));
    let no_v6 =
        "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24], nodes: ['::/0']}\n";
    assert!(findings(no_v6).contains("every host would count as a node"), "{}", findings(no_v6));
}

#[test]
fn networks_are_needed_on_a_node() {
    assert_snapshot!(findings("role: node\n"), @r"
    1:1 role: node: no pod network is given; write the networks of this node's pods, such as `pods: [10.200.1.0/24]` under `networks`, or a `kubernetes` section to learn them from the cluster
    1:1 role: node: no external network is given; write the networks of the LAN hosts, such as `external: [192.168.31.0/24]` under `networks`
    ");
    assert_snapshot!(findings("role: node\nkubernetes: {}\nnetworks: {external: [192.168.31.0/24]}\n"), @"");
    assert_snapshot!(findings("role: host\n"), @"");
}

#[test]
fn a_misspelt_section_is_not_missing_as_well() {
    assert_snapshot!(findings("role: node\nnetworks: {pod: [10.200.1.0/24], external: [192.168.31.0/24]}\n"), @r"
    2:12 pod: unknown key `pod`; did you mean `pods`?
    ");
    assert_snapshot!(rules("  - {nam: a, direction: inbound, protocol: any}\n"), @r"
    4:6 nam: unknown key `nam`; did you mean `name`?
    ");
}

#[test]
fn rule_names_are_unique_and_short_and_plain() {
    let long = "x".repeat(64);
    assert_snapshot!(rules(&format!("  - {{name: a, direction: inbound, protocol: any}}\n  - {{name: a, direction: inbound, protocol: any}}\n  - {{name: a b/c, direction: inbound, protocol: any}}\n  - {{name: {long}, direction: inbound, protocol: any}}\n  - {{name: '', direction: inbound, protocol: any}}\n")), @r"
    5:12 a: the name `a` is already taken by the rule at line 4; give each rule a name of its own: hit counters and iptables comments go by it
    6:12 a b/c: the rule's name contains ' '; use only letters, digits, `.`, `_` and `-`, such as a-b-c
    7:12 xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx: the rule's name has 64 bytes; shorten it to 63 bytes, such as xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
    8:12 '': the rule's name is empty; write a name, such as devices-to-api
    ");
}

#[test]
fn what_a_rule_lacks_is_named() {
    assert_snapshot!(rules("  - name: a\n    ports: 80\n  - {}\n  - tcp\n"), @r#"    4:5 name: a: `direction` is missing; add `direction:` with one of inbound, outbound
    4:5 name: a: `protocol` is missing; add `protocol:` with one of tcp, udp, sctp, icmp, any
    6:5 {}: `direction` is missing; add `direction:` with one of inbound, outbound
    6:5 {}: `name` is missing; add `name`, such as `name: devices-to-api`
    6:5 {}: `protocol` is missing; add `protocol:` with one of tcp, udp, sctp, icmp, any
    7:5 tcp: an element of the list should be a mapping, not a single value; write {direction: inbound, name: devices-to-api, ports: ["60001-60100"], protocol: tcp}
    "#);
}

#[test]
fn rule_networks_lie_inside_those_that_are_judged() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: any, external: [192.168.32.0/24, 192.168.31.0/25], pods: [10.200.0.0/16]}\n  - {name: b, direction: inbound, protocol: any, external: []}\n"), @r"
    4:61 192.168.32.0/24: 192.168.32.0/24 is not inside `networks.external` (192.168.31.0/24), where alone packets are judged; write a network inside them, or add 192.168.32.0/24 to `networks.external`
    4:103 10.200.0.0/16: 10.200.0.0/16 is not inside `networks.pods` (10.200.1.0/24), where alone packets are judged; write a network inside them, or add 10.200.0.0/16 to `networks.pods`
    5:60 []: the list is empty, so rule `b` could match nothing; write at least one network, or remove the key for all of `networks.external`
    ");
}

#[test]
fn a_rule_inside_two_neighbouring_networks_is_inside() {
    assert_snapshot!(findings("role: node\nnetworks: {pods: [10.0.0.0/25, 10.0.0.128/25], external: [192.168.31.0/24]}\nrules: [{name: a, direction: inbound, protocol: any, pods: [10.0.0.0/24]}]\n"), @"");
}

#[test]
fn ip_versions_that_cannot_meet() {
    assert_snapshot!(findings("role: node\nnetworks: {pods: [10.200.1.0/24, 'fd00:1::/64'], external: [192.168.31.0/24, 'fd00:2::/64']}\nrules:\n  - {name: a, direction: inbound, protocol: any, external: [192.168.31.67/32], pods: ['fd00:1::/64']}\n  - {name: b, direction: inbound, protocol: any, external: [192.168.31.67/32]}\n"), @r"
    4:5 {name: a, direction: inbound, protocol: any, external: [192.168.31.67/32], pods: ['fd00:1::/64']}: rule `a` can match nothing: its external side is IPv4 only, its pods IPv6 only; give both sides networks of the same IP version
    ");
}

#[test]
fn pods_by_label_need_a_cluster() {
    assert_snapshot!(rules("  - {name: a, direction: inbound, protocol: any, pods: [10.200.1.1/32], podSelector: {matchExpressions: [{key: app, operator: In}, {key: app, operator: Exists, values: [x]}]}}\n"), @r"
    4:86 {matchExpressions: [{key: app, operator: In}, {key: app, operator: Exists, values: [x]}]}: rule `a` has both `pods` and `podSelector`; keep one: `pods` for addresses, `podSelector` for labels
    4:86 {matchExpressions: [{key: app, operator: In}, {key: app, operator: Exists, values: [x]}]}: pods can be selected by label only with a `kubernetes` section; add `kubernetes: {}` (inside a cluster) or `kubernetes: {kubeconfig: PATH}`, or use `pods`
    4:106 {key: app, operator: In}: this operator needs values; add `values: [...]`
    4:132 {key: app, operator: Exists, values: [x]}: this operator takes no values; remove `values`
    ");
}

#[test]
fn node_ports_lie_in_their_range() {
    assert_snapshot!(findings(&format!("{MINIMAL}nodePorts: {{allow: [29999, 30000-32767, 32768]}}\n")), @r"
    3:21 29999: 29999 is not inside the NodePort range 30000-32767; write ports from 30000 to 32767, or correct `nodePorts.range`
    3:41 32768: 32768 is not inside the NodePort range 30000-32767; write ports from 30000 to 32767, or correct `nodePorts.range`
    ");
    assert_snapshot!(findings(&format!("{MINIMAL}nodePorts: {{allow: 80}}\n")), @r"
    3:20 80: 80 is not inside the NodePort range 30000-32767; write ports from 30000 to 32767, or correct `nodePorts.range`
    ");
}

#[test]
fn a_pool_beside_node_ports_and_servers() {
    assert_snapshot!(findings(&format!("{MINIMAL}nodePorts: {{}}\nportPool:\n  ports: [1000-1100, 32000-33000]\n  quota: 2000\n")), @r#"
    warning: 5:11 1000-1100: 1000-1100 has ports below 1024, which servers listen on and only root may bind; take ports of the dynamic range, such as "61001-65535"
    warning: 5:22 32000-33000: 32000-33000 overlaps the NodePort range 30000-32767; take other ports for the pool: a reply to one of these can be taken for a NodePort request
    warning: 6:10 2000: a quota of 2000 limits nothing: the pool has 1102 ports; write at most 1102, or remove it
    "#);
    assert_snapshot!(findings(&format!("{MINIMAL}portPool: {{ports: 61001-61100, exclude: [61001-61100, 7], quota: 0, transparent: {{cgroups: [x]}}}}\n")), @r"
    3:41 [61001-61100, 7]: `exclude` leaves no port in the pool; exclude fewer ports
    3:55 7: 7 is not inside `portPool.ports`; exclude only ports that are in the pool
    3:66 0: 0 is out of bounds; write a whole number from 1 to 65535
    3:93 x: `x` is not the path of a control group; write the path below the cgroup2 mount, such as / or /kubepods.slice
    ");
    assert_snapshot!(findings("role: host\nnetworks: {pods: [10.0.0.0/8]}\nportPool: {ports: 61001-61100, masquerade: true}\n"), @"3:44 true: connections of pods are masqueraded on a node, and this is a host; write `role: node`, or remove `masquerade`");
    assert_snapshot!(findings("role: node\nnetworks: {external: [10.0.0.0/8]}\nkubernetes: {}\nportPool: {ports: 61001-61100, masquerade: true}\n"), @"4:44 true: `masquerade` is for connections of pods, and `networks.pods` names none; add `pods: [...]` under `networks`, or remove `masquerade`");
    assert_snapshot!(findings("role: host\nportPool: {ports: 61001-61100}\n"), @r"
    2:11 {ports: 61001-61100}: the pool has no destinations, and `networks` names none to take instead; add `destinations: [...]`, or the networks under `networks`
    ");
}

#[test]
fn routes_that_cannot_work() {
    assert_snapshot!(findings("role: host
routes:
  table: 255
  protocol: 98
  metric: -1
  onWithdraw: blackholes
  allowInside: [10.0.0.1/8]
  static:
    - {to: 10.200.1.0/24, via: 10.200.1.1}
    - {to: fd00::/64, via: 192.168.31.17}
    - {to: 10.200.3.0/24, via: 0.0.0.0}
    - {to: 10.200.4.0/24, via: 192.168.31.18/24, dev: eth*}
    - {to: 10.200.3.0/24, via: 192.168.31.18}
    - {to: 10.200.5.0/24}
    - {to: 10.200.6.0/24, via: 192.168.31.18, blackhole: true}
    - {to: 10.200.7.0/24, via: [192.168.31.18, {via: 192.168.31.19, weight: 257}]}
    - {to: 10.200.8.0/24, via: [192.168.31.18], backup: {via: 192.168.31.18}, table: 255}
    - {to: fd00:1::/64, via: [{via: fe80::17, weight: 2}]}
    - {to: 0.0.0.0/0, via: 192.168.31.18}
    - {to: 10.200.10.0/24, gateway: 192.168.31.18}
  health: {interval: 10ms, timeout: 2s, tcpPort: 0}
  discovery: {listen: 12345}
"), @r"
    3:10 255: table 255 holds the kernel's own local addresses; write 254 for the main table, or a table of your own
    4:3 protocol: unknown key `protocol`; remove it, or write one of: allowInside, discovery, file, health, metric, onWithdraw, static, table
    5:11 -1: -1 is out of bounds; write a whole number from 0 to 4294967295
    6:15 blackholes: `blackholes` is not known here; did you mean `blackhole`?
    7:17 10.0.0.1/8: `10.0.0.1/8` has bits set after its first 8; write 10.0.0.0/8 for the network, or 10.0.0.1/32 for this one address
    9:32 10.200.1.1: the next hop 10.200.1.1 is itself inside 10.200.1.0/24, so the route would lead to itself; write the address that the node has on the LAN
    10:28 192.168.31.17: fd00::/64 is IPv6, and the next hop 192.168.31.17 is not; write an IPv6 next hop
    11:32 0.0.0.0: 0.0.0.0 cannot be a next hop; write the address that the node has on the LAN
    12:32 192.168.31.18/24: `192.168.31.18/24` is not an IP address; write the address without its prefix length: 192.168.31.18
    12:55 eth*: `eth*` is a pattern; write the name of one interface, such as eth0
    13:12 10.200.3.0/24: 10.200.3.0/24 already has a route at line 11; write one entry with `via: [FIRST, SECOND]` to use both next hops, or with `backup: SECOND`
    14:7 {to: 10.200.5.0/24}: 10.200.5.0/24 has no next hop; add `via`, such as `via: 192.168.31.17`, or `blackhole: true` to drop its packets
    15:7 {to: 10.200.6.0/24, via: 192.168.31.18, blackhole: true}: 10.200.6.0/24 has both a next hop and `blackhole`; write `via` to forward its packets, or `blackhole: true` to drop them
    16:77 257: 257 is out of bounds; write a whole number from 1 to 256
    17:63 192.168.31.18: the next hop 192.168.31.18 is written twice; write each once, with a `weight` if need be
    17:86 255: table 255 holds the kernel's own local addresses; write 254 for the main table, or a table of your own
    18:37 fe80::17: the link-local address fe80::17 exists on every link; add `dev` with the interface
    19:12 0.0.0.0/0: 0.0.0.0/0 would take over the default route; write the networks of the pods
    20:28 gateway: unknown key `gateway`; remove it, or write one of: backup, blackhole, dev, metric, table, to, via
    21:22 10ms: an interval of 10ms would flood the LAN; write 200ms or more
    21:50 0: 0 is out of bounds; write a whole number from 1 to 65535
    22:14 {listen: 12345}: `keyFile` is missing; add `keyFile`, such as `keyFile: /etc/bridge/discovery.key`
    22:23 12345: `12345` is not an address with a port; write ADDRESS:PORT with a port from 1 to 65535, such as 127.0.0.1:9469 or [::1]:9469
    ");
    assert_snapshot!(findings("role: host
routes:
  health: {interval: 1s, timeout: 2s, tcpPort: 10250}
  discovery: {listen: 0.0.0.0:12345, keyFile: /etc/bridge/discovery.key}
"), @r"
    3:35 2s: a check may take 2s, and the next begins after 1s; write a timeout no longer than `interval`
    4:14 {listen: 0.0.0.0:12345, keyFile: /etc/bridge/discovery.key}: nothing says which addresses pods may announce; write their networks under `networks.pods`
    ");
}

#[test]
fn iptables_is_told_what_it_can_do() {
    assert_snapshot!(findings(&format!("{MINIMAL}enforcement:\n  iptables: {{backend: nftables, mark: 0x3000, logRate: 10001, lockWait: 1500ms, lock: 1s}}\n")), @r"
    4:23 nftables: `nftables` is not known here; write one of: auto, nft, legacy
    4:39 0x3000: `0x3000` is not one bit of the packet mark; write one bit from 0x1 to 0x80000000, such as 0x2000, that no other program uses
    4:56 10001: 10001 is out of bounds; write a whole number from 0 to 10000
    4:73 1500ms: iptables cannot wait 1s500ms for its lock; write whole seconds, from 1s to 1m
    4:81 lock: unknown key `lock`; remove it, or write one of: backend, lockWait, logRate, mark
    ");
}

#[test]
fn enforcement_that_contradicts_itself() {
    assert_snapshot!(findings(&format!("{MINIMAL}enforcement:\n  engines: [ebpf, ebpf]\n  interfaces: {{external: [eth0, \"a/b\"], internal: [eth0]}}\n  timeouts: {{icmp: 30, other: 0s, tcpReset: soon}}\n  events: {{rate: 1e3, allowed: yes}}\n  flows: {{established: 10, halfOpen: \"65536\"}}\n")), @r#"
    4:19 ebpf: this is in the list twice; remove one of them
    5:33 "a/b": `a/b` contains '/', which no interface name can; write a name such as eth0, or a pattern such as "cali*"
    5:52 eth0: `eth0` is both an external and an internal interface; write it on the side it faces: external towards the LAN, internal towards the pods
    6:20 30: `30` is not a duration; say the unit: 30s for seconds
    6:31 0s: the duration `0s` is out of bounds; write one from 1ms to 365d
    6:45 soon: `soon` is not a duration; write a number and a unit (ms, s, m, h, d), such as 30s, 5m or 1h30m
    7:18 1e3: `1e3` is not a whole number; write a whole number from 0 to 1000000
    7:32 yes: `yes` is neither true nor false; write true
    8:24 10: 10 is out of bounds; write a whole number from 1024 to 16777216
    8:38 "65536": "65536" in quotes is a text; write 65536 without quotes
    "#);
    assert_snapshot!(findings(&format!("{MINIMAL}enforcement: {{engines: [nftables, ebpf, iptables]}}\n")), @r"
    3:41 iptables: both would write the same rules into the kernel's packet filter, and each packet would pass them twice; write [ebpf, nftables] or [ebpf, iptables]; auto stands for one of them
    ");
    assert_snapshot!(findings(&format!("{MINIMAL}enforcement: {{engines: []}}\n")), @r"
    3:24 []: no engine is given, so nothing would enforce the rules; write [ebpf, iptables], one of them, or remove the key for both
    ");
}

#[test]
fn the_api_socket() {
    let long = "x".repeat(120);
    assert_snapshot!(findings(&format!("{MINIMAL}api: {{socket: /{long}, mode: \"0666\", metrics: localhost:9469, group: ''}}\n")).replace(&long, "LONG"), @r#"
    3:15 /LONG: the path of the socket has 121 bytes; shorten it to 107 bytes, the capacity of a unix socket's address
    warning: 3:144 "0666": mode 0666 lets every user of this machine control the agent; write "0660", and `group` for those who may
    3:161 localhost:9469: `localhost:9469` is not an address with a port; write ADDRESS:PORT with a port from 1 to 65535, such as 127.0.0.1:9469 or [::1]:9469
    3:184 '': the group is empty; write a group such as bridge, or its number, or remove the key
    "#);
}

#[test]
fn a_host_has_no_rules_and_a_context_needs_a_kubeconfig() {
    assert_snapshot!(findings("role: host\nnodePorts: {}\nrules: [{name: a, direction: inbound, protocol: any}]\nkubernetes: {context: lab}\n"), @r"
    2:12 {}: `nodePorts` is enforced on a node, and this is a host; write `role: node`, or remove the section
    3:8 [{name: a, direction: inbound, protocol: any}]: `rules` is enforced on a node, and this is a host; write `role: node`, or remove the section
    4:23 lab: `context` names a context of a kubeconfig, and none is given; add `kubeconfig: PATH`, or remove `context`
    ");
}

#[test]
fn a_key_without_a_value_is_a_slip() {
    assert_snapshot!(findings(&format!("{MINIMAL}kubernetes:\nportPool: ~\napi: {{group: null}}\nrules:\n  -\n")), @r#"
    3:11 : `kubernetes` has no value; write {}, or remove it
    4:11 ~: `portPool` has no value; write {ports: ["60001-60100"]}, or remove it
    5:14 null: `group` has no value; write TEXT, or remove it
    7:4 : an element of the list has no value; write {direction: inbound, name: devices-to-api, ports: ["60001-60100"], protocol: tcp}, or remove it
    "#);
}

#[test]
fn yaml_that_is_none() {
    assert_snapshot!(findings("role: node\nnetworks: {pods: [10.200.1.0/24]\nrules: []\n"), @r"
    3:1 : this is not YAML: while parsing a flow mapping, did not find expected ',' or '}'; correct the YAML here or just before: check indentation, quotes, brackets, and the space after a colon
    ");
    assert_snapshot!(findings("role: node\n\tnetworks: {}\n"), @r"
    1:7 : this is not YAML: while scanning a plain scalar, found a tab; indent with spaces
    ");
    assert_snapshot!(findings(""), @r"
    nowhere: the configuration is empty; write at least `role: node` or `role: host`
    ");
    assert_snapshot!(findings("# nothing\n"), @r"
    nowhere: the configuration is empty; write at least `role: node` or `role: host`
    ");
    assert_snapshot!(findings("[]"), @r"
    1:1 []: the configuration should be a mapping, not a list; write {role: node}
    ");
    assert_snapshot!(findings(&"[".repeat(5000)), @r"
    1:65 : this is not YAML: recursion limit exceeded; nest less deeply
    ");
}

#[test]
fn yaml_that_means_something_else() {
    assert_snapshot!(findings("role: node\nrole: host\n"), @r"
    2:1 role: the key `role` is there twice, first in line 1; keep one of them
    ");
    assert_snapshot!(findings(&format!("{MINIMAL}enforcement: {{interfaces: {{internal: [*]}}}}\n")), @r#"
    3:39 : this is not YAML: while scanning an anchor or alias, did not find expected alphabetic or numeric character; quote a text that begins with * or &, such as "*"
    "#);
    assert_snapshot!(findings(&format!("{MINIMAL}enforcement: {{interfaces: {{internal: [*cali]}}}}\n")), @r#"
    3:39 *cali: `*cali` without quotes is a YAML alias, and no anchor `&cali` is defined before it; write "*cali" in quotes if the star is meant as it is
    "#);
    assert_snapshot!(findings("role: node\n---\nrole: host\n"), @r"
    1:1 role: node: no pod network is given; write the networks of this node's pods, such as `pods: [10.200.1.0/24]` under `networks`, or a `kubernetes` section to learn them from the cluster
    1:1 role: node: no external network is given; write the networks of the LAN hosts, such as `external: [192.168.31.0/24]` under `networks`
    2:1 ---: a second YAML document begins here; keep one document to a file: remove this and the rest
    ");
    assert_snapshot!(findings("role: host\n? [a]\n: b\n"), @r"
    2:3 [a]: a list or mapping cannot be a key; write a name before the colon; quote it if it begins with [ or {
    ");
    assert_snapshot!(findings("role: !role host\n"), @r"
    1:13 host: the YAML tag !role means nothing here; remove the tag
    ");
    assert_snapshot!(findings("role: host\napi: &a {<<: *a}\n"), @r"
    2:14 *a: this alias is inside its own anchor; spell the value out
    ");
    assert_snapshot!(findings("role: host\napi: &a {mode: '0600'}\npersistence: {<<: *a}\n"), @r"
    3:15 <<: YAML merge keys are not supported; spell the keys out
    ");
}

#[test]
fn aliases_cannot_ask_for_all_memory() {
    let mut text = String::from("role: host\nx0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n");
    for level in 1..10 {
        let list = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("x{level}: &a{level} [{list}]\n"));
    }
    assert!(findings(&text).contains("aliases repeat more than 1000000 values; spell the values out"));
}

#[test]
fn only_so_many_are_kept() {
    let text =
        format!("{MINIMAL}rules:\n{}", "  - {name: '', direction: inbound, protocol: any}\n".repeat(1500));
    let error = parse(&text, None).unwrap_err();
    assert_eq!((error.0.list.len(), error.0.left_off), (1000, 500));
    assert!(error.to_string().ends_with("and 500 more"));
}

#[test]
fn files_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let shown = |path: &std::path::Path| {
        load(path).unwrap_err().to_string().replace(&directory.path().display().to_string(), "DIR")
    };
    assert_snapshot!(shown(&directory.path().join("none.yaml")), @r"
    error: DIR/none.yaml: cannot read the configuration: No such file or directory (os error 2)
     |
     = help: write the file, starting from deploy/examples, or name another one with --config FILE
    ");
    assert_snapshot!(shown(directory.path()), @r"
    error: DIR: cannot read the configuration: Is a directory (os error 21)
     |
     = help: name a file in this directory with --config FILE
    ");
    let path = directory.path().join("latin1.yaml");
    std::fs::write(&path, b"role: node # \xe4\n").unwrap();
    assert_snapshot!(shown(&path), @r"
    error: DIR/latin1.yaml: cannot read the configuration: invalid utf-8 sequence of 1 bytes from index 13
     |
     = help: save the file as UTF-8
    ");
}

/// A fault in a configuration of one line was reported with a copy of that line, for each of a thousand findings.
#[test]
fn of_a_long_line_only_what_is_around_a_mistake_is_kept() {
    let rules = "{a: b}, ".repeat(9_000);
    let text = format!("role: node\nrules: [{rules}{{\u{e4}: b}}]\n");
    let errors = parse(&text, Some("bridge.yaml".as_ref())).unwrap_err();
    let longest = errors.0.list.iter().map(|found| format!("{found:?}").len()).max();
    assert!(longest < Some(4096), "{longest:?} bytes for one finding in a file of {}", text.len());
    // The place in the file is reported nevertheless.
    let found = &errors.0.list[900];
    let place = found.place.as_ref().unwrap();
    assert!(place.column > 600, "{}", place.column);
    let place = format!("--> bridge.yaml:2:{}\n", place.column);
    let shown = found.render(&annotate_snippets::Renderer::plain());
    assert!(shown.contains(&place), "{place} in {shown}");
}

#[test]
fn a_running_agent_does_not_wait_for_a_fifo() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bridge.yaml");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let error = crate::config::load_regular(&path).unwrap_err().to_string();
    assert!(error.contains("it is a FIFO, not a regular file"), "{error}");
    assert!(error.contains("move a regular file in its place"), "{error}");
}
