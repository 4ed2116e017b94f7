//! Pseudonyms for addresses and names, the same for the same one everywhere in a report.
//!
//! Addresses keep their structure: two that share a prefix have pseudonyms that share one of the same length (Crypto-PAn, Xu
//! et al. 2002, with HMAC-SHA-256), so that routes, networks and rules still fit together. The key is forgotten at the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Keys of JSON and YAML whose value is the name of a host, a pod or a user.
const NAME_KEYS: [&str; 14] = [
    "host",
    "pod",
    "namespace",
    "node",
    "nodename",
    "hostname",
    "sourcename",
    "destinationname",
    "cluster",
    "server",
    "user",
    "username",
    "podname",
    "context",
];
/// Names that say nothing.
const COMMON: [&str; 12] = [
    "default",
    "local",
    "kernel",
    "localhost",
    "kube-system",
    "bridge",
    "node",
    "host",
    "root",
    "main",
    "tcp",
    "udp",
];
/// Keys whose value is a secret.
const SECRET_KEYS: [&str; 8] = [
    "token",
    "password",
    "secret",
    "client-key-data",
    "client-certificate-data",
    "authorization",
    "key",
    "bearer",
];

/// Replaces addresses, names and secrets.
pub(super) struct Redactor {
    key: Hmac<Sha256>,
    /// Whether addresses and names are replaced; secrets always are.
    all: bool,
    names: BTreeMap<String, String>,
    addresses: BTreeMap<IpAddr, IpAddr>,
}

impl Redactor {
    pub(super) fn new(all: bool) -> io::Result<Self> {
        let mut random = [0; 32];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
        let key = Hmac::new_from_slice(&random).map_err(io::Error::other)?;
        let mut this = Self { key, all, names: BTreeMap::new(), addresses: BTreeMap::new() };
        let uname = rustix::system::uname();
        let host = uname.nodename().to_string_lossy();
        if all && !COMMON.contains(&&*host) {
            this.names.insert(host.into_owned(), "host-0".to_owned());
        }
        Ok(this)
    }

    fn add_name(&mut self, name: &str) {
        let name = name.trim_matches(['"', '\'', ' ', ',']);
        let says_something = name.len() > 2
            && !COMMON.contains(&name)
            && name.chars().any(|letter| letter.is_ascii_alphabetic())
            && name.parse::<IpAddr>().is_err()
            && !name.contains(['{', '[', '(', ' ']);
        if self.all && says_something && !self.names.contains_key(name) {
            let number = self.names.len() + 1;
            self.names.insert(name.to_owned(), format!("name-{number}"));
        }
    }

    /// Collects the names in a text.
    pub(super) fn learn(&mut self, text: &str) {
        let mut found = BTreeSet::new();
        for line in text.lines() {
            // Flow style of YAML has several keys in a line.
            for part in line.split([',', '{', '}']) {
                let Some((key, value)) = part.split_once(": ") else { continue };
                let key = key.trim_matches([' ', '"', '\'', '-']).to_ascii_lowercase();
                let value = value.trim().trim_end_matches(',').trim_matches(['"', '\'']);
                let of_address = key.parse::<ipnet::IpNet>().is_ok() || parse(&key).is_some() || is_id(&key);
                if of_address || NAME_KEYS.contains(&key.as_str()) {
                    found.insert(value.to_owned());
                    found.extend(value.split('/').map(str::to_owned));
                }
            }
            // Hosts of URLs.
            for (place, _) in line.match_indices("://") {
                let rest = &line[place + 3..];
                let end = rest.find(|letter: char| !is_name(letter)).unwrap_or(rest.len());
                found.insert(rest[..end].to_owned());
            }
        }
        for name in found {
            self.add_name(&name);
        }
    }

    /// Replaces all that is known.
    pub(super) fn redact(&mut self, text: &str) -> String {
        let mut redacted = String::with_capacity(text.len());
        for line in text.split_inclusive('\n') {
            let line = without_secrets(line);
            if self.all {
                self.line(&line, &mut redacted);
            } else {
                redacted.push_str(&line);
            }
        }
        redacted
    }

    /// Replaces word by word: a word is a run of letters, digits and the signs of addresses and names.
    fn line(&mut self, line: &str, redacted: &mut String) {
        let mut rest = line;
        while !rest.is_empty() {
            let start = rest.find(is_word).unwrap_or(rest.len());
            redacted.push_str(&rest[..start]);
            rest = &rest[start..];
            let end = rest.find(|letter| !is_word(letter)).unwrap_or(rest.len());
            let word = self.word(&rest[..end]);
            redacted.push_str(&word);
            rest = &rest[end..];
        }
    }

    fn word(&mut self, word: &str) -> String {
        if let Some(name) = self.names.get(word) {
            return name.clone();
        }
        // Before the signs at its end: a network may end in colons.
        if let Some(address) = parse(word) {
            return self.address(address).to_string();
        }
        let (core, tail) = word.split_at(word.trim_end_matches([':', '.', '-']).len());
        if tail.len() < word.len() && !tail.is_empty() {
            return self.word(core) + tail;
        }
        if is_mac(word) {
            return self.mac(word);
        }
        if is_id(word) {
            return format!("id-{}", hex(&self.digest(word.as_bytes())[..6]));
        }
        if let Some((start, name, pseudonym)) = self.inside(word) {
            let (head, tail) = (&word[..start], &word[start + name..]);
            return self.word(head) + &pseudonym + &self.word(tail);
        }
        // A range of addresses, an address with a port, an identifier inside a name.
        for sign in ['=', '-', '_', ':', '.'] {
            if let Some((head, tail)) = word.rsplit_once(sign)
                && !head.is_empty()
                && (sign == ':' || sign == '=' || self.concerns(head) || self.concerns(tail))
            {
                return format!("{}{sign}{}", self.word(head), self.word(tail));
            }
        }
        word.to_owned()
    }

    /// A known name between other signs in a word: its place, its length and its pseudonym.
    fn inside(&self, word: &str) -> Option<(usize, usize, String)> {
        let found = self.names.iter().filter_map(|(name, pseudonym)| {
            let start = word.find(name.as_str())?;
            let joined = |letter: Option<char>| letter.is_some_and(|letter| letter.is_ascii_alphanumeric());
            let (before, after) = (&word[..start], &word[start + name.len()..]);
            let whole = !joined(before.chars().next_back()) && !joined(after.chars().next());
            whole.then(|| (start, name.len(), pseudonym.clone()))
        });
        found.max_by_key(|(_, length, _)| *length)
    }

    /// Whether a part of a word is replaced.
    fn concerns(&self, part: &str) -> bool {
        parse(part).is_some()
            || is_id(part)
            || self.names.contains_key(part)
            || ['_', '.', '-'].iter().any(|sign| {
                part.rsplit_once(*sign).is_some_and(|(head, tail)| self.concerns(head) || self.concerns(tail))
            })
    }

    fn digest(&self, bytes: &[u8]) -> [u8; 32] {
        let mut mac = self.key.clone();
        mac.update(bytes);
        mac.finalize().into_bytes().into()
    }

    fn address(&mut self, address: IpAddr) -> IpAddr {
        if says_nothing(address) {
            return address;
        }
        if let Some(known) = self.addresses.get(&address) {
            return *known;
        }
        let pseudonym = match address {
            IpAddr::V4(address) => {
                // The low bits of a network stay zero, so that it stays one.
                let bits = u32::from(address);
                let changed = self.flip(b"4", bits.into(), 32, bits.trailing_zeros());
                IpAddr::V4(Ipv4Addr::from_bits(u32::try_from(changed).unwrap_or(0)))
            }
            IpAddr::V6(address) => {
                let bits = u128::from(address);
                IpAddr::V6(Ipv6Addr::from_bits(self.flip(b"6", bits, 128, bits.trailing_zeros())))
            }
        };
        self.addresses.insert(address, pseudonym);
        pseudonym
    }

    /// Flips each bit or not, depending on those before it; the last `zeros` bits stay.
    fn flip(&self, family: &[u8], bits: u128, width: u32, zeros: u32) -> u128 {
        let mut changed = bits;
        for position in 0..width - zeros.min(width) {
            let place = width - 1 - position;
            let prefix = bits >> place >> 1;
            let mut input = family.to_vec();
            input.extend(position.to_be_bytes());
            input.extend(prefix.to_be_bytes());
            changed ^= u128::from(self.digest(&input)[0] & 1) << place;
        }
        changed
    }

    fn mac(&self, word: &str) -> String {
        let digest = self.digest(word.to_ascii_lowercase().as_bytes());
        // Locally administered, unicast.
        let bytes: Vec<String> = digest[..5].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("02:{}", bytes.join(":"))
    }
}

fn parse(word: &str) -> Option<IpAddr> {
    // "::" is a path in code and in messages more often than an address.
    word.parse().ok().filter(|_| word.len() > 2)
}

/// Loopback, unspecified, broadcast and multicast addresses, and netmasks.
fn says_nothing(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            address.is_loopback()
                || address.octets()[0] == 0
                || address.is_broadcast()
                || address.is_multicast()
                || address.to_bits().leading_ones() >= 8
        }
        IpAddr::V6(address) => {
            let bits = u128::from(address);
            address.is_loopback()
                || address.is_unspecified()
                || address.is_multicast()
                || bits == 0xfe80 << 112
        }
    }
}

fn is_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, '.' | '-' | '_')
}

fn is_word(letter: char) -> bool {
    is_name(letter) || matches!(letter, ':' | '=')
}

fn is_mac(word: &str) -> bool {
    let parts: Vec<&str> = word.split(':').collect();
    parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
        && word != "00:00:00:00:00:00"
        && word != "ff:ff:ff:ff:ff:ff"
}

/// Whether this is the UID of a pod, also with underscores, or the id of a container.
fn is_id(word: &str) -> bool {
    let word = word.strip_prefix("pod").unwrap_or(word);
    let hexadecimal = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let lengths: Vec<usize> = word.split(['-', '_']).map(str::len).collect();
    (lengths == [8, 4, 4, 4, 12] && word.split(['-', '_']).all(hexadecimal))
        || (word.len() == 64 && hexadecimal(word))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A line without tokens, passwords and keys.
fn without_secrets(line: &str) -> String {
    let mut line = line.to_owned();
    for key in SECRET_KEYS {
        let lower = line.to_ascii_lowercase();
        let Some(place) = lower.find(key) else { continue };
        let after = place + key.len();
        let boundary = |letter: Option<char>| {
            letter.is_none_or(|letter| !letter.is_ascii_alphanumeric() && letter != '-')
        };
        let rest = line[after..].trim_start_matches(['"', '\'']);
        if !boundary(lower[..place].chars().next_back()) || !rest.starts_with([':', '=', ' ']) {
            continue;
        }
        let value = rest.trim_start_matches([':', '=', ' ', '"', '\'']);
        let length = value.find([' ', '"', '\'', ',', '}', '\n']).unwrap_or(value.len());
        // A word such as "token is missing" is prose, and a path names a file.
        let secret = length >= 8 && !value.starts_with('/') && rest.starts_with([':', '='])
            || key == "bearer" && length > 0;
        if secret {
            let start = line.len() - value.len();
            line.replace_range(start..start + length, "REDACTED");
        }
    }
    // JSON Web Tokens, wherever they are.
    while let Some(place) = line.find("eyJ") {
        let end = line[place..].find(|letter: char| !is_name(letter)).map_or(line.len(), |end| place + end);
        line.replace_range(place..end, "REDACTED");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redacted(text: &str) -> String {
        let mut redactor = Redactor::new(true).unwrap();
        redactor.learn(text);
        redactor.redact(text)
    }

    #[test]
    fn addresses_of_every_notation_are_replaced() {
        let text = "inet 192.168.31.17/24 brd 192.168.31.255\n192.168.31.67:502 [fd31::67]:443 ::ffff:192.168.31.67\n\
                    link/ether 02:42:C0:a8:1f:11 dev=192.168.31.17 from 192.168.31.17. to fe80::42:c0ff:fea8:1f11%eth0\n\
                    src=192.168.31.17 https://192.168.31.17:6443/ 192.168.31.17-192.168.31.67\n\
                    unicast fd31::/64 dev eth0, via fd31::17:\n";
        let found = redacted(text);
        for secret in ["192.168.31", "fd31:", "02:42", "c0ff", "1f11"] {
            assert!(!found.to_lowercase().contains(secret), "{secret}: {found}");
        }
        assert!(found.contains(":502 ["), "ports stay: {found}");
        assert!(found.contains("/24 brd"), "prefix lengths stay: {found}");
    }

    #[test]
    fn the_structure_of_networks_stays() {
        let mut redactor = Redactor::new(true).unwrap();
        let text = redactor.redact("10.200.1.0/24 10.200.1.91 10.200.2.9 127.0.0.1 0.0.0.0 255.255.255.0\n");
        let words: Vec<&str> = text.split_whitespace().collect();
        let net: ipnet::IpNet = words[0].parse().unwrap();
        assert_eq!(net, net.trunc(), "still a network: {text}");
        assert!(net.contains(&words[1].parse::<IpAddr>().unwrap()), "{text}");
        assert!(!net.contains(&words[2].parse::<IpAddr>().unwrap()), "{text}");
        assert_eq!(words[3..], ["127.0.0.1", "0.0.0.0", "255.255.255.0"]);
        assert_eq!(redactor.redact("10.200.1.91").trim(), words[1], "the same everywhere");
    }

    #[test]
    fn names_and_ids_are_replaced_everywhere() {
        let text = "\"pod\": \"shop/warehouse-7\"\nserver: https://api.plant.example:6443\nsaid warehouse-7 of shop, x-warehouse-7.svc\n\
                    /kubepods-burstable-podb8a9c7de_1111_2222_3333_444455556666.slice/\n";
        let found = redacted(text);
        for secret in ["warehouse", "shop", "plant", "b8a9c7de"] {
            assert!(!found.contains(secret), "{secret}: {found}");
        }
        let pseudonym = found.lines().nth(2).unwrap().split(' ').nth(1).unwrap();
        assert!(found.lines().next().unwrap().contains(pseudonym), "consistent: {found}");
    }

    #[test]
    fn secrets_are_never_in_a_report() {
        let text = "token: abcdef123456\n  client-key-data: LS0tLS1CRUdJTg==\nAuthorization: Bearer abcdefgh12345\n\
                    Bearer s3cr3t-value\nsaid eyJhbGciOi.eyJzdWI.c2ln here\n{\"password\": \"hunter2hunter2\"}\n";
        let mut redactor = Redactor::new(false).unwrap();
        let found = redactor.redact(text);
        for secret in ["abcdef", "LS0t", "s3cr3t", "eyJ", "hunter2", "c2ln"] {
            assert!(!found.contains(secret), "{secret}: {found}");
        }
        assert_eq!(
            redactor.redact("keyFile: /etc/bridge/discovery.key at 10.0.0.1\n"),
            "keyFile: /etc/bridge/discovery.key at 10.0.0.1\n"
        );
    }
}
