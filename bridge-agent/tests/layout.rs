//! Dependencies between folders have one direction, and files depend on each other in no circle.
//!
//! Reads every `use` and every path of the sources, follows re-exports to the file that defines a name, and compares the
//! result with the order of folders in ARCHITECTURE.md.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens as _;
use syn::{Attribute, Item, UseTree, Visibility};

/// Folders of bridge-agent from the top down; a folder uses folders of lower layers only. Folders of one layer do not know
/// each other.
const LAYERS: &[&[&str]] = &[
    &["fuzzing"],
    &["cli"],
    &["ui"],
    &["agent", "api"],
    &["explain"],
    &["state"],
    &["kubernetes"],
    &["conntrack", "datapath", "interfaces", "iptables", "nftables", "nodeport_range", "pool", "routes"],
    &["firewall"],
    &["config", "policy"],
    &["model"],
    &["kernel"],
    &["fault", "kubectl", "log"],
];

/// Circles of files that are still to be cut: the folder, and the number of files in its largest circle. The test fails as
/// well when a circle has become smaller, so that the list shrinks.
const CIRCLES: &[(&str, usize)] = &[("bridge-common/src/pool", 3)];

/// The most lines that a file has.
const MAX_LINES: usize = 600;

/// A module in a file.
#[derive(Default)]
struct Module {
    file: PathBuf,
    children: BTreeSet<String>,
    /// Imported names and the paths they stand for.
    names: BTreeMap<String, Vec<String>>,
    /// Paths of modules whose names are all imported.
    globs: Vec<Vec<String>>,
    /// Paths that the code names, each absolute.
    paths: BTreeSet<Vec<String>>,
}

/// The modules of a crate by their path.
type Crate = BTreeMap<Vec<String>, Module>;

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg") && attribute.meta.to_token_stream().to_string().contains("test")
    })
}

/// Reads a file and the files of its modules.
fn read(file: &Path, path: &[String], modules: &mut Crate) {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    if is_test(&parsed.attrs) {
        return;
    }
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap();
    let directory = match stem {
        "lib" | "main" | "mod" => file.parent().unwrap().to_owned(),
        stem => file.parent().unwrap().join(stem),
    };
    items(parsed.items, file, &directory, path, modules);
}

fn items(items: Vec<Item>, file: &Path, directory: &Path, path: &[String], modules: &mut Crate) {
    let mut module = Module { file: file.to_owned(), ..Module::default() };
    let mut code = TokenStream::new();
    let mut uses = Vec::new();
    for item in items {
        match item {
            Item::Mod(inner) => {
                if is_test(&inner.attrs) {
                    continue;
                }
                let name = inner.ident.to_string();
                let child = [path, std::slice::from_ref(&name)].concat();
                module.children.insert(name.clone());
                if let Some((_, content)) = inner.content {
                    self::items(content, file, &directory.join(&name), &child, modules);
                } else {
                    let flat = directory.join(format!("{name}.rs"));
                    let nested = directory.join(&name).join("mod.rs");
                    read(if flat.exists() { &flat } else { &nested }, &child, modules);
                }
            }
            Item::Use(import) if !is_test(&import.attrs) => uses.push((import.vis, import.tree)),
            Item::Fn(function) if is_test(&function.attrs) => {}
            Item::Impl(block) if is_test(&block.attrs) => {}
            other => other.to_tokens(&mut code),
        }
    }
    for (visibility, tree) in uses {
        import(&tree, &[], &visibility, path, &mut module);
    }
    scan(code, path, &mut module);
    modules.insert(path.to_vec(), module);
}

/// Takes in a `use`.
fn import(tree: &UseTree, before: &[String], visibility: &Visibility, path: &[String], module: &mut Module) {
    let join = |name: &syn::Ident| [before, &[name.to_string()]].concat();
    let mut add = |target: Vec<String>, alias: String| {
        let Some(target) = absolute(&target, path, &module.children) else { return };
        // A re-export of a child is no dependency.
        let own = target.len() > path.len() && target.starts_with(path);
        if !own || matches!(visibility, Visibility::Inherited) {
            module.paths.insert(target.clone());
        }
        module.names.insert(alias, target);
    };
    match tree {
        UseTree::Path(part) => import(&part.tree, &join(&part.ident), visibility, path, module),
        UseTree::Group(group) => {
            group.items.iter().for_each(|tree| import(tree, before, visibility, path, module))
        }
        UseTree::Name(name) if name.ident == "self" => {
            let alias = before.last().unwrap().clone();
            add(before.to_vec(), alias);
        }
        UseTree::Name(name) => add(join(&name.ident), name.ident.to_string()),
        UseTree::Rename(rename) => add(join(&rename.ident), rename.rename.to_string()),
        UseTree::Glob(_) => {
            if let Some(target) = absolute(before, path, &module.children) {
                module.globs.push(target);
            }
        }
    }
}

/// The path from the root of the crate; `None`: a path into another crate.
fn absolute(path: &[String], module: &[String], children: &BTreeSet<String>) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    let base = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => {
            let mut base = module.to_vec();
            let mut rest = path;
            while let Some(("super", after)) =
                rest.split_first().map(|(first, after)| (first.as_str(), after))
            {
                base.pop();
                rest = after;
            }
            return Some([base.as_slice(), rest].concat());
        }
        child if children.contains(child) => return Some([module, path].concat()),
        _ => return None,
    };
    Some([base.as_slice(), rest].concat())
}

/// Takes in every path of the code.
fn scan(code: TokenStream, path: &[String], module: &mut Module) {
    let mut current: Vec<String> = Vec::new();
    let mut colons = 0;
    let mut tokens = code.into_iter().peekable();
    loop {
        let token = tokens.next();
        match &token {
            Some(TokenTree::Punct(punct)) if punct.as_char() == ':' && !current.is_empty() && colons < 2 => {
                colons += 1;
                continue;
            }
            Some(TokenTree::Ident(name)) if colons == 2 => {
                current.push(name.to_string());
                colons = 0;
                continue;
            }
            _ => {}
        }
        if current.len() > 1 {
            let local = module.names.get(&current[0]).map(|target| [target, &current[1..]].concat());
            let named = absolute(&current, path, &module.children).or(local);
            module.paths.extend(named);
        }
        current.clear();
        colons = 0;
        match token {
            None => return,
            Some(TokenTree::Ident(name)) => current.push(name.to_string()),
            // `pub(in crate::agent)` names a module and uses nothing of it.
            Some(TokenTree::Group(group)) => {
                let restricts =
                    group.stream().into_iter().next().is_some_and(|token| token.to_string() == "in");
                if !restricts {
                    scan(group.stream(), path, module);
                }
            }
            Some(_) => {}
        }
    }
}

/// The module that defines the item at the end of a path.
fn defining<'a>(modules: &'a Crate, path: &[String], depth: usize) -> Option<&'a Module> {
    let mut at = Vec::new();
    for (index, name) in path.iter().enumerate() {
        let module = modules.get(&at)?;
        if module.children.contains(name) {
            at.push(name.clone());
            continue;
        }
        if depth > 0 {
            if let Some(target) = module.names.get(name) {
                let target = [target, &path[index + 1..]].concat();
                return defining(modules, &target, depth - 1);
            }
            for glob in &module.globs {
                let target = [glob, &path[index..]].concat();
                if let Some(found) = defining(modules, &target, depth - 1)
                    && found.file != module.file
                {
                    return Some(found);
                }
            }
        }
        return Some(module);
    }
    // The path names a module, and no item of it.
    None
}

/// Which file uses which, by path below the crate.
type Graph = BTreeMap<String, BTreeSet<String>>;

fn graph(root: &Path) -> Graph {
    let mut modules = Crate::new();
    read(root, &[], &mut modules);
    let base = root.parent().unwrap();
    let name = |file: &Path| file.strip_prefix(base).unwrap().display().to_string();
    let mut graph = Graph::new();
    for module in modules.values() {
        let from = graph.entry(name(&module.file)).or_default();
        for path in &module.paths {
            if let Some(used) = defining(&modules, path, 8) {
                let to = name(&used.file);
                if used.file != module.file {
                    from.insert(to);
                }
            }
        }
    }
    graph
}

/// Sets of two or more files that reach each other (Tarjan's algorithm).
fn circles(graph: &Graph) -> Vec<BTreeSet<&str>> {
    struct State<'a> {
        graph: &'a Graph,
        index: BTreeMap<&'a str, usize>,
        low: BTreeMap<&'a str, usize>,
        stack: Vec<&'a str>,
        found: Vec<BTreeSet<&'a str>>,
    }
    fn visit<'a>(state: &mut State<'a>, node: &'a str) {
        let number = state.index.len();
        state.index.insert(node, number);
        state.low.insert(node, number);
        state.stack.push(node);
        for next in state.graph.get(node).into_iter().flatten() {
            let reached = if !state.index.contains_key(next.as_str()) {
                visit(state, next);
                state.low[next.as_str()]
            } else if state.stack.contains(&next.as_str()) {
                state.index[next.as_str()]
            } else {
                continue;
            };
            if reached < state.low[node] {
                state.low.insert(node, reached);
            }
        }
        if state.low[node] == number {
            let at = state.stack.iter().position(|entry| *entry == node).unwrap();
            let members: BTreeSet<_> = state.stack.drain(at..).collect();
            if members.len() > 1 {
                state.found.push(members);
            }
        }
    }
    let (index, low) = (BTreeMap::new(), BTreeMap::new());
    let mut state = State { graph, index, low, stack: Vec::new(), found: Vec::new() };
    for node in graph.keys() {
        if !state.index.contains_key(node.as_str()) {
            visit(&mut state, node);
        }
    }
    state.found
}

fn folder(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// Arrows from a folder to one that is not in a lower layer, with a file of each as an example.
fn upward<'a>(graph: &'a Graph, layers: &[&[&str]]) -> BTreeMap<(&'a str, &'a str), String> {
    let layer = |folder: &str| layers.iter().position(|layer| layer.contains(&folder));
    let mut arrows = BTreeMap::new();
    for (from, used) in graph.iter().filter(|(from, _)| !matches!(from.as_str(), "lib.rs" | "main.rs")) {
        for to in used {
            let (a, b) = (folder(from), folder(to));
            let (Some(high), Some(low)) = (layer(a), layer(b)) else {
                panic!("{from} or {to} is in no layer: add its folder to LAYERS and to ARCHITECTURE.md");
            };
            if a != b && high >= low {
                arrows.entry((a, b)).or_insert_with(|| format!("{from} uses {to}"));
            }
        }
    }
    arrows
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[test]
fn folders_depend_on_lower_layers_only() {
    let graph = graph(&workspace().join("bridge-agent/src/lib.rs"));
    let found = upward(&graph, LAYERS);
    assert!(found.is_empty(), "arrows against the order of layers: {found:#?}");
}

#[test]
fn files_depend_on_each_other_in_no_circle() {
    let mut found = Vec::new();
    let mut largest = BTreeMap::new();
    for root in [
        "bridge-agent/src/lib.rs",
        "bridge-common/src/lib.rs",
        "bridge-ebpf/src/enforce/main.rs",
        "bridge-ebpf/src/generate/main.rs",
        "bridge-ebpf/src/pool/main.rs",
    ] {
        let root = workspace().join(root);
        let base = root.parent().unwrap().strip_prefix(workspace()).unwrap().display().to_string();
        let graph = graph(&root);
        for circle in circles(&graph) {
            let files: BTreeSet<_> = circle.iter().map(|file| format!("{base}/{file}")).collect();
            let within =
                |(folder, _): &&(&str, usize)| files.iter().all(|file| Path::new(file).starts_with(folder));
            let known = CIRCLES.iter().find(within);
            if let Some((folder, _)) = known {
                let size: &mut usize = largest.entry(*folder).or_default();
                *size = files.len().max(*size);
            }
            if known.is_none_or(|(_, most)| files.len() > *most) {
                let inside =
                    |file: &&str| graph[*file].iter().filter(|to| circle.contains(to.as_str())).cloned();
                let edges: BTreeMap<_, _> = circle
                    .iter()
                    .map(|file| ((*file).to_owned(), inside(file).collect::<Vec<_>>()))
                    .collect();
                found.push((base.clone(), edges));
            }
        }
    }
    assert!(found.is_empty(), "files that depend on each other in a circle: {found:#?}");
    let listed: BTreeMap<_, _> = CIRCLES.iter().copied().collect();
    assert_eq!(largest, listed, "circles that have become smaller: lower their figure in CIRCLES");
}

/// Adds the Rust files below a directory that have more than `most` lines.
fn long_files(directory: &Path, most: usize, found: &mut Vec<(PathBuf, usize)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && !path.is_symlink() {
            if name != "target" && !name.starts_with('.') {
                long_files(&path, most, found);
            }
        } else if name.ends_with(".rs") {
            let lines = fs::read_to_string(&path).unwrap().lines().count();
            if lines > most {
                found.push((path, lines));
            }
        }
    }
}

#[test]
fn no_file_is_longer_than_the_limit() {
    let mut found = Vec::new();
    long_files(workspace(), MAX_LINES, &mut found);
    assert!(found.is_empty(), "files of more than {MAX_LINES} lines: {found:#?}");
    long_files(workspace(), MAX_LINES / 2, &mut found);
    assert!(!found.is_empty(), "no file was read");
}

/// A crate of these files, for the tests of the test.
fn sample(files: &[(&str, &str)]) -> Graph {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    graph(&directory.path().join("lib.rs"))
}

#[test]
fn an_upward_arrow_is_found_in_imports_paths_and_macros() {
    let layers: &[&[&str]] = &[&["high"], &["low"]];
    let high = ("high/mod.rs", "mod inner;\npub use inner::Thing;");
    let inner = ("high/inner.rs", "pub struct Thing;");
    let found = |low: &str| {
        let graph = sample(&[("lib.rs", "mod high;\nmod low;"), high, inner, ("low.rs", low)]);
        upward(&graph, layers).into_values().next()
    };
    let arrow = Some("low.rs uses high/inner.rs".to_owned());
    assert_eq!(found("use crate::high::Thing;"), arrow);
    assert_eq!(found("use crate::{high::{self}};\nfn f() -> high::Thing { todo!() }"), arrow);
    assert_eq!(found("use super::high as other;\nfn f() { println!(\"{:?}\", other::Thing) }"), arrow);
    assert_eq!(found("fn f() { let _ = crate::high::Thing; }"), arrow);
    assert_eq!(found("#[cfg(test)]\nmod tests { use crate::high::Thing; }"), None);
    assert_eq!(found("use std::fmt;"), None);
}

#[test]
fn a_circle_is_found_through_a_re_export() {
    let files = [
        ("lib.rs", "mod a;\nmod b;\nmod c;"),
        ("a/mod.rs", "mod x;\npub use x::X;"),
        ("a/x.rs", "use crate::b::B;\npub struct X(B);"),
        ("b.rs", "pub struct B;\npub fn x() -> crate::c::C { todo!() }"),
        ("c.rs", "use crate::a::X;\npub struct C(X);"),
    ];
    let graph = sample(&files);
    assert_eq!(circles(&graph), [BTreeSet::from(["a/x.rs", "b.rs", "c.rs"])]);
    let without: Vec<_> =
        files.iter().map(|(name, text)| (*name, text.replace("crate::c::C", "u8"))).collect();
    let without: Vec<_> = without.iter().map(|(name, text)| (*name, text.as_str())).collect();
    assert!(circles(&sample(&without)).is_empty());
}
