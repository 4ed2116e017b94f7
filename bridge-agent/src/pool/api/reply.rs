//! What goes wrong, as an answer.

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use bridge_common::pool::Refusal;
use serde_json::json;

use super::super::service::ServiceError;

/// An error with its status: `{"code": "...", "error": "..."}`.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    code: &'static str,
    text: String,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, text: impl Into<String>) -> Self {
        Self { status, code, text: text.into() }
    }
}

impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        let (status, code) = match error {
            ServiceError::NotADestination { .. } => (StatusCode::BAD_REQUEST, "destination"),
            ServiceError::TooMany { .. } => (StatusCode::BAD_REQUEST, "request"),
            ServiceError::Stranger => (StatusCode::FORBIDDEN, "stranger"),
            ServiceError::Refused(Refusal::QUOTA) => (StatusCode::TOO_MANY_REQUESTS, "quota"),
            ServiceError::Refused(refusal) => (StatusCode::CONFLICT, refusal.name()),
            ServiceError::NoLease(_) => (StatusCode::NOT_FOUND, "lease"),
            ServiceError::NotYours(_) => (StatusCode::FORBIDDEN, "lease"),
        };
        Self { status, code, text: error.to_string() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.status, axum::Json(json!({ "code": self.code, "error": self.text }))).into_response()
    }
}
