//! Debian's Chromium, steered through chromedriver (W3C WebDriver over HTTP).

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::wait::{eventually, patience};
use serde_json::{Value, json};

/// A browser with one window. Dropping it ends it.
pub(crate) struct Browser {
    driver: Child,
    port: u16,
    session: String,
    _profile: tempfile::TempDir,
}

impl Browser {
    pub(crate) fn start() -> Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let profile = tempfile::tempdir()?;
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(
                "NOT RUN: chromedriver is missing, install Debian's chromium-driver by `cargo xtask setup`",
            )?;
        let mut browser = Self { driver, port, session: String::new(), _profile: profile };
        let ready = eventually(patience(Duration::from_secs(20)), || {
            browser.send("GET", "/status", &Value::Null).ok()?["ready"].as_bool()?.then_some(())
        });
        ensure!(ready.is_some(), "chromedriver does not answer");
        // Without these, Chromium itself calls its maker's servers.
        let arguments = [
            "--headless=new".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-background-networking".to_owned(),
            "--disable-component-update".to_owned(),
            "--no-first-run".to_owned(),
            "--hide-scrollbars".to_owned(),
            format!("--user-data-dir={}", browser._profile.path().display()),
        ];
        let options = json!({ "args": arguments });
        let wanted = json!({ "browserName": "chrome", "goog:chromeOptions": options,
            "goog:loggingPrefs": { "performance": "ALL", "browser": "ALL" } });
        let answer =
            browser.send("POST", "/session", &json!({ "capabilities": { "alwaysMatch": wanted } }))?;
        answer["sessionId"].as_str().context("no session")?.clone_into(&mut browser.session);
        Ok(browser)
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(patience(Duration::from_secs(60))))?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            self.port,
            body.len()
        )?;
        // The driver keeps the connection.
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(reader.read_line(&mut head)? > 0, "chromedriver hung up: {head}");
        }
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
        });
        let mut body = vec![0; length.context("an answer without a length")?];
        reader.read_exact(&mut body)?;
        let value: Value = serde_json::from_slice(&body)?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{method} {path}: {}", value["value"]["message"]);
        Ok(value["value"].clone())
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        self.send(method, &format!("/session/{}{path}", self.session), body)
    }

    pub(crate) fn open(&self, url: &str) -> Result<()> {
        self.call("POST", "/url", &json!({ "url": url })).map(drop)
    }

    /// Opens another tab, and goes on in it.
    pub(crate) fn other_tab(&self) -> Result<()> {
        let tab = self.call("POST", "/window/new", &json!({ "type": "tab" }))?;
        self.call("POST", "/window", &json!({ "handle": tab["handle"] })).map(drop)
    }

    pub(crate) fn reload(&self) -> Result<()> {
        self.call("POST", "/refresh", &json!({})).map(drop)
    }

    pub(crate) fn url(&self) -> Result<String> {
        Ok(self.call("GET", "/url", &Value::Null)?.as_str().unwrap_or_default().to_owned())
    }

    /// Runs a function body in the page, and returns its value.
    pub(crate) fn run(&self, script: &str) -> Result<Value> {
        self.call("POST", "/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Runs a function body in the page that calls its argument with a value.
    pub(crate) fn wait(&self, script: &str) -> Result<Value> {
        let script = format!("const done = arguments[arguments.length - 1]; {script}");
        self.call("POST", "/execute/async", &json!({ "script": script, "args": [] }))
    }

    pub(crate) fn text(&self, selector: &str) -> Result<String> {
        let script = format!(
            "return [...document.querySelectorAll({})].map((e) => e.textContent).join('\\n')",
            json!(selector)
        );
        Ok(self.run(&script)?.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until an element that the selector finds has a text.
    pub(crate) fn shows(&self, selector: &str, text: &str, within: Duration) -> Result<Duration> {
        let start = std::time::Instant::now();
        let seen = eventually(patience(within), || self.text(selector).ok()?.contains(text).then_some(()));
        let shown = || self.text("body").unwrap_or_default();
        let console = || self.console().unwrap_or_default();
        ensure!(
            seen.is_some(),
            "{selector} shows no {text:?} within {within:?}: {}\n{:?}",
            shown(),
            console()
        );
        Ok(start.elapsed())
    }

    /// Clicks the first element that the selector finds, once there is one.
    pub(crate) fn click(&self, selector: &str) -> Result<()> {
        let script = format!(
            "const e = document.querySelector({}); if (e) e.click(); return e !== null",
            json!(selector)
        );
        let clicked = eventually(patience(Duration::from_secs(10)), || {
            self.run(&script).ok()?.as_bool().filter(|found| *found)
        });
        clicked.map(drop).with_context(|| format!("nothing to click: {selector}"))
    }

    /// Types into the focused element, as keys.
    pub(crate) fn keys(&self, keys: &[&str]) -> Result<()> {
        let press = |key: &&str| {
            [json!({ "type": "keyDown", "value": key }), json!({ "type": "keyUp", "value": key })]
        };
        let actions: Vec<Value> = keys.iter().flat_map(press).collect();
        let keyboard = json!({ "type": "key", "id": "keyboard", "actions": actions });
        self.call("POST", "/actions", &json!({ "actions": [keyboard] })).map(drop)
    }

    /// Emulates a screen of this width, in one of the themes.
    pub(crate) fn screen(&self, width: u32, height: u32, dark: bool) -> Result<()> {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.devtools("Emulation.setDeviceMetricsOverride", &metrics)?;
        let theme = if dark { "dark" } else { "light" };
        let script = format!(
            "if (document.documentElement.dataset.theme !== '{theme}') document.getElementById('theme')?.click()"
        );
        self.run(&script).map(drop)
    }

    fn devtools(&self, command: &str, parameters: &Value) -> Result<Value> {
        self.call("POST", "/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    pub(crate) fn screenshot(&self, file: &Path) -> Result<()> {
        let answer = self.devtools("Page.captureScreenshot", &json!({ "format": "png" }))?;
        let encoded = answer["data"].as_str().context("no picture")?;
        fs::create_dir_all(file.parent().context("a folder")?)?;
        fs::write(file, base64(encoded)?).context("write the picture")
    }

    /// Asserts that the browser asked the server at this origin alone since the last call.
    pub(crate) fn asked_only(&self, origin: &str) -> Result<()> {
        let requests = self.requests()?;
        // Pages of the browser itself (chrome:) and data: URLs are no requests.
        let on_network = |url: &&String| ["http", "ws", "ftp"].iter().any(|scheme| url.starts_with(scheme));
        let foreign: Vec<_> =
            requests.iter().filter(on_network).filter(|url| !url.starts_with(origin)).collect();
        ensure!(foreign.is_empty(), "requests left the page's own server: {foreign:?}");
        ensure!(
            requests.iter().any(|url| url.contains("/api/events")),
            "no request was recorded: {requests:?}"
        );
        Ok(())
    }

    /// The addresses that the browser asked for, since the last call.
    fn requests(&self) -> Result<Vec<String>> {
        let log = self.call("POST", "/se/log", &json!({ "type": "performance" }))?;
        let entries = log.as_array().into_iter().flatten();
        let message = |entry: &Value| serde_json::from_str::<Value>(entry["message"].as_str()?).ok();
        let url = |message: Value| {
            let message = &message["message"];
            let url = match message["method"].as_str()? {
                "Network.requestWillBeSent" => &message["params"]["request"]["url"],
                "Network.webSocketCreated" => &message["params"]["url"],
                _ => return None,
            };
            Some(url.as_str().unwrap_or_default().to_owned())
        };
        Ok(entries.filter_map(message).filter_map(url).collect())
    }

    /// Errors and warnings of the page's console.
    pub(crate) fn console(&self) -> Result<Vec<String>> {
        let log = self.call("POST", "/se/log", &json!({ "type": "browser" }))?;
        let entries = log.as_array().into_iter().flatten();
        Ok(entries.filter_map(|entry| Some(entry["message"].as_str()?.to_owned())).collect())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends the browser; both may be gone already.
        drop(self.call("DELETE", "", &Value::Null));
        drop(self.driver.kill());
        drop(self.driver.wait());
    }
}

/// Decodes base64 (RFC 4648).
fn base64(text: &str) -> Result<Vec<u8>> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut length) = (0_u32, 0);
    for byte in text.bytes().filter(|byte| *byte != b'=') {
        let digit = ALPHABET.iter().position(|one| *one == byte).context("not base64")?;
        bits = bits << 6 | u32::try_from(digit)?;
        length += 6;
        if length >= 8 {
            length -= 8;
            bytes.push(u8::try_from(bits >> length & 0xff)?);
        }
    }
    Ok(bytes)
}
