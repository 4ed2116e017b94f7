//! Netlink framing (RFC 3549; `linux/netlink.h`): requests into bytes, datagrams into replies, attributes into values.

use netlink_packet_core::{NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP_INTR, NetlinkBuffer};

use super::{Error, KernelError};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A message from the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reply<'a> {
    /// An object of a dump or an event: message type and body.
    Object(u16, &'a [u8]),
    /// The end of a dump, or the outcome of a request; `None` is success.
    Answer(Option<KernelError>),
}

/// Appends a message; the kernel fills in the sender's port.
pub(super) fn frame(bytes: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[u8]) {
    let start = bytes.len();
    bytes.resize(start + HEADER, 0);
    let mut header = NetlinkBuffer::new(&mut bytes[start..]);
    header.set_length(u32::try_from(HEADER + body.len()).expect("a message is small"));
    header.set_message_type(kind);
    header.set_flags(flags);
    header.set_sequence_number(sequence);
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Splits one datagram into replies: sequence number, whether the kernel marked their dump as inconsistent, content.
pub(super) fn parse_replies(datagram: &[u8]) -> impl Iterator<Item = Result<(u32, bool, Reply<'_>), Error>> {
    messages(datagram).map(|message| {
        let (header, body) = message?;
        let reply = match header.kind {
            NLMSG_OVERRUN => return Err(Error::Overrun),
            NLMSG_ERROR | NLMSG_DONE => Reply::Answer(parse_answer(&header, body)),
            kind => Reply::Object(kind, body),
        };
        Ok((header.sequence, header.flags & NLM_F_DUMP_INTR != 0, reply))
    })
}

/// `struct nlmsghdr`, without the length.
pub(crate) struct Header {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) port: u32,
}

/// Splits one datagram into its messages, without `NLMSG_NOOP`.
pub(crate) fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<(Header, &[u8]), Error>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        loop {
            if rest.is_empty() {
                return None;
            }
            let message = match NetlinkBuffer::new_checked(rest) {
                Ok(message) => message,
                Err(error) => {
                    rest = &[];
                    return Some(Err(Error::Malformed(error.to_string())));
                }
            };
            let length = message.length() as usize;
            let header = Header {
                kind: message.message_type(),
                flags: message.flags(),
                sequence: message.sequence_number(),
                port: message.port_number(),
            };
            let body = &rest[HEADER..length];
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            if header.kind != NLMSG_NOOP {
                return Some(Ok((header, body)));
            }
        }
    })
}

/// `struct nlmsgerr`: a negated errno, the request (its header alone if capped), attributes. The end of a dump has
/// the errno and attributes only.
fn parse_answer(header: &Header, body: &[u8]) -> Option<KernelError> {
    let errno = body.get(..4).and_then(|code| code.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if errno == 0 {
        return None;
    }
    let attributes = if header.flags & NLM_F_ACK_TLVS == 0 {
        None
    } else if header.kind == NLMSG_DONE {
        body.get(4..)
    } else {
        let request =
            body.get(4..).and_then(|request| Some(u32::from_ne_bytes(*request.first_chunk()?) as usize));
        let skipped = if header.flags & NLM_F_CAPPED != 0 { Some(HEADER) } else { request };
        skipped.and_then(|length| body.get(4 + length.next_multiple_of(4)..))
    };
    let message = attributes
        .and_then(|attributes| attribute(attributes, NLMSGERR_ATTR_MSG))
        .map(|text| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned());
    Some(KernelError { errno: errno.wrapping_neg(), message })
}

/// Walks attributes (`struct nlattr`): their types without flags, and their values. One that is cut short ends the walk.
pub(crate) fn attributes(mut buffer: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// `struct nlattr`.
    const HEADER: usize = 4;
    /// Without the flags "nested" and "network byte order" (`NLA_TYPE_MASK`).
    const TYPE: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1, ..] = *buffer else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = buffer.get(HEADER..length)?;
        buffer = buffer.get(length.next_multiple_of(HEADER)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & TYPE, value))
    })
}

/// Returns the value of the first attribute of a type.
pub(crate) fn attribute(buffer: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(buffer).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// Flag of attributes that contain attributes (`NLA_F_NESTED`, linux/netlink.h).
pub(crate) const NESTED: u16 = 1 << 15;

/// Encodes one attribute.
pub(crate) fn encode_attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("an attribute is short");
    let mut bytes = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replies(bytes: &[u8]) -> Vec<(u32, bool, Reply<'_>)> {
        parse_replies(bytes).collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn an_interrupted_dump_is_seen_in_any_of_its_messages() {
        let mut bytes = Vec::new();
        frame(&mut bytes, 24, 2, 7, &[1, 2, 3]);
        frame(&mut bytes, 24, 2 | NLM_F_DUMP_INTR, 7, &[4]);
        frame(&mut bytes, NLMSG_DONE, 2, 7, &0i32.to_ne_bytes());
        let expected = vec![
            (7, false, Reply::Object(24, &[1, 2, 3])),
            (7, true, Reply::Object(24, &[4])),
            (7, false, Reply::Answer(None)),
        ];
        assert_eq!(replies(&bytes), expected);
    }

    #[test]
    fn the_kernel_message_is_found_behind_a_capped_request() {
        let mut body = (-libc::ENETUNREACH).to_ne_bytes().to_vec();
        // The header of the request, then NLMSGERR_ATTR_MSG.
        body.extend([40u8, 0, 0, 0, 24, 0, 5, 6, 1, 0, 0, 0, 0, 0, 0, 0]);
        body.extend(8u16.to_ne_bytes());
        body.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
        body.extend(*b"bad\0");
        let mut bytes = Vec::new();
        frame(&mut bytes, NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, 1, &body);
        let error = KernelError { errno: libc::ENETUNREACH, message: Some("bad".into()) };
        assert_eq!(error.to_string(), "Network is unreachable (os error 101) (bad)");
        assert_eq!(replies(&bytes), [(1, false, Reply::Answer(Some(error)))]);
    }

    #[test]
    fn an_attribute_is_found_behind_others_and_with_flags() {
        let bytes = [encode_attribute(7, b"x"), encode_attribute(1 | NESTED, b"abcd")].concat();
        assert_eq!(attribute(&bytes, 1), Some(&b"abcd"[..]));
        assert_eq!(attribute(&bytes, 9), None);
        assert_eq!(attribute(&bytes[..bytes.len() - 1], 1), None);
        assert_eq!(attributes(&bytes).count(), 2);
    }

    proptest! {
        #[test]
        fn no_attributes_make_the_walk_panic_or_hang(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }

        #[test]
        fn no_datagram_makes_the_parser_panic_or_hang(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse_replies(&bytes).count() <= bytes.len());
        }
    }
}
