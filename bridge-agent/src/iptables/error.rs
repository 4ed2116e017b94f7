//! Errors, each with a hint for the operator.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::ruleset::{Family, Table};

/// Why the rules could not be read, written or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not in `PATH` nor in the usual places.
    #[error(
        "{program} is not installed: install the package iptables, or take `iptables` out of `enforcement.engines`"
    )]
    ProgramMissing {
        /// As it would be called.
        program: String,
    },
    /// The program could not be started or its output not be read.
    #[error("cannot run {program}: {source}")]
    Run {
        /// Path of the program.
        program: String,
        source: io::Error,
    },
    /// Another program holds the lock that all users of iptables-legacy share.
    #[error(
        "{program}: another program has held the xtables lock for {} s, the rules are as before: \
         find it with `fuser -v /run/xtables.lock`", waited.as_secs()
    )]
    LockHeld {
        /// As it was called.
        program: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The program did not end in time and was killed.
    #[error("{program} had not ended after {} s and was killed: see `dmesg` and the load of this host", after.as_secs())]
    Hung {
        /// As it was called.
        program: String,
        /// How long was waited.
        after: Duration,
    },
    /// `CAP_NET_ADMIN` is missing.
    #[error("{program}: not permitted: run bridge-agent as root or with CAP_NET_ADMIN and CAP_NET_RAW")]
    NotPermitted {
        /// As it was called.
        program: String,
    },
    /// The table holds rules that iptables cannot show.
    #[error(
        "{family} table {table} holds rules that were not made by iptables ({program} calls it incompatible): \
         see `nft list ruleset`, and move them into a table of another name"
    )]
    Incompatible {
        /// Which family.
        family: Family,
        /// Which table.
        table: Table,
        /// As it was called.
        program: String,
    },
    /// One rule of the table was refused, and with it all.
    #[error(
        "{family} table {table}: rule \"{rule}\" is refused, the rules are as before: {reason}\n  {line}\n  \
         A match or target that the kernel lacks is named in `dmesg`; see `modprobe xt_NAME`"
    )]
    Refused {
        /// Which family.
        family: Family,
        /// Which table.
        table: Table,
        /// Name of the rule in the configuration; `bridge:...` for one that every policy has.
        rule: String,
        /// As it was given to iptables-restore.
        line: String,
        /// The complaint of the program.
        reason: String,
    },
    /// The program failed, and did not say for which rule.
    #[error("{program} failed ({status}), the rules are as before: {reason}")]
    Failed {
        /// As it was called.
        program: String,
        /// Exit status.
        status: String,
        /// The complaint of the program.
        reason: String,
    },
    /// The policy takes more rules than iptables can apply in time.
    #[error(
        "the policy needs {lines} {program} rules, and {limit} are allowed; most come from rule `{rule}`: join its ports \
         into ranges, its networks into prefixes, leave sourcePorts out, or take `iptables` out of `enforcement.engines`"
    )]
    TooManyRules {
        /// `iptables` or `ip6tables`.
        program: &'static str,
        /// Rules of the family.
        lines: usize,
        /// The limit.
        limit: usize,
        /// Name of the most expensive rule.
        rule: String,
    },
    /// Another program keeps changing the rules while they are written.
    #[error("{family}: {found} right after it was written: look for another program that rewrites iptables")]
    NotAsWritten {
        /// Which family.
        family: Family,
        /// The first difference.
        found: String,
    },
    /// A file of saved rules could not be read or replaced.
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
