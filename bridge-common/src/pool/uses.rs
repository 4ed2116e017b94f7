//! How much a port is used, over all destinations: a word for each port and protocol, of map `POOL_USES`.
//!
//! For a socket that needs its port before its destination is known, or that may connect to another one later: its port
//! must be free there as well. The words only help to choose; bitmaps decide. The agent corrects them in each sweep.

use crate::protocol;

/// Bit of a word: a destination keeps the port from others, as far as is known.
pub const KEPT: u64 = 1;
/// Added to a word for each socket that has the port.
pub const SOCKET: u64 = 2;

/// The best [`rank`].
pub const BEST: u64 = 0;
/// The highest [`rank`] of a port that no socket has, if the expected destination would accept it.
pub const UNUSED: u64 = 2;
/// [`rank`] is below for a port that the expected destination would accept.
const UNUSABLE: u64 = 1 << 62;

/// Index of the word of a port, counted from [`super::Config::base`].
#[inline(always)]
#[must_use]
pub const fn word(index: u32, protocol: u8) -> u32 {
    2 * index + if protocol == protocol::UDP { 1 } else { 0 }
}

/// Number of words for a pool with this many words in a bitmap.
#[inline(always)]
#[must_use]
pub const fn words(words: u32) -> u32 {
    word(words * 64, protocol::TCP)
}

/// Number of sockets that have the port. Below zero is an error of counting.
#[inline(always)]
#[must_use]
pub const fn sockets(word: u64) -> u64 {
    let sockets = word.cast_signed() >> 1;
    if sockets < 0 { 0 } else { sockets.cast_unsigned() }
}

/// The lower, the better the port for a socket whose destination is not known. The expected destination would accept it
/// (`usable`), or keeps it for the namespace of the socket (`warm`); without an expectation all are usable, and none is warm.
///
/// Best is a warm port, so that the namespace keeps no more ports than it needs, and needs no share for one more; then one that
/// no destination keeps, since each accepts it.
#[inline(always)]
#[must_use]
pub const fn rank(word: u64, usable: bool, warm: bool, expected: bool) -> u64 {
    let sockets = sockets(word);
    let used = if sockets > 0 {
        UNUSED + sockets
    } else if warm {
        BEST
    } else if word & KEPT == 0 {
        if expected { 1 } else { BEST }
    } else {
        UNUSED
    };
    if usable { used } else { UNUSABLE + used }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_without_sockets_come_first_and_ports_that_are_refused_last() {
        let words = [0, KEPT, SOCKET, SOCKET | KEPT, 2 * SOCKET, (1000 * SOCKET) | KEPT];
        let ranks = words.map(|word| rank(word, true, false, false));
        assert!(ranks.is_sorted() && ranks[..2] == [BEST, UNUSED] && ranks[2] > UNUSED, "{ranks:?}");
        assert!(ranks[5] < rank(0, false, false, false));
        assert_eq!((sockets(SOCKET.wrapping_neg()), sockets((3 * SOCKET) | KEPT)), (0, 3));
        // With an expectation, one that its destination keeps for the namespace comes first.
        let (warm, unkept) = (rank(KEPT, true, true, true), rank(0, true, false, true));
        assert!(warm == BEST && BEST < unkept && unkept < UNUSED, "{warm} {unkept}");
    }
}
