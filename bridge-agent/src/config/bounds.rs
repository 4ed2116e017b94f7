//! The bounds of a policy in the cluster. The API server enforces them, and needs them to bound the cost of validation.

/// Rules in a policy.
pub(crate) const RULES: usize = 4096;
/// Items of `ports` or `sourcePorts`.
pub(crate) const PORTS: usize = 60;
/// Items of `external` or `pods`.
pub(crate) const NETWORKS: usize = 40;
/// Items of `matchExpressions`, and keys of `matchLabels`.
pub(crate) const REQUIREMENTS: usize = 16;
/// Items of `values`.
pub(crate) const VALUES: usize = 64;
