//! Cheap questions to the kernel: has anything changed, without reading every rule.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::net::{AddressFamily, SocketType};

use super::ruleset::{Family, Table};

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
const NFNL_BATCH_GENID: u16 = 1;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_GETGEN: u16 = 16;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_GEN_ID: u16 = 1;
// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const NLMSG_HEADER: usize = 16;
const NFGEN_HEADER: usize = 4;

/// A socket to nf_tables in the network namespace it was opened in.
#[derive(Debug)]
pub(super) struct Nft {
    socket: Socket,
}

impl Nft {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// The number that grows with every change of the ruleset by anybody.
    pub(super) fn generation(&self) -> io::Result<u32> {
        let request = message((NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETGEN, NLM_F_REQUEST, 0, 0, 0, &[]);
        self.socket.send(&request, 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        error_of(&answer)?;
        attribute(&answer, NFTA_GEN_ID)
            .and_then(|value| value.try_into().ok())
            .map(u32::from_be_bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no generation in the answer"))
    }

    /// Returns whether a table exists. iptables-nft-save cannot be asked: for a missing table it prints an empty one.
    pub(super) fn has_table(&self, family: Family, table: Table) -> io::Result<bool> {
        let name = encode(NFTA_TABLE_NAME, &[table.name().as_bytes(), &[0]].concat());
        let request = message(
            (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETTABLE,
            NLM_F_REQUEST,
            0,
            protocol(family),
            0,
            &name,
        );
        self.socket.send(&request, 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        match error_of(&answer) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes a table with its chains, if the ruleset is still of `generation`.
    ///
    /// # Errors
    /// `ERESTART` if something was changed since.
    pub(super) fn delete_table(&self, family: Family, table: Table, generation: u32) -> io::Result<()> {
        let name = [table.name().as_bytes(), &[0]].concat();
        let genid = encode(NFNL_BATCH_GENID, &generation.to_be_bytes());
        let batch = [
            message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 1, 0, NFNL_SUBSYS_NFTABLES, &genid),
            message(
                (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_DELTABLE,
                NLM_F_REQUEST | NLM_F_ACK,
                2,
                protocol(family),
                0,
                &encode(NFTA_TABLE_NAME, &name),
            ),
            message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, 3, 0, NFNL_SUBSYS_NFTABLES, &[]),
        ]
        .concat();
        self.socket.send(&batch, 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        error_of(&answer)
    }
}

fn protocol(family: Family) -> u8 {
    let protocol = match family {
        Family::V4 => libc::NFPROTO_IPV4,
        Family::V6 => libc::NFPROTO_IPV6,
    };
    u8::try_from(protocol).unwrap_or_default()
}

/// A netlink message with an nfnetlink header; `resource` in network byte order.
fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(NLMSG_HEADER + NFGEN_HEADER + attributes.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(NLMSG_HEADER + NFGEN_HEADER + attributes.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend(0u32.to_ne_bytes());
    message.push(family);
    message.push(0);
    message.extend(resource.to_be_bytes());
    message.extend(attributes);
    message
}

fn encode(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut attribute = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// The value of the first attribute of `kind` in the first message.
fn attribute(answer: &[u8], kind: u16) -> Option<&[u8]> {
    let length = u32::from_ne_bytes(answer.get(..4)?.try_into().ok()?);
    let mut rest = answer.get(NLMSG_HEADER + NFGEN_HEADER..usize::try_from(length).ok()?)?;
    while let [l0, l1, k0, k1, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        if u16::from_ne_bytes([k0, k1]) == kind {
            return rest.get(4..length);
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
    None
}

fn error_of(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    let code = answer.get(16..20).and_then(|code| code.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        (Some(_), _) => Ok(()),
        (None, _) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The x_tables tables that exist in this network namespace; asking for one by name would make it.
pub(super) fn legacy_tables(family: Family) -> Vec<String> {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    // Not there: the kernel has no x_tables for this family, so no tables either.
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
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
        let mut info = [0; Self::INFO];
        info[..table.name().len()].copy_from_slice(table.name().as_bytes());
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
    fn an_attribute_is_found_behind_others() {
        let attributes = [encode(7, b"x"), encode(NFTA_GEN_ID, &42u32.to_be_bytes())].concat();
        let answer = message(0, 0, 0, 0, 0, &attributes);
        assert_eq!(attribute(&answer, NFTA_GEN_ID), Some(&42u32.to_be_bytes()[..]));
        assert_eq!(attribute(&answer, 9), None);
        assert_eq!(attribute(&answer[..10], 1), None);
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
