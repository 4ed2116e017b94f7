//! A bitmap with a summary: finds a free bit among 65,536 by reading at most 18 words, however full it is.
//!
//! A set bit is free. The same code runs in the connect hooks and in the agent, at the same time, on the same words.

/// Memory that several processors change at once.
///
/// All operations are sequentially consistent on one word and full barriers, as the fetching atomics of eBPF are.
pub trait Memory {
    /// The word `at`; 0 if there is none.
    fn load(&self, at: u32) -> u64;
    /// Writes the word `at`, which no other thread may see yet.
    fn store(&self, at: u32, value: u64);
    /// Sets bits; returns the former word.
    fn fetch_or(&self, at: u32, bits: u64) -> u64;
    /// Keeps bits; returns the former word.
    fn fetch_and(&self, at: u32, bits: u64) -> u64;
    /// Adds, wrapping around; returns the former word.
    fn fetch_add(&self, at: u32, n: u64) -> u64;

    /// [`find_word`].
    fn find_word(&self, map: Bitmap, start: u32) -> Option<u32> {
        find_word(self, map, start)
    }
}

/// Where a bitmap lies: its summary, then its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Index of the first summary word.
    pub at: u32,
    /// Summary words; `words` divided by 64, rounded up.
    pub summary: u32,
    /// Words of 64 bits each; at least 1.
    pub words: u32,
}

/// Number of times that [`claim`] starts again after it lost a race for a bit, or found a word that the summary was
/// wrong about.
pub const CLAIM_TRIES: u32 = 32;

/// Most words of a bitmap: all 65,536 ports.
pub const MAX_WORDS: u32 = 1024;
/// Most summary words: one bit for each of [`MAX_WORDS`].
const MAX_SUMMARY: u32 = MAX_WORDS / 64;

/// Position of the lowest set bit. Not for 0.
///
/// Without a branch: eBPF has no instruction for it, and a search that branches per bit multiplies the states that the
/// verifier has to follow.
#[inline(always)]
#[must_use]
pub const fn lowest(word: u64) -> u32 {
    count((word & word.wrapping_neg()).wrapping_sub(1))
}

/// Number of set bits, also without a branch.
#[inline(always)]
#[must_use]
pub const fn count(word: u64) -> u32 {
    let mut x = word;
    x -= (x >> 1) & 0x5555_5555_5555_5555;
    x = (x & 0x3333_3333_3333_3333) + ((x >> 2) & 0x3333_3333_3333_3333);
    x = (x + (x >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    (x.wrapping_mul(0x0101_0101_0101_0101) >> 56) as u32
}

impl Bitmap {
    /// Index of word `word`.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u32) -> u32 {
        self.at + self.summary + word
    }
}

/// The first word from `start` on, wrapping around, of which the summary says that it has a free bit.
///
/// Small enough for the verifier to follow every way through; apart from [`claim`], so that it does so once.
#[inline(always)]
pub fn find_word<M: Memory + ?Sized>(memory: &M, map: Bitmap, start: u32) -> Option<u32> {
    let groups = map.summary.max(1);
    let mut group = start >> 6;
    let mut wanted = u64::MAX << (start & 63);
    // The first group is looked at twice: from `start` on, and at the very end below `start`.
    let mut seen = 0;
    while seen <= MAX_SUMMARY {
        if seen > map.summary {
            break;
        }
        let candidates = memory.load(map.at + group) & wanted;
        if candidates != 0 {
            return Some((group << 6) + lowest(candidates));
        }
        wanted = u64::MAX;
        // Not a comparison: the verifier would follow both ways in each round.
        group = (group + 1) % groups;
        seen += 1;
    }
    None
}

/// Takes some free bit, looking from a random place on. `None`: every bit is taken.
#[inline(always)]
pub fn claim<M: Memory + ?Sized>(memory: &M, map: Bitmap, random: u32) -> Option<u32> {
    // The high bits choose the word, the low ones where to begin in it.
    let start = ((u64::from(random) * u64::from(map.words)) >> 32) as u32;
    let turn = random & 63;
    let mut tries = 0;
    while tries < CLAIM_TRIES {
        tries += 1;
        let word = memory.find_word(map, start)?;
        let free = memory.load(map.word(word));
        if free == 0 {
            forget_word(memory, map, word);
            continue;
        }
        let index = (word << 6) + ((lowest(free.rotate_right(turn)) + turn) & 63);
        if take(memory, map, index) {
            return Some(index);
        }
    }
    None
}

/// Takes this very bit. `false`: it was taken.
#[inline(always)]
pub fn take<M: Memory + ?Sized>(memory: &M, map: Bitmap, index: u32) -> bool {
    let bit = 1 << (index & 63);
    let before = memory.fetch_and(map.word(index >> 6), !bit);
    if before == bit {
        forget_word(memory, map, index >> 6);
    }
    before & bit != 0
}

/// Frees a bit. `false`: it was free.
#[inline(always)]
pub fn free<M: Memory + ?Sized>(memory: &M, map: Bitmap, index: u32) -> bool {
    let bit = 1 << (index & 63);
    let before = memory.fetch_or(map.word(index >> 6), bit);
    if before == 0 {
        memory.fetch_or(map.at + (index >> 12), 1 << ((index >> 6) & 63));
    }
    before & bit == 0
}

/// Whether a bit is free.
#[inline(always)]
pub fn is_free<M: Memory + ?Sized>(memory: &M, map: Bitmap, index: u32) -> bool {
    memory.load(map.word(index >> 6)) & (1 << (index & 63)) != 0
}

/// Notes in the summary that a word is empty, unless another processor has freed a bit of it meanwhile.
#[inline(always)]
fn forget_word<M: Memory + ?Sized>(memory: &M, map: Bitmap, word: u32) {
    let bit = 1 << (word & 63);
    memory.fetch_and(map.at + (word >> 6), !bit);
    if memory.load(map.word(word)) != 0 {
        memory.fetch_or(map.at + (word >> 6), bit);
    }
}
