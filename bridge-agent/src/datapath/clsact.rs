//! Attaching below Linux 6.6: filters of the clsact qdisc, at the first place, under a handle of bridge's own.
//!
//! A filter stays without its maker and knows nothing of pins. What bridge has made is told by pins beside it: the
//! program of each filter, and a directory for each qdisc.

use std::{fs, io, mem, path::Path};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::Link,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcHandle as Handle, TcHeader, TcMessage},
};

use super::{
    attach::errno,
    error::{Error, Result},
    pins::{self, Attached, Pins},
};
use crate::netlink::{Route, interface_name};

/// The first place in order.
const PRIORITY: u16 = 1;
/// "b21d9e", to be told from the filters of others.
pub(super) const HANDLE: TcHandle = TcHandle::new(0x00b2, 0x1d9e);

/// Makes the clsact qdisc of an interface, if it has none, and notes at `note` that it is bridge's.
pub(super) fn ensure_qdisc(interface: &str, note: &Path) -> io::Result<()> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => match fs::create_dir(note) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        },
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        Err(TcError::NetlinkError(error)) => {
            Err(error.raw_os_error().map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error))
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Puts `program` into bridge's filter, and makes that if it is missing. Tells whether it was there.
pub(super) fn put(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
    expect_filter: bool,
) -> std::result::Result<bool, ProgramError> {
    if expect_filter {
        let link = filter(interface, direction)?;
        match program.attach_to_link(link) {
            Ok(id) => {
                // The filter is to stay; dropping the link would remove it.
                mem::forget(program.take_link(id)?);
                return Ok(true);
            }
            Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL)) => {}
            Err(error) => return Err(error),
        }
    }
    let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
    match program.attach_with_options(interface, direction, TcAttachOptions::Netlink(options)) {
        Ok(id) => {
            mem::forget(program.take_link(id)?);
            Ok(false)
        }
        // Left over by an agent that died before it could make a note of it.
        Err(error) if errno(&error) == Some(libc::EEXIST) && !expect_filter => {
            put(program, interface, direction, true)
        }
        Err(error) => Err(error),
    }
}

fn filter(
    interface: &str,
    direction: TcAttachType,
) -> std::result::Result<SchedClassifierLink, ProgramError> {
    SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None)
        .map_err(|error| ProgramError::TcError(TcError::IoError(error)))
}

/// Removes a filter that bridge has made, and its pin.
pub(super) fn remove(made: &Attached) -> Result<()> {
    let hook = made.hook.name();
    // An index names the interface for good, its name may have changed.
    if let Some(interface) = made.index.and_then(interface_name) {
        let detached = filter(&interface, made.hook.attach_type()).and_then(Link::detach);
        match detached {
            Err(error) if !matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
                return Err(Error::attach(&interface, hook, super::error::chain(&error)));
            }
            _ => {}
        }
    }
    pins::remove(&made.path)
}

/// Removes the qdiscs that bridge has made, unless others have put filters into them.
pub(super) fn remove_qdiscs(pins: &Pins, errors: &mut Vec<Error>) {
    let made = match pins.made_qdiscs() {
        Ok(made) => made,
        Err(error) => return errors.push(error),
    };
    for (note, index, interface) in made {
        if let Err(error) = remove_qdisc(index) {
            errors.push(Error::attach(&interface, "clsact", error));
        } else if let Err(error) = fs::remove_dir(&note) {
            errors.push(Error::path("removing", note)(error));
        }
    }
}

fn remove_qdisc(index: u32) -> io::Result<()> {
    if interface_name(index).is_none() {
        return Ok(());
    }
    let mut route = Route::open()?;
    let header = |minor| TcHeader {
        index: index.cast_signed(),
        parent: Handle { major: u16::MAX, minor },
        ..TcHeader::default()
    };
    for minor in [Handle::MIN_INGRESS, Handle::MIN_EGRESS] {
        let request = TcMessage::from_parts(header(minor), Vec::new());
        match route.dump(RouteNetlinkMessage::GetTrafficFilter(request)) {
            Ok(filters) if !filters.is_empty() => return Ok(()),
            Ok(_) => {}
            // Somebody has removed the qdisc.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    let mut request = header(0xfff1);
    request.handle = Handle { major: u16::MAX, minor: 0 };
    match route.change(RouteNetlinkMessage::DelQueueDiscipline(TcMessage::from_parts(request, Vec::new())), 0)
    {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    }
}
