//! `POST /v1/apply`, `/v1/confirm`, `/v1/revert`: a configuration comes into force through the agent, on trial or for
//! good.

use std::time::Duration;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    agent::{Applied, ApplyError, LONGEST_TRIAL, MOST_PROBES, Order, Probe, Request, SHORTEST_TRIAL, Shared},
    pool::api::Problem,
};

/// A configuration of a million rules, and some.
const MAX_BODY: usize = 512 << 20;

/// What `POST /v1/apply` takes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Apply {
    /// The text of a configuration file.
    pub config: String,
    /// How long it is in force unless it is confirmed; left out: for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_ms: Option<u64>,
    /// Who has to answer for it to be confirmed by itself: `tcp://HOST:PORT`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<String>,
}

pub(super) fn router() -> Router<Shared> {
    Router::new()
        .route("/v1/apply", post(apply).layer(DefaultBodyLimit::max(MAX_BODY)))
        .route("/v1/confirm", post(async |State(shared)| ask(&shared, Request::Confirm).await))
        .route("/v1/revert", post(async |State(shared)| ask(&shared, Request::Revert).await))
}

async fn apply(State(shared): State<Shared>, body: Bytes) -> Response {
    match order(&body) {
        Ok(order) => ask(&shared, |answer| Request::Apply(Box::new(order), answer)).await,
        Err(text) => Problem::new(StatusCode::BAD_REQUEST, "request", text).into_response(),
    }
}

pub(crate) fn order(body: &[u8]) -> Result<Order, String> {
    let Apply { config, confirm_ms, probes } = serde_json::from_slice(body).map_err(|error| {
        format!(
            "the body is not what is expected: {error}; for example {{\"config\": \"role: node\\n...\", \"confirmMs\": 60000}}"
        )
    })?;
    let confirm = confirm_ms.map(Duration::from_millis);
    if confirm.is_some_and(|time| !(SHORTEST_TRIAL..=LONGEST_TRIAL).contains(&time)) {
        let (least, most) = (SHORTEST_TRIAL.as_millis(), LONGEST_TRIAL.as_millis());
        return Err(format!("confirmMs is not between {least} and {most}"));
    }
    if confirm.is_none() && !probes.is_empty() {
        return Err("probes confirm what is on trial: say for how long with confirmMs".into());
    }
    if probes.len() > MOST_PROBES {
        return Err(format!("{} probes are more than {MOST_PROBES}", probes.len()));
    }
    let probes = probes.iter().map(|probe| probe.parse::<Probe>()).collect::<Result<_, _>>()?;
    Ok(Order { config, confirm, probes })
}

async fn ask(
    shared: &Shared,
    request: impl FnOnce(oneshot::Sender<Result<Applied, ApplyError>>) -> Request,
) -> Response {
    let stopping = || {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the agent is stopping; ask the next one")
            .into_response()
    };
    let (answer, result) = oneshot::channel();
    if shared.requests.send(request(answer)).await.is_err() {
        return stopping();
    }
    match result.await {
        Ok(Ok(applied)) => Json(applied).into_response(),
        Ok(Err(error)) => Problem::from(error).into_response(),
        Err(_) => stopping(),
    }
}

impl From<ApplyError> for Problem {
    fn from(error: ApplyError) -> Self {
        let (status, code) = match &error {
            ApplyError::Config(_) => (StatusCode::UNPROCESSABLE_ENTITY, "config"),
            ApplyError::Refused(_) => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
            ApplyError::NoWayBack(_) => (StatusCode::UNPROCESSABLE_ENTITY, "no-way-back"),
            ApplyError::OnTrial(_) => (StatusCode::CONFLICT, "on-trial"),
            ApplyError::NoTrial => (StatusCode::CONFLICT, "no-trial"),
            ApplyError::NotInForce(_) | ApplyError::FileChanged(_) => (StatusCode::CONFLICT, "file"),
            ApplyError::Write(_) => (StatusCode::INTERNAL_SERVER_ERROR, "file"),
            ApplyError::Datapath(_) | ApplyError::NotTakenBack(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "kernel")
            }
        };
        Self::new(status, code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_that_mean_nothing_are_refused_with_what_to_write_instead() {
        for (body, complaint) in [
            ("", "for example"),
            (r#"{"confirmMs":1000}"#, "config"),
            (r#"{"config":"","confirmms":1000}"#, "confirmms"),
            (r#"{"config":"","confirmMs":999}"#, "between 1000 and 86400000"),
            (r#"{"config":"","confirmMs":86400001}"#, "between 1000 and 86400000"),
            (r#"{"config":"","probes":["tcp://x:1"]}"#, "confirmMs"),
            (r#"{"config":"","confirmMs":1000,"probes":["x:1"]}"#, "tcp://HOST:PORT"),
        ] {
            let error = order(body.as_bytes()).unwrap_err();
            assert!(error.contains(complaint), "{body}: {error}");
        }
        let probes = vec!["tcp://x:1"; MOST_PROBES + 1];
        let body = serde_json::json!({ "config": "", "confirmMs": 1000, "probes": probes });
        assert!(order(body.to_string().as_bytes()).unwrap_err().contains("more than 16"));
        let body = br#"{"config":"role: node","confirmMs":60000,"probes":["tcp://192.168.31.67:22"]}"#;
        let order = order(body).unwrap();
        assert_eq!((order.confirm, order.probes.len()), (Some(Duration::from_secs(60)), 1));
    }
}
