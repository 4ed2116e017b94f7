//! Errors, each with a hint for the operator.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the rules could not be read, written or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not in `PATH` nor in the usual places.
    #[error(
        "nft is not installed: install the package nftables, or take `nftables` out of `enforcement.engines`"
    )]
    ProgramMissing,
    /// The program could not be started or its output not be read.
    #[error("cannot run nft: {0}")]
    Run(io::Error),
    /// The program did not end in time and was killed.
    #[error("nft had not ended after {} s and was killed: see `dmesg` and the load of this host", .0.as_secs())]
    Hung(Duration),
    /// `CAP_NET_ADMIN` is missing.
    #[error("nft: not permitted: run bridge-agent as root or with CAP_NET_ADMIN")]
    NotPermitted,
    /// One line of a script was refused, and with it all.
    #[error(
        "rule \"{rule}\" is refused, the rules are as before: {reason}\n  {line}\n  An expression that the kernel lacks is \
         named in `dmesg`; see `modprobe nft_NAME`"
    )]
    Refused {
        /// Name of the rule in the configuration; `bridge` for one that every policy has.
        rule: String,
        /// As it was given to nft.
        line: String,
        /// The complaint of the program.
        reason: String,
    },
    /// The program failed, and did not say for which rule.
    #[error("nft failed ({status}), the rules are as before: {reason}")]
    Failed {
        /// Exit status.
        status: String,
        /// The complaint of the program.
        reason: String,
    },
    /// The program printed something else than JSON.
    #[error("cannot read the rules of nft: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// The policy takes more elements than can be applied in time.
    #[error(
        "the policy needs {elements} elements of nftables sets, and {limit} are allowed; most come from rule `{rule}`: join \
         its ports into ranges, its networks into prefixes, or take `nftables` out of `enforcement.engines`"
    )]
    TooManyElements {
        /// The figure.
        elements: usize,
        /// The limit.
        limit: usize,
        /// Name of the most expensive rule.
        rule: String,
    },
    /// The rules overlap too often.
    #[error(
        "the rules overlap {layers} deep, and {limit} lookups are allowed for a new flow in nftables: join rules for the same \
         addresses, or take `nftables` out of `enforcement.engines`"
    )]
    TooManyLayers {
        /// The figure.
        layers: usize,
        /// The limit.
        limit: usize,
    },
    /// Another program changed the rules while they were written.
    #[error("table inet {table}: {found} right after it was written: look for another program that rewrites nftables", table = super::TABLE)]
    NotAsWritten {
        /// The first difference.
        found: String,
    },
    /// The file of saved rules could not be replaced.
    #[error("cannot save the rules in {}: {source}", path.display())]
    Save {
        /// Which file.
        path: PathBuf,
        source: io::Error,
    },
    /// The kernel did not answer as it should.
    #[error("cannot {request}: {source}")]
    Kernel {
        /// The request, as a verb and its object.
        request: String,
        /// Why not.
        source: io::Error,
    },
}
