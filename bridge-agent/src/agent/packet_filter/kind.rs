//! Which packet filter a configuration wants on this host.

use crate::{
    config::{Config, Engine, Role},
    iptables as by_iptables, nftables as by_nftables,
};

/// A packet filter of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// iptables and ip6tables.
    Iptables,
    /// nftables.
    Nftables,
}

impl Kind {
    /// As the configuration names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }

    /// Returns the packet filter that a configuration wants on this host; `None` without one.
    #[must_use]
    pub fn of(config: &Config) -> Option<Self> {
        if config.role != Role::Node {
            return None;
        }
        config.enforcement.engines.iter().find_map(|engine| match engine {
            Engine::Ebpf => None,
            Engine::Iptables => Some(Self::Iptables),
            Engine::Nftables => Some(Self::Nftables),
            Engine::Auto => Some(Self::of_this_host().0),
        })
    }

    /// Returns the packet filter that `auto` takes on this host, and why; `None` if the configuration leaves nothing to choose.
    #[must_use]
    pub fn chosen(config: &Config) -> Option<(Self, String)> {
        let leaves = config.role == Role::Node && config.enforcement.engines.contains(&Engine::Auto);
        leaves.then(Self::of_this_host)
    }

    /// nftables, if it is installed and no rules of iptables-legacy stand beside it: rules of one system are easier to
    /// understand than those of two.
    fn of_this_host() -> (Self, String) {
        if by_nftables::Programs::default().nft().is_err() {
            return (Self::Iptables, "nft is not installed".into());
        }
        match by_iptables::legacy_in_use() {
            Ok(tables) if tables.is_empty() => {
                (Self::Nftables, "nft is installed, and no rules of iptables-legacy are in use".into())
            }
            Ok(tables) => {
                (Self::Iptables, format!("rules of iptables-legacy are in use, in {}", tables.join(", ")))
            }
            Err(error) => (
                Self::Nftables,
                format!(
                    "nft is installed; whether rules of iptables-legacy are in use cannot be read: {error}"
                ),
            ),
        }
    }
}
