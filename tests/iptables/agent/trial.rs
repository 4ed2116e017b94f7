//! A configuration on trial: what takes it back, what makes it stay, and that both engines agree all the while.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bridge_agent::iptables::Backend;
use bridge_lab::agent::Agent;
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json as object};

use super::node::{ALLOWED, DEADLINE, DENIED, MORE, Node, RULES, json};
use super::openapi::documented;
use crate::support::BACKENDS;

/// Longer than a test takes.
const LONG: &str = "600s";
/// As short as may be.
const SHORT: &str = "1s";

/// A node with the usual rules active, in both engines, and rules to try that open one port more.
struct Trial {
    node: Node,
    agent: Agent,
    /// What iptables has, before and on trial.
    before: String,
    candidate: PathBuf,
    /// The configuration file as it was.
    file: String,
}

impl Trial {
    fn new(backend: Backend) -> Result<Self> {
        let node = Node::new(backend)?;
        let agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
        node.holds()?;
        let before = node.dump()?;
        let file = fs::read_to_string(agent.config())?;
        let trial = Self { candidate: node.lab.directory().join("try.yaml"), node, agent, before, file };
        trial.write("ebpf, iptables", &format!("{RULES}{MORE}"))?;
        Ok(trial)
    }

    fn write(&self, engines: &str, rules: &str) -> Result<()> {
        let api = format!("api: {{socket: {}}}\n", self.agent.socket().display());
        Ok(fs::write(&self.candidate, self.node.config(engines, "", rules) + &api)?)
    }

    fn apply(&self, more: &[&str]) -> Result<Value> {
        let candidate = self.candidate.to_string_lossy().into_owned();
        json(&self.agent, &[&["apply", &candidate], more].concat())
    }

    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let error = self.agent.run(arguments).err().context("it was not refused")?;
        Ok(format!("{error:#}"))
    }

    /// Everything is as it was, and nothing is left of the trial.
    fn is_taken_back(&self) -> Result<()> {
        self.node.holds()?;
        assert_eq!(self.node.dump()?, self.before);
        assert_eq!(fs::read_to_string(self.agent.config())?, self.file);
        self.leaves_nothing()
    }

    /// The configuration on trial is active, in both engines.
    fn is_in_force(&self) -> Result<()> {
        self.node.is_open()?;
        ensure!(
            self.node.dump()?.contains("--comment \"more\"") || self.node.dump()?.contains("--comment more ")
        );
        Ok(())
    }

    fn leaves_nothing(&self) -> Result<()> {
        let directory = self.agent.config().parent().context("a directory")?;
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name().into_string().unwrap_or_default();
            ensure!(!name.contains("trial") && !name.contains("candidate"), "{name} is left");
        }
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        json(&self.agent, &["status"])
    }

    /// How the last trial ended, once none is going on.
    fn outcome(&self) -> Result<String> {
        let ended = eventually(DEADLINE, || {
            let agent = self.status().ok()?["agent"].clone();
            agent["trial"].is_null().then(|| agent["lastTrial"]["outcome"].as_str().map(str::to_owned))?
        });
        ended.with_context(|| format!("it does not end:\n{}", self.agent.log()))
    }
}

#[test]
fn unconfirmed_it_takes_itself_back_in_both_engines() -> Result<()> {
    for backend in BACKENDS {
        let trial = Trial::new(backend)?;
        let applied = trial.apply(&["--confirm", "3s"])?;
        ensure!(applied["generation"].is_u64() && applied["deadline"].is_string(), "{applied}");
        let status = trial.status()?;
        ensure!((1..=3).contains(&status["agent"]["trial"]["secondsLeft"].as_u64().unwrap_or(0)), "{status}");
        assert_eq!(status["agent"]["trial"]["inKernel"], true, "{status}");
        ensure!(trial.agent.run(&["status"])?.contains("s left, until "));
        trial.is_in_force()?;
        assert_eq!(fs::read_to_string(trial.agent.config())?, trial.file, "it is not confirmed yet");
        // What it let in lives on.
        let lab = &trial.node.lab;
        let server = tcp::Server::echo(&lab.c1().netns, lab.c1().at(Family::V4, DENIED))?;
        let mut connection = tcp::Client::new(&lab.a().netns).connect(server.address())?.reached()?;
        connection.round_trip(DEADLINE)?;
        assert_eq!(trial.outcome()?, "expired");
        connection.round_trip(DEADLINE).context("the connection did not outlive the trial")?;
        drop(server);
        trial.is_taken_back()?;
        ensure!(trial.agent.run(&["status"])?.contains("not confirmed in time"));
        let error = trial.refused(&["confirm"])?;
        ensure!(error.contains("no configuration waits for confirmation"), "{error}");
    }
    Ok(())
}

#[test]
fn the_kernel_takes_it_back_with_the_agent_dead_and_the_next_agent_does_the_rest() -> Result<()> {
    for backend in BACKENDS {
        let mut trial = Trial::new(backend)?;
        let generation = trial.status()?["enforcement"]["generation"].clone();
        trial.apply(&["--confirm", SHORT])?;
        trial.agent.kill()?;
        let back = || (trial.status().ok()?["enforcement"]["generation"] == generation).then_some(());
        eventually(DEADLINE, back).context("the kernel did not take it back")?;
        // The programs read a coarse clock, at most a tick behind the one of the status.
        std::thread::sleep(Duration::from_millis(20));
        trial.node.holds()?;
        ensure!(trial.node.dump()? != trial.before, "who has changed iptables?");
        trial.agent.restart()?;
        trial.is_taken_back()?;
        assert_eq!(trial.status()?["enforcement"]["generation"], generation);
    }
    Ok(())
}

#[test]
fn it_goes_on_after_a_crash_and_ends_as_if_nothing_had_been() -> Result<()> {
    for backend in BACKENDS {
        let mut trial = Trial::new(backend)?;
        trial.apply(&["--confirm", LONG])?;
        trial.agent.kill()?;
        ensure!(trial.agent.run(&["status"])?.contains("no agent could confirm it"));
        trial.agent.restart()?;
        trial.is_in_force()?;
        // It is still on trial.
        let left = trial.status()?["agent"]["trial"]["secondsLeft"].as_u64();
        ensure!((1..=600).contains(&left.unwrap_or(0)), "{left:?}");
        trial.agent.run(&["confirm"])?;
        assert_eq!(trial.outcome()?, "confirmed");
        trial.agent.restart()?;
        trial.is_in_force()?;
        trial.leaves_nothing()?;

        // And the other way round.
        trial.write("ebpf, iptables", RULES)?;
        trial.apply(&["--confirm", "4s"])?;
        trial.agent.kill()?;
        trial.agent.restart()?;
        trial.node.holds()?;
        assert_eq!(trial.outcome()?, "expired");
        trial.is_in_force()?;
        trial.leaves_nothing()?;
    }
    Ok(())
}

#[test]
fn what_was_judged_before_is_judged_until_it_is_confirmed() -> Result<()> {
    let [nft, _] = BACKENDS;
    let trial = Trial::new(nft)?;
    let attached = || -> Result<bool> {
        let interfaces = trial.status()?["enforcement"]["interfaces"].to_string();
        ensure!(interfaces.contains("eth0 external_ingress"), "{interfaces}");
        Ok(interfaces.contains("internal_ingress"))
    };
    let candidate = fs::read_to_string(&trial.candidate)?.replace("cali*", "none*");
    fs::write(&trial.candidate, candidate)?;
    trial.apply(&["--confirm", LONG])?;
    ensure!(attached()?, "with the agent dead, the former policy would not have its interfaces");
    trial.agent.run(&["confirm"])?;
    ensure!(!attached()?);
    Ok(())
}

#[test]
fn it_is_saved_for_the_boot_only_when_it_is_confirmed() -> Result<()> {
    let [nft, _] = BACKENDS;
    // Where netfilter-persistent would look.
    let node = Node::new(nft)?;
    let saved = node.etc().join("iptables/rules.v4");
    fs::create_dir_all(saved.parent().context("a directory")?)?;
    fs::write(&saved, "")?;
    let agent = node.start(&node.config("ebpf, iptables", "", RULES))?;
    let before = node.dump()?;
    let file = fs::read_to_string(agent.config())?;
    let trial = Trial { candidate: node.lab.directory().join("try.yaml"), node, agent, before, file };
    trial.write("ebpf, iptables", &format!("{RULES}{MORE}"))?;
    let first = fs::read_to_string(&saved)?;
    ensure!(first.contains("devices"), "{first}");

    trial.apply(&["--confirm", LONG])?;
    assert_eq!(fs::read_to_string(&saved)?, first);
    let text = trial.agent.run(&["revert"])?;
    ensure!(text.contains("the former configuration is active"), "{text}");
    assert_eq!(trial.outcome()?, "reverted");
    trial.is_taken_back()?;
    assert_eq!(fs::read_to_string(&saved)?, first);

    trial.apply(&["--confirm", LONG])?;
    let confirmed = trial.agent.run(&["confirm"])?;
    ensure!(confirmed.contains("applied for good"), "{confirmed}");
    ensure!(fs::read_to_string(&saved)?.contains("more"), "it was not saved");
    assert_eq!(fs::read_to_string(trial.agent.config())?, fs::read_to_string(&trial.candidate)?);
    trial.is_in_force()?;
    trial.leaves_nothing()?;
    // The agent's own writing is no news.
    assert_eq!(trial.status()?["agent"]["reloads"]["succeeded"], 0);
    Ok(())
}

#[test]
fn without_a_trial_it_becomes_the_configuration_file_at_once() -> Result<()> {
    let [nft, _] = BACKENDS;
    let mut trial = Trial::new(nft)?;
    let applied = trial.apply(&[])?;
    ensure!(applied["deadline"].is_null(), "{applied}");
    trial.is_in_force()?;
    assert_eq!(fs::read_to_string(trial.agent.config())?, fs::read_to_string(&trial.candidate)?);
    trial.agent.restart()?;
    trial.is_in_force()?;
    trial.leaves_nothing()
}

#[test]
fn who_answers_confirms_it_and_who_does_not_lets_it_run_out() -> Result<()> {
    let [nft, _] = BACKENDS;
    let trial = Trial::new(nft)?;
    let a = trial.node.lab.a();
    let peer = tcp::Server::echo(&a.netns, a.at(Family::V4, ALLOWED))?;
    let (answers, silent) =
        (format!("tcp://{}", peer.address()), format!("tcp://{}", a.at(Family::V4, DENIED)));

    let both = ["--confirm", "2s", "--probe", &answers, "--probe", &silent];
    let candidate = trial.candidate.to_string_lossy().into_owned();
    let error = trial.refused(&[&["apply", &candidate][..], &both].concat())?;
    ensure!(error.contains(&silent) && !error.contains(&format!("{answers}:")), "{error}");
    assert_eq!(trial.outcome()?, "expired");
    trial.is_taken_back()?;

    let begun = Instant::now();
    trial.apply(&["--confirm", LONG, "--probe", &answers])?;
    ensure!(begun.elapsed() < DEADLINE);
    assert_eq!(trial.outcome()?, "confirmedByProbes");
    trial.is_in_force()?;
    trial.leaves_nothing()
}

#[test]
fn what_cannot_be_tried_is_refused_and_changes_nothing() -> Result<()> {
    let [nft, _] = BACKENDS;
    let mut trial = Trial::new(nft)?;
    let candidate = trial.candidate.to_string_lossy().into_owned();
    let on_trial = ["apply", &candidate, "--confirm", LONG];

    // There is no place for it beside the file.
    let place = trial.agent.config().with_file_name("agent.yaml.candidate");
    fs::create_dir(&place)?;
    let error = trial.refused(&on_trial)?;
    ensure!(error.contains("cannot write") && error.contains("ConfigMap"), "{error}");
    fs::remove_dir(&place)?;
    // The kernel could not give eBPF back.
    trial.write("iptables", RULES)?;
    let error = trial.refused(&on_trial)?;
    ensure!(error.contains("enforcement.engines") && error.contains("without --confirm"), "{error}");
    // Mistakes have their line, and no probe is asked.
    trial.write("ebpf, iptables", "rules: 7\n")?;
    let error = trial.refused(&on_trial)?;
    ensure!(error.contains("try.yaml:"), "{error}");
    // There is nothing sure to go back to.
    trial.write("ebpf, iptables", &format!("{RULES}{MORE}"))?;
    trial.agent.reload("role: nobody")?;
    let error = trial.refused(&on_trial)?;
    ensure!(error.contains("differs from the active configuration"), "{error}");
    trial.agent.reload(trial.file.split("\napi:").next().context("a configuration")?)?;
    trial.is_taken_back()?;

    trial.agent.run(&on_trial)?;
    let error = trial.refused(&on_trial)?;
    ensure!(error.contains("is on trial for") && error.contains("bridge-agent revert"), "{error}");
    // The file is read when the trial is over, and no other change is overwritten.
    let edited = trial.file.replace("name: devices", "name: gadgets");
    fs::write(trial.agent.config(), &edited)?;
    let noticed = || trial.status().ok()?["agent"]["reloads"]["last"]["error"].as_str().map(str::to_owned);
    let error = eventually(DEADLINE, || noticed().filter(|error| error.contains("on trial")));
    ensure!(error.is_some(), "{:?}", noticed());
    let error = trial.refused(&["confirm"])?;
    ensure!(error.contains("another program changed"), "{error}");
    trial.agent.run(&["revert"])?;
    trial.node.holds()?;
    ensure!(trial.node.dump()?.contains("gadgets"), "the file was not read");
    trial.leaves_nothing()
}

#[test]
fn an_agent_that_is_stopped_takes_it_back() -> Result<()> {
    let [nft, _] = BACKENDS;
    let mut trial = Trial::new(nft)?;
    trial.apply(&["--confirm", LONG])?;
    trial.is_in_force()?;
    trial.agent.stop()?;
    trial.is_taken_back()
}

/// Asks the agent on its socket, from its network namespace, as operators must; the answer is held against its description.
fn ask(trial: &Trial, path: &str, body: &str) -> Result<(u16, Value)> {
    let mut stream = trial.node.lab.b().netns.run(|| UnixStream::connect(trial.agent.socket()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let length = body.len();
    write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let body = serde_json::from_str(body)?;
    documented("POST", path, status, &body);
    Ok((status, body))
}

#[test]
fn answers_are_as_the_api_is_described() -> Result<()> {
    let [nft, _] = BACKENDS;
    let trial = Trial::new(nft)?;
    let config = fs::read_to_string(&trial.candidate)?;
    let on_trial = object!({ "config": config, "confirmMs": 600_000 }).to_string();
    let code = |(status, body): (u16, Value)| (status, body["code"].as_str().unwrap_or("none").to_owned());
    assert_eq!(code(ask(&trial, "/v1/apply", "{}")?), (400, "request".into()));
    assert_eq!(code(ask(&trial, "/v1/apply", r#"{"config":"role: nobody"}"#)?), (422, "config".into()));
    for path in ["/v1/confirm", "/v1/revert"] {
        assert_eq!(code(ask(&trial, path, "")?), (409, "no-trial".into()));
        assert_eq!(code(ask(&trial, "/v1/apply", &on_trial)?), (200, "none".into()));
        assert_eq!(code(ask(&trial, "/v1/apply", &on_trial)?), (409, "on-trial".into()));
        assert_eq!(code(ask(&trial, path, "")?), (200, "none".into()));
    }
    trial.is_in_force()?;
    trial.leaves_nothing()
}
