//! `check --expect`: connections with the verdict that a policy is to have on them.

use serde::{Deserialize, Serialize};

use super::{Explanation, Offline, ParseError, Protocol, Request, Verdict, explain};

/// The version of the format.
pub const VERSION: u32 = 1;

/// A file of cases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cases {
    /// [`VERSION`].
    pub version: u32,
    /// The cases, in order.
    pub cases: Vec<Case>,
}

/// A connection with its expected verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Case {
    /// Shown where it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `ADDRESS` or `ADDRESS:PORT`.
    pub from: String,
    /// `ADDRESS:PORT`, or `ADDRESS` for ICMP.
    pub to: String,
    /// Left out: `tcp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Left out: any that the client may get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// The address behind `to`, if the node translates it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// The verdict of the rules, whatever the mode.
    pub expect: Expect,
    /// The rule that decides. Left out: any, or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

/// An expected verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// A rule allows it.
    Allow,
    /// A rule denies it, or none allows it.
    Deny,
    /// Rules do not judge it.
    Unjudged,
}

impl Expect {
    const fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Unjudged => "unjudged",
        }
    }

    const fn fits(self, verdict: Verdict) -> bool {
        matches!(
            (self, verdict),
            (Self::Allow, Verdict::Allow)
                | (Self::Deny, Verdict::Deny | Verdict::Audit)
                | (Self::Unjudged, Verdict::Unjudged)
        )
    }
}

/// Why cases cannot be checked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CasesError {
    /// The text is no file of cases.
    #[error("{0}; docs/operations.md describes the format")]
    Format(String),
    /// The file is of another version.
    #[error("the file has version {0}, and this program reads version {VERSION}: write `version: {VERSION}`")]
    Version(u32),
    /// There is nothing to check.
    #[error("the list of cases is empty: write a case")]
    Empty,
    /// A case that is no connection.
    #[error("case {number}{}: {source}", .name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default())]
    Case {
        /// From 1.
        number: usize,
        name: Option<String>,
        /// The fault.
        source: ParseError,
    },
}

/// A case whose verdict or rule is not the expected one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// From 1.
    pub number: usize,
    /// Name of the case.
    pub name: Option<String>,
    /// Verdict, and rule, as expected.
    pub expected: String,
    /// Verdict, and rule, as found.
    pub found: String,
    /// The explanation of the connection.
    pub explanation: Explanation,
}

impl Cases {
    /// Reads a file of cases.
    ///
    /// # Errors
    /// See [`CasesError`].
    pub fn parse(text: &str) -> Result<Self, CasesError> {
        #[derive(Deserialize)]
        struct Head {
            version: Option<u32>,
        }
        // A file of another version may have other keys.
        if let Ok(Head { version: Some(version) }) = serde_saphyr::from_str(text)
            && version != VERSION
        {
            return Err(CasesError::Version(version));
        }
        let one_line = |error: serde_saphyr::Error| {
            CasesError::Format(error.to_string().lines().next().unwrap_or_default().to_owned())
        };
        let cases: Self = serde_saphyr::from_str(text).map_err(one_line)?;
        if cases.cases.is_empty() { Err(CasesError::Empty) } else { Ok(cases) }
    }

    /// Returns the cases that differ.
    ///
    /// # Errors
    /// A case is no connection.
    pub fn check(&self, node: &Offline) -> Result<Vec<Difference>, CasesError> {
        let mut differences = Vec::new();
        for (number, case) in (1..).zip(&self.cases) {
            let request = Request {
                protocol: case.protocol,
                source_port: case.source_port,
                backend: case.backend.clone(),
                ..Request::new(&case.from, &case.to)
            };
            let question = request.resolve(&()).map_err(|source| CasesError::Case {
                number,
                name: case.name.clone(),
                source,
            })?;
            let explanation = node.with_facts(&question, |facts| explain(facts, &question));
            let fits = case.expect.fits(explanation.verdict)
                && case.rule.as_ref().is_none_or(|rule| Some(rule) == explanation.rule.as_ref());
            if fits {
                continue;
            }
            let of = |verdict: &str, rule: &Option<String>| match rule {
                Some(rule) => format!("{verdict} by {rule}"),
                None => verdict.to_owned(),
            };
            differences.push(Difference {
                number,
                name: case.name.clone(),
                expected: of(case.expect.name(), &case.rule),
                found: of(explanation.verdict.name(), &explanation.rule),
                explanation,
            });
        }
        Ok(differences)
    }
}
