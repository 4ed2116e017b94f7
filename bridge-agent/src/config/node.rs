//! A configuration as a tree in which every value knows its place.
//!
//! Between text and types, so that all faults can be found and shown at once, not only the first that a deserializer
//! meets. Scalars stay text: the type that takes a scalar gives it a meaning, not the guess of a YAML resolver (`0660`,
//! `no`, `1_000`).

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::value::{Error, MapDeserializer, SeqDeserializer};
use serde::de::{Deserializer, Error as _, IntoDeserializer, MapAccess, SeqAccess, Visitor};

use super::path::Path;

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

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node<'s> {
    pub(crate) at: Span,
    /// If it is an element of a list: which one, as the list was written.
    pub(crate) index: u32,
    /// Whether something at or below it could not be read and was taken out.
    pub(crate) damaged: bool,
    pub(crate) value: Value<'s>,
}

/// A value, borrowed from the text where nothing had to be unescaped.
#[derive(Clone, Debug)]
pub(crate) enum Value<'s> {
    /// Without quotes.
    Plain(Cow<'s, str>),
    /// In quotes, or as a block.
    Quoted(Cow<'s, str>),
    List(Vec<Node<'s>>),
    Map(Vec<(Key<'s>, Node<'s>)>),
}

/// A key of a mapping.
#[derive(Clone, Debug)]
pub(crate) struct Key<'s> {
    pub(crate) name: Cow<'s, str>,
    pub(crate) at: Span,
}

impl<'s> Node<'s> {
    /// The value of `key`, if this is a mapping that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(found, _)| found.name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// The text of a scalar.
    pub(crate) fn scalar(&self) -> Option<&str> {
        match &self.value {
            Value::Plain(text) | Value::Quoted(text) => Some(text),
            Value::List(_) | Value::Map(_) => None,
        }
    }

    /// Whether a key was written and nothing behind it.
    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Plain(text) if matches!(&**text, "" | "~" | "null"))
    }

    /// `path` to this node, its last index as the list was written, before unreadable elements were taken out.
    pub(crate) const fn original<'a>(&self, path: &Path<'a>) -> Path<'a> {
        match path {
            Path::Index(parent, _) => Path::Index(parent, self.index as usize),
            other => *other,
        }
    }

    /// Returns the kind of the value, with its article.
    pub(crate) const fn kind(&self) -> &'static str {
        match self.value {
            Value::Plain(_) | Value::Quoted(_) => "a single value",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }

    fn parsed<T: FromStr>(&self) -> Result<T, Error> {
        let text = self.scalar().ok_or_else(|| Error::custom(format_args!("found {}", self.kind())))?;
        text.parse().map_err(|_| Error::custom(format_args!("`{text}` cannot be read")))
    }
}

macro_rules! parse_scalar {
    ($($method:ident => $visit:ident),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.parsed()?)
        })*
    };
}

/// Types are read from the tree as from any other format.
impl<'de> Deserializer<'de> for &'de Node<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.value {
            Value::Plain(_) if self.is_null() => visitor.visit_unit(),
            Value::Plain(text) | Value::Quoted(text) => visitor.visit_borrowed_str(text),
            Value::List(list) => visitor.visit_seq(SeqDeserializer::new(list.iter())),
            Value::Map(entries) => {
                visitor.visit_map(MapDeserializer::new(entries.iter().map(|(key, node)| (&*key.name, node))))
            }
        }
    }

    parse_scalar! {
        deserialize_bool => visit_bool,
        deserialize_i64 => visit_i64,
        deserialize_u8 => visit_u8,
        deserialize_u16 => visit_u16,
        deserialize_u32 => visit_u32,
        deserialize_u64 => visit_u64,
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.scalar() {
            Some(text) => visitor.visit_borrowed_str(text),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
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
        match self.scalar() {
            Some(text) => text.into_deserializer().deserialize_enum(name, variants, visitor),
            None => Err(Error::custom(format_args!("expected one of {variants:?}, found {}", self.kind()))),
        }
    }

    serde::forward_to_deserialize_any! {
        i8 i16 i32 i128 u128 f32 f64 char bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for &'de Node<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// A tree is read from JSON, too; its values have no places.
impl<'de> Deserialize<'de> for Node<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Tree)
    }
}

struct Tree;

fn node<'s, E>(value: Value<'s>) -> Result<Node<'s>, E> {
    Ok(Node { at: Span { offset: 0, len: 0, line: 0 }, index: 0, damaged: false, value })
}

fn plain<'s, E>(text: impl Into<Cow<'s, str>>) -> Result<Node<'s>, E> {
    node(Value::Plain(text.into()))
}

impl<'de> Visitor<'de> for Tree {
    type Value = Node<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Node<'de>, E> {
        plain("null")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node<'de>, E> {
        plain(if value { "true" } else { "false" })
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node<'de>, E> {
        plain(value.to_string())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node<'de>, E> {
        plain(value.to_string())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node<'de>, E> {
        // With a point: 1.0 is no port.
        plain(format!("{value:?}"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Node<'de>, E> {
        node(Value::Quoted(text.to_owned().into()))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Node<'de>, E> {
        node(Value::Quoted(text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Node<'de>, A::Error> {
        let mut list = Vec::with_capacity(1);
        while let Some(node) = elements.next_element::<Node<'de>>()? {
            list.push(Node { index: u32::try_from(list.len()).unwrap_or(u32::MAX), ..node });
        }
        node(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node<'de>, A::Error> {
        let mut map = Vec::new();
        while let Some((key, node)) = entries.next_entry::<Node<'de>, Node<'de>>()? {
            if let Value::Quoted(name) = key.value {
                map.push((Key { name, at: key.at }, node));
            }
        }
        node(Value::Map(map))
    }
}
