//! Messages of discovery.

use hmac::Mac as _;

use crate::routes::discovery::message::{self, Key, Message, PREFIX, ParseError};

/// The bytes unchanged, and, since a MAC cannot be guessed, as kind and body of a message with the right MAC. An
/// accepted message is authentic, and encodes to the same bytes.
///
/// # Panics
/// It is not so.
pub fn discovery(input: &[u8]) -> bool {
    let key = |byte| Key::new(&[byte; 32]).expect("long enough");
    let (ours, theirs) = (key(7), key(8));
    if let Some(prefix) = input.first_chunk::<PREFIX>() {
        let _ = message::length(prefix);
    }
    check(input, &ours, &theirs) | check(&sealed(input, &ours), &ours, &theirs)
}

fn check(bytes: &[u8], key: &Key, other: &Key) -> bool {
    let Ok(message) = Message::parse(bytes, key) else { return false };
    assert_eq!(message.encode(key), bytes, "{message:?}");
    // The only message without a key: it is nothing but a random number.
    if matches!(message, Message::Hello(_)) {
        return true;
    }
    let refused = Err(ParseError::Authentication);
    assert_eq!(Message::parse(bytes, other), refused, "under another key");
    let mut changed = bytes.to_vec();
    // A bit behind the prefix, another one with each message.
    let bits = (bytes.len() - PREFIX) * 8;
    let bit =
        PREFIX * 8 + bytes.iter().fold(0, |sum: usize, byte| sum * 31 % bits + usize::from(*byte)) % bits;
    changed[bit / 8] ^= 1 << (bit % 8);
    assert_eq!(Message::parse(&changed, key), refused, "with bit {bit} changed");
    true
}

/// Uses the first byte as the kind of a message and the others as its body, with a correct prefix and MAC.
fn sealed(bytes: &[u8], key: &Key) -> Vec<u8> {
    let (kind, body) = bytes.split_first().unwrap_or((&0, &[]));
    let mac_length = if *kind == 1 { 0 } else { 32 };
    let length = u16::try_from(PREFIX + body.len() + mac_length).unwrap_or(u16::MAX);
    let [high, low] = length.to_be_bytes();
    let signed = [&message::MAGIC[..], &[message::VERSION, *kind, high, low], body].concat();
    let mac = key.mac(&signed).finalize().into_bytes();
    [&signed, &mac[..mac_length]].concat()
}
