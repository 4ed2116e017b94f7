//! `GET /v1/routes`: every desired route with its state, and the next hops.

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};

use super::{
    Problem,
    openapi::{Operation, Routes},
};
use crate::state::{RouteList, Shared};

pub(super) fn routes() -> Routes {
    let operation =
        Operation::get::<RouteList>("routes", "Lists desired routes with their state, and the next hops");
    let operation = operation.error(StatusCode::CONFLICT, "The agent has no routes to look after");
    Routes::default().add("/v1/routes", operation, get(list))
}

async fn list(State(shared): State<Shared>) -> Response {
    let Some(view) = shared.routes() else {
        let text = "this agent has no routes: its configuration has no `routes`";
        return Problem::new(StatusCode::CONFLICT, "no-routes", text).into_response();
    };
    Json(RouteList::of(&view)).into_response()
}
