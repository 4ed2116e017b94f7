//! `bridge-agent ui --kubernetes`: one page for every node, over pods/exec.

#[path = "../ui/attack.rs"]
mod attack;
#[path = "../ui/browser.rs"]
#[expect(dead_code, reason = "the page of one node uses all of it")]
mod browser;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent,
    cluster::{Cluster, Options, Pod},
    lab::{Family, Process},
    traffic::tcp,
    wait::eventually,
};
use serde_json::{Value, json};

use self::{
    attack::{ATTACK, attack, resident_kib},
    browser::Browser,
};

const PORT: u16 = 8080;
const DEADLINE: Duration = Duration::from_secs(60);
const AXE: &str = include_str!("../ui/vendor/axe.min.js");

/// `bridge-agent ui --kubernetes` in the network of the control plane.
struct Page<'a> {
    cluster: &'a Cluster,
    url: String,
    process: Process,
}

impl<'a> Page<'a> {
    fn start(cluster: &'a Cluster, kubeconfig: &Path, options: &[&str]) -> Result<Self> {
        let (_, kubectl) = cluster.access();
        let folder = kubectl.parent().context("kubectl")?;
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(agent::program()?);
        command.args(["ui", "--listen", "127.0.0.1:0", "--kubernetes", "--kubeconfig"]).arg(kubeconfig);
        command.args(options).env("PATH", format!("{}:{path}", folder.display()));
        command.env("HOME", cluster.lab().directory()).stdout(Stdio::piped());
        let mut process = cluster.lab().b().netns.spawn_command(command)?;
        let mut url = String::new();
        BufReader::new(process.child().stdout.take().context("stdout")?).read_line(&mut url)?;
        Ok(Self { cluster, url: url.trim().to_owned(), process })
    }

    /// Sends a query; returns the status of the answer and its JSON.
    fn ask(&self, path: &str) -> Result<(u16, Value)> {
        let (origin, token) = self.url.split_once("/#token=").with_context(|| self.url.clone())?;
        let host = origin.trim_start_matches("http://");
        let mut text = Vec::new();
        self.cluster.lab().b().netns.run(|| {
            let mut stream = TcpStream::connect(host)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            // HTTP/1.0: the answer has no chunks.
            write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n")?;
            stream.read_to_end(&mut text)
        })?;
        let text = String::from_utf8_lossy(&text);
        let (head, body) = text.split_once("\r\n\r\n").with_context(|| text.clone().into_owned())?;
        let status = head.get(9..12).context("a status")?.parse()?;
        Ok((status, serde_json::from_str(body).with_context(|| text.clone().into_owned())?))
    }

    /// Asserts that the agents of these nodes answer, and no other one.
    fn answers_for(&self, names: &[&str]) -> Result<()> {
        let (status, body) = self.ask("/api/status")?;
        ensure!(status == 200, "{status} {body}");
        let nodes = body["nodes"].as_array().context("nodes")?;
        let up: Vec<_> =
            nodes.iter().filter(|node| node["status"]["pid"].is_u64()).map(|node| &node["node"]).collect();
        ensure!(up == names, "{names:?} do not answer: {body}");
        Ok(())
    }

    /// The reason why a query fails, once it contains these words.
    fn fails_with(&self, words: &[&str]) -> Result<()> {
        let (status, body) = self.ask("/api/status")?;
        let text = body.to_string();
        ensure!(status == 502 || body["nodes"][0]["error"].is_string(), "{status} {body}");
        ensure!(words.iter().all(|word| text.contains(word)), "{words:?} in {text}");
        Ok(())
    }
}

impl Drop for Page<'_> {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.process.kill());
    }
}

/// Connects from the allowed host to a port of a pod.
fn reaches(cluster: &Cluster, pod: &Pod, port: u16) -> bool {
    let at = SocketAddr::new(pod.ip(Family::V4), port);
    let client = tcp::Client::new(&cluster.allowed_host().netns).deadline(Duration::from_millis(500));
    client.connect(at).is_ok_and(|connected| connected.succeeded())
}

/// A kubeconfig of a service account that has these verbs, each with its resource, in the agents' namespace.
fn limited(cluster: &Cluster, name: &str, rights: &[(&str, &str)]) -> Result<std::path::PathBuf> {
    let namespace = "--namespace=bridge-system";
    cluster.kubectl(&["create", "serviceaccount", name, namespace])?;
    for (index, (verb, resource)) in rights.iter().enumerate() {
        let role = format!("{name}-{index}");
        let (verb, resource) = (format!("--verb={verb}"), format!("--resource={resource}"));
        cluster.kubectl(&["create", "role", &role, &verb, &resource, namespace])?;
        let (of, to) = (format!("--role={role}"), format!("--serviceaccount=bridge-system:{name}"));
        cluster.kubectl(&["create", "rolebinding", &role, &of, &to, namespace])?;
    }
    let token = cluster.kubectl(&["create", "token", name, namespace])?;
    let admin = cluster.access().0;
    let config: Value = serde_json::from_str(&cluster.kubectl(&[
        "config",
        "view",
        "--raw",
        "--output=json",
        "--kubeconfig",
        &admin.display().to_string(),
    ])?)?;
    let own = json!({
        "apiVersion": "v1", "kind": "Config", "clusters": config["clusters"],
        "users": [{"name": name, "user": {"token": token.trim()}}],
        "contexts": [{"name": name, "context": {"cluster": config["clusters"][0]["name"], "user": name}}],
        "current-context": name,
    });
    let file = cluster.lab().directory().join(format!("{name}.kubeconfig"));
    fs::write(&file, own.to_string())?;
    Ok(file)
}

#[test]
fn one_page_shows_every_node_and_follows_a_replaced_agent() -> Result<()> {
    let cluster = Cluster::up(Options::default())?;
    cluster.install_bridge(None)?;
    let host = cluster.allowed_host();
    let external = [format!("{}/32", host.v4), format!("{}/128", host.v6)];
    cluster.apply_policies(&[json!({
        "apiVersion": "bridge.lan/v1alpha1", "kind": "BridgePolicy", "metadata": {"name": "peers"},
        "spec": {"rules": [{
            "name": "in", "direction": "inbound", "protocol": "tcp", "ports": [PORT], "external": external,
            "podSelector": {"matchLabels": {"app": "peer"}},
        }]},
    })])?;
    let mut pods = Vec::new();
    for index in 0..2 {
        let pod = cluster.make_pod(&format!("peer{index}"), index, &json!({"app": "peer"}), &json!({}))?;
        let server = tcp::Server::echo(&pod.netns, SocketAddr::new(pod.ip(Family::V4), PORT))?;
        let open = eventually(DEADLINE, || reaches(&cluster, &pod, PORT).then_some(()));
        ensure!(open.is_some(), "{} stays closed", pod.name);
        pods.push((pod, server));
    }
    let (admin, _) = cluster.access();
    let page = Page::start(&cluster, &admin, &[])?;
    let names: Vec<&str> = pods.iter().map(|(pod, _)| pod.node.as_str()).collect();
    page.answers_for(&names)?;

    // Rows of both nodes, each with its node.
    let kept: Vec<_> = pods
        .iter()
        .filter_map(|(pod, _)| {
            let at = SocketAddr::new(pod.ip(Family::V4), PORT);
            tcp::Client::new(&host.netns).connect(at).ok()?.reached().ok()
        })
        .collect();
    assert_eq!(kept.len(), 2);
    let (_, flows) = page.ask("/api/flows?limit=10000")?;
    let (_, rules) = page.ask("/api/rules")?;
    for (pod, _) in &pods {
        let to = pod.ip(Family::V4).to_string();
        let rows = flows["flows"].as_array().into_iter().flatten();
        let nodes: Vec<_> = rows.filter(|row| row["destination"] == *to).map(|row| &row["agent"]).collect();
        ensure!(!nodes.is_empty() && nodes.iter().all(|node| **node == *pod.node), "{to}: {flows}");
        ensure!(
            rules.as_array().is_some_and(|all| all.iter().any(|row| row["agent"] == *pod.node)),
            "{rules}"
        );
    }
    let pid = page.process.id();

    // The browser runs beside the page.
    let namespace = cluster.lab().b().netns.clone();
    namespace.run(|| watch(&cluster, &page, &pods))?;
    bounded(pid)?;
    attacked(&cluster, &page, &names)?;
    drop(page);

    // Errors name the remedy.
    let nowhere = Page::start(&cluster, &admin, &["--namespace", "nowhere"])?;
    nowhere.fails_with(&["no agent runs in namespace nowhere", "--namespace"])?;
    let other = Page::start(&cluster, &admin, &["--namespace", "default", "--selector", "app=peer"])?;
    other.fails_with(&["peer0", "without a container bridge-agent", "--selector"])?;
    let blind = Page::start(&cluster, &limited(&cluster, "blind", &[])?, &[])?;
    blind.fails_with(&["cannot list resource", "`list` of pods and `create` of pods/exec"])?;
    let lister = limited(&cluster, "lister", &[("list", "pods"), ("get", "pods")])?;
    let lister = Page::start(&cluster, &lister, &[])?;
    lister.fails_with(&["pods/exec", "`list` of pods and `create` of pods/exec"])?;
    let user = limited(&cluster, "user", &[("list,get", "pods"), ("create,get", "pods/exec")])?;
    let one = Page::start(&cluster, &user, &["--node", names[1]])?;
    one.answers_for(&[names[1]])
}

/// Looks at the page while packets are denied, and an agent is replaced.
fn watch(cluster: &Cluster, page: &Page<'_>, pods: &[(Pod, tcp::Server)]) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ui");
    let browser = Browser::start()?;
    browser.screen(1280, 900, false)?;
    browser.open(&page.url)?;
    browser.shows("#strip", "2 of 2 answer", DEADLINE)?;
    let denied = |port: u16, pod: &Pod| -> Result<()> {
        let row = format!("{}:{port}", pod.ip(Family::V4));
        let shown = eventually(DEADLINE, || {
            let refused = !reaches(cluster, pod, port);
            let rows = browser
                .run("return [...document.querySelectorAll('.grid .body .row')].map((e) => e.textContent)");
            let rows = rows.ok()?;
            let mut rows = rows.as_array()?.iter().filter_map(Value::as_str);
            (refused && rows.any(|text| text.contains(&row) && text.contains(&pod.node))).then_some(())
        });
        shown.with_context(|| {
            format!("{row} of {} is no row: {}", pod.node, browser.text("body").unwrap_or_default())
        })
    };
    for (pod, _) in pods {
        denied(PORT + 1, pod)?;
    }
    // The agent of the row's own node explains it.
    for (pod, _) in pods {
        browser.run(&format!(
            "[...document.querySelectorAll('.grid .body .row')].find((e) => e.textContent.includes('{}')).click()",
            pod.ip(Family::V4)
        ))?;
        browser.shows("#details", "Why", DEADLINE)?;
        browser.shows("#details dl", &pod.node, DEADLINE)?;
        browser.keys(&["\u{e00c}"])?;
    }
    for dark in [false, true] {
        let theme = if dark { "dark" } else { "light" };
        for (width, height) in [(1280, 900), (390, 844)] {
            browser.screen(width, height, dark)?;
            browser.wait("setTimeout(() => requestAnimationFrame(() => done(1)), 1200)")?;
            browser.screenshot(&folder.join(format!("cluster-{theme}-{width}.png")))?;
            browser.run(AXE)?;
            let found = browser.wait("axe.run().then((result) => done(result.violations.map((one) => one.id + ': ' + one.nodes.map((node) => node.html.slice(0, 160)).join(' | '))))")?;
            ensure!(found.as_array().is_some_and(Vec::is_empty), "{theme} {width}: {found}");
            let wide = browser.run("return document.documentElement.scrollWidth - innerWidth")?;
            ensure!(wide.as_i64().is_some_and(|wide| wide <= 0), "{theme} {width}: wider by {wide}");
        }
    }
    browser.screen(1280, 900, false)?;

    // Another pod takes the place of an agent: its rows come again.
    let selected = ["--namespace=bridge-system", "--selector=app.kubernetes.io/name=bridge-agent"];
    let field = format!("--field-selector=spec.nodeName={}", pods[0].0.node);
    cluster.kubectl(&[&["delete", "pod", "--wait=false", &field], &selected[..]].concat())?;
    browser.shows("#strip", "1 of ", DEADLINE)?;
    cluster.wait_for_bridge()?;
    browser.shows("#strip", "2 of 2 answer", DEADLINE)?;
    denied(PORT + 2, &pods[0].0)?;
    denied(PORT + 2, &pods[1].0)?;
    browser.asked_only(page.url.split("/#").next().unwrap_or_default())?;
    let console = browser.console()?;
    // Queries fail while the agent is away.
    ensure!(console.iter().all(|line| line.contains("502")), "{console:?}");
    Ok(())
}

/// Plays readers of the page that are slow, read nothing or never end a request: the page stays small, answers others
/// meanwhile and all nodes afterwards, and the agents hold no connection of theirs.
fn attacked(cluster: &Cluster, page: &Page<'_>, names: &[&str]) -> Result<()> {
    let (origin, token) = page.url.split_once("/#token=").with_context(|| page.url.clone())?;
    let host = origin.trim_start_matches("http://");
    let queries = ["events?last=1000", "flows?limit=10000", "rules", "status"].map(|path| {
        format!("GET /api/{path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n")
    });
    let unfinished = ["GET / HT".to_owned(), format!("GET /app.js HTTP/1.1\r\nHost: {host}\r\n\r\n")];
    let requests = [&queries[..], &unfinished].concat();
    let open = || {
        let stream = TcpStream::connect(host)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let netns = &cluster.lab().b().netns;
    let stop = AtomicBool::new(false);
    let (answers, most, opened) = thread::scope(|scope| {
        let attackers = [(); 2].map(|()| scope.spawn(|| netns.run(|| attack(&requests, open, &stop))));
        let (mut answers, mut most) = (0, 0);
        let start = Instant::now();
        let mut measured = Ok(());
        while measured.is_ok() && start.elapsed() < ATTACK {
            // The page may be full: the next try takes the place of a reader that stalls.
            answers += usize::from(page.ask("/api/status").is_ok_and(|(status, _)| status == 200));
            measured = resident_kib(page.process.id()).map(|resident| most = resident.max(most));
            thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
        let opened: usize = attackers.map(|attacker| attacker.join().unwrap_or(0)).iter().sum();
        measured.map(|()| (answers, most, opened))
    })?;
    println!("{opened} connections of attackers: {answers} answers to others, {most} KiB");
    ensure!(opened > 100, "the attackers opened {opened} connections only");
    ensure!(answers > 0, "the page answered no one else");
    ensure!(most < 96 * 1024, "the page held {most} KiB");
    let after = eventually(DEADLINE, || page.answers_for(names).ok());
    after.context("the page does not recover")
}

/// Asserts that the page's own process is small.
fn bounded(pid: u32) -> Result<()> {
    let resident = resident_kib(pid)?;
    println!("the page's process holds {resident} KiB");
    ensure!(resident < 96 * 1024, "the page holds {resident} KiB");
    Ok(())
}
