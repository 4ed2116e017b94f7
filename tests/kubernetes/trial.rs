//! A cluster that changes while a configuration is on trial.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::ApiServer;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{
    DEADLINE, EVERY_POD, OPEN, cluster, node_config, on_host, policy, until, until_closed, until_current,
    until_open,
};

/// The port that the configuration on trial opens.
const TRIED: u16 = 40010;
/// A port that another policy opens.
const OTHER: u16 = 40020;

struct Trial {
    lab: Lab,
    server: ApiServer,
    node: Agent,
    _host: Agent,
    _servers: [tcp::Server; 3],
}

impl Trial {
    fn new() -> Result<Self> {
        let (lab, server) = cluster()?;
        server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
        server.run_pod("shop", "c1", lab.c1())?;
        let node = Agent::start(&lab, lab.b(), &config(&server, ""))?;
        until_current(&node)?;
        let host = on_host(&lab, &server)?;
        let c1 = lab.c1();
        let servers = [TRIED, OPEN, OTHER].map(|port| tcp::Server::echo(&c1.netns, c1.at(Family::V4, port)));
        let [tried, open, other] = servers;
        let trial = Self { node, _host: host, _servers: [tried?, open?, other?], lab, server };
        trial.is_closed(TRIED)?;
        Ok(trial)
    }

    /// Puts a configuration on trial that opens [`TRIED`].
    fn begin(&self, time: &str) -> Result<()> {
        let rule = format!("rules: [{{name: tried, direction: inbound, protocol: tcp, ports: [{TRIED}]}}]\n");
        let api = format!("api: {{socket: {}}}\n", self.node.socket().display());
        let file = self.lab.directory().join("candidate.yaml");
        fs::write(&file, config(&self.server, &rule) + &api)?;
        self.node.run(&["apply", "--confirm", time, &file.display().to_string()])?;
        self.is_open(TRIED).context("the configuration on trial is active")
    }

    /// Changes the cluster in every way that packets show, and waits until it is applied: [`OPEN`] is closed from now on, and
    /// [`OTHER`] is open. Before, [`OPEN`] was made open.
    fn change(&self) -> Result<()> {
        self.is_open(OPEN)?;
        self.server.kubectl(&["delete", "bridgepolicy", "open"], "")?;
        self.is_closed(OPEN)?;
        self.server.apply(&policy("other", EVERY_POD).replace(&OPEN.to_string(), &OTHER.to_string()))?;
        self.is_open(OTHER)?;
        let addresses = ["192.168.31.18".into()];
        self.server.add_node_as("b2", &addresses, &["10.200.2.0/24".into()])?;
        until(&self.node, |cluster| cluster["nodes"] == 2 && cluster["current"] == true)?;
        self.is_open(TRIED).context("the trial goes on")
    }

    fn is_open(&self, port: u16) -> Result<()> {
        until_open(self.lab.a(), self.lab.c1().at(Family::V4, port), &self.node).map(drop)
    }

    fn is_closed(&self, port: u16) -> Result<()> {
        until_closed(self.lab.a(), self.lab.c1().at(Family::V4, port), &self.node)
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.node.run(&["status", "--json"])?)?)
    }

    fn rules(&self) -> Result<String> {
        self.lab.b().netns.output(std::process::Command::new("iptables-save"))
    }

    /// No trial is going on, and both engines have the cluster of now.
    fn is_over(&self, outcome: &str, tried: bool) -> Result<()> {
        let ended = || self.status().ok().filter(|status| status["agent"]["lastTrial"]["outcome"] == outcome);
        eventually(DEADLINE, ended).with_context(|| format!("not {outcome}:\n{}", self.node.log()))?;
        self.holds(tried)?;
        let rules = self.rules()?;
        ensure!(rules.contains("other.in") && !rules.contains("open.in"), "{rules}");
        ensure!(rules.contains("tried") == tried, "{rules}");
        Ok(())
    }

    fn holds(&self, tried: bool) -> Result<()> {
        if tried {
            self.is_open(TRIED)?
        } else {
            self.is_closed(TRIED)?
        }
        self.is_open(OTHER)?;
        self.is_closed(OPEN)
    }
}

fn config(server: &ApiServer, more: &str) -> String {
    node_config(server, more).replace("engines: [ebpf]", "engines: [ebpf, iptables]")
}

#[test]
fn changes_of_the_cluster_reach_the_configuration_on_trial_and_stay_when_it_is_confirmed() -> Result<()> {
    let trial = Trial::new()?;
    trial.server.apply(&policy("open", EVERY_POD))?;
    trial.is_open(OPEN)?;
    trial.begin("600s")?;
    trial.change()?;
    trial.node.run(&["confirm"])?;
    trial.is_over("confirmed", true)?;
    trial.server.kubectl(&["delete", "bridgepolicy", "other"], "")?;
    trial.is_closed(OTHER)
}

#[test]
fn changes_of_the_cluster_during_a_trial_stay_when_it_is_taken_back() -> Result<()> {
    let mut trial = Trial::new()?;
    trial.begin("600s")?;
    // Made during the trial, too.
    trial.server.apply(&policy("open", EVERY_POD))?;
    trial.is_open(OPEN)?;
    // A restarted agent continues with both.
    trial.node.restart()?;
    until_current(&trial.node)?;
    trial.change()?;
    trial.node.run(&["revert"])?;
    trial.is_over("reverted", false)
}

#[test]
fn what_the_kernel_goes_back_to_without_an_agent_has_the_cluster_of_now() -> Result<()> {
    let mut trial = Trial::new()?;
    trial.server.apply(&policy("open", EVERY_POD))?;
    trial.is_open(OPEN)?;
    trial.begin("12s")?;
    trial.change()?;
    let left = trial.status()?["agent"]["trial"]["secondsLeft"].clone();
    ensure!(
        left.as_u64().is_some_and(|left| left > 0),
        "too slow: the trial was over before the agent was killed"
    );
    trial.node.kill()?;
    // Without an agent, at the deadline.
    trial.is_closed(TRIED)?;
    let c1 = trial.lab.c1();
    let reach = |port| tcp::Client::new(&trial.lab.a().netns).connect(c1.at(Family::V4, port));
    ensure!(reach(OPEN)?.refused(), "traffic that the deleted policy allowed");
    // eBPF alone: iptables follows with the next agent.
    let maps = bridge_agent::datapath::Maps::open(&bridge_agent::datapath::Pins::new(trial.node.pins()))?;
    let names: Vec<String> = maps.rule_counts()?.into_iter().map(|count| count.name).collect();
    ensure!(names == ["other.in"], "{names:?}");
    trial.node.restart()?;
    until_current(&trial.node)?;
    trial.holds(false)
}
