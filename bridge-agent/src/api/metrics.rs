//! Prometheus metrics, read from the kernel at each scrape.

use std::{fmt, io, sync::atomic::Ordering};

use axum::{extract::State, response::Response};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, text::encode},
    metrics::{MetricType, TypedMetric, counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::Registry,
};

use super::{
    Problem,
    large::{Chunks, Turn},
};
use crate::{
    datapath::{Fill, Maps, OutcomeCount, ReasonCount, RuleCount},
    kernel::memory,
    kubernetes::KubernetesStatus,
    pool::Summary,
    state::{RoutesStatus, Shared, Status},
};

pub(super) async fn serve(State(shared): State<Shared>, turn: Turn) -> Result<Response, Problem> {
    let read = move || Ok(registry(&shared));
    let write = |registry: Registry, chunks: &mut Chunks| {
        let encoded = encode(chunks, &registry).map_err(io::Error::other);
        drop(registry);
        memory::trim();
        encoded
    };
    turn.answer("application/openmetrics-text; version=1.0.0; charset=utf-8", read, write).await
}

/// Reads everything that a scrape shows.
fn registry(shared: &Shared) -> Registry {
    let mut registry = Registry::with_prefix("bridge");
    let status = shared.status();
    let build = vec![("version", status.version.clone()), ("abi", status.abi_version.to_string())];
    registry.register("build", "Version of the agent", Info::new(build));
    let readers =
        Readers { missed: shared.events.missed(), stalled: shared.stalled_clients.load(Ordering::Relaxed) };
    registry.register_collector(Box::new(Scrape::new(status, readers, shared.maps().as_deref())));
    registry
}

/// Clients of the API that were too slow.
#[derive(Debug)]
struct Readers {
    missed: u64,
    stalled: u64,
}

/// Values of one scrape.
#[derive(Debug)]
struct Scrape {
    status: Status,
    readers: Readers,
    reasons: Vec<ReasonCount>,
    rules: Vec<RuleCount>,
    outcomes: Vec<OutcomeCount>,
    fills: Vec<Fill>,
}

impl Scrape {
    fn new(status: Status, readers: Readers, maps: Option<&Maps>) -> Self {
        // Unreadable values are left out: the rest of the scrape stays useful.
        let reasons = maps.and_then(|maps| maps.reason_counts().ok()).unwrap_or_default();
        let rules = maps.and_then(|maps| maps.rule_counts().ok()).unwrap_or_default();
        let outcomes = maps.and_then(|maps| maps.outcome_counts().ok()).unwrap_or_default();
        let fills = maps.and_then(|maps| maps.fill().ok()).unwrap_or_default();
        Self { status, readers, reasons, rules, outcomes, fills }
    }
}

/// Writes a family of counters or gauges.
fn family<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): Named<'_>,
    kind: MetricType,
    values: impl IntoIterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    values.into_iter().try_for_each(|(labels, value)| write(family.encode_family(&labels)?, kind, value))
}

/// Writes a counter or gauge without labels.
fn single(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): Named<'_>,
    kind: MetricType,
    value: u64,
) -> fmt::Result {
    write(encoder.encode_descriptor(name, help, None, kind)?, kind, value)
}

fn write(metric: MetricEncoder<'_>, kind: MetricType, value: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => ConstCounter::new(value).encode(metric),
        _ => ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric),
    }
}

/// Name and help text.
type Named<'a> = (&'a str, &'a str);

const COUNTER: MetricType = <ConstCounter<u64> as TypedMetric>::TYPE;
const GAUGE: MetricType = <ConstGauge<i64> as TypedMetric>::TYPE;

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let reasons = || self.reasons.iter();
        let reason = |count: &ReasonCount| {
            let verdict = if count.denies { "deny" } else { "allow" };
            [
                ("direction", count.direction.clone()),
                ("reason", count.reason.clone()),
                ("verdict", verdict.into()),
            ]
        };
        let packets = ("packets", "Packets judged");
        family(encoder, packets, COUNTER, reasons().map(|count| (reason(count), count.packets)))?;
        let bytes = ("bytes", "Length of the packets judged, from the link layer header on");
        family(encoder, bytes, COUNTER, reasons().map(|count| (reason(count), count.bytes)))?;
        let audited = ("audited_packets", "Packets let through in audit mode that would have been denied");
        let would_be_denied = reasons().filter(|count| count.denies);
        family(
            encoder,
            audited,
            COUNTER,
            would_be_denied.map(|count| (reason(count), count.audited_packets)),
        )?;

        let rule = |count: &RuleCount| {
            let labels = [("rule", &count.name), ("direction", &count.direction), ("action", &count.action)];
            labels.map(|(name, value)| (name, value.clone()))
        };
        let hits = ("rule_hits", "New flows that a rule has decided about");
        family(encoder, hits, COUNTER, self.rules.iter().map(|count| (rule(count), count.hits)))?;

        let outcome = |count: &OutcomeCount| {
            [("direction", count.direction.clone()), ("outcome", count.outcome.clone())]
        };
        let fast_path = (
            "fast_path_packets",
            "Packets of established flows: whether they took the fast path, or why not",
        );
        family(
            encoder,
            fast_path,
            COUNTER,
            self.outcomes.iter().map(|count| (outcome(count), count.packets)),
        )?;

        if let Some(flows) = self.status.flows {
            let tables = [
                ("established", flows.established, flows.established_capacity),
                ("half_open", flows.half_open, flows.half_open_capacity),
            ];
            let known = tables.iter().map(|(table, known, _)| ([("table", *table)], *known));
            family(encoder, ("flows", "Flows that are known"), GAUGE, known)?;
            let room = tables.iter().map(|(table, _, room)| ([("table", *table)], u64::from(*room)));
            family(encoder, ("flow_capacity", "Flows that there is room for"), GAUGE, room)?;
        }
        let entries = self.fills.iter().map(|fill| ([("map", fill.map)], fill.entries));
        family(encoder, ("map_entries", "Entries of a map, alive or not"), GAUGE, entries)?;
        let room = self.fills.iter().map(|fill| ([("map", fill.map)], u64::from(fill.capacity)));
        family(encoder, ("map_capacity", "Entries that a map has room for"), GAUGE, room)?;
        if let Some(suppressed) = self.status.suppressed_events {
            let name = ("suppressed_events", "Events kept back by the rate limit or for want of a reader");
            single(encoder, name, COUNTER, suppressed)?;
        }
        if let Some(enforcement) = &self.status.enforcement {
            let generation = ("policy_generation", "Number of the active policy");
            single(encoder, generation, GAUGE, enforcement.generation.into())?;
            let audit = ("audit_mode", "1: nothing is denied, only reported");
            single(encoder, audit, GAUGE, u64::from(enforcement.mode == "audit"))?;
            let with_role = |role: &str| {
                enforcement.interfaces.iter().filter(|interface| interface.role == role).count() as u64
            };
            let roles = ["external", "internal"].map(|role| ([("role", role)], with_role(role)));
            family(encoder, ("interfaces", "Interfaces that packets are judged on"), GAUGE, roles)?;
            let name = ("pins_restored", "Pins that another program removed and the agent restored");
            single(encoder, name, COUNTER, enforcement.pins_restored)?;
        }
        if let Some(cluster) = &self.status.kubernetes {
            encode_cluster(encoder, cluster)?;
        }
        if let Some(routes) = &self.status.routes {
            encode_routes(encoder, routes)?;
        }
        if let Some(pool) = &self.status.pool {
            encode_pool(encoder, pool)?;
        }
        if let Some(firewall) = &self.status.firewall {
            let nftables = firewall.engine == "nftables";
            let engine = if nftables { "nftables" } else { "iptables" };
            let repairs = (
                if nftables { "nftables_repairs" } else { "iptables_repairs" },
                "How often rules that another program had changed were put back",
            );
            single(encoder, repairs, COUNTER, firewall.repairs)?;
            if let Some(divergence) = &firewall.divergence {
                let denied =
                    if nftables { &divergence.denied_by_nftables } else { &divergence.denied_by_iptables };
                let by_filter = denied.iter().map(|(cause, packets)| {
                    ([("denied_by", engine), ("reason", cause.trim_start_matches("bridge:"))], *packets)
                });
                let by_ebpf = ([("denied_by", "ebpf"), ("reason", "policy")], divergence.denied_by_ebpf);
                let name = (
                    "divergence",
                    "Packets that one engine has denied and the other let through or would have",
                );
                family(encoder, name, COUNTER, by_filter.chain([by_ebpf]))?;
                let name =
                    ("divergence_compared", "Packets that eBPF has denied: whether iptables was asked too");
                let compared = [("yes", divergence.compared), ("no", divergence.not_compared)];
                let compared = compared.map(|(asked, packets)| ([("asked", asked)], packets));
                family(encoder, name, COUNTER, compared)?;
            }
            let failure = (
                if nftables { "nftables_failure" } else { "iptables_failure" },
                "1: the rules cannot be read or put back",
            );
            single(encoder, failure, GAUGE, u64::from(firewall.failure.is_some()))?;
        }
        let Readers { missed, stalled } = self.readers;
        let name =
            ("events_missed", "Events that a reader of the API was too slow to take, over all readers");
        single(encoder, name, COUNTER, missed)?;
        let name = (
            "api_stalled_clients",
            "Clients that the API disconnected because they took no byte of an answer",
        );
        single(encoder, name, COUNTER, stalled)?;
        let left = self.status.trial.as_ref().map_or(0, |trial| trial.seconds_left);
        let name =
            ("trial_seconds_left", "Until a configuration on trial takes itself back; 0: none is on trial");
        single(encoder, name, GAUGE, left)?;
        let reloads = &self.status.reloads;
        let results = [("success", reloads.succeeded), ("failure", reloads.failed)];
        let results = results.map(|(result, count)| ([("result", result)], count));
        family(encoder, ("reloads", "Reloads of the configuration"), COUNTER, results)
    }
}

fn encode_cluster(encoder: &mut DescriptorEncoder<'_>, cluster: &KubernetesStatus) -> fmt::Result {
    let connected = ("kubernetes_connected", "1: everything of the cluster can be followed");
    single(encoder, connected, GAUGE, u64::from(cluster.connected))?;
    let name = (
        "kubernetes_disconnected_seconds",
        "How long something of the cluster cannot be followed; 0: it can",
    );
    single(encoder, name, GAUGE, cluster.disconnected_seconds)?;
    let current = ("kubernetes_current", "1: the known state of the cluster is applied");
    single(encoder, current, GAUGE, u64::from(cluster.current))?;
    let objects =
        cluster.objects.iter().map(|(resource, count)| ([("resource", resource.clone())], *count as u64));
    family(encoder, ("kubernetes_objects", "Objects of the cluster that are known"), GAUGE, objects)?;
    let invalid = ("kubernetes_invalid_policies", "Policies that are not followed, as they are not valid");
    single(encoder, invalid, GAUGE, cluster.invalid_policies as u64)
}

/// Names of routes themselves are in `GET /v1/routes`: a cluster may have thousands.
fn encode_routes(encoder: &mut DescriptorEncoder<'_>, routes: &RoutesStatus) -> fmt::Result {
    let states = routes.states.iter().map(|(state, count)| ([("state", state.to_string())], *count as u64));
    family(encoder, ("routes", "Desired routes, by state"), GAUGE, states)?;
    let down = routes.next_hops_down.len();
    let next_hops = [("up", routes.next_hops - down), ("down", down)];
    let next_hops = next_hops.map(|(state, count)| ([("state", state)], count as u64));
    family(encoder, ("next_hops", "Nodes on the way to pods"), GAUGE, next_hops)?;
    let named = |(name, count): (&String, &u64)| ([("kind", name.clone())], *count);
    let name = ("route_operations", "Operations on routes, and state changes of next hops");
    family(encoder, name, COUNTER, routes.counters.iter().map(named))?;
    if let Some(discovery) = &routes.discovery {
        let pods = ("discovery_pods", "Pods that have announced themselves and have not expired");
        single(encoder, pods, GAUGE, discovery.pods as u64)?;
        let name = ("discovery_announcements", "Announcements of pods, by result");
        family(encoder, name, COUNTER, discovery.counters.iter().map(named))?;
    }
    Ok(())
}

fn encode_pool(encoder: &mut DescriptorEncoder<'_>, pool: &Summary) -> fmt::Result {
    let Summary { mode, available, held, warm, counters, leases, masquerade_repairs, .. } = pool;
    let kernel = ("pool_in_kernel", "1: hooks claim ports; 0: ports are leased by the agent alone");
    single(encoder, kernel, GAUGE, u64::from(mode == "kernel"))?;
    let ports = ("pool_available_ports", "Ports of the pool, towards each destination");
    single(encoder, ports, GAUGE, u64::from(*available))?;
    let states = [("held", *held), ("warm", *warm)].map(|(state, count)| ([("state", state)], count));
    family(encoder, ("pool_ports", "Ports that are not free, over all destinations"), GAUGE, states)?;
    let of = |hooks: u64, agent: u64| [([("by", "hook")], hooks), ([("by", "agent")], agent)];
    let claims = ("pool_claims", "Ports claimed by hooks, and leased by the agent");
    family(encoder, claims, COUNTER, of(counters.claims, leases.acquired))?;
    let releases = ("pool_releases", "Ports given back");
    family(encoder, releases, COUNTER, of(counters.releases, leases.released))?;
    let adoptions = ("pool_adoptions", "Claims of a port that the program had bound itself");
    single(encoder, adoptions, COUNTER, counters.adoptions)?;
    let rests = ("pool_rests", "Ports that began to rest, in TIME_WAIT at a peer without TCP timestamps");
    single(encoder, rests, COUNTER, counters.rests)?;
    let failures = ("pool_connect_failures", "Connects that the kernel refused after they had got a port");
    single(encoder, failures, COUNTER, counters.connect_failures)?;
    let refusals = [("hook", counters.refusals), ("agent", leases.refusals)];
    let refusals = refusals.into_iter().flat_map(|(by, refusals)| {
        refusals.iter().map(move |(reason, count)| ([("by", by), ("reason", reason)], count))
    });
    family(encoder, ("pool_refusals", "Connects and requests that got no port"), COUNTER, refusals)?;
    let lost = ("pool_lost_events", "Refusals that were counted only, and not reported");
    single(encoder, lost, COUNTER, counters.events_lost)?;
    let repairs = ("pool_masquerade_repairs", "Times that the masquerade table was installed again");
    single(encoder, repairs, COUNTER, *masquerade_repairs)
}
