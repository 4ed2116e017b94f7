//! Client libraries in other languages against a running agent.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::{
    agent::Agent,
    lab::{Family, Lab},
    traffic::tcp::Server,
};

const PORTS: &str = "61001-61010";

#[test]
fn the_python_package_connects_from_the_pool_and_reports_each_refusal() -> Result<()> {
    let lab = Lab::builder().build()?;
    let servers = Family::BOTH.map(|family| Server::echo(&lab.c1().netns, lab.c1().at(family, 8080)));
    let servers = servers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let agent = Agent::start(
        &lab,
        lab.a(),
        &format!(
            "role: host\nnetworks: {{pods: [10.200.0.0/16, 'fd20::/16']}}\nportPool: {{ports: [\"{PORTS}\"]}}\n\
             persistence: {{save: never}}\n"
        ),
    )?;
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../clients/python");
    let addresses: Vec<_> = servers.iter().map(Server::address).collect();
    let addresses: Vec<_> = addresses.iter().map(|to| format!("{}/{}", to.ip(), to.port())).collect();
    let mut python = Command::new("python3");
    python.args([
        "-B",
        "-W",
        "error::DeprecationWarning",
        "-m",
        "unittest",
        "discover",
        "--start-directory",
        "tests",
    ]);
    python.current_dir(&package).env("PYTHONPATH", package.join("src"));
    python
        .env("BRIDGE_SOCKET", agent.socket())
        .env("BRIDGE_SERVERS", addresses.join(" "))
        .env("BRIDGE_PORTS", PORTS);
    let output =
        lab.a().netns.run(|| python.stdin(Stdio::null()).output()).context("python3 (is it installed?)")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && text.contains("Ran 9 tests"), "{text}");
    Ok(())
}
