//! The running agent: applies the configuration and keeps the kernel in that state.
//!
//! One thread handles one event at a time, from the kernel, the operator and the cluster. The API has a thread of its own
//! ([`crate::api`]), so that no client waits for this one.

mod apply;
mod cluster;
mod denial_log;
mod desired;
mod divergence;
mod enforcer;
mod error;
mod fast_path;
mod following;
mod handover;
mod named;
mod packet_filter;
mod packet_path;
mod port_pool;
mod port_ranges;
mod probe;
mod routing;
mod seed;
mod service_manager;
mod sweeper;
mod term;
mod transaction;
pub(crate) mod trial;
mod unknown_cluster;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

pub use desired::Error as EnforcerError;
pub use error::Error;
pub use packet_filter::{Kind as PacketFilterKind, nftables_settings, settings as firewall_settings};
pub(crate) use port_pool::places as pool_places;
pub(crate) use trial::forget as forget_trial;

use self::{
    denial_log::DenialLog,
    enforcer::Enforcer,
    following::Following,
    packet_filter::{Filters, PacketFilter},
    packet_path::PacketPath,
    port_pool::PortPool,
    routing::Routing,
    term::Term,
    transaction::Next,
    trial::{Files, Trial},
};
use crate::{
    config::{self, Api, Config, ConfigErrors, Loaded, Role},
    datapath::{EventReader, Pins},
    interfaces::Watch,
    kernel::{
        clock,
        file_watch::{self, FileWatch, Hash},
        memory,
        state_directory::StateDirectory,
    },
    state::{Reload, ReloadError, Reloads, Request, Shared, Status, TrialOutcome},
};

/// Options of `bridge-agent run`.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// The unix socket, if not that of the configuration.
    pub socket: Option<PathBuf>,
    /// Where maps and links are pinned.
    pub pin_root: PathBuf,
    /// State across restarts.
    pub state: StateDirectory,
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}

/// Interval at which the status takes over the state of the iptables watch, and at which programs of others are looked
/// for, about which the kernel sends no notification.
const LOOK: Duration = Duration::from_millis(500);

/// The agent: [`open`](Self::open), then [`start`](Self::start), then [`run`](Self::run).
pub struct Agent {
    /// The configuration file.
    file: PathBuf,
    socket: PathBuf,
    state: StateDirectory,
    pins: Pins,
    /// Hash of the configuration file when it was last applied.
    in_force: Option<Hash>,
    /// Of the configuration file, if the agent itself has just written it.
    written: Option<Hash>,
    trial: Option<Trial>,
    /// As it was at the start: it takes no other effect later.
    api: Api,
    pool: PortPool,
    filters: Filters,
    path: PacketPath,
    routing: Routing,
    /// The cluster, if it is followed.
    cluster: Option<Following>,
    /// The system log, if denied packets go there.
    denials: Option<DenialLog>,
    shared: Shared,
    /// The configuration to start with.
    first: Option<Config>,
    sources: Option<Sources>,
}

/// Sources of events.
struct Sources {
    interfaces: Watch,
    file: FileWatch,
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    requests: mpsc::Receiver<Request>,
}

impl Agent {
    /// Reads the configuration and watches for changes; changes nothing. Call it inside a tokio runtime with one thread.
    ///
    /// # Errors
    /// The configuration is not valid, or a source of events is not available.
    pub fn open(options: &Options) -> Result<Self, Error> {
        let signal = |kind| signal(kind).map_err(io_error("cannot listen for signals"));
        let (hangup, terminate, interrupt) = (
            signal(SignalKind::hangup())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        // Watched before they are read, so that no change in between is missed.
        let interfaces = Watch::open().map_err(io_error("cannot watch the interfaces"))?;
        let file =
            FileWatch::follow(&options.config).map_err(io_error("cannot find the configuration file"))?;
        let known = file_watch::hash(&options.config);
        let config = load(&options.config)?;
        let (shared, requests) = Shared::new(first_status(&options.config, &config));
        let socket = options.socket.clone().unwrap_or_else(|| config.api.socket.0.clone());
        let (pins, boot) = (Pins::new(&options.pin_root), options.state.boot());
        Ok(Self {
            file: options.config.clone(),
            state: options.state.clone(),
            pins: pins.clone(),
            in_force: known,
            written: None,
            trial: None,
            api: config.api.clone(),
            pool: PortPool::new(port_pool::places(&options.pin_root, &options.state), shared.clone()),
            filters: Filters::new(pins.clone()),
            path: PacketPath::new(pins, boot.clone(), shared.clone()),
            routing: Routing::new(boot, shared.route_events.clone()),
            cluster: None,
            denials: None,
            shared,
            socket,
            first: Some(config),
            sources: Some(Sources { interfaces, file, hangup, terminate, interrupt, requests }),
        })
    }

    /// The state that API servers read.
    #[must_use]
    pub fn shared(&self) -> Shared {
        self.shared.clone()
    }

    /// Path of the API's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The section `api` of the configuration.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Applies the configuration, or resumes a trial that an earlier run began.
    ///
    /// # Errors
    /// A part of the configuration cannot be applied. The former state of the kernel is still active.
    pub fn start(&mut self) -> Result<(), Error> {
        let Some(mut config) = self.first.take() else { return Ok(()) };
        self.state.prepare()?;
        self.pool.take_over(&self.socket);
        let on_trial = Trial::resume(Files::new(&self.file, &self.state.boot()), &self.pins).map(
            |(trial, candidate)| {
                tracing::warn!(left = ?trial.left(), "the agent resumes a trial");
                config = candidate;
                self.in_force = Some(trial.former());
                let before = Arc::clone(&trial.before);
                self.begin_trial(trial);
                before
            },
        );
        let left = self.trial.as_ref().map_or(Duration::ZERO, Trial::left);
        let term = on_trial.as_ref().map_or(Term::Good, |before| Term::Rest(before, left));
        self.change_file(&config, term)?;
        self.compare(true);
        self.show_enforcement();
        self.note_deadline();
        // With many rules the configuration takes much memory, and is not needed again.
        drop((config, on_trial));
        memory::trim();
        Ok(())
    }

    /// Follows all sources of events until SIGTERM or SIGINT. Enforcement and routes stay afterwards.
    ///
    /// # Errors
    /// A source of events fails.
    pub async fn run(&mut self) -> Result<(), Error> {
        let Some(sources) = self.sources.take() else { return Ok(()) };
        service_manager::ready();
        tracing::info!(config = %self.file.display(), socket = %self.socket.display(), "ready");
        self.serve(sources).await?;
        // No client can confirm it any more: both engines roll back together.
        self.end_trial(TrialOutcome::Stopped);
        service_manager::stopping();
        Ok(())
    }

    /// Whether no configuration is active yet.
    pub(super) const fn is_starting(&self) -> bool {
        self.sources.is_some()
    }

    async fn serve(&mut self, mut from: Sources) -> Result<(), Error> {
        let mut look = tokio::time::interval(LOOK);
        loop {
            let unknown = self.unknown_cluster();
            let selection = unknown.clone().unwrap_or_else(|| {
                self.path.enforcer.as_ref().map(|enforcer| enforcer.selection().clone()).unwrap_or_default()
            });
            let bridges = self.path.enforcer.as_ref().map(Enforcer::bridges).unwrap_or_default();
            // Packets judged by an earlier policy are not compared with the present rules.
            let generation = self.path.enforcer.as_ref().map_or(0, Enforcer::generation);
            if let Some(written) = self.written.take() {
                from.file.expect(written);
            }
            let end_of_trial = self.trial.as_ref().map(Trial::wake);
            tokio::select! {
                biased;
                _ = from.terminate.recv() => return Ok(()),
                _ = from.interrupt.recv() => return Ok(()),
                changed = from.interfaces.changed(&selection, &bridges), if self.path.enforcer.is_some() || unknown.is_some() => {
                    if let Err(error) = changed {
                        tracing::error!(%error, "cannot watch the interfaces; the agent tries again");
                        tokio::time::sleep(LOOK).await;
                        from.interfaces = Watch::open().unwrap_or(from.interfaces);
                    }
                    self.interfaces_changed();
                }
                () = tokio::time::sleep_until(end_of_trial.unwrap_or_else(tokio::time::Instant::now)),
                    if end_of_trial.is_some() => self.end_trial(TrialOutcome::Expired),
                _ = from.hangup.recv() => {
                    from.file.take_note();
                    drop(self.reload("SIGHUP"));
                }
                content = from.file.changed() => {
                    let path = self.file.clone();
                    let known = content.as_ref().ok().map(|content| file_watch::hash_of(content));
                    drop(self.reload_from("the file has changed", || {
                        Ok((warn(config::load_content(content, &path)?), known))
                    }));
                }
                _ = look.tick() => self.look(),
                // When the time of a trial is over, the former configuration comes first.
                () = following::changed(self.cluster.as_mut()),
                    if self.trial.as_ref().is_none_or(|trial| !trial.left().is_zero()) => self.cluster_changed(),
                Some(request) = from.requests.recv() => match request {
                    // That the client is gone changes nothing.
                    Request::Reload(answer) => drop(answer.send(self.reload("asked to"))),
                    Request::Apply(request, answer) => drop(answer.send(self.apply(&request))),
                    Request::Confirm(answer) => drop(answer.send(self.confirm(TrialOutcome::Confirmed))),
                    Request::Revert(answer) => drop(answer.send(self.revert())),
                    Request::ProbesAnswered => {
                        if let Err(error) = self.confirm(TrialOutcome::ConfirmedByProbes) {
                            tracing::error!(%error, "every probe has answered, and the trial cannot be confirmed");
                        }
                    }
                },
                read = read_events(self.path.events.as_mut(), &self.shared, self.filters.active.as_ref(), self.denials.as_mut(), generation) => {
                    if let Err(error) = read {
                        tracing::error!(%error, "events can no longer be read; the agent tries again");
                        self.path.close_events();
                    }
                }
            }
        }
    }

    /// Applies `config` for the lifetime `term`. Nothing is changed if that fails.
    fn change(&mut self, config: &Config, term: Term<'_>) -> Result<(), Error> {
        let start = Instant::now();
        let Self { pool, filters, path, routing, .. } = self;
        // The packet path last: the packet filter refuses a change as a whole.
        transaction::apply([pool, filters, path, routing], Next { config, term })?;
        let warnings = port_ranges::look(config);
        self.shared.update(|status| status.warnings = warnings);
        self.shared.set_names(&config.names);
        self.shared.set_routes(self.routing.view());
        self.denials = DenialLog::following(self.denials.take(), config.enforcement.syslog.as_ref());
        self.shared.apply_time.observe(start.elapsed().as_secs_f64());
        Ok(())
    }

    /// Begins, or ends, to compare the engines, if there are two.
    fn compare(&mut self, begin: bool) {
        if let Some(filter) = &mut self.filters.active {
            filter.compare(begin && self.path.enforcer.is_some());
        }
    }

    /// Begins to compare the engines, if there are two, after the present event.
    fn compare_soon(&mut self) {
        if let Some(filter) = self.filters.active.as_mut().filter(|_| self.path.enforcer.is_some()) {
            filter.compare_soon();
        }
    }

    fn report_divergence(&mut self) {
        if let Some(filter) = &mut self.filters.active {
            filter.report(self.path.enforcer.as_ref().map(|enforcer| &**enforcer.maps()));
        }
    }

    fn show_enforcement(&self) {
        let enforcement = self.path.enforcer.as_ref().map(Enforcer::status);
        let firewall = self.filters.active.as_ref().map(PacketFilter::status);
        match (&self.path.enforcer, &self.filters.active) {
            (Some(enforcer), _) => self.shared.set_active(Some(enforcer.active()), None),
            (None, Some(filter)) => self.shared.set_active(Some(filter.active()), Some(filter.counts())),
            (None, None) => self.shared.set_active(None, None),
        }
        self.shared.update(|status| {
            status.enforcement = enforcement;
            status.firewall = firewall;
        });
    }

    /// Polls for changes that the kernel sends no notification for.
    fn look(&mut self) {
        self.report_divergence();
        self.filters.try_again();
        self.routing.try_again();
        self.pool.try_again();
        self.write_record();
        self.path.check();
        self.show_enforcement();
    }

    fn interfaces_changed(&mut self) {
        if self.unknown_cluster().is_some() {
            self.cluster_changed();
        }
        if let Some(enforcer) = &mut self.path.enforcer {
            if let Err(error) = enforcer.interfaces_changed() {
                tracing::error!(%error, "cannot follow a change of the interfaces");
            }
            self.show_enforcement();
        }
    }

    /// Applies the configuration file again. An invalid one changes nothing.
    fn reload(&mut self, why: &str) -> Result<(), ReloadError> {
        let path = self.file.clone();
        self.reload_from(why, || {
            let known = file_watch::hash(&path);
            Ok((load(&path)?, known))
        })
    }

    fn reload_from(
        &mut self,
        why: &str,
        read: impl FnOnce() -> Result<(Config, Option<Hash>), ConfigErrors>,
    ) -> Result<(), ReloadError> {
        service_manager::reloading();
        tracing::info!(why, "the agent reloads its configuration");
        self.compare(false);
        let result = self.try_reload(read);
        self.compare(true);
        let error = result.as_ref().err().map(ToString::to_string);
        if let Some(error) = &error {
            tracing::error!(error, "the reload failed; the former configuration is still active");
        }
        self.show_enforcement();
        self.shared.update(|status| {
            let reloads = &mut status.reloads;
            *if error.is_none() { &mut reloads.succeeded } else { &mut reloads.failed } += 1;
            reloads.last = Some(Reload { time: clock::wall_clock(), error });
        });
        memory::trim();
        service_manager::ready();
        result
    }

    fn try_reload(
        &mut self,
        read: impl FnOnce() -> Result<(Config, Option<Hash>), ConfigErrors>,
    ) -> Result<(), ReloadError> {
        if let Some(trial) = &self.trial {
            return Err(ReloadError::OnTrial(trial.status().seconds_left));
        }
        let (config, known) = read()?;
        if config.api != self.api {
            tracing::warn!("a change of `api` takes effect when the agent starts again");
        }
        let applied = self.change_file(&config, Term::Good);
        applied.map_err(|error| ReloadError::Refused(error.into()))?;
        self.in_force = known;
        Ok(())
    }
}

/// Waits for events and hands them on; for ever, if there is nothing to read from.
async fn read_events(
    events: Option<&mut EventReader>,
    shared: &Shared,
    filter: Option<&PacketFilter>,
    mut denials: Option<&mut DenialLog>,
    generation: u32,
) -> io::Result<()> {
    match (events, shared.maps()) {
        (Some(events), Some(maps)) => {
            events
                .read(&maps, |verdict| {
                    if let Some(filter) = filter.filter(|_| verdict.generation == generation) {
                        filter.judged_by_ebpf(&verdict);
                    }
                    if let Some(denials) = &mut denials {
                        denials.note(&verdict);
                    }
                    shared.publish_verdict(verdict);
                })
                .await
        }
        _ => std::future::pending().await,
    }
}

fn load(path: &Path) -> Result<Config, ConfigErrors> {
    config::load_regular(path).map(warn)
}

/// Logs the warnings of a configuration.
fn warn(Loaded { config, warnings }: Loaded) -> Config {
    for warning in &warnings.list {
        let line = warning.place.as_ref().map(|place| place.line);
        tracing::warn!(line, path = warning.path, help = warning.help, "{}", warning.message);
    }
    config
}

fn first_status(path: &Path, config: &Config) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        abi_version: bridge_common::ABI_VERSION,
        pid: std::process::id(),
        started: clock::wall_clock(),
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
