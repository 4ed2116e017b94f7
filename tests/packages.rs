//! The .deb and the .rpm in a bare Debian system: `cargo xtask dist --test`.
//!
//! The system is booted by systemd-nspawn in the network namespace of a node of the lab, with its own systemd, so the unit of
//! the package starts the agent, and the agent uses its default paths.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bridge_lab::{
    lab::{Family, Host, Lab, Process},
    traffic::tcp::{Client, Connection, Server},
    wait::{eventually, patience},
};

const SECOND: Duration = Duration::from_secs(1);
/// From the start of the installation to an enforced rule.
const MINUTE: Duration = Duration::from_secs(60);
const ALLOWED: u16 = 40002;
const DENIED: u16 = 40003;

const CONFIG: &str = "role: node\n\
     networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\n\
     enforcement: {engines: [ebpf]}\n\
     rules: [{name: in, direction: inbound, protocol: tcp, ports: [40002]}]\n\
     persistence: {save: never}\n";

/// Files that come with the program.
const COMPANIONS: [&str; 6] = [
    "/usr/share/man/man1/bridge-agent.1.gz",
    "/usr/share/man/man1/bridge-agent-run.1.gz",
    "/usr/share/bash-completion/completions/bridge-agent",
    "/usr/share/fish/vendor_completions.d/bridge-agent.fish",
    "/usr/share/doc/bridge-agent/examples/node.yaml",
    "/usr/share/doc/bridge-agent/LICENSE-MIT",
];

/// A package manager.
struct Manager {
    /// Installs a package, also over another version.
    install: &'static str,
    /// Installs the version that is installed.
    reinstall: &'static str,
    remove: &'static str,
    /// Checks the files of the package.
    verify: &'static str,
    /// Where completions of zsh belong.
    zsh: &'static str,
}

const DPKG: Manager = Manager {
    install: "dpkg -i",
    reinstall: "dpkg -i",
    remove: "dpkg --remove bridge-agent",
    verify: "test -z \"$(dpkg --verify bridge-agent)\"",
    zsh: "/usr/share/zsh/vendor-completions/_bridge-agent",
};

// Debian's rpm asks for confirmation by an option, and Debian's packages are none of its own.
const RPM: Manager = Manager {
    install: "rpm --nodeps --force-debian --upgrade",
    reinstall: "rpm --nodeps --force-debian --upgrade --replacepkgs",
    remove: "rpm --nodeps --force-debian --erase bridge-agent",
    verify: "rpm --verify --nomtime --nodeps --force-debian bridge-agent",
    zsh: "/usr/share/zsh/site-functions/_bridge-agent",
};

fn given(name: &str) -> Result<PathBuf> {
    let path = env::var_os(name);
    path.map(PathBuf::from).with_context(|| format!("{name} is unset: run `cargo xtask dist --test`"))
}

/// A Debian system that has booted. Dropping it ends all its processes; its BPF file system is removed.
struct System {
    /// Process id of its systemd, as this host sees it.
    init: u32,
    root: PathBuf,
    bpf: PathBuf,
    _container: Process,
}

impl System {
    /// Boots the system in `root` as the node `host`.
    fn boot(lab: &Lab, host: &Host, root: PathBuf) -> Result<Self> {
        let bpf = lab.directory().join("bpf");
        fs::create_dir_all(&bpf)?;
        run(Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&bpf))?;
        let log = fs::File::create(lab.directory().join("console"))?;
        let mut nspawn = Command::new("systemd-nspawn");
        nspawn.arg("--directory").arg(&root);
        nspawn.args(["--boot", "--register=no", "--keep-unit", "--console=pipe", "--capability=all"]);
        nspawn.args(["--system-call-filter=bpf perf_event_open", "--machine=bridge-lab"]);
        nspawn.arg(format!("--network-namespace-path=/run/netns/{}", host.netns.name()));
        nspawn.arg(format!("--bind={}:/sys/fs/bpf", bpf.display()));
        // The agent writes below /proc/sys/net, as on a host.
        nspawn.env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "network");
        nspawn.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let container = host.netns.spawn_command(nspawn).context("start systemd-nspawn")?;
        let children = format!("/proc/{0}/task/{0}/children", container.id());
        let init = eventually(patience(SECOND * 30), || {
            let children = fs::read_to_string(&children).ok()?;
            children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(|pid| is_init(*pid))
        });
        let console = || fs::read_to_string(lab.directory().join("console")).unwrap_or_default();
        let Some(init) = init else { bail!("systemd-nspawn starts no system:\n{}", console()) };
        let system = Self { init, root, bpf, _container: container };
        let booted = || system.run("systemctl is-system-running | grep -E 'running|degraded'").ok();
        if eventually(patience(MINUTE), booted).is_none() {
            let state = system.run("systemctl is-system-running; systemctl list-jobs");
            bail!("the system does not boot: {state:?}\n{}", console());
        }
        system.run("rm -rf /var/log/journal")?;
        Ok(system)
    }

    /// Runs a shell command in the system; returns its output.
    fn run(&self, script: &str) -> Result<String> {
        let target = self.init.to_string();
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &target, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root"]);
        command.args(["--wd=/", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-euc", script]);
        run(&mut command)
    }

    /// Copies the package into the system and runs `command` on it; returns its messages.
    fn install(&self, command: &str, package: &Path) -> Result<String> {
        let name = package.file_name().context("a package without a name")?;
        fs::copy(package, self.root.join(name))?;
        self.run(&format!("{command} /{} 2>&1", name.to_string_lossy()))
    }

    fn is_enabled(&self) -> Result<String> {
        self.run("systemctl is-enabled bridge-agent bridge-nftables || true")
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // Unmounted here, removed with the directory of the lab.
        let _ = Command::new("umount").arg("--lazy").arg(&self.bpf).status();
    }
}

/// Returns whether the process has the id 1 in a namespace of its own.
fn is_init(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"))
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{command:?}:\n{}{}", text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

/// Checks both rules by new connections.
fn enforces(lab: &Lab, when: &str) -> Result<()> {
    let connect =
        |port| Client::new(&lab.a().netns).deadline(SECOND * 2).connect(lab.c1().at(Family::V4, port));
    ensure!(connect(ALLOWED)?.succeeded(), "{when}: the allowed port");
    ensure!(connect(DENIED)?.refused(), "{when}: the denied port");
    Ok(())
}

/// Installs `older`, enforces, and replaces it by `package` under a flow, with a good configuration and with a bad one.
fn install_and_upgrade(
    lab: &Lab,
    system: &System,
    manager: &Manager,
    [older, package]: [&Path; 2],
) -> Result<()> {
    let start = Instant::now();
    system.install(manager.install, older)?;
    ensure!(system.is_enabled()? == "disabled\ndisabled\n");
    ensure!(system.run("systemctl is-active bridge-agent || true")?.trim() == "inactive");
    ensure!(system.run("stat -c %a /etc/bridge; getent group bridge")?.starts_with("700\nbridge:"));
    let companions = COMPANIONS.join(" ");
    system.run(&format!("for file in {companions} {}; do test -s \"$file\"; done", manager.zsh))?;
    let configure = |text: &str| system.run(&format!("printf '%s' \"{text}\" >/etc/bridge/bridge.yaml"));
    configure(CONFIG)?;
    system.run("bridge-agent check")?;
    system.run("systemctl enable --now bridge-agent").or_else(|error| {
        bail!(
            "{error:#}\n{}",
            system.run("journalctl -u bridge-agent; systemctl status bridge-agent || true")?
        )
    })?;
    let enabled = "enabled\nenabled\n";
    ensure!(system.is_enabled()? == enabled, "the rules of the boot are not enabled with the agent");
    enforces(lab, "after the start")?;
    ensure!(
        start.elapsed() < patience(MINUTE),
        "enforced {:?} after the installation began",
        start.elapsed()
    );
    println!("enforced {:?} after the installation began", start.elapsed());

    let mut flow: Connection =
        Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, ALLOWED))?.reached()?;
    flow.round_trip(SECOND)?;
    // As a version without that unit leaves it.
    system.run("systemctl disable bridge-nftables")?;
    let pid = || system.run("systemctl show --property MainPID bridge-agent");
    let before = pid()?;
    system.install(manager.install, package)?;
    ensure!(pid()? != before, "the upgrade left the agent of before: {before}");
    system.run("bridge-agent status --ready")?;
    flow.round_trip(SECOND).context("a flow across the upgrade")?;
    enforces(lab, "after the upgrade")?;
    ensure!(system.run("cat /etc/bridge/bridge.yaml")? == CONFIG, "the upgrade changed the configuration");
    ensure!(system.is_enabled()? == enabled, "after the upgrade: {}", system.is_enabled()?);
    system.run(manager.verify)?;

    configure("role: neither")?;
    let messages = system.install(manager.reinstall, package)?;
    ensure!(messages.contains("journalctl -u bridge-agent"), "{messages}");
    flow.round_trip(SECOND).context("a flow after an upgrade with a bad configuration")?;
    enforces(lab, "after an upgrade with a bad configuration")?;
    ensure!(system.is_enabled()? == enabled, "after a bad upgrade: {}", system.is_enabled()?);
    configure(CONFIG)?;
    system.run("systemctl restart bridge-agent")?;
    flow.round_trip(SECOND).context("a flow after the configuration was mended")?;
    enforces(lab, "after the configuration was mended")?;

    system.run(manager.remove)?;
    ensure!(system.run("systemctl is-active bridge-agent || true")?.trim() != "active");
    enforces(lab, "after the removal, without the agent")?;
    system.run("test -s /etc/bridge/bridge.yaml; ! test -e /usr/bin/bridge-agent").map(drop)
}

/// Runs `test` on a lab, the booted system as its node, and a function that returns whether the denied port is open.
fn on_a_node(test: impl FnOnce(&Lab, &System, &dyn Fn() -> Result<bool>) -> Result<()>) -> Result<()> {
    let lab = Lab::builder().build()?;
    let _servers = [ALLOWED, DENIED]
        .map(|port| Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, port)))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let is_open = || {
        let client = Client::new(&lab.a().netns).deadline(SECOND * 2);
        Ok(client.connect(lab.c1().at(Family::V4, DENIED))?.succeeded())
    };
    ensure!(is_open()?, "before the installation nothing is denied");
    let system = System::boot(&lab, lab.b(), given("BRIDGE_ROOT")?)?;
    test(&lab, &system, &is_open)
}

/// Returns the files that a package has left in the system.
fn left(system: &System) -> Result<String> {
    let named = "find / -xdev -name '*bridge-agent*' -not -name '*.deb' -not -name '*.rpm'";
    system.run(&format!("{named} -not -path '/proc/*' -not -path '/sys/*' -not -path '/var/lib/systemd/*'"))
}

#[test]
#[ignore = "needs packages and a Debian root: cargo xtask dist --test"]
fn the_deb_enforces_within_a_minute_and_upgrades_under_flows_and_a_purge_leaves_nothing() -> Result<()> {
    let (older, package) = (given("BRIDGE_DEB_OLDER")?, given("BRIDGE_DEB")?);
    on_a_node(|lab, system, is_open| {
        install_and_upgrade(lab, system, &DPKG, [&older, &package])?;
        system.run("dpkg --purge bridge-agent")?;
        ensure!(is_open()?, "a purge leaves rules active");
        ensure!(!system.bpf.join("bridge").exists(), "a purge leaves pins");
        system.run("! test -e /etc/bridge; ! test -e /var/lib/bridge")?;
        let left = left(system)?;
        ensure!(left.is_empty(), "a purge leaves {left}");
        Ok(())
    })
}

#[test]
#[ignore = "needs packages and a Debian root: cargo xtask dist --test"]
fn the_rpm_enforces_within_a_minute_and_upgrades_under_flows_and_down_ends_it() -> Result<()> {
    let (older, package) = (given("BRIDGE_RPM_OLDER")?, given("BRIDGE_RPM")?);
    on_a_node(|lab, system, is_open| {
        install_and_upgrade(lab, system, &RPM, [&older, &package])?;
        system.install(RPM.install, &package)?;
        system.run(&format!("bridge-agent down --yes; {}", RPM.remove))?;
        ensure!(is_open()?, "the rules are active after `down`");
        ensure!(!system.bpf.join("bridge").exists(), "`down` leaves pins");
        let left = left(system)?;
        ensure!(left.is_empty(), "an erased package leaves {left}");
        Ok(())
    })
}
