//! The state of this node: the maps of eBPF where it enforces, and the routes of the kernel.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use crate::{
    datapath::Maps,
    explain::{Explanation, FlowTable, KnownFlow, NodeState, Packet, StageOutcome},
    interfaces::{Bindings, Observer, Selection},
    state::{ActivePolicy, AttachedInterface, Shared},
};

/// Most interfaces that a stage names.
const MAX_SHOWN: usize = 3;

/// A node as its maps, its agent and its kernel know it.
pub(super) struct Live<'a> {
    pub(super) active: &'a ActivePolicy,
    pub(super) local: Vec<IpAddr>,
    maps: Option<Arc<Maps>>,
    pub(super) interfaces: Vec<AttachedInterface>,
    /// Without maps: interfaces of the pods of this node.
    hosted: BTreeMap<IpAddr, u32>,
    /// Addresses of the pods that take part in the port pool by their annotation, and are hooked.
    pooled: BTreeSet<IpAddr>,
}

impl<'a> Live<'a> {
    /// Reads the routes of the kernel where eBPF does not enforce.
    pub(super) fn new(shared: &Shared, active: &'a ActivePolicy) -> Self {
        let maps = shared.maps();
        let interfaces = shared.status().enforcement.map(|status| status.interfaces).unwrap_or_default();
        let mut pooled = BTreeSet::new();
        // Without a control group, a pod is not hooked; which of several that is, is not known here.
        let all_hooked =
            shared.pool().and_then(|pool| pool.summary().ok()).is_some_and(|pool| pool.pods.waiting == 0);
        if let Some(cluster) = shared.cluster().filter(|_| all_hooked) {
            cluster.visit_pods(|_, addresses, uid| pooled.extend(uid.into_iter().flat_map(|_| addresses)));
        }
        let local = active.local.clone();
        let mut live = Self { active, local, maps, interfaces, hosted: BTreeMap::new(), pooled };
        if live.maps.is_none() {
            live.read_kernel();
        }
        live
    }

    fn read_kernel(&mut self) {
        let policy = &self.active.policy;
        let selection = Selection {
            external_networks: policy.external.clone(),
            pod_networks: policy.pods.clone(),
            ..Selection::default()
        };
        let read = Observer::open().and_then(|mut observer| observer.snapshot(&selection));
        let Ok(snapshot) = read else { return };
        self.local = snapshot.addresses.iter().copied().collect();
        self.hosted = selection.hosted(&snapshot, &mut Bindings::default()).pods;
        let chosen = selection.choose(&snapshot);
        self.interfaces = chosen
            .targets
            .iter()
            .map(|target| AttachedInterface {
                name: target.name.clone(),
                index: target.index,
                role: format!("{:?}", target.role).to_lowercase(),
                fast_path: Vec::new(),
                xdp: None,
            })
            .collect();
    }

    /// Whether this agent enforces by programs of eBPF.
    pub(super) const fn is_judged_by_ebpf(&self) -> bool {
        self.maps.is_some()
    }

    /// Returns the index of an interface towards the LAN.
    pub(super) fn lan_interface(&self) -> u32 {
        self.interfaces.iter().find(|one| one.role == "external").map_or(0, |interface| interface.index)
    }

    /// Returns the index of the interface that packets of an address come in by, 0 for those of the node itself; `None`: not known.
    pub(super) fn input(&self, source: IpAddr) -> Option<u32> {
        if self.local.contains(&source) {
            return Some(0);
        }
        let lan = || {
            let mut lan = self.interfaces.iter().filter(|one| one.role == "external");
            lan.next().filter(|_| lan.next().is_none()).map(|one| one.index)
        };
        self.hosted(source).or_else(lan)
    }

    /// Returns the name of the interface towards an address, if it is known.
    pub(super) fn interface(&self, address: IpAddr) -> Option<&str> {
        if let Some(index) = self.hosted(address) {
            return self.interfaces.iter().find(|one| one.index == index).map(|one| one.name.as_str());
        }
        let mut lan = self.interfaces.iter().filter(|one| one.role == "external");
        // With several, the route decides, which is not asked here.
        match (lan.next(), lan.next()) {
            (Some(one), None) => Some(one.name.as_str()),
            _ => None,
        }
    }

    /// Completes the stages of the hook and of the flow; returns whether a program of eBPF judges the connection.
    pub(super) fn complete(&self, explanation: &mut Explanation) -> bool {
        let Some(maps) = &self.maps else {
            for stage in &mut explanation.stages {
                match stage.name.as_str() {
                    "hook" => {
                        "no hook of eBPF: enforcement.engines leaves it out".clone_into(&mut stage.seen);
                        stage.why = "the packet filter of the kernel judges".to_owned();
                    }
                    "flow" => {
                        stage.outcome = StageOutcome::Unknown;
                        "not read".clone_into(&mut stage.seen);
                        stage.why =
                            "a new connection is assumed; `conntrack -L` has those of the kernel".to_owned();
                    }
                    _ => {}
                }
            }
            return false;
        };
        let Some(stage) = explanation.stages.iter_mut().find(|stage| stage.name == "hook") else {
            return true;
        };
        let attached = maps.attached_interfaces().unwrap_or_default();
        let suffix = format!(" {}", stage.seen);
        let names: Vec<&str> = attached.iter().filter_map(|one| one.strip_suffix(suffix.as_str())).collect();
        if names.is_empty() {
            stage.outcome = StageOutcome::Unknown;
            stage.seen += ", attached to no interface: nothing is judged there";
            // Packets that this hook has not seen are judged by the one behind it, but for NodePorts.
            let behind = match explanation.direction.as_deref() {
                Some("inbound") => " internal_egress",
                Some("outbound") => " external_egress",
                _ => return false,
            };
            return attached.iter().any(|one| one.ends_with(behind));
        }
        let more = match names.len().saturating_sub(MAX_SHOWN) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let shown = names.iter().take(MAX_SHOWN).copied().collect::<Vec<_>>().join(", ");
        stage.seen += &format!(" on {shown}{more}");
        true
    }
}

impl NodeState for Live<'_> {
    fn hosted(&self, pod: IpAddr) -> Option<u32> {
        match &self.maps {
            Some(maps) => maps.hosted_interface(pod),
            None => self.hosted.get(&pod).copied(),
        }
    }

    // The question is about a packet of its own sender.
    fn leads_to(&self, _: IpAddr, _: u32) -> bool {
        true
    }

    fn is_external(&self, interface: u32) -> bool {
        self.interfaces.iter().any(|one| one.index == interface && one.role == "external")
    }

    fn has_tunnel(&self, protocol: u8, port: u16) -> bool {
        self.maps.as_ref().is_some_and(|maps| maps.has_tunnel(protocol, port))
    }

    fn flow(&self, table: FlowTable, packet: &Packet) -> Option<KnownFlow> {
        let (key, source) = packet.flow_key();
        let flow = self.maps.as_ref()?.usable_flow(table == FlowTable::HalfOpen, &key).ok()??;
        Some(KnownFlow::new(&flow, source))
    }

    fn is_pooled(&self, pod: IpAddr) -> bool {
        self.pooled.contains(&pod)
    }
}
