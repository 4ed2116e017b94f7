//! `GET /v1/names`: names of addresses, from the configuration and the cluster.

use std::{collections::BTreeMap, net::IpAddr};

use axum::{extract::State, response::Response, routing::get};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Problem,
    large::Turn,
    openapi::{Operation, Routes},
};
use crate::state::Shared;

/// Names of addresses and pods. Made for each request: the agent keeps no second copy of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NameList {
    /// Names of LAN hosts and networks, as configured; by address or network.
    pub configured: BTreeMap<String, String>,
    /// Pods by their addresses: namespace and name.
    pub pods: BTreeMap<IpAddr, String>,
    /// Pods of the port pool by their UIDs: namespace and name.
    pub uids: BTreeMap<String, String>,
}

pub(super) fn routes() -> Routes {
    let operation = Operation::get::<NameList>(
        "names",
        "Lists names of addresses, from the configuration and the cluster",
    );
    Routes::default().add("/v1/names", operation.large(), get(names))
}

async fn names(State(shared): State<Shared>, turn: Turn) -> Result<Response, Problem> {
    turn.json(move || {
        let mut list = NameList { configured: (*shared.names()).clone(), ..NameList::default() };
        if let Some(cluster) = shared.cluster() {
            cluster.visit_pods(|name, addresses, uid| {
                list.pods.extend(addresses.iter().map(|address| (*address, name.to_owned())));
                list.uids.extend(uid.map(|uid| (uid.to_owned(), name.to_owned())));
            });
        }
        Ok(list)
    })
    .await
}
