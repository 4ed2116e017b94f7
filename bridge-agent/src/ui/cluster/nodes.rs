//! The list of the agents of a cluster, and questions to each.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, header};
use tokio::{
    process::Command,
    sync::{Mutex as AsyncMutex, Semaphore},
    time::timeout,
};

use super::link::{self, Link};
use crate::kubectl::{Access, Agent, Error};

/// Time between two lists of the agents' pods.
pub(super) const LIST_EVERY: Duration = Duration::from_secs(5);
/// Nodes that are asked at the same time: each start of kubectl costs a tenth of a second of CPU time.
pub(super) const PARALLEL: usize = 16;

/// An agent and the connection to it.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) agent: Agent,
    link: AsyncMutex<Option<Link>>,
    /// Identifier of the last event that was received.
    pub(super) last_event: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct Listed {
    when: Option<Instant>,
    nodes: Vec<Arc<Node>>,
    problem: Option<String>,
}

/// The agents of a cluster.
#[derive(Debug)]
pub(super) struct Nodes {
    access: Access,
    listed: AsyncMutex<Listed>,
    /// Starts of kubectl for events.
    pub(super) starts: Semaphore,
}

/// An answer of a node, or the reason why there is none.
pub(super) type Answer = Result<(StatusCode, Bytes), String>;

/// Builds a query.
pub(super) fn get(path: &str, headers: &[(&str, &str)]) -> Result<Request<Full<Bytes>>, String> {
    let request = Request::builder().uri(path).header(header::HOST, "bridge");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(Full::default()).map_err(|_| "the query is not a query string".to_owned())
}

impl Node {
    /// Asks over the open link; over another one if that has broken.
    pub(super) async fn ask(&self, access: &Access, request: &Request<Full<Bytes>>, most: usize) -> Answer {
        let mut link = self.link.lock().await;
        let open = match link.take() {
            Some(open) => open.request(access, request.clone()).await.ok(),
            None => None,
        };
        let (open, response) = match open {
            Some(answer) => answer,
            None => Link::open(access, &self.agent).await?.request(access, request.clone()).await?,
        };
        let status = response.status();
        let body = timeout(link::ANSWER, Limited::new(response.into_body(), most).collect()).await;
        let body = body.map_err(|_| "the answer does not end".to_owned())?;
        // A body that was cut short leaves no link to go on with.
        let body =
            body.map_err(|error| format!("the answer cannot be read: {error}; select fewer --node"))?;
        *link = Some(open);
        Ok((status, body.to_bytes()))
    }
}

impl Nodes {
    pub(super) fn new(access: Access) -> Self {
        Self { access, listed: AsyncMutex::default(), starts: Semaphore::new(PARALLEL) }
    }

    pub(super) const fn access(&self) -> &Access {
        &self.access
    }

    /// Returns the error of the last attempt to list the agents.
    pub(super) async fn problem(&self) -> Option<String> {
        self.listed.lock().await.problem.clone()
    }

    /// Returns the agents, from a list that is a few seconds old at most.
    pub(super) async fn list(&self) -> Result<Vec<Arc<Node>>, String> {
        let mut listed = self.listed.lock().await;
        if listed.when.is_none_or(|when| when.elapsed() >= LIST_EVERY) {
            let output = Command::from(self.access.list()).kill_on_drop(true).output().await;
            match self.access.listed(output) {
                Ok(agents) => {
                    let known = std::mem::take(&mut listed.nodes);
                    let node = |agent: Agent| match known.iter().find(|node| node.agent == agent) {
                        Some(node) => Arc::clone(node),
                        None => Arc::new(Node {
                            agent,
                            link: AsyncMutex::default(),
                            last_event: Mutex::default(),
                        }),
                    };
                    listed.nodes = agents.into_iter().map(node).collect();
                    listed.problem = None;
                }
                // While the API server is away, the links that are open go on.
                Err(error) => {
                    if matches!(error, Error::NoAgents { .. }) {
                        listed.nodes.clear();
                    }
                    listed.problem = Some(error.to_string());
                }
            }
            listed.when = Some(Instant::now());
        }
        match &listed.problem {
            Some(problem) if listed.nodes.is_empty() => Err(problem.clone()),
            _ => Ok(listed.nodes.clone()),
        }
    }
}
