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
            let help = match text.split_once('/') {
                Some((host, _)) if Self::from_str(host).is_ok() => {
                    format!("write the address without its prefix length: {host}")
                }
                _ => "write an IPv4 or IPv6 address, such as 192.168.31.17 or fd00:31::17".into(),
            };
            Problem::new(format!("`{text}` is not an IP address"), help)
        })
    }
}

/// An address and a port to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAddress(pub SocketAddr);

leaf!(SocketAddress);

impl Leaf for SocketAddress {
    const FORMAT: &'static str = "socket-address";
    const EXAMPLE: &'static str = "127.0.0.1:9469";

    fn parse(text: &str) -> Result<Self, Problem> {
        const HELP: &str = "write ADDRESS:PORT, such as 127.0.0.1:9469, 0.0.0.0:12345 or [::1]:9469";
        let address: SocketAddr = text
            .parse()
            .map_err(|_| Problem::new(format!("`{text}` is not an address with a port"), HELP))?;
        if text.rsplit(':').next().is_some_and(has_leading_zero) {
            return Err(Problem::new(format!("the port of `{text}` has a leading zero"), HELP));
        }
        if address.port() == 0 {
            return Err(Problem::new(format!("`{text}` has port 0, which accepts no connection"), HELP));
        }
        Ok(Self(address))
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A path that does not depend on the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbsolutePath(pub PathBuf);

leaf!(AbsolutePath);

impl Leaf for AbsolutePath {
    const FORMAT: &'static str = "absolute-path";
    const EXAMPLE: &'static str = "/etc/bridge/discovery.key";

    fn parse(text: &str) -> Result<Self, Problem> {
        if text.contains('\0') {
            return Err(Problem::new("the path contains a zero byte", "remove it"));
        }
        if !text.starts_with('/') {
            return Err(Problem::new(
                format!("`{text}` is not an absolute path"),
                "write the path from the root, such as /etc/bridge/discovery.key",
            ));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_with_a_prefix_length_is_told_apart() {
        let problem = IpAddr::parse("192.168.31.17/24").unwrap_err();
        assert_eq!(problem.help, "write the address without its prefix length: 192.168.31.17");
        assert!(IpAddr::parse("192.168.31.017").is_err(), "octal or decimal: ambiguous");
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
        ] {
            assert!(SocketAddress::parse(bad).is_err(), "{bad}");
        }
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
        for bad in ["", "etc/bridge", "./x", "~/x", "/a\0b"] {
            assert!(AbsolutePath::parse(bad).is_err(), "{bad}");
        }
    }
}
