//! Queries that the page passes on to the agent.

use std::{path::Path, sync::Arc};

use axum::{
    Json, Router,
    body::Body,
    extract::RawQuery,
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request};

use super::{cluster::Cluster, source::Source};
use crate::api::{ErrorBody, client::Client};

const EVENTS: &str = "/api/events";
/// Queries of the page, and their paths at the agent.
const QUERIES: &[(&str, &str)] = &[
    ("/api/status", "/v1/status"),
    ("/api/flows", "/v1/flows"),
    ("/api/rules", "/v1/rules"),
    ("/api/counters", "/v1/counters"),
    ("/api/routes", "/v1/routes"),
    ("/api/leases", "/v1/leases"),
    (EVENTS, "/v1/events"),
];
/// Headers of the page that the agent gets.
const HEADERS: [HeaderName; 2] = [header::ACCEPT, HeaderName::from_static("last-event-id")];

/// Adds the queries of the page to a router.
pub(super) fn router(source: Source) -> Router {
    match source {
        Source::Socket(socket) => of_socket(&socket.into()),
        Source::Cluster(access) => of_cluster(&Cluster::new(access)),
    }
}

fn of_socket(socket: &Arc<Path>) -> Router {
    let queries = QUERIES.iter().fold(Router::new(), |router, &(path, there)| {
        let socket = Arc::clone(socket);
        let query = async move |RawQuery(query): RawQuery, headers: HeaderMap| {
            pass(&socket, Method::GET, &with_query(there, query), &headers, Bytes::new()).await
        };
        router.route(path, get(query))
    });
    let socket = Arc::clone(socket);
    // A query, although the packet travels in a body.
    let explain = async move |RawQuery(query): RawQuery, headers: HeaderMap| {
        let body = Bytes::from(query.and_then(|query| decode(&query)).unwrap_or_default());
        or_nothing(pass(&socket, Method::POST, "/v1/explain", &headers, body).await)
    };
    queries.route("/api/explain", get(explain))
}

fn of_cluster(cluster: &Arc<Cluster>) -> Router {
    let merged = QUERIES.iter().filter(|(path, _)| *path != EVENTS);
    let queries = merged.fold(Router::new(), |router, &(path, there)| {
        let cluster = Arc::clone(cluster);
        let query = async move |RawQuery(query): RawQuery| cluster.query(&with_query(there, query)).await;
        router.route(path, get(query))
    });
    let of_events = Arc::clone(cluster);
    let events = async move |headers: HeaderMap| {
        let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
        of_events.events(last)
    };
    let cluster = Arc::clone(cluster);
    let explain = async move |RawQuery(query): RawQuery| {
        let question = query.and_then(|query| decode(&query)).unwrap_or_default();
        or_nothing(cluster.explain(&question).await)
    };
    queries.route(EVENTS, get(events)).route("/api/explain", get(explain))
}

fn with_query(path: &str, query: Option<String>) -> String {
    query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"))
}

/// An agent without the query has nothing to explain: no error.
fn or_nothing(answer: Response) -> Response {
    if answer.status() == StatusCode::NOT_FOUND { StatusCode::NO_CONTENT.into_response() } else { answer }
}

/// Decodes `%xx` (RFC 3986); `None` if the result is no text.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first == b'%' {
            let (digits, after) = rest.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()?);
            rest = after;
        } else {
            bytes.push(first);
        }
    }
    String::from_utf8(bytes).ok()
}

async fn pass(socket: &Path, method: Method, path: &str, headers: &HeaderMap, body: Bytes) -> Response {
    let unreachable = |error: String| {
        let body = ErrorBody { code: "agent".to_owned(), error };
        (StatusCode::BAD_GATEWAY, Json(body)).into_response()
    };
    let mut request = Request::builder().method(method).uri(path).header(header::HOST, "bridge");
    for name in HEADERS {
        if let Some(value) = headers.get(&name) {
            request = request.header(name, value);
        }
    }
    let Ok(request) = request.body(Full::new(body)) else {
        let body =
            ErrorBody { code: "query".to_owned(), error: "the query is not a query string".to_owned() };
        return (StatusCode::BAD_REQUEST, Json(body)).into_response();
    };
    let answer = async { Client::connect(socket).await?.request(request).await }.await;
    match answer {
        Ok(answer) => {
            let kind = answer.headers().get(header::CONTENT_TYPE).cloned();
            let mut response = Response::builder().status(answer.status());
            if let Some(kind) = kind {
                response = response.header(header::CONTENT_TYPE, kind);
            }
            // A status and a header of another response are valid.
            response.body(Body::new(answer.into_body())).unwrap_or_default()
        }
        Err(error) => unreachable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_decoded() {
        assert_eq!(decode("%7B%22a%22:1%7d").as_deref(), Some("{\"a\":1}"));
        for bad in ["%", "%2", "%zz", "%ff"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }
}
