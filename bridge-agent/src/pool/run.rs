//! Starting the pool, and keeping it.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::{MapData, RingBuf};
use bridge_common::pool::Event;
use tokio::{io::unix::AsyncFd, sync::watch};
use tracing::{debug, info, warn};
use zerocopy::FromBytes as _;

use super::{
    KernelPool, Layout, Settings, attach,
    backend::Backend,
    checks::{self, Warning},
    conntrack,
    kernel::{self, KernelPoolError},
    layout::{LayoutError, Occupied},
    masquerade::{self, Masquerade},
    pins::{self, PinError},
    pods, record,
    service::Service,
    tables::lock,
};
use crate::{
    kernel::pins::{self as kernel_pins, PinRoot},
    model::PortSet,
};

/// How long conntrack remembers a closed TCP connection by default (`nf_conntrack_tcp_timeout_time_wait`);
/// also how long the sweep lets a warm port rest.
pub const REST: Duration = Duration::from_secs(120);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Directory for pins, on a bpf file system.
    pub pins: PathBuf,
    /// Directory for state that the agent must find again after a crash.
    pub state: PathBuf,
}

impl Places {
    /// Whether a pool is pinned, of whichever agent.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        pins::directory(&self.pins).exists()
    }
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Kernel(#[from] KernelPoolError),
    #[error(
        "cannot keep the pool's ports from other programs (net.ipv4.ip_local_reserved_ports): {0}; in a container, mount the host's /proc/sys/net at /host/proc/sys/net"
    )]
    Reserve(io::Error),
    #[error("cannot set up portPool.masquerade: {0}; install nftables, or remove the key")]
    Masquerade(io::Error),
}

impl StartError {
    /// Whether another agent has the pool.
    fn is_locked(&self) -> bool {
        matches!(self, Self::Kernel(KernelPoolError::Locked(_)))
    }
}

/// A pool that has been started.
pub struct Started {
    /// Leases ports to clients of the API.
    pub service: Arc<Service>,
    settings: Settings,
    places: Places,
    events: Option<RingBuf<MapData>>,
    masquerade: Arc<Masquerade>,
}

/// Starts the pool: in the kernel if it can be, else in the agent's memory.
///
/// # Errors
/// [`StartError`]: the settings cannot be met, here or anywhere. A kernel that lacks a feature is no error. Nothing new
/// stays behind.
pub fn start(object: &[u8], settings: &Settings, places: &Places) -> Result<Started, StartError> {
    let first = !places.is_pinned();
    let result = try_start(object, settings, places);
    if first
        && let Err(error) = &result
        && !error.is_locked()
        && let Err(error) = stop(places)
    {
        warn!(%error, "left behind after a failed start of the port pool");
    }
    result
}

fn try_start(object: &[u8], settings: &Settings, places: &Places) -> Result<Started, StartError> {
    let layout = plan(settings, places)?;
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
    let service = Service::new(backend, settings.destinations.clone());
    let started = Started {
        service,
        settings: settings.clone(),
        places: places.clone(),
        events,
        masquerade: Arc::default(),
    };
    started.surround(&ports)?;
    info!(mode = started.service.backend().name(), ports = ports.len(), "port pool");
    Ok(started)
}

/// Returns the available ports, without those that other programs on this machine use.
fn plan(settings: &Settings, places: &Places) -> Result<Layout, LayoutError> {
    let of_others = others(settings, places, &checks::reserved());
    let reserved = of_others.ranges();
    Layout::plan(settings, &Occupied { node_ports: settings.node_ports, reserved })
}

/// Returns the ports of `reserved` that another program has reserved.
fn others(settings: &Settings, places: &Places, reserved: &PortSet) -> PortSet {
    let mut of_others = reserved.clone();
    of_others.remove_all(&own_ports(settings, places, reserved));
    of_others
}

/// Returns the ports that an agent with this state has reserved.
fn own_ports(settings: &Settings, places: &Places, reserved: &PortSet) -> PortSet {
    // Without those of others, there are as many as the agent can have reserved.
    let all = Layout::plan(settings, &Occupied { node_ports: settings.node_ports, reserved: Vec::new() });
    let pool = all.map(|layout| layout.ports).unwrap_or_default();
    record::own(&reserved_file(&places.state), reserved, &pool)
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Started").field("service", &self.service).finish_non_exhaustive()
    }
}

impl Started {
    /// Performs periodic work for as long as it is polled; available once.
    ///
    /// `pods` names the pods whose connections are bound transparently, beside those of [`Settings::cgroups`].
    pub fn keep(&mut self, pods: watch::Receiver<pods::OptedIn>) -> impl Future<Output = ()> + Send + use<> {
        let (service, events) = (Arc::clone(&self.service), self.events.take());
        let masquerade = Arc::clone(&self.masquerade);
        async move {
            tokio::join!(
                expire(Arc::clone(&service)),
                wake(Arc::clone(&service)),
                sweep(Arc::clone(&service), REST),
                keep_pinned(Arc::clone(&service)),
                report(Arc::clone(&service), events),
                masquerade::watch(Arc::clone(&service), masquerade),
                pods::keep(Arc::clone(&service), pods, None),
            );
        }
    }

    /// Returns the settings of the pool.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Goes over to other settings. Ports that are held stay held.
    ///
    /// # Errors
    /// [`StartError`]; the former settings are active again.
    pub fn change(&mut self, settings: &Settings) -> Result<(), StartError> {
        if *settings == self.settings {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.settings, settings.clone());
        let result = self.apply();
        if let Err(error) = &result {
            self.settings = before;
            // A readable file stays readable; a refusal came before anything was changed.
            if let Err(again) = self.apply() {
                warn!(%error, %again, "the port pool is between two configurations");
            }
        }
        result
    }

    /// Removes the pool, as [`stop`]; requests in progress keep the lock, so that no other process has it yet.
    ///
    /// # Errors
    /// [`StopError::Left`].
    pub fn withdraw(self) -> Result<(), StopError> {
        if let Backend::Kernel(pool, _) = self.service.backend() {
            lock(pool).let_go();
        }
        take_away(&self.places)
    }

    fn apply(&self) -> Result<(), StartError> {
        let layout = plan(&self.settings, &self.places)?;
        let ports = layout.ports.clone();
        self.service.change(&self.settings, layout)?;
        self.surround(&ports)?;
        info!(ports = ports.len(), "port pool changed");
        Ok(())
    }

    /// Maintains the surroundings of the pool: its ports are reserved, connections keep them when they are masqueraded,
    /// and faults are reported.
    fn surround(&self, ports: &PortSet) -> Result<(), StartError> {
        // First the note: a port noted and not reserved does no harm; the other way round no agent would release it.
        let own = reserved_file(&self.places.state);
        // A damaged record was reported when the pool was planned.
        let mut gone = record::ports(&own).ok().flatten().unwrap_or_default();
        gone.remove_all(ports);
        fs::create_dir_all(&self.places.state)
            .and_then(|()| if gone.is_empty() { Ok(()) } else { checks::unreserve(&gone) })
            .and_then(|()| record::write(&own, ports))
            .and_then(|()| checks::reserve(ports))
            .map_err(StartError::Reserve)?;
        if self.settings.masquerade.is_empty() {
            self.masquerade.uninstall()
        } else {
            let Settings { masquerade: sources, destinations, .. } = &self.settings;
            self.masquerade.install(masquerade::script(sources, destinations, ports))
        }
        .map_err(StartError::Masquerade)?;
        let mut warnings = checks::look(ports);
        if !self.settings.masquerade.is_empty() {
            // Superseded by our own masquerade rule.
            warnings.retain(|warning| !warning.masquerade);
        }
        for Warning { problem, remedy, .. } in &warnings {
            warn!(remedy, "{problem}");
        }
        self.service.set_warnings(&warnings);
        Ok(())
    }
}

/// Why something of the pool is left.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// An agent that runs has it; nothing was taken away.
    #[error(transparent)]
    Locked(kernel_pins::Error),
    /// All that went wrong; the rest was taken away nevertheless.
    #[error("{}", .0.join("\n"))]
    Left(Vec<String>),
}

/// Takes the pool away: hooks, pins, reserved ports.
///
/// # Errors
/// [`StopError`].
pub fn stop(places: &Places) -> Result<(), StopError> {
    let pins = pins::directory(&places.pins);
    let _lock =
        if places.is_pinned() { Some(PinRoot::new(&pins).lock().map_err(StopError::Locked)?) } else { None };
    take_away(places)
}

fn take_away(places: &Places) -> Result<(), StopError> {
    let own = reserved_file(&places.state);
    let mut errors = Vec::new();
    errors.extend(kernel::remove(&places.pins).err().map(|error| error.to_string()));
    match record::ports(&own) {
        Ok(None) => {}
        Ok(Some(ports)) => {
            if let Err(error) = checks::unreserve(&ports).and_then(|()| fs::remove_file(&own)) {
                errors.push(format!("net.ipv4.ip_local_reserved_ports: {error}"));
            }
        }
        Err(error) => errors.push(format!(
            "{}: {error}; take the ports of the pool out of net.ipv4.ip_local_reserved_ports, and remove the file",
            own.display()
        )),
    }
    errors.extend(masquerade::remove().err().map(|error| error.to_string()));
    if errors.is_empty() { Ok(()) } else { Err(StopError::Left(errors)) }
}

fn reserved_file(state: &Path) -> PathBuf {
    state.join(record::NAME)
}

fn in_kernel(
    object: &[u8],
    settings: &Settings,
    layout: &Layout,
    pins: &Path,
) -> Result<KernelPool, KernelPoolError> {
    let mut pool = KernelPool::load(object, pins, layout.clone())?;
    pool.set_networks(&settings.destinations)?;
    pool.set_cgroups(&settings.cgroups)?;
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
        | KernelPoolError::Locked(_)
        | KernelPoolError::Walk(_) => false,
    }
}

/// Ends leases whose time is over, for as long as it runs.
pub async fn expire(service: Arc<Service>) {
    /// Bounds the delay of a lease that is acquired during the pause.
    const MAX_PAUSE: Duration = Duration::from_millis(100);
    loop {
        let next = service.expire().map(tokio::time::Instant::from_std);
        let latest = tokio::time::Instant::now() + MAX_PAUSE;
        tokio::time::sleep_until(next.map_or(latest, |next| next.min(latest))).await;
    }
}

/// Releases ports whose rest is over, for as long as it runs.
async fn wake(service: Arc<Service>) {
    /// Bounds the delay of a port that could be used again.
    const PAUSE: Duration = Duration::from_millis(250);
    let mut failed = false;
    loop {
        tokio::time::sleep(PAUSE).await;
        let service = Arc::clone(&service);
        let error = match tokio::task::spawn_blocking(move || service.backend().wake()).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        if let (false, Some(error)) = (failed, &error) {
            warn!(error, "the port pool cannot release ports that rest");
        }
        failed = error.is_some();
    }
}

/// One round of [`super::sweep`] after the other; sooner while connects are refused, or destinations fill the table.
async fn sweep(service: Arc<Service>, every: Duration) {
    /// After a change of the ports, or a refusal: a port is found, or retired, in the second round.
    const SOON: Duration = Duration::from_secs(1);
    const ROUNDS: u32 = 2;
    /// Between two looks at the table.
    const LOOK: Duration = Duration::from_millis(250);
    /// While rounds find nothing to retire in a table that fills.
    const FRUITLESS: Duration = Duration::from_secs(10);
    let mut soon = 0_u32;
    let mut fruitless = 0_u32;
    let mut last = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK.min(every)) => {}
            () = service.changed() => {
                soon = ROUNDS;
                continue;
            }
        }
        let short = service.backend().is_short_of_slots();
        if last.elapsed() >= FRUITLESS && service.take_starved() {
            soon = soon.max(ROUNDS);
        }
        let pause = match (soon > 0, short, fruitless >= ROUNDS) {
            (true, ..) | (_, true, false) => SOON,
            (_, true, true) => FRUITLESS,
            (_, false, _) => every,
        };
        if last.elapsed() < pause.min(every) {
            continue;
        }
        soon = soon.saturating_sub(1);
        let service = Arc::clone(&service);
        let round = move || {
            // Without conntrack nothing is translated, and nothing needs to be forgotten.
            let known = conntrack::known().unwrap_or_default();
            service.backend().sweep(|destination, port| known.contains(&(*destination, port)))
        };
        let result = tokio::task::spawn_blocking(round).await;
        last = Instant::now();
        let retired = matches!(&result, Ok(Ok(swept)) if swept.retired > 0);
        fruitless = if retired || !short { 0 } else { fruitless.saturating_add(1) };
        match result {
            Ok(Ok(swept)) if swept.recovered > 0 => warn!(?swept, "ports had got lost"),
            Ok(Ok(swept)) => debug!(?swept, "swept"),
            Ok(Err(error)) => warn!(%error, "cannot sweep the port pool"),
            Err(error) => warn!(%error, "the sweep of the port pool failed"),
        }
    }
}

/// Restores removed pins.
async fn keep_pinned(service: Arc<Service>) {
    const LOOK: Duration = Duration::from_millis(500);
    let Backend::Kernel(pool, _) = service.backend() else { return };
    let mut said = None;
    loop {
        tokio::time::sleep(LOOK).await;
        // The present holder may take a while, and must not be waited for here.
        let Ok(mut pool) = pool.try_lock() else { continue };
        let (restored, result) = pool.restore_pins();
        if restored > 0 {
            warn!(restored, "restored pins of the port pool that another program had removed or unmounted");
        }
        let unpinned = result
            .err()
            .map(|error| format!("pins are gone, so that the pool ends when the agent ends: {error}"));
        if unpinned != said {
            if let Some(unpinned) = &unpinned {
                warn!("{unpinned}");
            }
            service.set_unpinned(unpinned.clone());
            said = unpinned;
        }
    }
}

/// Forwards the events of the hooks.
async fn report(service: Arc<Service>, events: Option<RingBuf<MapData>>) {
    let Some(ring) = events else { return };
    // SAFETY: the ring owns its descriptor, which stays open and the same until the ring goes, together with this.
    let Ok(mut events) = (unsafe { AsyncFd::register(ring) }) else { return };
    loop {
        let Ok(mut ready) = events.readable_mut().await else { return };
        while let Some(item) = ready.get_inner_mut().next() {
            if let Ok((event, _)) = Event::read_from_prefix(&item) {
                service.report(&event);
            }
        }
        ready.clear_ready();
    }
}
