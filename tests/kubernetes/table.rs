//! Policies that are right, wrong or odd, and the answer to each: refused by the API server, refused by the agent in the
//! condition `Accepted`, or accepted with nothing dropped. None is accepted though wrong.

mod objects;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use bridge_agent::config::{PolicyScope, check_policy};
use bridge_agent::kubernetes::reference;
use bridge_lab::kubernetes::{ApiServer, User, deployed};
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{DEADLINE, cluster, on_node};

const POLICIES: &str = "/apis/bridge.lan/v1alpha1/bridgepolicies";

/// The answer to an object.
enum Answer {
    /// The API server refuses it, with this text.
    Server(&'static str),
    /// The admission policy refuses it; without that, the agent, with this text in the condition.
    Admission(&'static str),
    /// The agent refuses it, with this text in the condition.
    Agent(&'static str),
    /// It is accepted, and stored as it was written.
    Accepted,
}

use Answer::{Accepted, Admission, Agent, Server};
use objects::OBJECTS;

const PORTS: &str = "write `ports`, such as ports: [40002]; for all of them: ports: [\"1-65535\"]";
const NETWORK: &str = "not a network: write ADDRESS/LENGTH with no bits set after LENGTH";
const ORDER: &str = "a range is \"first-last\", its ends in order";
const EMPTY: &str = "an empty selector selects everything";
const NO_HOSTS: &str = "no forwarded packet has such an address";
const PORT: &str = "should match";

/// The keys of a rule beside its name, and the answer.
const RULES: &[(&str, Answer)] = &[
    // Right.
    ("direction: inbound, protocol: tcp, ports: [80]", Accepted),
    ("direction: inbound, protocol: tcp, ports: [80, '8000-8100', '443']", Accepted),
    ("direction: outbound, protocol: udp, ports: ['1-65535']", Accepted),
    ("direction: inbound, protocol: sctp, ports: [1], sourcePorts: ['61001-61100']", Accepted),
    ("direction: inbound, protocol: icmp", Accepted),
    ("direction: inbound, protocol: any", Accepted),
    ("direction: inbound, protocol: any, ports: [53]", Accepted),
    ("direction: inbound, protocol: any, action: deny", Accepted),
    (
        "direction: inbound, protocol: any, external: [192.168.31.0/24, 'fd31::/64', 192.168.31.67/32]",
        Accepted,
    ),
    ("direction: inbound, protocol: any, pods: [10.200.1.0/24]", Accepted),
    ("direction: inbound, protocol: any, external: [0.0.0.0/0]", Accepted),
    ("direction: inbound, protocol: any, podSelector: {matchLabels: {app: api}}", Accepted),
    ("direction: inbound, protocol: any, podSelector: {matchLabels: {app: ''}}", Accepted),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {app.kubernetes.io/name: a_b.c-d}}",
        Accepted,
    ),
    ("direction: inbound, protocol: any, namespaceSelector: {matchLabels: {tier: gold}}", Accepted),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: In, values: [b, c]}, {key: d, operator: Exists}]}",
        Accepted,
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {app: api}}, namespaceSelector: {matchExpressions: [{key: a, operator: DoesNotExist}]}",
        Accepted,
    ),
    // Audit mode.
    ("direction: inbound, protocol: any, mode: audit", Accepted),
    ("direction: inbound, protocol: any, mode: enforce, action: deny", Accepted),
    ("direction: inbound, protocol: any, mode: Audit", Server("Unsupported value: \"Audit\"")),
    ("direction: inbound, protocol: any, mode: dry-run", Server("Unsupported value: \"dry-run\"")),
    ("direction: inbound, protocol: any, mode: null", Server("Unsupported value: null")),
    ("direction: inbound, protocol: any, audit: true", Admission("unknown key `audit`")),
    // Ports that are missing, misspelt or null.
    ("direction: inbound, protocol: tcp", Server(PORTS)),
    ("direction: inbound, protocol: udp, sourcePorts: [53]", Server(PORTS)),
    ("direction: inbound, protocol: sctp", Server(PORTS)),
    ("direction: inbound, protocol: tcp, port: [80]", Server(PORTS)),
    ("direction: inbound, protocol: tcp, Ports: [80]", Server(PORTS)),
    ("direction: inbound, protocol: tcp, ports: null", Server(PORTS)),
    (
        "direction: inbound, protocol: tcp, ports: [80], sourcePorts: null",
        Admission("`sourcePorts` has no value"),
    ),
    ("direction: inbound, protocol: any, external: null", Admission("`external` has no value")),
    ("direction: inbound, protocol: any, pods: null", Admission("`pods` has no value")),
    ("direction: inbound, protocol: any, podSelector: null", Admission("`podSelector` has no value")),
    (
        "direction: inbound, protocol: any, namespaceSelector: null",
        Admission("`namespaceSelector` has no value"),
    ),
    ("direction: inbound, protocol: any, podSelector: {matchLabels: null}", Server(EMPTY)),
    ("direction: inbound, protocol: any, podSelector: {matchExpressions: null}", Server(EMPTY)),
    ("direction: inbound, protocol: any, action: null", Server("Unsupported value: null")),
    ("direction: null, protocol: any", Server("direction")),
    ("direction: inbound, protocol: null", Server("protocol")),
    ("direction: inbound, protocol: tcp, ports: [null]", Server("ports[0]")),
    ("direction: inbound, protocol: any, external: [null]", Server("external[0]")),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {app: null}}",
        Server("at least 1 properties"),
    ),
    // Unknown keys.
    (
        "direction: inbound, protocol: tcp, ports: [80], sourceports: [53]",
        Admission("did you mean `sourcePorts`?"),
    ),
    (
        "direction: inbound, protocol: any, podselector: {matchLabels: {a: b}}",
        Admission("did you mean `podSelector`?"),
    ),
    (
        "direction: inbound, protocol: any, externals: [192.168.31.67/32]",
        Admission("did you mean `external`?"),
    ),
    ("direction: inbound, protocol: any, cidr: [192.168.31.67/32]", Admission("unknown key `cidr`")),
    ("direction: inbound, protocol: tcp, ports: [80], endPort: 90", Admission("unknown key `endPort`")),
    ("direction: inbound, protocol: any, podSelector: {matchLabel: {app: api}}", Server(EMPTY)),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabel: {app: api}, matchExpressions: [{key: a, operator: Exists}]}",
        Admission("did you mean `matchLabels`?"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: Exists, value: b}]}",
        Admission("did you mean `values`?"),
    ),
    // Forms of ports.
    ("direction: inbound, protocol: tcp, ports: []", Server("at least 1 items")),
    ("direction: inbound, protocol: tcp, ports: [0]", Server("greater than or equal to 1")),
    ("direction: inbound, protocol: tcp, ports: [65536]", Server("less than or equal to 65535")),
    ("direction: inbound, protocol: tcp, ports: [-1]", Server("greater than or equal to 1")),
    ("direction: inbound, protocol: tcp, ports: ['80:90']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['80,443']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['80 - 90']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['010']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['80-090']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['0x50']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['65536']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['1-65536']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['0-90']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: [http]", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: [80.5]", Server("ports[0]")),
    ("direction: inbound, protocol: tcp, ports: 80", Server("must be of type array")),
    ("direction: inbound, protocol: tcp, ports: ['90-80']", Server(ORDER)),
    ("direction: inbound, protocol: tcp, ports: [80], sourcePorts: ['9-1']", Server(ORDER)),
    ("direction: inbound, protocol: tcp, ports: ['80-90', 85]", Agent("overlaps 80-90")),
    ("direction: inbound, protocol: tcp, ports: [80, 80]", Agent("in this list twice")),
    ("direction: inbound, protocol: icmp, ports: [80]", Server("ICMP has no ports")),
    ("direction: inbound, protocol: icmp, sourcePorts: [80]", Server("ICMP has no ports")),
    // Forms of networks.
    ("direction: inbound, protocol: any, external: []", Server("at least 1 items")),
    ("direction: inbound, protocol: any, external: [192.168.31.67]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [192.168.31.67/24]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [192.168.31.300/24]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [192.168.031.067/32]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [192.168.31.0/024]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [10.0.0.0/33]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: ['fd31::1/64']", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: ['::ffff:10.0.0.0/104']", Server(NETWORK)),
    ("direction: inbound, protocol: any, pods: ['10.0.0.0/8 ']", Server(NETWORK)),
    ("direction: inbound, protocol: any, pods: [lan]", Server(NETWORK)),
    (
        "direction: inbound, protocol: any, external: [192.168.31.67/32], pods: ['fd20:1::/64']",
        Agent("its external side is IPv4 only, its pods IPv6 only"),
    ),
    // Selectors.
    ("direction: inbound, protocol: any, podSelector: {}", Server(EMPTY)),
    ("direction: inbound, protocol: any, namespaceSelector: {}", Server(EMPTY)),
    ("direction: inbound, protocol: any, podSelector: {matchLabels: {}}", Server("at least 1 properties")),
    ("direction: inbound, protocol: any, podSelector: {matchExpressions: []}", Server("at least 1 items")),
    (
        "direction: inbound, protocol: any, pods: [10.200.1.0/24], podSelector: {matchLabels: {a: b}}",
        Server("keep one: `pods`"),
    ),
    (
        "direction: inbound, protocol: any, pods: [10.200.1.0/24], namespaceSelector: {matchLabels: {a: b}}",
        Server("keep one: `pods`"),
    ),
    ("direction: inbound, protocol: any, podSelector: {matchLabels: {app: 'not a label!'}}", Server(PORT)),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {'not a key!': x}}",
        Agent("is not a label key"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: '', operator: NotIn, values: [a]}]}",
        Server(PORT),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: In}]}",
        Server("In and NotIn need `values`"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
        Server("Exists and DoesNotExist take none"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}",
        Server("Unsupported value: \"Gt\""),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: In, values: [' b']}]}",
        Server(PORT),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: In, values: null}]}",
        Server("In and NotIn need `values`"),
    ),
    // More of each.
    ("direction: inbound, protocol: tcp, ports: ['80-80']", Accepted),
    ("direction: inbound, protocol: tcp, ports: ['80-90', '91-100']", Accepted),
    ("direction: inbound, protocol: tcp, ports: [80, '80']", Agent("in this list twice")),
    ("direction: inbound, protocol: tcp, ports: ['1-65535', 80]", Agent("overlaps")),
    ("direction: inbound, protocol: tcp, ports: [true]", Server("ports[0]")),
    ("direction: inbound, protocol: tcp, ports: [[80]]", Server("ports[0]")),
    ("direction: inbound, protocol: tcp, ports: {80: true}", Server("must be of type array")),
    ("direction: inbound, protocol: tcp, ports: ['+80']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['80-']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['-80']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['80-90-100']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['80–90']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['８０']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: [\"80\\n\"]", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: ['1e3']", Server(PORT)),
    ("direction: inbound, protocol: tcp, ports: [1e3]", Server("either a string or integer")),
    (
        "direction: inbound, protocol: tcp, ports: [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79, 81, 83, 85, 87, 89, 91, 93, 95, 97, 99, 101, 103, 105, 107, 109, 111, 113, 115, 117, 119]",
        Accepted,
    ),
    (
        "direction: inbound, protocol: tcp, ports: [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63, 65, 67, 69, 71, 73, 75, 77, 79, 81, 83, 85, 87, 89, 91, 93, 95, 97, 99, 101, 103, 105, 107, 109, 111, 113, 115, 117, 119, 121]",
        Server("at most 60 items"),
    ),
    ("direction: inbound, protocol: any, sourcePorts: [61001]", Accepted),
    ("direction: inbound, protocol: icmp, ports: null", Admission("`ports` has no value")),
    ("direction: inbound, protocol: any, external: ['::/0', 0.0.0.0/0]", Accepted),
    ("direction: inbound, protocol: any, external: ['FD31::/64']", Accepted),
    ("direction: inbound, protocol: any, external: ['fd31:0:0:0::/64']", Accepted),
    ("direction: inbound, protocol: any, external: ['fe80::%eth0/64']", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [10.0.0/8]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [127.0.0.0/8]", Agent(NO_HOSTS)),
    ("direction: inbound, protocol: any, external: [192.168.31.0/24, 224.0.0.0/4]", Agent(NO_HOSTS)),
    ("direction: inbound, protocol: any, external: ['fe80::/10']", Agent(NO_HOSTS)),
    ("direction: inbound, protocol: any, external: [255.255.255.255/32]", Agent(NO_HOSTS)),
    ("direction: inbound, protocol: any, pods: ['::1/128']", Agent(NO_HOSTS)),
    ("direction: outbound, protocol: any, external: [169.254.169.254/32], action: deny", Accepted),
    ("direction: inbound, protocol: any, external: ['0x0a.0.0.0/8']", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [10.0.0.0/+8]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [10.0.0.0/255.0.0.0]", Server(NETWORK)),
    ("direction: inbound, protocol: any, external: [192.168.31.0/24, 192.168.31.0/24]", Accepted),
    ("direction: inbound, protocol: any, external: 192.168.31.0/24", Server("must be of type array")),
    (
        "direction: inbound, protocol: any, external: [192.168.0.0/24, 192.168.1.0/24, 192.168.2.0/24, 192.168.3.0/24, 192.168.4.0/24, 192.168.5.0/24, 192.168.6.0/24, 192.168.7.0/24, 192.168.8.0/24, 192.168.9.0/24, 192.168.10.0/24, 192.168.11.0/24, 192.168.12.0/24, 192.168.13.0/24, 192.168.14.0/24, 192.168.15.0/24, 192.168.16.0/24, 192.168.17.0/24, 192.168.18.0/24, 192.168.19.0/24, 192.168.20.0/24, 192.168.21.0/24, 192.168.22.0/24, 192.168.23.0/24, 192.168.24.0/24, 192.168.25.0/24, 192.168.26.0/24, 192.168.27.0/24, 192.168.28.0/24, 192.168.29.0/24, 192.168.30.0/24, 192.168.31.0/24, 192.168.32.0/24, 192.168.33.0/24, 192.168.34.0/24, 192.168.35.0/24, 192.168.36.0/24, 192.168.37.0/24, 192.168.38.0/24, 192.168.39.0/24, 192.168.40.0/24]",
        Server("at most 40 items"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {a: 5}}",
        Server("must be of type string"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {a: true}}",
        Server("must be of type string"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {a: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb}}",
        Server("may not be more than 63 bytes"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {a/b/c: x}}",
        Agent("is not a label key"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {Example.com/a: x}}",
        Agent("is not a label key"),
    ),
    ("direction: inbound, protocol: any, podSelector: {matchLabels: {a/: x}}", Agent("is not a label key")),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk: x}}",
        Agent("is not a label key"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: {k0: x, k1: x, k2: x, k3: x, k4: x, k5: x, k6: x, k7: x, k8: x, k9: x, k10: x, k11: x, k12: x, k13: x, k14: x, k15: x, k16: x}}",
        Server("at most 16 items"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchLabels: [app, api]}",
        Server("must be of type object"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: exists}]}",
        Server("Unsupported value: \"exists\""),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}",
        Server("at least 1 items"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: In, values: ['']}]}",
        Accepted,
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a, operator: In, values: [1]}]}",
        Server("must be of type string"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{operator: Exists}]}",
        Server("key: Required value"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: [{key: a}]}",
        Server("operator: Required value"),
    ),
    (
        "direction: inbound, protocol: any, podSelector: {matchExpressions: {key: a, operator: Exists}}",
        Server("must be of type array"),
    ),
    ("direction: inbound, protocol: any, podSelector: app=api", Server("must be of type object")),
    ("direction: inbound, protocol: any, namespaceSelector: {name: shop}", Server(EMPTY)),
    ("direction: inbound, protocol: any, namespace: shop", Admission("unknown key `namespace`")),
    ("direction: inbound, protocol: any, namespaces: [shop]", Admission("unknown key `namespaces`")),
    ("direction: ingress, protocol: any", Server("Unsupported value: \"ingress\"")),
    ("direction: '', protocol: any", Server("Unsupported value: \"\"")),
    ("direction: inbound, protocol: any, action: Deny", Server("Unsupported value: \"Deny\"")),
    ("direction: inbound, protocol: [tcp, udp], ports: [53]", Server("must be of type string")),
    ("direction: inbound, protocol: icmpv6", Server("Unsupported value: \"icmpv6\"")),
    // The rest.
    ("direction: sideways, protocol: tcp, ports: [80]", Server("Unsupported value: \"sideways\"")),
    ("protocol: tcp, ports: [80]", Server("direction: Required value")),
    ("direction: inbound", Server("protocol: Required value")),
    ("direction: inbound, protocol: TCP, ports: [80]", Server("Unsupported value: \"TCP\"")),
    ("direction: inbound, protocol: 6, ports: [80]", Server("must be of type string")),
    ("direction: inbound, protocol: any, action: permit", Server("Unsupported value: \"permit\"")),
];

fn object(name: &str, keys: &str) -> Result<Value> {
    let mut object: Value = serde_saphyr::from_str(keys).with_context(|| keys.to_owned())?;
    object["apiVersion"] = "bridge.lan/v1alpha1".into();
    object["kind"] = "BridgePolicy".into();
    object["metadata"] = json!({ "name": name });
    Ok(object)
}

/// Creates an object without a client that would look at the schema, and returns the complaint of the API server.
fn create(server: &ApiServer, object: &Value) -> Option<String> {
    create_at(server, POLICIES, object)
}

fn create_at(server: &ApiServer, path: &str, object: &Value) -> Option<String> {
    let error = format!("{:#}", server.request(User::Admin, "POST", path, Some(object)).err()?);
    let status = error.find('{').and_then(|at| serde_json::from_str::<Value>(&error[at..]).ok());
    Some(status.and_then(|status| Some(status["message"].as_str()?.to_owned())).unwrap_or(error))
}

#[test]
fn every_object_is_refused_with_its_remedy_or_means_what_it_says() -> Result<()> {
    let (lab, server) = cluster()?;
    // With it, the agent sees no misspelt key.
    admission_becomes(&server, true)?;
    server.kubectl(&["delete", "-f", &deployed("admission.yaml")], "")?;
    admission_becomes(&server, false)?;
    let node = on_node(&lab, &server)?;
    let mut wrong = Vec::new();
    let mut stored = BTreeMap::new();
    for (number, (keys, answer)) in rows().enumerate() {
        let name = format!("p{number}");
        let object = object(&name, &keys)?;
        match (create(&server, &object), answer) {
            (Some(said), Server(expected)) if said.contains(expected) => {}
            (Some(said), Server(expected)) => wrong.push(format!("{keys}: wanted {expected:?}: {said}")),
            (Some(said), _) => wrong.push(format!("{keys}: the API server refuses it: {said}")),
            (None, Server(expected)) => wrong.push(format!("{keys}: accepted, wanted {expected:?}")),
            (None, Admission(_) | Agent(_) | Accepted) => drop(stored.insert(name, (keys, object, answer))),
        }
    }
    for (name, (keys, object, answer)) in &stored {
        let path = format!("{POLICIES}/{name}");
        let policy = eventually(DEADLINE, || {
            let policy = server.request(User::Admin, "GET", &path, None).ok()?;
            policy["status"]["conditions"].is_array().then_some(policy)
        });
        let policy = policy.with_context(|| format!("{keys}: no condition:\n{}", node.log()))?;
        let conditions = policy["status"]["conditions"].as_array().context("conditions")?;
        let accepted = conditions.iter().find(|one| one["type"] == "Accepted").context("Accepted")?;
        let message = accepted["message"].as_str().unwrap_or_default();
        match answer {
            Agent(expected) | Admission(expected)
                if accepted["status"] == "False" && message.contains(expected) => {}
            Accepted if accepted["status"] == "True" => {
                // Defaults are added, nothing is dropped or changed.
                let mut spec = object["spec"].clone();
                for rule in spec["rules"].as_array_mut().into_iter().flatten() {
                    if rule.get("action").is_none() {
                        rule["action"] = "allow".into();
                    }
                }
                if policy["spec"] != spec {
                    wrong.push(format!("{keys}: stored as {}", policy["spec"]));
                }
            }
            _ => wrong.push(format!("{keys}: {accepted}")),
        }
    }
    ensure!(stored.len() > 20, "{}", stored.len());
    ensure!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), RULES.len() + OBJECTS.len(), wrong.join("\n"));
    Ok(())
}

fn rows() -> impl Iterator<Item = (String, &'static Answer)> {
    let rules = RULES.iter().map(|(keys, it)| (format!("spec: {{rules: [{{name: r, {keys}}}]}}"), it));
    rules.chain(OBJECTS.iter().map(|(keys, answer)| ((*keys).to_owned(), answer)))
}

fn admission_becomes(server: &ApiServer, active: bool) -> Result<()> {
    let unknown = object("first", "spec: {rules: [{name: r, direction: inbound, protocol: any, cidr: []}]}")?;
    eventually(DEADLINE, || {
        let refused = create(server, &unknown).is_some();
        refused.then_some(()).or_else(|| server.delete(&format!("{POLICIES}/first")).ok().map(drop))?;
        (refused == active).then_some(())
    })
    .with_context(|| format!("the admission policy should be active: {active}"))
}

#[test]
fn the_admission_policy_refuses_unknown_and_empty_keys_at_once() -> Result<()> {
    let (_lab, server) = cluster()?;
    admission_becomes(&server, true)?;
    let mut wrong = Vec::new();
    for (number, (keys, answer)) in rows().enumerate() {
        let said = create(&server, &object(&format!("p{number}"), &keys)?);
        match (answer, said) {
            (Admission(_), Some(said)) if said.contains("unknown key") || said.contains("no value") => {}
            (Admission(_), said) => wrong.push(format!("{keys}: {said:?}")),
            (Accepted, Some(said)) => wrong.push(format!("{keys}: {said}")),
            _ => {}
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The largest policy that the schema takes is not too expensive.
    let rule = |number: usize| {
        json!({
            "name": format!("rule-{number}"), "direction": "inbound", "protocol": "tcp", "ports": [number + 1],
            "sourcePorts": ["1024-65535"], "external": ["192.168.31.0/24"], "action": "deny",
            "podSelector": {"matchLabels": {"app": "api"}}, "namespaceSelector": {"matchLabels": {"tier": "gold"}},
        })
    };
    let mut large = object("large", "spec: {rules: []}")?;
    large["spec"]["rules"] = (0..4096).map(rule).collect();
    let said = create(&server, &large);
    ensure!(said.is_none(), "{said:?}");
    large["spec"]["rules"].as_array_mut().context("rules")?.push(rule(4096));
    let said = create(&server, &large).unwrap_or_default();
    ensure!(said.contains("at most 4096 items"), "{said}");
    Ok(())
}

#[test]
fn a_policy_of_a_namespace_has_the_schema_of_one_of_the_cluster_and_its_own_pods() -> Result<()> {
    const PATH: &str = "/apis/bridge.lan/v1alpha1/namespaces/shop/bridgenamespacepolicies";
    let (_lab, server) = cluster()?;
    admission_becomes(&server, true)?;
    server.kubectl(&["delete", "-f", &deployed("admission.yaml")], "")?;
    admission_becomes(&server, false)?;
    let (mut wrong, mut foreign) = (Vec::new(), 0);
    for (number, (keys, answer)) in rows().enumerate() {
        let mut object = object(&format!("p{number}"), &keys)?;
        object["kind"] = "BridgeNamespacePolicy".into();
        object["metadata"]["namespace"] = "shop".into();
        let said = create_at(&server, PATH, &object);
        let checked = check_policy(&object.to_string(), PolicyScope::Namespace);
        let names = |key: &str| {
            let rules = object["spec"]["rules"].as_array().into_iter().flatten();
            rules.filter_map(|rule| rule.get(key)).any(|value| !value.is_null())
        };
        let is_foreign = names("pods") || names("namespaceSelector");
        match (answer, said) {
            (Accepted | Admission(_) | Agent(_), Some(said))
                if is_foreign && said.contains("its own namespace") =>
            {
                foreign += 1;
                ensure!(checked.is_err(), "{keys}: the agent takes it");
            }
            (Server(_), Some(_)) => {}
            (Accepted, None) if !is_foreign && checked.is_ok() => {}
            (Admission(_) | Agent(_), None) if !is_foreign && checked.is_err() => {}
            (_, said) => wrong.push(format!("{keys}: {said:?}, {:?}", checked.err())),
        }
    }
    ensure!(foreign >= 4 && wrong.is_empty(), "{foreign} of others; {}", wrong.join("\n"));
    Ok(())
}

#[test]
fn the_examples_of_the_reference_are_accepted_and_kept() -> Result<()> {
    let (_lab, server) = cluster()?;
    let of_namespace = "/apis/bridge.lan/v1alpha1/namespaces/shop/bridgenamespacepolicies";
    let mut applied = 0;
    for (kind, path, scope) in [
        ("BridgePolicy", POLICIES, PolicyScope::Cluster),
        ("BridgeNamespacePolicy", of_namespace, PolicyScope::Namespace),
    ] {
        let keys_of = |yaml: &str| serde_saphyr::from_str::<Value>(yaml).with_context(|| yaml.to_owned());
        let of_rules = reference::EXAMPLES
            .iter()
            .filter(|(field, _)| scope == PolicyScope::Cluster || reference::is_of_namespace(field));
        let of_rules = of_rules.map(|(field, example)| {
            let mut rule = keys_of(reference::RULE)?;
            for (key, value) in keys_of(example)?.as_object().context("keys of a rule")? {
                rule[key] = value.clone();
            }
            anyhow::Ok((format!("rules[].{field}"), json!({"rules": [rule]})))
        });
        let of_spec = reference::OF_SPEC.iter().map(|(field, example)| {
            let mut spec = json!({"rules": [keys_of(reference::RULE)?]});
            for (key, value) in keys_of(example)?.as_object().context("keys of a spec")? {
                spec[key] = value.clone();
            }
            anyhow::Ok(((*field).to_owned(), spec))
        });
        for (number, example) in of_rules.chain(of_spec).enumerate() {
            let (field, spec): (String, Value) = example?;
            let mut policy = object(&format!("example-{number}"), "{}")?;
            (policy["kind"], policy["spec"]) = (kind.into(), spec);
            let said = create_at(&server, path, &policy);
            ensure!(said.is_none(), "{kind} {field}: {policy}: {said:?}");
            let checked = check_policy(&policy.to_string(), scope);
            ensure!(checked.is_ok(), "{kind} {field}: {policy}: {checked:?}");
            applied += 1;
        }
    }
    ensure!(applied > 35, "{applied}");
    // An example of each status, of which the API server drops nothing.
    let node = json!({"apiVersion": "bridge.lan/v1alpha1", "kind": "BridgeNode", "metadata": {"name": "b"}, "spec": {}});
    let nodes = "/apis/bridge.lan/v1alpha1/bridgenodes";
    server.request(User::Admin, "POST", nodes, Some(&node))?;
    for (kind, path) in [
        ("BridgePolicy", format!("{POLICIES}/example-0")),
        ("BridgeNamespacePolicy", format!("{of_namespace}/example-0")),
        ("BridgeNode", format!("{nodes}/b")),
    ] {
        let status = reference::example_status(kind);
        server.request(User::Admin, "PATCH", &format!("{path}/status"), Some(&json!({"status": status})))?;
        let stored = server.request(User::Admin, "GET", &path, None)?;
        ensure!(stored["status"] == status, "{kind}: {} is stored as {}", status, stored["status"]);
    }
    Ok(())
}
