//! Flows that pass, for another engine that is to pass them too.

use bridge_common::filter::flow::{Flow, FlowKey, flag, state};

use super::{
    End,
    ends::ends,
    error::{Error, Result},
    flows::time_left,
    maps::{Maps, now},
};
use crate::kernel::bpf;

/// A flow that neither has ended nor passes by audit mode alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alive {
    /// Who opened it; of ICMP queries, ports are the identifier.
    pub initiator: End,
    /// To whom.
    pub responder: End,
    /// IP protocol number.
    pub protocol: u8,
    /// Whether packets of both directions were seen.
    pub answered: bool,
    /// SCTP: verification tags that the initiator, and the responder, announced; 0: unknown.
    pub tags: [u32; 2],
    /// For how long it may go on to be silent, in seconds.
    pub left: u64,
}

impl Maps {
    /// Visits every flow that is alive.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn for_each_alive(&self, mut visit: impl FnMut(Alive)) -> Result<()> {
        let (settings, now) = (self.active_settings()?, now());
        for (name, map) in self.flow_tables() {
            let each = |key: FlowKey, flow: Flow| {
                if flow.flags & flag::AUDIT == 0
                    && flow.state != state::RESET
                    && let Some(left) = time_left(&flow, &settings, now)
                {
                    visit(alive(&key, &flow, left / 1_000_000_000));
                }
            };
            bpf::for_each(bpf::fd(map), each).map_err(Error::map(name))?;
        }
        Ok(())
    }
}

fn alive(key: &FlowKey, flow: &Flow, left: u64) -> Alive {
    let (initiator, responder) = ends(key, flow.initiator);
    let answered = !matches!(
        flow.state,
        state::SYN_SENT | state::UDP_UNREPLIED | state::ICMP_UNREPLIED | state::OTHER_UNREPLIED
    );
    Alive {
        initiator,
        responder,
        protocol: key.protocol,
        answered,
        tags: [flow.tag(true), flow.tag(false)],
        left,
    }
}
