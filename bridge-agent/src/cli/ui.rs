//! `bridge-agent ui`: a page in the browser that shows the agent.

use std::net::SocketAddr;

use clap::Args;
use serde_json::json;

use super::{
    Error, Global,
    ask::block_on,
    output::{print, print_json},
};
use crate::ui::Page;

/// Serve a page that shows flows, denied packets, rules, routes and the port pool, until Ctrl-C.
///
/// The page reads and changes nothing. It needs no privilege beyond access to the agent's socket, loads nothing from other
/// machines, and asks for the token in the printed address.
#[derive(Debug, Args)]
pub struct Ui {
    /// The loopback address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9470")]
    listen: SocketAddr,
}

impl Ui {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        block_on(async {
            let page = Page::bind(self.listen, global.agent_socket()).await?;
            if global.json {
                print_json(&json!({ "url": page.url() }))?;
            } else {
                print(&format!("{}\n", page.url()))?;
            }
            Ok(page.serve().await?)
        })
    }
}
