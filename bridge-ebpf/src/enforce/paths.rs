//! The table of ways past the network stack, which flows share: an array, in which the place of a way follows from what it
//! is. Any CPU may enter one, and none is ever waited for.

use core::arch::asm;

use bridge_common::filter::fast_path::{LEASE_TICKS, PATH_SLACK_TICKS, PATHS as COUNT, Path, WRITING};

use crate::maps::PATHS;

/// How many places a way may have.
const PROBES: u32 = 4;

/// The path of this index, whose lease holds, in `epoch`.
#[inline(always)]
pub(crate) fn held(index: u16, epoch: u32) -> Option<Path> {
    let path = PATHS.get_ptr(u32::from(index))?;
    // In this order: the place may go to another way, in another epoch, while this packet is on its way.
    // SAFETY: a valid element; what racing CPUs make of it is seen by its epoch.
    let (path, after) = unsafe { (path.read_volatile(), (&raw const (*path).epoch).read_volatile()) };
    (after == epoch).then_some(path)
}

/// Index of the path in [`PATHS`], where it is from now on; `None`: others have all the places where it may be.
#[inline(always)]
pub(crate) fn place(way: &Path, now: u32, epoch: u32) -> Option<u16> {
    let [a, b, c] = way.addresses;
    let mixed = (way.input ^ way.output.rotate_left(16) ^ a ^ b.rotate_left(8) ^ c).wrapping_mul(0x9e37_79b1);
    let first = mixed >> 16;
    let expires = now.wrapping_add(LEASE_TICKS + PATH_SLACK_TICKS);
    for probe in 0..PROBES {
        let index = first.wrapping_add(probe) % COUNT;
        let path = PATHS.get_ptr_mut(index)?;
        // SAFETY: a valid element, aligned to 8 bytes as all are. Whoever finds its epoch there finds the rest in place.
        unsafe {
            if (*path).epoch == epoch && (*path).is_way_of(way) {
                let old = pair(epoch, (*path).expires);
                let new = pair(epoch, expires);
                // Unless another way gets the place in this moment, since the time of this one was over.
                let kept = old == new || compare_exchange(path.cast(), old, new) == old;
                return kept.then_some(index as u16);
            }
        }
    }
    for probe in 0..PROBES {
        let index = first.wrapping_add(probe) % COUNT;
        let path = PATHS.get_ptr_mut(index)?;
        // SAFETY: as above; whoever writes that it is being written to is alone.
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

/// Writes `new` if the word is `old`; what it was. A full barrier.
///
/// # Safety
/// `word` is a pointer to a map's value.
#[inline(always)]
unsafe fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    let was;
    // SAFETY: the caller's promise; the instruction touches this word alone.
    unsafe {
        asm!("r0 = cmpxchg_64({p} + 0, r0, {n})", p = in(reg) word, n = in(reg) new, inout("r0") old => was);
    }
    was
}

/// Writes `new`. A full barrier.
///
/// # Safety
/// As [`compare_exchange`].
#[inline(always)]
unsafe fn exchange(word: *mut u64, new: u64) {
    // SAFETY: as in `compare_exchange`.
    unsafe { asm!("{v} = xchg_64({p} + 0, {v})", p = in(reg) word, v = inout(reg) new => _) };
}
