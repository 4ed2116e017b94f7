//! The user side of the packet path: loads its programs and maps, pins them, attaches them to interfaces, writes policies,
//! and reads counters, flows and events.
//!
//! Packets are judged without it: maps and links are pinned and need no process. [`Datapath`] changes them, in one process
//! at a time; [`Maps`] reads them, in any number.

mod alive;
mod attach;
mod change;
mod clsact;
mod counters;
mod denials;
mod down;
mod ends;
mod error;
mod events;
mod facts;
mod fast_path;
mod flow_filter;
mod flows;
mod foreign;
mod hosted;
mod layout;
mod load;
mod maps;
mod migrate;
pub mod object;
mod pins;
mod shares;
mod shield;
mod tables;

pub use crate::model::{Hook, Role, Target};
pub use alive::Alive;
pub use attach::order::{Displaced, Displacement};
pub use change::{Action, Change};
pub use counters::{OutcomeCount, ReasonCount, RuleCount};
pub use denials::{Denial, DenialClass};
pub use down::{Removed, down, undo};
pub use ends::{End, EndReader, Ended, Unended};
pub use error::{Error, Result};
pub use events::{EventReader, Verdict, VerdictFilter};
pub use fast_path::FastPath;
pub use flows::{
    FlowCounts, FlowFilter, FlowView, InvalidFilter, RuleNames, is_usable, protocol_name, protocol_of,
};
pub use foreign::programs_before;
pub use load::{CacheSize, Datapath, Mechanism, Options};
pub use maps::{Fill, Maps, Trial, now};
pub use pins::{DEFAULT_ROOT, Pins};
pub use shield::{SHIELD_PROGRAM, Shield, is_shielded};
pub use tables::{Behaviour, Published};
