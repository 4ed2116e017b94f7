//! Examines the connection to the API server once, for `bridge-agent doctor`.

use std::{path::Path, time::Duration};

use jiff::Timestamp;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{Api, Client, api::PostParams, client::Body};
use serde_json::Value;

use super::{
    connect::{self, SERVICE_ACCOUNT, read_kubeconfig},
    resources::VERSION,
};
use crate::config::{GROUP, Kubernetes};
use crate::kernel::files::{MAX_SMALL, read_regular_text};

/// Time for all questions together: with the other checks of `doctor`, five seconds.
const DEADLINE: Duration = Duration::from_millis(2500);
/// What the agent lists and watches: group and resource (deploy/kubernetes/rbac.yaml).
const NEEDED: [(&str, &str); 5] =
    [("", "nodes"), ("", "pods"), ("", "namespaces"), (GROUP, "bridgepolicies"), (GROUP, "bridgenodes")];
/// The same, where the configuration has `namespacePolicies`.
const NAMESPACE_POLICIES: (&str, &str) = (GROUP, "bridgenamespacepolicies");
const VERBS: [&str; 2] = ["list", "watch"];

/// Facts about the connection to a cluster.
#[derive(Debug)]
pub(crate) struct Examination {
    /// The address of the API server.
    pub(crate) server: Option<String>,
    /// Seconds until the token expires; negative: since.
    pub(crate) token_left: Option<i64>,
    /// Facts that need an answer, or the reason why there is none.
    pub(crate) answer: Result<Answer, String>,
}

/// Facts that the API server has given.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Its version.
    pub(crate) version: String,
    /// Seconds that its clock is ahead of this machine's.
    pub(crate) skew: Option<i64>,
    /// Requests that it would refuse.
    pub(crate) denied: Result<Vec<String>, String>,
    /// Custom resources that are not defined.
    pub(crate) missing_definitions: Result<Vec<String>, String>,
}

/// Examines the cluster of a configuration.
pub(crate) async fn examine(section: &Kubernetes) -> Examination {
    let token_left = token(section).and_then(|token| seconds_left(&token));
    let (client, server) = match connect::connect(section).await {
        Ok(found) => found,
        Err(error) => return Examination { server: None, token_left, answer: Err(error.to_string()) },
    };
    let answer = match tokio::time::timeout(DEADLINE, ask(client, section.namespace_policies)).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {DEADLINE:?}")),
    };
    Examination { server: Some(server), token_left, answer }
}

async fn ask(client: Client, namespace_policies: bool) -> Result<Answer, String> {
    let request =
        |path: &str| hyper::Request::get(path).body(Body::empty()).map_err(|error| error.to_string());
    let response = client.send(request("/version")?).await.map_err(|error| error.to_string())?;
    let date =
        response.headers().get(hyper::header::DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
    let skew = date.and_then(|date| {
        let theirs = jiff::fmt::rfc2822::parse(&date).ok()?.timestamp();
        Some(theirs.as_second() - Timestamp::now().as_second())
    });
    let status = response.status();
    let body = response.into_body().collect_bytes().await.map_err(|error| error.to_string())?;
    let version: Value = serde_json::from_slice(&body).unwrap_or_default();
    if !status.is_success() {
        return Err(format!("{status}: {}", version["message"].as_str().unwrap_or("no reason given")));
    }
    let version = version["gitVersion"].as_str().unwrap_or("unknown").to_owned();
    let of_namespaces = namespace_policies.then_some(NAMESPACE_POLICIES);
    let needed: Vec<_> = NEEDED.into_iter().chain(of_namespaces).collect();
    let (denied, missing_definitions) =
        (denied(&client, &needed).await, missing_definitions(&client, &needed).await);
    let text = |error: kube::Error| error.to_string();
    Ok(Answer {
        version,
        skew,
        denied: denied.map_err(text),
        missing_definitions: missing_definitions.map_err(text),
    })
}

/// Requests of the agent that the server would refuse.
async fn denied(client: &Client, needed: &[(&str, &str)]) -> Result<Vec<String>, kube::Error> {
    let mut denied = Vec::new();
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    for (group, resource) in needed {
        for verb in VERBS {
            let attributes = ResourceAttributes {
                group: Some((*group).to_owned()),
                resource: Some((*resource).to_owned()),
                verb: Some(verb.to_owned()),
                ..ResourceAttributes::default()
            };
            let spec = SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes),
                ..SelfSubjectAccessReviewSpec::default()
            };
            let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
            let answer = reviews.create(&PostParams::default(), &review).await?;
            if !answer.status.is_some_and(|status| status.allowed) {
                denied.push(format!("{verb} {resource}"));
            }
        }
    }
    Ok(denied)
}

/// Custom resources of bridge that the server does not serve in the version of this agent.
async fn missing_definitions(client: &Client, needed: &[(&str, &str)]) -> Result<Vec<String>, kube::Error> {
    let groups = client.list_api_groups().await?;
    let group = groups.groups.iter().find(|group| group.name == GROUP);
    let versions: Vec<&str> =
        group.into_iter().flat_map(|group| &group.versions).map(|version| version.version.as_str()).collect();
    let own = needed.iter().filter(|(group, _)| *group == GROUP);
    let mut missing: Vec<String> = own.map(|(_, resource)| (*resource).to_owned()).collect();
    if versions.contains(&VERSION) {
        let found = client.list_api_group_resources(&format!("{GROUP}/{VERSION}")).await?;
        missing.retain(|name| !found.resources.iter().any(|resource| resource.name == *name));
    } else if !versions.is_empty() {
        let served = versions.join(", ");
        missing.iter_mut().for_each(|name| *name += &format!(" in version {VERSION} (served: {served})"));
    }
    Ok(missing)
}

/// The token that the agent sends.
fn token(section: &Kubernetes) -> Option<String> {
    let read = |path: &Path| Some(read_regular_text(path, MAX_SMALL).ok()?.trim().to_owned());
    let Some(path) = &section.kubeconfig else { return read(&Path::new(SERVICE_ACCOUNT).join("token")) };
    let file = read_kubeconfig(&path.0).ok()?;
    let wanted = section.context.as_ref().or(file.current_context.as_ref())?;
    let context = file.contexts.iter().find(|context| context.name == *wanted)?.context.as_ref()?;
    let user = context.user.as_ref()?;
    let user = file.auth_infos.iter().find(|info| info.name == *user)?.auth_info.as_ref()?;
    match &user.token_file {
        Some(path) => read(Path::new(path)),
        None => serde_json::to_value(user).ok()?["token"].as_str().map(str::to_owned),
    }
}

/// Seconds until a JSON Web Token expires (RFC 7519, 4.1.4).
fn seconds_left(token: &str) -> Option<i64> {
    let payload = base64url(token.split('.').nth(1)?)?;
    let claims: Value = serde_json::from_slice(&payload).ok()?;
    Some(claims["exp"].as_i64()? - Timestamp::now().as_second())
}

/// Decodes base64url without padding (RFC 4648, 5).
fn base64url(text: &str) -> Option<Vec<u8>> {
    let value = |byte: u8| {
        Some(match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        })
    };
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut buffer, mut bits) = (0u32, 0);
    for byte in text.trim_end_matches('=').bytes() {
        buffer = buffer << 6 | u32::from(value(byte)?);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((buffer >> bits).to_le_bytes()[0]);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_token_is_read() {
        // {"exp":1000000000}: 2001.
        let left = seconds_left("e30.eyJleHAiOjEwMDAwMDAwMDB9.c2ln").unwrap();
        assert!(left < -700_000_000, "{left}");
        assert_eq!(seconds_left("opaque"), None);
        assert_eq!(seconds_left("a.b.c"), None);
    }
}
