//! Compares a document with the JSON schema of a type, and removes the parts that do not fit.
//!
//! The same schema that `bridge-agent check --schema` prints decides, so it cannot promise a value that the agent
//! refuses.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::str::FromStr;

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema};
use serde_json::Value as Json;

use super::leaf::{AbsolutePath, FileMode, Leaf, Problem, SocketAddress};
use super::node::{Node, Value};
use super::report::{Findings, Path, Severity};

/// The parser behind a `format` of the JSON schema.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeafCheck {
    parse: fn(&str) -> Result<(), Problem>,
    example: &'static str,
}

/// Returns the check for `format`, or `None` if the format is not one of ours.
fn check_for(format: &str) -> Option<LeafCheck> {
    fn check<T: Leaf>(text: &str) -> Result<(), Problem> {
        T::parse(text).map(drop)
    }
    macro_rules! table {
        ($($type:ty),* $(,)?) => {
            match format {
                $(<$type as Leaf>::FORMAT => {
                    Some(LeafCheck { parse: check::<$type>, example: <$type as Leaf>::EXAMPLE })
                })*
                _ => None,
            }
        };
    }
    table!(
        IpAddr,
        SocketAddress,
        AbsolutePath,
        FileMode,
        super::network::Network,
        super::network::HostOrNetwork,
        super::ports::PortItem,
        super::time_span::TimeSpan,
        super::interface::InterfaceName,
        super::interface::InterfacePattern,
        super::iptables::PacketMark,
        super::rules::RuleName,
        super::port_pool::CgroupPath,
    )
}

/// The JSON schema of `T` (draft 2020-12), everything in its place if `inline`, or with `$defs`.
pub(crate) fn schema_of<T: JsonSchema>(inline: bool) -> Json {
    let settings = SchemaSettings::draft2020_12()
        .with(|settings| settings.inline_subschemas = inline)
        .with_transform(RecursiveTransform(without_null));
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// Removes the marks that only this module reads.
pub(super) fn remove_marks(schema: &mut Json) {
    match schema {
        Json::Object(fields) => {
            fields.remove(SHOWN);
            fields.values_mut().for_each(remove_marks);
        }
        Json::Array(items) => items.iter_mut().for_each(remove_marks),
        _ => {}
    }
}

/// The JSON schema of `T`, everything in its place.
pub(crate) fn inlined_schema_of<T: JsonSchema>() -> Json {
    schema_of::<T>(true)
}

/// A key that may be left out has a value if it is there: `ports:` alone is a slip, not all ports.
fn without_null(schema: &mut Schema) {
    let Some(schema) = schema.as_object_mut() else { return };
    if let Some(Json::Array(kinds)) = schema.get_mut("type") {
        kinds.retain(|kind| kind != "null");
        if kinds.len() == 1 {
            let kind = kinds.remove(0);
            schema.insert("type".into(), kind);
        }
    }
    if let Some(Json::Array(variants)) = schema.get_mut("anyOf") {
        variants.retain(|variant| variant["type"] != "null");
        if variants.len() == 1
            && let Json::Object(only) = variants.remove(0)
        {
            schema.remove("anyOf");
            for (key, value) in only {
                // The description of the field is closer than that of its type.
                schema.entry(key).or_insert(value);
            }
        }
    }
}

/// Marks an optional key that examples of its object have, since most objects need it.
pub(super) const SHOWN: &str = "x-shown";

/// Constraints of a schema; the subset of JSON schema that the types of this module need.
#[derive(Debug)]
pub(crate) enum Shape {
    Object(Vec<Field>),
    /// Any keys, values alike.
    Map(Box<Shape>),
    List(Box<Shape>),
    Choice(Vec<String>),
    Leaf(LeafCheck),
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
    /// Whether examples of the object have it.
    shown: bool,
}

impl Shape {
    /// The shape of `T`, by its JSON schema.
    pub(crate) fn of<T: JsonSchema>() -> Self {
        Self::from_schema(&schema_of::<T>(true))
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
                return Self::Leaf(check);
            }
            let mut choices: Vec<String> = Vec::new();
            let mut shapes = Vec::new();
            for variant in variants {
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
        match schema["type"].as_str() {
            Some("object") => match &schema["additionalProperties"] {
                values @ Json::Object(_) => Self::Map(Box::new(Self::from_schema(values))),
                _ => {
                    let required = texts(&schema["required"]);
                    let fields =
                        schema["properties"].as_object().into_iter().flatten().map(|(name, schema)| Field {
                            required: required.contains(name),
                            shown: required.contains(name) || schema[SHOWN] == true,
                            shape: Self::from_schema(schema),
                            name: name.clone(),
                        });
                    Self::Object(fields.collect())
                }
            },
            Some("array") => Self::List(Box::new(Self::from_schema(&schema["items"]))),
            Some("string") => match schema["format"].as_str().and_then(check_for) {
                Some(check) => Self::Leaf(check),
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

    /// Removes from `node` the parts that do not fit, with a finding for each. Returns whether any part is left.
    pub(crate) fn fit(&self, node: &mut Node<'_>, path: &Path<'_>, findings: &mut Findings) -> bool {
        if node.is_null() {
            findings.push(Severity::Error, path, Some(node.at), self.no_value(path));
            return false;
        }
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
            // A number without quotes is its text where a text is wanted: `name: 80`, `mode: 0660`.
            (Self::Leaf(check), Value::Plain(text) | Value::Quoted(text)) => (check.parse)(text),
            (Self::Choice(choices), Value::Plain(text) | Value::Quoted(text)) => choice(choices, text),
            (Self::Text, Value::Plain(_) | Value::Quoted(_)) => Ok(()),
            (Self::Bool, Value::Plain(text)) => boolean(text),
            (Self::Integer { min, max }, Value::Plain(text)) => integer(text, *min, *max),
            (Self::Bool | Self::Integer { .. }, Value::Quoted(text)) => Err(Problem::new(
                format!("\"{text}\" in quotes is a text"),
                format!("write {text} without quotes"),
            )),
            _ => Err(self.wrong_kind(node, path)),
        };
        match outcome {
            Ok(()) => true,
            Err(problem) => {
                findings.push(Severity::Error, path, Some(node.at), problem);
                false
            }
        }
    }

    /// Whether a value of this kind could be meant.
    fn takes(&self, node: &Node<'_>) -> bool {
        match (self, &node.value) {
            (Self::Object(_) | Self::Map(_), Value::Map(_)) | (Self::List(_), Value::List(_)) => true,
            (Self::Object(_) | Self::Map(_) | Self::List(_), _) => false,
            (Self::Any(shapes), _) => shapes.iter().any(|shape| shape.takes(node)),
            _ => node.scalar().is_some(),
        }
    }

    const fn kind(&self) -> &'static str {
        match self {
            Self::Object(_) | Self::Map(_) => "a mapping",
            Self::List(_) => "a list",
            _ => "a single value",
        }
    }

    /// Something that could be written here.
    fn example(&self) -> String {
        match self {
            Self::Object(fields) => {
                let shown = fields.iter().filter(|field| field.shown);
                let parts: Vec<_> =
                    shown.map(|field| format!("{}: {}", field.name, field.shape.example())).collect();
                format!("{{{}}}", parts.join(", "))
            }
            Self::Map(_) => "{}".into(),
            Self::List(items) => format!("[{}]", items.example()),
            Self::Choice(choices) => choices.first().cloned().unwrap_or_default(),
            Self::Leaf(check) => quoted(check.example),
            Self::Text => "TEXT".into(),
            Self::Bool => "true".into(),
            Self::Integer { min, .. } => (*min).max(1).to_string(),
            Self::Any(shapes) => shapes.last().map(Self::example).unwrap_or_default(),
        }
    }

    fn no_value(&self, path: &Path<'_>) -> Problem {
        let help = match path {
            Path::Root => "write at least `role: node` or `role: host`".into(),
            _ => format!("write {}, or remove it", self.example()),
        };
        Problem::new(format!("{} has no value", name(path)), help)
    }

    fn wrong_kind(&self, node: &Node<'_>, path: &Path<'_>) -> Problem {
        let help = match (self, node.scalar()) {
            (Self::List(items), Some(text)) if items.takes(node) => format!("write [{text}]"),
            _ => format!("write {}", self.example()),
        };
        Problem::new(format!("{} should be {}, not {}", name(path), self.kind(), node.kind()), help)
    }
}

/// Returns the name of the value at `path` in messages.
fn name(path: &Path<'_>) -> String {
    match path {
        Path::Root => "the configuration".to_owned(),
        Path::Key(_, key) => format!("`{key}`"),
        Path::Index(..) => "an element of the list".to_owned(),
    }
}

fn boolean(text: &str) -> Result<(), Problem> {
    let help = match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "y" => "write true",
        "false" | "no" | "off" | "n" => "write false",
        _ => "write true or false",
    };
    match text {
        "true" | "false" => Ok(()),
        _ => Err(Problem::new(format!("`{text}` is neither true nor false"), help)),
    }
}

/// Reads a whole number from `min` on, which [`FromStr`] alone would take with a sign or leading zeros.
///
/// # Errors
/// The fault of `text`, and its remedy.
pub(crate) fn whole_number<T: FromStr>(text: &str, min: i64) -> Result<T, Problem> {
    integer(text, min, i64::MAX)?;
    text.parse().map_err(|_| Problem::new(format!("{text} is too large"), "write a smaller number"))
}

fn integer(text: &str, min: i64, max: i64) -> Result<(), Problem> {
    let help = if max == i64::MAX {
        format!("write a whole number, {min} or more")
    } else {
        format!("write a whole number from {min} to {max}")
    };
    if text.starts_with('+') || super::leaf::has_leading_zero(text.trim_start_matches('-')) {
        return Err(Problem::new(format!("`{text}` is not a whole number"), help));
    }
    match text.parse::<i64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(()),
        Ok(_) => Err(Problem::new(format!("{text} is out of bounds"), help)),
        Err(_) => Err(Problem::new(format!("`{text}` is not a whole number"), help)),
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

fn fit_object(fields: &[Field], node: &mut Node<'_>, path: &Path<'_>, findings: &mut Findings) -> bool {
    let Value::Map(entries) = &mut node.value else { return false };
    // A key that was written, under its own name or a misspelt one, is not reported as missing as well.
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
                findings.push(Severity::Error, &path, Some(key.at), unknown_key(&key.name, near, fields));
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
        if !node.damaged && !tried.contains(&field.name.as_str()) {
            let help = match &field.shape {
                Shape::Choice(choices) => format!("add `{}:` with one of {}", field.name, choices.join(", ")),
                shape => format!("add `{}`, such as `{}: {}`", field.name, field.name, shape.example()),
            };
            let problem = Problem::new(format!("`{}` is missing", field.name), help);
            findings.push(Severity::Error, path, Some(node.at), problem);
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
    if key == "<<" {
        return Problem::new("YAML merge keys are not supported", "spell the keys out");
    }
    // A key in the wrong place is as common as a misspelt one.
    let has_key =
        |shape: &Shape| matches!(shape, Shape::Object(inner) if inner.iter().any(|field| field.name == key));
    let homes: Vec<_> = fields
        .iter()
        .filter(|field| has_key(&field.shape))
        .map(|field| format!("`{}`", field.name))
        .collect();
    if !homes.is_empty() {
        return Problem::new(message, format!("write it under {}", homes.join(" or ")));
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
    // `rule` is as near to `role` as to `rules`: the one that begins alike is meant.
    let alike = |name: &str| plain(name).bytes().zip(written.bytes()).take_while(|(a, b)| a == b).count();
    names
        .filter(|name| distance(name) <= limit(name))
        .min_by_key(|name| (distance(name), Reverse(alike(name))))
}
