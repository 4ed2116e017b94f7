//! Which back end to write to, and whether it is the one that others use.

use super::error::Error;
use super::kernel;
use super::programs::{Backend, Programs};
use super::ruleset::Family;

/// The chosen back end, and a warning for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The back end for the rules of bridge.
    pub backend: Backend,
    /// Rules in the other back end, with a remedy.
    pub warning: Option<String>,
}

/// The rules in one back end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Rules of others, and built-in chains that do not accept.
    pub foreign: usize,
    /// Whether the kubelet has left its hint chain there.
    pub kubelet: bool,
}

/// Chooses a back end; `wanted` is the choice of the operator, if there is one.
///
/// # Errors
/// If no back end can be used.
pub fn choose(programs: &Programs, wanted: Option<Backend>) -> Result<Choice, Error> {
    let default = programs.default_backend(Family::V4)?;
    let usage = |backend| usage(programs, backend).unwrap_or_default();
    let (nft, legacy) = (usage(Backend::Nft), usage(Backend::Legacy));
    let choice = decide(wanted, default.unwrap_or(Backend::Nft), nft, legacy);
    programs.tool(Family::V4, choice.backend, "-restore")?;
    Ok(choice)
}

/// The operator's word, then the kubelet's, then the system's default.
fn decide(wanted: Option<Backend>, default: Backend, nft: Usage, legacy: Usage) -> Choice {
    let hint = match (nft.kubelet, legacy.kubelet) {
        (true, false) => Some(Backend::Nft),
        (false, true) => Some(Backend::Legacy),
        _ => None,
    };
    let backend = wanted.or(hint).unwrap_or(default);
    let (other, used) = match backend {
        Backend::Nft => (legacy, nft),
        Backend::Legacy => (nft, legacy),
    };
    let (this, that) = (backend.name(), backend.other().name());
    let warning = (other.foreign > 0).then(|| {
        format!(
            "rules in both back ends: bridge writes to iptables-{this} ({} rules of others), and {} rules stand in \
             iptables-{that}. The kernel applies both. See `iptables-{that}-save`; if that is the one in use, set \
             `update-alternatives --set iptables /usr/sbin/iptables-{that}`, else empty it with `iptables-{that} -F`",
            used.foreign, other.foreign
        )
    });
    Choice { backend, warning }
}

/// Returns the rules of x_tables as iptables-legacy-save prints them; `None` if there are none, or no program to print them.
pub(crate) fn legacy_rules(programs: &Programs, family: Family) -> Option<String> {
    // Asking iptables-legacy for tables would make them.
    if kernel::legacy_tables(family).is_empty() {
        return None;
    }
    let save = programs.tool(family, Backend::Legacy, "-save").ok()?;
    let output = programs.run(&save, [""; 0], None).ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn usage(programs: &Programs, backend: Backend) -> Result<Usage, Error> {
    let mut usage = Usage::default();
    for family in Family::ALL {
        // Asking iptables-legacy for tables would make them.
        if backend == Backend::Legacy && kernel::legacy_tables(family).is_empty() {
            continue;
        }
        let Ok(save) = programs.tool(family, backend, "-save") else { continue };
        let output = programs.run(&save, [""; 0], None)?;
        let of = count(&String::from_utf8_lossy(&output.stdout));
        usage.foreign += of.foreign;
        usage.kubelet |= of.kubelet;
    }
    Ok(usage)
}

fn count(save: &str) -> Usage {
    let tables = super::observe::parse(save);
    let chains = || tables.values().flat_map(|table| &table.chains);
    let foreign = chains().filter(|chain| !super::ruleset::is_own(&chain.name));
    let own_jump = |rule: &str| super::observe::target(rule).is_some_and(super::ruleset::is_own);
    Usage {
        foreign: foreign
            .map(|chain| {
                let rules = chain.rules.iter().filter(|rule| !own_jump(&rule.rule)).count();
                rules + usize::from(chain.policy == "DROP")
            })
            .sum(),
        kubelet: chains().any(|c| matches!(c.name.as_str(), "KUBE-IPTABLES-HINT" | "KUBE-KUBELET-CANARY")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Usage = Usage { foreign: 0, kubelet: false };
    const SOME: Usage = Usage { foreign: 3, kubelet: false };
    const KUBELET: Usage = Usage { foreign: 0, kubelet: true };

    #[test]
    fn the_default_is_taken_if_nothing_speaks_against_it() {
        for default in [Backend::Nft, Backend::Legacy] {
            assert_eq!(decide(None, default, NONE, NONE), Choice { backend: default, warning: None });
        }
    }

    #[test]
    fn the_kubelet_beats_the_default_and_the_operator_beats_both() {
        assert_eq!(decide(None, Backend::Nft, NONE, KUBELET).backend, Backend::Legacy);
        assert_eq!(decide(Some(Backend::Nft), Backend::Legacy, NONE, KUBELET).backend, Backend::Nft);
    }

    #[test]
    fn rules_in_the_other_one_are_told_with_a_remedy() {
        let warning = decide(None, Backend::Nft, NONE, SOME).warning.unwrap();
        assert!(warning.contains("3 rules stand in iptables-legacy"), "{warning}");
        assert!(warning.contains("`iptables-legacy -F`"), "{warning}");
        assert_eq!(decide(None, Backend::Nft, SOME, NONE).warning, None);
    }

    #[test]
    fn own_rules_do_not_count_as_foreign() {
        let save = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:BRIDGE-FORWARD - [0:0]\n\
                    -A INPUT -j ACCEPT\n-A FORWARD -m comment --comment \"bridge:jump\" -j BRIDGE-FORWARD\n\
                    -A BRIDGE-FORWARD -j DROP\nCOMMIT\n*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n";
        assert_eq!(count(save), Usage { foreign: 2, kubelet: true });
    }
}
