//! The running agent: brings the configuration into force and keeps it so.
//!
//! One thread: what the kernel and the operator say comes in one at a time, and each is dealt with before the next. The
//! API has another, so that nobody who only asks waits for that.

mod apply;
mod cluster;
mod divergence;
mod enforcer;
mod fast_path;
mod file;
mod packet_filter;
mod port_pool;
mod port_ranges;
mod probe;
mod readiness;
mod routing;
mod status;
pub(crate) mod trial;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

pub use apply::{Applied, ApplyError, LONGEST_TRIAL, MOST_PROBES, Order, SHORTEST_TRIAL};
pub use divergence::DivergenceStatus;
pub use enforcer::{AttachedInterface, Enforcement, Error as EnforcerError};
pub use fast_path::FastPathStatus;
pub use packet_filter::{FirewallStatus, settings as firewall_settings};
pub(crate) use port_pool::places as pool_places;
pub use probe::Probe;
pub use routing::{DiscoveryStatus, RouteList, RoutesStatus};
pub use status::{Reload, Reloads, Request, Shared, Status};
pub(crate) use status::{at, wall_clock};
pub(crate) use trial::forget as forget_trial;
pub use trial::{Outcome, ProbeStatus, TrialEnd, TrialStatus, WriteError};

use self::{
    cluster::Following,
    enforcer::{Enforcer, Term},
    file::{FileWatch, Hash},
    packet_filter::PacketFilter,
    port_pool::PortPool,
    routing::Routing,
    trial::{Files, Trial},
};
use crate::{
    api,
    config::{self, Api, Config, ConfigErrors, Engine, Loaded, Role},
    datapath::{self, EventReader, Pins},
    interfaces::Watch,
    iptables,
    kernel::capabilities,
    kubernetes, pool, routes,
};

/// What the agent is told on its command line.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// The unix socket, if not that of the configuration.
    pub socket: Option<PathBuf>,
    /// Where maps and links are pinned.
    pub pin_root: PathBuf,
}

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The packet path is not as it should be.
    #[error(transparent)]
    Enforcer(#[from] enforcer::Error),
    /// The iptables rules are not as they should be.
    #[error(transparent)]
    Firewall(#[from] iptables::Error),
    /// The routes cannot be looked after.
    #[error(transparent)]
    Routes(#[from] routes::Error),
    /// What is on trial is not to be disturbed.
    #[error(
        "a configuration is on trial for {0} s more, and the file is read when that is over: confirm it (`bridge-agent \
         confirm`), take it back (`bridge-agent revert`), or wait"
    )]
    OnTrial(u64),
    /// The port pool is not as it should be.
    #[error(transparent)]
    Pool(#[from] pool::run::StartError),
    /// The cluster cannot be followed.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::Error),
    /// The API could not be served.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// Something that the loop itself needs.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// Runs until SIGTERM or SIGINT. What enforces goes on enforcing after that.
///
/// # Errors
///
/// Whatever kept it from starting. What was in force before is still in force.
pub fn run(options: &Options) -> Result<(), Error> {
    share_heaps();
    raise_descriptors();
    let pins = Pins::new(&options.pin_root);
    let takes_over = pins.exist_of_any_version() && !pins.exist();
    capabilities::give_up(takes_over).map_err(io_error("cannot give up capabilities that are not needed"))?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(io_error("cannot start the runtime"))?
        .block_on(Agent::run(options))
}

/// How often the status is brought up to date with what the watch of the iptables rules has seen, and programs of others
/// are looked for, of which the kernel does not tell.
const LOOK: Duration = Duration::from_millis(500);

struct Agent {
    path: PathBuf,
    /// Where the agent keeps what outlives it, but not a reboot.
    state: PathBuf,
    pins: Pins,
    /// Of the configuration file when it was last brought into force.
    in_force: Option<Hash>,
    /// Of the configuration file, if the agent itself has just written it.
    written: Option<Hash>,
    trial: Option<Trial>,
    /// As it was at the start: it takes no other effect later.
    api: Api,
    enforcer: Option<Enforcer>,
    filter: Option<PacketFilter>,
    routing: Routing,
    pool: PortPool,
    /// The cluster, if it is followed.
    cluster: Option<Following>,
    events: Option<EventReader>,
    shared: Shared,
}

/// Where changes come from.
struct Sources {
    interfaces: Watch,
    file: FileWatch,
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    requests: mpsc::Receiver<Request>,
}

impl Agent {
    async fn run(options: &Options) -> Result<(), Error> {
        let signal = |kind| signal(kind).map_err(io_error("cannot listen for signals"));
        let (hangup, terminate, interrupt) = (
            signal(SignalKind::hangup())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        // Watched before they are read: nothing is missed in between.
        let interfaces = Watch::open().map_err(io_error("cannot watch the interfaces"))?;
        let file =
            FileWatch::open(&options.config).map_err(io_error("cannot watch the configuration file"))?;
        let known = file::hash(&options.config);
        let mut config = load(&options.config)?;
        let (shared, requests) = Shared::new(first_status(&options.config, &config));
        let socket = options.socket.clone().unwrap_or_else(|| config.api.socket.0.clone());
        let state = socket.parent().unwrap_or(Path::new("/")).to_owned();
        let mut agent = Self {
            path: options.config.clone(),
            state,
            pins: Pins::new(&options.pin_root),
            in_force: None,
            written: None,
            trial: None,
            api: config.api.clone(),
            enforcer: None,
            filter: None,
            routing: Routing::default(),
            pool: PortPool::new(port_pool::places(&options.pin_root, &socket), shared.clone()),
            cluster: None,
            events: None,
            shared: shared.clone(),
        };
        // What can fail without a trace comes first.
        let api = api::Server::bind(&socket, &config.api)?;
        let on_trial = match Trial::resume(Files::new(&agent.path, &agent.state), &agent.pins) {
            Some((trial, candidate)) => {
                tracing::warn!(left = ?trial.left(), "going on with a configuration on trial");
                config = candidate;
                agent.in_force = Some(trial.former());
                let before = Arc::clone(&trial.before);
                agent.begin_trial(trial);
                Some(before)
            }
            None => {
                agent.in_force = known;
                None
            }
        };
        let left = agent.trial.as_ref().map_or(Duration::ZERO, Trial::left);
        let term = on_trial.as_ref().map_or(Term::Good, |before| Term::Rest(before, left));
        agent.change_file(&config, term, Self::start_engines)?;
        agent.note_deadline();
        drop(on_trial);
        // With many rules it takes much memory, and is not needed again.
        drop(config);
        trim_memory();
        let api = api.start(shared)?;
        notify(&[NotifyState::Ready]);
        tracing::info!(config = %agent.path.display(), socket = %socket.display(), "ready");

        agent.serve(Sources { interfaces, file, hangup, terminate, interrupt, requests }).await?;
        // With nobody there who could confirm it, it can only end one way: in both engines at once.
        agent.end_trial(Outcome::Stopped);

        notify(&[NotifyState::Stopping]);
        drop(api);
        tracing::info!("stopped; what enforces goes on enforcing, and routes stay");
        Ok(())
    }

    async fn serve(&mut self, mut from: Sources) -> Result<(), Error> {
        let mut look = tokio::time::interval(LOOK);
        loop {
            let selection =
                self.enforcer.as_ref().map(|enforcer| enforcer.selection().clone()).unwrap_or_default();
            // What an earlier policy has judged is not compared with the rules of now.
            let generation = self.enforcer.as_ref().map_or(0, Enforcer::generation);
            if let Some(written) = self.written.take() {
                from.file.expect(written);
            }
            let end_of_trial = self.trial.as_ref().map(Trial::wake);
            tokio::select! {
                biased;
                _ = from.terminate.recv() => return Ok(()),
                _ = from.interrupt.recv() => return Ok(()),
                changed = from.interfaces.changed(&selection), if self.enforcer.is_some() => {
                    changed.map_err(io_error("cannot watch the interfaces"))?;
                    self.interfaces_changed();
                }
                () = tokio::time::sleep_until(end_of_trial.unwrap_or_else(tokio::time::Instant::now)),
                    if end_of_trial.is_some() => self.end_trial(Outcome::Expired),
                _ = from.hangup.recv() => {
                    from.file.take_note();
                    drop(self.reload("SIGHUP"));
                }
                changed = from.file.changed() => {
                    changed.map_err(io_error("cannot watch the configuration file"))?;
                    drop(self.reload("the file has changed"));
                }
                _ = look.tick(), if self.filter.is_some() || self.enforcer.is_some() => self.look(),
                // When the time of a trial is over, what was before it comes first.
                () = cluster::changed(self.cluster.as_mut()),
                    if self.trial.as_ref().is_none_or(|trial| !trial.left().is_zero()) => self.cluster_changed(),
                Some(request) = from.requests.recv() => match request {
                    // That the client is gone changes nothing.
                    Request::Reload(answer) => drop(answer.send(self.reload("asked to"))),
                    Request::Apply(order, answer) => drop(answer.send(self.apply(&order))),
                    Request::Confirm(answer) => drop(answer.send(self.confirm(Outcome::Confirmed))),
                    Request::Revert(answer) => drop(answer.send(self.revert())),
                    Request::ProbesAnswered => {
                        if let Err(error) = self.confirm(Outcome::ConfirmedByProbes) {
                            tracing::error!(%error, "every probe has answered, and the trial cannot be confirmed");
                        }
                    }
                },
                read = read_events(self.events.as_mut(), &self.shared, self.filter.as_ref(), generation) => {
                    if let Err(error) = read {
                        tracing::error!(%error, "events can no longer be read");
                        self.events = None;
                    }
                }
            }
        }
    }

    /// Brings everything to `config`; what packets need, `engines` does. Nothing is changed if that fails.
    fn change(
        &mut self,
        config: &Config,
        engines: impl FnOnce(&mut Self, &Config) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let routes = self.routing.prepare(config, &self.shared.happenings)?;
        let before = self.pool.prepare(config)?;
        if let Err(error) = engines(self, config) {
            self.pool.undo(before);
            return Err(error);
        }
        self.pool.settle(config);
        let warnings = port_ranges::look(config);
        self.shared.update(|status| status.warnings = warnings);
        self.routing.commit(routes);
        self.shared.set_routes(self.routing.view());
        Ok(())
    }

    /// Brings every engine up. A start that fails leaves nothing that was not there before.
    fn start_engines(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        if wants_ebpf(config) && self.pins.root().exists() {
            // Another agent that works here is not to lose its iptables rules before that shows.
            drop(self.pins.lock().map_err(enforcer::Error::from)?);
        }
        if packet_filter::is_wanted(config) {
            self.filter = Some(PacketFilter::start(config, term.on_trial())?);
        }
        let enforcing_before = self.pins.exist_of_any_version();
        let result = self.bring_up(config, term);
        if result.is_err()
            && !enforcing_before
            && let Some(filter) = self.filter.take()
        {
            filter.take_down();
        }
        self.compare(true);
        result
    }

    /// Begins, or ends, to compare the engines, if there are two.
    fn compare(&mut self, begin: bool) {
        if let Some(filter) = &mut self.filter {
            filter.compare(begin && self.enforcer.is_some());
        }
    }

    fn report_divergence(&mut self) {
        if let Some(filter) = &mut self.filter {
            filter.report(self.enforcer.as_ref().map(|enforcer| &**enforcer.maps()));
        }
    }

    /// Starts to enforce, if that is wanted, or takes enforcement down that is no longer wanted.
    fn bring_up(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        if wants_ebpf(config) {
            let enforcer = Enforcer::start(&self.pins, config, term)?;
            self.shared.set_maps(Some(Arc::clone(enforcer.maps())));
            match EventReader::new(enforcer.maps()) {
                Ok(events) => self.events = Some(events),
                Err(error) => tracing::warn!(%error, "events cannot be read"),
            }
            self.enforcer = Some(enforcer);
        } else if self.pins.exist_of_any_version() {
            let (_, result) = datapath::down(&self.pins);
            result.map_err(enforcer::Error::from)?;
            tracing::info!("removed the eBPF enforcement of an earlier configuration");
        }
        self.show_enforcement();
        Ok(())
    }

    fn show_enforcement(&self) {
        let enforcement = self.enforcer.as_ref().map(Enforcer::status);
        let firewall = self.filter.as_ref().map(PacketFilter::status);
        self.shared.update(|status| {
            status.enforcement = enforcement;
            status.firewall = firewall;
        });
    }

    /// Looks at what the kernel tells nobody of.
    fn look(&mut self) {
        self.report_divergence();
        if let Some(enforcer) = &mut self.enforcer {
            enforcer.look();
        }
        self.show_enforcement();
    }

    fn interfaces_changed(&mut self) {
        if let Some(enforcer) = &mut self.enforcer {
            if let Err(error) = enforcer.interfaces_changed() {
                tracing::error!(%error, "cannot follow a change of the interfaces");
            }
            self.show_enforcement();
        }
    }

    /// Brings the configuration file into force. A bad one changes nothing.
    fn reload(&mut self, why: &str) -> Result<(), String> {
        notify_reloading();
        tracing::info!(why, "reloading");
        self.compare(false);
        let result = self.try_reload().map_err(|error| error.to_string());
        self.compare(true);
        if let Err(error) = &result {
            tracing::error!("reload failed, the configuration before it is still in force: {error}");
        }
        let error = result.as_ref().err().cloned();
        self.show_enforcement();
        self.shared.update(|status| {
            let reloads = &mut status.reloads;
            *if error.is_none() { &mut reloads.succeeded } else { &mut reloads.failed } += 1;
            reloads.last = Some(Reload { time: status::wall_clock(), error });
        });
        trim_memory();
        notify(&[NotifyState::Ready]);
        result
    }

    fn try_reload(&mut self) -> Result<(), Error> {
        if let Some(trial) = &self.trial {
            return Err(Error::OnTrial(trial.status().seconds_left));
        }
        let known = file::hash(&self.path);
        let config = load(&self.path)?;
        if config.api != self.api {
            tracing::warn!("a change of `api` takes effect when the agent is started anew");
        }
        self.change_file(&config, Term::Good, Self::reload_engines)?;
        self.in_force = known;
        Ok(())
    }

    /// Brings another configuration into force. Nothing is changed if that fails.
    fn reload_engines(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        let on_trial = term.on_trial();
        // iptables first: what it refuses it refuses whole, and can be taken back.
        let before = self.filter.as_ref().map(PacketFilter::in_force);
        match (&mut self.filter, packet_filter::is_wanted(config)) {
            (Some(filter), true) => filter.reload(config, on_trial)?,
            (filter @ None, true) => *filter = Some(PacketFilter::start(config, on_trial)?),
            (_, false) => {}
        }
        crate::fault::point("reload:iptables");
        if let Err(error) = self.reload_ebpf(config, term) {
            match (before, self.filter.take()) {
                (Some(before), Some(mut filter)) => {
                    filter.restore(before);
                    self.filter = Some(filter);
                }
                (None, Some(filter)) => filter.take_down(),
                (_, None) => {}
            }
            return Err(error);
        }
        if !packet_filter::is_wanted(config)
            && let Some(filter) = self.filter.take()
        {
            filter.take_down();
        }
        Ok(())
    }

    fn reload_ebpf(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        match (self.enforcer.take(), wants_ebpf(config)) {
            (Some(mut enforcer), true) => {
                let result = enforcer.reload(config, term);
                self.enforcer = Some(enforcer);
                result?;
            }
            (Some(enforcer), false) => {
                self.events = None;
                self.shared.set_maps(None);
                enforcer.take_down(&self.pins)?;
            }
            (None, _) => self.bring_up(config, Term::Good)?,
        }
        Ok(())
    }
}

/// Waits for events and hands them on; for ever, if there is nothing to read from.
async fn read_events(
    events: Option<&mut EventReader>,
    shared: &Shared,
    filter: Option<&PacketFilter>,
    generation: u32,
) -> io::Result<()> {
    match (events, shared.maps()) {
        (Some(events), Some(maps)) => {
            events
                .read(&maps, |verdict| {
                    if let Some(filter) = filter.filter(|_| verdict.generation == generation) {
                        filter.judged_by_ebpf(&verdict);
                    }
                    // Nobody listening is no error.
                    drop(shared.verdicts.send(Arc::new(verdict)));
                })
                .await
        }
        _ => std::future::pending().await,
    }
}

fn wants_ebpf(config: &Config) -> bool {
    config.role == Role::Node && config.enforcement.engines.contains(&Engine::Ebpf)
}

fn load(path: &Path) -> Result<Config, ConfigErrors> {
    let Loaded { config, warnings } = config::load(path)?;
    for warning in &warnings.list {
        let line = warning.place.as_ref().map(|place| place.line);
        tracing::warn!(line, path = warning.path, help = warning.help, "{}", warning.message);
    }
    Ok(config)
}

fn first_status(path: &Path, config: &Config) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        abi_version: bridge_common::ABI_VERSION,
        pid: std::process::id(),
        started: status::wall_clock(),
        config: path.to_owned(),
        role: match config.role {
            Role::Node => "node",
            Role::Host => "host",
        }
        .to_owned(),
        enforcement: None,
        firewall: None,
        routes: None,
        pool: None,
        warnings: Vec::new(),
        kubernetes: None,
        flows: None,
        suppressed_events: None,
        reloads: Reloads::default(),
        trial: None,
        last_trial: None,
    }
}

/// Tells the service manager, if there is one.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the service manager cannot be told"),
    }
}

/// Of the many threads that live for a moment only, each would leave a heap behind, eight for each CPU, which keeps what
/// nobody needs any more. To be called before there is a second thread.
fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers, and sets how many there may be.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// There is a descriptor for each link, two or three for each pod, and 1024 would be too few of them. To be called before
/// anything is open.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of descriptors stays what it is");
    }
}

/// Gives memory back that was needed for a moment only: for compiling, a first sync of many routes, an answer with many
/// rules.
pub(crate) fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; gives free pages of the heap back.
    unsafe {
        libc::malloc_trim(0);
    }
}
