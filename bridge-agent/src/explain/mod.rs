//! Why a connection passes or does not, and the rule that would let it pass.
//!
//! [`judge`] has the verdict at one hook; [`explain`] follows a connection through the hooks of a node. Pure: the facts come from
//! a configuration file alone, or from a running agent.

mod both_ways;
pub mod cases;
mod judge;
mod nearly;
pub mod nft;
mod offline;
mod path;
mod pool;
mod route;
mod suggest;
mod text;
mod types;

pub use self::both_ways::{Lost, lost};
pub use self::judge::{
    Class, FlowTable, Judge, Kind, KnownFlow, Mark, NodeState, Outcome, Packet, Place, is_rejected,
};

pub use self::offline::Offline;
pub use self::path::explain;
pub(crate) use self::route::refusal;
pub use self::route::{RouteFacts, on_host};
pub use self::suggest::{Choice, Reported, Suggested, Suggestion, suggest};
pub use self::text::{Directory, ParseError, Protocol, Question, Request, end};
pub use self::types::{
    Client, Explanation, Facts, Hook, MAX_NEARLY, Nearly, PoolFacts, Remedy, Stage, StageOutcome, Verdict,
};
