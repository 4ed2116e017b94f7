//! Rules in the words of nft(8), as far as it takes to find them.

use serde_json::Value;

use super::ruleset::{Place, Rule, statement};

/// Shows a rule: family, table and chain, the conditions, and the verdict.
pub(super) fn rule((family, table, chain): &Place, rule: &Rule) -> String {
    let mut words = vec![format!("{family} {table} {chain}:")];
    words.extend(rule.parts.iter().filter_map(part));
    words.extend(rule.comment.iter().map(|comment| format!("comment \"{comment}\"")));
    words.join(" ")
}

fn part(part: &Value) -> Option<String> {
    let (kind, inner) = part.as_object()?.iter().next()?;
    Some(match kind.as_str() {
        "match" => {
            let operator = match inner["op"].as_str() {
                Some("==" | "in") | None => String::new(),
                Some(other) => format!(" {other}"),
            };
            format!("{}{operator} {}", value(&inner["left"]), value(&inner["right"]))
        }
        "vmap" => format!("{} vmap {}", value(&inner["key"]), value(&inner["data"])),
        "goto" | "jump" => format!("{kind} {}", inner["target"].as_str().unwrap_or_default()),
        "counter" | "log" => return None,
        other => other.to_owned(),
    })
}

fn value(json: &Value) -> String {
    let list = |items: &Value, between: &str| {
        let items = items.as_array().map(Vec::as_slice).unwrap_or_default();
        items.iter().map(value).collect::<Vec<_>>().join(between)
    };
    let Some((kind, inner)) = statement(json) else {
        return match json {
            Value::String(text) => text.clone(),
            Value::Array(_) => list(json, ","),
            other => other.to_string(),
        };
    };
    let text = |key: &str| inner[key].as_str().unwrap_or_default();
    match kind.as_str() {
        "payload" => format!("{} {}", text("protocol"), text("field")),
        "meta" | "ct" => format!("{kind} {}", text("key")),
        "prefix" => format!("{}/{}", text("addr"), inner["len"]),
        "range" => list(inner, "-"),
        "concat" => list(inner, " . "),
        "set" => format!("{{ {} }}", list(inner, ", ")),
        "elem" => value(&inner["val"]),
        "&" | "|" | "^" => list(inner, &format!(" {kind} ")),
        other => other.to_owned(),
    }
}
