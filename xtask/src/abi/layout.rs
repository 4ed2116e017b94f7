//! Reads from the source of a crate the facts that fix the memory layout of its types and the meaning of its numbers.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context, Result, bail};
use quote::ToTokens;
use syn::{Attribute, Expr, ImplItem, Item, Lit, Type, visit_mut::VisitMut};

/// Types and numbers of a crate, and the version they go by.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) version: u32,
    /// Definition by kind and path.
    items: BTreeMap<String, String>,
}

/// How one layout differs from an older one, by kind and path of the item.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Difference {
    Added(String),
    Changed(String),
    Removed(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Added(item) => write!(f, "new: {item}"),
            Self::Changed(item) => write!(f, "changed: {item}"),
            Self::Removed(item) => write!(f, "gone: {item}"),
        }
    }
}

const HEADER: &str = "# The layout that ABI_VERSION stands for. Written by `cargo xtask abi --bless`.";

impl Layout {
    /// Reads the source of a crate, macros expanded.
    pub(super) fn parse_source(source: &str) -> Result<Self> {
        let file = syn::parse_file(source).context("the expanded source is not understood")?;
        let mut version = None;
        let mut items = BTreeMap::new();
        collect("", file.items, &mut items, &mut version);
        let version =
            version.context("there is no `pub const ABI_VERSION: u32 = NUMBER;` at the root of the crate")?;
        Ok(Self { version, items })
    }

    /// Parses the output of [`fmt::Display`].
    pub(super) fn parse_lock(text: &str) -> Result<Self> {
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        let version = lines.next().and_then(|line| line.strip_prefix("version ")?.parse().ok());
        let version = version.context("the first line is not `version NUMBER`")?;
        let mut items = BTreeMap::new();
        while let Some(key) = lines.next() {
            let Some(definition) = lines.next().and_then(|line| line.strip_prefix("    ")) else {
                bail!("`{key}` has no definition below it");
            };
            items.insert(key.to_owned(), definition.to_owned());
        }
        Ok(Self { version, items })
    }

    /// Returns the differences from `older`.
    pub(super) fn differences(&self, older: &Self) -> Vec<Difference> {
        let changed = self.items.iter().filter_map(|(item, definition)| match older.items.get(item) {
            None => Some(Difference::Added(item.clone())),
            Some(was) if was != definition => Some(Difference::Changed(item.clone())),
            Some(_) => None,
        });
        let removed = older.items.keys().filter(|item| !self.items.contains_key(*item));
        changed.chain(removed.cloned().map(Difference::Removed)).collect()
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}\nversion {}", self.version)?;
        for (item, definition) in &self.items {
            writeln!(f, "{item}\n    {definition}")?;
        }
        Ok(())
    }
}

/// Gathers the types and numbers of `source` below `path`.
fn collect(path: &str, source: Vec<Item>, items: &mut BTreeMap<String, String>, version: &mut Option<u32>) {
    let mut add = |kind: &str, name: &dyn fmt::Display, item: &dyn ToTokens| {
        items.insert(format!("{kind} {path}{name}"), item.to_token_stream().to_string());
    };
    let mut modules = Vec::new();
    for mut item in source {
        OnlyRepr.visit_item_mut(&mut item);
        match &item {
            Item::Struct(item) => add("struct", &item.ident, item),
            Item::Union(item) => add("union", &item.ident, item),
            Item::Enum(item) => add("enum", &item.ident, item),
            Item::Type(item) => add("type", &item.ident, item),
            Item::Const(item) if path.is_empty() && item.ident == "ABI_VERSION" => {
                *version = number(&item.expr)
            }
            // `const _` is an assertion.
            Item::Const(item) if item.ident != "_" && !is_text(&item.ty) => add("const", &item.ident, item),
            Item::Impl(block) if block.trait_.is_none() => {
                for item in &block.items {
                    if let ImplItem::Const(item) = item
                        && !is_text(&item.ty)
                    {
                        let name = format!("{}::{}", block.self_ty.to_token_stream(), item.ident);
                        add("const", &name, item);
                    }
                }
            }
            Item::Mod(_) => modules.push(item),
            _ => {}
        }
    }
    for module in modules {
        if let Item::Mod(module) = module {
            let (_, content) = module.content.unwrap_or_default();
            collect(&format!("{path}{}::", module.ident), content, items, version);
        }
    }
}

/// Removes every attribute but `repr`: documentation and derives are no layout.
struct OnlyRepr;

impl VisitMut for OnlyRepr {
    fn visit_attributes_mut(&mut self, attributes: &mut Vec<Attribute>) {
        attributes.retain(|attribute| attribute.path().is_ident("repr"));
    }
}

/// Whether constants of this type are text for people.
fn is_text(ty: &Type) -> bool {
    match ty {
        Type::Reference(reference) => is_text(&reference.elem),
        Type::Array(array) => is_text(&array.elem),
        Type::Slice(slice) => is_text(&slice.elem),
        Type::Path(path) => path.path.is_ident("str"),
        _ => false,
    }
}

fn number(expression: &Expr) -> Option<u32> {
    let Expr::Lit(literal) = expression else { return None };
    let Lit::Int(number) = &literal.lit else { return None };
    number.base10_parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(source: &str) -> Vec<String> {
        let source = format!("pub const ABI_VERSION: u32 = 1; {source}");
        Layout::parse_source(&source).unwrap().items.into_keys().collect()
    }

    #[test]
    fn types_and_numbers_count_with_their_paths() {
        let source =
            "pub mod a { pub mod b { pub struct S(u8); } pub enum E { X = 1 } pub union U { x: u8 } }
            pub type T = u8; pub const N: u16 = 1; pub struct S; impl S { pub const M: u8 = 1; }";
        assert_eq!(
            keys(source),
            ["const N", "const S::M", "enum a::E", "struct S", "struct a::b::S", "type T", "union a::U"]
        );
    }

    #[test]
    fn text_assertions_functions_and_traits_do_not_count() {
        let source = r#"pub const NAMES: [&str; 1] = ["x"]; const _: () = assert!(true); pub fn f() {}
            impl Default for S { const D: u8 = 1; }"#;
        assert_eq!(keys(source), [""; 0]);
    }

    #[test]
    fn a_crate_without_a_version_is_refused() {
        assert!(Layout::parse_source("pub struct S;").unwrap_err().to_string().contains("ABI_VERSION"));
    }

    #[test]
    fn a_damaged_lock_is_refused() {
        assert!(Layout::parse_lock("").is_err());
        assert!(Layout::parse_lock("version 1\nconst A\nconst B\n").is_err());
    }
}
