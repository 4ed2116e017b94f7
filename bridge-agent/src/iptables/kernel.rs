//! Cheap questions to the kernel: has anything changed, without reading every rule.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::NLM_F_ACK;
use netlink_sys::protocols::NETLINK_NETFILTER;
use rustix::net::{AddressFamily, SocketType};

use super::render::DENY;
use super::ruleset::{Family, Table, is_own};
use crate::kernel::{
    netlink::{Socket, attribute, attributes, encode_attribute},
    nftables,
};

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFNL_BATCH_GENID: u16 = 1;
const NFT_MSG_GETTABLE: u16 = (NFNL_SUBSYS_NFTABLES << 8) | 1;
const NFT_MSG_DELTABLE: u16 = (NFNL_SUBSYS_NFTABLES << 8) | 2;
const NFT_MSG_GETRULE: u16 = (NFNL_SUBSYS_NFTABLES << 8) | 7;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NF_DROP: &[u8] = &0_u32.to_be_bytes();
/// Bytes of `struct nfgenmsg`.
const NFGEN_HEADER: usize = 4;

/// A socket to nf_tables in the network namespace it was opened in.
#[derive(Debug)]
pub(super) struct Nft {
    socket: Socket,
}

impl Nft {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(NETLINK_NETFILTER)? })
    }

    /// Returns the generation, which the kernel increments with every change of the ruleset.
    pub(super) fn generation(&mut self) -> io::Result<u32> {
        nftables::generation(&mut self.socket)
    }

    /// Returns whether a table exists. iptables-nft-save cannot say: asked for a table by name, it prints an empty one.
    pub(super) fn has_table(&mut self, family: Family, table: Table) -> io::Result<bool> {
        match self.socket.get(NFT_MSG_GETTABLE, &body(protocol(family), 0, &name(table)), |_, _| Some(())) {
            Ok(_) => Ok(true),
            Err(error) => match io::Error::from(error) {
                error if error.kind() == io::ErrorKind::NotFound => Ok(false),
                error => Err(error),
            },
        }
    }

    /// Hashes the packet counters of the rules of own chains that deny, apart from those of the chain that all denied packets
    /// come to: as long as it is the same, none of them has denied a packet.
    pub(super) fn denied(
        &mut self,
        family: Family,
        table: Table,
        hasher: &mut impl Hasher,
    ) -> io::Result<()> {
        let request = body(protocol(family), 0, &name(table));
        let rules =
            self.socket.dump(NFT_MSG_GETRULE, &request, |_, rule| denial(rule.get(NFGEN_HEADER..)?))?;
        rules.hash(hasher);
        Ok(())
    }

    /// Removes a table with its chains, if the ruleset still has this generation.
    ///
    /// # Errors
    /// `ERESTART` if the ruleset has changed since.
    pub(super) fn delete_table(&mut self, family: Family, table: Table, generation: u32) -> io::Result<()> {
        let generation = encode_attribute(NFNL_BATCH_GENID, &generation.to_be_bytes());
        Ok(self.socket.batch(&[
            (NFNL_MSG_BATCH_BEGIN, 0, body(0, NFNL_SUBSYS_NFTABLES, &generation)),
            (NFT_MSG_DELTABLE, NLM_F_ACK, body(protocol(family), 0, &name(table))),
            (NFNL_MSG_BATCH_END, 0, body(0, NFNL_SUBSYS_NFTABLES, &[])),
        ])?)
    }
}

/// Returns handle and packets of a rule of an own chain that denies, as it is in big-endian byte order.
fn denial(rule: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let text = |of, kind| std::str::from_utf8(attribute(of, kind)?.strip_suffix(&[0])?).ok();
    let chain = text(rule, NFTA_RULE_CHAIN)?;
    if !is_own(chain) || chain == DENY {
        return None;
    }
    let (mut packets, mut denies) = (&[][..], false);
    for (_, expression) in attributes(attribute(rule, NFTA_RULE_EXPRESSIONS)?) {
        let Some(data) = attribute(expression, NFTA_EXPR_DATA) else { continue };
        match text(expression, NFTA_EXPR_NAME) {
            Some("counter") => packets = attribute(data, NFTA_COUNTER_PACKETS).unwrap_or_default(),
            Some("reject") => denies = true,
            Some("target") => denies |= text(data, NFTA_TARGET_NAME) == Some("REJECT"),
            Some("immediate") => {
                let verdict = attribute(data, NFTA_IMMEDIATE_DATA)
                    .and_then(|data| attribute(data, NFTA_DATA_VERDICT))
                    .unwrap_or_default();
                let drops = attribute(verdict, NFTA_VERDICT_CODE) == Some(NF_DROP);
                denies |= drops || text(verdict, NFTA_VERDICT_CHAIN) == Some(DENY);
            }
            _ => {}
        }
    }
    denies.then(|| (attribute(rule, NFTA_RULE_HANDLE).unwrap_or_default().to_vec(), packets.to_vec()))
}

fn name(table: Table) -> Vec<u8> {
    encode_attribute(NFTA_TABLE_NAME, &[table.name().as_bytes(), &[0]].concat())
}

fn protocol(family: Family) -> u8 {
    let protocol = match family {
        Family::V4 => libc::NFPROTO_IPV4,
        Family::V6 => libc::NFPROTO_IPV6,
    };
    u8::try_from(protocol).unwrap_or_default()
}

/// Encodes `struct nfgenmsg`, whose `resource` is in network byte order, and attributes.
fn body(family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    [&[family, 0], &resource.to_be_bytes()[..], attributes].concat()
}

/// The x_tables tables that exist in this network namespace; asking for one by name would make it.
pub(super) fn legacy_tables(family: Family) -> Vec<String> {
    read_legacy_tables(family).unwrap_or_default()
}

fn read_legacy_tables(family: Family) -> io::Result<Vec<String>> {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    match std::fs::read_to_string(file) {
        Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
        // The kernel has no x_tables for this family, so no tables either.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Returns the tables of iptables-legacy with rules or chains in this network namespace, each named once. A table that was only
/// listed exists, and holds nothing. Without CAP_NET_ADMIN every table that exists counts.
///
/// # Errors
/// This user may not see them.
pub fn legacy_in_use() -> io::Result<Vec<String>> {
    let mut used = Vec::new();
    for family in Family::ALL {
        let socket = Legacy::open(family);
        for table in read_legacy_tables(family)? {
            let holds =
                socket.as_ref().map_or(true, |socket| socket.info(&table).map_or(true, |info| holds(&info)));
            if holds && !used.contains(&table) {
                used.push(table);
            }
        }
    }
    Ok(used)
}

/// Whether a table holds more than a policy for each of its hooks, and its end.
fn holds(outline: &Outline) -> bool {
    let word = |at: usize| {
        let bytes = outline.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
        u32::from_ne_bytes(bytes)
    };
    let (valid_hooks, entries) = (word(32), word(76));
    entries > valid_hooks.count_ones() + 1
}

/// A socket to the tables of x_tables in the network namespace it was opened in.
#[derive(Debug)]
pub(super) struct Legacy {
    socket: OwnedFd,
    family: Family,
}

/// Where hooks begin in the table, how many rules it has, and their size: the answer to `IPT_SO_GET_INFO`.
pub(super) type Outline = [u8; Legacy::INFO];

impl Legacy {
    // linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h: the options have the same numbers.
    const GET_INFO: libc::c_int = 64;
    const GET_ENTRIES: libc::c_int = 65;
    /// `struct ipt_getinfo`: name, valid_hooks, hook_entry[5], underflow[5], num_entries, size.
    const INFO: usize = 32 + 4 + 20 + 20 + 4 + 4;
    /// `struct ipt_get_entries`: name, size, padding.
    const ENTRIES: usize = 40;

    pub(super) fn open(family: Family) -> io::Result<Self> {
        let domain = match family {
            Family::V4 => AddressFamily::INET,
            Family::V6 => AddressFamily::INET6,
        };
        Ok(Self { socket: rustix::net::socket(domain, SocketType::DGRAM, None)?, family })
    }

    /// Whatever is added or removed changes it, by size if not by count. The table must exist, or it is made.
    pub(super) fn outline(&self, table: Table) -> io::Result<Outline> {
        self.info(table.name())
    }

    fn info(&self, table: &str) -> io::Result<Outline> {
        let mut info = [0; Self::INFO];
        let name = info.get_mut(..table.len().min(31)).unwrap_or_default();
        name.copy_from_slice(&table.as_bytes()[..name.len()]);
        self.getsockopt(Self::GET_INFO, &mut info)?;
        Ok(info)
    }

    /// A hash over every rule, counters left out: one copy of the table out of the kernel and one pass over it.
    pub(super) fn fingerprint(&self, table: Table, outline: &Outline) -> io::Result<u64> {
        let [.., a, b, c, d] = *outline;
        let size = [a, b, c, d];
        let length = usize::try_from(u32::from_ne_bytes(size)).unwrap_or_default();
        let mut entries = vec![0; Self::ENTRIES + length];
        entries[..table.name().len()].copy_from_slice(table.name().as_bytes());
        entries[32..36].copy_from_slice(&size);
        self.getsockopt(Self::GET_ENTRIES, &mut entries)?;
        let mut hasher = DefaultHasher::new();
        hash_entries(self.family, &entries[Self::ENTRIES..], &mut hasher);
        Ok(hasher.finish())
    }

    fn getsockopt(&self, option: libc::c_int, value: &mut [u8]) -> io::Result<()> {
        let level = match self.family {
            Family::V4 => libc::IPPROTO_IP,
            Family::V6 => libc::IPPROTO_IPV6,
        };
        let mut length = libc::socklen_t::try_from(value.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let socket = self.socket.as_raw_fd();
        // SAFETY: the kernel writes at most `length` bytes, which is the size of `value`.
        let result =
            unsafe { libc::getsockopt(socket, level, option, value.as_mut_ptr().cast(), &raw mut length) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Hashes `struct ipt_entry` (`struct ip6t_entry`) after entry without `comefrom` and the counters, which change by
/// themselves.
fn hash_entries(family: Family, entries: &[u8], hasher: &mut DefaultHasher) {
    // Offsets of next_offset, of comefrom, and behind the counters.
    let (next_offset, volatile, elements) = match family {
        Family::V4 => (90, 92, 112),
        Family::V6 => (142, 144, 168),
    };
    let mut rest = entries;
    while rest.len() >= elements {
        let length = usize::from(u16::from_ne_bytes([rest[next_offset], rest[next_offset + 1]]));
        let length = length.clamp(elements, rest.len());
        rest[..volatile].hash(hasher);
        rest[elements..length].hash(hasher);
        rest = &rest[length..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_deny_are_found_with_their_packets() {
        let text = |kind, text: &str| encode_attribute(kind, &[text.as_bytes(), &[0]].concat());
        let expression = |name, data: &[u8]| {
            let parts = [text(NFTA_EXPR_NAME, name), encode_attribute(NFTA_EXPR_DATA, data)];
            encode_attribute(1, &parts.concat())
        };
        let counter = expression("counter", &encode_attribute(NFTA_COUNTER_PACKETS, &7_u64.to_be_bytes()));
        let found = |chain: &str, last: Vec<u8>| {
            let expressions = encode_attribute(NFTA_RULE_EXPRESSIONS, &[counter.clone(), last].concat());
            let handle = encode_attribute(NFTA_RULE_HANDLE, &5_u64.to_be_bytes());
            denial(&[text(NFTA_RULE_CHAIN, chain), handle, expressions].concat())
        };
        let verdict = |code: i32, chain: Option<&str>| {
            let chain = chain.map(|chain| text(NFTA_VERDICT_CHAIN, chain)).unwrap_or_default();
            let verdict = [encode_attribute(NFTA_VERDICT_CODE, &code.to_be_bytes()), chain].concat();
            let data = encode_attribute(NFTA_DATA_VERDICT, &verdict);
            expression("immediate", &encode_attribute(NFTA_IMMEDIATE_DATA, &data))
        };
        const CHAIN: &str = "BRIDGE-INBOUND";
        const GOTO: i32 = -4;
        let denies = Some((5_u64.to_be_bytes().to_vec(), 7_u64.to_be_bytes().to_vec()));
        assert_eq!(found(CHAIN, verdict(0, None)), denies);
        assert_eq!(found(CHAIN, verdict(GOTO, Some(DENY))), denies);
        assert_eq!(found(CHAIN, expression("target", &text(NFTA_TARGET_NAME, "REJECT"))), denies);
        assert_eq!(found(CHAIN, expression("reject", &[])), denies);
        assert_eq!(found(CHAIN, verdict(GOTO, Some("BRIDGE-PEER"))), None);
        assert_eq!(found(CHAIN, verdict(1, None)), None);
        assert_eq!(found(CHAIN, expression("target", &text(NFTA_TARGET_NAME, "MARK"))), None);
        assert_eq!(found(CHAIN, Vec::new()), None);
        assert_eq!(found("FORWARD", verdict(0, None)), None, "a rule of others");
        assert_eq!(found(DENY, verdict(0, None)), None, "counted on the way there");
    }

    #[test]
    fn counters_do_not_change_the_hash_and_rules_do() {
        for (family, size, counters) in [(Family::V4, 152usize, 96), (Family::V6, 208, 152)] {
            let next = if family == Family::V4 { 90 } else { 142 };
            let mut entry = vec![0u8; size];
            entry[next..next + 2].copy_from_slice(&u16::try_from(size).unwrap().to_ne_bytes());
            let table = [entry.clone(), entry].concat();
            let hash = |table: &[u8]| {
                let mut hasher = DefaultHasher::new();
                hash_entries(family, table, &mut hasher);
                hasher.finish()
            };
            let mut counted = table.clone();
            counted[size + counters] = 1;
            assert_eq!(hash(&table), hash(&counted));
            let mut changed = table.clone();
            changed[size + 3] = 1;
            assert_ne!(hash(&table), hash(&changed));
            let mut target = table.clone();
            target[2 * size - 1] = 1;
            assert_ne!(hash(&table), hash(&target));
        }
    }
}
