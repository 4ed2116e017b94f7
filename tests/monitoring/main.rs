//! `deploy/monitoring`: alerts by promtool, and the dashboard by a real Prometheus that scrapes two agents.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    lab::{Family, Host, Lab, Process},
    traffic::tcp,
    wait::{eventually, patience},
};
use serde_json::{Value, json};

const PORT: u16 = 40002;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring")
}

/// The groups of the PrometheusRule, as Prometheus reads them from a file.
fn rules() -> Result<Value> {
    let text = fs::read_to_string(folder().join("rules.yaml"))?;
    let object: Value = serde_saphyr::from_str(&text)?;
    Ok(object["spec"].clone())
}

/// Runs a program in a folder, and returns its output; an error if it fails.
fn run(folder: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).current_dir(folder).output();
    let output = output
        .with_context(|| format!("NOT RUN: {program} is missing, install it by `cargo xtask setup`"))?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {arguments:?}: {text}");
    Ok(text)
}

#[test]
fn each_alert_fires_and_is_quiet_when_it_should() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let rules = rules()?;
    fs::write(directory.path().join("rules.yaml"), rules.to_string())?;
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("monitoring/alerts.yaml");
    let cases = fs::read_to_string(&tests)?;
    fs::copy(tests, directory.path().join("alerts.yaml"))?;
    run(directory.path(), "promtool", &["check", "rules", "rules.yaml"])?;
    run(directory.path(), "promtool", &["test", "rules", "alerts.yaml"])?;
    for rule in rules["groups"][0]["rules"].as_array().context("rules")? {
        let name = rule["alert"].as_str().context("alert")?;
        for case in [format!("name: {name} fires"), format!("name: {name} is quiet")] {
            ensure!(cases.contains(&case), "no test `{case}`");
        }
    }
    Ok(())
}

/// The names of metrics in a query.
fn metrics(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let suffixes = ["_bucket"];
    words
        .filter(|word| word.starts_with("bridge_") || word.starts_with("process_"))
        .map(|word| suffixes.iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word).to_owned())
        .collect()
}

fn panels() -> Result<Vec<(String, String)>> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(folder().join("dashboard.json"))?)?;
    let panels = dashboard["panels"].as_array().context("panels")?.iter();
    panels
        .map(|panel| {
            let text = |value: &Value| {
                value.as_str().map(ToOwned::to_owned).context("a panel without title or query")
            };
            Ok((text(&panel["title"])?, text(&panel["targets"][0]["expr"])?))
        })
        .collect()
}

#[test]
fn alerts_and_panels_name_documented_metrics() -> Result<()> {
    let page = fs::read_to_string(folder().join("../../docs/metrics.md"))?;
    let rules = rules()?;
    let alerts = rules["groups"][0]["rules"].as_array().into_iter().flatten();
    let alerts = alerts.filter_map(|rule| Some(rule["expr"].as_str()?.to_owned()));
    for query in alerts.chain(panels()?.into_iter().map(|(_, query)| query)) {
        for metric in metrics(&query) {
            ensure!(page.contains(&format!("`{metric}`")), "{metric} is not in docs/metrics.md: {query}");
        }
    }
    Ok(())
}

/// An agent has each of these counters under the same labels, so that `or` alone would keep the first.
#[test]
fn the_panel_of_repairs_has_a_series_for_each_kind() -> Result<()> {
    let (_, query) = panels()?.into_iter().find(|(title, _)| title.contains("epair")).context("no panel")?;
    let counters = ["iptables_repairs", "nftables_repairs", "pins_restored", "programs_restored"];
    let series =
        |name| json!({ "series": format!("bridge_{name}_total{{instance=\"a\"}}"), "values": "0+1x90" });
    let case = json!({ "expr": format!("count({query})"), "eval_time": "80m", "exp_samples": [{ "labels": "{}", "value": 4 }] });
    let test = json!({ "interval": "1m", "input_series": counters.map(series), "promql_expr_test": [case] });
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("panel.yaml"), json!({ "tests": [test] }).to_string())?;
    run(directory.path(), "promtool", &["test", "rules", "panel.yaml"]).map(drop)
}

/// A Prometheus in the network namespace of a host.
struct Prometheus<'a> {
    host: &'a Host,
    _process: Process,
    _directory: tempfile::TempDir,
}

impl<'a> Prometheus<'a> {
    fn start(host: &'a Host, targets: &[String]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("rules.yaml"), rules()?.to_string())?;
        let job =
            json!({ "job_name": "bridge-system/bridge-agent", "static_configs": [{ "targets": targets }] });
        let config = json!({ "global": { "scrape_interval": "1s" }, "rule_files": ["rules.yaml"], "scrape_configs": [job] });
        fs::write(directory.path().join("prometheus.yaml"), config.to_string())?;
        let mut command = Command::new("prometheus");
        command.arg("--config.file=prometheus.yaml").arg("--storage.tsdb.path=data");
        command.arg("--web.listen-address=127.0.0.1:9090").current_dir(directory.path());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = host.netns.spawn_command(command);
        let process = process.context("NOT RUN: prometheus is missing, install it by `cargo xtask setup`")?;
        Ok(Self { host, _process: process, _directory: directory })
    }

    /// Returns the values of a query now.
    fn query(&self, query: &str) -> Result<Vec<f64>> {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "5", "--get", "http://127.0.0.1:9090/api/v1/query"]);
        curl.arg("--data-urlencode").arg(format!("query={query}"));
        let answer: Value = serde_json::from_str(&self.host.netns.output(curl)?)?;
        ensure!(answer["status"] == "success", "{query}: {answer}");
        let series = answer["data"]["result"].as_array().into_iter().flatten();
        Ok(series.filter_map(|one| one["value"][1].as_str()?.parse().ok()).collect())
    }
}

#[test]
fn the_real_output_passes_the_linter_and_both_formats_have_the_same_samples() -> Result<()> {
    let lab = Lab::builder().pods(1).conntrack().build()?;
    let node = format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24]}}\nenforcement:\n  \
         engines: [ebpf, iptables]\n  interfaces: {{external: [eth0], internal: [\"cali*\"]}}\n\
         rules:\n  - {{name: api, direction: inbound, protocol: tcp, ports: [{PORT}]}}\n\
         portPool: {{ports: [\"61001-61100\"]}}\npersistence: {{save: never}}\n"
    );
    let host = format!(
        "role: host\nnetworks: {{pods: [10.200.0.0/16]}}\nroutes:\n  static: [{{to: 10.200.9.0/24, via: {}}}]\n",
        lab.b().v4
    );
    let on_node = Agent::start(&lab, lab.b(), &node)?;
    let on_host = Agent::start(&lab, lab.a(), &host)?;
    for port in [PORT, PORT + 1] {
        drop(tcp::Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, port))?);
    }
    for agent in [&on_node, &on_host] {
        let (head, text) = scrape(agent, &lab, "text/plain;version=0.0.4")?;
        ensure!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
        let (open_head, open) =
            scrape(agent, &lab, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")?;
        ensure!(open_head.contains("content-type: application/openmetrics-text"), "{open_head}");
        let names = |text: &str| -> BTreeSet<String> {
            let samples = text.lines().filter(|line| !line.starts_with('#'));
            samples.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
        };
        ensure!(names(&text).len() > 20 && names(&text) == names(&open), "{text}\n{open}");
        ensure!(open.ends_with("# EOF\n") && !text.contains("# EOF"), "{text}");
        lint(&text)?;
    }
    Ok(())
}

/// Returns head and body of a scrape that accepts these formats.
fn scrape(agent: &Agent, lab: &Lab, accept: &str) -> Result<(String, String)> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--include", "--max-time", "5", "--unix-socket"]).arg(agent.socket());
    curl.arg("--header").arg(format!("Accept: {accept}")).arg("http://bridge/metrics");
    let text = lab.b().netns.output(curl)?;
    let (head, body) = text.split_once("\r\n\r\n").context("a head")?;
    Ok((head.to_ascii_lowercase(), body.to_owned()))
}

/// Runs `promtool check metrics`, which reads the text format; an error if it finds anything.
fn lint(text: &str) -> Result<()> {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]);
    promtool.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let promtool = promtool.spawn();
    let mut promtool = promtool.context("NOT RUN: promtool is missing, install it by `cargo xtask setup`")?;
    promtool.stdin.take().context("stdin")?.write_all(text.as_bytes())?;
    let output = promtool.wait_with_output()?;
    let found = [output.stdout, output.stderr].concat();
    ensure!(output.status.success() && found.is_empty(), "{}", String::from_utf8_lossy(&found));
    Ok(())
}

#[test]
fn a_real_prometheus_scrapes_the_lab_and_each_panel_has_a_series() -> Result<()> {
    let lab = Lab::builder().pods(1).conntrack().build()?;
    let _server = tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, PORT))?;
    let node = format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24]}}\nenforcement:\n  \
         engines: [ebpf, iptables]\n  interfaces: {{external: [eth0], internal: [\"cali*\"]}}\n  events: {{rate: 1}}\n\
         rules:\n  - {{name: api, direction: inbound, protocol: tcp, ports: [{PORT}]}}\n\
         portPool: {{ports: [\"61001-61100\"]}}\npersistence: {{save: never}}\napi: {{metrics: \"127.0.0.1:9469\"}}\n"
    );
    let mut on_node = Agent::start(&lab, lab.b(), &node)?;
    let host = format!(
        "role: host\nnetworks: {{pods: [10.200.0.0/16]}}\nroutes:\n  static: [{{to: 10.200.9.0/24, via: {}}}]\n\
         api: {{metrics: \"{}:9469\"}}\n",
        lab.b().v4,
        lab.a().v4
    );
    let _on_host = Agent::start(&lab, lab.a(), &host)?;
    let prometheus = Prometheus::start(lab.b(), &["127.0.0.1:9469".into(), format!("{}:9469", lab.a().v4)])?;
    let scraped = eventually(patience(Duration::from_secs(30)), || {
        (prometheus.query("up == 1").ok()?.len() == 2).then_some(())
    });
    ensure!(scraped.is_some(), "up: {:?}\n{}", prometheus.query("up"), on_node.log());

    on_node.reload(&node.replace("name: api", "name: web"))?;
    let mut missing = panels()?;
    let seen = eventually(patience(Duration::from_secs(60)), || {
        for port in [PORT, PORT + 1] {
            drop(tcp::Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, port)).ok()?);
        }
        missing.retain(|(_, query)| {
            let query = query.replace("$__rate_interval", "10s");
            !prometheus.query(&query).is_ok_and(|values| values.iter().any(|value| value.is_finite()))
        });
        missing.is_empty().then_some(())
    });
    ensure!(seen.is_some(), "panels without a series: {missing:?}");
    let unhealthy =
        prometheus.query("ALERTS{alertname=~\"BridgeNotReady|BridgeAgentDown|BridgeReloadFailed\"}")?;
    ensure!(unhealthy.is_empty(), "an alert fires in a healthy lab");
    ensure!(prometheus.query("process_cpu_seconds_total > 0")?.len() == 2);
    Ok(())
}
