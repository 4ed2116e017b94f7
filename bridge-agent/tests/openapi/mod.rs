//! Holds answers of the agent against docs/openapi.json.

use std::path::Path;

use serde_json::Value;

/// Checks that an answer is in docs/openapi.json, with this status and of this shape.
pub(crate) fn documented(method: &str, path: &str, status: u16, body: &Value) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let document: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let template =
        if path.starts_with("/v1/leases/") && path != "/v1/leases/watch" { "/v1/leases/{id}" } else { path };
    let responses = &document["paths"][template][method.to_ascii_lowercase()]["responses"];
    let response = &responses[status.to_string()];
    assert!(response.is_object(), "{method} {template} answers {status}, which is not documented: {body}");
    let schema = &response["content"]["application/json"]["schema"];
    if schema.is_null() {
        assert!(body.is_null(), "{method} {template} {status} has a body: {body}");
    } else if let Err(reason) = conforms(&document, schema, body) {
        panic!("{method} {template} {status}: {reason} in {body}");
    }
}

/// As much of JSON schema as the document uses.
fn conforms(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(reference) = schema["$ref"].as_str() {
        conforms(document, document.pointer(&reference[1..]).ok_or(reference)?, value)?;
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(variants) = schema[key].as_array() {
            let reasons: Vec<String> =
                variants.iter().filter_map(|one| conforms(document, one, value).err()).collect();
            if reasons.len() == variants.len() {
                return Err(format!("{value} fits no variant: {reasons:?}"));
            }
        }
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        return Err(format!("{value} is none of {allowed:?}"));
    }
    if let Some(only) = schema.get("const")
        && only != value
    {
        return Err(format!("{value} is not {only}"));
    }
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("type {other} is not known to this test"),
    };
    let fits = match &schema["type"] {
        Value::Null => true,
        Value::String(kind) => is(kind),
        kinds => kinds.as_array().is_some_and(|kinds| kinds.iter().any(|kind| is(kind.as_str().unwrap()))),
    };
    if !fits {
        return Err(format!("{value} is not {}", schema["type"]));
    }
    let beyond = |key: &str, wrong: fn(f64, f64) -> bool| {
        schema[key].as_f64().zip(value.as_f64()).is_some_and(|(limit, value)| wrong(value, limit))
    };
    if beyond("minimum", |v, l| v < l) || beyond("maximum", |v, l| v > l) {
        return Err(format!("{value} is out of range"));
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        let of_place = schema["prefixItems"].get(index);
        conforms(document, of_place.unwrap_or(&schema["items"]), item)?;
    }
    for required in schema["required"].as_array().into_iter().flatten() {
        if value.get(required.as_str().unwrap()).is_none() {
            return Err(format!("{required} is missing"));
        }
    }
    for (name, field) in value.as_object().into_iter().flatten() {
        match (schema["properties"].get(name), &schema["additionalProperties"]) {
            (Some(schema), _) => conforms(document, schema, field)?,
            (None, Value::Bool(false)) => return Err(format!("{name} is not documented")),
            (None, others @ Value::Object(_)) => conforms(document, others, field)?,
            (None, _) => {}
        }
    }
    Ok(())
}
