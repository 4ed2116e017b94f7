//! The same rules in the kernel's own firewall, beside eBPF or instead of it.
//!
//! A driver plans from a policy and the observed rules (pure), applies the plan, and verifies the result.

mod counts;
mod options;
pub(crate) mod saver;
pub(crate) mod survey;

use std::collections::BTreeMap;
use std::ops::AddAssign;

use serde::Serialize;

pub use counts::{Counted, Counts};
pub use options::Options;
pub use survey::Surveyor;

use crate::model::Policy;

/// Packets and bytes that a rule matched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hits {
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
    /// A failure, with a remedy.
    type Error: std::error::Error + Send + Sync + 'static;
    /// The rules in the kernel, own and foreign.
    type Observed;
    /// The operations from the observed to the desired state.
    type Plan;

    /// Reads the rules in the kernel, and changes nothing.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn observe(&self) -> Result<Self::Observed, Self::Error>;

    /// Plans the change to `policy`. Pure.
    fn plan(&self, policy: &Policy, observed: &Self::Observed) -> Self::Plan;

    /// Applies a plan. A part that the kernel refuses leaves the previous rules in place.
    ///
    /// # Errors
    /// If a rule is refused, a lock is held too long, a program is missing.
    fn apply(&mut self, plan: &Self::Plan) -> Result<(), Self::Error>;

    /// Reads back the rules of `policy`, and keeps them to compare later states with.
    ///
    /// # Errors
    /// The rules are not as planned.
    fn verify(&mut self, policy: &Policy) -> Result<(), Self::Error>;

    /// Describes the first change that another program made since [`Firewall::verify`], with the observed rules.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn drift(&self) -> Result<Option<(String, Self::Observed)>, Self::Error>;

    /// Saves the rules for the next boot.
    ///
    /// # Errors
    /// If a file cannot be read or replaced.
    fn save(&self, policy: &Policy) -> Result<Vec<std::path::PathBuf>, Self::Error>;

    /// Packets and bytes by the name of the rule; names that begin with `bridge:` are not of the configuration.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn hits(&self) -> Result<BTreeMap<String, Hits>, Self::Error>;

    /// Describes the rules of bridge in the kernel, whichever agent wrote them; `None` without any.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    fn present(&self) -> Result<Option<String>, Self::Error>;

    /// Removes the rules of bridge from the kernel and from saved files, and continues after an error.
    /// Returns the remains.
    fn teardown(&mut self) -> Remains<Self::Error>;

    /// Observes, plans, applies and verifies: afterwards `policy` holds. Repeats if another program overwrites the rules
    /// meanwhile, a few times.
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

/// The remains of a teardown.
#[derive(Debug)]
pub struct Remains<E> {
    /// Remains that have a reason.
    pub notes: Vec<String>,
    /// Failures.
    pub errors: Vec<E>,
}

impl<E> Default for Remains<E> {
    fn default() -> Self {
        Self { notes: Vec::new(), errors: Vec::new() }
    }
}
