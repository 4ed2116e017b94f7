//! Large answers: made outside the API's thread, sent in chunks as the client takes them, and few at a time.

use std::{
    fmt, io,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::{FromRequest, FromRequestParts, Request},
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use futures_util::stream;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{Problem, connections::LargeAnswers};
use crate::kernel::memory;

/// Bytes of a chunk. One is being made and one waits while a third is being sent.
const CHUNK: usize = 64 << 10;
/// A client that has not taken the whole answer after this time is disconnected.
const WHOLE_ANSWER: Duration = Duration::from_secs(60);
/// How long a request waits for its turn.
const TURN: Duration = Duration::from_secs(5);
/// A body that has not arrived after this time is refused.
const WHOLE_BODY: Duration = Duration::from_secs(10);

/// The turn of a request with a large answer.
pub(super) struct Turn(OwnedSemaphorePermit);

impl<S: Sync> FromRequestParts<S> for Turn {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let busy = || {
            let text = "the agent sends a large answer to another client; ask again later";
            Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", text)
        };
        let LargeAnswers(semaphore) = parts.extensions.get().cloned().unwrap_or_default();
        let permit = tokio::time::timeout(TURN, semaphore.acquire_owned()).await;
        permit.ok().and_then(Result::ok).map(Self).ok_or_else(busy)
    }
}

impl Turn {
    /// Reads something and answers with what `write` makes of it, both outside this thread.
    pub(super) async fn answer<T: Send + 'static>(
        self,
        content_type: &'static str,
        read: impl FnOnce() -> Result<T, Problem> + Send + 'static,
        write: impl FnOnce(T, &mut Chunks) -> io::Result<()> + Send + 'static,
    ) -> Result<Response, Problem> {
        let (sender, receiver) = mpsc::channel(1);
        let (begin, begun) = oneshot::channel();
        let Self(permit) = self;
        tokio::task::spawn_blocking(move || {
            let value = match read() {
                Ok(value) => value,
                // The client may be gone.
                Err(problem) => return drop(begin.send(Err(problem))),
            };
            let deadline = Instant::now() + WHOLE_ANSWER;
            let buffer = Vec::with_capacity(CHUNK);
            let mut chunks = Chunks { begin: Some(begin), sender, buffer, deadline };
            let written = write(value, &mut chunks);
            chunks.end(written);
            // Before the turn of the next one.
            memory::trim();
            drop(permit);
        });
        let stopped = |_| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "agent", "the answer failed");
        let body = match begun.await.map_err(stopped)?? {
            Some(whole) => Body::from(whole),
            None => Body::from_stream(stream::unfold(
                receiver,
                async |mut receiver: mpsc::Receiver<io::Result<Bytes>>| {
                    Some((receiver.recv().await?, receiver))
                },
            )),
        };
        Ok(([(header::CONTENT_TYPE, content_type)], body).into_response())
    }

    /// Answers with a value that `read` returns, as JSON.
    pub(super) async fn json<T: serde::Serialize + Send + 'static>(
        self,
        read: impl FnOnce() -> Result<T, Problem> + Send + 'static,
    ) -> Result<Response, Problem> {
        let write = |value: T, chunks: &mut Chunks| Ok(serde_json::to_writer(chunks, &value)?);
        self.answer("application/json", read, write).await
    }
}

/// An answer that is being made. Writing waits for the client, after the first chunk.
pub(super) struct Chunks {
    /// To the request, which waits for the first chunk, or for an answer that is no larger.
    begin: Option<oneshot::Sender<Result<Option<Bytes>, Problem>>>,
    sender: mpsc::Sender<io::Result<Bytes>>,
    buffer: Vec<u8>,
    deadline: Instant,
}

impl Chunks {
    fn send(&mut self) -> io::Result<()> {
        if let Some(begin) = self.begin.take() {
            begin.send(Ok(None)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        }
        if Instant::now() > self.deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.sender.blocking_send(Ok(chunk.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Sends the rest. An error breaks the connection, so that half of an answer is not taken for the whole.
    fn end(mut self, written: io::Result<()>) {
        match (self.begin.take(), written) {
            (Some(begin), Ok(())) => drop(begin.send(Ok(Some(std::mem::take(&mut self.buffer).into())))),
            (Some(begin), Err(error)) => {
                let text = error.to_string();
                drop(begin.send(Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "kernel", text))));
            }
            (None, Ok(())) => drop(self.send()),
            (None, Err(error)) => drop(self.sender.blocking_send(Err(error))),
        }
    }
}

impl io::Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Write for Chunks {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        io::Write::write_all(self, text.as_bytes()).map_err(|_| fmt::Error)
    }
}

/// The body of a request, which has to arrive in time.
pub(super) struct Payload(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Payload {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        match tokio::time::timeout(WHOLE_BODY, Bytes::from_request(request, state)).await {
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(error)) => Err(Problem::new(error.status(), "body", error.body_text())),
            Err(_) => {
                let text = format!("the body did not arrive within {WHOLE_BODY:?}");
                Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "body", text))
            }
        }
    }
}
