//! The table of paths past the network stack, which flows share: an array in which the place of a path is a hash of its
//! fields. Any CPU may enter a path, without a lock.

use bridge_common::filter::fast_path::{LEASE_TICKS, PATH_SLACK_TICKS, PATHS as COUNT, Path, WRITING};
use bridge_ebpf::atomic::{compare_exchange, exchange};

use crate::maps::PATHS;

/// Places tried for a path.
const PROBES: u32 = 4;

/// Returns the path of this index, whose lease holds, in `epoch`.
#[inline(always)]
pub(crate) fn held(index: u16, epoch: u32) -> Option<Path> {
    let path = PATHS.get_ptr(u32::from(index))?;
    // In this order: another path may take the place, in another epoch, between the two reads.
    // SAFETY: a valid element; the epoch shows a racing write.
    let (path, after) = unsafe { (path.read_volatile(), (&raw const (*path).epoch).read_volatile()) };
    (after == epoch).then_some(path)
}

/// Enters a path in [`PATHS`] and returns its index; `None`: other paths hold all its places.
#[inline(always)]
pub(crate) fn place(way: &Path, now: u32, epoch: u32) -> Option<u16> {
    let [a, b, c] = way.addresses;
    let mixed = (way.input ^ way.output.rotate_left(16) ^ a ^ b.rotate_left(8) ^ c).wrapping_mul(0x9e37_79b1);
    let first = mixed >> 16;
    let expires = now.wrapping_add(LEASE_TICKS + PATH_SLACK_TICKS);
    for probe in 0..PROBES {
        let index = first.wrapping_add(probe) % COUNT;
        let path = PATHS.get_ptr_mut(index)?;
        // SAFETY: a valid element, aligned to 8 bytes as all are. A CPU that reads its epoch reads the rest complete.
        unsafe {
            if (*path).epoch == epoch && (*path).is_way_of(way) {
                let old = pair(epoch, (*path).expires);
                let new = pair(epoch, expires);
                // Unless another path takes the place at this moment, because this one had expired.
                let kept = old == new || compare_exchange(path.cast(), old, new) == old;
                return kept.then_some(index as u16);
            }
        }
    }
    for probe in 0..PROBES {
        let index = first.wrapping_add(probe) % COUNT;
        let path = PATHS.get_ptr_mut(index)?;
        // SAFETY: as above; the CPU that has written `WRITING` is the only writer.
        unsafe {
            let times = path.cast::<u64>();
            let old = pair((*path).epoch, (*path).expires);
            if (*path).is_free(now, epoch) && compare_exchange(times, old, pair(WRITING, expires)) == old {
                ((*path).input, (*path).output) = (way.input, way.output);
                ((*path).mtu, (*path).means) = (way.mtu, way.means);
                (*path).addresses = way.addresses;
                exchange(times, pair(epoch, expires));
                return Some(index as u16);
            }
        }
    }
    None
}

/// [`Path::epoch`] and [`Path::expires`] as the word that both are.
#[inline(always)]
fn pair(epoch: u32, expires: u32) -> u64 {
    u64::from(expires) << 32 | u64::from(epoch)
}
