//! Whether the whole configuration is applied (pure).

use super::{Enforcement, Status};

impl Status {
    /// Returns the parts of the configuration that are not applied; none: the agent is ready. A refused reload is no
    /// reason, since the former configuration is active; nor is audit mode, which is configured.
    #[must_use]
    pub fn unready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.role == "node" && self.enforcement.is_none() && self.firewall.is_none() {
            reasons.push("no engine is active".to_owned());
        }
        if let Some(enforcement) = &self.enforcement {
            if enforcement.generation == 0 {
                reasons.push("eBPF: no policy is active yet".to_owned());
            }
            // Pods come and go; the LAN is always there.
            if !enforcement.interfaces.iter().any(|interface| interface.role == "external") {
                reasons.push(
                    "eBPF: no interface to networks.external is judged; check enforcement.interfaces and `ip route`"
                        .to_owned(),
                );
            }
        }
        let misled = self.enforcement.as_ref().and_then(|enforcement| enforcement.misled.as_ref());
        reasons.extend(misled.map(|why| format!("eBPF: {why}")));
        if let Some(Enforcement { displaced, .. }) = &self.enforcement
            && !displaced.is_empty()
        {
            reasons.push(format!(
                "eBPF: another program stands before bridge or has detached it: {}; see `bpftool net`",
                displaced.join(", ")
            ));
        }
        // While the API server is away, the last known state of the cluster is applied: that is as it should be.
        if let Some(cluster) = self.kubernetes.as_ref().filter(|cluster| !cluster.known) {
            let missing = cluster.waiting_for.join(", ");
            let why: Vec<_> =
                cluster.failing.iter().map(|(name, reason)| format!("; {name}: {reason}")).collect();
            reasons.push(format!("kubernetes: not listed yet: {missing}{}", why.concat()));
        }
        if let Some(cluster) =
            self.kubernetes.as_ref().filter(|cluster| !cluster.current && cluster.waiting_for.is_empty())
        {
            let failing = cluster.failing.iter().map(|(resource, reason)| format!("{resource}: {reason}"));
            let why: Vec<String> = cluster.error.iter().cloned().chain(failing).collect();
            reasons.push(format!("kubernetes: the node is behind the cluster: {}", why.join("; ")));
        }
        let failure = self.firewall.as_ref().and_then(|firewall| firewall.failure.as_ref());
        reasons.extend(failure.map(|failure| format!("iptables: {failure}")));
        reasons
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AttachedInterface, FirewallStatus};
    use super::*;
    use crate::kubernetes::KubernetesStatus;

    fn node(roles: &[&str], generation: u32) -> Status {
        let interface =
            |role: &&str| AttachedInterface { role: (*role).to_owned(), ..AttachedInterface::default() };
        let interfaces = roles.iter().map(interface).collect();
        let enforcement = Some(Enforcement { generation, interfaces, ..Enforcement::default() });
        Status { role: "node".into(), enforcement, ..Status::default() }
    }

    #[test]
    fn a_node_is_ready_when_all_that_was_asked_for_is_in_force() {
        let reason = |status: &Status| status.unready().join("; ");
        assert_eq!(reason(&node(&["internal", "external"], 1)), "");
        assert_eq!(reason(&node(&["external"], 1)), "", "there may be no pod yet");
        assert!(reason(&node(&["internal"], 1)).contains("networks.external"));
        assert!(reason(&node(&["external"], 0)).contains("no policy"));
        let nothing = Status { enforcement: None, ..node(&[], 1) };
        assert_eq!(reason(&nothing), "no engine is active");
        let mut misled = node(&["internal", "external"], 1);
        if let Some(enforcement) = &mut misled.enforcement {
            enforcement.misled = Some("routes to pods lead to cilium_host".to_owned());
        }
        assert_eq!(reason(&misled), "eBPF: routes to pods lead to cilium_host");
        let cluster = |known| {
            let waiting_for = vec!["pods".to_owned()];
            let kubernetes =
                Some(KubernetesStatus { known, waiting_for, current: false, ..KubernetesStatus::default() });
            Status { kubernetes, ..node(&["external"], 1) }
        };
        assert_eq!(reason(&cluster(false)), "kubernetes: not listed yet: pods");
        assert_eq!(reason(&cluster(true)), "", "the cluster as saved is enforced");
        let mut behind = cluster(true);
        if let Some(cluster) = &mut behind.kubernetes {
            (cluster.waiting_for, cluster.error) = (Vec::new(), Some("too many pairs".to_owned()));
        }
        assert_eq!(reason(&behind), "kubernetes: the node is behind the cluster: too many pairs");
        let failure = Some("the rules cannot be read".to_owned());
        let firewall = FirewallStatus { failure, ..serde_json::from_str(r#"{"backend":"nft","repairs":0,"lastRepair":null,"lastRepairTime":null,"failure":null,"divergence":null}"#).unwrap() };
        let broken = Status { firewall: Some(firewall), ..node(&["external"], 1) };
        assert_eq!(reason(&broken), "iptables: the rules cannot be read");
        assert_eq!(reason(&Status { role: "host".into(), ..Status::default() }), "");
    }
}
