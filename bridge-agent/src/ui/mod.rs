//! The page of `bridge-agent ui`: an unprivileged, read-only client of the agent's socket, or of every agent of a cluster.
//!
//! Serves embedded files and passes a fixed list of queries on to the agent. It listens on a loopback address; a token,
//! a check of the `Host` header and a content security policy keep other users, other sites and other pages out.

mod cluster;
mod files;
mod guard;
mod proxy;
mod source;

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::AtomicU64},
};

use axum::{Router, middleware, routing::get};
use bridge_common::filter::counters::Reason;
use tokio::net::TcpListener;

pub use self::source::Source;

use self::guard::Guard;
use crate::api::{Connections, pause};

/// Why the page cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The page is sent in clear text.
    #[error(
        "the page is not encrypted and {0} is no loopback address: write 127.0.0.1 or [::1], and forward the port with \
         `ssh -L 9470:127.0.0.1:9470`"
    )]
    NotLoopback(IpAddr),
    /// The address is in use, or not of this machine.
    #[error("cannot listen on {address}: {source}; choose another --listen")]
    Listen {
        address: SocketAddr,
        /// Error of the kernel.
        source: io::Error,
    },
}

/// A page that listens and is not served yet.
#[derive(Debug)]
pub struct Page {
    listener: TcpListener,
    router: Router,
    url: String,
}

impl Page {
    /// Listens, inside a tokio runtime.
    ///
    /// # Errors
    /// The address is not a loopback address, or is in use.
    pub async fn bind(address: SocketAddr, source: Source) -> Result<Self, Error> {
        if !address.ip().is_loopback() {
            return Err(Error::NotLoopback(address.ip()));
        }
        let failed = |source| Error::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let guard = Guard::new(address);
        let url = format!("http://{address}/#token={}", guard.token());
        Ok(Self { listener, router: router(source, guard), url })
    }

    /// Address to open in a browser; holds the token.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Serves until it is dropped. The connections of browsers have the limits of those of the agent's own socket.
    pub async fn serve(self) -> Infallible {
        let connections = Arc::new(Connections::new(Arc::new(AtomicU64::new(0))));
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => connections.serve(stream, None, &self.router),
                Err(error) => pause(&error).await,
            }
        }
    }
}

fn router(source: Source, guard: Guard) -> Router {
    let guard = Arc::new(guard);
    let is_cluster = matches!(source, Source::Cluster(_));
    let api = proxy::router(source)
        .route("/api/about", get(async move || about(is_cluster)))
        .layer(middleware::from_fn_with_state(Arc::clone(&guard), guard::with_token));
    files::router()
        .merge(api)
        .fallback(guard::not_found)
        .method_not_allowed_fallback(guard::not_allowed)
        .layer(middleware::from_fn_with_state(guard, guard::same_site))
}

/// Facts that the page shows and that no agent is asked for.
fn about(is_cluster: bool) -> axum::Json<serde_json::Value> {
    let reasons = Reason::ALL.iter().map(|reason| (reason.name().to_owned(), reason.text().into()));
    let reasons: serde_json::Map<String, serde_json::Value> = reasons.collect();
    axum::Json(
        serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "reasons": reasons, "cluster": is_cluster }),
    )
}
