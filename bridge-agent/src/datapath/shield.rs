//! The shield: an XDP program in front of the hook of packets from the LAN, where the driver can run it.
//!
//! It is attached by a pinned link, as the programs of the hooks: it lives on without the agent, and a start adopts it.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use aya::programs::Xdp;

use super::{
    error::{Error, Result, chain, program_error},
    load::Datapath,
    pins::{Pins, detach},
};
use crate::{
    kernel::bpf,
    model::{Role, Target},
};

/// Name of the program.
pub const SHIELD_PROGRAM: &str = "external_shield";

/// An interface that could not be shielded is tried again after this time.
const AGAIN: Duration = Duration::from_secs(10);

/// Length of an Ethernet header in bytes.
const ETHERNET: u32 = 14;

/// State of the shield at an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shield {
    /// The driver runs it.
    Native,
    /// It is not attached, for this reason.
    Off(String),
}

impl std::fmt::Display for Shield {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Native => f.write_str("native"),
            Self::Off(reason) => write!(f, "off ({reason})"),
        }
    }
}

/// The link of a shield, as found.
struct Link {
    path: PathBuf,
    /// Index of the interface; 0: it is gone, or the program was detached.
    index: u32,
    program: u32,
}

impl Datapath {
    /// Shields the interfaces towards the LAN among `targets`, and no others; may be called whenever anything changes. Call after
    /// [`Datapath::attach`]. `again`: also those that could not be shielded lately.
    ///
    /// Returns the state of each interface towards the LAN, by index.
    ///
    /// # Errors
    ///
    /// [`Error::Path`]: a link that is no longer wanted is left.
    pub fn shield(&mut self, targets: &[Target], again: bool) -> (BTreeMap<u32, Shield>, Result<()>) {
        if again {
            self.shields.clear();
        }
        let mut errors = Vec::new();
        let lan = || targets.iter().filter(|target| target.role == Role::External);
        let off = |reason: &str| lan().map(|target| (target.index, Shield::Off(reason.to_owned()))).collect();
        let program = match self.shield_program() {
            Ok(program) => program,
            Err(error) => {
                let left = self.unshield(&[]);
                // Without the verifier's log.
                return (off(error.to_string().lines().next().unwrap_or_default()), left);
            }
        };
        if let Err(error) = self.unshield(targets) {
            errors.push(error);
        }
        let links = match self.shield_links() {
            Ok(links) => links,
            Err(error) => {
                errors.push(error);
                return (off("its link cannot be read"), Error::collect(errors));
            }
        };
        self.shields.retain(|index, (_, at)| {
            at.elapsed() < AGAIN && targets.iter().any(|target| target.index == *index)
        });
        let mut states = BTreeMap::new();
        for target in lan() {
            let shielded = match links.iter().find(|link| link.index == target.index) {
                Some(link) if link.program == program => Ok(()),
                Some(link) => self.replace_shield(link),
                None => self.attach_shield(target),
            };
            let state = shielded.map_or_else(Shield::Off, |()| Shield::Native);
            states.insert(target.index, state);
        }
        (states, Error::collect(errors))
    }

    /// Detaches the shield from all interfaces that are none of `keep` towards the LAN. Call before the hooks behind it are
    /// detached.
    ///
    /// # Errors
    ///
    /// [`Error::Path`].
    pub fn unshield(&mut self, keep: &[Target]) -> Result<()> {
        let is_kept =
            |index| keep.iter().any(|target| target.index == index && target.role == Role::External);
        let mut errors = Vec::new();
        for link in self.shield_links()?.into_iter().filter(|link| !is_kept(link.index)) {
            crate::fault::point("shield:detach");
            if let Err(error) = detach(&link.path, self.guard.release(&link.path)) {
                errors.push(error);
            }
        }
        Error::collect(errors)
    }

    /// Loads the program, unless it is loaded. Returns its id.
    fn shield_program(&mut self) -> Result<u32> {
        let program = self.shield_in_object()?;
        let failed = |error| program_error(SHIELD_PROGRAM, error);
        if program.fd().is_err() {
            bpf::without_signals(|| program.load()).map_err(failed)?;
        }
        Ok(program.info().map_err(failed)?.id())
    }

    fn shield_in_object(&mut self) -> Result<&mut Xdp> {
        let program = self.ebpf.program_mut(SHIELD_PROGRAM).and_then(|program| program.try_into().ok());
        program.ok_or(Error::Kernel {
            feature: SHIELD_PROGRAM,
            remedy: "the agent was built with another eBPF object",
        })
    }

    fn shield_links(&self) -> Result<Vec<Link>> {
        self.guard
            .within(&self.pins.shields())
            .map(|(path, link)| {
                let (program, index) = bpf::xdp_link_info(link).map_err(Error::path("looking at", path))?;
                Ok(Link { path: path.to_owned(), index, program })
            })
            .collect()
    }

    /// Attaches the program to an interface; `Err`: why that cannot be done.
    fn attach_shield(&mut self, target: &Target) -> Result<(), String> {
        if let Some((reason, _)) = self.shields.get(&target.index) {
            return Err(reason.clone());
        }
        let attached = if target.tunnel || target.link_header != ETHERNET {
            Err("the interface has no Ethernet header".to_owned())
        } else {
            self.link_shield(target)
        };
        if let Err(reason) = &attached {
            self.shields.insert(target.index, (reason.clone(), Instant::now()));
        }
        attached
    }

    fn link_shield(&mut self, target: &Target) -> Result<(), String> {
        crate::fault::point("shield:attach");
        let program = self.shield_in_object().map_err(|error| error.to_string())?;
        let program = program.fd().map_err(|error| chain(&error))?;
        let link = bpf::xdp_attach(program.as_fd(), target.index).map_err(|error| reason(&error))?;
        crate::fault::point("shield:attached");
        // As of the links of the hooks: without the pin, the interface is shielded for as long as this process lives.
        let path = self.pins.shield(target.index);
        let pinned = bpf::obj_pin(link.as_fd(), &path);
        self.guard.keep(path, link);
        if let Err(error) = pinned {
            tracing::warn!(interface = target.name, %error, "cannot pin the shield; it ends with the agent");
        }
        Ok(())
    }

    fn replace_shield(&mut self, link: &Link) -> Result<(), String> {
        let kept = bpf::obj_get(&link.path).map_err(|error| format!("its pin cannot be opened: {error}"))?;
        let program = self.shield_in_object().map_err(|error| error.to_string())?;
        let program = program.fd().map_err(|error| chain(&error))?;
        bpf::link_update(kept.as_fd(), program.as_fd()).map_err(|error| reason(&error))
    }
}

/// Returns why the kernel has refused to attach the program.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the driver has no native XDP".to_owned(),
        Some(libc::EBUSY | libc::EEXIST) => "another XDP program is attached".to_owned(),
        _ => format!("the driver refused it: {error}"),
    }
}

/// Whether an interface is shielded, by its pin.
///
/// # Errors
///
/// Of `bpf(2)`.
pub fn is_shielded(pins: &Pins, target: &Target) -> io::Result<bool> {
    match bpf::obj_get(&pins.shield(target.index)) {
        Ok(link) => Ok(bpf::xdp_link_info(link.as_fd())?.1 == target.index),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
