//! Refusals: requests of other sites, without the token, that would write, or to unknown paths.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use sha2::{Digest as _, Sha256};

use crate::api::ErrorBody;

/// Scripts, styles and connections of this origin alone; no other page may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Knows the token and the names of this page.
#[derive(Debug)]
pub(super) struct Guard {
    token: String,
    /// Values of the `Host` header: a site whose name resolves to this machine has another one.
    hosts: Vec<String>,
}

impl Guard {
    pub(super) fn new(address: SocketAddr) -> Self {
        let token = format!("{:032x}", rand::random::<u128>());
        let mut hosts = vec![address.to_string(), format!("localhost:{}", address.port())];
        // Browsers leave the default port out.
        let short: Vec<_> =
            hosts.iter().filter_map(|host| Some(host.strip_suffix(":80")?.to_owned())).collect();
        hosts.extend(short);
        Self { token, hosts }
    }

    pub(super) fn token(&self) -> &str {
        &self.token
    }

    /// Judges each name of the site: one `Host` header, and that of a request for a whole URL.
    fn admits_host(&self, uri: &Uri, headers: &HeaderMap) -> bool {
        let own = |host: &str| self.hosts.iter().any(|own| own.eq_ignore_ascii_case(host));
        let mut values = headers.get_all(header::HOST).iter();
        let host = values.next().and_then(|host| host.to_str().ok());
        values.next().is_none()
            && host.is_some_and(own)
            && uri.authority().is_none_or(|authority| own(authority.as_str()))
    }

    /// Compares digests, so that the time does not depend on the token.
    fn admits_token(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        Sha256::digest(given) == Sha256::digest(&self.token)
    }
}

fn refuse(status: StatusCode, code: &str, error: &str) -> Response {
    (status, Json(ErrorBody { code: code.to_owned(), error: error.to_owned() })).into_response()
}

pub(super) async fn same_site(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let mut response = if !guard.admits_host(request.uri(), request.headers()) {
        let text = "the Host header names another site; open the address that `bridge-agent ui` printed";
        refuse(StatusCode::MISDIRECTED_REQUEST, "host", text)
    } else if request.method() != Method::GET {
        not_allowed().await
    } else {
        next.run(request).await
    };
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

pub(super) async fn with_token(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    if guard.admits_token(request.headers()) {
        return next.run(request).await;
    }
    let text = "the token is missing or wrong; open the address that `bridge-agent ui` printed";
    refuse(StatusCode::UNAUTHORIZED, "token", text)
}

pub(super) async fn not_allowed() -> Response {
    refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "the page only reads: use GET")
}

pub(super) async fn not_found() -> Response {
    refuse(StatusCode::NOT_FOUND, "path", "the page has no such path")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browsers_leave_out_the_default_port() {
        for (address, host, admitted) in [
            ("127.0.0.1:80", "127.0.0.1", true),
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("[::1]:80", "[::1]", true),
            ("127.0.0.1:80", "localhost", true),
            ("127.0.0.1:9480", "127.0.0.1:94", false),
            ("127.0.0.1:9470", "127.0.0.1", false),
        ] {
            let headers = HeaderMap::from_iter([(header::HOST, HeaderValue::from_static(host))]);
            assert_eq!(
                Guard::new(address.parse().unwrap()).admits_host(&Uri::default(), &headers),
                admitted,
                "{address} {host}"
            );
        }
    }
}
