//! Every view, in both themes and two widths: accessible by axe-core, and as pictures in target/ui.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use bridge_lab::{
    lab::{Family, Host},
    traffic::tcp,
};
use serde_json::Value;

use crate::{
    SOON,
    browser::Browser,
    stage::{ALLOWED, DENIED, Stage},
};

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
    browser.shows(".grid .body", "A rule denies.", SOON)?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/ui");
    let mut wrong = Vec::new();
    for (width, height) in [(1280, 900), (390, 844)] {
        for dark in [false, true] {
            browser.screen(width, height, dark)?;
            for view in ["events", "flows", "rules", "routes", "pool", "details"] {
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
                wrong.extend(
                    findings(&browser)?.into_iter().map(|one| format!("{view}, {theme}, {width}: {one}")),
                );
            }
            browser.keys(&["\u{e00c}"])?;
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(browser.console()?.is_empty(), "{:?}", browser.console()?);
    Ok(())
}
