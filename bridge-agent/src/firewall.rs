//! The same rules in the kernel's own firewall, beside eBPF or instead of it.
//!
//! A driver makes a plan from a policy and what it observed (pure), applies it, and verifies what became of it.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::Serialize;

use crate::model::Policy;

/// Packets and bytes that a rule matched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hits {
    /// Packets.
    pub packets: u64,
    /// Bytes, layer 3 header included.
    pub bytes: u64,
}

impl AddAssign for Hits {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// A driver of a packet filter.
pub trait Firewall {
    /// Why something could not be done, and what to do about it.
    type Error: std::error::Error + Send + Sync + 'static;
    /// What stands in the kernel, own and foreign.
    type Observed;
    /// What turns the observed into the desired state.
    type Plan;

    /// Reads back what stands in the kernel, and changes nothing.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn observe(&self) -> Result<Self::Observed, Self::Error>;

    /// What has to be done for `policy` to hold. Pure.
    fn plan(&self, policy: &Policy, observed: &Self::Observed) -> Self::Plan;

    /// Does it. A part that the kernel refuses leaves the rules of before in force.
    ///
    /// # Errors
    /// If a rule is refused, a lock is held too long, a program is missing.
    fn apply(&mut self, plan: &Self::Plan) -> Result<(), Self::Error>;

    /// Reads back what became of `policy`, and keeps it to compare later states with.
    ///
    /// # Errors
    /// If what stands there is not what was planned.
    fn verify(&mut self, policy: &Policy) -> Result<(), Self::Error>;

    /// The first thing found that another program did to the rules since [`Firewall::verify`], in words, with what
    /// was observed.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn drift(&self) -> Result<Option<(String, Self::Observed)>, Self::Error>;

    /// Puts the rules where the system finds them at boot.
    ///
    /// # Errors
    /// If a file cannot be read or replaced.
    fn save(&self, policy: &Policy) -> Result<Vec<std::path::PathBuf>, Self::Error>;

    /// Packets and bytes by the name of the rule; names that begin with `bridge:` are not of the configuration.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn hits(&self) -> Result<BTreeMap<String, Hits>, Self::Error>;

    /// Removes everything of bridge's, from the kernel and from saved files, and goes on after an error.
    /// Returns what remains, in words.
    fn teardown(&mut self) -> Remains<Self::Error>;

    /// Observes, plans, applies and verifies: afterwards `policy` holds. Whoever writes over the rules in that moment is
    /// outdone; whoever does so time and again is not.
    ///
    /// # Errors
    /// Those of the steps.
    fn converge(&mut self, policy: &Policy) -> Result<(), Self::Error> {
        const TIMES: u32 = 3;
        let mut more = 1..TIMES;
        loop {
            let plan = self.plan(policy, &self.observe()?);
            self.apply(&plan)?;
            match self.verify(policy) {
                Err(_) if more.next().is_some() => {}
                result => return result,
            }
        }
    }
}

/// What a teardown could not take away.
#[derive(Debug)]
pub struct Remains<E> {
    /// What remains for a reason, in words.
    pub notes: Vec<String>,
    /// What failed.
    pub errors: Vec<E>,
}

impl<E> Default for Remains<E> {
    fn default() -> Self {
        Self { notes: Vec::new(), errors: Vec::new() }
    }
}
