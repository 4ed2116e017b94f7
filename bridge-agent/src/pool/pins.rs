//! Pins of maps and links.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{MapError, MapInfo, MapType};
use bridge_common::pool::{
    self, Config, Destination, Grant, Granted, Lease, Owner, Rest, RestingPort, counter,
};

/// Required properties of a map of the pool.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its name, and that of its pin.
    pub name: &'static str,
    /// Its type.
    pub map_type: MapType,
    /// Bytes of a key.
    pub key: usize,
    /// Bytes of a value.
    pub value: usize,
    /// Elements; `None` where the kernel decides.
    pub entries: Option<u32>,
    /// `BPF_F_*`.
    pub flags: u32,
}

/// Why a pin cannot be used again.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    #[error("cannot read the pinned map {path}: {source}")]
    Read {
        /// The pin.
        path: PathBuf,
        /// Error of the kernel.
        source: MapError,
    },
    #[error(
        "the pinned map {path} has {field} {found}, this version needs {wanted}: the range of the pool grew beyond \
         what is pinned, or another version made it; run `bridge-agent down` to remove the pins (established \
         connections live on, their ports are not tracked any more)"
    )]
    Different {
        /// The pin.
        path: PathBuf,
        /// The property that differs.
        field: &'static str,
        /// The pinned value.
        found: u64,
        /// The required value.
        wanted: u64,
    },
    #[error("cannot use {path} for pins: {source}; is a bpf file system mounted at /sys/fs/bpf?")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Error of the kernel.
        source: io::Error,
    },
}

const MMAPABLE: u32 = 1 << 10;
const NO_PREALLOC: u32 = 1;

/// The maps that are pinned; `words` and `uses` are the sizes of the arrays of words.
#[must_use]
pub fn shapes(words: u32, uses: u32) -> [Shape; 12] {
    let shape =
        |name, map_type, key, value, entries, flags| Shape { name, map_type, key, value, entries, flags };
    [
        shape("POOL_CONFIG", MapType::Array, 4, size_of::<Config>(), Some(1), 0),
        shape("POOL_WORDS", MapType::Array, 4, 8, Some(words), MMAPABLE),
        shape("POOL_NETWORKS", MapType::LpmTrie, 20, 4, Some(4096), NO_PREALLOC),
        shape("POOL_DESTINATIONS", MapType::Hash, size_of::<Destination>(), 4, Some(65536), NO_PREALLOC),
        shape("POOL_OWNERS", MapType::Hash, size_of::<Owner>(), 4, Some(65536), NO_PREALLOC),
        shape("POOL_SHARES", MapType::Hash, 8, 8, Some(262_144), NO_PREALLOC),
        shape(
            "POOL_GRANTS",
            MapType::Hash,
            size_of::<Grant>(),
            size_of::<Granted>(),
            Some(65536),
            NO_PREALLOC,
        ),
        shape(
            "POOL_RESTING",
            MapType::Hash,
            size_of::<RestingPort>(),
            size_of::<Rest>(),
            Some(pool::MAX_RESTS),
            NO_PREALLOC,
        ),
        shape("POOL_USES", MapType::Array, 4, 8, Some(uses), MMAPABLE),
        shape("POOL_LEASES", MapType::SkStorage, 4, size_of::<Lease>(), None, NO_PREALLOC),
        shape("POOL_COUNTERS", MapType::PerCpuArray, 4, 8, Some(counter::COUNT), 0),
        shape("POOL_EVENTS", MapType::RingBuf, 0, 0, Some(262_144), 0),
    ]
}

/// Prefix of the directories of pools.
pub const PREFIX: &str = "pool-";

/// The directory of the pool's pins below a base such as `/sys/fs/bpf/bridge`.
#[must_use]
pub fn directory(base: &Path) -> PathBuf {
    base.join(format!("{PREFIX}{}", pool::ABI_VERSION))
}

/// Prefix of the directories of `bridge-agent exec --ports`: pools for one program each.
pub const EXEC_PREFIX: &str = "exec-";

/// Whether a directory below such a base is one of a pool, of this version or another.
#[must_use]
pub fn is_of_a_pool(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(PREFIX) || name.starts_with(EXEC_PREFIX))
}

/// Makes a directory for pins.
///
/// # Errors
/// [`PinError::Directory`].
pub fn make_directory(path: &Path) -> Result<(), PinError> {
    fs::create_dir_all(path).map_err(|source| PinError::Directory { path: path.into(), source })
}

/// Compares a pin with its required properties. `false`: there is no pin.
///
/// # Errors
/// [`PinError`]: it cannot be read, or is of another shape.
pub fn check(path: &Path, shape: &Shape) -> Result<bool, PinError> {
    if !path.exists() {
        return Ok(false);
    }
    let read = |source| PinError::Read { path: path.into(), source };
    let info = MapInfo::from_pin(path).map_err(read)?;
    let map_type = info.map_type().map_err(read)?;
    let mut facts = vec![
        ("type", map_type as u64, shape.map_type as u64),
        ("key size", info.key_size().into(), shape.key as u64),
        ("value size", info.value_size().into(), shape.value as u64),
        ("flags", info.map_flags().into(), shape.flags.into()),
    ];
    if let Some(entries) = shape.entries {
        facts.push(("max entries", info.max_entries().into(), entries.into()));
    }
    match facts.into_iter().find(|(_, found, wanted)| found != wanted) {
        None => Ok(true),
        Some((field, found, wanted)) => Err(PinError::Different { path: path.into(), field, found, wanted }),
    }
}
