//! The few `bpf(2)` commands that aya does not offer.

use std::{
    ffi::CString,
    io,
    mem::{self, MaybeUninit},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

use aya::{Pod, maps::MapData};
use aya_obj::generated::{
    XDP_FLAGS_DRV_MODE, bpf_attach_type, bpf_attr, bpf_attr__bindgen_ty_3, bpf_btf_info, bpf_cmd,
    bpf_link_info, bpf_map_info,
};

/// Calls `bpf(2)`.
///
/// # Safety
///
/// The memory that the fields of `attr` point to must be valid for `command`.
unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: `attr` lives through the call and its size is passed; the rest is the caller's promise.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_long, ptr::from_mut(attr), size_of::<bpf_attr>())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(i32::MAX)) }
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of structs of integers; all zeros is a value of each.
    unsafe { mem::zeroed() }
}

/// An own descriptor from the result of a command that makes one.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The descriptor of a map.
pub(crate) fn fd(map: &MapData) -> BorrowedFd<'_> {
    map.fd().as_fd()
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Kind of a pinned object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Map,
    Program,
    Link,
    Other,
}

impl Kind {
    /// Reads it from the name that the kernel gives the descriptor in /proc (`bpf_map_new_fd` and its kin,
    /// kernel/bpf/syscall.c): `BPF_OBJ_GET_INFO_BY_FD` would answer for any of them without saying which.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        Ok(match target.as_os_str().as_bytes() {
            b"anon_inode:bpf-map" => Self::Map,
            b"anon_inode:bpf-prog" => Self::Program,
            b"anon_inode:bpf_link" | b"anon_inode:bpf-link" => Self::Link,
            _ => Self::Other,
        })
    }
}

/// Opens a pin of any kind.
pub(crate) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    // SAFETY: writing a field of a union of integers; `path` lives through the call and ends in zero.
    let fd = unsafe {
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)?
    };
    Ok(owned(fd))
}

/// Pins the object of a descriptor, of any kind.
pub(crate) fn obj_pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    // SAFETY: writing fields of a union of integers; `path` lives through the call and ends in zero.
    unsafe {
        attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
        attr.__bindgen_anon_4.bpf_fd = raw(object);
        bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr)?;
    }
    Ok(())
}

/// Fills in one of the kernel's info structs.
///
/// # Safety
///
/// `T` must be the info struct of the object of `fd`.
unsafe fn info<T: Copy>(fd: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: the info structs are made of integers.
    let mut info: T = unsafe { mem::zeroed() };
    let mut attr = zeroed();
    // SAFETY: the kernel writes at most `info_len` bytes to `info`, which lives through the call.
    unsafe {
        attr.info.bpf_fd = raw(fd);
        attr.info.info = ptr::from_mut(&mut info) as u64;
        attr.info.info_len = u32::try_from(size_of::<T>()).expect("a struct of the kernel is small");
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    }
    Ok(info)
}

/// Returns the kernel's description of a map.
pub(crate) fn map_info(fd: BorrowedFd<'_>) -> io::Result<bpf_map_info> {
    match Kind::of(fd)? {
        // SAFETY: the type of `fd` is checked; the struct is the map's.
        Kind::Map => unsafe { info(fd) },
        kind => Err(io::Error::other(format!("is not a map ({kind:?})"))),
    }
}

/// The type information that a map was made with (Documentation/bpf/btf.rst); `None`: with none.
pub(crate) fn map_btf(map: &bpf_map_info) -> io::Result<Option<Vec<u8>>> {
    if map.btf_id == 0 {
        return Ok(None);
    }
    let mut attr = zeroed();
    // SAFETY: the command reads an id and makes a descriptor.
    let fd = unsafe {
        attr.__bindgen_anon_6.__bindgen_anon_1.btf_id = map.btf_id;
        owned(bpf(bpf_cmd::BPF_BTF_GET_FD_BY_ID, &mut attr)?)
    };
    // SAFETY: `fd` is one of type information.
    let mut known: bpf_btf_info = unsafe { info(fd.as_fd()) }?;
    let mut bytes = vec![0; known.btf_size as usize];
    (known.btf, known.name, known.name_len) = (bytes.as_mut_ptr() as u64, 0, 0);
    let mut attr = zeroed();
    // SAFETY: the kernel reads the struct, and writes at most `btf_size` bytes to where it points.
    unsafe {
        attr.info.bpf_fd = raw(fd.as_fd());
        attr.info.info = ptr::from_mut(&mut known) as u64;
        attr.info.info_len =
            u32::try_from(size_of::<bpf_btf_info>()).expect("a struct of the kernel is small");
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    }
    Ok(Some(bytes))
}

/// Ids of the programs that an interface of the calling thread's network namespace has at a TCX hook, in their order.
///
/// Ids alone, which CAP_NET_ADMIN may know: more of a program that is not one's own is for CAP_SYS_ADMIN.
pub(crate) fn tcx_programs(interface: u32, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    programs(interface, hook, 0)
}

/// Ids of the programs that run for sockets of a control group at a hook, those of its ancestors included.
pub(crate) fn cgroup_programs(group: BorrowedFd<'_>, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    /// `BPF_F_QUERY_EFFECTIVE` (linux/bpf.h).
    const EFFECTIVE: u32 = 1;
    programs(raw(group), hook, EFFECTIVE)
}

/// `target`: index of an interface, or descriptor of a control group.
fn programs(target: u32, hook: bpf_attach_type, flags: u32) -> io::Result<Vec<u32>> {
    /// `BPF_MPROG_MAX` (kernel/bpf/mprog.c), as many as a level of control groups may have (`BPF_CGROUP_MAX_PROGS`).
    const MOST: u32 = 64;
    let mut ids = vec![0u32; MOST as usize];
    let mut attr = zeroed();
    // SAFETY: the kernel writes at most `count` ids to where `prog_ids` points.
    let count = unsafe {
        attr.query.__bindgen_anon_1.target_ifindex = target;
        attr.query.query_flags = flags;
        attr.query.attach_type = hook as u32;
        attr.query.prog_ids = ids.as_mut_ptr() as u64;
        attr.query.__bindgen_anon_2.count = MOST;
        bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
        attr.query.__bindgen_anon_2.count
    };
    ids.truncate(count as usize);
    Ok(ids)
}

/// Attaches a program to an interface of the calling thread's network namespace by TCX, before all others there. It stays
/// attached for as long as there is a descriptor of the link, or a pin.
pub(crate) fn tcx_attach(
    program: BorrowedFd<'_>,
    interface: u32,
    hook: bpf_attach_type,
) -> io::Result<OwnedFd> {
    /// Before the named program; without one: before all (`bpf_mprog_attach`, kernel/bpf/mprog.c).
    const BEFORE: u32 = 1 << 3;
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = interface;
    attr.link_create.attach_type = hook as u32;
    attr.link_create.flags = BEFORE;
    // SAFETY: takes no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// Of a TCX link: id of its program, and index of its interface, 0 once that is gone.
pub(crate) fn tcx_link_info(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let info = link_info(fd)?;
    // SAFETY: every member of the union is made of integers.
    Ok((info.prog_id, unsafe { info.__bindgen_anon_1.tcx.ifindex }))
}

/// Attaches a program to an interface of the calling thread's network namespace by XDP, in the driver, where no other program
/// is. It stays attached for as long as there is a descriptor of the link, or a pin.
pub(crate) fn xdp_attach(program: BorrowedFd<'_>, interface: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_ifindex = interface;
    attr.link_create.attach_type = bpf_attach_type::BPF_XDP as u32;
    attr.link_create.flags = XDP_FLAGS_DRV_MODE;
    // SAFETY: takes no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// As [`tcx_link_info`], of an XDP link.
pub(crate) fn xdp_link_info(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let info = link_info(fd)?;
    // SAFETY: every member of the union is made of integers.
    Ok((info.prog_id, unsafe { info.__bindgen_anon_1.xdp.ifindex }))
}

/// Puts another program in place of that of a link.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    // SAFETY: takes no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr)? };
    Ok(())
}

/// Id of the program of a link.
pub(crate) fn link_program(fd: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(link_info(fd)?.prog_id)
}

fn link_info(fd: BorrowedFd<'_>) -> io::Result<bpf_link_info> {
    match Kind::of(fd)? {
        // SAFETY: the type of `fd` is checked; the struct is the link's.
        Kind::Link => unsafe { info(fd) },
        kind => Err(io::Error::other(format!("is not a link ({kind:?})"))),
    }
}

/// Detaches a link at once. Removing its pin alone would do so too, but only after a grace period.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    if Kind::of(link)? != Kind::Link {
        return Err(io::Error::other("is not a link"));
    }
    let mut attr = zeroed();
    attr.link_detach.link_fd = raw(link);
    // SAFETY: takes no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr)? };
    Ok(())
}

/// Loads type information.
pub(crate) fn btf_load(btf: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    // SAFETY: writing fields of a union of integers; `btf` lives through the call and its size is passed.
    let fd = unsafe {
        attr.__bindgen_anon_7.btf = btf.as_ptr() as u64;
        attr.__bindgen_anon_7.btf_size = u32::try_from(btf.len()).map_err(io::Error::other)?;
        bpf(bpf_cmd::BPF_BTF_LOAD, &mut attr)?
    };
    Ok(owned(fd))
}

/// Writes many entries with few system calls.
pub(crate) fn update_batch<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> io::Result<()> {
    assert_eq!(keys.len(), values.len());
    let mut done = 0;
    while done < keys.len() {
        let mut attr = zeroed();
        attr.batch = bpf_attr__bindgen_ty_3 {
            in_batch: 0,
            out_batch: 0,
            keys: keys[done..].as_ptr() as u64,
            values: values[done..].as_ptr() as u64,
            count: u32::try_from(keys.len() - done).map_err(io::Error::other)?,
            map_fd: raw(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: both slices hold `count` entries of the map's key and value size, and are only read.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) };
        match result {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                // SAFETY: the kernel leaves the number of entries written in the same member.
                done += unsafe { attr.batch.count } as usize;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes one entry; `flags` as of `BPF_MAP_UPDATE_ELEM`.
pub(crate) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V, flags: u64) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: key and value have the map's sizes, live through the call and are only read.
    unsafe {
        attr.__bindgen_anon_2.map_fd = raw(map);
        attr.__bindgen_anon_2.key = ptr::from_ref(key) as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = ptr::from_ref(value) as u64;
        attr.__bindgen_anon_2.flags = flags;
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr)?;
    }
    Ok(())
}

/// Reads every entry of a hash or an array, a chunk at a time: unlike a walk from key to key, this neither starts again
/// nor loses entries when the kernel removes the key it stands on.
pub(crate) fn for_each<K: Pod, V: Pod>(map: BorrowedFd<'_>, mut visit: impl FnMut(K, V)) -> io::Result<()> {
    for_each_raw(map, size_of::<K>(), size_of::<V>(), |key, value| {
        // SAFETY: of the types' sizes; any bit pattern is a value of a `Pod` type.
        unsafe {
            visit(key.as_ptr().cast::<K>().read_unaligned(), value.as_ptr().cast::<V>().read_unaligned())
        }
    })
}

/// As [`for_each`], of keys and values of these sizes, which are those of the map.
pub(crate) fn for_each_raw(
    map: BorrowedFd<'_>,
    key_size: usize,
    value_size: usize,
    mut visit: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    // A bucket with more entries than there is room for makes the kernel ask for more.
    let mut room = 4096;
    let (mut keys, mut values) = (Vec::<u8>::new(), Vec::<u8>::new());
    // The kernel's cursor: a bucket number, or the last key.
    let mut cursor = vec![0_u64; key_size.div_ceil(8).max(1)];
    let mut begun = false;
    loop {
        keys.resize(room * key_size, 0);
        values.resize(room * value_size, 0);
        let mut attr = zeroed();
        attr.batch = bpf_attr__bindgen_ty_3 {
            in_batch: if begun { cursor.as_ptr() as u64 } else { 0 },
            out_batch: cursor.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(room).map_err(io::Error::other)?,
            map_fd: raw(map),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: keys and values have room for `count` entries of the map's sizes, the cursor for one key.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) };
        let last = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                Some(libc::ENOSPC) if room < 1 << 24 => {
                    room *= 2;
                    continue;
                }
                _ => return Err(error),
            },
        };
        // SAFETY: the kernel has written how many entries there are.
        let count = unsafe { attr.batch.count as usize }.min(room);
        for (key, value) in keys.chunks(key_size).zip(values.chunks(value_size)).take(count) {
            visit(key, value);
        }
        if last {
            return Ok(());
        }
        begun = true;
    }
}

/// Reads one entry; `None`: it is not there.
pub(crate) fn lookup<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = zeroed();
    // SAFETY: key and value have the map's sizes and live through the call; the value is only written.
    let result = unsafe {
        attr.__bindgen_anon_2.map_fd = raw(map);
        attr.__bindgen_anon_2.key = ptr::from_ref(key) as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
        bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr)
    };
    match result {
        // SAFETY: the kernel has written it whole.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes one entry. Returns whether it existed.
pub(crate) fn delete<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = zeroed();
    // SAFETY: the key has the map's size, lives through the call and is only read.
    let result = unsafe {
        attr.__bindgen_anon_2.map_fd = raw(map);
        attr.__bindgen_anon_2.key = ptr::from_ref(key) as u64;
        bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr)
    };
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Does `work` with no signal taken by this thread: the verifier gives up with EAGAIN when one is pending
/// (kernel/bpf/verifier.c), such as the SIGCHLD of a process of another thread, and aya then starts it again, slowly,
/// with a log.
pub(crate) fn without_signals<T>(work: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` is written before it is read, and `before` is written by the first call of pthread_sigmask, which
    // fails for a wrong argument alone.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = work();
    // SAFETY: as above.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
    }
    result
}

/// Waits until every running program has ended: an RCU grace period
/// (`MEMBARRIER_CMD_GLOBAL`, kernel/sched/membarrier.c).
///
/// # Errors
///
/// `EINVAL` on kernels that run with `nohz_full`.
pub(crate) fn grace_period() -> io::Result<()> {
    // SAFETY: takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
