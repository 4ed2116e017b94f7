use super::super::cluster::{Labels, Node, Pod, Policy, Refusal, Stamp};
use super::*;

const FILE: &str = r#"role: node
networks: {external: [192.168.31.0/24, "fd31::/64"]}
kubernetes: {nodeName: b}
rules: [{name: web, direction: inbound, protocol: tcp, ports: [80], podSelector: {matchLabels: {app: web}}}]
"#;

fn labels(of: &[(&str, &str)]) -> Labels {
    of.iter().map(|(key, value)| (Box::from(*key), Box::from(*value))).collect()
}

fn node(number: u8) -> Option<Node> {
    Some(Node {
        addresses: [IpAddr::from([192, 168, 31, number]), IpAddr::from([10, 9, 9, number])].into(),
        networks: [format!("10.200.{number}.0/24").parse().unwrap()].into(),
    })
}

fn pod(app: &str, address: &str) -> Option<Pod> {
    let labels = labels(&[("app", app)]);
    Some(Pod {
        namespace: "shop".into(),
        labels,
        addresses: [address.parse().unwrap()].into(),
        pool_uid: None,
    })
}

fn policy(rules: &str) -> Option<Policy> {
    let rules =
        crate::config::policy_rules(&format!(r#"{{"spec": {rules}}}"#), crate::config::PolicyScope::Cluster);
    let rules = rules.map_err(|error| Refusal { reason: "Invalid".into(), message: error.to_string() });
    Some(Policy { generation: 1, uid: "u".into(), rules, reported: Vec::new(), stamp: Stamp::default() })
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.nodes.apply("b".into(), node(2));
    cluster.nodes.apply("b2".into(), node(3));
    cluster.namespaces.apply("shop".into(), Some(labels(&[("tier", "gold")])));
    cluster.pods.apply("shop/web".into(), pod("web", "10.200.2.91"));
    cluster.pods.apply("shop/api".into(), pod("api", "10.200.2.92"));
    cluster.remote_pods.absent();
    cluster
}

fn with(file: &str, cluster: &Cluster) -> Planned {
    plan(&crate::config::parse(file, None).unwrap().config, cluster, Some("b"))
}

/// Name and pods of each rule.
fn rules(planned: &Planned) -> String {
    let one = |rule: crate::model::Rule| {
        let pods = rule.pods.map(|pods| pods.iter().map(IpNet::to_string).collect::<Vec<_>>().join(" "));
        format!("{}: {}", rule.name, pods.map_or_else(|| "all".into(), |pods| format!("[{pods}]")))
    };
    planned.config.policy().rules.into_iter().map(one).collect::<Vec<_>>().join("\n")
}

#[test]
fn pods_that_take_part_in_the_pool_are_known_by_uid_before_they_have_an_address() {
    let mut cluster = cluster();
    assert!(with(FILE, &cluster).pool_pods.is_empty());
    let waiting =
        Pod { addresses: [].into(), pool_uid: Some("uid-1".into()), ..pod("web", "10.200.2.93").unwrap() };
    cluster.pods.apply("shop/new".into(), Some(waiting));
    let planned = with(FILE, &cluster);
    assert_eq!(planned.pool_pods, ["uid-1".to_owned()].into());
    assert_eq!(rules(&planned), "web: [10.200.2.91/32]", "no address, no rule");
}

#[test]
fn networks_and_nodes_of_the_cluster_are_those_of_the_configuration() {
    let planned = with(FILE, &cluster());
    let policy = planned.config.policy();
    // Joined where they can be.
    assert_eq!(policy.pods, ["10.200.2.0/23".parse().unwrap()]);
    assert_eq!(
        policy.nodes,
        ["192.168.31.2/31".parse().unwrap()],
        "only where they would be taken for LAN hosts"
    );
    assert_eq!(planned.remarks, Vec::<String>::new());
    assert_eq!(rules(&planned), "web: [10.200.2.91/32]");
    assert!(planned.routes.is_empty(), "the configuration has no `routes`");
}

#[test]
fn a_pod_that_is_not_known_yet_is_in_no_rule_that_selects() {
    let mut cluster = cluster();
    cluster.policies.apply("all".into(), policy(
        r#"{"rules": [{"name": "any", "direction": "inbound", "protocol": "tcp", "ports": [443]},
                      {"name": "gold", "direction": "outbound", "protocol": "any", "namespaceSelector": {"matchLabels": {"tier": "gold"}}}]}"#,
    ));
    cluster.pods.apply("shop/web".into(), None);
    assert_eq!(rules(&with(FILE, &cluster)), "web: []\nall.any: all\nall.gold: [10.200.2.92/32]");
    cluster.pods.apply("shop/web".into(), pod("web", "10.200.2.93"));
    let planned = with(FILE, &cluster);
    assert_eq!(
        rules(&planned),
        "web: [10.200.2.93/32]\nall.any: all\nall.gold: [10.200.2.92/32 10.200.2.93/32]"
    );
    assert_eq!(
        planned.policies,
        [ObservedPolicy { name: "all".into(), observed_generation: 1, uid: "u".into() }]
    );
}

#[test]
fn a_policy_that_is_not_valid_leaves_the_others_alone() {
    let mut cluster = cluster();
    cluster.policies.apply("bad".into(), policy(r#"{"rules": []}"#));
    let one = r#"{"rules": [{"name": "any", "direction": "inbound", "protocol": "any"}]}"#;
    cluster.policies.apply("good".into(), policy(one));
    let planned = with(FILE, &cluster);
    assert_eq!(rules(&planned), "web: [10.200.2.91/32]\ngood.any: all");
    let refused: Vec<&str> = planned.refused.iter().map(|policy| policy.name.as_str()).collect();
    assert_eq!(refused, ["bad"]);
    assert!(planned.refused[0].message.contains("the list of rules is empty"), "{:?}", planned.refused);
}

#[test]
fn what_overlaps_the_lan_is_not_taken_for_pods() {
    let mut cluster = cluster();
    let networks = ["192.168.0.0/16", "10.200.9.0/24"].map(|net| net.parse().unwrap());
    cluster.nodes.apply("evil".into(), Some(Node { addresses: [].into(), networks: networks.into() }));
    cluster.pods.apply("shop/odd".into(), pod("web", "172.16.0.9"));
    let planned = with(FILE, &cluster);
    let pods: Vec<String> = planned.config.policy().pods.iter().map(IpNet::to_string).collect();
    assert_eq!(
        pods,
        ["10.200.2.0/23", "10.200.9.0/24", "172.16.0.9/32"],
        "a pod in no network is judged, too"
    );
    assert!(planned.remarks[0].contains("192.168.0.0/16") && planned.remarks[0].contains("192.168.31.0/24"));
}

#[test]
fn a_family_of_pods_that_the_lan_has_no_network_of_is_reported() {
    let mut cluster = cluster();
    let v4_only = FILE.replace(r#", "fd31::/64""#, "");
    assert_eq!(with(&v4_only, &cluster).remarks, Vec::<String>::new(), "neither has IPv6");
    let networks = ["10.200.4.0/24", "fd20:0:0:4::/64"].map(|net| net.parse().unwrap());
    cluster.nodes.apply("dual".into(), Some(Node { addresses: [].into(), networks: networks.into() }));
    assert_eq!(with(FILE, &cluster).remarks, Vec::<String>::new(), "both have IPv6");
    let remarks = with(&v4_only, &cluster).remarks;
    assert!(matches!(&remarks[..], [one] if one.contains("no rule covers IPv6")), "{remarks:?}");
}

#[test]
fn an_external_network_around_the_pods_is_enforced_without_them() {
    let file = FILE.replace("192.168.31.0/24", "10.0.0.0/8");
    let mut cluster = cluster();
    cluster.pods.apply("shop/odd".into(), pod("web", "10.77.0.9"));
    let planned = with(&file, &cluster);
    let policy = planned.config.policy();
    assert!(
        planned.remarks[0].contains("10.0.0.0/8")
            && planned.remarks[0].contains("2 pod networks")
            && planned.remarks[0].contains("10.77.0.9/32")
    );
    let is_in =
        |nets: &[IpNet], address: &str| nets.iter().any(|net| net.contains(&host(address.parse().unwrap())));
    for (address, pod) in [
        ("10.200.2.91", true),
        ("10.200.3.1", true),
        ("10.77.0.9", true),
        ("10.77.0.8", false),
        ("10.1.2.3", false),
        ("10.200.4.0", false),
        ("10.255.255.255", false),
    ] {
        assert_eq!(
            (is_in(&policy.pods, address), is_in(&policy.external, address)),
            (pod, !pod),
            "{address}"
        );
    }
    crate::policy::compile(&policy, &[]).unwrap();
}

#[test]
fn rules_are_cut_down_to_what_this_node_judges() {
    let mut cluster = cluster();
    cluster.policies.apply("p".into(), policy(
        r#"{"rules": [{"name": "wide", "direction": "inbound", "protocol": "any", "external": ["192.168.0.0/16"], "pods": ["10.200.2.0/25"]},
                      {"name": "elsewhere", "direction": "inbound", "protocol": "any", "external": ["172.16.0.0/12"]}]}"#,
    ));
    let planned = with(FILE, &cluster).config.policy();
    let nets = |texts: &[&str]| Some(texts.iter().map(|net| net.parse().unwrap()).collect::<Vec<IpNet>>());
    assert_eq!(planned.rules[1].external, nets(&["192.168.31.0/24"]));
    assert_eq!(planned.rules[1].pods, nets(&["10.200.2.0/25"]));
    assert_eq!(planned.rules[2].external, nets(&[]), "it matches nothing here");
}

#[test]
fn names_of_rules_stay_short_and_differ() {
    let long = "a".repeat(60);
    let mut names = HashSet::from(["p.a".to_owned()]);
    let mut of = |wanted: &str| unique(wanted, &mut names).as_str().to_owned();
    assert_eq!(of("p.b"), "p.b");
    let taken = of("p.a");
    assert!(taken.starts_with("p.a.") && taken.len() == 12, "{taken}");
    let (one, two) = (of(&format!("{long}.one")), of(&format!("{long}.two")));
    assert!(one != two && one.len() == 63 && two.len() == 63, "{one} {two}");
}

#[test]
fn a_host_has_routes_and_a_node_those_to_others() {
    let host = "role: host\nkubernetes: {}\nroutes: {}\n";
    let routes = |file: &str, node: Option<&str>| {
        let config = crate::config::parse(file, None).unwrap().config;
        let routes = plan(&config, &cluster(), node).routes;
        routes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(routes(host, None), @r"
    10.200.2.0/24 via 192.168.31.2 backup 10.9.9.2 (kubernetes b)
    10.200.3.0/24 via 192.168.31.3 backup 10.9.9.3 (kubernetes b2)
    ");
    insta::assert_snapshot!(routes(&format!("{FILE}routes: {{}}\n"), Some("b")), @r"
    10.200.3.0/24 via 192.168.31.3 backup 10.9.9.3 (kubernetes b2)
    ");
}

/// Denies `web` at the pods with the label, allows all pods.
const DENY_AND_ALLOW: &str = r#"{"rules": [
    {"name": "no", "direction": "inbound", "protocol": "tcp", "ports": [80], "action": "deny", "podSelector": {"matchLabels": {"app": "api"}}},
    {"name": "yes", "direction": "inbound", "protocol": "tcp", "ports": [80]}]}"#;

#[test]
fn rules_select_pods_of_other_nodes_too() {
    let mut cluster = cluster();
    cluster.policies.apply("p".into(), policy(DENY_AND_ALLOW));
    cluster.remote_pods.apply("shop/web-2".into(), pod("web", "10.200.3.91"));
    cluster.remote_pods.apply("shop/api-2".into(), pod("api", "10.200.3.92"));
    let planned = with(FILE, &cluster);
    assert_eq!(
        rules(&planned),
        "web: [10.200.2.91/32 10.200.3.91/32]\np.no: [10.200.2.92/32 10.200.3.92/32]\np.yes: all"
    );
    assert_eq!(planned.remarks, Vec::<String>::new());
}

#[test]
fn pods_of_other_nodes_that_are_not_followed_are_denied() {
    let mut cluster = cluster();
    cluster.policies.apply("p".into(), policy(DENY_AND_ALLOW));
    // An address that the other node's network has, and a pod of this node.
    cluster.pods.apply("shop/lent".into(), pod("web", "10.200.3.1"));
    let denied = "pods-of-other-nodes: [10.200.3.0/32 10.200.3.2/31 10.200.3.4/30 10.200.3.8/29 10.200.3.16/28 10.200.3.32/27 \
                  10.200.3.64/26 10.200.3.128/25]";
    let own = with(&FILE.replace("nodeName: b", "nodeName: b, pods: own"), &cluster);
    assert!(rules(&own).starts_with(denied), "{}", rules(&own));
    assert!(own.remarks[0].contains("`kubernetes.pods` is `own`"), "{:?}", own.remarks);
    let mut saved = cluster.clone();
    saved.remote_pods = Default::default();
    let unknown = with(FILE, &saved);
    assert!(rules(&unknown).starts_with(denied), "{}", rules(&unknown));
}

#[test]
fn too_many_pods_of_other_nodes_cost_no_policy_of_this_node() {
    let mut cluster = cluster();
    let ports: Vec<String> = (1..60).map(|port| (2 * port).to_string()).collect();
    let rules_of_policy = format!(
        r#"{{"rules": [{{"name": "r", "direction": "inbound", "protocol": "tcp", "ports": [{}], "podSelector": {{"matchLabels": {{"app": "web"}}}}}}]}}"#,
        ports.join(", ")
    );
    cluster.policies.apply("p".into(), policy(&rules_of_policy));
    let addresses = (0..12_u8).flat_map(|block| (0..250_u8).map(move |host| [10, 201, block, host]));
    for (number, address) in addresses.enumerate() {
        let address = IpAddr::from(address).to_string();
        cluster.remote_pods.apply(format!("shop/web-{number}").into(), pod("web", &address));
    }
    let other = Some(Node {
        addresses: [IpAddr::from([192, 168, 31, 9])].into(),
        networks: ["10.201.0.0/16".parse().unwrap()].into(),
    });
    cluster.nodes.apply("b9".into(), other);
    let planned = with(FILE, &cluster);
    assert_eq!(planned.refused, []);
    let rules = rules(&planned);
    assert!(rules.starts_with("pods-of-other-nodes: [10.200.3.0/24 10.201.0.0/16]"), "{rules:.200}");
    assert!(rules.ends_with("p.r: [10.200.2.91/32]"), "{rules:.200}");
    assert!(planned.remarks[0].contains("iptables rules"), "{:?}", planned.remarks);
}

#[test]
fn too_many_pods_of_a_namespace_close_no_pods_of_others() {
    let mut cluster = cluster();
    cluster.policies.apply("p".into(), policy(DENY_AND_ALLOW));
    let all = r#"{"rules": [{"name": "r", "direction": "inbound", "protocol": "tcp", "ports": [1, 3, 5]}]}"#;
    cluster.namespace_policies.apply("shop/small".into(), policy(all));
    cluster.namespace_policies.apply("greedy/p".into(), policy(all));
    let in_greedy = |address: String| {
        let pod = pod("x", &address).unwrap();
        Some(Pod { namespace: "greedy".into(), ..pod })
    };
    cluster.pods.apply("greedy/own".into(), in_greedy("10.200.2.77".into()));
    for host in 0..=255 {
        for block in 4..8 {
            let address = format!("10.200.{block}.{host}");
            cluster.remote_pods.apply(address.as_str().into(), in_greedy(address));
        }
    }
    cluster.remote_pods.apply("shop/web-2".into(), pod("web", "10.200.3.91"));
    let mut other = node(9).unwrap();
    other.networks = ["10.200.4.0/22".parse().unwrap()].into();
    cluster.nodes.apply("b9".into(), Some(other));
    let file = FILE.replace("nodeName: b", "nodeName: b, namespacePolicies: true");
    let planned = with(&file, &cluster);
    assert_eq!(planned.refused, []);
    assert_eq!(
        rules(&planned),
        "pods-of-other-nodes: [10.200.4.0/22]\nweb: [10.200.2.91/32 10.200.3.91/32]\np.no: [10.200.2.92/32]\np.yes: all\n\
         greedy.p.r: [10.200.2.77/32]\nshop.small.r: [10.200.2.91/32 10.200.2.92/32 10.200.3.91/32]"
    );
    assert_eq!(planned.remarks.len(), 1, "{:?}", planned.remarks);
    assert!(
        planned.remarks[0].contains("pods of namespace greedy")
            && planned.remarks[0].contains("iptables rules")
    );
}

/// Rules with a selector, of which each selected pod costs 1,000 iptables rules.
fn expensive(name: &str, selector: &str) -> Option<Policy> {
    let ports = |from: u16| (0..60).map(|port| (from + port * 7).to_string()).collect::<Vec<_>>().join(", ");
    let hosts: Vec<String> = (1..=40).map(|host| format!("\"192.168.31.{host}/32\"")).collect();
    policy(&format!(
        r#"{{"rules": [{{"name": "{name}", "direction": "inbound", "protocol": "tcp", "ports": [{}], "sourcePorts": [{}],
            "external": [{}], {selector}}}]}}"#,
        ports(1),
        ports(2),
        hosts.join(", ")
    ))
}

#[test]
fn a_plan_with_known_budgets_is_that_of_a_first_start() {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    const BY_POD: &str = r#""podSelector": {"matchLabels": {"app": "api"}}"#;
    const BY_NAMESPACE: &str = r#""namespaceSelector": {"matchLabels": {"tier": "gold"}}"#;
    let here = crate::config::parse(FILE, None).unwrap().config;
    let elsewhere =
        crate::config::parse(&FILE.replace("192.168.31.0/24", "10.99.0.0/16"), None).unwrap().config;
    let mut dice = StdRng::seed_from_u64(1);
    let (mut cluster, mut budgets) = (cluster(), Budgets::default());
    let mut refused = [0; 2];
    for step in 0..400 {
        let name = format!("p{}", dice.random_range(0..4));
        match dice.random_range(0..6) {
            // Of the same generation as the one before it.
            0 => drop(cluster.policies.apply(name.into(), expensive("h", BY_POD))),
            1 => drop(cluster.policies.apply(name.into(), expensive("h", BY_NAMESPACE))),
            2 => drop(cluster.policies.apply(name.into(), expensive("h", r#""pods": ["10.200.2.0/24"]"#))),
            3 => drop(cluster.policies.apply(name.into(), None)),
            4 => {
                let labels = labels(&[("tier", if dice.random() { "gold" } else { "iron" })]);
                cluster.namespaces.apply("shop".into(), Some(labels));
            }
            _ => {
                let many = dice.random();
                for number in 100..140 {
                    let app = if many { "api" } else { "web" };
                    cluster
                        .pods
                        .apply(format!("shop/{number}").into(), pod(app, &format!("10.200.2.{number}")));
                }
            }
        }
        let file = if dice.random_range(0..4) == 0 { &elsewhere } else { &here };
        let planned = plan_with(file, &cluster, Some("b"), &mut budgets, &Quarantine::default());
        budgets.retain(&cluster);
        assert_eq!(planned, plan(file, &cluster, Some("b")), "step {step}");
        refused[usize::from(planned.refused.is_empty())] += 1;
    }
    assert!(refused.iter().all(|count| *count > 50), "{refused:?}");
}

#[test]
fn a_refused_policy_takes_no_name() {
    let mut cluster = cluster();
    for number in 100..140 {
        cluster.pods.apply(format!("shop/{number}").into(), pod("api", &format!("10.200.2.{number}")));
    }
    // Both have a rule named a.b.h.
    let by_label = r#""podSelector": {"matchLabels": {"app": "api"}}"#;
    cluster.policies.apply("a".into(), expensive("b.h", by_label));
    cluster.policies.apply(
        "a.b".into(),
        policy(r#"{"rules": [{"name": "h", "direction": "inbound", "protocol": "icmp"}]}"#),
    );
    let mut budgets = Budgets::default();
    for _ in 0..2 {
        let config = crate::config::parse(FILE, None).unwrap().config;
        let planned = plan_with(&config, &cluster, Some("b"), &mut budgets, &Quarantine::default());
        let names: Vec<&str> = planned.config.rules.iter().map(|rule| rule.name.as_str()).collect();
        assert!(names.contains(&"a.b.h"), "{names:?}");
        assert_eq!(planned.refused.len(), 1);
    }
}
