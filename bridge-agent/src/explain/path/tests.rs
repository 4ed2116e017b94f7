use super::super::{Directory, Offline, ParseError, Protocol, Request, Verdict};
use super::*;
use crate::config;

const FILE: &str = "
role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24], nodes: [192.168.31.17]}
nodePorts: {range: 30000-32767, allow: [30080]}
portPool: {ports: [61001-61100], transparent: {cgroups: [/]}}
rules:
  - {name: api, direction: inbound, external: [192.168.31.67/32], protocol: tcp, ports: [40002]}
  - {name: pooled, direction: outbound, protocol: tcp, ports: [502], sourcePorts: 61001-61100}
  - {name: ssh, direction: outbound, protocol: tcp, ports: [22], sourcePorts: 50000-60000}
  - {name: no-web, direction: inbound, protocol: tcp, ports: [80], action: deny}
";

fn ask(file: &str, from: &str, to: &str, change: impl FnOnce(&mut Request)) -> Explanation {
    let node = Offline::new(&config::parse(file, None).unwrap().config, Vec::new());
    let mut request = Request::new(from, to);
    change(&mut request);
    let question = request.resolve(&()).unwrap();
    node.with_facts(&question, |facts| explain(facts, &question))
}

fn verdict(from: &str, to: &str) -> (Verdict, Option<String>) {
    let explanation = ask(FILE, from, to, |_| ());
    (explanation.verdict, explanation.rule)
}

#[test]
fn rules_decide_by_direction_and_side() {
    let by = |rule: &str| Some(rule.to_owned());
    for (from, to, expected) in [
        ("192.168.31.67", "10.200.1.91:40002", (Verdict::Allow, by("api"))),
        ("192.168.31.68", "10.200.1.91:40002", (Verdict::Deny, None)),
        ("192.168.31.67", "10.200.1.91:80", (Verdict::Deny, by("no-web"))),
        ("10.200.1.91:61001", "192.168.31.67:502", (Verdict::Allow, by("pooled"))),
        ("10.200.1.91:40000", "192.168.31.67:502", (Verdict::Deny, None)),
        ("10.200.1.91", "10.200.1.92:80", (Verdict::Unjudged, None)),
        ("10.200.1.91", "8.8.8.8:53", (Verdict::Unjudged, None)),
        ("192.168.31.67", "192.168.31.17:30080", (Verdict::Allow, by("nodePorts"))),
        ("192.168.31.67", "192.168.31.17:30081", (Verdict::Deny, None)),
        ("192.168.31.67", "192.168.31.17:22", (Verdict::Unjudged, None)),
        ("8.8.8.8", "10.200.1.91:40002", (Verdict::Deny, None)),
    ] {
        assert_eq!(verdict(from, to), expected, "{from} -> {to}");
    }
}

#[test]
fn the_port_of_a_pool_is_the_one_that_counts() {
    let pooled = ask(FILE, "10.200.1.91", "192.168.31.67:502", |_| ());
    assert_eq!((pooled.verdict, pooled.rule.as_deref()), (Verdict::Allow, Some("pooled")));
    let without = FILE.replace("portPool: {ports: [61001-61100], transparent: {cgroups: [/]}}", "");
    let plain = ask(&without, "10.200.1.91", "192.168.31.67:502", |_| ());
    assert_eq!(plain.verdict, Verdict::Deny, "no port of 32768-60999 is in 61001-61100");
    assert_eq!(plain.nearly[0].criterion, crate::policy::reference::Criterion::SourcePorts);
    let some = ask(&without, "10.200.1.91", "192.168.31.67:22", |_| ());
    assert_eq!(some.verdict, Verdict::Depends);
    assert_eq!(some.summary, "DEPENDS on the source port: allowed from 50000-60000");
}

#[test]
fn a_rule_that_misses_by_one_criterion_is_named_with_it() {
    let explanation = ask(FILE, "192.168.31.67", "10.200.1.91:40003", |_| ());
    let [nearly] = &explanation.nearly[..] else { panic!("{:?}", explanation.nearly) };
    assert_eq!((nearly.rule.as_str(), nearly.has.as_str(), nearly.asked.as_str()), ("api", "40002", "40003"));
}

/// The printed rule allows the connection, and neither the next port nor the next address.
#[test]
fn the_remedy_allows_the_connection_and_nothing_beside_it() {
    for (from, to, next_port, next_address) in [
        ("192.168.31.9", "10.200.1.91:81", "10.200.1.91:82", "10.200.1.92:81"),
        ("10.200.1.91", "192.168.31.9:81", "192.168.31.9:82", "192.168.31.10:81"),
        ("192.168.31.9", "192.168.31.17:30081", "192.168.31.17:30082", "192.168.31.17:30083"),
    ] {
        let remedy = ask(FILE, from, to, |_| ()).remedy.unwrap();
        let addition = remedy.config.unwrap();
        let file = match addition.strip_prefix("rules:\n") {
            Some(rules) => format!("{FILE}{rules}"),
            None => FILE.replace("allow: [30080]", addition.lines().nth(1).unwrap().trim()),
        };
        assert_eq!(ask(&file, from, to, |_| ()).verdict, Verdict::Allow, "{file}");
        assert_eq!(ask(&file, from, next_port, |_| ()).verdict, Verdict::Deny, "{file}");
        assert_eq!(ask(&file, from, next_address, |_| ()).verdict, Verdict::Deny, "{file}");
        if let Some(policy) = remedy.policy {
            assert!(config::is_manifest(&policy), "{policy}");
            assert_eq!(config::manifests(&policy, "p".as_ref()).unwrap().policies[0].1.len(), 1);
        }
    }
}

#[test]
fn a_service_is_judged_by_the_address_behind_it() {
    let behind = |backend: &str| {
        ask(FILE, "192.168.31.67", "172.16.0.10:443", |request| request.backend = Some(backend.into()))
    };
    assert_eq!(behind("10.200.1.91:40002").verdict, Verdict::Allow);
    let denied = behind("10.200.1.91:40003");
    assert_eq!(
        (denied.verdict, denied.stages.last().unwrap().seen.as_str()),
        (Verdict::Deny, "none: dropped")
    );
    let to_lan = ask(FILE, "10.200.1.91:61001", "172.16.0.10:443", |request| {
        request.backend = Some("192.168.31.67:502".into());
    });
    assert_eq!((to_lan.verdict, to_lan.rule.as_deref()), (Verdict::Allow, Some("pooled")));
}

#[test]
fn audit_mode_is_named() {
    let audit = FILE.replace("rules:", "enforcement: {mode: audit}\nrules:");
    assert_eq!(ask(&audit, "192.168.31.68", "10.200.1.91:1", |_| ()).verdict, Verdict::Audit);
}

#[test]
fn a_rule_in_audit_mode_is_named_and_decides_nothing() {
    let file = format!(
        "{FILE}  - {{name: tried, direction: inbound, protocol: tcp, ports: [8443], mode: audit}}\n  - {{name: kept, direction: \
         inbound, external: [192.168.31.67/32], protocol: tcp, ports: [40002], action: deny, mode: audit}}\n"
    );
    let stage = |explanation: &Explanation| {
        let stage = explanation.stages.iter().find(|stage| stage.name == "audited rules");
        stage.map(|stage| stage.seen.clone()).unwrap_or_default()
    };
    let denied = ask(&file, "192.168.31.9", "10.200.1.91:8443", |_| ());
    assert_eq!((denied.verdict, stage(&denied).as_str()), (Verdict::Deny, "tried would allow it"));
    let remedy = denied.remedy.unwrap().text;
    assert!(remedy.contains("`mode: enforce`") && remedy.contains("tried"), "{remedy}");
    let allowed = ask(&file, "192.168.31.67", "10.200.1.91:40002", |_| ());
    assert_eq!((allowed.verdict, stage(&allowed).as_str()), (Verdict::Allow, "kept would deny it"));
    assert_eq!(stage(&ask(&file, "192.168.31.9", "10.200.1.91:81", |_| ())), "");
}

/// The hook of the pool sees the address of a Service, not the one behind it.
#[test]
fn a_connection_to_a_service_gets_no_port_of_the_pool() {
    let to_service = ask(FILE, "10.200.1.91", "172.16.0.10:443", |request| {
        request.backend = Some("192.168.31.67:502".into());
    });
    assert_eq!(to_service.verdict, Verdict::Deny, "no port of 32768-60999 is in 61001-61100");
    let pool = to_service.stages.iter().find(|stage| stage.name == "pool").unwrap();
    assert!(pool.why.contains("172.16.0.10 is no destination of the pool"), "{pool:?}");
}

/// Pods and Services of a cluster.
struct Names;

impl Directory for Names {
    fn pod(&self, _: &str, name: &str) -> Option<Vec<IpAddr>> {
        match name {
            "two" => Some(vec!["10.200.1.1".parse().unwrap(), "10.200.1.2".parse().unwrap()]),
            "dual" => Some(vec!["10.200.1.1".parse().unwrap(), "fd00::1".parse().unwrap()]),
            "gone" => Some(Vec::new()),
            _ => None,
        }
    }

    fn service(&self, _: &str, name: &str) -> Option<Vec<(IpAddr, u16)>> {
        let address = IpAddr::from([10, 96, 0, 7]);
        match name {
            "web" => Some(vec![(address, 80)]),
            "dns" => Some(vec![(address, 53), (address, 9153)]),
            _ => Some(Vec::new()),
        }
    }
}

#[test]
fn a_service_is_its_address_and_its_one_port() {
    let request = |to: &str| Request::new("10.200.1.91", to);
    let to = |to: &str| {
        let question = request(to).resolve(&Names)?;
        Ok::<_, ParseError>((question.destination, question.destination_port))
    };
    let address = IpAddr::from([10, 96, 0, 7]);
    assert_eq!(to("service/shop/web"), Ok((address, 80)));
    assert_eq!(to("svc/shop/dns:9153"), Ok((address, 9153)));
}

#[test]
fn bad_questions_have_a_remedy() {
    let question = |from: &str, to: &str| Request::new(from, to).resolve(&Names);
    for (from, to, part) in [
        ("192.168.31.67", "10.200.1.91", "write 10.200.1.91:PORT"),
        ("192.168.31.67", "10.200.1.91:0", "from 1 to 65535"),
        ("192.168.31.67", "fd00::1", "different IP versions"),
        ("here", "10.200.1.91:1", "is no address"),
        ("pod/a/gone", "10.200.1.91:1", "kubectl get pods"),
        ("pod/a/two", "192.168.31.1:1", "10.200.1.1, 10.200.1.2"),
        ("pod/a/offline", "10.200.1.91:1", "write the address"),
        ("pod/a", "10.200.1.91:1", "pod/NAMESPACE/NAME"),
        ("service/a/b", "10.200.1.91:1", "--backend"),
        ("10.200.1.91", "service/shop/dns", "write one of them, such as service/shop/dns:53"),
    ] {
        let error = question(from, to).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{from} -> {to}: {error}");
    }
    let question = question("pod/a/dual", "[fd31::1]:80").unwrap();
    assert_eq!(question.source.to_string(), "fd00::1", "the address of the other end's version");
    let none = Request { protocol: Some(Protocol(59)), ..Request::new("fd31::1", "fd20::1") };
    assert_eq!(none.resolve(&()), Err(ParseError::NoNextHeader));
    let two = Request { source_port: Some(5), ..Request::new("192.168.31.67:6", "10.200.1.91:1") };
    assert_eq!(two.resolve(&()), Err(ParseError::TwoPorts(6, 5)));
}
