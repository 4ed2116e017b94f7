//! The lifetime of a configuration.

use std::time::Duration;

use crate::config::Config;

/// Lifetime of an applied configuration.
#[derive(Clone, Copy, Debug)]
pub(super) enum Term<'a> {
    /// For good.
    Good,
    /// Until this time has passed, then the former one returns, unless this one is confirmed.
    Trial(Duration),
    /// For the rest of the present trial; then this one returns.
    Rest(&'a Config, Duration),
}

impl<'a> Term<'a> {
    /// Whether it may be taken back.
    pub(super) const fn on_trial(self) -> bool {
        !matches!(self, Self::Good)
    }

    /// Returns the configuration that follows the rest of a trial.
    pub(super) const fn former(self) -> Option<&'a Config> {
        match self {
            Self::Rest(former, _) => Some(former),
            Self::Good | Self::Trial(_) => None,
        }
    }

    /// The same, with another configuration to come back.
    pub(super) fn against(self, former: Option<&Config>) -> Term<'_> {
        match (self, former) {
            (Self::Rest(_, left), Some(former)) => Term::Rest(former, left),
            (Self::Trial(time), _) => Term::Trial(time),
            _ => Term::Good,
        }
    }
}
