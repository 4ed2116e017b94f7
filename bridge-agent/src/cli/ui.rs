//! `bridge-agent ui`: a page in the browser that shows the agent, or those of a cluster.

use std::net::SocketAddr;

use clap::Args;
use serde_json::json;

use super::{
    ask::block_on,
    error::Error,
    global::Global,
    output::{print, print_json},
    values::socket_address,
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

/// An address and a port as the configuration has them; port 0, too.
fn address(text: &str) -> Result<SocketAddr, String> {
    let free = text.strip_suffix(":0").map(|host| socket_address(&format!("{host}:1")));
    let address = match free {
        Some(address) => address.map(|address| SocketAddr::new(address.ip(), 0)),
        None => socket_address(text),
    };
    // The page has another port than the API whose example this is.
    address.map_err(|problem| problem.replace("9469", "9470"))
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

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn odd_addresses_to_listen_on_are_refused_with_a_remedy() {
        for (text, meaning) in [
            ("127.0.0.1:9470", "127.0.0.1:9470"),
            ("[::1]:9470", "[::1]:9470"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::1]:0", "[::1]:0"),
            ("[0:0:0:0:0:0:0:01]:80", "[::1]:80"),
        ] {
            assert_eq!(address(text).unwrap().to_string(), meaning, "{text:?}");
        }
        for text in [
            "",
            ":",
            ":0",
            "0",
            "9470",
            ":9470",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:09470",
            "127.0.0.1:00",
            "0127.0.0.1:0",
            "127.0.0.01:9470",
            "[::1]:09470",
            "::1:9470",
            "127.0.0.1:65536",
            "127.0.0.1:+80",
            "127.0.0.1: 80",
            " 127.0.0.1:80",
            "127.0.0.1:80\n",
            "127.0.0.1:0x50",
            "localhost:9470",
            "127.0.0.1:\u{663}",
            "224.0.0.1:9470",
            "*:9470",
        ] {
            let error = address(text).expect_err(text);
            assert!(error.contains("write "), "{text:?}: {error}");
        }
    }
}
