//! Names beside addresses, and the report for maintainers, on a node that follows a cluster.

use std::{fs, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    kubernetes::{ApiServer, User},
    lab::{Family, Lab},
    traffic::tcp,
    wait::eventually,
};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(30);
const PORT: u16 = 40002;
const DENIED: u16 = 40003;

/// A node with a pod `shop/warehouse-7` that has had a connection from `plc-7`, and one that was denied.
struct Scene {
    lab: Lab,
    server: ApiServer,
    agent: Agent,
    _connection: (tcp::Server, tcp::Connection),
}

impl Scene {
    fn new() -> Result<Self> {
        let lab = Lab::builder().build()?;
        let server = ApiServer::start(&lab)?;
        server.add_node(&lab, 0)?;
        server.add_namespace("shop", &json!({}))?;
        server.add_pod("shop", "warehouse-7", &json!({}), "b")?;
        server.run_pod("shop", "warehouse-7", lab.c1())?;
        let config = format!(
            "role: node\nnetworks: {{external: [192.168.31.0/24, 'fd31::/64'], pods: [10.200.1.0/24, 'fd20:1::/64']}}\n\
             enforcement: {{engines: [ebpf], interfaces: {{external: [eth0], internal: ['cali*']}}}}\n\
             rules: [{{name: api, direction: inbound, protocol: tcp, ports: [{PORT}]}}]\n\
             names: {{192.168.31.67: plc-7, 'fd31::/64': plant-v6}}\n\
             portPool: {{ports: [61001-61010], destinations: [192.168.31.0/24]}}\n\
             kubernetes: {{kubeconfig: {}, nodeName: b}}\npersistence: {{save: never}}\n",
            server.kubeconfig(User::Node).display()
        );
        let agent = Agent::start(&lab, lab.b(), &config)?;
        let to = lab.c1().at(Family::V4, PORT);
        let echo = tcp::Server::echo(&lab.c1().netns, to)?;
        let mut connection = tcp::Client::new(&lab.a().netns).connect(to)?.reached()?;
        connection.round_trip(Duration::from_secs(1))?;
        drop(tcp::Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, DENIED))?);
        let scene = Self { lab, server, agent, _connection: (echo, connection) };
        let named = || scene.agent.run(&["flows"]).ok().filter(|text| text.contains("shop/warehouse-7"));
        eventually(DEADLINE, named).with_context(|| format!("{:?}", scene.agent.run(&["flows"])))?;
        Ok(scene)
    }

    fn report(&self, arguments: &[&str]) -> Result<Vec<(String, String)>> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("report.tar.gz");
        let mut command = self.agent.command(&[&["bugreport"], arguments].concat());
        command.arg("-o").arg(&file);
        self.lab.b().netns.output(command)?;
        let status = Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(directory.path()).status()?;
        ensure!(status.success(), "tar cannot read the report");
        let mut files = Vec::new();
        for entry in fs::read_dir(directory.path().join("bridge-report"))? {
            let path = entry?.path();
            files.push((
                path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                fs::read_to_string(path)?,
            ));
        }
        Ok(files)
    }
}

#[test]
fn pods_and_lan_hosts_have_names() -> Result<()> {
    let scene = Scene::new()?;
    let agent = &scene.agent;
    let text = agent.run(&["flows"])?;
    ensure!(text.contains("192.168.31.67:") && text.contains(" (plc-7)"), "{text}");
    ensure!(text.contains("10.200.1.91:40002 (shop/warehouse-7)"), "{text}");
    let plain = agent.run(&["flows", "--no-names"])?;
    ensure!(
        plain.contains("10.200.1.91:40002") && !plain.contains("shop") && !plain.contains("plc"),
        "{plain}"
    );
    let flows: Value = serde_json::from_str(&agent.run(&["flows", "--json", "--port", "40002"])?)?;
    assert_eq!((&flows["flows"][0]["sourceName"], &flows["total"]), (&json!("plc-7"), &json!(1)), "{flows}");
    assert_eq!(flows["flows"][0]["destinationName"], "shop/warehouse-7", "{flows}");

    // Events, live.
    let lab = &scene.lab;
    let monitor = |more: &[&str]| {
        let command = agent.command(&[&["monitor", "--count", "1", "--port", "40003"], more].concat());
        std::thread::scope(|scope| {
            let shown = scope.spawn(|| lab.b().netns.output(command));
            while !shown.is_finished() {
                let attempt = tcp::Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, DENIED));
                drop(attempt);
                std::thread::sleep(Duration::from_millis(100));
            }
            shown.join().expect("no panic")
        })
    };
    let line = monitor(&[])?;
    ensure!(line.contains("(plc-7)") && line.contains("(shop/warehouse-7)"), "{line}");
    let event: Value = serde_json::from_str(&monitor(&["--json"])?)?;
    assert_eq!(
        (&event["sourceName"], &event["destinationName"]),
        (&json!("plc-7"), &json!("shop/warehouse-7"))
    );
    ensure!(!monitor(&["--no-names"])?.contains("plc-7"));

    // Leases.
    agent.run(&["ports", "acquire", "192.168.31.67:502", "--for", "1h"])?;
    let leases = agent.run(&["ports", "list"])?;
    ensure!(leases.contains("192.168.31.67:502 (plc-7)"), "{leases}");
    Ok(())
}

#[test]
fn a_redacted_report_has_no_address_name_or_token_of_the_lab() -> Result<()> {
    let scene = Scene::new()?;
    let lab = &scene.lab;
    let open = scene.report(&[])?;
    let token =
        fs::read_to_string(scene.server.kubeconfig(User::Node).with_extension("token")).unwrap_or_default();
    let mut secrets = vec!["plc-7".to_owned(), "plant-v6".to_owned(), "warehouse-7".to_owned()];
    for host in [lab.a(), lab.b(), lab.c1()] {
        secrets.extend([host.v4.to_string(), host.v6.to_string()]);
        let mac: Vec<String> = host.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        secrets.push(mac.join(":"));
    }
    secrets.extend(["192.168.31.", "10.200.1.", "fd31:", "fd20:1:"].map(str::to_owned));
    let all = |files: &[(String, String)]| files.iter().map(|(_, text)| text.as_str()).collect::<String>();
    for secret in ["192.168.31.67", "plc-7", "shop/warehouse-7"] {
        ensure!(all(&open).contains(secret), "the open report lacks {secret}, so this test proves nothing");
    }
    let redacted = scene.report(&["--redact"])?;
    for (name, text) in &redacted {
        for secret in &secrets {
            let found = text.lines().find(|line| line.to_lowercase().contains(&secret.to_lowercase()));
            ensure!(found.is_none(), "{secret} is in {name}: {found:?}");
        }
    }
    let versions = &redacted.iter().find(|(name, _)| name == "versions.json").context("versions")?.1;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    ensure!(!versions.split('"').any(|word| word == host), "{versions}");
    for (files, kind) in [(&open, "open"), (&redacted, "redacted")] {
        let token = token.trim();
        ensure!(token.is_empty() || !all(files).contains(token), "the {kind} report has the token");
        for file in [
            "status.json",
            "config.yaml",
            "maps.json",
            "rules.json",
            "routes.txt",
            "events.json",
            "doctor.json",
        ] {
            ensure!(
                files.iter().any(|(name, text)| name == file && !text.contains("missing\":")),
                "{kind}: {file}"
            );
        }
    }
    // The same pseudonym everywhere: status and maps show the same rules and interfaces.
    let events = &redacted.iter().find(|(name, _)| name == "events.json").context("events")?.1;
    let maps = &redacted.iter().find(|(name, _)| name == "maps.json").context("maps")?.1;
    let events: Value = serde_json::from_str(events)?;
    let maps: Value = serde_json::from_str(maps)?;
    let denied = events.as_array().context("events")?.iter().find(|event| event["destinationPort"] == DENIED);
    let flow = maps["flows"].as_array().context("flows")?.iter().find(|flow| flow["destinationPort"] == PORT);
    let (denied, flow) = (denied.context("a denied packet")?, flow.context("a flow")?);
    assert_eq!((&denied["source"], &denied["destination"]), (&flow["source"], &flow["destination"]));
    Ok(())
}

#[test]
fn a_report_needs_no_agent() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("r.tar.gz");
    let mut command = Command::new(bridge_lab::agent::program()?);
    command
        .args([
            "bugreport",
            "--redact",
            "--socket",
            "/nonexistent.sock",
            "--config",
            "/nonexistent.yaml",
            "-o",
        ])
        .arg(&file);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(fs::metadata(&file)?.len() > 100);
    Ok(())
}
