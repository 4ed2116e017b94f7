//! `enforcement.iptables`: settings of the iptables engine alone.

use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{Leaf, Problem, has_leading_zero, leaf};
use super::report::{Path, Report};
use super::time_span::TimeSpan;

/// Settings of the iptables engine alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Iptables {
    /// Which of the kernel's two packet filters the rules are written to.
    pub backend: Backend,
    /// The bit of the packet mark that bridge sets on NodePort packets it is about to reject. No other program on the
    /// node may use it.
    pub mark: PacketMark,
    /// The most denied packets that the kernel logs in a second. 0: none.
    #[schemars(range(max = 10_000))]
    pub log_rate: u32,
    /// How long to wait for a program that holds the xtables lock; whole seconds.
    pub lock_wait: TimeSpan,
}

impl Default for Iptables {
    fn default() -> Self {
        Self {
            backend: Backend::default(),
            mark: PacketMark::default(),
            log_rate: 0,
            lock_wait: TimeSpan::seconds(5),
        }
    }
}

/// Which of the kernel's two packet filters the rules are written to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The one that the kubelet uses, else the one that `iptables` means on this host.
    #[default]
    Auto,
    /// nf_tables: iptables-nft.
    Nft,
    /// x_tables: iptables-legacy.
    Legacy,
}

/// One bit of the packet mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketMark(NonZeroU32);

leaf!(PacketMark);

impl PacketMark {
    /// Exactly one bit of it is set.
    #[must_use]
    pub const fn get(self) -> NonZeroU32 {
        self.0
    }
}

/// Not among the bits of kube-proxy (0x4000, 0x8000), Calico (0xffff0000), Cilium (0xffff0f00), Tailscale (0xff0000)
/// or the AWS VPC CNI (0x80).
impl Default for PacketMark {
    fn default() -> Self {
        Self(NonZeroU32::new(0x2000).unwrap())
    }
}

impl fmt::Display for PacketMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Leaf for PacketMark {
    const FORMAT: &'static str = "packet-mark";
    const EXAMPLE: &'static str = "0x2000";

    fn parse(text: &str) -> Result<Self, Problem> {
        const HELP: &str = "write one bit from 0x1 to 0x80000000, such as 0x2000, that no other program uses";
        let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
        let number = match hexadecimal {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        // `from_str` takes a sign.
        let number = number.ok().filter(|_| !text.contains('+'));
        let number = number.ok_or_else(|| Problem::new(format!("`{text}` is not a packet mark"), HELP))?;
        if number > 0 && has_leading_zero(hexadecimal.unwrap_or(text)) {
            let message = format!("`{text}` has a leading zero, so that a digit may be missing");
            return Err(Problem::new(message, format!("write {number:#x} if it is meant")));
        }
        match NonZeroU32::new(number) {
            Some(bit) if number.is_power_of_two() => Ok(Self(bit)),
            _ => Err(Problem::new(format!("`{text}` is not one bit of the packet mark"), HELP)),
        }
    }
}

impl Iptables {
    pub(super) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        const MOST: Duration = Duration::from_secs(60);
        let wait = self.lock_wait.duration();
        if wait.subsec_nanos() != 0 || wait > MOST {
            report.error(
                &path.key("lockWait"),
                Problem::new(
                    format!("iptables cannot wait {} for its lock", self.lock_wait),
                    "write whole seconds, from 1s to 1m",
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_one_bit() {
        for (text, bit) in [("0x2000", 0x2000), ("8192", 0x2000), ("0x80000000", 1 << 31), ("0X1", 1)] {
            assert_eq!(PacketMark::parse(text).unwrap().get().get(), bit);
        }
        assert_eq!(PacketMark::parse("8192").unwrap().to_string(), "0x2000");
        for (bad, help) in
            [("0x02000", "write 0x2000 if it is meant"), ("08192", "write 0x2000 if it is meant")]
        {
            assert_eq!(PacketMark::parse(bad).unwrap_err().help, help);
        }
        for bad in ["0", "00", "0x00", "0x3", "0x100000000", "-1", "+1", "0x+1", "", "0x", "mark", "1 "] {
            assert!(PacketMark::parse(bad).is_err(), "{bad:?}");
        }
    }
}
