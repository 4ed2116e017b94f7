//! The query of a request: like axum's, with the error body of this API.

use axum::{
    extract::{FromRequestParts, Query as Inner},
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;

use super::Problem;
use crate::datapath::InvalidFilter;

/// A query without unknown keys and without values of the wrong form.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let bad = |text: String| Problem::new(StatusCode::BAD_REQUEST, "query", text);
        match Inner::try_from_uri(&parts.uri) {
            Ok(Inner(query)) => Ok(Self(query)),
            Err(rejection) => Err(bad(format!("the query is not understood: {}", rejection.body_text()))),
        }
    }
}

impl From<InvalidFilter> for Problem {
    fn from(error: InvalidFilter) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "query", error.to_string())
    }
}
