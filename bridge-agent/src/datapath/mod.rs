//! The packet path in the kernel, seen from the user side: loads its programs and maps, pins them, attaches them to
//! interfaces, writes policies, and reads back what the kernel side has seen.
//!
//! Nothing here is needed for packets to be judged: maps and links are pinned, and go on without a process.
//! [`Datapath`] is what changes them, by one process at a time; [`Maps`] is what reads them, by anyone.

mod attach;
mod carry;
mod clsact;
mod counters;
mod down;
mod error;
mod events;
mod fast_path;
mod flows;
mod foreign;
mod hook;
mod kept;
mod layout;
mod load;
mod maps;
pub mod object;
mod pins;
mod tables;

pub use attach::{Action, Change, Target};
pub use counters::{ReasonCount, RuleCount};
pub use down::{Removed, down, undo};
pub use error::{Error, Result};
pub use events::{EventReader, Verdict, VerdictFilter};
pub use fast_path::{FastPath, OutcomeCount};
pub use flows::{FlowCounts, FlowFilter, FlowView, RuleNames, protocol_name};
pub use hook::{Hook, Role};
pub(crate) use kept::Kept;
pub use load::{CacheSize, Datapath, Mechanism, Options};
pub use maps::{Fill, Maps, Trial, now};
pub use pins::{DEFAULT_ROOT, Lock, Pins};

pub use tables::{Behaviour, Published};
