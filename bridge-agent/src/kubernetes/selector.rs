//! Which pods a selector selects, as Kubernetes has it.
//! See <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>.

use super::cluster::{Cluster, Labels, Pod};
use crate::config::{LabelOperator, LabelRequirement, LabelSelector, Rule};

/// Whose pods are selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Reach {
    /// This node's.
    Own,
    /// Every node's.
    All,
}

/// The pods that `rule` selects; those of `namespace` only, if there is one.
pub(super) fn pods<'c>(
    rule: &Rule,
    cluster: &'c Cluster,
    reach: Reach,
    namespace: Option<&str>,
) -> impl Iterator<Item = &'c Pod> {
    let remote = cluster.remote_pods.iter().filter(move |_| reach == Reach::All);
    cluster.pods.iter().chain(remote).map(|(_, pod)| pod).filter(move |pod| {
        let of_namespace = match &rule.namespace_selector {
            None => true,
            // Of a namespace that is not known yet nothing is: not even that a label is not there.
            Some(selector) => {
                cluster.namespaces.get(&pod.namespace).is_some_and(|labels| matches(selector, labels))
            }
        };
        let of_author = namespace.is_none_or(|namespace| *pod.namespace == *namespace);
        of_author
            && of_namespace
            && rule.pod_selector.as_ref().is_none_or(|selector| matches(selector, &pod.labels))
    })
}

fn matches(selector: &LabelSelector, labels: &Labels) -> bool {
    selector.match_labels.iter().all(|(key, value)| get(labels, key) == Some(value.as_str()))
        && selector.match_expressions.iter().all(|requirement| holds(requirement, labels))
}

fn holds(requirement: &LabelRequirement, labels: &Labels) -> bool {
    let LabelRequirement { key, operator, values } = requirement;
    let value = get(labels, key);
    let among = || value.is_some_and(|value| values.iter().any(|one| one == value));
    match operator {
        LabelOperator::In => among(),
        LabelOperator::NotIn => !among(),
        LabelOperator::Exists => value.is_some(),
        LabelOperator::DoesNotExist => value.is_none(),
    }
}

fn get<'l>(labels: &'l Labels, key: &str) -> Option<&'l str> {
    let found = labels.binary_search_by(|(one, _)| (**one).cmp(key)).ok()?;
    Some(&labels[found].1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(of: &[(&str, &str)]) -> Labels {
        let mut labels: Vec<_> = of.iter().map(|(key, value)| (Box::from(*key), Box::from(*value))).collect();
        labels.sort();
        labels.into()
    }

    fn cluster() -> Cluster {
        let mut cluster = Cluster::default();
        cluster.namespaces.apply("shop".into(), Some(labels(&[("tier", "gold")])));
        cluster.namespaces.apply("test".into(), Some(labels(&[])));
        for (name, namespace, of) in [
            ("api", "shop", &[("app", "api"), ("zone", "a")][..]),
            ("web", "shop", &[("app", "web")]),
            ("try", "test", &[("app", "api")]),
            ("new", "not-known-yet", &[("app", "api")]),
        ] {
            let address = [10, 200, 1, name.as_bytes()[0]].into();
            let pod = Pod {
                namespace: namespace.into(),
                labels: labels(of),
                addresses: [address].into(),
                pool_uid: None,
            };
            cluster.pods.apply(name.into(), Some(pod));
        }
        cluster
    }

    fn selected(selectors: &str) -> String {
        let json = format!(
            r#"{{"spec": {{"rules": [{{"name": "r", "direction": "inbound", "protocol": "tcp", "ports": [1], {selectors}}}]}}}}"#
        );
        let rules = crate::config::policy_rules(&json, crate::config::PolicyScope::Cluster).unwrap();
        let cluster = cluster();
        let found: Vec<_> = pods(&rules[0], &cluster, Reach::Own, None).collect();
        let names = cluster.pods.iter().filter(|(_, pod)| found.contains(pod)).map(|(name, _)| name);
        names.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_requirement_must_hold() {
        assert_eq!(
            selected(r#""podSelector": {"matchExpressions": [{"key": "none", "operator": "DoesNotExist"}]}"#),
            "api new try web"
        );
        assert_eq!(selected(r#""podSelector": {"matchLabels": {"app": "api"}}"#), "api new try");
        assert_eq!(selected(r#""podSelector": {"matchLabels": {"app": "api", "zone": "a"}}"#), "api");
        let expression =
            |text: &str| selected(&format!(r#""podSelector": {{"matchExpressions": [{text}]}}"#));
        assert_eq!(expression(r#"{"key": "app", "operator": "In", "values": ["web", "db"]}"#), "web");
        assert_eq!(expression(r#"{"key": "zone", "operator": "NotIn", "values": ["a"]}"#), "new try web");
        assert_eq!(expression(r#"{"key": "zone", "operator": "Exists"}"#), "api");
        assert_eq!(expression(r#"{"key": "zone", "operator": "DoesNotExist"}"#), "new try web");
    }

    #[test]
    fn a_namespace_that_is_not_known_yet_matches_no_selector() {
        assert_eq!(selected(r#""namespaceSelector": {"matchLabels": {"tier": "gold"}}"#), "api web");
        let not_gold =
            r#""namespaceSelector": {"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}"#;
        assert_eq!(selected(not_gold), "try");
        let both = r#""namespaceSelector": {"matchLabels": {"tier": "gold"}}, "podSelector": {"matchLabels": {"app": "api"}}"#;
        assert_eq!(selected(both), "api");
    }
}
