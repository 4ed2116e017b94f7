//! What discovery knows, across a restart: without it every discovered route would be withdrawn at start and come
//! back only when its pod announces itself again.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::registry::Entry;
use crate::kernel::files::{self, Ownership};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    address: IpAddr,
    egress: IpAddr,
    name: String,
    /// Milliseconds since 1970-01-01 UTC.
    expires: u64,
}

/// Replaces the file in one step.
pub(super) fn save<'a>(
    path: &Path,
    entries: impl Iterator<Item = (&'a IpAddr, &'a Entry)>,
) -> io::Result<()> {
    files::replace(path, Ownership::Private, &encode(entries)?)
}

pub(crate) fn encode<'a>(entries: impl Iterator<Item = (&'a IpAddr, &'a Entry)>) -> io::Result<Vec<u8>> {
    let (now, clock) = (Instant::now(), super::clock());
    let saved: Vec<_> = entries
        .map(|(address, entry)| {
            let left = entry.expires.saturating_duration_since(now).as_millis();
            Saved {
                address: *address,
                egress: entry.egress,
                name: entry.name.clone(),
                expires: clock.saturating_add(u64::try_from(left).unwrap_or(u64::MAX)),
            }
        })
        .collect();
    Ok(serde_json::to_vec(&saved)?)
}

/// What has not expired meanwhile, none of it for longer than `max_lifetime` from now, whatever the clock did.
pub(super) fn load(path: &Path, max_lifetime: Duration) -> io::Result<Vec<(IpAddr, Entry)>> {
    let bytes = match files::read_regular(path, files::MAX_CONFIGURATION) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        bytes => bytes?,
    };
    parse(&bytes, max_lifetime)
}

pub(crate) fn parse(bytes: &[u8], max_lifetime: Duration) -> io::Result<Vec<(IpAddr, Entry)>> {
    let saved: Vec<Saved> = serde_json::from_slice(bytes)?;
    let (now, clock) = (Instant::now(), super::clock());
    let live = saved.into_iter().filter(|saved| saved.expires > clock).map(|saved| {
        let left = Duration::from_millis(saved.expires - clock).min(max_lifetime);
        (saved.address, Entry { egress: saved.egress, name: saved.name, expires: now + left })
    });
    Ok(live.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_but_for_what_expired() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/discovered.json");
        let hour = Duration::from_secs(3600);
        assert_eq!(load(&path, hour).unwrap(), []);
        let now = Instant::now();
        let entry = |seconds| Entry {
            egress: "192.0.2.1".parse().unwrap(),
            name: "pod".into(),
            expires: now + Duration::from_secs(seconds),
        };
        let (short, long, longest): (IpAddr, IpAddr, IpAddr) =
            ([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), [10, 0, 0, 3].into());
        save(&path, [(&short, &entry(0)), (&long, &entry(60)), (&longest, &entry(7200))].into_iter())
            .unwrap();
        let loaded = load(&path, hour).unwrap();
        assert_eq!(loaded.iter().map(|(address, _)| *address).collect::<Vec<_>>(), [long, longest]);
        let left = loaded[0].1.expires - now;
        assert!(left > Duration::from_secs(59) && left < Duration::from_secs(61), "{left:?}");
        assert!(loaded[1].1.expires <= Instant::now() + hour);
        std::fs::write(&path, "{").unwrap();
        assert!(load(&path, hour).is_err());
    }
}
