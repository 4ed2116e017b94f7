//! The packet path as a configuration wants it: compiled, and not yet written.

use std::{io, net::IpAddr, sync::Arc};

use bridge_common::filter::flow::state;

use crate::{
    config::{Config, FastPath, PoolScope, Timeouts, Xdp},
    datapath::{self, Behaviour},
    interfaces::{Observer, Selection, Snapshot},
    model::{Mode, OnDeny, Policy},
    policy::{self, Tables},
};

/// Errors of a change to the packet path. The former state stays active.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Datapath(#[from] datapath::Error),
    /// The rules cannot be compiled.
    #[error("the rules cannot be compiled: {0}")]
    Policy(#[from] policy::Error),
    /// The kernel does not report interfaces.
    #[error("cannot read the interfaces of this host: {0}")]
    Interfaces(#[from] io::Error),
}

/// A LAN host that mistypes an address is answered; a flood is not, and no one whose address it forges is.
const ANSWERS_PER_SECOND: u32 = 1000;

/// Settings of the packet path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Desired {
    pub(super) policy: Arc<Policy>,
    pub(super) pool: Option<PoolScope>,
    pub(super) behaviour: Behaviour,
    pub(super) selection: Selection,
    pub(super) fast_path: bool,
    /// Why interfaces towards the LAN have no shield; `None`: they have one.
    pub(super) unshielded: Option<&'static str>,
}

impl Desired {
    fn new(config: &Config) -> Self {
        let policy = config.policy();
        let enforcement = &config.enforcement;
        let behaviour = Behaviour {
            timeouts: timeouts(&enforcement.timeouts),
            audit: policy.mode == Mode::Audit,
            reject: policy.on_deny == OnDeny::Reject,
            events_per_second: enforcement.events.rate,
            answers_per_second: ANSWERS_PER_SECOND,
            report_allowed: enforcement.events.allowed,
        };
        let selection = Selection::of(config);
        // Audit mode leaves the path of packets as it is without bridge.
        let fast_path = enforcement.fast_path == FastPath::Auto && policy.mode == Mode::Enforce;
        let unshielded = match (enforcement.xdp, policy.mode) {
            (Xdp::Off, _) => Some("enforcement.xdp is off"),
            (Xdp::Auto, Mode::Audit) => Some("audit mode denies nothing"),
            (Xdp::Auto, Mode::Enforce) => None,
        };
        let policy = Arc::new(policy);
        Self { policy, pool: config.pool_scope(), behaviour, selection, fast_path, unshielded }
    }

    /// Whether connections may be in scope that were not with `before`.
    pub(super) fn has_other_scope(&self, before: &Self) -> bool {
        (&self.policy.pods, &self.policy.external, &self.policy.nodes)
            != (&before.policy.pods, &before.policy.external, &before.policy.nodes)
            || self.policy.node_ports.as_ref().map(|ports| ports.range)
                != before.policy.node_ports.as_ref().map(|ports| ports.range)
    }
}

fn timeouts(timeouts: &Timeouts) -> [u64; state::COUNT] {
    let mut by_state = [0; state::COUNT];
    for (state, timeout) in [
        (state::SYN_SENT, timeouts.tcp_handshake),
        (state::SYN_RECEIVED, timeouts.tcp_handshake),
        (state::ESTABLISHED, timeouts.tcp_established),
        (state::FIN_WAIT, timeouts.tcp_established),
        (state::CLOSING, timeouts.tcp_closing),
        (state::RESET, timeouts.tcp_reset),
        (state::UDP_UNREPLIED, timeouts.udp_unreplied),
        (state::UDP_REPLIED, timeouts.udp_replied),
        (state::ICMP_UNREPLIED, timeouts.icmp),
        (state::ICMP_REPLIED, timeouts.icmp),
        (state::OTHER_UNREPLIED, timeouts.other),
        (state::OTHER_REPLIED, timeouts.other),
    ] {
        by_state[usize::from(state)] = u64::try_from(timeout.duration().as_nanos()).unwrap_or(u64::MAX);
    }
    by_state
}

/// A configuration compiled for the packet path. Nothing of it is written yet.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) desired: Desired,
    /// The interfaces and addresses that the tables are for.
    pub(super) snapshot: Snapshot,
    pub(super) observer: Observer,
    pub(super) tables: Tables,
    /// The configuration that returns after a trial.
    pub(super) former: Option<Desired>,
}

impl Prepared {
    /// Compiles `config`, and the configuration that may return in its place.
    ///
    /// # Errors
    /// The interfaces cannot be read, or a policy cannot be compiled.
    pub(super) fn new(config: &Config, former: Option<&Config>) -> Result<Self, Error> {
        let desired = Desired::new(config);
        let mut observer = Observer::open()?;
        let snapshot = observer.snapshot(&desired.selection)?;
        let former = former.map(Desired::new);
        if let Some(former) = &former {
            compile(former, &snapshot)?;
        }
        let tables = compile(&desired, &snapshot)?;
        Ok(Self { desired, snapshot, observer, tables, former })
    }
}

/// Compiles the policy for the addresses of this node.
pub(super) fn compile(desired: &Desired, snapshot: &Snapshot) -> Result<Tables, Error> {
    let local: Vec<IpAddr> = snapshot.addresses.iter().copied().collect();
    Ok(policy::compile(&desired.policy, &local)?)
}
