//! Talks to a running agent.

use std::{
    io,
    path::{Path, PathBuf},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

use super::ErrorBody;

/// Why the agent did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No process listens.
    #[error("no agent answers on {}: {source}. Is it running (`systemctl status bridge-agent`)? Is --socket right?", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the agent has closed the connection: {0}")]
    Connection(#[from] hyper::Error),
    /// The agent refused.
    #[error("{0}")]
    Refused(String),
    /// The agent speaks another language.
    #[error("the agent's answer is not understood, its version differs from this program's: {0}")]
    Answer(#[from] serde_json::Error),
}

/// A connection to an agent.
#[derive(Debug)]
pub struct Client {
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Client {
    /// Connects, inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`Error::NotRunning`].
    pub async fn connect(socket: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| Error::NotRunning { path: socket.to_owned(), source })?;
        Self::over(stream).await
    }

    /// Talks to the agent at the other end of a stream.
    ///
    /// # Errors
    ///
    /// [`Error::Connection`].
    pub(crate) async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self, Error> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the agent");
            }
        });
        Ok(Self { sender })
    }

    /// Asks for something.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        let body = self.send(Method::GET, path, Bytes::new()).await?.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, Error> {
        let body = Bytes::from(serde_json::to_vec(body)?);
        let body = self.send(Method::POST, path, body).await?.into_body().collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    }

    /// Ends something; the answer has no body.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn delete(&mut self, path: &str) -> Result<(), Error> {
        self.send(Method::DELETE, path, Bytes::new()).await.map(drop)
    }

    /// Asks for something that goes on, a line at a time. `visit` returns whether to go on.
    ///
    /// # Errors
    ///
    /// See [`Error`], and the errors of `visit`.
    pub async fn lines<E: From<Error>>(
        &mut self,
        path: &str,
        mut visit: impl FnMut(&[u8]) -> Result<bool, E>,
    ) -> Result<(), E> {
        let mut body = self.send(Method::GET, path, Bytes::new()).await?.into_body();
        let mut buffer = BytesMut::new();
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame.map_err(Error::from)?.into_data() {
                buffer.extend_from_slice(&data);
            }
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                if !visit(&line[..end])? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Sends a request and returns the answer, also one that refuses.
    ///
    /// # Errors
    /// [`Error::Connection`].
    pub(crate) async fn request(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, Error> {
        Ok(self.sender.send_request(request).await?)
    }

    async fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Error> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().map_err(|_| Error::Refused(format!("{path} is no path")))?;
        request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("bridge"));
        let response = self.sender.send_request(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status: StatusCode = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let text = serde_json::from_slice(&body)
            .map_or_else(|_| status.to_string(), |ErrorBody { error, .. }| error);
        Err(Error::Refused(text))
    }
}
