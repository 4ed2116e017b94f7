//! The messages of discovery.
//!
//! One TCP connection from the pod to the host carries, in this order, a *hello* (host to pod), an *announcement*
//! (pod to host) and an *answer* (host to pod). Between the last two the host connects back to the pod, through the
//! route it just learned, and exchanges a *check* for a *proof*.
//!
//! All integers are big-endian. Every message begins with the same eight bytes, and all but the hello end with 32
//! bytes of HMAC-SHA256 (RFC 2104, RFC 6234) over everything before them:
//!
//! ```text
//!  0  magic      4  "BRDG"
//!  4  version    1  1
//!  5  kind       1  1 hello, 2 announcement, 3 answer, 4 check, 5 proof
//!  6  length     2  of the whole message
//!
//! hello             announcement          answer                 check, proof
//!  8 challenge 16    8 challenge  16       8 nonce     16         8 nonce     16
//!                   24 nonce      16      24 status     1        24 challenge 16
//!                   40 timestamp   8      25 family     1        40 MAC       32
//!                   48 lifetime    4      26 text size  2
//!                   52 check port  2      28 lifetime   4
//!                   54 family      1      32 egress    16
//!                   55 name size   1      48 text
//!                   56 address    16       . MAC       32
//!                   72 name
//!                    . MAC        32
//! ```
//!
//! - *challenge*: random, new with every connection. An announcement is taken only with the challenge of its own
//!   connection: one that was recorded elsewhere is refused, also after the host forgot everything in a restart.
//! - *nonce*: random, chosen by the pod; the answer, the check and the proof repeat it, so that none of another
//!   announcement is taken for this one's.
//! - *timestamp*: milliseconds since 1970-01-01 UTC. One that differs from the host's clock by more than the
//!   tolerance is refused.
//! - *lifetime*: seconds; asked for in the announcement, granted in the answer.
//! - *family*: 4 or 6; of an IPv4 address the first four of the sixteen bytes count, the others are zero. 0 in an
//!   answer that names no address.
//! - *check port*: where the pod waits for the check; 0 for nowhere.
//! - *name*, *text*: UTF-8, at most 63 and 400 bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;

pub(crate) const MAGIC: [u8; 4] = *b"BRDG";
pub(crate) const VERSION: u8 = 1;
/// Length of the prefix of every message.
pub const PREFIX: usize = 8;
const MAC: usize = 32;
/// No message is longer.
pub const MAX_LENGTH: usize = 512;
/// The longest name of a pod, in bytes; that of a DNS label, which names of pods are made of.
pub const MAX_NAME: usize = 63;
const MAX_TEXT: usize = 400;

/// A random number that is used once.
pub type Nonce = [u8; 16];

/// A pre-shared key. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Vec<u8>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// The shortest key, in bytes.
    pub const MIN: usize = 16;

    /// Any bytes, at least [`Self::MIN`]; white space at the end does not count.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.trim_ascii_end();
        (bytes.len() >= Self::MIN).then(|| Self(bytes.to_vec()))
    }

    pub(crate) fn mac(&self, bytes: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(bytes);
        mac
    }
}

/// Content of an announcement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Repeats the hello's.
    pub challenge: Nonce,
    /// Chosen by the pod.
    pub nonce: Nonce,
    /// Milliseconds since 1970-01-01 UTC by the pod's clock.
    pub timestamp: u64,
    /// Seconds the pod asks for.
    pub lifetime: u32,
    /// Where it waits for the check; 0 for nowhere.
    pub check_port: u16,
    /// Its own address.
    pub address: IpAddr,
    /// Its name, for people.
    pub name: String,
}

/// Result of an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The route is there.
    Accepted,
    /// It is not; the text says why.
    Refused,
}

/// Answer of the host to an announcement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Repeats the announcement's.
    pub nonce: Nonce,
    /// Result of the announcement.
    pub status: Status,
    /// Seconds until the entry expires.
    pub lifetime: u32,
    /// The address the announcement came from.
    pub egress: Option<IpAddr>,
    /// For people.
    pub text: String,
}

/// The contents of a check and of a proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Repeats the announcement's.
    pub nonce: Nonce,
    /// Chosen by the host for this check, repeated in the proof.
    pub challenge: Nonce,
}

/// Any message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Host to pod, first.
    Hello(Nonce),
    /// Pod to host.
    Announcement(Announcement),
    /// Host to pod, last.
    Answer(Answer),
    /// Host to pod, on a connection of its own.
    Check(Token),
    /// Pod to host, on that connection.
    Proof(Token),
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// The other side speaks something else.
    #[error("this is not bridge's discovery protocol; check address and port")]
    Magic,
    /// The other side is of another version.
    #[error("version {0} of the discovery protocol is not known here; update the older side")]
    Version(u8),
    /// Lengths contradict each other, or a field has a value it cannot have.
    #[error("a malformed message")]
    Malformed,
    /// The keys differ, or the message was changed on its way.
    #[error("the message is not authentic; check that both sides have the same key file")]
    Authentication,
}

/// The length of the whole message, from its first [`PREFIX`] bytes.
pub fn length(prefix: &[u8; PREFIX]) -> Result<usize, ParseError> {
    if prefix[..4] != MAGIC {
        return Err(ParseError::Magic);
    }
    if prefix[4] != VERSION {
        return Err(ParseError::Version(prefix[4]));
    }
    let length = usize::from(u16::from_be_bytes([prefix[6], prefix[7]]));
    if (PREFIX..=MAX_LENGTH).contains(&length) { Ok(length) } else { Err(ParseError::Malformed) }
}

impl Message {
    /// As it goes over the wire. Names and texts that are too long are cut.
    #[must_use]
    pub fn encode(&self, key: &Key) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(MAGIC);
        bytes.push(VERSION);
        bytes.push(self.kind());
        bytes.extend([0; 2]);
        match self {
            Self::Hello(challenge) => bytes.extend(challenge),
            Self::Announcement(announcement) => {
                let name = cut(&announcement.name, MAX_NAME);
                let (family, address) = encode_address(Some(announcement.address));
                bytes.extend(announcement.challenge);
                bytes.extend(announcement.nonce);
                bytes.extend(announcement.timestamp.to_be_bytes());
                bytes.extend(announcement.lifetime.to_be_bytes());
                bytes.extend(announcement.check_port.to_be_bytes());
                bytes.push(family);
                bytes.push(u8::try_from(name.len()).expect("cut to 63 bytes"));
                bytes.extend(address);
                bytes.extend(name.as_bytes());
            }
            Self::Answer(answer) => {
                let text = cut(&answer.text, MAX_TEXT);
                let (family, egress) = encode_address(answer.egress);
                bytes.extend(answer.nonce);
                bytes.push(match answer.status {
                    Status::Accepted => 0,
                    Status::Refused => 1,
                });
                bytes.push(family);
                bytes.extend(u16::try_from(text.len()).expect("cut to 400 bytes").to_be_bytes());
                bytes.extend(answer.lifetime.to_be_bytes());
                bytes.extend(egress);
                bytes.extend(text.as_bytes());
            }
            Self::Check(token) | Self::Proof(token) => {
                bytes.extend(token.nonce);
                bytes.extend(token.challenge);
            }
        }
        let mac = if matches!(self, Self::Hello(_)) { 0 } else { MAC };
        let length = u16::try_from(bytes.len() + mac).expect("no message is longer than MAX_LENGTH");
        bytes[6..8].copy_from_slice(&length.to_be_bytes());
        if mac > 0 {
            let mac = key.mac(&bytes).finalize().into_bytes();
            bytes.extend(mac);
        }
        bytes
    }

    /// Reads one whole message. The MAC is compared in constant time, and before anything else is believed.
    pub fn parse(bytes: &[u8], key: &Key) -> Result<Self, ParseError> {
        let (prefix, _) = bytes.split_first_chunk::<PREFIX>().ok_or(ParseError::Malformed)?;
        if length(prefix)? != bytes.len() {
            return Err(ParseError::Malformed);
        }
        let kind = prefix[5];
        let signed = if kind == 1 {
            bytes
        } else {
            let (signed, mac) = bytes.split_last_chunk::<MAC>().ok_or(ParseError::Malformed)?;
            key.mac(signed).verify_slice(mac).map_err(|_| ParseError::Authentication)?;
            signed
        };
        let mut fields = Fields(signed.get(PREFIX..).ok_or(ParseError::Malformed)?);
        let message = match kind {
            1 => Self::Hello(fields.take()?),
            2 => {
                let (challenge, nonce) = (fields.take()?, fields.take()?);
                let (timestamp, lifetime) =
                    (u64::from_be_bytes(fields.take()?), u32::from_be_bytes(fields.take()?));
                let check_port = u16::from_be_bytes(fields.take()?);
                let [family, name_size] = fields.take()?;
                let address = decode_address(family, fields.take()?)?.ok_or(ParseError::Malformed)?;
                if usize::from(name_size) > MAX_NAME {
                    return Err(ParseError::Malformed);
                }
                let name = fields.text(name_size.into())?;
                Self::Announcement(Announcement {
                    challenge,
                    nonce,
                    timestamp,
                    lifetime,
                    check_port,
                    address,
                    name,
                })
            }
            3 => {
                let nonce = fields.take()?;
                let [status, family] = fields.take()?;
                let status = match status {
                    0 => Status::Accepted,
                    1 => Status::Refused,
                    _ => return Err(ParseError::Malformed),
                };
                let text_size = u16::from_be_bytes(fields.take()?);
                let lifetime = u32::from_be_bytes(fields.take()?);
                let egress = decode_address(family, fields.take()?)?;
                Self::Answer(Answer { nonce, status, lifetime, egress, text: fields.text(text_size.into())? })
            }
            4 => Self::Check(Token { nonce: fields.take()?, challenge: fields.take()? }),
            5 => Self::Proof(Token { nonce: fields.take()?, challenge: fields.take()? }),
            _ => return Err(ParseError::Malformed),
        };
        if fields.0.is_empty() { Ok(message) } else { Err(ParseError::Malformed) }
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Announcement(_) => 2,
            Self::Answer(_) => 3,
            Self::Check(_) => 4,
            Self::Proof(_) => 5,
        }
    }
}

/// The bytes that are left to be read.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(ParseError::Malformed)?;
        self.0 = rest;
        Ok(*field)
    }

    fn text(&mut self, size: usize) -> Result<String, ParseError> {
        let (text, rest) = self.0.split_at_checked(size).ok_or(ParseError::Malformed)?;
        self.0 = rest;
        let text = std::str::from_utf8(text).map_err(|_| ParseError::Malformed)?;
        // It ends up in logs and on terminals.
        if text.chars().any(char::is_control) { Err(ParseError::Malformed) } else { Ok(text.to_owned()) }
    }
}

fn encode_address(address: Option<IpAddr>) -> (u8, [u8; 16]) {
    match address {
        None => (0, [0; 16]),
        Some(IpAddr::V6(address)) => (6, address.octets()),
        Some(IpAddr::V4(address)) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&address.octets());
            (4, octets)
        }
    }
}

fn decode_address(family: u8, octets: [u8; 16]) -> Result<Option<IpAddr>, ParseError> {
    let [a, b, c, d, rest @ ..] = octets;
    match family {
        0 if octets == [0; 16] => Ok(None),
        4 if rest == [0; 12] => Ok(Some(Ipv4Addr::new(a, b, c, d).into())),
        6 => Ok(Some(Ipv6Addr::from(octets).into())),
        _ => Err(ParseError::Malformed),
    }
}

/// The longest part of `text` that fits.
fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> Key {
        Key::new(b"0123456789abcdef\n").unwrap()
    }

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|v4| Ipv4Addr::from(v4).into()),
            any::<u128>().prop_map(|v6| Ipv6Addr::from(v6).into())
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        let announcement =
            (any::<[Nonce; 2]>(), any::<u64>(), any::<u32>(), any::<u16>(), address(), "[a-zä.-]{0,30}")
                .prop_map(|([challenge, nonce], timestamp, lifetime, check_port, address, name)| {
                    Message::Announcement(Announcement {
                        challenge,
                        nonce,
                        timestamp,
                        lifetime,
                        check_port,
                        address,
                        name,
                    })
                });
        let answer =
            (any::<Nonce>(), any::<bool>(), any::<u32>(), prop::option::of(address()), "[ -~ä]{0,190}")
                .prop_map(|(nonce, accepted, lifetime, egress, text)| {
                    let status = if accepted { Status::Accepted } else { Status::Refused };
                    Message::Answer(Answer { nonce, status, lifetime, egress, text })
                });
        let token = || any::<[Nonce; 2]>().prop_map(|[nonce, challenge]| Token { nonce, challenge });
        prop_oneof![
            any::<Nonce>().prop_map(Message::Hello),
            announcement,
            answer,
            token().prop_map(Message::Check),
            token().prop_map(Message::Proof)
        ]
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let announcement = Message::Announcement(Announcement {
            challenge: [1; 16],
            nonce: [2; 16],
            timestamp: 3,
            lifetime: 4,
            check_port: 5,
            address: "10.200.1.91".parse().unwrap(),
            name: "pod".into(),
        });
        let bytes = announcement.encode(&key());
        assert_eq!(bytes[..8], *b"BRDG\x01\x02\x00\x6b");
        assert_eq!(bytes[8..40], [[1u8; 16], [2; 16]].concat());
        assert_eq!(bytes[40..56], [0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0, 5, 4, 3]);
        assert_eq!(bytes[56..75], *b"\x0a\xc8\x01\x5b\0\0\0\0\0\0\0\0\0\0\0\0pod");
        assert_eq!(bytes.len(), 75 + 32);
        assert_eq!(
            Message::Hello([9; 16]).encode(&key()),
            [b"BRDG\x01\x01\x00\x18".as_slice(), &[9; 16]].concat()
        );
    }

    #[test]
    fn a_short_key_is_no_key() {
        assert!(Key::new(b"0123456789abcde\n\n").is_none());
        assert_eq!(format!("{:?}", key()), "Key(..)");
    }

    #[test]
    fn the_longest_texts_fit() {
        let long = "ä".repeat(500);
        let answer =
            Answer { nonce: [0; 16], status: Status::Refused, lifetime: 0, egress: None, text: long };
        let bytes = Message::Answer(answer).encode(&key());
        assert!(bytes.len() <= MAX_LENGTH);
        let Ok(Message::Answer(answer)) = Message::parse(&bytes, &key()) else { panic!() };
        assert_eq!(answer.text, "ä".repeat(200));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed(message in message()) {
            let bytes = message.encode(&key());
            prop_assert_eq!(length(bytes.first_chunk().unwrap()), Ok(bytes.len()));
            prop_assert_eq!(Message::parse(&bytes, &key()), Ok(message));
        }

        #[test]
        fn one_changed_bit_or_another_key_is_noticed(message in message(), bit in any::<prop::sample::Index>()) {
            let mut bytes = message.encode(&key());
            let other = Key::new(b"0123456789abcdeF").unwrap();
            if !matches!(message, Message::Hello(_)) {
                prop_assert_eq!(Message::parse(&bytes, &other), Err(ParseError::Authentication));
            }
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(Message::parse(&bytes, &key()), Ok(message));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..8, fix in any::<bool>()) {
            if fix && bytes.len() >= 48 {
                // Past the first checks: a true prefix and a true MAC around nonsense.
                let length = u16::try_from(bytes.len()).unwrap();
                bytes[..6].copy_from_slice(&[b'B', b'R', b'D', b'G', 1, kind]);
                bytes[6..8].copy_from_slice(&length.to_be_bytes());
                let end = bytes.len() - MAC;
                let mac = key().mac(&bytes[..end]).finalize().into_bytes();
                bytes[end..].copy_from_slice(&mac);
            }
            if let Ok(message) = Message::parse(&bytes, &key()) {
                prop_assert_eq!(message.encode(&key()), bytes);
            }
        }
    }
}
