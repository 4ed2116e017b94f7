//! The result of a check.

use serde::Serialize;

/// Result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::cli) enum Outcome {
    Ok,
    Warn,
    Fail,
    NotRun,
}

impl Outcome {
    pub(super) const fn shown(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
            Self::NotRun => "NOT RUN",
        }
    }
}

/// A check and its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Finding {
    /// Its name, such as `forwarding.ip-forward`.
    pub(in crate::cli) check: &'static str,
    pub(in crate::cli) outcome: Outcome,
    /// Facts that were found, or the reason why the check was not run.
    pub(in crate::cli) seen: String,
    /// One line: the consequence and the remedy.
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    pub(in crate::cli) remedy: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Ok, seen: seen.into(), remedy: None }
    }

    pub(super) fn not_run(check: &'static str, reason: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::NotRun, seen: reason.into(), remedy: None }
    }

    pub(super) fn warn(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Warn, seen: seen.into(), remedy: Some(remedy.into()) }
    }

    pub(super) fn fail(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, outcome: Outcome::Fail, seen: seen.into(), remedy: Some(remedy.into()) }
    }
}
