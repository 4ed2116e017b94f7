//! `bridge-agent ui`: a page in the browser that shows the agent, or those of a cluster.

use std::net::SocketAddr;

use clap::Args;
use serde_json::json;

use super::{
    ask::block_on,
    error::Error,
    global::Global,
    output::{print, print_json},
};
use crate::{
    kubectl::Access,
    ui::{Page, Source},
};

/// Serve a page that shows flows, denied packets, rules, routes and the port pool, until Ctrl-C.
///
/// The page reads and changes nothing. It needs no privilege beyond access to the agent's socket, loads nothing from other
/// machines, and asks for the token in the printed address.
#[derive(Debug, Args)]
pub struct Ui {
    #[command(flatten)]
    listen: Listen,
    /// Show every node of a cluster: run kubectl to reach the agents by pods/exec
    #[arg(long)]
    kubernetes: bool,
    #[command(flatten, next_help_heading = "With --kubernetes")]
    access: Access,
}

/// Where the page is served.
#[derive(Debug, Args)]
pub(super) struct Listen {
    /// The loopback address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9470", value_parser = address)]
    listen: SocketAddr,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "write an address and a port, such as 127.0.0.1:9470 or [::1]:9470".to_owned())
}

impl Ui {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let source = match (self.kubernetes, self.access == Access::default()) {
            (true, _) => Source::Cluster(self.access.clone()),
            (false, true) => Source::Socket(global.agent_socket()),
            (false, false) => return Err(Error::NeedsKubernetes),
        };
        serve(&self.listen, source, global.json)
    }
}

/// Prints the address of the page and serves it.
pub(super) fn serve(Listen { listen }: &Listen, source: Source, json: bool) -> Result<(), Error> {
    block_on(async {
        let page = Page::bind(*listen, source).await?;
        if json {
            print_json(&json!({ "url": page.url() }))?;
        } else {
            print(&format!("{}\n", page.url()))?;
        }
        match page.serve().await {}
    })
}
