//! Starting the pool, and keeping it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use bridge_common::pool::Event;
use tokio::io::unix::AsyncFd;
use tracing::{debug, info, warn};

use super::{
    KernelPool, Layout, Settings, api, attach,
    backend::Backend,
    checks::{self, Warning},
    conntrack,
    kernel::{self, KernelPoolError},
    layout::{LayoutError, Occupied},
    pins::PinError,
    service::Service,
};
use crate::model::PortRange;

/// How long conntrack remembers a closed TCP connection unless told otherwise (`nf_conntrack_tcp_timeout_time_wait`);
/// also how long the sweep lets a warm port rest.
pub const REST: Duration = Duration::from_secs(120);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Directory for pins, on a bpf file system.
    pub pins: PathBuf,
    /// Directory for what the agent must find again after a crash.
    pub state: PathBuf,
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// See there.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// See there.
    #[error(transparent)]
    Kernel(#[from] KernelPoolError),
    /// See the text.
    #[error("cannot keep the pool's ports from other programs (net.ipv4.ip_local_reserved_ports): {0}")]
    Reserve(io::Error),
}

/// A pool that has been started.
pub struct Started {
    /// To be served; see [`api::router`].
    pub service: Arc<Service>,
    /// What spoils it.
    pub warnings: Vec<Warning>,
    events: Option<RingBuf<MapData>>,
}

/// Starts the pool: in the kernel if it can be, else in the agent's memory.
///
/// # Errors
/// [`StartError`]: the settings cannot be met, here or anywhere. A kernel that lacks something is no error.
pub fn start(
    object: &[u8],
    settings: &Settings,
    node_ports: Option<PortRange>,
    places: &Places,
) -> Result<Started, StartError> {
    let own = reserved_file(&places.state);
    let occupied = Occupied { node_ports, reserved: checks::reserved_by_others(&own) };
    let layout = Layout::plan(settings, &occupied)?;
    let ports = layout.ports.clone();
    let mut events = None;
    let backend = match in_kernel(object, settings, &layout, &places.pins) {
        Ok(mut pool) => {
            events = pool.take_events();
            Backend::kernel(pool)
        }
        Err(error) if lacking(&error) => {
            warn!(%error, "the kernel cannot hold the port pool: ports are leased by the agent alone, and no program is bound without its knowing");
            Backend::userspace(layout, REST)
        }
        Err(error) => return Err(error.into()),
    };
    // First the note: what is noted and not reserved does no harm, the other way round nobody would take it back.
    let text = ports.ranges().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    fs::create_dir_all(&places.state)
        .and_then(|()| fs::write(&own, text))
        .and_then(|()| checks::reserve(&ports))
        .map_err(StartError::Reserve)?;
    let warnings = checks::look(&ports);
    for Warning { problem, remedy } in &warnings {
        warn!(remedy, "{problem}");
    }
    info!(mode = backend.name(), ports = ports.len(), "port pool");
    Ok(Started { service: Service::new(backend, settings.destinations.clone()), warnings, events })
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Started").field("service", &self.service).finish_non_exhaustive()
    }
}

impl Started {
    /// Does what is to be done from time to time, until the process ends; beside the server of [`api`].
    pub async fn keep(self) {
        let Self { service, events, .. } = self;
        tokio::join!(
            api::expire(Arc::clone(&service)),
            sweep(Arc::clone(&service), REST),
            report(Arc::clone(&service), events),
        );
    }
}

/// Takes the pool away: hooks, pins, reserved ports.
///
/// # Errors
/// All that went wrong; the rest is done nevertheless.
pub fn stop(places: &Places) -> Result<(), Vec<String>> {
    let own = reserved_file(&places.state);
    let mut errors = Vec::new();
    errors.extend(kernel::remove(&places.pins).err().map(|error| error.to_string()));
    if let Ok(text) = fs::read_to_string(&own) {
        let ports = checks::parse_ranges(&text).into_iter().collect();
        match checks::unreserve(&ports).and_then(|()| fs::remove_file(&own)) {
            Ok(()) => {}
            Err(error) => errors.push(format!("net.ipv4.ip_local_reserved_ports: {error}")),
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn reserved_file(state: &Path) -> PathBuf {
    state.join("pool-reserved-ports")
}

fn in_kernel(
    object: &[u8],
    settings: &Settings,
    layout: &Layout,
    pins: &Path,
) -> Result<KernelPool, KernelPoolError> {
    let mut pool = KernelPool::load(object, pins, layout.clone())?;
    pool.set_networks(&settings.destinations)?;
    if !settings.cgroups.is_empty() {
        let mount = attach::mount_point()?;
        for cgroup in &settings.cgroups {
            pool.attach(&mount, cgroup)?;
        }
    }
    Ok(pool)
}

/// Whether an error says that the kernel lacks something, and not that the settings are wrong.
fn lacking(error: &KernelPoolError) -> bool {
    match error {
        KernelPoolError::Load(_)
        | KernelPoolError::Program { .. }
        | KernelPoolError::Mmap(_)
        | KernelPoolError::Pin(PinError::Directory { .. })
        | KernelPoolError::Cgroup(attach::CgroupError::NotMounted) => true,
        KernelPoolError::Pin(_)
        | KernelPoolError::Cgroup(_)
        | KernelPoolError::Layout(_)
        | KernelPoolError::Map { .. }
        | KernelPoolError::Missing(_)
        | KernelPoolError::Link { .. }
        | KernelPoolError::Walk(_) => false,
    }
}

/// One round of [`super::sweep`] after the other.
async fn sweep(service: Arc<Service>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let service = Arc::clone(&service);
        let round = move || {
            // Without conntrack nothing is translated, and nothing needs to be forgotten.
            let known = conntrack::known().unwrap_or_default();
            service.backend().sweep(|destination, port| known.contains(&(*destination, port)))
        };
        match tokio::task::spawn_blocking(round).await {
            Ok(Ok(swept)) if swept.recovered > 0 => warn!(?swept, "ports had got lost"),
            Ok(Ok(swept)) => debug!(?swept, "swept"),
            Ok(Err(error)) => warn!(%error, "cannot sweep the port pool"),
            Err(error) => warn!(%error, "the sweep of the port pool failed"),
        }
    }
}

/// Passes on what the hooks report.
async fn report(service: Arc<Service>, events: Option<RingBuf<MapData>>) {
    let Some(ring) = events else { return };
    // SAFETY: the ring owns its descriptor, which stays open and the same until the ring goes, together with this.
    let Ok(mut events) = (unsafe { AsyncFd::register(ring) }) else { return };
    loop {
        let Ok(mut ready) = events.readable_mut().await else { return };
        while let Some(item) = ready.get_inner_mut().next() {
            if item.len() >= size_of::<Event>() {
                // SAFETY: as many bytes, and any bytes are an event.
                let event = unsafe { item.as_ptr().cast::<Event>().read_unaligned() };
                service.report(&event);
            }
        }
        ready.clear_ready();
    }
}
