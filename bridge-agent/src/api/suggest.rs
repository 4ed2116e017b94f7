//! `GET /v1/suggest`: rules for connections that were denied, or would have been.

use std::time::Duration;

use axum::{extract::State, http::StatusCode, response::Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Problem,
    large::Turn,
    no_ebpf,
    openapi::Operation,
    query::{self, Query},
};
use crate::{
    explain::{Choice, Suggestion, suggest as suggested},
    state::Shared,
};

/// The query of `GET /v1/suggest`.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SuggestQuery {
    /// See [`Choice::include_denied`].
    #[serde(deserialize_with = "query::flag")]
    include_denied: bool,
    /// See [`Choice::include_ephemeral`].
    #[serde(deserialize_with = "query::flag")]
    include_ephemeral: bool,
    /// Only connections that were seen within this number of seconds.
    #[serde(deserialize_with = "query::number")]
    since_seconds: Option<u64>,
}

/// The answer of `GET /v1/suggest`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SuggestAnswer {
    /// Rules, and connections without one.
    #[serde(flatten)]
    pub suggestion: Suggestion,
    /// Events that were not sent since the maps were made (`enforcement.events.rate`, or no reader). The connections of these
    /// events are counted all the same.
    #[serde(default)]
    pub suppressed_events: u64,
    /// Classes of connections that made room for others, since the maps were made.
    pub evicted: u64,
}

pub(super) fn operation() -> Operation {
    Operation::get::<SuggestAnswer>("suggest", "Suggests rules for connections that were denied")
        .query::<SuggestQuery>()
        .error(
            StatusCode::CONFLICT,
            "The agent does not enforce by eBPF, or a rule of the policy denies the connections",
        )
        .large()
}

pub(super) async fn suggest(
    State(shared): State<Shared>,
    Query(query): Query<SuggestQuery>,
    turn: Turn,
) -> Result<Response, Problem> {
    let (maps, active) = (shared.maps().ok_or_else(no_ebpf)?, shared.active().ok_or_else(no_ebpf)?);
    let SuggestQuery { include_denied, include_ephemeral, since_seconds } = query;
    turn.json(move || {
        let (denials, evicted) = maps.denials(since_seconds.map(Duration::from_secs))?;
        let suggestion =
            suggested(&active.policy, &denials, Choice { include_denied, include_ephemeral });
        if let Some(denial) = suggestion.replay(&active.policy, &denials).first() {
            let class = &denial.class;
            let text = format!(
                "the rules would not let {} {} {} port {} pass: a rule of the policy denies it; remove that first",
                class.protocol, class.external, class.pod, class.port
            );
            return Err(Problem::new(StatusCode::CONFLICT, "replay", text));
        }
        Ok(SuggestAnswer { suggestion, suppressed_events: maps.suppressed_events()?, evicted })
    })
    .await
}
