//! `GET /v1/routes`: every desired route with its state, and the next hops.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};

use super::Problem;
use crate::state::{RouteList, Shared};

pub(super) fn router() -> Router<Shared> {
    Router::new().route("/v1/routes", get(routes))
}

async fn routes(State(shared): State<Shared>) -> Response {
    let Some(view) = shared.routes() else {
        let text = "this agent has no routes: its configuration has no `routes`";
        return Problem::new(StatusCode::CONFLICT, "no-routes", text).into_response();
    };
    Json(RouteList::of(&view)).into_response()
}
