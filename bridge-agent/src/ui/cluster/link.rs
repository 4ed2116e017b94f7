//! A connection to one agent through `kubectl exec`.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming};
use tokio::{
    io::{AsyncReadExt as _, copy, join, sink},
    process::{Child, ChildStderr, Command},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    api::client::Client,
    kubectl::{Access, Agent},
};

/// Time that an agent has to answer, the start of kubectl included.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
/// Bytes of an error message that are kept.
const MESSAGE: u64 = 4096;

/// HTTP over the standard input and output of `kubectl exec`, which ends with it.
#[derive(Debug)]
pub(super) struct Link {
    client: Client,
    errors: JoinHandle<String>,
    _kubectl: Child,
}

impl Link {
    pub(super) async fn open(access: &Access, agent: &Agent) -> Result<Self, String> {
        let mut command = Command::from(access.dial(agent));
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).kill_on_drop(true);
        let mut kubectl =
            command.spawn().map_err(|error| crate::kubectl::Error::Kubectl(error).to_string())?;
        let (Some(input), Some(output), Some(errors)) =
            (kubectl.stdin.take(), kubectl.stdout.take(), kubectl.stderr.take())
        else {
            return Err("kubectl has no standard streams".to_owned());
        };
        let client = Client::over(join(output, input)).await.map_err(|error| error.to_string())?;
        Ok(Self { client, errors: tokio::spawn(message(errors)), _kubectl: kubectl })
    }

    /// Sends a request. A failure ends the link.
    pub(super) async fn request(
        mut self,
        access: &Access,
        request: Request<Full<Bytes>>,
    ) -> Result<(Self, Response<Incoming>), String> {
        match timeout(ANSWER, self.client.request(request)).await {
            Ok(Ok(response)) => Ok((self, response)),
            Ok(Err(error)) => Err(self.failure(access, error.to_string()).await),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        }
    }

    /// Returns the error message of kubectl with its remedy; `error` if it prints none.
    async fn failure(self, access: &Access, error: String) -> String {
        let printed = timeout(Duration::from_secs(2), self.errors).await.ok().and_then(Result::ok);
        let printed = printed.unwrap_or_default();
        // kubectl adds the exit code.
        let lines = printed.lines().filter(|line| !line.starts_with("command terminated with exit code"));
        let text = lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
        if text.is_empty() { error } else { access.with_remedy(text) }
    }
}

/// Reads the beginning of the error messages, and discards the rest.
async fn message(errors: ChildStderr) -> String {
    let mut text = Vec::new();
    let mut beginning = errors.take(MESSAGE);
    // Without a message, the error of the connection is reported.
    drop(beginning.read_to_end(&mut text).await);
    if beginning.limit() == 0 {
        drop(copy(&mut beginning.into_inner(), &mut sink()).await);
    }
    String::from_utf8_lossy(&text).into_owned()
}
