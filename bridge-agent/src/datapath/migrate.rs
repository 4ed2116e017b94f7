//! Migrates flows from another version of bridge, whose maps are pinned beside ours with another layout.

use crate::kernel::bpf;
use std::os::fd::AsFd as _;

use aya_obj::generated::bpf_map_info;
use bridge_common::filter::flow::{Flow, FlowKey, flag};
use zerocopy::FromBytes;

use super::{
    error::{Error, Result},
    layout::Layout,
    load::Datapath,
    pins::Pins,
};

const BPF_NOEXIST: u64 = 1;

/// Keys and values.
struct Layouts {
    key: Layout,
    value: Layout,
}

impl Layouts {
    /// `None`: the map has no type information, or none that can be understood.
    fn of(info: &bpf_map_info) -> std::io::Result<Option<Self>> {
        let Some(btf) = bpf::map_btf(info)? else { return Ok(None) };
        let sized = |id, size: u32| Layout::of(&btf, id).filter(|layout| layout.size() == size as usize);
        let key = sized(info.btf_key_type_id, info.key_size);
        Ok(key.zip(sized(info.btf_value_type_id, info.value_size)).map(|(key, value)| Self { key, value }))
    }
}

impl Datapath {
    fn predecessors(&self) -> Result<Vec<Pins>> {
        let others = self.pins.versions()?.into_iter();
        Ok(others.filter(|version| version.directory() != self.pins.directory()).collect())
    }

    /// Migrates the flows of other versions of bridge. Known flows stay as they are, so this may be called again for
    /// flows opened meanwhile. Returns how many were new.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn migrate_flows(&self) -> Result<usize> {
        let mut migrated = 0;
        for version in self.predecessors()? {
            for table in ["flows", "other_flows", "overflow"] {
                migrated += migrate::<FlowKey, Flow>(&version, table, |key, mut flow| {
                    forget_rule(&mut flow);
                    flow.flags |= flag::SEEDED;
                    // Of an epoch that is not ours.
                    flow.leases = Default::default();
                    self.maps.seed_flows(&[(key, flow)])
                })?;
            }
            let half_open = bpf::fd(&self.maps.half_open);
            migrated += migrate::<FlowKey, Flow>(&version, "half_open", |key, mut flow| {
                forget_rule(&mut flow);
                self.maps.flow_filter.note(&key);
                insert("half_open", half_open, &key, &flow)
            })?;
        }
        Ok(migrated)
    }
}

/// Generations start from one again, so the rule is unknown.
fn forget_rule(flow: &mut Flow) {
    (flow.generation, flow.rule) = (0, u32::MAX);
}

fn insert<K: aya::Pod, V: aya::Pod>(
    name: &'static str,
    map: std::os::fd::BorrowedFd<'_>,
    key: &K,
    value: &V,
) -> Result<usize> {
    match bpf::update(map, key, value, BPF_NOEXIST) {
        Ok(()) => Ok(1),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(0),
        Err(error) => Err(Error::map(name)(error)),
    }
}

/// Converts every entry of a map of another version to our layout; returns the sum of the results of `take`.
fn migrate<K: FromBytes, V: FromBytes>(
    from: &Pins,
    name: &'static str,
    mut take: impl FnMut(K, V) -> Result<usize>,
) -> Result<usize> {
    let path = from.map(name);
    if !path.exists() {
        return Ok(0);
    }
    let map = bpf::obj_get(&path).map_err(Error::path("opening", &path))?;
    let info = bpf::map_info(map.as_fd()).map_err(Error::path("looking at", &path))?;
    let theirs = Layouts::of(&info).map_err(Error::path("looking at", &path))?;
    let own = own_layouts(from, name)?;
    let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
    let same_sizes = (key_size, value_size) == (size_of::<K>(), size_of::<V>());
    let layouts = theirs.zip(own);
    if layouts.is_none() && !same_sizes {
        tracing::warn!(map = %path.display(), "this map of another version has no type information");
        return Ok(0);
    }
    let (mut taken, mut failure) = (0, None);
    bpf::for_each_raw(map.as_fd(), key_size, value_size, |key, value| {
        let converted = match &layouts {
            Some((theirs, own)) => {
                own.key.convert(&theirs.key, key).zip(own.value.convert(&theirs.value, value))
            }
            None => Some((key.to_vec(), value.to_vec())),
        };
        let Some((key, value)) = converted else { return };
        let (Ok(key), Ok(value)) = (K::read_from_bytes(&key), V::read_from_bytes(&value)) else { return };
        match take(key, value) {
            Ok(count) => taken += count,
            Err(error) => failure = Some(error),
        }
    })
    .map_err(Error::path("reading", &path))?;
    failure.map_or(Ok(taken), Err)
}

fn own_layouts(pins: &Pins, name: &str) -> Result<Option<Layouts>> {
    let path = Pins::new(pins.root()).map(name);
    let map = bpf::obj_get(&path).map_err(Error::path("opening", &path))?;
    let info = bpf::map_info(map.as_fd()).map_err(Error::path("looking at", &path))?;
    Layouts::of(&info).map_err(Error::path("looking at", &path))
}
