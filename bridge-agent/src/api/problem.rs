//! The one error body of the API: `{"code": "...", "error": "..."}`.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bridge_common::pool::Refusal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pool::service::ServiceError;

/// An error with its HTTP status.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    code: &'static str,
    text: String,
}

/// The body of an error.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// For programs; stable.
    pub code: String,
    /// For people.
    pub error: String,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, text: impl Into<String>) -> Self {
        Self { status, code, text: text.into() }
    }

    /// The run loop has ended.
    pub(super) fn stopping() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the agent is stopping; ask the next one")
    }
}

/// The answer of an agent that enforces nothing.
pub(super) fn no_engine() -> Problem {
    Problem::new(StatusCode::CONFLICT, "no-engine", "this agent enforces no rules: role is host")
}

/// The counters of a packet filter cannot be read.
pub(super) fn unreadable(why: String) -> Problem {
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "kernel", why)
}

/// The answer of an agent that does not enforce by eBPF.
pub(super) fn no_ebpf() -> Problem {
    let text = "this agent does not enforce by eBPF: role is host, or engines leave it out";
    Problem::new(StatusCode::CONFLICT, "no-ebpf", text)
}

impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        let (status, code) = match error {
            ServiceError::NotADestination { .. } => (StatusCode::BAD_REQUEST, "destination"),
            ServiceError::TooMany { .. } => (StatusCode::BAD_REQUEST, "request"),
            ServiceError::Stranger => (StatusCode::FORBIDDEN, "stranger"),
            ServiceError::Refused(Refusal::QUOTA) => (StatusCode::TOO_MANY_REQUESTS, "quota"),
            ServiceError::Share { .. } => (StatusCode::TOO_MANY_REQUESTS, "share"),
            ServiceError::Refused(refusal) => (StatusCode::CONFLICT, refusal.name()),
            ServiceError::NoLease(_) => (StatusCode::NOT_FOUND, "lease"),
            ServiceError::NotYours(_) => (StatusCode::FORBIDDEN, "lease"),
        };
        Self { status, code, text: error.to_string() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody { code: self.code.to_owned(), error: self.text })).into_response()
    }
}
