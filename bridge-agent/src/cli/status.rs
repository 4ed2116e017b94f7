//! `bridge-agent status`: the active configuration, and whether an agent maintains it.

use std::{collections::BTreeMap, fmt::Write as _};

use clap::Args;
use serde::Serialize;

use super::{
    Error, Global, get,
    output::{Watch, print, print_json},
};
use crate::api::client;
use crate::datapath::{self, Maps, OutcomeCount, ReasonCount, Trial};
use crate::kubernetes::KubernetesStatus;
use crate::pool::Summary;
use crate::state::{
    AttachedInterface, DiscoveryStatus, DivergenceStatus, Enforcement, FastPathStatus, FirewallStatus,
    ProbeStatus, Reload, RoutesStatus, Status, TrialEnd, TrialOutcome, TrialStatus,
};

/// Show the active enforcement, whether the agent runs or not; exit code 3: no agent runs.
#[derive(Debug, Args)]
pub struct StatusCommand {
    /// Only ask whether the agent runs and its whole configuration is applied; exit code 1: it is not
    #[arg(long)]
    ready: bool,
    #[command(flatten)]
    watch: Watch,
}

/// Features that a packet filter alone lacks.
const WITHOUT_EBPF: &str = "no eBPF enforcement: without it there are no events of `monitor`, and no fast path; the packet \
                            filter enforces alone";

/// State found in the pins, of whichever agent made them.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Kernel {
    generation: u32,
    mode: &'static str,
    rules: u32,
    interfaces: Vec<String>,
    flows: datapath::FlowCounts,
    /// The policy on trial, if one is.
    trial: Option<Trial>,
    /// Packets denied so far, by direction and reason.
    denied: Vec<ReasonCount>,
    /// Packets of established flows so far, by direction and by their result at the fast path.
    fast_path: Vec<OutcomeCount>,
    /// Those of the denied packets that drivers dropped (`enforcement.xdp`).
    xdp_dropped: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    running: bool,
    agent: Option<Status>,
    enforcement: Option<Kernel>,
    /// Packet filters with rules of bridge, while no agent runs.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    packet_filters: BTreeMap<&'static str, String>,
    /// Packets that the packet filter has denied alone, by reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    denied: Vec<ReasonCount>,
    /// Why the pins cannot be read yet.
    #[serde(skip)]
    incomplete: Option<String>,
}

impl StatusCommand {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if self.ready {
            return ready(global);
        }
        self.watch.repeat(|| match show(global) {
            // It runs when it is started: the next look shows it.
            Err(Error::NoAgent) if self.watch.is_on() => Ok(()),
            shown => shown,
        })
    }
}

fn show(global: &Global) -> Result<(), Error> {
    let agent = match ask(global) {
        Ok(status) => Some(status),
        Err(Error::Client(client::Error::NotRunning { .. })) => None,
        Err(error) => return Err(error),
    };
    let (enforcement, incomplete) = match Maps::open(&global.pins()) {
        Ok(maps) => (Some(Kernel::read(&maps)?), None),
        // A host has an agent and no enforcement.
        Err(datapath::Error::NotRunning(_)) => (None, None),
        Err(error @ datapath::Error::Incomplete { .. }) => (None, Some(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    let packet_filters =
        if agent.is_none() { super::rules::enforcing_filters(global) } else { BTreeMap::new() };
    let alone = agent.as_ref().is_some_and(|status| status.firewall.is_some()) && enforcement.is_none();
    let mut denied = if alone { denied_by_filter(global).unwrap_or_default() } else { Vec::new() };
    denied.retain(was_denied);
    let report = Report { running: agent.is_some(), agent, enforcement, packet_filters, denied, incomplete };
    if global.json {
        print_json(&report)?
    } else {
        print(&report.text())?
    }
    if report.running { Ok(()) } else { Err(Error::NoAgent) }
}

/// For a readiness probe: nothing but the agent is asked.
fn ready(global: &Global) -> Result<(), Error> {
    let reasons = ask(global)?.unready();
    match (global.json, reasons.is_empty()) {
        (_, false) => Err(Error::NotReady(reasons)),
        (true, true) => print_json(&serde_json::json!({ "ok": true, "ready": true })),
        (false, true) => print("ready\n"),
    }
}

fn ask(global: &Global) -> Result<Status, Error> {
    get(global, "/v1/status")
}

/// Reads the reasons for which the packet filter denies, where it enforces alone.
fn denied_by_filter(global: &Global) -> Result<Vec<ReasonCount>, Error> {
    get(global, "/v1/counters")
}

const fn was_denied(count: &ReasonCount) -> bool {
    count.denies && count.packets + count.audited_packets > 0
}

impl Kernel {
    fn read(maps: &Maps) -> datapath::Result<Self> {
        let settings = maps.active_settings()?;
        let denied = maps.reason_counts()?;
        Ok(Self {
            generation: settings.generation,
            mode: if settings.audit == 0 { "enforce" } else { "audit" },
            rules: settings.rule_count,
            interfaces: maps.attached_interfaces()?,
            flows: maps.count_flows()?,
            trial: maps.trial()?,
            denied: denied.into_iter().filter(was_denied).collect(),
            fast_path: maps.outcome_counts()?.into_iter().filter(|count| count.packets > 0).collect(),
            xdp_dropped: maps.shielded()?.packets,
        })
    }
}

impl Report {
    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let mut line = |name: &str, value: String| _ = writeln!(text, "{name:12} {value}");
        match &self.agent {
            Some(Status { version, pid, started, config, role, .. }) => {
                let config = config.display();
                line(
                    "agent",
                    format!("running, pid {pid}, version {version}, role {role}, since {started}, {config}"),
                );
            }
            None if self.enforcement.is_some() || !self.packet_filters.is_empty() => {
                line("agent", "not running; enforcement stays active".into())
            }
            None => line("agent", "not running".into()),
        }
        if let Some(kernel) = &self.enforcement {
            let Kernel { generation, mode, rules, interfaces, flows, trial, denied, fast_path, xdp_dropped } =
                kernel;
            line("policy", format!("generation {generation}, {mode}, {rules} rules"));
            line("interfaces", if interfaces.is_empty() { "none".into() } else { interfaces.join(", ") });
            line(
                "flows",
                format!(
                    "{} of {}, half-open {} of {}",
                    flows.established, flows.established_capacity, flows.half_open, flows.half_open_capacity
                ),
            );
            if let (Some(Trial { fallback, seconds_left, .. }), None) = (trial, &self.agent) {
                line(
                    "trial",
                    format!(
                        "generation {fallback} comes back in {seconds_left} s: no agent could confirm it"
                    ),
                );
            }
            denied.iter().for_each(|count| show_denied(count, &mut line));
            if *xdp_dropped > 0 {
                line("xdp", format!("dropped {xdp_dropped} of the denied packets"));
            }
            for OutcomeCount { direction, outcome, packets, .. } in fast_path {
                line("fast path", format!("{direction} {outcome}: {packets} packets"));
            }
        } else if let Some(why) = &self.incomplete {
            line("policy", why.clone());
        } else {
            let alone = self.agent.as_ref().is_some_and(|status| status.firewall.is_some())
                || !self.packet_filters.is_empty();
            line("policy", if alone { WITHOUT_EBPF.into() } else { "no eBPF enforcement".into() });
        }
        self.denied.iter().for_each(|count| show_denied(count, &mut line));
        for (engine, rules) in &self.packet_filters {
            line(engine, format!("{rules} active, and not maintained"));
        }
        if let Some(status) = &self.agent {
            if let Some(trial) = &status.trial {
                show_trial(trial, &mut line);
            }
            if let Some(TrialEnd { time, outcome }) = &status.last_trial {
                line("last trial", format!("{time}, {}", ended(*outcome)));
            }
            if let Some(FirewallStatus { engine, backend, chosen, repairs, last_repair, failure, .. }) =
                &status.firewall
            {
                let engine = if engine == "nftables" { "nftables" } else { "iptables" };
                let last = last_repair.as_ref().map(|why| format!(", last: {why}")).unwrap_or_default();
                line(engine, format!("active ({backend}), restored {repairs} times{last}"));
                if let Some(why) = chosen {
                    line(engine, format!("chosen by auto: {why}"));
                }
                if let Some(divergence) = &status.firewall.as_ref().and_then(|f| f.divergence.as_ref()) {
                    line("divergence", self::divergence(divergence, engine));
                }
                if let Some(failure) = failure {
                    line(engine, failure.clone());
                }
            }
            if let Some(pool) = &status.pool {
                let Summary { mode, ports, available, held, warm, leases, pods, warnings, .. } = pool;
                let place =
                    if mode == "kernel" { "in the kernel" } else { "in the agent alone, without hooks" };
                let ports = ports.join(",");
                line(
                    "port pool",
                    format!(
                        "{place}, {available} ports ({ports}), {held} held, {} of them leased, {warm} warm",
                        leases.held
                    ),
                );
                if pods.hooked + pods.waiting > 0 {
                    line(
                        "pool pods",
                        format!(
                            "{} by annotation, {} more without a control group",
                            pods.hooked, pods.waiting
                        ),
                    );
                }
                for warning in warnings {
                    line("warning", warning.clone());
                }
            }
            for warning in &status.warnings {
                line("warning", warning.clone());
            }
            if let Some(Enforcement { mechanism, remarks, fast_path, interfaces, .. }) = &status.enforcement {
                line("mechanism", mechanism.clone());
                let FastPathStatus { protocols, remarks: why } = fast_path;
                line("fast path", if protocols.is_empty() { "off".into() } else { protocols.join(", ") });
                for why in why {
                    line("remark", why.clone());
                }
                for AttachedInterface { name, xdp, .. } in interfaces {
                    if let Some(xdp) = xdp {
                        line("xdp", format!("{name}: {xdp}"));
                    }
                }
                for remark in remarks {
                    line("remark", remark.clone());
                }
            }
            if let Some(routes) = &status.routes {
                show_routes(routes, &mut line);
            }
            if let Some(cluster) = &status.kubernetes {
                show_cluster(cluster, &mut line);
            }
            if let Some(Reload { time, error }) = &status.reloads.last {
                match error {
                    None => line("last reload", format!("{time}, succeeded")),
                    Some(error) => {
                        line("last reload", format!("{time}, FAILED, the former one is active:\n{error}"))
                    }
                }
            }
        }
        text
    }
}

fn show_denied(count: &ReasonCount, line: &mut impl FnMut(&str, String)) {
    let ReasonCount { direction, reason, packets, audited_packets, .. } = count;
    line("denied", format!("{direction} {reason}: {packets} packets, {audited_packets} in audit mode"));
}

fn show_trial(trial: &TrialStatus, line: &mut impl FnMut(&str, String)) {
    let TrialStatus { deadline, seconds_left, in_kernel, probes, failure, .. } = trial;
    let by = if *in_kernel { "the kernel" } else { "the agent" };
    line(
        "trial",
        format!(
            "{seconds_left} s left, until {deadline}; then {by} goes back, unless `bridge-agent confirm` comes first"
        ),
    );
    for ProbeStatus { target, answered, error } in probes {
        let state = if *answered { "answered" } else { error.as_deref().unwrap_or("not answered yet") };
        line("probe", format!("{target}: {state}"));
    }
    if let Some(failure) = failure {
        line("trial", format!("over, and NOT wholly taken back, trying again: {failure}"));
    }
}

const fn ended(outcome: TrialOutcome) -> &'static str {
    match outcome {
        TrialOutcome::Confirmed => "confirmed",
        TrialOutcome::ConfirmedByProbes => "confirmed, as every probe has answered",
        TrialOutcome::Expired => "not confirmed in time: the former configuration is active",
        TrialOutcome::Reverted => "rolled back: the former configuration is active",
        TrialOutcome::Stopped => "taken back, as the agent was stopped",
    }
}

fn show_routes(routes: &RoutesStatus, line: &mut impl FnMut(&str, String)) {
    let RoutesStatus { wanted, states, problems, problems_left_off, next_hops, next_hops_down, .. } = routes;
    let states: Vec<_> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
    let states = if states.is_empty() { String::new() } else { format!(": {}", states.join(", ")) };
    line("routes", format!("{wanted} wanted{states}"));
    for problem in problems {
        line("route", problem.clone());
    }
    if *problems_left_off > 0 {
        line("route", format!("and {problems_left_off} more; `bridge-agent routes list` shows all"));
    }
    if !routes.waiting_for.is_empty() {
        line("routes", format!("nothing is withdrawn before {} has spoken", routes.waiting_for.join(", ")));
    }
    let down: Vec<_> = next_hops_down.iter().map(|hop| format!("{} on {}", hop.address, hop.dev)).collect();
    let down = if down.is_empty() { "all answer".into() } else { format!("down: {}", down.join(", ")) };
    line("next hops", format!("{next_hops}, {down}"));
    if let Some(DiscoveryStatus { listen, failure, pods, counters }) = &routes.discovery {
        let counters: Vec<_> = counters.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let failure =
            failure.as_ref().map(|failure| format!("; NOT LISTENING: {failure}")).unwrap_or_default();
        let counters = counters.join(", ");
        line("discovery", format!("on {listen}, {pods} pods known; announcements: {counters}{failure}"));
    }
    if let Some(failure) = &routes.failure {
        line("routes", format!("FAILED: {failure}"));
    }
}

fn show_cluster(cluster: &KubernetesStatus, line: &mut impl FnMut(&str, String)) {
    let KubernetesStatus { server, connected, since, nodes, pods, policies, pod_networks_from, .. } = cluster;
    let state = if *connected { "followed" } else { "UNREACHABLE, enforcement stays active," };
    line("kubernetes", format!("{server} {state} since {since}"));
    for (resource, reason) in &cluster.failing {
        line("kubernetes", format!("{resource}: {reason}"));
    }
    if !cluster.waiting_for.is_empty() {
        line(
            "kubernetes",
            format!("nothing is withdrawn before all are listed: {}", cluster.waiting_for.join(", ")),
        );
    }
    let current = if cluster.current { "applied" } else { "NOT applied yet" };
    line(
        "cluster",
        format!(
            "{nodes} nodes, {pods} pods here, {} policies, pod networks from {pod_networks_from}: {current}",
            policies.len()
        ),
    );
    for remark in &cluster.remarks {
        line("cluster", remark.clone());
    }
    if let Some(error) = &cluster.error {
        line("cluster", format!("FAILED, the former one is active: {error}"));
    }
}

/// `engine`: the packet filter beside eBPF. With nftables, packets that eBPF alone denies are not counted.
fn divergence(of: &DivergenceStatus, engine: &str) -> String {
    let DivergenceStatus {
        denied_by_iptables,
        denied_by_nftables,
        denied_by_ebpf,
        last_denied_by_ebpf,
        compared,
        not_compared,
    } = of;
    let nftables = engine == "nftables";
    let denied = if nftables { denied_by_nftables } else { denied_by_iptables };
    let causes: Vec<_> = denied.iter().map(|(cause, packets)| format!("{cause} {packets}")).collect();
    let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
    let by_filter = format!("{} packets denied by {engine} alone{causes}", denied.values().sum::<u64>());
    if nftables {
        return by_filter;
    }
    let last = last_denied_by_ebpf.as_ref().map(|last| format!(", last {last}")).unwrap_or_default();
    format!(
        "{by_filter}, at least {denied_by_ebpf} by eBPF alone{last}; {compared} compared, {not_compared} not"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_names_the_packet_filter_and_what_is_compared_with_it() {
        let none = DivergenceStatus::default();
        assert_eq!(divergence(&none, "nftables"), "0 packets denied by nftables alone");
        let some = DivergenceStatus {
            denied_by_nftables: BTreeMap::from([("bridge:no-rule".to_owned(), 3)]),
            ..DivergenceStatus::default()
        };
        assert_eq!(divergence(&some, "nftables"), "3 packets denied by nftables alone (bridge:no-rule 3)");
        let both = "0 packets denied by iptables alone, at least 0 by eBPF alone; 0 compared, 0 not";
        assert_eq!(divergence(&none, "iptables"), both);
    }
}
