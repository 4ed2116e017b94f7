//! Which sockets hold a port: a walk over the sockets' storage, in all network namespaces.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
};

use aya::{
    Btf, Ebpf,
    maps::{Map, MapData},
    programs::{Iter, Program},
};
use bridge_common::pool::Lease;

/// The iterator program and the map it walks.
pub struct Walker {
    program: OwnedFd,
    leases: MapData,
}

const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_TRACE_ITER: u32 = 28;

/// The part of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    info: u64,
    info_len: u32,
    reserved: u32,
}

/// The part of `union bpf_attr` for `BPF_ITER_CREATE`.
#[repr(C)]
struct IterCreate {
    link: u32,
    flags: u32,
}

impl Walker {
    /// Loads the iterator. An error means that this kernel has none for socket storage (before Linux 5.9, or without
    /// its BTF).
    pub(super) fn load(ebpf: &mut Ebpf) -> Result<Self, String> {
        let btf = Btf::from_sys_fs().map_err(|error| error.to_string())?;
        let program: &mut Iter = match ebpf.program_mut("pool_walk") {
            Some(Program::Iter(program)) => program,
            _ => return Err("the object has no pool_walk".into()),
        };
        program.load("bpf_sk_storage_map", &btf).map_err(|error| error.to_string())?;
        let program = program
            .fd()
            .map_err(|error| error.to_string())
            .and_then(|fd| fd.as_fd().try_clone_to_owned().map_err(|error| error.to_string()))?;
        match ebpf.take_map("POOL_LEASES") {
            Some(Map::SkStorage(leases)) => Ok(Self { program, leases }),
            _ => Err("the object has no POOL_LEASES".into()),
        }
    }

    /// Every socket with one of these `LEASE_*`.
    ///
    /// # Errors
    /// The walk fails.
    pub fn walk(&self, state: u64) -> io::Result<Vec<Lease>> {
        let map = [descriptor(self.leases.fd().as_fd()), 0, 0, 0];
        let link = LinkCreate {
            program: descriptor(self.program.as_fd()),
            target: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            info: map.as_ptr() as u64,
            info_len: 16,
            reserved: 0,
        };
        let link = bpf(BPF_LINK_CREATE, &link)?;
        let iterator = bpf(BPF_ITER_CREATE, &IterCreate { link: descriptor(link.as_fd()), flags: 0 })?;
        let mut bytes = Vec::new();
        File::from(iterator).read_to_end(&mut bytes)?;
        let (leases, rest) = bytes.as_chunks::<{ size_of::<Lease>() }>();
        if !rest.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let leases = leases.iter().map(|bytes| zerocopy::transmute!(*bytes));
        Ok(leases.filter(|lease: &Lease| lease.state & state != 0).collect())
    }
}

fn descriptor(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: both commands read the attributes, of the given size, and the memory that they point to.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
