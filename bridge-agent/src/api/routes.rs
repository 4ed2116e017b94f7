//! `GET /v1/routes`: every route that is wanted, what became of it, and the nodes on the way.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};

use super::failure;
use crate::agent::{RouteList, Shared};

pub(super) fn router() -> Router<Shared> {
    Router::new().route("/v1/routes", get(routes))
}

async fn routes(State(shared): State<Shared>) -> Response {
    let Some(view) = shared.routes() else {
        return failure(
            StatusCode::CONFLICT,
            "this agent looks after no routes: its configuration has no `routes`",
        );
    };
    Json(RouteList::of(&view)).into_response()
}
