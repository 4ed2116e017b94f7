//! Many sources, one list.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::routes::model::{DesiredRoute, SourceKind};
use crate::routes::prefix_map::PrefixMap;

/// The latest word of each source.
pub(super) type Words = BTreeMap<SourceKind, Option<Vec<Arc<DesiredRoute>>>>;

/// Desired routes of all sources together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// One route for each network of a table, ordered by table and network.
    pub routes: Vec<Arc<DesiredRoute>>,
    /// Routes that lost.
    pub shadowed: Vec<Shadowed>,
    /// Sources that have not said anything yet.
    pub silent: Vec<SourceKind>,
}

/// A route that yields to another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shadowed {
    /// The one that is not used.
    pub route: Arc<DesiredRoute>,
    /// The one that is.
    pub by: Arc<DesiredRoute>,
}

/// Merges by precedence.
///
/// Of several routes to one network the source that comes first in [`SourceKind`] wins, whole: next hops of two
/// sources are never mixed. Within one source the first entry wins. A pod's own announcement (discovery) also
/// yields to a *wider* network of any other source: the pod is reached through that already, and a pod that holds
/// the key must not be able to draw another pod's address to itself.
pub(super) fn merge(words: &Words, default_table: u32) -> Merged {
    let mut merged = Merged::default();
    let mut tables = BTreeMap::<u32, PrefixMap<Option<Arc<DesiredRoute>>>>::new();
    for (kind, word) in words {
        let Some(routes) = word else {
            merged.silent.push(*kind);
            continue;
        };
        for route in routes {
            let table = tables.entry(route.table.unwrap_or(default_table)).or_default();
            let winner = if *kind == SourceKind::Discovery {
                table.covering(route.to).find_map(|(net, there)| {
                    there
                        .as_ref()
                        .filter(|there| net == route.to || there.source != SourceKind::Discovery)
                        .cloned()
                })
            } else {
                table.get(route.to).cloned().flatten()
            };
            match winner {
                Some(by) => merged.shadowed.push(Shadowed { route: route.clone(), by }),
                None => *table.or_default(route.to) = Some(route.clone()),
            }
        }
    }
    merged.routes = tables.into_values().flat_map(PrefixMap::into_values).flatten().collect();
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(source: SourceKind, routes: &[(&str, &str)]) -> (SourceKind, Option<Vec<Arc<DesiredRoute>>>) {
        let route = |(to, via): &(&str, &str)| {
            Arc::new(DesiredRoute::forward(to.parse().unwrap(), via.parse().unwrap(), source, ""))
        };
        (source, Some(routes.iter().map(route).collect()))
    }

    #[test]
    fn precedence_is_static_file_kubernetes_discovery() {
        let words = Words::from([
            word(
                SourceKind::Discovery,
                &[("10.4.0.9/32", "192.0.2.4"), ("10.1.0.9/32", "192.0.2.4"), ("10.3.0.0/24", "192.0.2.4")],
            ),
            word(
                SourceKind::Kubernetes,
                &[("10.1.0.0/24", "192.0.2.3"), ("10.2.0.0/24", "192.0.2.3"), ("10.3.0.0/24", "192.0.2.3")],
            ),
            word(
                SourceKind::File,
                &[("10.1.0.0/24", "192.0.2.2"), ("10.2.0.0/24", "192.0.2.2"), ("10.2.0.7/32", "192.0.2.2")],
            ),
            word(SourceKind::Static, &[("10.1.0.0/24", "192.0.2.1")]),
        ]);
        let merged = merge(&words, 254);
        let lines = |routes: &mut dyn Iterator<Item = String>| routes.collect::<Vec<_>>().join("\n");
        insta::assert_snapshot!(lines(&mut merged.routes.iter().map(ToString::to_string)), @r"
        10.1.0.0/24 via 192.0.2.1 (static)
        10.2.0.0/24 via 192.0.2.2 (file)
        10.2.0.7/32 via 192.0.2.2 (file)
        10.3.0.0/24 via 192.0.2.3 (kubernetes)
        10.4.0.9/32 via 192.0.2.4 (discovery)
        ");
        insta::assert_snapshot!(lines(&mut merged.shadowed.iter().map(|lost| format!("{} <- {}", lost.route, lost.by))), @r"
        10.1.0.0/24 via 192.0.2.2 (file) <- 10.1.0.0/24 via 192.0.2.1 (static)
        10.1.0.0/24 via 192.0.2.3 (kubernetes) <- 10.1.0.0/24 via 192.0.2.1 (static)
        10.2.0.0/24 via 192.0.2.3 (kubernetes) <- 10.2.0.0/24 via 192.0.2.2 (file)
        10.1.0.9/32 via 192.0.2.4 (discovery) <- 10.1.0.0/24 via 192.0.2.1 (static)
        10.3.0.0/24 via 192.0.2.4 (discovery) <- 10.3.0.0/24 via 192.0.2.3 (kubernetes)
        ");
    }

    #[test]
    fn a_silent_source_is_named() {
        let mut words = Words::from([word(SourceKind::Static, &[])]);
        words.insert(SourceKind::Kubernetes, None);
        assert_eq!(merge(&words, 254).silent, [SourceKind::Kubernetes]);
    }
}
