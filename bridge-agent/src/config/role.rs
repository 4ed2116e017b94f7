//! The part that a machine plays.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Role of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A node of the cluster: forwards between its pods and the LAN, and enforces the rules.
    Node,
    /// A host of the LAN: has routes to the pods, and a port pool of its own.
    Host,
}
