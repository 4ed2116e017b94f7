//! Saves rules for the next boot.

use super::Firewall;
use crate::{kernel::backoff::Backoff, model::Policy};

/// Saves rules, and remembers a failure.
#[derive(Debug, Default)]
pub(crate) struct Saver {
    failed: Backoff,
}

impl Saver {
    /// Saves the rules of `policy`; a failure is logged, and to be repeated when [`Saver::is_due`].
    pub(crate) fn save(&mut self, firewall: &impl Firewall, policy: &Policy) {
        let saved = firewall.save(policy);
        let again = self.failed != Backoff::default();
        self.failed.note(saved.is_ok());
        match saved {
            Ok(files) => files.iter().for_each(|file| tracing::info!(file = %file.display(), "rules saved")),
            Err(error) if again => tracing::debug!(%error, "the rules still cannot be saved"),
            Err(error) => tracing::error!(%error, "the rules are not saved; the agent tries again"),
        }
    }

    /// Whether it is time for another attempt after a failure.
    pub(crate) fn is_due(&self) -> bool {
        self.failed.is_due()
    }
}
