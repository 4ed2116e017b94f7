//! A YAML document as a tree in which every value knows its place.
//!
//! Between text and types, so that all that is wrong can be found and shown at once, not only what a
//! deserializer stumbles over first.

use std::fmt;

use serde::de::value::{Error, MapDeserializer, SeqDeserializer};
use serde::de::{self, Deserialize, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::report::Path;

/// Where something stands in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// In bytes, from 0.
    pub(crate) offset: u32,
    /// In bytes.
    pub(crate) len: u32,
    /// From 1.
    pub(crate) line: u32,
}

impl Span {
    pub(crate) fn new(location: serde_saphyr::Location) -> Option<Self> {
        let span = location.span();
        Some(Self {
            offset: span.byte_offset()?.try_into().ok()?,
            len: span.byte_len()?.try_into().ok()?,
            line: u32::try_from(location.line()).ok().filter(|line| *line > 0)?,
        })
    }
}

/// A value and its place.
#[derive(Debug)]
pub(crate) struct Node {
    /// `None` if it came from no text.
    pub(crate) at: Option<Span>,
    /// If it is an element of a list: which one, as the list was written.
    pub(crate) index: u32,
    /// Whether something at or below it could not be read and was taken out.
    pub(crate) damaged: bool,
    pub(crate) value: Value,
}

/// What YAML's core schema knows.
#[derive(Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) at: Option<Span>,
}

impl Node {
    /// Reads the text of one YAML document.
    pub(crate) fn parse(text: &str) -> Result<Self, serde_saphyr::Error> {
        // A million rules are some 30 million nodes. What YAML can be abused for is limited by the depth and by
        // what aliases may repeat; the rest is no larger than the file itself.
        let most = text.len().saturating_add(1024);
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_depth: 32,
                max_documents: 1,
                max_events: most,
                max_nodes: most,
                max_total_scalar_bytes: most.saturating_mul(4),
                max_aliases: 10_000,
                max_anchors: 10_000,
            },
            alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 1_000_000 },
            emit_comments: false,
            strict_booleans: true,
        };
        serde_saphyr::from_str_with_options(text, options)
    }

    /// The value of `key`, if this is a mapping that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(found, _)| found.name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// `path` to this node, its last index as the list was written, before unreadable elements were taken out.
    pub(crate) const fn original<'a>(&self, path: &Path<'a>) -> Path<'a> {
        match path {
            Path::Index(parent, _) => Path::Index(parent, self.index as usize),
            other => *other,
        }
    }

    /// What kind of value it is, with its article.
    pub(crate) const fn kind(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Integer(_) | Value::Float(_) => "a number",
            Value::Text(_) => "a text",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { at: Span::new(spanned.defined), index: 0, damaged: false, value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Integer(number))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
        Ok(i64::try_from(number).map_or(Value::Float(number as f64), Value::Integer))
    }

    fn visit_i128<E: de::Error>(self, number: i128) -> Result<Value, E> {
        Ok(Value::Float(number as f64))
    }

    fn visit_u128<E: de::Error>(self, number: u128) -> Result<Value, E> {
        Ok(Value::Float(number as f64))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Float(number))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(mut node) = access.next_element::<Node>()? {
            node.index = u32::try_from(list.len()).unwrap_or(u32::MAX);
            list.push(node);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let key = Key { at: Span::new(key.defined), name: key.value };
            entries.push((key, access.next_value()?));
        }
        Ok(Value::Map(entries))
    }
}

/// Types are read from the tree as from any other format.
impl<'de> Deserializer<'de> for &'de Node {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(list) => visitor.visit_seq(SeqDeserializer::new(list.iter())),
            Value::Map(entries) => {
                let entries = entries.iter().map(|(key, node)| (key.name.as_str(), node));
                visitor.visit_map(MapDeserializer::new(entries))
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match &self.value {
            Value::Text(text) => text.as_str().into_deserializer().deserialize_enum(name, variants, visitor),
            _ => Err(de::Error::custom(format_args!("expected one of {variants:?}, found {}", self.kind()))),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for &'de Node {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}
