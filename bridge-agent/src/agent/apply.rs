//! `apply`, `confirm` and `revert`: the agent applies a configuration, which becomes the configuration file; on trial,
//! only when it is confirmed.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    Agent, Error,
    enforcer::Enforcer,
    following, packet_path, probe,
    term::Term,
    trial::{Files, Record, Trial},
};
use crate::{
    config::{self, Config, Engine, Loaded},
    datapath,
    kernel::{
        clock,
        file_watch::{Hash, hash, hash_of},
        memory,
    },
    state::{Applied, ApplyError, ApplyRequest, Request, TrialEnd, TrialOutcome},
};

/// Time after which a failed roll-back at the end of a trial is tried again.
const AGAIN: Duration = Duration::from_secs(1);

impl Agent {
    pub(super) fn apply(&mut self, request: &ApplyRequest) -> Result<Applied, ApplyError> {
        if let Some(trial) = &self.trial {
            return Err(ApplyError::OnTrial(trial.status().seconds_left));
        }
        let Loaded { config, warnings } = config::parse(&request.config, Some(&self.file))?;
        let warnings = warnings.list.iter().map(|warning| warning.message.clone()).collect();
        let files = self.files();
        files.stage(&request.config)?;
        let result = match request.confirm {
            None => self.apply_for_good(&files, request, &config),
            Some(trial) => self.apply_on_trial(&files, request, &config, trial),
        };
        self.show_enforcement();
        memory::trim();
        if let Err(error) = result {
            tracing::error!(%error, "a configuration was not applied");
            if self.trial.is_none() {
                files.clear();
            }
            return Err(error);
        }
        let deadline = self.trial.as_ref().map(|trial| clock::at(SystemTime::now() + trial.left()));
        tracing::info!(until = deadline, "a configuration was applied");
        Ok(Applied { generation: self.path.enforcer.as_ref().map(Enforcer::generation), deadline, warnings })
    }

    fn apply_for_good(
        &mut self,
        files: &Files,
        request: &ApplyRequest,
        config: &Config,
    ) -> Result<(), ApplyError> {
        self.bring_into_force(config, None)?;
        if let Err(error) = files.commit() {
            // The next start would apply the file, so it is applied now.
            drop(self.reload("an applied configuration could not take its place"));
            return Err(error.into());
        }
        self.note_file(hash_of(request.config.as_bytes()));
        Ok(())
    }

    fn apply_on_trial(
        &mut self,
        files: &Files,
        request: &ApplyRequest,
        config: &Config,
        trial: Duration,
    ) -> Result<(), ApplyError> {
        let not_in_force = || ApplyError::FileNotActive(files.config().to_owned());
        let former = self.in_force.ok_or_else(not_in_force)?;
        if !files.keep_former(former)? {
            return Err(not_in_force());
        }
        let before = files.former()?;
        if config.role != before.role {
            return Err(ApplyError::NoWayBack("role"));
        }
        let engines = |config: &Config| {
            let filter = config.enforcement.engines.iter().copied().find(|engine| *engine != Engine::Ebpf);
            (packet_path::is_wanted(config), filter)
        };
        if engines(config) != engines(&before) {
            return Err(ApplyError::NoWayBack("enforcement.engines"));
        }
        if config.kubernetes != before.kubernetes {
            return Err(ApplyError::NoWayBack("kubernetes"));
        }
        crate::fault::point("trial:staged");
        self.bring_into_force(config, Some(trial))?;
        crate::fault::point("trial:in-force");
        let record =
            Record::new(trial, self.kernel_deadline(), &request.config, former, request.probes.clone());
        // Without it, an agent that is killed and restarted now rolls back at once.
        if let Err(error) = files.write(&record) {
            self.trial = Some(Trial::new(files.clone(), record, before));
            self.end_trial(TrialOutcome::Reverted);
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
                let status_of = shared.clone();
                probe::all_answer(probes, move |index, answer| {
                    status_of.update(|status| {
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
    pub(super) fn confirm(&mut self, outcome: TrialOutcome) -> Result<Applied, ApplyError> {
        let Some(trial) = &self.trial else { return Err(ApplyError::NoTrial) };
        let (files, candidate, in_kernel) = (trial.files.clone(), trial.candidate(), trial.in_kernel());
        if trial.left().is_zero() {
            self.end_trial(TrialOutcome::Expired);
            return Err(ApplyError::NoTrial);
        }
        if hash(files.config()) != Some(trial.former()) {
            return Err(ApplyError::FileChanged(files.config().to_owned()));
        }
        // In the kernel first: it may be too late there.
        let control = match &mut self.path.enforcer {
            Some(enforcer) if in_kernel => {
                Some(enforcer.confirm().map_err(|error| ApplyError::Kernel(error.into()))?)
            }
            _ => None,
        };
        crate::fault::point("trial:confirmed");
        if let Err(error) = files.commit() {
            if let (Some(enforcer), Some(control)) = (&mut self.path.enforcer, control) {
                enforcer.unconfirm(control);
            }
            return Err(error.into());
        }
        crate::fault::point("trial:committed");
        files.clear();
        self.trial = None;
        self.note_file(candidate);
        if let Some(enforcer) = &mut self.path.enforcer {
            enforcer.end_trial();
        }
        self.save_rules(&files);
        self.show_end(outcome);
        tracing::info!(?outcome, "the configuration on trial is the one that counts now");
        let generation = self.path.enforcer.as_ref().map(Enforcer::generation);
        Ok(Applied { generation, deadline: None, warnings: Vec::new() })
    }

    /// The iptables rules of a policy on trial are not saved for the boot; now they are.
    fn save_rules(&mut self, files: &Files) {
        let Some(filter) = &mut self.filters.active else { return };
        let saved = config::load_regular(files.config()).map_err(Error::from).and_then(|loaded| {
            Ok(filter.reload(&following::with(self.cluster.as_ref(), loaded.config), false)?)
        });
        if let Err(error) = saved {
            tracing::error!(%error, "the iptables rules were not saved for the next boot");
        }
    }

    /// Rolls back to the former configuration.
    pub(super) fn revert(&mut self) -> Result<Applied, ApplyError> {
        if self.trial.is_none() {
            return Err(ApplyError::NoTrial);
        }
        self.end_trial(TrialOutcome::Reverted);
        if self.trial.is_some() {
            let failure = self.shared.status().trial.and_then(|trial| trial.failure);
            return Err(ApplyError::NotReverted(failure.unwrap_or_default()));
        }
        let generation = self.path.enforcer.as_ref().map(Enforcer::generation);
        Ok(Applied { generation, deadline: None, warnings: Vec::new() })
    }

    /// Rolls back to the former configuration, in every part; tried again later if that fails.
    pub(super) fn end_trial(&mut self, outcome: TrialOutcome) {
        let Some(trial) = &self.trial else { return };
        let files = trial.files.clone();
        if let Some(enforcer) = &mut self.path.enforcer {
            enforcer.fall_back();
        }
        let result = files.former().map_err(Error::from).and_then(|former| {
            self.compare(false);
            let result = self.change_file(&former, Term::Good);
            self.compare(true);
            result
        });
        if let Err(error) = result {
            tracing::error!(%error, "cannot restore the whole configuration from before the trial");
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
        memory::trim();
        tracing::warn!(?outcome, "restored the configuration from before the trial");
        if hash(&self.file).is_some_and(|now| Some(now) != self.in_force) {
            drop(self.reload("the file has changed during the trial"));
        }
    }

    fn show_end(&self, outcome: TrialOutcome) {
        self.shared.update(|status| {
            status.trial = None;
            status.last_trial = Some(TrialEnd::now(outcome));
        });
    }

    fn bring_into_force(&mut self, config: &Config, trial: Option<Duration>) -> Result<(), ApplyError> {
        if config.api != self.api {
            tracing::warn!("a change of `api` takes effect when the agent is restarted");
        }
        self.compare(false);
        let result = self.change_file(config, trial.map_or(Term::Good, Term::Trial));
        self.compare(true);
        result.map_err(|error| ApplyError::Refused(error.into()))
    }

    /// The deadline of a policy on trial in the kernel.
    fn kernel_deadline(&self) -> Option<u64> {
        let maps = Arc::clone(self.path.enforcer.as_ref()?.maps());
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
        trial.write_record();
        self.shared.update(|shown| {
            if let Some(trial) = &mut shown.trial {
                trial.in_kernel = status.in_kernel;
            }
        });
    }

    /// Writes the record of the trial, if that failed and it is time for another attempt.
    pub(super) fn write_record(&mut self) {
        if let Some(trial) = self.trial.as_mut().filter(|trial| trial.unwritten.is_due()) {
            trial.write_record();
        }
    }

    fn files(&self) -> Files {
        Files::new(&self.file, &self.state.boot())
    }

    /// The agent itself has written the configuration file, and has applied it.
    fn note_file(&mut self, written: Hash) {
        self.in_force = Some(written);
        self.written = Some(written);
    }
}
