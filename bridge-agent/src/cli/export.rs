//! `bridge-agent routes export`: once, or at each change.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::route_setup::{setup, warn};
use super::{Error, Global, block_on, print, print_json};
use crate::api::client::{self, Client};
use crate::kernel::file_watch::FileWatch;
use crate::kernel::files::{self, Ownership};
use crate::routes::export::{Format, export};
use crate::routes::sources::Publisher;
use crate::routes::{DesiredRoute, Follower, Setup, SourceKind, read_once};
use crate::state::RouteList;

/// Between two requests for the routes of the cluster.
const ASK: Duration = Duration::from_secs(1);
/// Between two runs of a command that failed.
const AGAIN: Duration = Duration::from_secs(5);

/// Options of `routes export`.
#[derive(Debug, Args)]
pub(super) struct Export {
    /// The format
    #[arg(long, value_enum)]
    format: Format,
    /// The interface of that host which faces the nodes
    #[arg(long, value_name = "NAME")]
    dev: Option<String>,
    /// Replace this file in one step instead of printing; a new one is readable by its owner only
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Keep running, and replace the file whenever the routes change
    #[arg(long, requires = "output")]
    watch: bool,
    /// Run this shell command at the start and after each change until it succeeds; $BRIDGE_ROUTES names the file
    #[arg(long, value_name = "COMMAND", requires = "output")]
    then: Option<String>,
}

impl Export {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match &self.output {
            Some(output) if self.watch => block_on(self.follow(global, output)),
            Some(output) => {
                self.write(output, &self.text_once(global)?)?;
                block_on(async { self.apply(output).await.map_err(Error::Exec) })?;
                if global.json {
                    return print_json(&serde_json::json!({ "ok": true, "file": output }));
                }
                Ok(())
            }
            None => {
                let text = self.text_once(global)?;
                if global.json {
                    return print_json(
                        &serde_json::json!({ "ok": true, "format": self.format.to_string(), "text": text }),
                    );
                }
                print(&text)
            }
        }
    }

    /// Exports the routes as they are now.
    fn text_once(&self, global: &Global) -> Result<String, Error> {
        let setup = setup(global)?;
        if !setup.kubernetes {
            let (merged, missing) = read_once(&setup)?;
            warn(missing.as_ref());
            return self.text(merged.routes.iter().map(AsRef::as_ref), &setup);
        }
        block_on(async {
            let mut follower = Follower::new(&setup);
            if let Some(publisher) = follower.kubernetes() {
                publisher.publish(of_cluster(&global.agent_socket()).await?);
            }
            let merged = follower.changed().await;
            self.text(merged.routes.iter().map(AsRef::as_ref), &setup)
        })
    }

    fn text<'a>(
        &self,
        routes: impl IntoIterator<Item = &'a DesiredRoute>,
        setup: &Setup,
    ) -> Result<String, Error> {
        Ok(export(self.format, routes, &setup.settings, self.dev.as_deref())?)
    }

    /// Follows the configuration and every source. A state that cannot be exported leaves the file as it is.
    async fn follow(&self, global: &Global, output: &Path) -> Result<(), Error> {
        if global.config == Path::new("-") {
            return Err(Error::WatchesStandardInput);
        }
        let failed = |source| Error::Stream { action: "cannot watch the configuration", source };
        let mut config = FileWatch::open(&global.config).map_err(failed)?;
        let mut written = std::fs::read_to_string(output).ok();
        let mut due = true;
        let mut setup = setup(global)?;
        loop {
            let mut follower = Follower::new(&setup);
            let _cluster = follower.kubernetes().map(|publisher| follow_cluster(global, publisher));
            let mut pending = false;
            setup = loop {
                let merged = tokio::select! {
                    merged = follower.changed() => merged,
                    () = tokio::time::sleep(AGAIN), if pending => {
                        pending = !self.applied(output).await;
                        continue;
                    }
                    content = config.changed() => {
                        if let Err(error) = content {
                            tracing::warn!(%error, "the configuration is not used, the former one stays");
                        } else if let Some(new) = configuration(global) {
                            break new;
                        }
                        continue;
                    }
                };
                match self.text(merged.routes.iter().map(AsRef::as_ref), &setup) {
                    Ok(text) if written.as_ref() == Some(&text) && !due => {}
                    Ok(text) => {
                        if written.as_ref() != Some(&text) {
                            self.write(output, &text)?;
                            tracing::info!(file = %output.display(), routes = merged.routes.len(), "the export was written");
                            written = Some(text);
                        }
                        due = false;
                        pending = !self.applied(output).await;
                    }
                    Err(error) => tracing::warn!(%error, "the export stays as it was"),
                }
            };
        }
    }

    fn write(&self, output: &Path, text: &str) -> Result<(), Error> {
        let present = std::fs::metadata(output).ok();
        let ownership = present.as_ref().map_or(Ownership::Private, Ownership::Like);
        let written = files::replace(output, ownership, text.as_bytes());
        written.map_err(|source| Error::Stream { action: "cannot write the export", source })
    }

    /// Runs the command; a failure is logged. Returns whether it succeeded.
    async fn applied(&self, output: &Path) -> bool {
        let result = self.apply(output).await;
        if let Err(error) = &result {
            tracing::warn!(%error, "the command is run again in {} s", AGAIN.as_secs());
        }
        result.is_ok()
    }

    /// Runs the command, if there is one.
    async fn apply(&self, output: &Path) -> Result<(), String> {
        let Some(command) = &self.then else { return Ok(()) };
        let absolute = std::path::absolute(output).unwrap_or_else(|_| output.to_owned());
        let mut shell = tokio::process::Command::new("sh");
        shell.args(["-c", command]).env("BRIDGE_ROUTES", absolute).stdin(std::process::Stdio::null());
        match shell.status().await {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("`{command}` ended with {status}")),
            Err(error) => Err(format!("cannot run sh for `{command}`: {error}")),
        }
    }
}

/// Reads the configuration again; one that is not valid changes nothing.
fn configuration(global: &Global) -> Option<Setup> {
    setup(global)
        .inspect_err(|error| tracing::warn!(%error, "the configuration is not used, the former one stays"))
        .ok()
}

/// Asks the agent for the routes that the cluster wants.
async fn of_cluster(socket: &Path) -> Result<Vec<DesiredRoute>, Error> {
    let list: RouteList = Client::connect(socket).await?.get("/v1/routes").await?;
    if list.waiting_for.contains(&SourceKind::Kubernetes) {
        return Err(Error::NoClusterRoutes);
    }
    Ok(list.desired.into_iter().filter(|route| route.source == SourceKind::Kubernetes).collect())
}

/// Publishes the routes of the cluster for as long as the returned task lives. While no agent answers, the last ones stay.
fn follow_cluster(global: &Global, publisher: Publisher) -> tokio::task::JoinSet<()> {
    let socket = global.agent_socket();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut is_known = true;
        loop {
            match of_cluster(&socket).await {
                Ok(routes) => {
                    publisher.publish(routes);
                    is_known = true;
                }
                // A restart of the agent takes a moment, and an outage is logged once.
                Err(error) if is_known => {
                    is_known = matches!(&error, Error::Client(client::Error::Connection(_)));
                    tracing::warn!(%error, "the routes of the cluster stay as they were");
                }
                Err(_) => {}
            }
            tokio::time::sleep(ASK).await;
        }
    });
    tasks
}
