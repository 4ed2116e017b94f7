//! Attaching below Linux 6.6: filters of the clsact qdisc, at the first place, under handles of bridge's own.
//!
//! A filter stays without its maker and knows nothing of pins. Pins beside it record bridge's own: the program of each
//! filter, and a directory for each qdisc.

use std::{fs, io, mem, ops::RangeInclusive, path::Path};

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::Link,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcFilterBpfOption, TcHandle as Handle, TcHeader, TcMessage, TcOption},
};

use super::{
    change::Action,
    error::{Error, Result, errno},
    pins::{Attached, Pins, pinned_program},
};
use crate::kernel::netlink::{Route, interface_name};
use crate::kernel::pins;
use crate::model::{Hook, Target};

/// The first place in order.
const PRIORITY: u16 = 1;
/// "b21d9e" and a number distinguish bridge's filters from others. Each version of bridge that enforces has a number of
/// its own, so that a new one stands beside the version that it replaces, and not in its place.
const HANDLES: RangeInclusive<u32> = 0x00b2_1d9e..=0x00b2_1da5;

/// A filter of some version of bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Filter {
    handle: u32,
    program: Option<u32>,
}

/// Returns whether a filter has a handle of bridge's.
pub(super) fn is_own(handle: u32) -> bool {
    HANDLES.contains(&handle)
}

/// The filters of a hook's direction: none if there is no such qdisc.
pub(super) fn filters(index: u32, direction: TcAttachType) -> io::Result<Vec<TcMessage>> {
    let minor = match direction {
        TcAttachType::Egress => Handle::MIN_EGRESS,
        _ => Handle::MIN_INGRESS,
    };
    let header = TcHeader {
        index: index.cast_signed(),
        parent: Handle { major: u16::MAX, minor },
        ..TcHeader::default()
    };
    let request = RouteNetlinkMessage::GetTrafficFilter(TcMessage::from_parts(header, Vec::new()));
    match Route::open()?.dump(request) {
        // With each priority comes a message about it alone, without a handle.
        Ok(filters) => Ok(filters
            .into_iter()
            .filter_map(|filter| match filter {
                RouteNetlinkMessage::NewTrafficFilter(filter) if u32::from(filter.header.handle) != 0 => {
                    Some(filter)
                }
                _ => None,
            })
            .collect()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The filters of every version of bridge.
fn of_any_version(index: u32, direction: TcAttachType) -> io::Result<Vec<Filter>> {
    let program = |filter: &TcMessage| {
        filter.attributes.iter().find_map(|attribute| match attribute {
            TcAttribute::Options(options) => options.iter().find_map(|option| match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                _ => None,
            }),
            _ => None,
        })
    };
    let filters = filters(index, direction)?;
    let own = filters.iter().filter(|filter| is_own(filter.header.handle.into()));
    Ok(own.map(|filter| Filter { handle: filter.header.handle.into(), program: program(filter) }).collect())
}

/// Those that are not of another version than that of `pins`: of this one, or of an agent that died before it could make
/// a note of it.
fn of_this_version(pins: &Pins, index: u32, hook: Hook, filters: &[Filter]) -> Result<Vec<Filter>> {
    let mut of_others = Vec::new();
    for version in pins.versions()?.into_iter().filter(|version| version.directory() != pins.directory()) {
        let attached = version.attached_filters()?.into_iter();
        let here = attached.filter(|made| (made.index, made.hook) == (Some(index), hook));
        of_others.extend(here.filter_map(|made| pinned_program(&made.path)));
    }
    let is_of_other = |filter: &Filter| filter.program.is_some_and(|id| of_others.contains(&id));
    Ok(filters.iter().copied().filter(|filter| !is_of_other(filter)).collect())
}

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

/// Puts `program`, whose number is `id`, into the filter of this version of bridge, and makes that if it is missing.
/// Returns the operation, if there was any.
pub(super) fn put(
    pins: &Pins,
    program: &mut SchedClassifier,
    id: u32,
    target: &Target,
    hook: Hook,
) -> Result<Option<Action>> {
    let io_failed = |error: io::Error| Error::attach(&target.name, hook.name(), error);
    let failed = |error: ProgramError| Error::attach(&target.name, hook.name(), super::error::chain(&error));
    let direction = hook.attach_type();
    let there = of_any_version(target.index, direction).map_err(io_failed)?;
    if let Some(filter) = of_this_version(pins, target.index, hook, &there)?.first() {
        if filter.program == Some(id) {
            return Ok(None);
        }
        let attached = link(&target.name, direction, filter.handle)
            .and_then(|link| program.attach_to_link(link))
            .and_then(|id| program.take_link(id));
        match attached {
            Ok(link) => {
                // The filter is to stay; dropping the link would remove it.
                mem::forget(link);
                return Ok(Some(Action::Replaced));
            }
            // It has gone since it was looked at.
            Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL)) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let free = HANDLES.clone().find(|handle| there.iter().all(|filter| filter.handle != *handle));
    let handle =
        free.ok_or_else(|| io_failed(io::Error::other("there are filters of too many versions of bridge")))?;
    let options = NlOptions { priority: PRIORITY, handle: handle.into(), classid: None };
    let attached = program.attach_with_options(&target.name, direction, TcAttachOptions::Netlink(options));
    mem::forget(attached.and_then(|id| program.take_link(id)).map_err(failed)?);
    Ok(Some(Action::Attached))
}

fn link(
    interface: &str,
    direction: TcAttachType,
    handle: u32,
) -> std::result::Result<SchedClassifierLink, ProgramError> {
    SchedClassifierLink::attached(interface, direction, PRIORITY, handle.into(), None)
        .map_err(|error| ProgramError::TcError(TcError::IoError(error)))
}

/// Removes a filter that the version of bridge with these pins has made, and its pin.
pub(super) fn remove(pins: &Pins, made: &Attached) -> Result<()> {
    let hook = made.hook.name();
    // An index names the interface for good, its name may have changed.
    if let Some((index, interface)) = made.index.and_then(|index| Some((index, interface_name(index)?))) {
        let direction = made.hook.attach_type();
        let there =
            of_any_version(index, direction).map_err(|error| Error::attach(&interface, hook, error))?;
        for filter in of_this_version(pins, index, made.hook, &there)? {
            match link(&interface, direction, filter.handle).and_then(Link::detach) {
                Err(error) if !matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {
                    return Err(Error::attach(&interface, hook, super::error::chain(&error)));
                }
                _ => {}
            }
        }
    }
    Ok(pins::remove(&made.path)?)
}

/// Notes at `to` which qdiscs `from` has made: they stay for as long as one of them has filters there.
pub(super) fn hand_over_qdiscs(from: &Pins, to: &Pins) -> Result<()> {
    for (_, index, interface) in from.made_qdiscs()? {
        pins::make_directory(&to.qdisc(index, &interface))?;
    }
    Ok(())
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
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        if !filters(index, direction)?.is_empty() {
            return Ok(());
        }
    }
    let header = TcHeader {
        index: index.cast_signed(),
        parent: Handle { major: u16::MAX, minor: 0xfff1 },
        handle: Handle { major: u16::MAX, minor: 0 },
        ..TcHeader::default()
    };
    let request = RouteNetlinkMessage::DelQueueDiscipline(TcMessage::from_parts(header, Vec::new()));
    match Route::open()?.change(request, 0) {
        // Another program has removed it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    }
}
