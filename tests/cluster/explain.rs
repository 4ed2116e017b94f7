//! `bridge-agent explain` beside a real kube-proxy in each of its modes: Services, NodePorts and hostPorts, compared with real
//! connections.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    kubernetes::{ApiServer, User},
    lab::{Family, Host, Lab},
    traffic::tcp,
    wait::eventually,
};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
const CONFIG: &str = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\n\
     enforcement: {engines: [ebpf], interfaces: {external: [eth0], internal: ['cali*']}}\npersistence: {save: never}\n\
     nodePorts: {range: 30000-32767, allow: [30080]}\n\
     rules:\n  - {name: web, direction: inbound, protocol: tcp, ports: [8080]}\n\
     \x20 - {name: pooled, direction: outbound, protocol: tcp, ports: [8443], sourcePorts: 61001-61100}\n";

fn explain(agent: &Agent, from: &str, to: &str) -> Result<Value> {
    let text = agent.run(&["explain", "--json", from, to])?;
    serde_json::from_str(&text).context(text)
}

fn seen<'a>(explanation: &'a Value, name: &str) -> Option<&'a str> {
    let stages = explanation["stages"].as_array()?;
    stages.iter().find(|stage| stage["name"] == name)?["seen"].as_str()
}

fn connects(client: &Host, from: u16, to: SocketAddr) -> Result<bool> {
    let client = tcp::Client::new(&client.netns).deadline(Duration::from_secs(2));
    let client = if from == 0 { client } else { client.source_port(from) };
    Ok(client.connect(to)?.reached().is_ok())
}

/// A Service without a selector, and its one endpoint.
fn service(server: &ApiServer, name: &str, port: &Value, endpoint: SocketAddr) -> Result<SocketAddr> {
    let kind = if port["nodePort"].is_null() { "ClusterIP" } else { "NodePort" };
    let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"type": kind, "ports": [port]}});
    let made = server.request(User::Admin, "POST", "/api/v1/namespaces/plant/services", Some(&object))?;
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": port["name"], "port": endpoint.port(), "protocol": "TCP"}],
        "endpoints": [{"addresses": [endpoint.ip().to_string()], "conditions": {"ready": true}}],
    });
    let path = "/apis/discovery.k8s.io/v1/namespaces/plant/endpointslices";
    server.request(User::Admin, "POST", path, Some(&slice))?;
    let address = made["spec"]["clusterIP"].as_str().context("an address")?;
    let port = u16::try_from(port["port"].as_u64().context("a port")?)?;
    Ok(SocketAddr::new(address.parse()?, port))
}

/// Rules of the CNI plugin portmap, as it leaves them with each of its back ends.
fn host_port(node: &Host, mode: &str, directory: &std::path::Path) -> Result<()> {
    let (text, program, arguments): (&str, &str, &[&str]) = match mode {
        "nftables" => (
            "table ip cni_hostport {\n chain hostports {\n  tcp dport 18080 dnat to 10.200.1.91:8080\n }\n chain prerouting {\n  type nat \
             hook prerouting priority dstnat; policy accept;\n  fib daddr type local jump hostports\n }\n}\n",
            "nft",
            &["-f"],
        ),
        _ => (
            "*nat\n:CNI-HOSTPORT-DNAT - [0:0]\n:CNI-DN-1 - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j \
             CNI-HOSTPORT-DNAT\n-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment \"dnat name: \\\"net\\\" id: \\\"1\\\"\" -m multiport \
             --dports 18080 -j CNI-DN-1\n-A CNI-DN-1 -p tcp --dport 18080 -j DNAT --to-destination 10.200.1.91:8080\nCOMMIT\n",
            "iptables-restore",
            &["--noflush"],
        ),
    };
    let file = directory.join("hostport.rules");
    std::fs::write(&file, text)?;
    let mut command = Command::new(program);
    command.args(arguments).arg(&file);
    node.netns.output(command).map(drop)
}

fn verify(mode: &str) -> Result<()> {
    let lab = Lab::builder().conntrack().build()?;
    let server = ApiServer::start(&lab)?;
    server.add_node(&lab, 0)?;
    server.add_namespace("plant", &json!({}))?;
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    let (web, plc) = (c1.at(Family::V4, 8080), a.at(Family::V4, 8443));
    let (_web, _plc) = (tcp::Server::echo(&c1.netns, web)?, tcp::Server::echo(&a.netns, plc)?);
    let port = json!({"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080});
    let web_service = service(&server, "web", &port, web)?;
    let other = json!({"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30081});
    service(&server, "other", &other, web)?;
    let plc_service =
        service(&server, "plc", &json!({"name": "modbus", "port": 502, "targetPort": 8443}), plc)?;
    let _proxy = server.start_proxy(b, mode)?;
    a.netns.ip(&format!("route add 10.96.0.0/16 via {}", b.v4))?;
    let agent = Agent::start(&lab, b, CONFIG)?;
    eventually(DEADLINE, || connects(a, 0, web_service).ok()?.then_some(()))
        .with_context(|| format!("{mode}: kube-proxy has no rules"))?;
    host_port(b, mode, &lab.directory())?;

    let (lan, pod) = (a.v4.to_string(), c1.v4.to_string());
    let node = |port: u16| SocketAddr::new(b.v4.into(), port);
    // A LAN host by name and address of the Service, by NodePort and by hostPort.
    for (to, real, verdict, masqueraded) in [
        ("service/plant/web".to_owned(), web_service, "allow", true),
        (web_service.to_string(), web_service, "allow", true),
        (node(30080).to_string(), node(30080), "allow", true),
        (node(30081).to_string(), node(30081), "deny", true),
        (node(18080).to_string(), node(18080), "allow", false),
        (web.to_string(), web, "allow", false),
    ] {
        let found = explain(&agent, &lan, &to)?;
        ensure!(found["verdict"] == verdict, "{mode} {to}: {found:#}");
        ensure!(connects(a, 0, real)? == (verdict == "allow"), "{mode} {to}");
        if real != web {
            ensure!(seen(&found, "service") == Some("10.200.1.91:8080"), "{mode} {to}: {found:#}");
        }
        let by_proxy = seen(&found, "masquerade").is_some();
        ensure!(by_proxy == masqueraded, "{mode} {to}: {found:#}");
    }
    // A pod at a Service whose endpoint is a LAN host.
    ensure!(seen(&explain(&agent, &pod, "service/plant/plc")?, "service") == Some("192.168.31.67:8443"));
    for (port, verdict) in [(61001, "allow"), (40000, "deny")] {
        let found = explain(&agent, &format!("{pod}:{port}"), "service/plant/plc")?;
        ensure!(found["verdict"] == verdict, "{mode} {port}: {found:#}");
        ensure!(connects(c1, port, plc_service)? == (verdict == "allow"), "{mode} {port}");
        ensure!(
            seen(&found, "masquerade").is_none(),
            "{mode}: kube-proxy masquerades packets with its mark: {found:#}"
        );
    }
    let error = agent.run(&["explain", &pod, "service/plant/none"]).unwrap_err().to_string();
    ensure!(error.contains("no rule of kube-proxy on this node"), "{error}");
    Ok(())
}

#[test]
fn explain_follows_services_of_the_nftables_proxy() -> Result<()> {
    verify("nftables")
}

#[test]
fn explain_follows_services_of_the_iptables_proxy() -> Result<()> {
    verify("iptables")
}
