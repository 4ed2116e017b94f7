//! Chains of nftables at the hooks that forwarded packets pass, from `nft --json list ruleset`; pure.

use serde_json::Value;

/// Rules of tables other than those of iptables that may concern a forwarded packet. Their conditions are not read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NftRules {
    /// Base chains at `forward` whose policy drops, or that have rules that drop or reject.
    pub drops: Vec<String>,
    /// Base chains at `postrouting` that masquerade.
    pub masquerades: Vec<String>,
}

impl NftRules {
    /// Reads the output of `nft --json list ruleset`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut found = Self::default();
        let ruleset: Value = serde_json::from_str(text).unwrap_or_default();
        let objects = ruleset["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
        let name = |object: &Value, chain: &str| {
            let part = |key: &str| object[key].as_str().unwrap_or_default().to_owned();
            format!("{} {} {}", part("family"), part("table"), object[chain].as_str().unwrap_or_default())
        };
        for chain in objects.iter().map(|object| &object["chain"]) {
            let full = name(chain, "name");
            let foreign = !is_of_iptables(chain) && chain["table"].as_str() != Some("bridge");
            let rules = || {
                let rules = objects.iter().map(|object| &object["rule"]);
                rules.filter(|rule| name(rule, "chain") == full).filter_map(|rule| rule["expr"].as_array())
            };
            let has = |words: &[&str]| {
                rules().flatten().any(|part| words.iter().any(|word| part.get(word).is_some()))
            };
            match chain["hook"].as_str() {
                Some("forward") if foreign && chain["policy"] == "drop" => {
                    found.drops.push(format!("{full}: policy drop"));
                }
                Some("forward") if foreign && has(&["drop", "reject"]) => {
                    found.drops.push(format!("{full}: rules that drop"));
                }
                Some("postrouting") if foreign && has(&["masquerade", "snat"]) => {
                    found.masquerades.push(full)
                }
                _ => {}
            }
        }
        found
    }
}

/// Whether iptables-nft shows the chain: `iptables-save` prints it.
fn is_of_iptables(chain: &Value) -> bool {
    matches!(chain["family"].as_str(), Some("ip" | "ip6"))
        && matches!(chain["table"].as_str(), Some("raw" | "mangle" | "nat" | "filter" | "security"))
        && chain["name"].as_str().is_some_and(|name| name.chars().all(|letter| letter.is_ascii_uppercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_others_are_found_and_those_of_iptables_are_not() {
        let text = r#"{"nftables":[{"metainfo":{}},
            {"chain":{"family":"ip","table":"filter","name":"FORWARD","hook":"forward","policy":"drop"}},
            {"chain":{"family":"inet","table":"firewalld","name":"filter_FORWARD","hook":"forward","policy":"accept"}},
            {"rule":{"family":"inet","table":"firewalld","chain":"filter_FORWARD","expr":[{"match":{}},{"reject":null}]}},
            {"chain":{"family":"inet","table":"site","name":"fwd","hook":"forward","policy":"drop"}},
            {"chain":{"family":"inet","table":"site","name":"in","hook":"input","policy":"drop"}},
            {"chain":{"family":"ip","table":"kube","name":"post","hook":"postrouting","policy":"accept"}},
            {"rule":{"family":"ip","table":"kube","chain":"post","expr":[{"masquerade":null}]}}]}"#;
        let NftRules { drops, masquerades } = NftRules::parse(text);
        assert_eq!(drops, ["inet firewalld filter_FORWARD: rules that drop", "inet site fwd: policy drop"]);
        assert_eq!(masquerades, ["ip kube post"]);
        assert_eq!(NftRules::parse("no JSON"), NftRules::default());
    }
}
