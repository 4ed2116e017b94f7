//! Errors between the agent and the packet path, each with a remedy for the operator.

use std::{io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    programs::{ProgramError, tc::TcError},
    sys::SyscallError,
};

use crate::kernel::pins;

/// See the variants.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A pin, or the root of all pins, cannot be used.
    #[error(transparent)]
    Pins(#[from] pins::Error),
    /// The process lacks the privileges to load programs.
    #[error(
        "missing {missing}: run as root, or grant it (systemd: AmbientCapabilities=, Kubernetes: securityContext.capabilities.add); where BPF is forbidden, \
         `enforcement.engines: [nftables]` enforces without it"
    )]
    Capability {
        /// Names of capabilities, with `,` between them.
        missing: String,
    },
    /// A pin that this agent has not made, or made with another layout.
    #[error("{} is not what this agent would have pinned there: {property} is {found}, expected {expected}. If nothing else uses it, `bridge-agent down` removes it", path.display())]
    ForeignPin {
        /// The pin.
        path: PathBuf,
        /// Which property differs.
        property: &'static str,
        /// The value of the property.
        found: String,
        /// The expected value.
        expected: String,
    },
    /// There is nothing under the pin root.
    #[error("bridge does not run here: nothing is pinned under {}. Start it with `bridge-agent run`, or name the pins with --pin-root", .0.display())]
    NotRunning(PathBuf),
    /// Pins are there, and not all of them: eBPF is being loaded, or a load was cut off.
    #[error("eBPF is not loaded yet: map {map} is not pinned under {}; try again, or see the log of the agent", root.display())]
    Incomplete {
        /// The pin root.
        root: PathBuf,
        /// The first map that is missing.
        map: &'static str,
    },
    /// The kernel lacks something that the packet path needs.
    #[error("the kernel lacks {feature}: {remedy}")]
    Kernel {
        /// The missing feature.
        feature: &'static str,
        /// The remedy.
        remedy: &'static str,
    },
    /// The kernel's verifier turned a program down.
    #[error(
        "the kernel did not accept the program {program}; this is a fault of bridge, please report it with the kernel's version and this log:\n{log}"
    )]
    Rejected {
        /// The program.
        program: String,
        /// The end of the verifier's log.
        log: String,
    },
    /// A map is too small for its entries, or memory is short.
    #[error("the policy does not fit: table {table} with {entries} entries: {source}")]
    Table {
        /// Name of the table.
        table: &'static str,
        /// How many entries it should hold.
        entries: usize,
        /// Error of the kernel.
        source: io::Error,
    },
    /// A policy is active for a trial only.
    #[error("the active policy waits for its confirmation: confirm it, or wait until it rolls back")]
    Unconfirmed,
    /// No policy is on trial.
    #[error(
        "no policy waits for its confirmation: its time is over, and the former one is active; apply it again"
    )]
    NoTrial,
    /// A program could not be attached.
    #[error("cannot attach {hook} to {interface}: {source}")]
    Attach {
        /// Name of the interface.
        interface: String,
        /// Name of the program.
        hook: &'static str,
        /// Error of aya or the kernel.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An operation on a map failed.
    #[error("map {map}: {source}")]
    Map {
        /// Name of the map.
        map: &'static str,
        /// Error of the kernel.
        source: io::Error,
    },
    /// The object could not be loaded for another reason.
    #[error("loading the packet path: {}", chain(.0))]
    Load(Box<EbpfError>),
    /// Several things failed, each on its own.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<Error>),
}

/// Result of working with the packet path.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error and its causes in one line: aya's own messages end before the cause.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

impl Error {
    pub(super) fn path(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let error = pins::Error::path(action, path);
        move |source| Self::Pins(error(source))
    }

    pub(super) fn map(map: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Map { map, source }
    }

    pub(super) fn aya_map(map: &'static str) -> impl FnOnce(MapError) -> Self {
        move |error| Self::Map { map, source: io_of_map_error(error) }
    }

    pub(super) fn attach(
        interface: &str,
        hook: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Attach { interface: interface.to_owned(), hook, source: source.into() }
    }

    /// One error of many; `None` of none.
    pub(crate) fn collect(mut errors: Vec<Self>) -> Result<()> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

/// The system's error inside aya's, or aya's text.
fn io_of_map_error(error: MapError) -> io::Error {
    match error {
        MapError::CreateError { io_error, .. } | MapError::IoError(io_error) => io_error,
        MapError::SyscallError(error) => error.io_error,
        MapError::KeyNotFound | MapError::ElementNotFound => io::ErrorKind::NotFound.into(),
        error => io::Error::other(chain(&error)),
    }
}

/// Names the cause of an error of the loader.
pub(super) fn load_error(error: EbpfError) -> Error {
    match error {
        EbpfError::MapError(MapError::CreateError { ref name, ref io_error }) => {
            match io_error.raw_os_error() {
                Some(libc::EPERM) => {
                    Error::Capability { missing: "CAP_BPF, or a larger `ulimit -l` below Linux 5.11".into() }
                }
                Some(libc::EINVAL) if name == "events" => {
                    Error::Kernel { feature: "BPF ring buffers", remedy: "bridge needs Linux 6.1 or later" }
                }
                _ => Error::Load(Box::new(error)),
            }
        }
        EbpfError::ProgramError(error) => program_error("?", error),
        error => Error::Load(Box::new(error)),
    }
}

/// How much of a verifier's log is shown: its end holds the reason.
const LOG_TAIL: usize = 4000;

/// Names the cause of an error of loading one program.
pub(super) fn program_error(program: &str, error: ProgramError) -> Error {
    match error {
        ProgramError::LoadError { io_error, .. } if io_error.raw_os_error() == Some(libc::EPERM) => {
            Error::Capability { missing: "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON".into() }
        }
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = format!("{io_error}\n{verifier_log}");
            let start = log.char_indices().rev().nth(LOG_TAIL).map_or(0, |(index, _)| index);
            Error::Rejected { program: program.to_owned(), log: log[start..].to_owned() }
        }
        error => Error::Load(Box::new(error.into())),
    }
}

/// Returns the system's error number inside aya's error.
pub(super) fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(SyscallError { io_error, .. }) | ProgramError::IOError(io_error) => {
            io_error.raw_os_error()
        }
        ProgramError::TcError(TcError::NetlinkError(error)) | ProgramError::NetlinkError(error) => {
            error.raw_os_error()
        }
        ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    }
}
