//! Follows the first packet of a flow through a ruleset of nftables, as `nft --json --numeric list ruleset` prints it; pure.
//!
//! The interpreter never guesses: a condition that it cannot read may hold or not, and the verdict follows only if both lead
//! to the same.

mod ruleset;
mod show;
mod translate;
mod value;
mod walk;

pub use self::{
    ruleset::{Owner, Ruleset, Way},
    translate::Masquerades,
    walk::Walked,
};

#[cfg(test)]
mod tests;
