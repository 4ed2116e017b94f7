use super::*;

/// As kubeadm writes it.
const KUBEADM: &str = "\
apiVersion: v1
kind: Pod
metadata:
  annotations:
    kubeadm.kubernetes.io/kube-apiserver.advertise-address.endpoint: 192.168.31.17:6443
  name: kube-apiserver
spec:
  # ours: keep
  containers:
  - command:
    - kube-apiserver
    - --advertise-address=192.168.31.17   # the LAN
    - --service-cluster-ip-range=10.96.0.0/12
    - --tls-private-key-file=/etc/kubernetes/pki/apiserver.key # last
    # a comment behind the list
    image: registry.k8s.io/kube-apiserver:v1.33.1
    livenessProbe: {httpGet: {host: 192.168.31.17, path: /livez, port: 6443, scheme: HTTPS}}
    name: kube-apiserver
status: {}
";

fn path() -> &'static Path {
    Path::new("kube-apiserver.yaml")
}

fn range(first: u16, last: u16) -> PortRange {
    PortRange { first, last }
}

fn set(text: &str) -> String {
    with_range(text, path(), range(31000, 32000)).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn refusal(text: &str) -> String {
    match (read(text, path()), with_range(text, path(), range(31000, 32000))) {
        (Err(error), _) | (_, Err(error)) => error.to_string(),
        (Ok(found), Ok(changed)) => panic!("{found:?}\n{changed}"),
    }
}

/// A manifest whose list of arguments is `list`, as block or flow.
fn with(list: &str) -> String {
    format!("spec:\n  containers:\n  - name: api\n    command:{list}\n    image: x # y\n")
}

#[test]
fn an_absent_flag_is_the_default_and_is_added_behind_the_last_one() {
    assert_eq!(read(KUBEADM, path()).unwrap().range, DEFAULT);
    let last = "apiserver.key # last\n";
    let expected = KUBEADM.replace(last, &format!("{last}    - --service-node-port-range=31000-32000\n"));
    assert_eq!(set(KUBEADM), expected);
    // The second change is one of the value.
    let again = with_range(&expected, path(), range(1, 65535)).unwrap();
    assert_eq!(again, expected.replace("31000-32000", "1-65535"));
}

#[test]
fn a_flag_is_changed_where_it_is_and_as_it_is_written() {
    for (before, after) in [
        (
            "\n    - kube-apiserver\n    - --service-node-port-range=1-2 # why\n    - --z=1",
            "--service-node-port-range=31000-32000 # why\n",
        ),
        (
            "\n      - \"kube-apiserver\"\n      - \"--service-node-port-range=1-2\"\n      - --z",
            "\n      - \"--service-node-port-range=31000-32000\"\n",
        ),
        (
            "\n    - '/usr/local/bin/kube-apiserver'\n    - '--service-node-port-range=1-2'",
            "\n    - '--service-node-port-range=31000-32000'\n",
        ),
        (
            "\n    - kube-apiserver\n    - --service-node-port-range\n    - 1-2 # value\n    - --z=1",
            "-range\n    - 31000-32000 # value\n    - --z=1",
        ),
        (
            "\n    - kube-apiserver\n    - --service-node-port-range\n    - \"30000\"",
            "-range\n    - \"31000-32000\"\n",
        ),
        (
            "\n    - kube-apiserver\n    -   --service_node_port_range=30000+5",
            "\n    -   --service-node-port-range=31000-32000\n",
        ),
        (
            " [kube-apiserver, --service-node-port-range=1-2, --z]",
            " [kube-apiserver, --service-node-port-range=31000-32000, --z]\n",
        ),
        (
            " [\"kube-apiserver\", \"--a\"] # flow",
            " [\"kube-apiserver\", \"--a\", \"--service-node-port-range=31000-32000\"] # flow\n",
        ),
        (
            " [\n      kube-apiserver,\n      --a\n      ]",
            "\n      --a,\n      --service-node-port-range=31000-32000\n      ]\n",
        ),
        (
            "\n    - kube-apiserver\n    -  \"--a\"   # c",
            "\n    -  \"--a\"   # c\n    -  \"--service-node-port-range=31000-32000\"\n    image",
        ),
        (
            " [kube-apiserver]\n    args:\n    - --a\n    - --b=1-2",
            "\n    - --b=1-2\n    - --service-node-port-range=31000-32000\n",
        ),
        (
            "\n    args: [kube-apiserver, --a]",
            "args: [kube-apiserver, --a, --service-node-port-range=31000-32000]\n",
        ),
    ] {
        let text = with(before);
        let changed = set(&text);
        assert!(changed.contains(after), "{text}\n{changed}");
        assert_eq!(read(&changed, path()).unwrap().range, range(31000, 32000));
        // Nothing else: without the changed or added piece both are the same.
        let same = text.bytes().zip(changed.bytes()).take_while(|(a, b)| a == b).count();
        let rest = text.bytes().rev().zip(changed.bytes().rev()).take_while(|(a, b)| a == b).count();
        let piece = &changed[same..changed.len() - rest.min(changed.len() - same)];
        assert!(piece.len() <= "\n    - \"--service-node-port-range=31000-32000\" ".len() + 6, "{piece:?}");
    }
}

#[test]
fn line_ends_and_a_missing_last_one_stay() {
    let text = KUBEADM.replace('\n', "\r\n");
    assert_eq!(set(&text), set(KUBEADM).replace('\n', "\r\n"));
    let open = "spec: \n  containers:\n  - command:\n    - kube-apiserver\n    - --ä=ü";
    assert_eq!(set(open), format!("{open}\n    - --service-node-port-range=31000-32000"));
}

#[test]
fn json_is_changed_as_json() {
    let text = "{\n  \"kind\": \"Pod\",\n  \"spec\": {\"containers\": [{\"command\": [\n    \"kube-apiserver\",\n    \"--a=1\"\n  ], \"name\": \"x\"}]}\n}\n";
    let changed = set(text);
    let expected = text.replace("\"--a=1\"", "\"--a=1\",\n    \"--service-node-port-range=31000-32000\"");
    assert_eq!(changed, expected);
    assert!(serde_json::from_str::<serde_json::Value>(&changed).is_ok(), "{changed}");
    let one_line =
        "{\"spec\":{\"containers\":[{\"command\":[\"kube-apiserver\",\"--service-node-port-range=1-2\"]}]}}";
    assert_eq!(set(one_line), one_line.replace("1-2", "31000-32000"));
}

#[test]
fn ranges_are_read_as_kube_apiserver_reads_them() {
    for (text, expected) in [
        ("30000-32767", Some(DEFAULT)),
        (" 30000-30000 ", Some(range(30000, 30000))),
        ("30000+2767", Some(DEFAULT)),
        ("65000+535", Some(range(65000, 65535))),
        ("8080", Some(range(8080, 8080))),
        ("", Some(DEFAULT)),
        ("65000+536", None),
        ("2-1", None),
        ("1-65536", None),
        ("http", None),
        ("1-2-3", None),
    ] {
        assert_eq!(parse_range(text), expected, "{text:?}");
    }
}

#[test]
fn what_is_no_manifest_of_kube_apiserver_is_refused_with_a_remedy() {
    for (text, expected) in [
        ("", "the file is empty"),
        ("a: [", "not YAML"),
        ("kind: Pod\n", "no container runs kube-apiserver"),
        (with(" [sh, -c, exec kube-apiserver --service-node-port-range=1-2]").as_str(), "no container runs"),
        (with(" [kube-apiserver, --service-node-port-range=2-1]").as_str(), "=2-1 is not a range"),
        (with(" [kube-apiserver, --service-node-port-range]").as_str(), "has no value"),
        (
            with(" [kube-apiserver, --service-node-port-range=1-2, --service-node-port-range=1-2]").as_str(),
            "more than once",
        ),
        (
            with("\n    - kube-apiserver\n    - >-\n      --service-node-port-range=1-2").as_str(),
            "block text",
        ),
        ("x: &c [kube-apiserver, --a]\nspec: {containers: [{command: *c}]}\n---\n", "second YAML document"),
    ] {
        let refusal = refusal(text);
        assert!(refusal.contains(expected), "{text:?}: {refusal}");
    }
}

#[test]
fn an_alias_is_not_written_over() {
    let item =
        "x: &r --service-node-port-range=1-2\nspec: {containers: [{command: [kube-apiserver, *r ]}]}\n";
    assert!(refusal(item).contains("is an alias"));
    let list = "x: &c [kube-apiserver, --a]\nspec:\n  containers:\n  - command: *c\n";
    assert!(refusal(list).contains("is an alias"), "the list itself is an alias: two places would change");
}

#[test]
fn the_port_of_the_service_kubernetes_is_known() {
    let text = with(" [kube-apiserver, --kubernetes-service-node-port=30443]");
    assert_eq!(read(&text, path()).unwrap().own_port, Some(30443));
    let none = with(" [kube-apiserver, --kubernetes-service-node-port, \"0\"]");
    assert_eq!(read(&none, path()).unwrap().own_port, None);
}
