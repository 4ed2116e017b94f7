//! The commands, as an operator types them: host A of the lab reaches pods only while their routes are there.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use bridge_lab::agent::program;
use bridge_lab::lab::{Family, Lab, Netns};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use rustix::process::Signal;
use serde_json::Value;

const SECONDS: Duration = Duration::from_secs(5);

struct Host {
    lab: Lab,
    directory: tempfile::TempDir,
}

impl Host {
    fn new(lab: Lab, config: &str, cluster: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755))?;
        let host = Self { lab, directory };
        std::fs::write(host.file("cluster.yaml"), cluster)?;
        std::fs::write(host.file("host.key"), "a key for these tests\n")?;
        std::fs::set_permissions(host.file("host.key"), PermissionsExt::from_mode(0o600))?;
        std::fs::write(host.file("pod.key"), "a key for these tests")?;
        std::fs::write(
            host.file("bridge.yaml"),
            config.replace("DIRECTORY", &host.directory.path().display().to_string()),
        )?;
        Ok(host)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(program().unwrap());
        command.args(words.split_whitespace()).arg("--config").arg(self.file("bridge.yaml"));
        command.arg("--socket").arg(self.file("agent.sock"));
        command
    }

    fn run(&self, words: &str) -> Result<String> {
        self.lab.a().netns.output(self.command(words))
    }

    /// Exit code and standard error.
    fn fails(&self, words: &str) -> (Option<i32>, String) {
        let output = self.lab.a().netns.run(|| self.command(words).output().unwrap());
        assert!(!output.status.success());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn reaches(&self, family: Family) -> Result<bool> {
        let server = tcp::Server::echo(&self.lab.c1().netns, self.lab.c1().at(family, 40002))?;
        let client = tcp::Client::new(&self.lab.a().netns).deadline(Duration::from_millis(500));
        let Ok(mut connection) = client.connect(server.address())?.reached() else { return Ok(false) };
        connection.round_trip(SECONDS)?;
        Ok(true)
    }

    fn table(&self) -> Result<String> {
        Ok(self.lab.a().netns.ip("-4 route show table all")?
            + &self.lab.a().netns.ip("-6 route show table all")?)
    }
}

const CONFIG: &str = "
role: host
networks: {pods: [10.200.0.0/16, 'fd20::/16'], external: [192.168.31.0/24, 'fd31::/64']}
routes:
  static: [{to: 10.200.1.0/24, via: 192.168.31.17}]
  file: DIRECTORY/cluster.yaml
";
const CLUSTER: &str = "nodes: [{name: b, addresses: ['fd31::17'], podNetworks: ['fd20:1::/64']}]\n";

#[test]
fn plan_apply_list_and_withdraw() -> Result<()> {
    let host = Host::new(Lab::builder().without_routes().build()?, CONFIG, CLUSTER)?;
    let before = host.table()?;
    assert_eq!((host.reaches(Family::V4)?, host.reaches(Family::V6)?), (false, false));
    let plan = "+ 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024\n\
                + fd20:1::/64 via fd31::17 dev eth0 proto 98 metric 1024\n";
    assert_eq!(host.run("routes plan")?, plan);
    assert_eq!(host.run("routes apply --dry-run")?, plan);
    let states = |host: &Host| -> Result<Vec<String>> {
        let rows: Value = serde_json::from_str(&host.run("routes list --json")?)?;
        Ok(rows
            .as_array()
            .unwrap()
            .iter()
            .map(|row| format!("{} {} {}", row["to"], row["source"], row["state"]).replace('"', ""))
            .collect())
    };
    assert_eq!(states(&host)?, ["10.200.1.0/24 static pending", "fd20:1::/64 file pending"]);
    assert_eq!(host.table()?, before, "nothing was done so far");

    assert_eq!(host.run("routes apply")?, plan);
    assert_eq!(states(&host)?, ["10.200.1.0/24 static installed", "fd20:1::/64 file installed"]);
    assert_eq!((host.reaches(Family::V4)?, host.reaches(Family::V6)?), (true, true));
    assert_eq!(host.run("routes plan")?, "Nothing to do.\n");

    std::fs::write(host.file("cluster.yaml"), "nodes: []")?;
    assert_eq!(host.run("routes apply")?, "- fd20:1::/64 via fd31::17 dev eth0 proto 98 metric 1024\n");
    assert_eq!((host.reaches(Family::V4)?, host.reaches(Family::V6)?), (true, false));

    let withdrawal = "- 10.200.1.0/24 via 192.168.31.17 dev eth0 proto 98 metric 1024\n";
    assert_eq!(host.run("routes withdraw --dry-run")?, withdrawal);
    assert!(host.reaches(Family::V4)?);
    assert_eq!(host.run("routes withdraw")?, withdrawal);
    assert!(!host.reaches(Family::V4)?);
    assert_eq!(host.table()?, before);
    Ok(())
}

#[test]
fn static_routes_need_neither_the_cluster_file_nor_the_key() -> Result<()> {
    let config =
        format!("{CONFIG}  discovery: {{listen: '192.168.31.67:12345', keyFile: DIRECTORY/absent.key}}\n");
    let host = Host::new(Lab::builder().without_routes().build()?, &config, CLUSTER)?;
    host.run("routes apply")?;
    std::fs::remove_file(host.file("cluster.yaml"))?;
    let export = host.run("routes export --format iproute2")?;
    assert!(export.contains("route replace 10.200.1.0/24 "), "{export}");
    // Without its file nothing is known of the other route, so it stays.
    assert_eq!(host.run("routes plan")?, "Nothing to do.\n");
    let output = host.lab.a().netns.run(|| host.command("routes plan").output())?;
    let warning = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(warning.contains("cluster.yaml") && warning.contains("left out"), "{warning}");
    Ok(())
}

#[test]
fn refusals_and_mistakes_say_what_to_write() -> Result<()> {
    let config = CONFIG.replace("via: 192.168.31.17", "via: 192.168.31.67");
    let host = Host::new(Lab::builder().without_routes().build()?, &config, "nodes: [{name: b}]")?;
    let (code, text) = host.fails("routes apply");
    assert_eq!(code, Some(1));
    assert!(text.contains("cluster.yaml") && text.contains("addresses"), "{text}");
    std::fs::write(host.file("cluster.yaml"), "nodes: []")?;
    let plan = host.run("routes apply")?;
    assert!(plan.starts_with("! 10.200.1.0/24 via 192.168.31.67 (static): next hop 192.168.31.67 is this host's own address (eth0); write"), "{plan}");
    assert_eq!(host.fails("routes export --format nonsense").0, Some(2));
    let (code, text) = host.fails("routes export --format netplan");
    assert!(code == Some(1) && text.contains("write `--dev NAME`"), "{text}");
    let (code, text) = host.fails("discover listen");
    assert!(code == Some(1) && text.contains("configures no routes.discovery"), "{text}");
    std::fs::set_permissions(host.file("host.key"), PermissionsExt::from_mode(0o644))?;
    let (code, text) = host.fails(&format!(
        "discover listen --listen 192.168.31.67:12345 --key-file {}",
        host.file("host.key").display()
    ));
    assert!(code == Some(1) && text.contains("chmod 600"), "{text}");
    Ok(())
}

/// A pod without privileges: `nobody`, with no capability.
fn unprivileged(netns: &Netns, mut command: Command) -> Result<String> {
    command.uid(65534).gid(65534);
    netns.output(command)
}

#[test]
fn discover_from_listen_to_withdrawal() -> Result<()> {
    let host = Host::new(Lab::builder().without_routes().masquerade().build()?, CONFIG, CLUSTER)?;
    std::fs::write(
        host.file("bridge.yaml"),
        "role: host\nnetworks: {pods: [10.200.0.0/16], external: [192.168.31.0/24]}\nroutes: {static: [{to: 10.200.7.0/24, via: 192.168.31.17}]}\n",
    )?;
    host.run("routes apply")?;
    let (key, pod_key) = (host.file("host.key"), host.file("pod.key"));
    let listen =
        host.command(&format!("discover listen --listen 192.168.31.67:12345 --key-file {}", key.display()));
    let mut listening = host.lab.a().netns.spawn_command(listen)?;
    let up = eventually(SECONDS, || {
        host.lab.a().netns.run(|| std::net::TcpStream::connect("192.168.31.67:12345").ok())
    });
    assert!(up.is_some(), "it listens");
    assert!(!host.reaches(Family::V4)?);

    // The pod has neither configuration nor socket of an agent; a copy of the program that anybody may run.
    let copy = host.file("bridge-agent");
    std::fs::copy(program()?, &copy)?;
    let probe = |words: &[&str]| {
        let mut command = Command::new(&copy);
        command
            .args(["discover", "probe", "192.168.31.67:12345", "--name", "c1", "--key-file"])
            .arg(&pod_key)
            .args(words);
        unprivileged(&host.lab.c1().netns, command)
    };
    let answer: Value = serde_json::from_str(&probe(&["--json"])?)?;
    assert_eq!(
        (&answer["ok"], &answer["egress"], &answer["lifetime"]),
        (&true.into(), &"192.168.31.17".into(), &300.into())
    );
    assert!(host.reaches(Family::V4)?);
    assert!(probe(&[])?.contains(
        "sees this pod as 192.168.31.17 and reaches it for 300 s by: 10.200.1.91/32 via 192.168.31.17"
    ));
    let other = host.lab.a().netns.ip("route show proto 98")?;
    assert!(other.contains("10.200.7.0/24 via 192.168.31.17"), "routes of other sources stay: {other}");

    listening.signal(Signal::TERM)?;
    assert!(listening.wait(SECONDS)?.is_some_and(|status| status.success()));
    let left = host.lab.a().netns.ip("route show proto 98")?;
    assert!(!left.contains("10.200.1.91") && left.contains("10.200.7.0/24"), "{left}");
    assert!(!host.reaches(Family::V4)?);
    Ok(())
}

#[test]
fn sniff_names_the_node() -> Result<()> {
    let host = Host::new(Lab::builder().without_routes().masquerade().build()?, CONFIG, CLUSTER)?;
    let output = std::thread::scope(|scope| {
        let sniffing = scope.spawn(|| host.run("discover sniff --port 7000 --count 1 --for 20s --json"));
        // Nothing listens, and the sniffer needs a moment to start.
        while !sniffing.is_finished() {
            let pod = &host.lab.c1().netns;
            _ = pod.run(|| {
                std::net::TcpStream::connect_timeout(&"192.168.31.67:7000".parse().unwrap(), SECONDS)
            });
            std::thread::sleep(Duration::from_millis(20));
        }
        sniffing.join().unwrap()
    })?;
    let seen: Value = serde_json::from_str(&output)?;
    assert_eq!(seen, serde_json::json!([{ "egress": "192.168.31.17", "connections": 1 }]));
    Ok(())
}

/// Polls the file until it has this route and not that one.
#[track_caller]
fn until_exported(file: &std::path::Path, has: &str, not: &str) {
    let text = || std::fs::read_to_string(file).unwrap_or_default();
    let seen = eventually(Duration::from_secs(20), || {
        let text = text();
        (text.contains(has) && (not.is_empty() || !text.contains(not))).then_some(())
    });
    assert!(seen.is_some(), "wanted {has}, and not {not}:\n{}", text());
}

#[test]
fn export_follows_every_file_and_applies_each_change() -> Result<()> {
    let host = Host::new(Lab::builder().without_routes().build()?, CONFIG, CLUSTER)?;
    let output = host.file("routes.batch");
    std::fs::write(&output, "")?;
    std::fs::set_permissions(&output, PermissionsExt::from_mode(0o644))?;
    // The first run fails, and is repeated.
    let mark = host.file("failed-once");
    let then = format!(
        "test -e {mark} || {{ touch {mark}; exit 1; }}; ip route flush proto 98; ip -6 route flush proto 98; ip -batch $BRIDGE_ROUTES",
        mark = mark.display()
    );
    let mut command = host.command("routes export --format iproute2 --watch");
    command.arg("--output").arg(&output).arg("--then").arg(&then);
    let mut following = host.lab.a().netns.spawn_command(command)?;
    let reaches = |wanted: (bool, bool)| {
        let reached = || Ok::<_, anyhow::Error>((host.reaches(Family::V4)?, host.reaches(Family::V6)?));
        let seen = eventually(Duration::from_secs(20), || (reached().ok()? == wanted).then_some(()));
        anyhow::ensure!(seen.is_some(), "wanted {wanted:?}, found {:?}", reached()?);
        Ok(())
    };
    until_exported(&output, "10.200.1.0/24", "");
    reaches((true, true))?;
    assert_eq!(std::fs::metadata(&output)?.permissions().mode() & 0o777, 0o644, "the mode of the file stays");

    // A file that is not valid, and one that is missing, change nothing; the next good one does.
    std::fs::write(host.file("cluster.yaml"), "nodes: [{name: b}]")?;
    std::fs::remove_file(host.file("cluster.yaml"))?;
    std::fs::write(
        host.file("bridge.yaml"),
        CONFIG
            .replace("DIRECTORY", &host.directory.path().display().to_string())
            .replace("10.200.1.0/24", "10.200.7.0/24"),
    )?;
    std::thread::sleep(Duration::from_millis(300));
    until_exported(&output, "fd20:1::/64", "10.200.7.0/24");
    std::fs::write(
        host.file("cluster.yaml"),
        "nodes: [{name: b, addresses: ['fd31::18'], podNetworks: ['fd20:1::/64']}]\n",
    )?;
    until_exported(&output, "fd20:1::/64 proto 98 metric 1024 table 254 via fd31::18", "10.200.1.0/24");
    reaches((false, false))?;
    std::fs::write(host.file("cluster.yaml"), CLUSTER)?;
    until_exported(&output, "via fd31::17", "via fd31::18");
    reaches((false, true))?;

    following.signal(Signal::TERM)?;
    assert!(following.wait(SECONDS)?.is_some());
    let (code, text) = host.fails("routes export --format iproute2 --watch");
    assert!(code == Some(2) && text.contains("--output"), "{text}");
    Ok(())
}
