//! Every view, in both themes and two widths: accessible by axe-core, and as pictures in target/ui.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::{self, Agent},
    lab::{Family, Host, Process},
    traffic::tcp,
};
use serde_json::Value;

use crate::{
    SOON,
    browser::Browser,
    stage::{ALLOWED, DENIED, Stage, page},
};

/// A LAN host with routes, one of them by a next hop that does not answer.
const HOST: &str = r#"
role: host
networks: {pods: [10.200.0.0/16]}
routes:
  static:
  - {to: 10.200.2.0/24, via: 192.168.31.17}
  - {to: 10.200.3.0/24, via: 192.168.31.17}
  - {to: 10.200.4.0/24, via: 192.168.31.99}
"#;

const AXE: &str = include_str!("vendor/axe.min.js");

/// Connections and refusals of several hosts, and of both directions.
fn traffic(stage: &Stage) -> Result<Vec<tcp::Connection>> {
    let lab = &stage.lab;
    let mut open = Vec::new();
    let mut connect = |from: &Host, to: &Host, port: u16| -> Result<()> {
        let client = tcp::Client::new(&from.netns).deadline(Duration::from_millis(300));
        open.extend(client.connect(to.at(Family::V4, port))?.reached().ok());
        Ok(())
    };
    for _ in 0..3 {
        connect(lab.a(), lab.c1(), ALLOWED)?;
        connect(lab.a2(), lab.c1(), ALLOWED)?;
        connect(lab.a2(), lab.c2(), DENIED)?;
        connect(lab.a(), lab.c1(), 22)?;
        connect(lab.c2(), lab.a(), 502)?;
        connect(lab.c2(), lab.a2(), 443)?;
        connect(lab.a(), lab.c2(), 23)?;
    }
    stage.open_flows(40)?;
    stage.denied_datagrams(12, 100)?;
    Ok(open)
}

/// Puts ports of the pool in use: a program run by `exec` keeps connections, and two clients have leases.
fn use_the_pool(stage: &Stage) -> Result<Process> {
    let lab = &stage.lab;
    let connect = format!(
        "import socket, time; kept = [socket.create_connection(to, 10) for to in [('{}', 502)] * 3 + [('{}', 443)] * 2]; \
         print('connected', flush=True); time.sleep(600)",
        lab.a().v4,
        lab.a2().v4
    );
    let mut exec = Command::new(agent::program()?);
    exec.arg("--config").arg(stage.agent.config()).arg("--pin-root").arg(stage.agent.pins());
    exec.args(["exec", "--", "python3", "-c", &connect]).stdout(Stdio::piped());
    let mut program = lab.b().netns.spawn_command(exec)?;
    let mut line = String::new();
    BufReader::new(program.child().stdout.take().context("stdout")?).read_line(&mut line)?;
    ensure!(line == "connected\n", "the program of exec says {line:?}");
    for (destination, count) in [(lab.a().at(Family::V4, 4840), "4"), (lab.a2().at(Family::V4, 443), "2")] {
        let destination = destination.to_string();
        stage.agent.run(&["ports", "acquire", &destination, "--count", count, "--for", "10m"])?;
    }
    Ok(program)
}

/// Serious and lesser findings, one line each.
fn findings(browser: &Browser) -> Result<Vec<String>> {
    browser.run(AXE)?;
    let result = browser.wait("axe.run().then((result) => done(result.violations.map((one) => one.id + ': ' + one.nodes.map((node) => node.html.slice(0, 160) + ' ' + node.failureSummary).join(' | '))))")?;
    Ok(result.as_array().into_iter().flatten().filter_map(Value::as_str).map(ToOwned::to_owned).collect())
}

#[test]
fn every_view_is_accessible_in_both_themes_and_widths() -> Result<()> {
    let stage = Stage::start()?;
    let lab = &stage.lab;
    let _devices = [(lab.a(), 502), (lab.a2(), 443)]
        .into_iter()
        .map(|(host, port)| tcp::Server::echo(&host.netns, host.at(Family::V4, port)))
        .collect::<std::io::Result<Vec<_>>>()?;
    let browser = Browser::start()?;
    browser.screen(1280, 900, false)?;
    browser.open(&stage.url)?;
    browser.shows("#strip", "connected", SOON)?;
    let _open = traffic(&stage)?;
    let mut program = use_the_pool(&stage)?;
    let host = HOST.replace("192.168.31.17", &lab.b().v4.to_string());
    let host = Agent::start(lab, lab.a(), &host)?;
    let (mut host_page, host_url) = page(&[], host.socket())?;
    browser.shows(".grid .body", "A rule denies.", SOON)?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ui");
    let mut wrong = Vec::new();
    for (width, height) in [(1280, 900), (390, 844)] {
        for dark in [false, true] {
            for view in ["events", "flows", "rules", "routes", "pool", "details"] {
                // The LAN host has the routes, the node everything else.
                if matches!(view, "events" | "routes" | "pool") {
                    browser.open(if view == "routes" { &host_url } else { &stage.url })?;
                    browser.shows("#strip", "connected", SOON)?;
                    browser.screen(width, height, dark)?;
                }
                let button = ["events", "flows", "rules", "routes", "pool"]
                    .iter()
                    .position(|one| *one == view)
                    .unwrap_or(0);
                browser.click(&format!("#views button:nth-child({})", button + 1))?;
                browser.shows(
                    "#views [aria-current]",
                    ["Events", "Flows", "Rules", "Routes", "Port pool"][button],
                    SOON,
                )?;
                if view == "details" {
                    browser.shows(".grid .body", "192.168.31", SOON)?;
                    browser.click(".grid .body .row")?;
                    browser.shows("#details", "Direction", SOON)?;
                }
                let shown = match view {
                    "events" | "details" => "A rule denies.",
                    "flows" => "established",
                    "rules" => "no-telnet",
                    "routes" => "10.200.4.0/24",
                    _ => "at most 4 towards one",
                };
                browser.shows("#view", shown, SOON)?;
                // Two frames, and the answer of the agent.
                browser.wait("setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(() => done(1))), 1200)")?;
                let theme = if dark { "dark" } else { "light" };
                browser.screenshot(&folder.join(format!("{view}-{theme}-{width}.png")))?;
                let wide = browser.run("return document.documentElement.scrollWidth - innerWidth")?;
                if wide.as_i64().is_none_or(|wide| wide > 0) {
                    wrong.push(format!(
                        "{view}, {theme}, {width}: the page is wider than the screen by {wide}"
                    ));
                }
                let apart = browser.run(
                    "const lefts = (row) => [...row.children].map((cell) => Math.round(cell.getBoundingClientRect().left)); \
                     const rows = [...document.querySelectorAll('.grid .row')].map((row) => lefts(row).join(' ')); \
                     return new Set(rows).size > 1 ? rows.join(' | ') : null",
                )?;
                if !apart.is_null() {
                    wrong.push(format!("{view}, {theme}, {width}: columns are not in line: {apart}"));
                }
                wrong.extend(
                    findings(&browser)?.into_iter().map(|one| format!("{view}, {theme}, {width}: {one}")),
                );
            }
            browser.keys(&["\u{e00c}"])?;
        }
    }
    drop(program.kill());
    host_page.kill()?;
    host_page.wait()?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(browser.console()?.is_empty(), "{:?}", browser.console()?);
    Ok(())
}
