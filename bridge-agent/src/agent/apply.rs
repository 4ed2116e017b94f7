//! `apply`, `confirm` and `revert`: a configuration is brought into force by the agent and becomes the configuration
//! file; on trial, it becomes that only when it is confirmed.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::{
    Agent, Error, cluster,
    enforcer::{Enforcer, Term},
    file::{Hash, hash, hash_of},
    probe::{self, Probe},
    status::{self, Request},
    trial::{Files, Outcome, Record, Trial, TrialEnd, WriteError},
};
use crate::{
    config::{self, Config, ConfigErrors, Loaded},
    datapath,
};

/// A trial lasts so long at the least.
pub const SHORTEST_TRIAL: Duration = Duration::from_secs(1);
/// And so long at the most.
pub const LONGEST_TRIAL: Duration = Duration::from_secs(24 * 3600);
/// So many probes.
pub const MOST_PROBES: usize = 16;
/// What could not be put back at the end of a trial is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// What is to be brought into force.
#[derive(Clone, Debug)]
pub struct Order {
    /// The text of a configuration.
    pub config: String,
    /// Only for so long, unless it is confirmed.
    pub confirm: Option<Duration>,
    /// Who has to answer for it to be confirmed by itself.
    pub probes: Vec<Probe>,
}

/// What has been brought into force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// Number of the policy in force, if eBPF enforces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
    /// When the configuration of before comes back, unless this one is confirmed; RFC 3339, UTC. Left out: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// What is allowed in the configuration, but hardly meant.
    pub warnings: Vec<String>,
}

/// Why a configuration was not applied, confirmed or taken back.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// It is not valid.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// It could not be brought into force; the one before it is.
    #[error("the configuration before it is still in force: {0}")]
    Refused(#[source] Error),
    /// The kernel side could not confirm it.
    #[error(transparent)]
    Datapath(#[from] super::enforcer::Error),
    /// Another one is on trial.
    #[error(
        "a configuration is on trial for {0} s more: confirm it (`bridge-agent confirm`), take it back (`bridge-agent \
         revert`), or wait"
    )]
    OnTrial(u64),
    /// None is on trial.
    #[error(
        "no configuration waits for its confirmation: its time may be over (see `bridge-agent status`); apply it again"
    )]
    NoTrial,
    /// What was before could not be put back.
    #[error(
        "the configuration before the trial is not wholly in force again yet, which is tried until it is (see \
         `bridge-agent status`): {0}"
    )]
    NotTakenBack(String),
    /// There is nothing sure to go back to.
    #[error(
        "{} is not what is in force, as the last reload has failed or has not been done yet: correct it first, so that \
         there is something to go back to, or apply without --confirm", .0.display()
    )]
    NotInForce(PathBuf),
    /// It would take something away that nobody could give back with the agent dead.
    #[error(
        "{0} differs from what is in force, and the kernel cannot go back on that by itself: apply it without --confirm"
    )]
    NoWayBack(&'static str),
    /// Somebody has written the file while another configuration was on trial.
    #[error(
        "{} was changed by somebody else during the trial: put it back, then confirm; or let the trial run out, and \
         apply again", .0.display()
    )]
    FileChanged(PathBuf),
    /// It cannot become the configuration file.
    #[error(
        "{0}; if this file is provided by something else (a ConfigMap, configuration management), change it there"
    )]
    Write(#[from] WriteError),
}

impl Agent {
    /// See the module.
    pub(super) fn apply(&mut self, order: &Order) -> Result<Applied, ApplyError> {
        if let Some(trial) = &self.trial {
            return Err(ApplyError::OnTrial(trial.status().seconds_left));
        }
        let Loaded { config, warnings } = config::parse(&order.config, Some(&self.path))?;
        let warnings = warnings.list.iter().map(|warning| warning.message.clone()).collect();
        let files = self.files();
        files.stage(&order.config)?;
        let result = match order.confirm {
            None => self.apply_for_good(&files, order, &config),
            Some(time) => self.apply_on_trial(&files, order, &config, time),
        };
        self.show_enforcement();
        super::trim_memory();
        if let Err(error) = result {
            tracing::error!(%error, "a configuration was not applied");
            if self.trial.is_none() {
                files.clear();
            }
            return Err(error);
        }
        let deadline = self.trial.as_ref().map(|trial| status::at(SystemTime::now() + trial.left()));
        tracing::info!(until = deadline, "a configuration was applied");
        Ok(Applied { generation: self.enforcer.as_ref().map(Enforcer::generation), deadline, warnings })
    }

    fn apply_for_good(&mut self, files: &Files, order: &Order, config: &Config) -> Result<(), ApplyError> {
        self.bring_into_force(config, None)?;
        if let Err(error) = files.commit() {
            // The next start would bring the file into force: so that is done now.
            drop(self.reload("an applied configuration could not take its place"));
            return Err(error.into());
        }
        self.note_file(hash_of(order.config.as_bytes()));
        Ok(())
    }

    fn apply_on_trial(
        &mut self,
        files: &Files,
        order: &Order,
        config: &Config,
        time: Duration,
    ) -> Result<(), ApplyError> {
        let not_in_force = || ApplyError::NotInForce(files.config().to_owned());
        let former = self.in_force.ok_or_else(not_in_force)?;
        if !files.keep_former(former)? {
            return Err(not_in_force());
        }
        let before = files.former()?;
        if config.role != before.role {
            return Err(ApplyError::NoWayBack("role"));
        }
        let engines = |config: &Config| (super::wants_ebpf(config), super::packet_filter::is_wanted(config));
        if engines(config) != engines(&before) {
            return Err(ApplyError::NoWayBack("enforcement.engines"));
        }
        if config.kubernetes != before.kubernetes {
            return Err(ApplyError::NoWayBack("kubernetes"));
        }
        crate::fault::point("trial:staged");
        self.bring_into_force(config, Some(time))?;
        crate::fault::point("trial:in-force");
        let record = Record::new(time, self.kernel_deadline(), &order.config, former, order.probes.clone());
        // Without it, an agent that is killed now and started anew goes back at once.
        if let Err(error) = files.write(&record) {
            self.trial = Some(Trial::new(files.clone(), record, before));
            self.end_trial(Outcome::Reverted);
            return Err(error.into());
        }
        self.begin_trial(Trial::new(files.clone(), record, before));
        Ok(())
    }

    /// Takes care of a trial from now on.
    pub(super) fn begin_trial(&mut self, mut trial: Trial) {
        let status = trial.status();
        self.shared.update(|shown| shown.trial = Some(status));
        if !trial.probes().is_empty() {
            let (shared, probes) = (self.shared.clone(), trial.probes().to_vec());
            trial.task = Some(tokio::spawn(async move {
                let tells = shared.clone();
                probe::all_answer(probes, move |index, answer| {
                    tells.update(|status| {
                        if let Some(probe) =
                            status.trial.as_mut().and_then(|trial| trial.probes.get_mut(index))
                        {
                            probe.answered = answer.is_ok();
                            probe.error = answer.as_ref().err().map(ToString::to_string);
                        }
                    });
                })
                .await;
                // That the agent stops is no error.
                drop(shared.requests.send(Request::ProbesAnswered).await);
            }));
        }
        self.trial = Some(trial);
    }

    /// Makes the configuration on trial the one that counts.
    pub(super) fn confirm(&mut self, outcome: Outcome) -> Result<Applied, ApplyError> {
        let Some(trial) = &self.trial else { return Err(ApplyError::NoTrial) };
        let (files, candidate, in_kernel) = (trial.files.clone(), trial.candidate(), trial.in_kernel());
        if trial.left().is_zero() {
            self.end_trial(Outcome::Expired);
            return Err(ApplyError::NoTrial);
        }
        if hash(files.config()) != Some(trial.former()) {
            return Err(ApplyError::FileChanged(files.config().to_owned()));
        }
        // In the kernel first: it may be too late there.
        let control = match &mut self.enforcer {
            Some(enforcer) if in_kernel => Some(enforcer.confirm()?),
            _ => None,
        };
        crate::fault::point("trial:confirmed");
        if let Err(error) = files.commit() {
            if let (Some(enforcer), Some(control)) = (&mut self.enforcer, control) {
                enforcer.reinstate(control);
            }
            return Err(error.into());
        }
        crate::fault::point("trial:committed");
        files.clear();
        self.trial = None;
        self.note_file(candidate);
        if let Some(enforcer) = &mut self.enforcer {
            enforcer.settle();
        }
        self.save_rules(&files);
        self.show_end(outcome);
        tracing::info!(?outcome, "the configuration on trial is the one that counts now");
        let generation = self.enforcer.as_ref().map(Enforcer::generation);
        Ok(Applied { generation, deadline: None, warnings: Vec::new() })
    }

    /// The iptables rules of a policy on trial are not saved for the boot; now they are.
    fn save_rules(&mut self, files: &Files) {
        let Some(filter) = &mut self.filter else { return };
        let saved = config::load(files.config()).map_err(Error::from).and_then(|loaded| {
            Ok(filter.reload(&cluster::with(self.cluster.as_ref(), loaded.config), false)?)
        });
        if let Err(error) = saved {
            tracing::error!(%error, "the iptables rules were not saved for the next boot");
        }
    }

    /// Goes back to what was before.
    pub(super) fn revert(&mut self) -> Result<Applied, ApplyError> {
        if self.trial.is_none() {
            return Err(ApplyError::NoTrial);
        }
        self.end_trial(Outcome::Reverted);
        if self.trial.is_some() {
            let failure = self.shared.status().trial.and_then(|trial| trial.failure);
            return Err(ApplyError::NotTakenBack(failure.unwrap_or_default()));
        }
        let generation = self.enforcer.as_ref().map(Enforcer::generation);
        Ok(Applied { generation, deadline: None, warnings: Vec::new() })
    }

    /// Goes back to what was before, in everything; tried again later if that fails.
    pub(super) fn end_trial(&mut self, outcome: Outcome) {
        let Some(trial) = &self.trial else { return };
        let files = trial.files.clone();
        if let Some(enforcer) = &mut self.enforcer {
            enforcer.fall_back();
        }
        let result = files.former().map_err(Error::from).and_then(|former| {
            self.compare(false);
            let result = self.change_file(&former, Term::Good, Self::reload_engines);
            self.compare(true);
            result
        });
        if let Err(error) = result {
            tracing::error!(%error, "the configuration before the trial is not wholly in force again");
            if let Some(trial) = &mut self.trial {
                trial.again = Some(tokio::time::Instant::now() + AGAIN);
            }
            self.shared.update(|status| {
                if let Some(trial) = &mut status.trial {
                    trial.failure = Some(error.to_string());
                }
            });
            return;
        }
        files.clear();
        self.trial = None;
        self.show_enforcement();
        self.show_end(outcome);
        super::trim_memory();
        tracing::warn!(?outcome, "the configuration before the trial is in force again");
        if hash(&self.path).is_some_and(|now| Some(now) != self.in_force) {
            drop(self.reload("the file has changed during the trial"));
        }
    }

    fn show_end(&self, outcome: Outcome) {
        self.shared.update(|status| {
            status.trial = None;
            status.last_trial = Some(TrialEnd::now(outcome));
        });
    }

    fn bring_into_force(&mut self, config: &Config, trial: Option<Duration>) -> Result<(), ApplyError> {
        if config.api != self.api {
            tracing::warn!("a change of `api` takes effect when the agent is started anew");
        }
        self.compare(false);
        let result = self.change_file(config, trial.map_or(Term::Good, Term::Trial), Self::reload_engines);
        self.compare(true);
        result.map_err(ApplyError::Refused)
    }

    /// The deadline of a policy on trial in the kernel.
    fn kernel_deadline(&self) -> Option<u64> {
        let maps = Arc::clone(self.enforcer.as_ref()?.maps());
        maps.trial().ok().flatten().map(|datapath::Trial { deadline, .. }| deadline)
    }

    /// Writes down whether the kernel keeps the deadline of the trial, if that is something else by now: with a change of the
    /// cluster or of addresses, policies become different that were the same.
    pub(super) fn note_deadline(&mut self) {
        let in_kernel = self.kernel_deadline();
        let Some(trial) = &mut self.trial else { return };
        if !trial.takes_note_of(in_kernel) {
            return;
        }
        let status = trial.status();
        if let Err(error) = trial.files.write(&trial.record) {
            tracing::warn!(%error, "an agent that is killed now and started anew takes the trial back");
        }
        self.shared.update(|shown| {
            if let Some(trial) = &mut shown.trial {
                trial.in_kernel = status.in_kernel;
            }
        });
    }

    fn files(&self) -> Files {
        Files::new(&self.path, &self.state)
    }

    /// The agent itself has written the configuration file, and this is in force.
    fn note_file(&mut self, written: Hash) {
        self.in_force = Some(written);
        self.written = Some(written);
    }
}
