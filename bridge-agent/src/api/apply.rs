//! `POST /v1/apply`, `/v1/confirm`, `/v1/revert`: applies a configuration, for good or on trial.

use std::time::Duration;

use axum::{
    Json,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    routing::post,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{
    Problem,
    large::Payload,
    openapi::{Method, Operation, Routes},
};
use crate::state::{
    Applied, ApplyError, ApplyRequest, InvalidProbe, MAX_PROBES, MAX_TRIAL, MIN_TRIAL, Probe, Request, Shared,
};

/// Bytes of a body: room for a configuration of a million rules.
const MAX_BODY: usize = 512 << 20;

/// The body of `POST /v1/apply`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Apply {
    /// The text of a configuration file.
    pub config: String,
    /// Length of the trial in milliseconds; left out: apply it for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_ms: Option<u64>,
    /// Probes that confirm the trial when all have answered: `tcp://HOST:PORT`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<String>,
}

/// Returns the routes of trials.
pub(super) fn routes() -> Routes {
    let operation = |id, summary| {
        Operation::new(Method::Post, id, summary)
            .answers::<Applied>(StatusCode::OK)
            .error(StatusCode::CONFLICT, "There is a trial, or none, or the file has changed")
            .error(StatusCode::INTERNAL_SERVER_ERROR, "The kernel refuses, or the file cannot be written")
            .error(StatusCode::SERVICE_UNAVAILABLE, "The agent is stopping")
    };
    let apply_text = "Applies a configuration and makes it the agent's configuration file. With confirmMs it is on trial: \
                      the former one comes back after that time unless it is confirmed, in eBPF by the kernel itself";
    let applied = operation("apply", apply_text)
        .body::<Apply>()
        .error(StatusCode::UNPROCESSABLE_ENTITY, "The configuration is refused");
    let confirmed = operation("confirm", "Makes the configuration on trial permanent");
    let reverted = operation("revert", "Goes back to the configuration before the trial");
    Routes::default()
        .add("/v1/apply", applied, post(apply).layer(DefaultBodyLimit::max(MAX_BODY)))
        .add("/v1/confirm", confirmed, post(async |State(shared)| ask(&shared, Request::Confirm).await))
        .add("/v1/revert", reverted, post(async |State(shared)| ask(&shared, Request::Revert).await))
}

async fn apply(State(shared): State<Shared>, Payload(body): Payload) -> Result<Json<Applied>, Problem> {
    let request = parse(&body)?;
    ask(&shared, |answer| Request::Apply(Box::new(request), answer)).await
}

/// A body of `POST /v1/apply` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvalidApply {
    #[error(
        "the body is not valid: {0}; for example {{\"config\": \"role: node\\n...\", \"confirmMs\": 60000}}"
    )]
    Json(#[from] serde_json::Error),
    #[error("confirmMs is not between {} and {}", MIN_TRIAL.as_millis(), MAX_TRIAL.as_millis())]
    Time,
    #[error("probes confirm a trial: set its time with confirmMs")]
    ProbesWithoutTrial,
    #[error("{0} probes are more than {MAX_PROBES}")]
    TooManyProbes(usize),
    #[error(transparent)]
    Probe(#[from] InvalidProbe),
}

impl From<InvalidApply> for Problem {
    fn from(error: InvalidApply) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "request", error.to_string())
    }
}

/// Reads the body of `POST /v1/apply`.
pub(crate) fn parse(body: &[u8]) -> Result<ApplyRequest, InvalidApply> {
    let Apply { config, confirm_ms, probes } = serde_json::from_slice(body)?;
    let confirm = confirm_ms.map(Duration::from_millis);
    if confirm.is_some_and(|time| !(MIN_TRIAL..=MAX_TRIAL).contains(&time)) {
        return Err(InvalidApply::Time);
    }
    if confirm.is_none() && !probes.is_empty() {
        return Err(InvalidApply::ProbesWithoutTrial);
    }
    if probes.len() > MAX_PROBES {
        return Err(InvalidApply::TooManyProbes(probes.len()));
    }
    let probes = probes.iter().map(|probe| probe.parse::<Probe>()).collect::<Result<_, _>>()?;
    Ok(ApplyRequest { config, confirm, probes })
}

async fn ask(
    shared: &Shared,
    request: impl FnOnce(oneshot::Sender<Result<Applied, ApplyError>>) -> Request,
) -> Result<Json<Applied>, Problem> {
    let (answer, result) = oneshot::channel();
    shared.requests.send(request(answer)).await.map_err(|_| Problem::stopping())?;
    Ok(Json(result.await.map_err(|_| Problem::stopping())??))
}

impl From<ApplyError> for Problem {
    fn from(error: ApplyError) -> Self {
        let (status, code) = match &error {
            ApplyError::Config(_) => (StatusCode::UNPROCESSABLE_ENTITY, "config"),
            ApplyError::Refused(_) => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
            ApplyError::NoWayBack(_) => (StatusCode::UNPROCESSABLE_ENTITY, "no-way-back"),
            ApplyError::OnTrial(_) => (StatusCode::CONFLICT, "on-trial"),
            ApplyError::NoTrial => (StatusCode::CONFLICT, "no-trial"),
            ApplyError::FileNotActive(_) | ApplyError::FileChanged(_) => (StatusCode::CONFLICT, "file"),
            ApplyError::Write(_) => (StatusCode::INTERNAL_SERVER_ERROR, "file"),
            ApplyError::Kernel(_) | ApplyError::NotReverted(_) => {
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
    fn invalid_bodies_are_refused_with_a_remedy() {
        for (body, complaint) in [
            ("", "for example"),
            (r#"{"confirmMs":1000}"#, "config"),
            (r#"{"config":"","confirmms":1000}"#, "confirmms"),
            (r#"{"config":"","confirmMs":999}"#, "between 1000 and 86400000"),
            (r#"{"config":"","confirmMs":86400001}"#, "between 1000 and 86400000"),
            (r#"{"config":"","probes":["tcp://x:1"]}"#, "confirmMs"),
            (r#"{"config":"","confirmMs":1000,"probes":["x:1"]}"#, "tcp://HOST:PORT"),
        ] {
            let error = parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(complaint), "{body}: {error}");
        }
        let probes = vec!["tcp://x:1"; MAX_PROBES + 1];
        let body = serde_json::json!({ "config": "", "confirmMs": 1000, "probes": probes });
        assert!(parse(body.to_string().as_bytes()).unwrap_err().to_string().contains("more than 16"));
        let body = br#"{"config":"role: node","confirmMs":60000,"probes":["tcp://192.168.31.67:22"]}"#;
        let request = parse(body).unwrap();
        assert_eq!((request.confirm, request.probes.len()), (Some(Duration::from_secs(60)), 1));
    }
}
