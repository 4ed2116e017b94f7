//! Requests that the page refuses.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::stage::{Stage, page};

/// Sends a request as it is, and returns the answer.
fn ask(origin: &str, request: &str) -> Result<String> {
    let address = origin.strip_prefix("http://").context("an address")?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A request with a token and a host.
fn request(method: &str, path: &str, host: &str, token: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
    )
}

#[test]
fn foreign_hosts_missing_tokens_write_verbs_and_path_tricks_are_refused() -> Result<()> {
    let stage = Stage::start()?;
    let (origin, token) = (stage.origin(), stage.token());
    let host = origin.trim_start_matches("http://");
    let port = host.rsplit(':').next().context("a port")?;
    let status = |request: &str| -> Result<u16> {
        let answer = ask(&origin, request)?;
        Ok(answer.get(9..12).with_context(|| answer.clone())?.parse()?)
    };
    let is = |expected: u16, request: String| -> Result<()> {
        let seen = status(&request)?;
        ensure!(seen == expected, "{seen}, not {expected}: {request}");
        Ok(())
    };
    let answer = ask(&origin, &request("GET", "/api/status", host, token))?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"pid\""), "{answer}");
    is(200, request("GET", "/", &format!("localhost:{port}"), ""))?;

    for foreign in
        ["example.org", &format!("example.org:{port}"), "127.0.0.1", &format!("127.0.0.1:{port}.example.org")]
    {
        is(421, request("GET", "/", foreign, token))?;
        is(421, request("GET", "/api/status", foreign, token))?;
        is(421, request("GET", &format!("http://{foreign}/api/status"), host, token))?;
    }
    is(421, "GET / HTTP/1.0\r\n\r\n".to_owned())?;
    is(421, format!("GET / HTTP/1.1\r\nHost: {host}\r\nHost: example.org\r\nConnection: close\r\n\r\n"))?;

    for path in ["status", "flows", "rules", "counters", "routes", "leases", "events", "explain", "about"] {
        is(401, format!("GET /api/{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"))?;
    }
    for wrong in
        ["", "0", &token[1..], &format!("{token}0"), &token.to_uppercase().replace(char::is_numeric, "0")]
    {
        is(401, request("GET", "/api/status", host, wrong))?;
    }
    is(401, request("GET", &format!("/api/status?token={token}"), host, ""))?;

    for verb in ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PURGE"] {
        for path in ["/", "/api/status", "/api/leases", "/api/explain", "/v1/reload"] {
            is(405, request(verb, path, host, token))?;
        }
    }
    for path in [
        "/v1/status",
        "/metrics",
        "/api/reload",
        "/api/apply",
        "/api/v1/status",
        "/api/",
        "/api/status/",
        "/api//status",
        "/api/../v1/reload",
        "/api/status/../../v1/reload",
        "/%61pi/status",
        "/api/%2e%2e/v1/reload",
        "/../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/app.js/",
        "/page/app.js",
        "/app.js%00",
        "/index.html",
    ] {
        is(404, request("GET", path, host, token))?;
    }
    is(400, request("GET", "/api/status\\..\\x y", host, token))?;

    let root = ask(&origin, &request("GET", "/", host, ""))?.to_lowercase();
    for header in [
        "content-security-policy: default-src 'none'; script-src 'self'",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "cross-origin-resource-policy: same-origin",
    ] {
        ensure!(root.contains(header), "no {header}: {root}");
    }
    ensure!(!root.contains("access-control-allow"), "{root}");
    ensure!(!root.contains(token), "the page holds the token");
    Ok(())
}

#[test]
fn the_permission_of_the_socket_decides_who_may_look() -> Result<()> {
    let stage = Stage::start()?;
    let (mut child, url) =
        page(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"], stage.agent.socket())?;
    let (origin, token) = url.split_once("/#token=").with_context(|| url.clone())?;
    let host = origin.trim_start_matches("http://");
    let answer = ask(origin, &request("GET", "/api/status", host, token));
    child.kill()?;
    child.wait()?;
    let answer = answer?;
    ensure!(answer.starts_with("HTTP/1.1 502") && answer.contains("Permission denied"), "{answer}");
    Ok(())
}

#[test]
fn a_page_listens_on_a_loopback_address_only() -> Result<()> {
    for (address, remedy) in [("0.0.0.0:0", "ssh -L"), ("localhost:9470", "such as 127.0.0.1:9470")] {
        let command = std::process::Command::new(bridge_lab::agent::program()?)
            .args(["ui", "--listen", address, "--socket", "/nonexistent"])
            .output()?;
        let text = String::from_utf8_lossy(&command.stderr);
        ensure!(!command.status.success() && text.contains(remedy), "{text}");
    }
    Ok(())
}
