//! From the settings to the layout of the pool's words (pure).

use bridge_common::pool::{
    self, Config, FLAG_BIND_UDP, FLAG_STRICT, Geometry, MAX_SLOTS, bitmap, bitmap::Memory, shares,
};

use super::settings::Settings;
use crate::model::PortRange;
use crate::model::PortSet;

/// Most memory that the words of the pool may take, in bytes, before fewer destinations are allowed for.
const MEMORY_BUDGET: u32 = 64 << 20;

/// The layout of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Configuration of the hooks.
    pub config: Config,
    /// Every port of the pool.
    pub ports: PortSet,
    /// The ports that only unconnected UDP sockets get.
    pub unconnected: PortSet,
}

/// Ports of the pool that something else on the machine uses.
#[derive(Clone, Debug, Default)]
pub struct Occupied {
    /// kube-apiserver's `--service-node-port-range`: kube-proxy redirects packets that arrive at these ports.
    pub node_ports: Option<PortRange>,
    /// `net.ipv4.ip_local_reserved_ports` without bridge's own entries: reserved for other programs.
    pub reserved: Vec<PortRange>,
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error(
        "no port is left in the pool: of {asked} ports {excluded} are excluded, {node_ports} are NodePorts and \
         {reserved} are in net.ipv4.ip_local_reserved_ports; choose other portPool.ports"
    )]
    Empty {
        /// Ports in the settings.
        asked: u32,
        /// Of them, excluded by the settings.
        excluded: u32,
        /// Of the rest, NodePorts.
        node_ports: u32,
        /// Of the rest, reserved by others.
        reserved: u32,
    },
    #[error(
        "the pool in the kernel spans ports {first} to {last}, and ports outside are wanted now; run `bridge-agent down` \
         and start again to make it again (established connections live on, their ports are not tracked any more)"
    )]
    Span {
        /// Lowest port of the span.
        first: u32,
        /// Highest port of the span.
        last: u32,
    },
}

impl Layout {
    /// Lays the pool out.
    ///
    /// # Errors
    /// [`LayoutError`] if no port is left.
    pub fn plan(settings: &Settings, occupied: &Occupied) -> Result<Self, LayoutError> {
        let mut ports: PortSet = settings.ports.iter().copied().collect();
        let mut without = |gone: &mut dyn Iterator<Item = PortRange>| {
            let before = ports.len();
            ports.remove_all(&gone.collect());
            before - ports.len()
        };
        let excluded =
            without(&mut settings.exclude.iter().copied().chain([PortRange { first: 0, last: 0 }]));
        let node_ports = without(&mut occupied.node_ports.into_iter());
        let reserved = without(&mut occupied.reserved.iter().copied());
        let (Some(lowest), Some(highest)) = (ports.iter().next(), ports.iter().next_back()) else {
            let asked = settings.ports.iter().copied().collect::<PortSet>().len();
            return Err(LayoutError::Empty { asked, excluded, node_ports, reserved });
        };
        let set_aside = if settings.bind_udp { ports.len() as usize / 8 } else { 0 };
        let unconnected =
            ports.iter().rev().take(set_aside).map(|port| PortRange { first: port, last: port }).collect();
        let base = u32::from(lowest >> 6) << 6;
        let words = u32::from(highest >> 6) + 1 - (base >> 6);
        let geometry = Geometry { words };
        let affordable = MEMORY_BUDGET / (geometry.stride() * 8);
        let mut flags = 0;
        if settings.strict {
            flags |= FLAG_STRICT;
        }
        if set_aside > 0 {
            flags |= FLAG_BIND_UDP;
        }
        let config = Config {
            base,
            words,
            slots: affordable.min(MAX_SLOTS),
            flags,
            quota: settings.quota.unwrap_or_else(|| shares::SHARE | ports.len()),
            unconnected: u32::try_from(set_aside).unwrap_or(u32::MAX),
        };
        Ok(Self { config, ports, unconnected })
    }

    /// The span of a pool that exists already, without its ports.
    #[must_use]
    pub fn of(config: Config) -> Self {
        Self { config, ports: PortSet::default(), unconnected: PortSet::default() }
    }

    /// The same ports in the span of a pool that exists already.
    ///
    /// # Errors
    /// [`LayoutError::Span`] if they do not fit.
    pub fn fit_into(mut self, pinned: &Config) -> Result<Self, LayoutError> {
        let (first, last) = (pinned.base, pinned.base + pinned.words * 64 - 1);
        let end = self.config.base + self.config.words * 64 - 1;
        if self.config.base < first || end > last {
            return Err(LayoutError::Span { first, last });
        }
        self.config = Config { base: pinned.base, words: pinned.words, slots: pinned.slots, ..self.config };
        Ok(self)
    }

    /// Where words lie.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        Geometry { words: self.config.words }
    }

    /// The ports of a template slot.
    #[must_use]
    pub fn template(&self, slot: u32) -> PortSet {
        let mut ports = self.ports.clone();
        match slot {
            pool::TEMPLATE_TCP => {}
            pool::TEMPLATE_UDP => ports.remove_all(&self.unconnected),
            pool::TEMPLATE_UDP_ANY => ports.keep_all(&self.unconnected),
            _ => ports = PortSet::default(),
        }
        ports
    }

    /// Writes the templates and the bitmap of free slots into unused words.
    pub fn initialise(&self, words: &impl Memory) {
        for slot in 0..pool::FIRST_SLOT {
            let (map, ports) = (self.geometry().free(slot), self.template(slot));
            for port in ports.iter() {
                bitmap::free(words, map, u32::from(port) - self.config.base);
            }
        }
        for slot in pool::FIRST_SLOT..self.config.slots {
            bitmap::free(words, pool::ALLOCATOR, slot);
        }
        words.store(pool::ALL_SLOTS, u64::from(self.config.slots));
        words.fetch_add(pool::FREE_SLOTS, u64::from(self.config.slots - pool::FIRST_SLOT));
    }

    /// The port (host byte order) of an index.
    #[must_use]
    pub fn port(&self, index: u32) -> u16 {
        u16::try_from(self.config.base + index).unwrap_or(u16::MAX)
    }

    /// The index of a port of the pool.
    #[must_use]
    pub fn index(&self, port: u16) -> Option<u32> {
        self.ports.contains(port).then(|| u32::from(port) - self.config.base)
    }
}
