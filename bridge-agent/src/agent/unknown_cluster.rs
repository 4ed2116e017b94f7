//! A node that has never seen its cluster is closed: between LAN hosts and everything that the node leads packets to by itself,
//! nothing passes but what the rules of the file allow, until the API server has answered once.

use ipnet::IpNet;

use crate::{
    config::{Config, Network, Role},
    interfaces::{Observer, Selection},
    kubernetes::{Follower, Planned},
};

/// For `status` and the log.
const REMARK: &str = "the cluster is not known yet: nothing passes between networks.external and the networks that this node leads \
                      to, but what the rules of the file allow";

/// Combines the configuration file with the known state of the cluster; as long as there is none, with the networks that the
/// kernel leads to.
pub(super) fn plan(follower: &Follower, file: &Config) -> (Planned, u64) {
    // First: what is known later is planned later.
    let known = follower.knows_cluster();
    let (mut planned, version) = follower.plan(file);
    if !known && file.role == Role::Node {
        planned.remarks.push(REMARK.to_owned());
        match led_to(&planned.config) {
            Ok(networks) => {
                let before = planned.config.networks.pod_nets();
                let more = networks.into_iter().filter(|net| !before.iter().any(|known| known.contains(net)));
                planned.config.networks.pods.extend(more.map(Network::from));
            }
            Err(error) => planned.remarks.push(format!("cannot read the routes of this node: {error}")),
        }
    }
    (planned, version)
}

/// Returns the choice of interfaces of a configuration, for which every network may be one of pods.
pub(super) fn selection(config: &Config) -> Selection {
    let interfaces = &config.enforcement.interfaces;
    let selection = Selection {
        external: interfaces.external.clone(),
        external_networks: config.networks.external_nets(),
        ..Selection::default()
    };
    selection.of_unknown_pods()
}

fn led_to(config: &Config) -> std::io::Result<Vec<IpNet>> {
    let selection = selection(config);
    Ok(selection.led_to_pods(&Observer::open()?.snapshot(&selection)?))
}
