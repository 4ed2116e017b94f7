//! A configuration on trial: active until a deadline, and for good only if it is confirmed by then.
//!
//! The kernel side goes back by itself ([`crate::datapath::Datapath::publish`]). The state here lets the agent make
//! everything else follow, also if it is killed and restarted meanwhile:
//! ```text
//! <state>/trial.json          the deadline, and the state that a trial in progress must match
//! <state>/trial-former.yaml   the configuration that is gone back to
//! <config>.candidate          the one on trial, beside the file whose place it takes when it is confirmed
//! ```
//! `<state>` lasts as long as the kernel does; after a reboot the configuration file is the former one.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::{
    config::{self, Config, ConfigErrors, Loaded},
    datapath::{self, Maps, Pins},
    kernel::{
        backoff::Backoff,
        file_watch::{Hash, hash_of},
        files::{self, MAX_CONFIGURATION, MAX_SMALL, Ownership},
        state_directory::StateDirectory,
    },
    state::{Probe, ProbeStatus, TrialStatus, WriteError, time_left},
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// `CLOCK_MONOTONIC` means something in one boot only.
    boot: String,
    /// In milliseconds of `CLOCK_MONOTONIC`.
    deadline: u64,
    /// Whether the kernel has the same deadline.
    in_kernel: bool,
    /// Of the configuration on trial.
    candidate: Hash,
    /// Of the file when the trial began.
    former: Hash,
    probes: Vec<Probe>,
}

/// A trial that is going on.
#[derive(Debug)]
pub(super) struct Trial {
    pub(super) files: Files,
    pub(super) record: Record,
    /// The configuration that is gone back to.
    pub(super) before: Arc<Config>,
    /// Probes being made.
    pub(super) task: Option<JoinHandle<()>>,
    /// Time of the next attempt to restore the former configuration.
    pub(super) again: Option<tokio::time::Instant>,
    /// The record could not be written.
    pub(super) unwritten: Backoff,
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Record {
    pub(super) fn new(
        time: Duration,
        in_kernel: Option<u64>,
        candidate: &str,
        former: Hash,
        probes: Vec<Probe>,
    ) -> Self {
        let own = datapath::now() / 1_000_000 + u64::try_from(time.as_millis()).unwrap_or(u64::MAX >> 16);
        Self {
            boot: boot(),
            deadline: in_kernel.unwrap_or(own),
            in_kernel: in_kernel.is_some(),
            candidate: hash_of(candidate.as_bytes()),
            former,
            probes,
        }
    }

    /// Returns whether the trial is in progress, according to `maps` too.
    fn goes_on(&self, maps: Option<&Maps>) -> bool {
        let in_kernel = maps.and_then(|maps| maps.trial().ok().flatten()).map(|trial| trial.deadline);
        self.boot == boot()
            && !time_left(self.deadline).is_zero()
            && in_kernel == self.in_kernel.then_some(self.deadline)
    }
}

impl Trial {
    pub(super) fn new(files: Files, record: Record, before: Config) -> Self {
        Self {
            files,
            record,
            before: Arc::new(before),
            task: None,
            again: None,
            unwritten: Backoff::default(),
        }
    }

    /// Takes over the deadline that the kernel keeps, if it does. Returns whether the record has to be written.
    pub(super) fn takes_note_of(&mut self, in_kernel: Option<u64>) -> bool {
        // Its time may be over there just now.
        let Some(deadline) = in_kernel else { return false };
        let known = (self.record.in_kernel, self.record.deadline) == (true, deadline);
        (self.record.in_kernel, self.record.deadline) = (true, deadline);
        !known
    }

    /// Writes the record; tried again later if that fails.
    pub(super) fn write_record(&mut self) {
        let written = self.files.write(&self.record);
        self.unwritten.note(written.is_ok());
        if let Err(error) = written {
            tracing::warn!(%error, "an agent that is killed and restarted now rolls the trial back; the agent tries again");
        }
    }

    pub(super) fn left(&self) -> Duration {
        time_left(self.record.deadline)
    }

    /// When it has to be looked after again.
    pub(super) fn wake(&self) -> tokio::time::Instant {
        self.again.unwrap_or_else(|| tokio::time::Instant::now() + self.left())
    }

    pub(super) fn probes(&self) -> &[Probe] {
        &self.record.probes
    }

    /// Whether the kernel keeps the deadline.
    pub(super) const fn in_kernel(&self) -> bool {
        self.record.in_kernel
    }

    /// Hash of the configuration on trial.
    pub(super) const fn candidate(&self) -> Hash {
        self.record.candidate
    }

    /// Hash of the file when the trial began.
    pub(super) const fn former(&self) -> Hash {
        self.record.former
    }

    pub(super) fn status(&self) -> TrialStatus {
        let probe = |probe: &Probe| ProbeStatus { target: probe.to_string(), answered: false, error: None };
        let Record { deadline, in_kernel, probes, .. } = &self.record;
        TrialStatus::new(*deadline, *in_kernel, probes.iter().map(probe).collect())
    }

    /// Returns the trial that an earlier agent has begun, with the configuration on trial; if there is none, or it has
    /// ended, its leftovers are removed.
    pub(super) fn resume(files: Files, pins: &Pins) -> Option<(Self, Config)> {
        let record = match files.read() {
            Ok(Some(record)) => record,
            Ok(None) => {
                files.clear();
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, path = %files.record.display(), "a trial cannot be gone on with");
                files.clear();
                return None;
            }
        };
        let resumed = record.goes_on(Maps::open(pins).ok().as_ref()).then(|| {
            let candidate = files::read_regular_text(&files.candidate, MAX_CONFIGURATION)?;
            if hash_of(candidate.as_bytes()) != record.candidate {
                return Err(io::Error::other("the configuration on trial is another one by now"));
            }
            let parse = |text: &str, path: &Path| config::parse(text, Some(path)).map_err(io::Error::other);
            let candidate = parse(&candidate, &files.candidate)?.config;
            Ok((candidate, files.former().map_err(io::Error::other)?))
        });
        match resumed {
            Some(Ok((candidate, former))) => Some((Self::new(files, record, former), candidate)),
            Some(Err(error)) => {
                tracing::warn!(%error, "a trial is given up");
                files.clear();
                None
            }
            None => {
                tracing::warn!(
                    "a configuration on trial was not confirmed in time, or not known to be on trial: \
                     the configuration file counts"
                );
                files.clear();
                None
            }
        }
    }
}

/// Where a trial is kept.
#[derive(Clone, Debug)]
pub(super) struct Files {
    config: PathBuf,
    candidate: PathBuf,
    record: PathBuf,
    former: PathBuf,
}

impl Files {
    /// Returns the files for the configuration file `config`, or the target of that link.
    pub(super) fn new(config: &Path, state: &Path) -> Self {
        let config = config.canonicalize().unwrap_or_else(|_| config.to_owned());
        let mut candidate = config.as_os_str().to_owned();
        candidate.push(".candidate");
        Self {
            candidate: candidate.into(),
            record: state.join("trial.json"),
            former: state.join("trial-former.yaml"),
            config,
        }
    }

    /// The configuration file itself.
    pub(super) fn config(&self) -> &Path {
        &self.config
    }

    /// Writes a configuration beside the file that it will replace: every step that can fail, fails now.
    pub(super) fn stage(&self, text: &str) -> Result<(), WriteError> {
        let like = fs::metadata(&self.config).ok();
        let ownership = like.as_ref().map_or(Ownership::Private, Ownership::Like);
        files::replace(&self.candidate, ownership, text.as_bytes()).map_err(WriteError::at(&self.candidate))
    }

    /// Puts the staged configuration in the place of the file.
    pub(super) fn commit(&self) -> Result<(), WriteError> {
        fs::rename(&self.candidate, &self.config).map_err(WriteError::at(&self.config))?;
        if let Some(directory) = self.config.parent() {
            files::sync_directory(directory);
        }
        Ok(())
    }

    /// Keeps the present content of the configuration file, which has this hash.
    pub(super) fn keep_former(&self, known: Hash) -> Result<bool, WriteError> {
        let text =
            files::read_regular(&self.config, MAX_CONFIGURATION).map_err(WriteError::at(&self.config))?;
        if hash_of(&text) != known {
            return Ok(false);
        }
        files::replace(&self.former, Ownership::Private, &text).map_err(WriteError::at(&self.former))?;
        Ok(true)
    }

    /// The configuration that is gone back to.
    pub(super) fn former(&self) -> Result<Config, ConfigErrors> {
        config::load_regular(&self.former).map(|Loaded { config, .. }| config)
    }

    pub(super) fn write(&self, record: &Record) -> Result<(), WriteError> {
        let text = serde_json::to_vec(record).map_err(io::Error::other);
        text.and_then(|text| files::replace(&self.record, Ownership::Private, &text))
            .map_err(WriteError::at(&self.record))
    }

    fn read(&self) -> io::Result<Option<Record>> {
        match files::read_regular(&self.record, MAX_SMALL) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the files of a trial, the record first: without it there is none.
    pub(super) fn clear(&self) {
        for path in [&self.record, &self.candidate, &self.former] {
            match fs::remove_file(path) {
                // On a read-only file system (a ConfigMap is one) the removal even of a missing file fails.
                Err(error) if error.kind() != io::ErrorKind::NotFound && path.exists() => {
                    tracing::warn!(%error, path = %path.display(), "left behind after a trial");
                }
                _ => {}
            }
        }
    }
}

/// Returns the identity of this boot (random(4)).
fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Removes what there is of a trial: the agent is down, and so is what it would go back from.
pub(crate) fn forget(config: &Path, state: &StateDirectory) {
    Files::new(config, &state.boot()).clear();
}
