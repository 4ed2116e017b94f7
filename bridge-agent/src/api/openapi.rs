//! Routes with their documentation, and the OpenAPI document made of them.
//!
//! [`Routes::add`] is the only way to a route, so that none is without documentation; schemas come from the types that are sent.

use std::collections::BTreeMap;

use axum::{Router, http::StatusCode, routing::MethodRouter};
use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::ErrorBody;
use crate::state::Shared;

/// Makes the schema of a type.
type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

fn schema_of<T: JsonSchema>() -> MakeSchema {
    |generator| generator.subschema_for::<T>()
}

/// The method of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
    Delete,
}

impl Method {
    const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
            Self::Delete => "delete",
        }
    }
}

/// The documentation of a route.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    method: Method,
    id: &'static str,
    summary: &'static str,
    query: Option<MakeSchema>,
    path_parameter: Option<(&'static str, MakeSchema)>,
    body: Option<MakeSchema>,
    success: (StatusCode, &'static str, Vec<(&'static str, MakeSchema)>),
    errors: BTreeMap<u16, &'static str>,
}

const JSON: &str = "application/json";

impl Operation {
    /// Describes a route that answers without a body.
    pub(super) fn new(method: Method, id: &'static str, summary: &'static str) -> Self {
        let success = (StatusCode::NO_CONTENT, "Done", Vec::new());
        Self {
            method,
            id,
            summary,
            query: None,
            path_parameter: None,
            body: None,
            success,
            errors: BTreeMap::new(),
        }
    }

    /// Describes a `GET` that answers with a `T`.
    pub(super) fn get<T: JsonSchema>(id: &'static str, summary: &'static str) -> Self {
        Self::new(Method::Get, id, summary).answers::<T>(StatusCode::OK)
    }

    /// Adds an answer of JSON.
    pub(super) fn answers<T: JsonSchema>(self, status: StatusCode) -> Self {
        self.sends::<T>(status, JSON)
    }

    /// Adds an answer of another media type.
    pub(super) fn sends<T: JsonSchema>(mut self, status: StatusCode, media_type: &'static str) -> Self {
        self.success.0 = status;
        self.success.1 = "Success";
        self.success.2.push((media_type, schema_of::<T>()));
        self
    }

    /// Adds the keys of the query.
    pub(super) fn query<T: JsonSchema>(mut self) -> Self {
        self.query = Some(schema_of::<T>());
        self.error(StatusCode::BAD_REQUEST, "The query is not understood")
    }

    /// Adds a parameter of the path.
    pub(super) fn parameter<T: JsonSchema>(mut self, name: &'static str) -> Self {
        self.path_parameter = Some((name, schema_of::<T>()));
        self
    }

    /// Adds the body of the request.
    pub(super) fn body<T: JsonSchema>(mut self) -> Self {
        self.body = Some(schema_of::<T>());
        self.error(StatusCode::BAD_REQUEST, "The body is not understood")
            .error(StatusCode::REQUEST_TIMEOUT, "The body did not arrive in time")
            .error(StatusCode::PAYLOAD_TOO_LARGE, "The body is too large")
    }

    /// Adds an error.
    pub(super) fn error(mut self, status: StatusCode, description: &'static str) -> Self {
        self.errors.insert(status.as_u16(), description);
        self
    }

    /// Adds the errors of a large answer.
    pub(super) fn large(self) -> Self {
        self.error(StatusCode::INTERNAL_SERVER_ERROR, "The kernel refuses")
            .error(StatusCode::SERVICE_UNAVAILABLE, "Another client takes a large answer: ask again later")
    }

    /// Adds the error of an agent that enforces nothing.
    pub(super) fn needs_an_engine(self) -> Self {
        self.error(StatusCode::CONFLICT, "The agent enforces no rules")
    }

    /// Adds the error of an agent without eBPF.
    pub(super) fn needs_ebpf(self) -> Self {
        self.error(StatusCode::CONFLICT, "The agent does not enforce by eBPF")
    }

    /// Returns the entry of the document.
    fn to_value(&self, generators: &mut Generators) -> Value {
        let mut responses = Map::new();
        let (status, description, media_types) = &self.success;
        let mut success = json!({ "description": description });
        for (media_type, schema) in media_types {
            success["content"][media_type] = json!({ "schema": schema(&mut generators.sent) });
        }
        responses.insert(status.as_u16().to_string(), success);
        let problem = generators.sent.subschema_for::<ErrorBody>();
        for (status, description) in &self.errors {
            let response = json!({ "description": description, "content": { JSON: { "schema": problem } } });
            responses.insert(status.to_string(), response);
        }
        let mut value = json!({ "operationId": self.id, "summary": self.summary, "responses": responses });
        let mut parameters = Vec::new();
        if let Some((name, schema)) = self.path_parameter {
            let schema = schema(&mut generators.sent);
            parameters.push(json!({ "name": name, "in": "path", "required": true, "schema": schema }));
        }
        if let Some(query) = self.query {
            parameters.extend(query_parameters(query));
        }
        if !parameters.is_empty() {
            value["parameters"] = parameters.into();
        }
        if let Some(body) = self.body {
            let schema = body(&mut generators.taken);
            value["requestBody"] = json!({ "required": true, "content": { JSON: { "schema": schema } } });
        }
        value
    }
}

/// Generators of schemas: a key with a default may be left out of a request, but never is of an answer.
struct Generators {
    sent: SchemaGenerator,
    taken: SchemaGenerator,
}

impl Generators {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
            })
        };
        Self { sent: settings().for_serialize().into_generator(), taken: settings().into_generator() }
    }

    /// Returns the schemas that operations refer to. A type that is both sent and taken is as it is sent.
    fn definitions(mut self) -> Map<String, Value> {
        let mut all = self.taken.take_definitions(true);
        all.extend(self.sent.take_definitions(true));
        all
    }
}

/// Returns a parameter for each key of a query.
fn query_parameters(query: MakeSchema) -> Vec<Value> {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = query(&mut settings.into_generator()).to_value();
    let parameter = |(name, schema): (&String, &Value)| {
        let mut schema = schema.clone();
        let description = schema.as_object_mut().and_then(|schema| schema.remove("description"));
        if let Some(schema) =
            schema.as_object_mut().filter(|schema| schema.get("default") == Some(&Value::Null))
        {
            schema.remove("default");
        }
        // A key that is there has a value.
        if let Some(kinds) = schema["type"].as_array_mut() {
            kinds.retain(|kind| kind != "null");
        }
        json!({ "name": name, "in": "query", "required": false, "description": description, "schema": schema })
    };
    schema["properties"].as_object().into_iter().flatten().map(parameter).collect()
}

/// Routes, each with its documentation.
#[derive(Debug, Default)]
pub(super) struct Routes {
    router: Router<Shared>,
    operations: Vec<(&'static str, Operation)>,
}

impl Routes {
    /// Adds a route.
    pub(super) fn add(
        mut self,
        path: &'static str,
        operation: Operation,
        handler: MethodRouter<Shared>,
    ) -> Self {
        self.router = self.router.route(path, handler);
        self.operations.push((path, operation));
        self
    }

    /// Adds the routes of another part.
    pub(super) fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.operations.extend(other.operations);
        self
    }

    /// Changes the router, for instance by a layer.
    pub(super) fn map(mut self, change: impl FnOnce(Router<Shared>) -> Router<Shared>) -> Self {
        self.router = change(self.router);
        self
    }

    /// Adds an error to every route.
    pub(super) fn each_fails(mut self, status: StatusCode, description: &'static str) -> Self {
        for (_, operation) in &mut self.operations {
            operation.errors.insert(status.as_u16(), description);
        }
        self
    }

    /// Returns the router.
    pub(super) fn into_router(self) -> Router<Shared> {
        self.router
    }

    /// Returns the OpenAPI document.
    pub(super) fn document(&self) -> Value {
        let mut generators = Generators::new();
        let mut paths = Map::new();
        for (path, operation) in &self.operations {
            let value = operation.to_value(&mut generators);
            let entry = paths.entry(*path).or_insert_with(|| json!({}));
            entry[operation.method.name()] = value;
        }
        let mut document = json!({
            "openapi": "3.1.0",
            "info": {
                "title": "bridge",
                "version": "1",
                "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
                "description": "HTTP/1.1 on the agent's unix socket: `curl --unix-socket /run/bridge/agent.sock \
                    http://bridge/v1/status`. Mode and group of the socket decide who may connect. Requests that change \
                    enforcement are for root and the agent's own user. A port is leased for the network namespace of the \
                    client's socket. An unknown path answers 404, another method 405.",
            },
            "paths": paths,
            "components": { "schemas": generators.definitions() },
        });
        remove_links(&mut document);
        document
    }
}

/// Removes the marks of links between doc comments.
fn remove_links(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(text)) = fields.get_mut("description") {
                *text = text.replace("[`", "`").replace("`]", "`");
            }
            fields.values_mut().for_each(remove_links);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_links),
        _ => {}
    }
}
