//! Reads counters of a packet filter for clients, however often they ask.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Firewall, Hits};

/// Packets and bytes by rule, as [`Firewall::hits`] returns them.
pub type Counted = Arc<BTreeMap<String, Hits>>;

/// A reading is returned again for this many times as long as it took: to read 10,000 rules keeps a CPU busy.
const SHARE: u32 = 10;
/// The longest time for which a reading is returned again.
const LONGEST: Duration = Duration::from_secs(5);

/// Reads the counters of the rules in the kernel.
pub struct Counts {
    read: Box<dyn Fn() -> Result<BTreeMap<String, Hits>, String> + Send + Sync>,
    last: Mutex<Option<(Instant, Counted)>>,
}

impl fmt::Debug for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counts").finish_non_exhaustive()
    }
}

impl Counts {
    /// Reads them through `firewall`, in the network namespace of the thread that asks.
    pub fn of(firewall: impl Firewall + Send + Sync + 'static) -> Self {
        let read = move || firewall.hits().map_err(|error| error.to_string());
        Self { read: Box::new(read), last: Mutex::default() }
    }

    /// Returns the counters; as last read, if that was a short time ago. Runs a program.
    ///
    /// # Errors
    /// The kernel's rules cannot be read, with the reason.
    pub fn read(&self) -> Result<Counted, String> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        if let Some((_, counted)) = last.as_ref().filter(|(until, _)| begun < *until) {
            return Ok(Arc::clone(counted));
        }
        let counted = Arc::new((self.read)()?);
        let until = Instant::now() + (begun.elapsed() * SHARE).min(LONGEST);
        *last = Some((until, Arc::clone(&counted)));
        Ok(counted)
    }
}
