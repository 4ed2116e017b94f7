//! Prometheus metrics, read from the kernel at each scrape.

mod process;
#[cfg(test)]
mod tests;
mod text;

use std::{cmp::Reverse, fmt, io, sync::atomic::Ordering};

use axum::{extract::State, http::HeaderMap, response::Response};
use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, text::encode},
    metrics::{
        MetricType, TypedMetric, counter::ConstCounter, gauge::ConstGauge, histogram::Histogram, info::Info,
    },
    registry::{Registry, Unit},
};

use self::process::{Process, ProcessCollector};
use self::text::TextFormat;
use super::{
    Problem,
    events::accepts,
    large::{Chunks, Turn},
};
use crate::{
    datapath::{self, Fill, Maps, OutcomeCount, ReasonCount, RuleCount},
    kubernetes::KubernetesStatus,
    pool::Summary,
    state::{Reload, RoutesStatus, Shared, Status},
};

const OPEN_METRICS: &str = "application/openmetrics-text";

/// Answers in OpenMetrics, and in the text format to a client that accepts only that.
pub(super) async fn serve(
    State(shared): State<Shared>,
    headers: HeaderMap,
    turn: Turn,
) -> Result<Response, Problem> {
    let is_text = accepts(&headers, "text/plain") && !accepts(&headers, OPEN_METRICS);
    let read = move || Ok(registry(&shared));
    let write = move |registry: Registry, chunks: &mut Chunks| {
        let encoded =
            if is_text { encode(&mut TextFormat::new(chunks), &registry) } else { encode(chunks, &registry) };
        encoded.map_err(io::Error::other)
    };
    let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    turn.answer(if is_text { text::MEDIA_TYPE } else { open_metrics }, read, write).await
}

/// Series of rules: each node of a cluster has its own.
const MAX_RULES: usize = 1000;

/// Reads everything that a scrape shows.
fn registry(shared: &Shared) -> Registry {
    let scrape = Scrape::read(shared);
    let mut registry = Registry::default();
    register(&mut registry, scrape, shared.apply_time.clone(), Process::read());
    registry
}

fn register(registry: &mut Registry, scrape: Scrape, apply_time: Histogram, process: Option<Process>) {
    let bridge = registry.sub_registry_with_prefix("bridge");
    let status = &scrape.status;
    let build = vec![("version", status.version.clone()), ("abi", status.abi_version.to_string())];
    bridge.register("build", "Version of the agent", Info::new(build));
    let help = "Time that the agent took to apply a configuration or a change of the cluster";
    bridge.register_with_unit("apply_duration", help, Unit::Seconds, apply_time);
    bridge.register_collector(Box::new(scrape));
    registry.register_collector(Box::new(ProcessCollector(process)));
}

/// Values of one scrape.
#[derive(Debug, Default)]
struct Scrape {
    status: Status,
    reasons: Vec<ReasonCount>,
    rules: Vec<RuleCount>,
    /// Rules beyond the last series.
    rules_omitted: u64,
    outcomes: Vec<OutcomeCount>,
    /// Packets that drivers dropped; `None`: eBPF does not enforce.
    shielded: Option<u64>,
    fills: Vec<Fill>,
    events_missed: u64,
    stalled_clients: u64,
    /// Parts of scrapes that could not be read, since the agent started.
    errors: u64,
}

impl Scrape {
    /// Reads the values. Unreadable ones are left out and counted: the rest of the scrape stays useful.
    fn read(shared: &Shared) -> Self {
        let maps = shared.maps();
        let mut errors = 0;
        fn part<T: Default>(
            maps: Option<&Maps>,
            errors: &mut u64,
            read: impl FnOnce(&Maps) -> datapath::Result<T>,
        ) -> T {
            maps.map_or_else(T::default, |maps| {
                read(maps).unwrap_or_else(|error| {
                    tracing::debug!(%error, "a part of the metrics is unreadable");
                    *errors += 1;
                    T::default()
                })
            })
        }
        let maps = maps.as_deref();
        let (mut reasons, mut rules) =
            (part(maps, &mut errors, Maps::reason_counts), part(maps, &mut errors, Maps::hit_rules));
        if let Some(counts) = shared.filter_counts().filter(|_| maps.is_none()) {
            match (counts.reasons(), counts.rules()) {
                (Ok(of_reasons), Ok(of_rules)) => (reasons, rules) = (of_reasons, of_rules),
                (Err(error), _) | (_, Err(error)) => {
                    tracing::debug!(error, "the counters of the packet filter are unreadable");
                    errors += 1;
                }
            }
        }
        let (rules, rules_omitted) = most_hit(rules);
        let outcomes = part(maps, &mut errors, Maps::outcome_counts);
        let shielded = maps.map(|_| part(maps, &mut errors, Maps::shielded).packets);
        let fills = part(maps, &mut errors, Maps::fill);
        let status = shared.status();
        errors += u64::from(maps.is_some() && (status.flows.is_none() || status.suppressed_events.is_none()));
        let errors = shared.scrape_errors.fetch_add(errors, Ordering::Relaxed) + errors;
        let events_missed = shared.events.missed();
        let stalled_clients = shared.stalled_clients.load(Ordering::Relaxed);
        Self {
            status,
            reasons,
            rules,
            rules_omitted,
            outcomes,
            shielded,
            fills,
            events_missed,
            stalled_clients,
            errors,
        }
    }
}

/// The rules that decided about a flow, those with most flows if there are too many; and the number of the others.
fn most_hit(mut rules: Vec<RuleCount>) -> (Vec<RuleCount>, u64) {
    rules.retain(|rule| rule.hits > 0);
    let omitted = rules.len().saturating_sub(MAX_RULES);
    if omitted > 0 {
        rules.sort_unstable_by_key(|rule| (Reverse(rule.hits), rule.index));
        rules.truncate(MAX_RULES);
        rules.sort_unstable_by_key(|rule| rule.index);
    }
    (rules, omitted as u64)
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
        let audited = ("packets_audited", "Packets let through in audit mode that would have been denied");
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
        let hits = ("rule_hits", "New flows that a rule decided about; rules without any are left out");
        family(encoder, hits, COUNTER, self.rules.iter().map(|count| (rule(count), count.hits)))?;
        let name = (
            "rule_hits_omitted",
            "Rules with hits that have no series: only the 1000 with most hits have one",
        );
        single(encoder, name, GAUGE, self.rules_omitted)?;

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

        if let Some(dropped) = self.shielded {
            let name = (
                "xdp_dropped_packets",
                "Denied packets that drivers dropped; bridge_packets_total counts them as well",
            );
            single(encoder, name, COUNTER, dropped)?;
        }

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
            let name = ("events_suppressed", "Events kept back by the rate limit or for want of a reader");
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
            let name = ("programs_restored", "Programs that others detached or moved and the agent restored");
            single(encoder, name, COUNTER, enforcement.programs_restored)?;
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
                // Nothing compares in this direction with nftables: no series instead of one that is always zero.
                let by_ebpf = ([("denied_by", "ebpf"), ("reason", "policy")], divergence.denied_by_ebpf);
                let by_ebpf = (!nftables).then_some(by_ebpf);
                let name = (
                    "divergence",
                    "Packets that one engine has denied and the other let through or would have",
                );
                family(encoder, name, COUNTER, by_filter.chain(by_ebpf))?;
                let name = (
                    "divergence_compared",
                    "Packets that eBPF has denied: whether the other engine was asked too",
                );
                let compared = [("yes", divergence.compared), ("no", divergence.not_compared)];
                let compared = compared.map(|(asked, packets)| ([("asked", asked)], packets));
                family(encoder, name, COUNTER, compared.into_iter().filter(|_| !nftables))?;
            }
            let failure = (
                if nftables { "nftables_failure" } else { "iptables_failure" },
                "1: the rules cannot be read or put back",
            );
            single(encoder, failure, GAUGE, u64::from(firewall.failure.is_some()))?;
        }
        let name =
            ("events_missed", "Events that a reader of the API was too slow to take, over all readers");
        single(encoder, name, COUNTER, self.events_missed)?;
        let name = (
            "api_stalled_clients",
            "Clients that the API disconnected because they took no byte of an answer",
        );
        single(encoder, name, COUNTER, self.stalled_clients)?;
        let left = self.status.trial.as_ref().map_or(0, |trial| trial.seconds_left);
        let name = (
            "trial_remaining_seconds",
            "Until a configuration on trial takes itself back; 0: none is on trial",
        );
        single(encoder, name, GAUGE, left)?;
        let reloads = &self.status.reloads;
        let results = [("success", reloads.succeeded), ("failure", reloads.failed)];
        let results = results.map(|(result, count)| ([("result", result)], count));
        family(encoder, ("reloads", "Reloads of the configuration"), COUNTER, results)?;
        if let Some(Reload { time, error }) = &reloads.last {
            let name = (
                "config_last_reload_successful",
                "1: the last reload succeeded; 0: the former configuration is active",
            );
            single(encoder, name, GAUGE, u64::from(error.is_none()))?;
            if let Ok(time) = time.parse::<Timestamp>() {
                let name = ("config_last_reload_timestamp_seconds", "Time of the last reload, since 1970");
                single(encoder, name, GAUGE, time.as_second().unsigned_abs())?;
            }
        }
        let name = (
            "ready",
            "1: the whole configuration is applied; 0: `bridge-agent status --ready` names the missing parts",
        );
        single(encoder, name, GAUGE, u64::from(self.status.unready().is_empty()))?;
        let name = ("scrape_errors", "Parts of a scrape that could not be read and are missing in it");
        single(encoder, name, COUNTER, self.errors)
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
    let Summary { mode, available, held, warm, busiest, counters, leases, masquerade_repairs, .. } = pool;
    let kernel = ("pool_in_kernel", "1: hooks claim ports; 0: ports are leased by the agent alone");
    single(encoder, kernel, GAUGE, u64::from(mode == "kernel"))?;
    let ports = ("pool_available_ports", "Ports of the pool, towards each destination");
    single(encoder, ports, GAUGE, u64::from(*available))?;
    let states = [("held", *held), ("warm", *warm)].map(|(state, count)| ([("state", state)], count));
    family(encoder, ("pool_ports", "Ports that are not free, over all destinations"), GAUGE, states)?;
    let most =
        ("pool_busiest_destination_ports", "Ports in use towards the destination that has most of them");
    single(encoder, most, GAUGE, *busiest)?;
    let of = |hooks: u64, agent: u64| [([("by", "hook")], hooks), ([("by", "agent")], agent)];
    let claims = ("pool_claims", "Ports claimed by hooks, and leased by the agent");
    family(encoder, claims, COUNTER, of(counters.claims, leases.acquired))?;
    let releases = ("pool_releases", "Ports given back");
    family(encoder, releases, COUNTER, of(counters.releases, leases.released))?;
    let adoptions = ("pool_adoptions", "Claims of a port that the program had bound itself");
    single(encoder, adoptions, COUNTER, counters.adoptions)?;
    let rests = ("pool_rests", "Ports that began to rest, in TIME_WAIT at a peer without TCP timestamps");
    single(encoder, rests, COUNTER, counters.rests)?;
    let denied = (
        "pool_rests_denied",
        "Ports in TIME_WAIT that did not rest, since their group had its share of these",
    );
    single(encoder, denied, COUNTER, counters.rests_denied)?;
    let failures = ("pool_connect_failures", "Connects that the kernel refused after they had got a port");
    single(encoder, failures, COUNTER, counters.connect_failures)?;
    let refusals = [("hook", counters.refusals), ("agent", leases.refusals)];
    let refusals = refusals.into_iter().flat_map(|(by, refusals)| {
        refusals.iter().map(move |(reason, count)| ([("by", by), ("reason", reason)], count))
    });
    family(encoder, ("pool_refusals", "Connects and requests that got no port"), COUNTER, refusals)?;
    let lost = ("pool_events_lost", "Refusals that were counted only, and not reported");
    single(encoder, lost, COUNTER, counters.events_lost)?;
    let repairs = ("pool_masquerade_repairs", "Times that the masquerade table was installed again");
    single(encoder, repairs, COUNTER, *masquerade_repairs)
}
