//! Values that are written as one YAML scalar: their syntax, and the messages when it is wrong.
//!
//! Each is known in the JSON schema by a `format`. The checker looks the format up here, so that one parser
//! serves the configuration file, a custom resource and every error message.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A fault of a value, and its remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}; {help}")]
pub struct Problem {
    /// The fault, in one clause without a final stop.
    pub message: String,
    /// The remedy, as an imperative clause.
    pub help: String,
}

impl Problem {
    /// A problem from its two halves.
    pub fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }
}

/// A value written as one scalar.
pub trait Leaf: Sized {
    /// Its `format` in the JSON schema.
    const FORMAT: &'static str;
    /// A value to show where one is missing or of the wrong kind.
    const EXAMPLE: &'static str;

    /// Reads the value.
    ///
    /// # Errors
    /// The fault of `text`, and its remedy.
    fn parse(text: &str) -> Result<Self, Problem>;
}

/// Gives a [`Leaf`] that is `Display` its serde and JSON schema form.
macro_rules! leaf {
    ($type:ty) => {
        impl ::serde::Serialize for $type {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $type {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <::std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                <Self as $crate::config::leaf::Leaf>::parse(&text).map_err(::serde::de::Error::custom)
            }
        }

        impl ::schemars::JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> ::std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut ::schemars::SchemaGenerator) -> ::schemars::Schema {
                ::schemars::json_schema!({
                    "type": "string",
                    "format": <Self as $crate::config::leaf::Leaf>::FORMAT,
                    "examples": [<Self as $crate::config::leaf::Leaf>::EXAMPLE],
                })
            }
        }
    };
}
pub(crate) use leaf;

impl Leaf for IpAddr {
    const FORMAT: &'static str = "ip";
    const EXAMPLE: &'static str = "192.168.31.17";

    fn parse(text: &str) -> Result<Self, Problem> {
        Self::from_str(text).map_err(|_| {
            leading_zero(text, |shortest| Self::from_str(shortest).is_ok()).unwrap_or_else(|| {
                let help = match text.split_once('/') {
                    Some((host, _)) if Self::from_str(host).is_ok() => {
                        format!("write the address without its prefix length: {host}")
                    }
                    _ => "write an IPv4 or IPv6 address, such as 192.168.31.17 or fd00:31::17".into(),
                };
                Problem::new(format!("`{text}` is not an IP address"), help)
            })
        })
    }
}

/// An address and a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAddress(pub SocketAddr);

leaf!(SocketAddress);

impl Leaf for SocketAddress {
    const FORMAT: &'static str = "socket-address";
    const EXAMPLE: &'static str = "127.0.0.1:9469";

    fn parse(text: &str) -> Result<Self, Problem> {
        const HELP: &str =
            "write ADDRESS:PORT with a port from 1 to 65535, such as 127.0.0.1:9469 or [::1]:9469";
        if let Some(problem) = leading_zero(text, |shortest| SocketAddr::from_str(shortest).is_ok()) {
            return Err(problem);
        }
        let address: SocketAddr = text
            .parse()
            .map_err(|_| Problem::new(format!("`{text}` is not an address with a port"), HELP))?;
        if address.port() == 0 {
            return Err(Problem::new(format!("`{text}` has port 0, which accepts no connection"), HELP));
        }
        if is_of_a_group(address.ip()) {
            return Err(Problem::new(
                format!("`{text}` is the address of a group of hosts, not of one"),
                HELP,
            ));
        }
        Ok(Self(address))
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The path of a file, which does not depend on the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbsolutePath(pub PathBuf);

leaf!(AbsolutePath);

impl Leaf for AbsolutePath {
    const FORMAT: &'static str = "absolute-path";
    const EXAMPLE: &'static str = "/etc/bridge/discovery.key";

    fn parse(text: &str) -> Result<Self, Problem> {
        if let Some(problem) = unprintable(text) {
            return Err(problem);
        }
        if !text.starts_with('/') {
            return Err(Problem::new(
                format!("`{text}` is not an absolute path"),
                "write the path from the root, such as /etc/bridge/discovery.key",
            ));
        }
        if matches!(text.rsplit('/').next(), None | Some("" | "." | "..")) {
            let help = format!("add the name of the file, such as {}/NAME", text.trim_end_matches('/'));
            return Err(Problem::new(format!("`{text}` is the path of a directory"), help));
        }
        Ok(Self(PathBuf::from(text)))
    }
}

impl AsRef<Path> for AbsolutePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for AbsolutePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// Permission bits of a file, 0 to 0o777.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

leaf!(FileMode);

impl Leaf for FileMode {
    const FORMAT: &'static str = "file-mode";
    const EXAMPLE: &'static str = "0660";

    fn parse(text: &str) -> Result<Self, Problem> {
        let octal = matches!(text.len(), 3 | 4) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match u32::from_str_radix(text, 8) {
            Ok(mode) if octal && mode <= 0o777 => Ok(Self(mode)),
            _ => Err(Problem::new(
                format!("`{text}` is not a file mode"),
                "write the permission bits as an octal number in quotes, such as \"0660\"",
            )),
        }
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// Whether a decimal number begins with a zero that some readers take for the mark of an octal one.
pub(crate) fn has_leading_zero(number: &str) -> bool {
    number.len() > 1 && number.starts_with('0')
}

/// Whether an address is that of many hosts: multicast or broadcast.
pub(super) fn is_of_a_group(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

/// Refuses a text that would be valid without the leading zeros of its numbers: an address, with prefix length or port.
pub(super) fn leading_zero(text: &str, valid: impl Fn(&str) -> bool) -> Option<Problem> {
    let shortest = without_leading_zeros(text);
    (shortest != text && valid(&shortest)).then(|| {
        let message = format!("`{text}` has a number with a leading zero, which some readers take for octal");
        Problem::new(message, format!("write {shortest} if the numbers are decimal"))
    })
}

/// The same text with each decimal number at its shortest; groups of IPv6 stay.
pub(super) fn without_leading_zeros(text: &str) -> String {
    let shortest = |number: &str| match number.trim_start_matches('0') {
        "" if !number.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let after = |mark: char, number: Option<&str>| {
        number.map(|number| format!("{mark}{}", shortest(number))).unwrap_or_default()
    };
    let (rest, length) = text.split_once('/').map_or((text, None), |(rest, length)| (rest, Some(length)));
    let (address, port) = match rest.rsplit_once(':') {
        Some((address, port)) if !address.contains(':') || address.ends_with(']') => (address, Some(port)),
        _ => (rest, None),
    };
    let address = match address.contains(':') {
        true => address.to_owned(),
        false => address.split('.').map(shortest).collect::<Vec<_>>().join("."),
    };
    address + &after(':', port) + &after('/', length)
}

/// The longest path that the kernel takes, in bytes, and the limit of other texts.
const MAX_TEXT: usize = 4095;

/// Refuses a text with characters that do not show, in which a file or a group would not be recognised.
pub(super) fn unprintable(text: &str) -> Option<Problem> {
    if text.len() > MAX_TEXT {
        let message = format!("the text has {} bytes", text.len());
        return Some(Problem::new(message, format!("shorten it to {MAX_TEXT} bytes")));
    }
    // Marks of the direction of writing, and spaces without width.
    let invisible = |c| matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    let bad = text.chars().find(|c| c.is_control() || invisible(*c));
    let bad = bad.or_else(|| (text.trim() != text).then_some(' '))?;
    Some(Problem::new(format!("{text:?} contains {bad:?}, which does not show"), "remove it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_with_a_prefix_length_is_told_apart() {
        let problem = IpAddr::parse("192.168.31.17/24").unwrap_err();
        assert_eq!(problem.help, "write the address without its prefix length: 192.168.31.17");
        let problem = IpAddr::parse("192.168.031.017").unwrap_err();
        assert_eq!(problem.help, "write 192.168.31.17 if the numbers are decimal");
        assert_eq!(IpAddr::parse("fd00:31::17").unwrap().to_string(), "fd00:31::17");
    }

    #[test]
    fn socket_address_needs_a_port() {
        for bad in [
            "127.0.0.1",
            "127.0.0.1:0",
            ":9469",
            "localhost:9469",
            "127.0.0.1:65536",
            "::1:9469:",
            "127.0.0.1:09469",
            "224.0.0.1:9469",
            "255.255.255.255:9469",
        ] {
            assert!(SocketAddress::parse(bad).is_err(), "{bad}");
        }
        for bad in ["127.0.0.01:9469", "127.0.0.1:09469"] {
            let help = SocketAddress::parse(bad).unwrap_err().help;
            assert_eq!(help, "write 127.0.0.1:9469 if the numbers are decimal");
        }
        assert_eq!(
            SocketAddress::parse("[::1]:09469").unwrap_err().help,
            "write [::1]:9469 if the numbers are decimal"
        );
        assert_eq!(SocketAddress::parse("[::1]:9469").unwrap().to_string(), "[::1]:9469");
    }

    #[test]
    fn file_mode_is_octal() {
        assert_eq!(FileMode::parse("0660"), Ok(FileMode(0o660)));
        assert_eq!(FileMode::parse("600").unwrap().to_string(), "0600");
        for bad in ["", "0888", "1777", "66", "00660", "rw-r-----", "+660"] {
            assert!(FileMode::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn path_is_absolute() {
        assert!(AbsolutePath::parse("/etc/bridge/x").is_ok());
        for bad in ["", "etc/bridge", "./x", "~/x", "/a\0b", "/", "/a/", "/a/..", "/a\n", "/a "] {
            assert!(AbsolutePath::parse(bad).is_err(), "{bad}");
        }
    }
}
