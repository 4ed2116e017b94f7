//! The query of a request: like axum's, with the error body of this API.

use std::str::FromStr;

use axum::{
    extract::{FromRequestParts, Query as Inner},
    http::{StatusCode, request::Parts},
};
use ipnet::IpNet;
use serde::{
    Deserialize as _, Deserializer,
    de::{DeserializeOwned, Error},
};

use super::Problem;
use crate::{
    config::{HostOrNetwork, leaf::Leaf as _, ports::one_port, whole_number},
    datapath::InvalidFilter,
};

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

/// Reads a whole number as the configuration file has it.
pub(super) fn number<'de, D: Deserializer<'de>, T: FromStr>(deserializer: D) -> Result<Option<T>, D::Error> {
    whole_number(&String::deserialize(deserializer)?, 0).map(Some).map_err(D::Error::custom)
}

/// Reads a port.
pub(super) fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    one_port(&String::deserialize(deserializer)?).map(Some).map_err(D::Error::custom)
}

/// Reads an address or a network.
pub(super) fn network<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<IpNet>, D::Error> {
    let text = String::deserialize(deserializer)?;
    HostOrNetwork::parse(&text).map(|found| Some(found.net())).map_err(D::Error::custom)
}

/// Reads `true` or `false`.
pub(super) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    match String::deserialize(deserializer)?.as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        text => Err(D::Error::custom(format!("`{text}` is neither true nor false; write true or false"))),
    }
}

impl From<InvalidFilter> for Problem {
    fn from(error: InvalidFilter) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "query", error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use serde_json::Value;

    use super::*;
    use crate::{
        api::{FlowQuery, events::EventQuery, suggest::SuggestQuery},
        datapath::{FlowFilter, VerdictFilter},
    };

    async fn read<T: DeserializeOwned>(query: &str) -> Result<T, Problem> {
        let (mut parts, ()) = Request::get(format!("/?{query}")).body(()).unwrap().into_parts();
        Query::from_request_parts(&mut parts, &()).await.map(|Query(query)| query)
    }

    /// Reads the query of a path, as its handler does.
    async fn check(path: &str, query: &str) -> Result<(), Problem> {
        match path {
            "/v1/flows" => {
                let FlowQuery { address, port, state, protocol, .. } = read(query).await?;
                FlowFilter { address, port, state, protocol }.checked()?;
            }
            "/v1/events" => {
                let EventQuery { verdict, address, port, .. } = read(query).await?;
                VerdictFilter { verdict, address, port }.checked()?;
            }
            "/v1/suggest" => drop(read::<SuggestQuery>(query).await?),
            path => panic!("write {path} here"),
        }
        Ok(())
    }

    #[tokio::test]
    async fn every_parameter_of_every_path_refuses_odd_values() {
        const ODD: [&str; 22] = [
            "",
            "%20",
            "080",
            "%2B80",
            "-1",
            "0x50",
            "1e3",
            "1.5",
            "80%20",
            "8_0",
            "99999999999999999999",
            "%D9%A3",
            "null",
            "[]",
            "010.0.0.0/8",
            "10.0.0.0/08",
            "10.0.0.1/8",
            "::ffff:10.0.0.1",
            "yes",
            "True",
            "%00",
            "nonsense",
        ];
        let document = crate::api::document();
        let mut seen = 0;
        for (path, methods) in document["paths"].as_object().unwrap() {
            let parameters = methods["get"]["parameters"].as_array().into_iter().flatten();
            for parameter in parameters.filter(|one| one["in"] == "query") {
                let name = parameter["name"].as_str().unwrap();
                seen += 1;
                for odd in ODD {
                    let said = check(path, &format!("{name}={odd}")).await;
                    let said = format!("{:?}", said.expect_err(&format!("{path}?{name}={odd}")));
                    assert!(said.contains("write "), "{path}?{name}={odd}: {said}");
                }
                let valid = match (name, &parameter["schema"]["type"]) {
                    ("address", _) => "10.0.0.1",
                    ("state", _) => "established",
                    ("protocol", _) => "tcp",
                    ("verdict", _) => "drop",
                    (_, Value::String(kind)) if kind == "boolean" => "true",
                    _ => "80",
                };
                check(path, &format!("{name}={valid}"))
                    .await
                    .unwrap_or_else(|said| panic!("{path}?{name}: {said:?}"));
                for wrong in
                    [format!("{name}={valid}&{name}={valid}"), format!("{}={valid}", name.to_uppercase())]
                {
                    assert!(check(path, &wrong).await.is_err(), "{path}?{wrong}");
                }
            }
        }
        assert!(seen >= 12, "{seen}");
        for path in ["/v1/flows", "/v1/events"] {
            for port in ["0", "65536"] {
                assert!(check(path, &format!("port={port}")).await.is_err());
            }
        }
    }
}
