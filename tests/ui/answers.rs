//! The page beside an agent that answers with given texts: hostile names, large answers, another version.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    process::Child,
    sync::Arc,
    thread,
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{SOON, browser::Browser, stage::page};

/// Answers by path.
type Answers = Vec<(&'static str, String)>;

/// A page and its agent. Dropping it ends the page.
struct Beside {
    page: Child,
    url: String,
    _directory: tempfile::TempDir,
}

impl Drop for Beside {
    fn drop(&mut self) {
        drop(self.page.kill());
        drop(self.page.wait());
    }
}

fn answer(stream: UnixStream, answers: &Answers) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    while reader.read_line(&mut request)? > 2 {}
    let path = request.split(' ').nth(1).unwrap_or_default();
    let found = answers.iter().find(|(known, _)| path.split('?').next() == Some(*known));
    let (status, body) = found.map_or(("404 Not Found", "{}"), |(_, body)| ("200 OK", body.as_str()));
    let (events, length) = (path.starts_with("/v1/events"), body.len());
    let kind = if events {
        "text/event-stream".into()
    } else {
        format!("application/json\r\nContent-Length: {length}")
    };
    let stream = reader.get_mut();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n{body}")?;
    // A stream stays open until its reader closes it.
    while events && reader.read(&mut [0])? > 0 {}
    Ok(())
}

impl Beside {
    fn start(answers: Answers) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket)?;
        let answers = Arc::new(answers);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answers = Arc::clone(&answers);
                // The page may close it first.
                thread::spawn(move || drop(answer(stream, &answers)));
            }
        });
        let (page, url) = page(&[], &socket)?;
        Ok(Self { page, url, _directory: directory })
    }

    /// The address with this query.
    fn with(&self, query: &str) -> String {
        self.url.replace("/#", &format!("/?{query}#"))
    }
}

fn status() -> Value {
    let counted =
        json!({ "deniedByIptables": {}, "deniedByNftables": { "bridge:no_rule": 7 }, "deniedByEbpf": 0 });
    json!({ "version": "0.1.0", "role": "node", "warnings": [], "flows": { "established": 12000, "halfOpen": 1 },
        "enforcement": { "mode": "enforce", "generation": 1, "interfaces": [], "remarks": [] },
        "firewall": { "engine": "nftables", "divergence": counted } })
}

fn event(number: usize, verdict: &str, port: usize, interface: &str) -> String {
    let data = json!({ "time": "2026-01-02T03:04:05Z", "verdict": verdict, "reason": "no_rule", "direction": "inbound",
        "protocol": "tcp", "source": "192.168.31.67", "sourcePort": 50000, "destination": "10.200.1.91",
        "destinationPort": port, "rule": null, "interface": interface, "length": 74, "detail": 2, "generation": 1,
        "suppressed": 0 });
    format!("id: 1-{number}\nevent: verdict\ndata: {data}\n\n")
}

const HOSTILE: &str = "<img src=x onerror=document.title='taken'>\u{202e}";

#[test]
fn hostile_names_and_addresses_are_text() -> Result<()> {
    let name = HOSTILE.to_owned() + &"x".repeat(4096);
    let rules = json!([{ "index": 0, "name": name, "direction": "inbound", "action": "allow", "hits": 1 }]);
    let events = event(0, "reject", 22, &name) + &event(1, "audit-allow", 23, &name);
    let beside = Beside::start(vec![
        ("/v1/status", status().to_string()),
        ("/v1/flows", json!({ "flows": [], "total": 0 }).to_string()),
        ("/v1/rules", rules.to_string()),
        ("/v1/events", events),
    ])?;
    let browser = Browser::start()?;
    browser
        .open(&beside.with(
            "view=constructor&filter=constructor:x%20__proto__:%3Cimg%20src=x%20onerror=alert(1)%3E",
        ))?;
    browser.shows("#view", "No row matches the filter", SOON)?;
    browser.open(&beside.with("view=rules"))?;
    browser.shows(".grid .body", HOSTILE, SOON)?;
    let wide = browser.run("return document.documentElement.scrollWidth - innerWidth")?;
    ensure!(wide.as_i64().is_some_and(|wide| wide <= 0), "the page is wider than the screen by {wide}");
    browser.click(".grid .body .row")?;
    browser.shows("#details", HOSTILE, SOON)?;
    browser.open(&beside.with("view=events"))?;
    browser.shows(".grid .body", "audit-allow", SOON)?;
    browser.shows("#map", "192.168.31.67", SOON)?;
    browser.click(".grid .body .row")?;
    browser.shows("#details", "would allow it", SOON)?;
    ensure!(
        browser.run("return document.title")? == "bridge" && browser.console()?.is_empty(),
        "{:?}",
        browser.console()?
    );
    Ok(())
}

#[test]
fn the_page_says_what_it_does_not_show_and_which_engine_differs() -> Result<()> {
    let flow = |port: u16| {
        json!({ "protocol": "tcp", "source": "192.168.31.67", "sourcePort": port, "destination": "10.200.1.91",
            "destinationPort": 80, "direction": "inbound", "state": "established", "ageSeconds": port, "idleSeconds": 1 })
    };
    let flows: Vec<_> = (1..=50).map(flow).collect();
    // The first row again in the middle: the rows that were not seen since then go first.
    let ports = (1..=6000).chain([1]).chain(6001..=12000);
    let events = ports.enumerate().map(|(number, port)| event(number, "reject", port, "eth0")).collect();
    let beside = Beside::start(vec![
        ("/v1/status", status().to_string()),
        ("/v1/flows", json!({ "flows": flows, "total": 12001 }).to_string()),
        ("/v1/events", events),
    ])?;
    let browser = Browser::start()?;
    browser.open(&beside.with("filter=port:1"))?;
    browser.shows("#strip", "disagree on 7", SOON)?;
    browser.shows("#count", "1 of 10,000", SOON)?;
    browser.shows(".grid .body", "×2", SOON)?;

    // By keyboard: the title of a column sorts, from the focus of the table on.
    browser.open(&beside.with("view=flows"))?;
    browser.shows("#count", "50 of 12,001", SOON)?;
    browser.run("document.querySelector('.grid').focus()")?;
    browser.keys(&["\u{e015}", "\u{e004}", "\u{e004}", "\u{e007}"])?;
    browser.shows("[aria-sort=descending]", "Source", SOON)?;
    ensure!(browser.run("return document.getElementById('details').hidden")? == true, "a row was opened");
    let lines = browser.console()?;
    ensure!(lines.is_empty(), "{lines:?}");
    Ok(())
}

#[test]
fn the_printed_address_works_in_an_open_tab_and_bookmarks_in_another_one() -> Result<()> {
    let flows = json!({ "flows": [], "total": 0 }).to_string();
    let events = event(0, "reject", 22, "eth0");
    let answers = vec![("/v1/status", status().to_string()), ("/v1/flows", flows), ("/v1/events", events)];
    let beside = Beside::start(answers)?;
    let browser = Browser::start()?;
    let origin = beside.url.split('#').next().unwrap_or_default();
    browser.open(origin)?;
    browser.shows("#banner", "token is missing", SOON)?;
    browser.open(&beside.url)?;
    browser.shows("#strip", "connected", SOON)?;
    browser.shows(".grid .body", "No rule matches.", SOON)?;
    browser.other_tab()?;
    browser.open(&format!("{origin}?filter=port:22"))?;
    browser.shows("#count", "1 row", SOON).map(drop)
}

#[test]
fn an_agent_of_another_version_is_named_and_the_page_goes_on() -> Result<()> {
    let mut other = status();
    other["version"] = "7.0.0".into();
    other["enforcement"] = json!({ "mode": "enforce" });
    let flows = json!({ "flows": [], "total": 0 }).to_string();
    let answers =
        vec![("/v1/status", other.to_string()), ("/v1/flows", flows), ("/v1/events", String::new())];
    let beside = Beside::start(answers)?;
    let browser = Browser::start()?;
    browser.open(&beside.url)?;
    browser.shows("#banner", "cannot show the agent of version 7.0.0", SOON)?;
    ensure!(browser.console()?.is_empty(), "{:?}", browser.console()?);
    Ok(())
}
