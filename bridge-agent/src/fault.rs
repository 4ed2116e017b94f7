//! Places at which a test has the agent killed: in debug builds only, and only where `BRIDGE_FAULT` names one.
//!
//! No code runs before the kill: SIGKILL is the signal of the kernel's out-of-memory killer, and equals a loss of power
//! for everything but the disk.

/// Ends the process if `BRIDGE_FAULT` is `place`, or `place@N` at the Nth time that it comes here.
#[cfg(debug_assertions)]
pub(crate) fn point(place: &'static str) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };
    static WANTED: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static SEEN: AtomicU32 = AtomicU32::new(0);
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("BRIDGE_FAULT").ok()?;
        let (place, number) = text.split_once('@').unwrap_or((&text, "1"));
        Some((place.to_owned(), number.parse().ok()?))
    });
    if let Some((name, number)) = wanted
        && name == place
        && SEEN.fetch_add(1, Ordering::Relaxed) + 1 == *number
    {
        let own = rustix::process::getpid();
        // If it fails, the test that waits for the end of this process reports it.
        let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
pub(crate) const fn point(_place: &'static str) {}
