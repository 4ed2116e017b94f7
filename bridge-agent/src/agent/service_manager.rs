//! Notifications to the service manager (sd_notify(3)).

use sd_notify::NotifyState;

/// Reports that the agent is ready, or ready again after a reload.
pub(super) fn ready() {
    send(&[NotifyState::Ready]);
}

/// Reports that the agent stops.
pub(super) fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// Reports the begin of a reload.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "cannot read the clock for the service manager"),
    }
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}
