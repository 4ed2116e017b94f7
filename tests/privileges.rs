//! The privileges that the agent needs: those that it drops itself, those of a service user, those that the systemd
//! unit leaves it, and who may use its API.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::pool::attach;
use bridge_lab::{
    agent::{Agent, program},
    container::{Container, Files, daemonset},
    lab::{Family, Lab},
    pool::{in_cgroup, output, python, serve},
    traffic::tcp::{Client, Connection, Server},
    wait::eventually,
};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);
const ALLOWED: u16 = 40002;
const DENIED: u16 = 40003;
/// No user of this machine.
const USER: u32 = 61_357;
/// Capabilities that `bridge-agent run` keeps, by their number in capabilities(7): CHOWN, DAC_OVERRIDE, NET_ADMIN,
/// NET_RAW, PERFMON, BPF.
const KEPT: [u32; 6] = [0, 1, 12, 13, 38, 39];
/// How much of a risk the unit may be, of `systemd-analyze security`, in tenths.
const EXPOSURE: &str = "31";

fn unit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd/bridge-agent.service")
}

fn config(engines: &str, cgroup: &Path) -> Result<String> {
    let cgroup = cgroup.strip_prefix(attach::mount_point()?)?.display();
    Ok(format!(
        "role: node\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24]}}\n\
         enforcement: {{engines: [{engines}]}}\n\
         rules: [{{name: in, direction: inbound, protocol: tcp, ports: [40002]}}, {{name: out, direction: outbound, protocol: tcp, ports: ['1-65535']}}]\n\
         portPool: {{ports: 61001-61100, transparent: {{cgroups: [/{cgroup}]}}}}\npersistence: {{save: never}}\n"
    ))
}

fn executable(lab: &Lab, name: &str, script: &str) -> Result<PathBuf> {
    let path = lab.directory().join(name);
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// A program that is the agent with less than root has: `how` is for setpriv(1).
fn less(lab: &Lab, how: &str) -> Result<PathBuf> {
    executable(lab, "less", &format!("#!/bin/sh\nexec setpriv {how} {} \"$@\"\n", program()?.display()))
}

fn only(capabilities: &[u32]) -> String {
    let list: Vec<String> = capabilities.iter().map(|number| format!("+cap_{number}")).collect();
    format!("-all,{}", list.join(","))
}

/// Connections through the node come about as the rules say, and from the pool.
fn works(lab: &Lab, cgroup: &Path, when: &str) -> Result<()> {
    let (a, c1) = (lab.a(), lab.c1());
    let connect = |port| Client::new(&a.netns).deadline(SECOND * 5).connect(c1.at(Family::V4, port));
    ensure!(connect(ALLOWED)?.succeeded(), "{when}: the allowed port");
    ensure!(connect(DENIED)?.refused(), "{when}: the denied port");
    let script =
        format!("import socket; print(socket.create_connection(('{}', 8080), 10).getsockname()[1])", a.v4);
    let port: u16 = output(&c1.netns, in_cgroup(cgroup, python(&script)), SECOND * 10)?.trim().parse()?;
    ensure!((61001..=61100).contains(&port), "{when}: {port} is not of the pool");
    Ok(())
}

/// Starts servers in a lab, and opens a connection.
fn stand(lab: &Lab) -> Result<(Vec<Server>, bridge_lab::lab::Process)> {
    let servers = [ALLOWED, DENIED].map(|port| Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, port)));
    Ok((servers.into_iter().collect::<Result<_, _>>()?, serve(&lab.a().netns, 8080)?))
}

fn connection(lab: &Lab) -> Result<Connection> {
    Ok(Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, ALLOWED))?.reached()?)
}

#[test]
fn every_thread_has_dropped_unneeded_capabilities_for_good() -> Result<()> {
    let lab = Lab::builder().build()?;
    let cgroup = lab.cgroup("clients")?;
    let agent = Agent::start(&lab, lab.b(), &config("ebpf, iptables", &cgroup)?)?;
    let kept: u64 = KEPT.iter().map(|number| 1 << number).sum();
    let threads: Vec<_> = fs::read_dir(format!("/proc/{}/task", agent.pid()))?.collect::<Result<_, _>>()?;
    ensure!(threads.len() > 1, "it has one thread only");
    for thread in threads {
        let status = fs::read_to_string(thread.path().join("status"))?;
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(|value| value.trim().to_owned()).context(status.clone())
        };
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            let found = u64::from_str_radix(&field(set)?, 16)?;
            ensure!(found == kept, "{set} of a thread is {found:x} and not {kept:x}");
        }
        ensure!(field("NoNewPrivs")? == "1");
    }
    Ok(())
}

/// The other four: tests/daemonset.rs.
#[test]
fn root_needs_two_more_for_files_and_groups_of_others() -> Result<()> {
    let lab = Lab::builder().build()?;
    let cgroup = lab.cgroup("clients")?;
    let directory = lab.directory().join("b");
    let (chown_number, override_number) = (0, 1);
    for without in [None, Some(chown_number), Some(override_number)] {
        let left: Vec<u32> = KEPT.into_iter().filter(|number| Some(*number) != without).collect();
        let mut program = less(&lab, &format!("--bounding-set {} --inh-caps -all", only(&left)))?;
        if without == Some(chown_number) {
            let config = config("ebpf", &cgroup)?;
            // It enforces, without a socket that the group could not use.
            let mut agent = Agent::start_program(with_group(&lab, &program)?, &lab, lab.b(), &config)?;
            let log = agent.log();
            ensure!(log.contains("cannot listen") && !agent.socket().exists(), "{log}");
            agent.stop()?;
            agent.run(&["down"])?;
            continue;
        }
        // Another user's directory, closed to everybody else.
        fs::create_dir_all(&directory)?;
        chown(&directory, Some(USER), Some(USER))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
        if without.is_none() {
            program = with_group(&lab, &program)?;
        }
        let started = Agent::start_program(program, &lab, lab.b(), &config("ebpf", &cgroup)?);
        ensure!(started.is_ok() == without.is_none(), "without {without:?}: {:?}", started.err());
        if let Ok(mut agent) = started {
            agent.stop()?;
            agent.run(&["down"])?;
        }
    }
    Ok(())
}

/// The same, with a group for the socket in its configuration.
fn with_group(lab: &Lab, program: &Path) -> Result<PathBuf> {
    let script = format!(
        "#!/bin/sh\nsed -i 's|^api: {{|api: {{group: \"{USER}\", |' \"$3\"\nexec {} \"$@\"\n",
        program.display()
    );
    executable(lab, "with-group", &script)
}

/// A directory of groups with one entry, as a module of the name service, see nss(5).
const DIRECTORY: &str = r#"
#include <errno.h>
#include <grp.h>
#include <nss.h>
#include <string.h>
enum nss_status _nss_directory_getgrnam_r(const char *name, struct group *group, char *buffer, size_t length, int *error) {
    static const char *const known = "plant-operators";
    if (strcmp(name, known) != 0) { *error = ENOENT; return NSS_STATUS_NOTFOUND; }
    if (length < 64) { *error = ERANGE; return NSS_STATUS_TRYAGAIN; }
    memset(buffer, 0, length);
    group->gr_mem = (char **)buffer;
    group->gr_name = strcpy(buffer + 16, known);
    group->gr_passwd = strcpy(buffer + 48, "x");
    group->gr_gid = NUMBER;
    return NSS_STATUS_SUCCESS;
}
"#;

/// A static program has no modules of the name service: there, getent(1) alone finds the group.
#[test]
fn a_group_that_only_the_name_service_knows_gets_the_socket() -> Result<()> {
    let lab = Lab::builder().build()?;
    let folder = lab.directory().join("nss");
    fs::create_dir_all(&folder)?;
    let source = executable(&lab, "directory.c", DIRECTORY)?;
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", &format!("-DNUMBER={USER}"), "-o"]);
    let status = compiler.arg(folder.join("libnss_directory.so.2")).arg(source).status().context("cc")?;
    ensure!(status.success(), "cc: {status}");
    let switch = folder.join("nsswitch.conf");
    fs::write(&switch, "group: files directory\n")?;
    let getent = "#!/bin/sh\nPATH=/usr/bin:/bin LD_LIBRARY_PATH=$MODULES exec getent \"$@\"\n";
    fs::rename(executable(&lab, "getent", getent)?, folder.join("getent"))?;
    let groups = folder.join("group");
    fs::copy("/etc/group", &groups)?;
    let run = |name: &str, group: &str, modules: &str| {
        let script = format!(
            "#!/bin/sh\nsed -i 's|^api: {{|api: {{group: \"{group}\", |' \"$3\"\nexport MODULES={folder}\nexport {modules}\n\
             exec unshare --mount sh -ec 'mount --bind {} /etc/nsswitch.conf; mount --bind {} /etc/group; exec {} \"$@\"' sh \"$@\"\n",
            switch.display(),
            groups.display(),
            program()?.display(),
            folder = folder.display(),
        );
        let config = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\npersistence: {save: never}\n";
        Agent::start_program(executable(&lab, name, &script)?, &lab, lab.b(), config)
    };
    for modules in ["LD_LIBRARY_PATH=$MODULES PATH=$PATH", "PATH=$MODULES:$PATH"] {
        let mut agent = run("known", "plant-operators", modules).context(modules)?;
        let group = fs::metadata(agent.socket())?.gid();
        ensure!(group == USER, "{modules}: the socket is of the group {group}");
        fs::remove_file(agent.socket())?;
        let again = || (fs::metadata(agent.socket()).ok()?.gid() == USER).then_some(());
        ensure!(eventually(SECOND * 20, again).is_some(), "{modules}: the socket is not made again");
        agent.stop()?;
    }
    // It enforces while the group is unknown, and only root has the socket.
    let mut agent = run("unknown", "strangers", "LD_LIBRARY_PATH=$MODULES PATH=$PATH")?;
    ensure!(agent.log().contains("there is no group strangers"), "{}", agent.log());
    ensure!(fs::metadata(agent.socket())?.gid() == 0);
    writeln!(fs::OpenOptions::new().append(true).open(&groups)?, "strangers:x:{USER}:")?;
    let known = || (fs::metadata(agent.socket()).ok()?.gid() == USER).then_some(());
    ensure!(eventually(SECOND * 40, known).is_some(), "the socket stays root's: {}", agent.log());
    agent.stop()?;
    Ok(())
}

#[test]
fn a_service_user_with_four_capabilities_does_everything() -> Result<()> {
    for (engines, needed) in [("ebpf, iptables", &KEPT[2..]), ("ebpf", &[12, 38, 39][..])] {
        let lab = Lab::builder().build()?;
        let cgroup = lab.cgroup("clients")?;
        let (_servers, _server) = stand(&lab)?;
        // /sys/fs/bpf is root's alone on a machine with systemd; docs/operations.md opens it, this leaves it as it is.
        let pins = Bpffs::mount(&lab.directory().join("bpf"))?;
        let directory = lab.directory().join("b");
        fs::create_dir_all(&directory)?;
        for own in [&directory, &pins.0] {
            chown(own, Some(USER), Some(USER))?;
        }
        let caps = only(needed);
        let script = format!(
            "#!/bin/sh\nexec setpriv --reuid {USER} --regid {USER} --clear-groups --bounding-set {caps} --inh-caps {caps} \
             --ambient-caps {caps} {} \"$1\" --config \"$3\" --pin-root {} --state-dir {}\n",
            program()?.display(),
            pins.0.join("bridge").display(),
            directory.join("state").display()
        );
        let usual = config(engines, &cgroup)?;
        let mut agent =
            Agent::start_program(executable(&lab, "service-user", &script)?, &lab, lab.b(), &usual)?;
        works(&lab, &cgroup, "started")?;
        let mut held = connection(&lab)?;
        agent.reload(&usual.replace("[40002]", "[40002, 40003]"))?;
        let open = Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, DENIED))?;
        ensure!(open.succeeded(), "reloaded: {}", agent.log());
        agent.reload(&usual)?;
        works(&lab, &cgroup, "reloaded")?;
        agent.restart()?;
        works(&lab, &cgroup, "restarted")?;
        held.round_trip(SECOND * 5).context("the connection from before")?;
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
        ensure!(status.contains(&format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}")), "{status}");
        agent.stop()?;
        agent.run(&["down"])?;
        let open = Client::new(&lab.a().netns).connect(lab.c1().at(Family::V4, DENIED))?;
        ensure!(open.succeeded(), "after `down`: {}", agent.log());
        ensure!(!pins.0.join("bridge").exists(), "pins are left");
    }
    Ok(())
}

/// A BPF file system; unmounted when it is dropped.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount(path: &Path) -> Result<Self> {
        fs::create_dir_all(path)?;
        let status = Command::new("mount").args(["-t", "bpf", "bpf"]).arg(path).status()?;
        ensure!(status.success(), "mount: {status}");
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

#[test]
fn the_unit_is_as_closed_as_it_can_be() -> Result<()> {
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--offline=true", "--no-pager", "--threshold", EXPOSURE]).arg(unit());
    let output = analyze.output().context("systemd-analyze is not installed")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("Overall exposure level"), "{said}");
    Ok(())
}

/// The values of a setting of the unit.
fn setting(name: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(unit())?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    Ok(value
        .with_context(|| format!("the unit says nothing of {name}"))?
        .split(' ')
        .map(Into::into)
        .collect())
}

/// System calls that a filter of systemd lets through.
fn system_calls(filter: &[String]) -> Result<BTreeSet<String>> {
    let mut calls = BTreeSet::new();
    for word in filter {
        if !word.starts_with('@') {
            calls.insert(word.clone());
            continue;
        }
        let output = Command::new("systemd-analyze").args(["syscall-filter", "--no-pager", word]).output()?;
        ensure!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        let words =
            text.lines().skip(1).map(str::trim).filter(|word| !word.is_empty() && !word.starts_with('#'));
        calls.extend(system_calls(&words.map(Into::into).collect::<Vec<_>>())?);
    }
    Ok(calls)
}

/// Translates the system call filter of the unit into one of an OCI runtime.
fn seccomp() -> Result<Value> {
    const NAMESPACES: u64 = 0x7e02_0080;
    let mut calls = system_calls(&setting("SystemCallFilter")?)?;
    // systemd.exec(5): an allow-list includes these implicitly.
    calls.extend(system_calls(&["@default".into()])?);
    for setting in ["RestrictNamespaces", "MemoryDenyWriteExecute"] {
        ensure!(self::setting(setting)? == ["yes"], "{setting}");
    }
    for call in ["unshare", "setns", "clone", "clone3", "mmap", "mprotect", "pkey_mprotect", "socket"] {
        calls.remove(call);
    }
    let allow = |name: &str, index: u32, mask: u64, value: u64| {
        let arg = json!({ "index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value });
        json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": [arg] })
    };
    let (write, exec) = (2, 4);
    let mut rules = vec![
        json!({ "names": calls, "action": "SCMP_ACT_ALLOW" }),
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }),
        allow("clone", 0, NAMESPACES, 0),
        allow("mprotect", 2, exec, 0),
        allow("mmap", 2, write, 0),
        allow("mmap", 2, write | exec, write),
    ];
    for family in setting("RestrictAddressFamilies")? {
        let number = match family.as_str() {
            "AF_UNIX" => 1,
            "AF_INET" => 2,
            "AF_INET6" => 10,
            "AF_NETLINK" => 16,
            other => anyhow::bail!("{other}"),
        };
        rules.push(allow("socket", 0, u64::from(u32::MAX), number));
    }
    Ok(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules
    }))
}

#[test]
fn the_agent_works_with_the_privileges_of_the_systemd_unit() -> Result<()> {
    let seccomp = seccomp()?;
    let capabilities = setting("CapabilityBoundingSet")?;
    for engines in ["ebpf, iptables], iptables: {backend: nft", "ebpf, iptables], iptables: {backend: legacy"]
    {
        let lab = Lab::builder().build()?;
        let cgroup = lab.cgroup("clients")?;
        let (_servers, _server) = stand(&lab)?;
        let config = config("X", &cgroup)?.replace("[X]", &format!("[{engines}}}"));
        let start = || {
            let adapt = |spec: &mut Value| {
                spec["linux"]["seccomp"] = seccomp.clone();
                for set in ["bounding", "effective", "permitted"] {
                    spec["process"]["capabilities"][set] = json!(capabilities);
                }
            };
            Container::start_with(&lab, lab.b(), &Files::OfThisMachine, daemonset()?, &config, adapt)
        };
        let mut agent = start()?;
        agent.ready()?;
        works(&lab, &cgroup, "started")?;
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()?))?;
        ensure!(status.contains("Seccomp:\t2"), "{status}");
        let reloaded = agent.exec(&[
            "curl",
            "-sf",
            "--unix-socket",
            "/run/bridge/agent.sock",
            "-X",
            "POST",
            "http://b/v1/reload",
        ])?;
        ensure!(reloaded.status.success(), "{reloaded:?}: {}", agent.log());
        agent.kill()?;
        let mut agent = start()?;
        agent.ready()?;
        works(&lab, &cgroup, "restarted")?;
        agent.stop()?;
        let log = agent.log();
        ensure!(!log.contains("Operation not permitted"), "{log}");
    }
    Ok(())
}

#[test]
fn only_the_operator_changes_enforcement() -> Result<()> {
    let lab = Lab::builder().build()?;
    let cgroup = lab.cgroup("clients")?;
    let agent = Agent::start(&lab, lab.b(), &config("ebpf", &cgroup)?)?;
    // The file mode lets everyone in, so any refusal below comes from the agent.
    fs::set_permissions(agent.socket(), fs::Permissions::from_mode(0o666))?;
    let ask = |host: &bridge_lab::lab::Host, user: u32, method: &str, path: &str| -> Result<String> {
        let mut curl = Command::new("setpriv");
        let user = user.to_string();
        curl.args([
            "--reuid",
            &user,
            "--clear-groups",
            "curl",
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
        ]);
        curl.args(["-X", method, "--max-time", "10", "--unix-socket"]).arg(agent.socket());
        curl.args(["-d", "{}", &format!("http://bridge{path}")]);
        host.netns.output(curl)
    };
    for path in ["/v1/reload", "/v1/apply", "/v1/confirm", "/v1/revert"] {
        assert_eq!(ask(lab.b(), USER, "POST", path)?, "403", "another user: {path}");
        // Root in a pod is no root of the node.
        assert_eq!(ask(lab.c1(), 0, "POST", path)?, "403", "a pod: {path}");
    }
    assert_eq!(ask(lab.b(), 0, "POST", "/v1/reload")?, "204");
    // The pool is for everybody who has the socket.
    assert_eq!(ask(lab.c1(), USER, "GET", "/v1/pool")?, "200");
    Ok(())
}

#[test]
fn no_log_however_detailed_has_a_secret() -> Result<()> {
    let lab = Lab::builder().build()?;
    let (token, key) = ("dG9rZW4tbm90LXRvLWJlLXRvbGQ", "a-key-that-must-not-be-printed");
    let kubeconfig = lab.directory().join("kubeconfig");
    fs::write(
        &kubeconfig,
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:1\", insecure-skip-tls-verify: true}}}}]\n\
             users: [{{name: u, user: {{token: {token}}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
        ),
    )?;
    let key_file = lab.directory().join("discovery.key");
    fs::write(&key_file, key)?;
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600))?;
    let script = format!("#!/bin/sh\nexec {} \"$@\" --log-level trace\n", program()?.display());
    let verbose = executable(&lab, "verbose", &script)?;
    let yaml = format!(
        "role: host\nnetworks: {{pods: [10.200.0.0/16]}}\nkubernetes: {{kubeconfig: {}}}\n\
         routes: {{discovery: {{listen: \"192.168.31.67:12345\", keyFile: {}}}}}\n",
        kubeconfig.display(),
        key_file.display()
    );
    let mut agent = Agent::start_program(verbose, &lab, lab.a(), &yaml)?;
    let tried = || agent.log().contains("127.0.0.1").then_some(());
    eventually(SECOND * 20, tried).with_context(|| agent.log())?;
    agent.reload(&yaml)?;
    let said = [agent.log(), agent.run(&["status", "--json"])?, agent.run(&["check", "--json"])?].concat();
    ensure!(said.contains("TRACE"), "the log is not detailed");
    for secret in [token, key] {
        ensure!(!said.contains(secret), "{secret} in: {said}");
    }
    Ok(())
}
