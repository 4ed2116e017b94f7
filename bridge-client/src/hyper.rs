//! A connector for clients of hyper: `hyper_util::client::legacy::Client::builder(..).build(..)`.
//!
//! ```no_run
//! use bridge_client::{Connector, hyper::HttpConnector};
//! use http_body_util::Empty;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let connector = HttpConnector::new(Connector::agent());
//! let client: Client<_, Empty<&'static [u8]>> = Client::builder(TokioExecutor::new()).build(connector);
//! let answer = client.get("http://192.168.31.67:8080/".parse()?).await?;
//! # drop(answer);
//! # Ok(())
//! # }
//! ```
//! A port belongs to a connection: the client's pool keeps both for as long as it keeps the connection alive.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http::{Uri, uri::Scheme};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tower_service::Service;

use crate::{
    Connector, Error,
    aio::{self, Stream},
};

/// Connects to the host and port of a URI from a port of the pool. TLS goes on top of it, as on hyper's own connector.
#[derive(Clone, Debug)]
pub struct HttpConnector {
    connector: Connector,
}

impl HttpConnector {
    /// A connector whose ports come from `connector`.
    #[must_use]
    pub const fn new(connector: Connector) -> Self {
        Self { connector }
    }
}

impl Service<Uri> for HttpConnector {
    type Response = TokioIo<Stream>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.connector.clone();
        Box::pin(async move { Ok(TokioIo::new(connect(&connector, &uri).await?)) })
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        (**self).connected()
    }
}

/// Tries the addresses of the host in their order.
async fn connect(connector: &Connector, uri: &Uri) -> Result<Stream, Error> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let default = if uri.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
    let addresses = tokio::net::lookup_host((host, uri.port_u16().unwrap_or(default))).await?;
    let mut last = None;
    for address in addresses {
        match aio::connect(connector, address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other(format!("{host} has no address")).into()))
}
