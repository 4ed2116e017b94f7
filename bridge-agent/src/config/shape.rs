//! Holds a document against the JSON schema of a type, and takes out what does not fit.
//!
//! The very schema that `bridge-agent check --schema` prints decides, so it cannot promise what the agent refuses.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value as Json;

use super::leaf::{LeafCheck, Problem, check_for};
use super::node::{Node, Value};
use super::report::{Findings, Path, Severity};

/// What a schema allows; as much of JSON schema as the types of this module come to.
#[derive(Debug)]
pub(crate) enum Shape {
    Object(Vec<Field>),
    /// Any keys, values alike.
    Map(Box<Shape>),
    List(Box<Shape>),
    Choice(Vec<String>),
    Leaf {
        check: LeafCheck,
        /// Whether an unquoted number is as good as its text.
        numbers: bool,
    },
    Text,
    Bool,
    Integer {
        min: i64,
        max: i64,
    },
    /// The first one of the value's kind.
    Any(Vec<Shape>),
}

#[derive(Debug)]
pub(crate) struct Field {
    name: String,
    shape: Shape,
    required: bool,
}

impl Shape {
    /// The shape of `T`, by its JSON schema.
    pub(crate) fn of<T: JsonSchema>() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
        Self::from_schema(settings.into_generator().into_root_schema_for::<T>().as_value())
    }

    /// # Panics
    /// At a schema that no type of this module has; a unit test reads all of them.
    fn from_schema(schema: &Json) -> Self {
        let texts = |list: &Json| -> Vec<String> {
            list.as_array()
                .into_iter()
                .flatten()
                .filter_map(|text| text.as_str().map(str::to_owned))
                .collect()
        };
        for key in ["anyOf", "oneOf"] {
            let Some(variants) = schema[key].as_array() else { continue };
            if let Some(check) = schema["format"].as_str().and_then(check_for) {
                return Self::Leaf { check, numbers: true };
            }
            let mut choices: Vec<String> = Vec::new();
            let mut shapes = Vec::new();
            for variant in variants.iter().filter(|variant| variant["type"] != "null") {
                match (&variant["const"], &variant["enum"]) {
                    (Json::String(text), _) => choices.push(text.clone()),
                    (_, Json::Array(_)) => choices.extend(texts(&variant["enum"])),
                    _ => shapes.push(Self::from_schema(variant)),
                }
            }
            if !choices.is_empty() {
                shapes.push(Self::Choice(choices));
            }
            return if shapes.len() == 1 { shapes.remove(0) } else { Self::Any(shapes) };
        }
        if schema["enum"].is_array() {
            return Self::Choice(texts(&schema["enum"]));
        }
        // An optional value is `["string", "null"]`: the key may be left out, but if it is there it has a value.
        let kind = match &schema["type"] {
            Json::Array(kinds) => kinds.iter().find(|kind| **kind != "null").and_then(Json::as_str),
            kind => kind.as_str(),
        };
        match kind {
            Some("object") => match &schema["additionalProperties"] {
                values @ Json::Object(_) => Self::Map(Box::new(Self::from_schema(values))),
                _ => {
                    let required = texts(&schema["required"]);
                    let fields =
                        schema["properties"].as_object().into_iter().flatten().map(|(name, schema)| Field {
                            required: required.contains(name),
                            shape: Self::from_schema(schema),
                            name: name.clone(),
                        });
                    Self::Object(fields.collect())
                }
            },
            Some("array") => Self::List(Box::new(Self::from_schema(&schema["items"]))),
            Some("string") => match schema["format"].as_str().and_then(check_for) {
                Some(check) => Self::Leaf { check, numbers: false },
                None => Self::Text,
            },
            Some("boolean") => Self::Bool,
            Some("integer") => {
                let most = match schema["format"].as_str() {
                    Some("uint8") => i64::from(u8::MAX),
                    Some("uint16") => i64::from(u16::MAX),
                    Some("uint32") => i64::from(u32::MAX),
                    _ => i64::MAX,
                };
                Self::Integer {
                    min: schema["minimum"].as_i64().unwrap_or(i64::MIN),
                    max: schema["maximum"].as_i64().unwrap_or(most),
                }
            }
            _ => panic!("a schema that no value can be held against: {schema}"),
        }
    }

    /// Takes out of `node` what does not fit, saying so. Returns whether something is left that fits.
    pub(crate) fn fit(&self, node: &mut Node, path: &Path<'_>, findings: &mut Findings) -> bool {
        let outcome = match (self, &mut node.value) {
            (Self::Any(shapes), _) => {
                let shape = shapes.iter().find(|shape| shape.takes(node)).or_else(|| shapes.first());
                return shape.is_some_and(|shape| shape.fit(node, path, findings));
            }
            (Self::Object(fields), Value::Map(_)) => return fit_object(fields, node, path, findings),
            (Self::Map(values), Value::Map(entries)) => {
                let before = entries.len();
                entries.retain_mut(|(key, value)| values.fit(value, &path.key(&key.name), findings));
                node.damaged |= entries.len() < before;
                return true;
            }
            (Self::List(items), Value::List(list)) => {
                let before = list.len();
                list.retain_mut(|item| items.fit(item, &path.index(item.index as usize), findings));
                node.damaged |= list.len() < before || list.iter().any(|item| item.damaged);
                return true;
            }
            (Self::Leaf { check, .. }, Value::Text(text)) => (check.parse)(text),
            (Self::Leaf { check, numbers: true }, Value::Integer(number)) => {
                (check.parse)(&number.to_string())
            }
            (Self::Choice(choices), Value::Text(text)) => choice(choices, text),
            (Self::Text, Value::Text(_)) | (Self::Bool, Value::Bool(_)) => Ok(()),
            (Self::Integer { min, max }, Value::Integer(number)) => {
                if (*min..=*max).contains(number) {
                    Ok(())
                } else {
                    let help = if *max == i64::MAX {
                        format!("write {min} or more")
                    } else {
                        format!("write a number from {min} to {max}")
                    };
                    Err(Problem::new(format!("{number} is out of bounds"), help))
                }
            }
            _ => Err(self.wrong_kind(node, path)),
        };
        match outcome {
            Ok(()) => true,
            Err(problem) => {
                findings.push(Severity::Error, path, node.at, problem);
                false
            }
        }
    }

    /// Whether a value of this kind could be meant.
    fn takes(&self, node: &Node) -> bool {
        match (self, &node.value) {
            (Self::Object(_) | Self::Map(_), Value::Map(_))
            | (Self::List(_), Value::List(_))
            | (Self::Choice(_) | Self::Text | Self::Leaf { .. }, Value::Text(_))
            | (Self::Bool, Value::Bool(_))
            | (Self::Integer { .. }, Value::Integer(_)) => true,
            (Self::Leaf { numbers, .. }, Value::Integer(_)) => *numbers,
            (Self::Any(shapes), _) => shapes.iter().any(|shape| shape.takes(node)),
            _ => false,
        }
    }

    const fn kind(&self) -> &'static str {
        match self {
            Self::Object(_) | Self::Map(_) => "a mapping",
            Self::List(_) => "a list",
            Self::Choice(_) | Self::Text => "a text",
            Self::Leaf { numbers: true, .. } => "a number or a text",
            Self::Leaf { numbers: false, .. } => "a text",
            Self::Bool => "true or false",
            Self::Integer { .. } => "a whole number",
            Self::Any(_) => "another value",
        }
    }

    /// Something that could be written here.
    fn example(&self) -> String {
        match self {
            Self::Object(fields) => {
                let required = fields.iter().filter(|field| field.required);
                let parts: Vec<_> =
                    required.map(|field| format!("{}: {}", field.name, field.shape.example())).collect();
                format!("{{{}}}", parts.join(", "))
            }
            Self::Map(_) => "{}".into(),
            Self::List(items) => format!("[{}]", items.example()),
            Self::Choice(choices) => choices.first().cloned().unwrap_or_default(),
            Self::Leaf { check, .. } => quoted(check.example),
            Self::Text => "TEXT".into(),
            Self::Bool => "true".into(),
            Self::Integer { min, .. } => (*min).max(1).to_string(),
            Self::Any(shapes) => shapes.last().map(Self::example).unwrap_or_default(),
        }
    }

    fn wrong_kind(&self, node: &Node, path: &Path<'_>) -> Problem {
        let name = match path {
            Path::Root => "the configuration".to_owned(),
            Path::Key(_, key) => format!("`{key}`"),
            Path::Index(..) => "an element of the list".to_owned(),
        };
        let message = match node.value {
            Value::Null => format!("{name} has no value"),
            _ => format!("{name} should be {}, not {}", self.kind(), node.kind()),
        };
        let help = match (self, &node.value) {
            (_, Value::Null) if matches!(path, Path::Root) => {
                "write at least `role: node` or `role: host`".into()
            }
            (_, Value::Null) => format!("write {}, or remove it", self.example()),
            (Self::List(items), Value::Text(text)) if items.takes(node) => format!("write [{text}]"),
            (Self::List(items), Value::Integer(number)) if items.takes(node) => format!("write [{number}]"),
            (Self::Text | Self::Leaf { .. }, Value::Integer(_) | Value::Float(_) | Value::Bool(_)) => {
                "write it in quotes if it is meant as a text".into()
            }
            (Self::Bool, Value::Text(text)) if matches!(text.as_str(), "yes" | "on" | "y") => {
                "write true".into()
            }
            (Self::Bool, Value::Text(text)) if matches!(text.as_str(), "no" | "off" | "n") => {
                "write false".into()
            }
            _ => format!("write {}", self.example()),
        };
        Problem::new(message, help)
    }
}

/// An example as it must stand in YAML: a leading `*` would be an alias, and a `: ` a mapping.
fn quoted(example: &str) -> String {
    if example.contains(['*', ':'])
        || example.starts_with(|c: char| c.is_ascii_digit()) && !example.contains('/')
    {
        format!("\"{example}\"")
    } else {
        example.to_owned()
    }
}

fn fit_object(fields: &[Field], node: &mut Node, path: &Path<'_>, findings: &mut Findings) -> bool {
    let Value::Map(entries) = &mut node.value else { return false };
    // What was tried for, under its own name or a misspelt one, is not reported as missing as well.
    let mut tried: Vec<&str> = Vec::new();
    let mut damaged = false;
    entries.retain_mut(|(key, value)| {
        let path = path.key(&key.name);
        let fits = match fields.iter().find(|field| field.name == key.name) {
            Some(field) => {
                tried.push(&field.name);
                field.shape.fit(value, &path, findings)
            }
            None => {
                let near = nearest(&key.name, fields.iter().map(|field| field.name.as_str()));
                tried.extend(near);
                findings.push(Severity::Error, &path, key.at, unknown_key(&key.name, near, fields));
                false
            }
        };
        damaged |= !fits || value.damaged;
        fits
    });
    let mut usable = true;
    for field in fields.iter().filter(|field| field.required) {
        if entries.iter().any(|(key, _)| key.name == field.name) {
            continue;
        }
        usable = false;
        if !tried.contains(&field.name.as_str()) {
            let help = match &field.shape {
                Shape::Choice(choices) => format!("add `{}:` with one of {}", field.name, choices.join(", ")),
                shape => format!("add `{}`, such as `{}: {}`", field.name, field.name, shape.example()),
            };
            let problem = Problem::new(format!("`{}` is missing", field.name), help);
            findings.push(Severity::Error, path, node.at, problem);
        }
    }
    node.damaged |= damaged;
    usable
}

fn unknown_key(key: &str, near: Option<&str>, fields: &[Field]) -> Problem {
    let message = format!("unknown key `{key}`");
    if let Some(near) = near {
        return Problem::new(message, format!("did you mean `{near}`?"));
    }
    // A key in the wrong place is as common as a misspelt one.
    for field in fields {
        if let Shape::Object(inner) = &field.shape
            && inner.iter().any(|field| field.name == key)
        {
            return Problem::new(message, format!("write it under `{}`", field.name));
        }
    }
    let names: Vec<_> = fields.iter().map(|field| field.name.as_str()).collect();
    Problem::new(message, format!("remove it, or write one of: {}", names.join(", ")))
}

fn choice(choices: &[String], text: &str) -> Result<(), Problem> {
    if choices.iter().any(|choice| choice == text) {
        return Ok(());
    }
    let help = match nearest(text, choices.iter().map(String::as_str)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("write one of: {}", choices.join(", ")),
    };
    Err(Problem::new(format!("`{text}` is not known here"), help))
}

/// The name that was probably meant by `written`.
fn nearest<'a>(written: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace(['-', '_'], "");
    let written = plain(written);
    let distance = |name: &str| strsim::damerau_levenshtein(&plain(name), &written);
    let limit = |name: &str| name.len().min(written.len()) / 3;
    names
        .map(|name| (distance(name), name))
        .filter(|(distance, name)| *distance <= limit(name))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}
