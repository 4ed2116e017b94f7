//! docs/openapi.json describes each route of the API, and no other.

mod openapi;
mod server;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use bridge_agent::{
    api, config,
    state::{Shared, Status},
};
use serde_json::Value;
use server::{Served, serve};

const METHODS: [&str; 5] = ["get", "post", "put", "delete", "patch"];

/// An agent without engines.
struct Agent(Served);

impl Agent {
    fn start() -> Self {
        // Requests to the run loop find it stopped.
        let (shared, _) = Shared::new(Status::default());
        Self(serve(&config::Api::default(), shared, async {}))
    }

    /// Sends a request; returns status and body.
    fn ask(&self, method: &str, path: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(&self.0.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let method = method.to_ascii_uppercase();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "{method} {path}: {head}");
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut body = String::new();
        reader.read_to_string(&mut body).unwrap();
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }
}

fn operations(document: &Value) -> impl Iterator<Item = (&String, &String, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    paths.iter().flat_map(|(path, methods)| {
        methods.as_object().unwrap().iter().map(move |(method, operation)| (path, method, operation))
    })
}

#[test]
fn the_file_is_the_document_that_the_agent_makes() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let written: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    assert!(written == api::document(), "docs/openapi.json is out of date: run `cargo xtask crds`");
}

#[test]
fn each_method_of_each_path_is_served_as_documented() {
    let document = api::document();
    let agent = Agent::start();
    let mut walked = 0;
    let known: BTreeSet<(&str, &str)> =
        operations(&document).map(|(path, method, _)| (path.as_str(), method.as_str())).collect();
    for (template, _) in document["paths"].as_object().unwrap() {
        let path = template.replace("{id}", "1");
        for method in METHODS {
            let (status, body) = agent.ask(method, &path);
            if known.contains(&(template.as_str(), method)) {
                assert!(status != 405 && body["code"] != "path", "{method} {path} is not served: {body}");
                openapi::documented(method, &path, status, &body);
                walked += 1;
            } else {
                assert_eq!((status, &body["code"]), (405, &"method".into()), "{method} {path}: {body}");
            }
        }
    }
    assert!(walked == known.len() && walked >= 19, "{walked} of {}", known.len());
    assert_eq!(agent.ask("get", "/v1/none").1["code"], "path");
}

#[test]
fn no_route_is_made_but_with_its_documentation() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api");
    let mut places = Vec::new();
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let makes = |line: &&str| {
                [".route(", ".route_service(", ".nest(", ".nest_service("]
                    .iter()
                    .any(|call| line.contains(call))
            };
            places.extend(text.lines().filter(makes).map(|line| (path.clone(), line.trim().to_owned())));
        }
    }
    // One that documents, and the listener of scrapers, which serves one path of the API again.
    let scrapers = "Router::new().route(\"/metrics\", get(metrics::serve))";
    assert_eq!(places.len(), 2, "{places:?}");
    for (path, line) in places {
        assert!(path.ends_with("openapi.rs") || line.contains(scrapers), "{}: {line}", path.display());
    }
}

#[test]
fn references_lead_to_schemas_and_each_schema_is_used() {
    let document = api::document();
    let mut references = BTreeSet::new();
    collect(&document, &mut references);
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for reference in &references {
        assert!(document.pointer(&reference[1..]).is_some(), "{reference} leads nowhere");
    }
    for name in schemas.keys() {
        assert!(references.contains(&format!("#/components/schemas/{name}")), "{name} is not used");
        // schemars numbers types of the same name.
        assert!(!name.ends_with(|last: char| last.is_ascii_digit()), "two types are called {name}");
    }
    let ids: Vec<&Value> = operations(&document).map(|(.., operation)| &operation["operationId"]).collect();
    assert_eq!(ids.iter().map(ToString::to_string).collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
}

fn collect(value: &Value, references: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            references.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|value| collect(value, references));
        }
        Value::Array(items) => items.iter().for_each(|value| collect(value, references)),
        _ => {}
    }
}
