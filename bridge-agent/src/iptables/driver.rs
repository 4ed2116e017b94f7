//! The driver: the pure parts put together with the programs.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher as _};
use std::path::{Path, PathBuf};

use super::backend;
use super::edit::{self, Fingerprints};
use super::error::Error;
use super::kernel::{self, Nft};
use super::observe::{ObservedTable, OwnRules, parse};
use super::plan::{self, Restore};
use super::programs::{Backend, Programs};
use super::render::{self, Options};
use super::ruleset::{Family, Ruleset, Table, TableRules};
use super::{apply, save};
use crate::firewall::{Firewall, Hits, Remains};
use crate::model::{Policy, Topology};

/// How the driver works.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Settings of the rules beside the policy.
    pub options: Options,
    /// Where programs are and how long they may wait.
    pub programs: Programs,
    /// The back end that the operator wants; `None`: the one that is in use.
    pub backend: Option<Backend>,
    /// Whether and where rules are saved.
    pub saving: save::Saving,
}

/// iptables and ip6tables on one back end.
#[derive(Debug)]
pub struct Iptables {
    config: Config,
    choice: backend::Choice,
    /// The rules read back right after the last apply.
    written: BTreeMap<(Family, Table), OwnRules>,
    /// The same, as they were rendered.
    rendered: BTreeMap<(Family, Table), Fingerprints>,
    /// The tables at a generation of nf_tables: as long as that stays, they need not be read.
    seen: Option<Seen>,
}

/// Tables at a generation of nf_tables.
#[derive(Debug)]
struct Seen {
    generation: u32,
    /// Without the rules of own chains.
    tables: BTreeMap<(Family, Table), ObservedTable>,
}

/// See [`Firewall::Observed`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Of the back end in use.
    pub tables: BTreeMap<(Family, Table), ObservedTable>,
    /// Of the other one: bridge's rules there are from before it was changed.
    pub other: BTreeMap<(Family, Table), ObservedTable>,
}

/// See [`Firewall::Plan`]. Each part is one table, all or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// For the back end in use.
    pub restores: Vec<Restore>,
    /// For the other one, afterwards: removes the rules of bridge.
    pub removals: Vec<Restore>,
}

impl Iptables {
    /// Chooses a back end.
    ///
    /// # Errors
    /// If iptables is not installed.
    pub fn new(config: Config) -> Result<Self, Error> {
        let choice = backend::choose(&config.programs, config.backend)?;
        if let Some(warning) = &choice.warning {
            tracing::warn!("{warning}");
        }
        Ok(Self::of(config, choice))
    }

    /// Returns another one of the same back end, which has written nothing yet.
    #[must_use]
    pub fn reader(&self) -> Self {
        Self::of(self.config.clone(), self.choice.clone())
    }

    const fn of(config: Config, choice: backend::Choice) -> Self {
        Self { config, choice, written: BTreeMap::new(), rendered: BTreeMap::new(), seen: None }
    }

    /// Returns the back end in use, with a warning for the operator, if there is one.
    #[must_use]
    pub const fn choice(&self) -> &backend::Choice {
        &self.choice
    }

    pub(super) const fn backend(&self) -> Backend {
        self.choice.backend
    }

    pub(super) const fn topology(&self) -> &Topology {
        &self.config.options.topology
    }

    pub(super) fn set_topology(&mut self, topology: Topology) {
        self.config.options.topology = topology;
    }

    pub(super) fn set_saving(&mut self, enabled: bool) {
        self.config.saving.enabled = enabled;
    }

    /// The rules read back right after the last apply.
    pub(super) const fn written(&self) -> &BTreeMap<(Family, Table), OwnRules> {
        &self.written
    }

    /// Reads the rules of the back end in use.
    ///
    /// # Errors
    /// If the kernel's rules cannot be read.
    pub(super) fn read_back(&self) -> Result<BTreeMap<(Family, Table), ObservedTable>, Error> {
        self.read_all(self.backend())
    }

    /// Returns a number that stays the same as long as no rule of bridge denies a packet, and all are those that were there
    /// before; `None` if it takes as long to get as the rules themselves.
    pub(super) fn denied(&self) -> Option<u64> {
        if self.backend() != Backend::Nft {
            return None;
        }
        let mut nft = Nft::open().ok()?;
        let mut hasher = DefaultHasher::new();
        for family in Family::ALL {
            for table in Table::ALL {
                nft.denied(family, table, &mut hasher).ok()?;
            }
        }
        Some(hasher.finish())
    }

    fn rulesets(&self, policy: &Policy) -> [Ruleset; 2] {
        Family::ALL.map(|family| render::ruleset(policy, &self.config.options, family))
    }

    fn read(&self, backend: Backend, family: Family, table: Table) -> Result<ObservedTable, Error> {
        // Without the program nothing was ever written; with it, asking it for a table may make the table.
        self.config.programs.tool(family, backend, "-save")?;
        let exists = match backend {
            Backend::Legacy => kernel::legacy_tables(family).iter().any(|name| name == table.name()),
            Backend::Nft => {
                Nft::open().and_then(|mut nft| nft.has_table(family, table)).map_err(|source| {
                    if source.kind() == std::io::ErrorKind::PermissionDenied {
                        return Error::NotPermitted { program: "nf_tables".into() };
                    }
                    Error::Kernel { request: format!("look for {family} table {table}"), source }
                })?
            }
        };
        if !exists {
            return Ok(ObservedTable::default());
        }
        let text = apply::save(&self.config.programs, backend, family, table)?;
        Ok(parse(&text).remove(table.name()).unwrap_or_default())
    }

    /// Reads both families, side by side; IPv6 as far as the host has it.
    fn read_all(&self, backend: Backend) -> Result<BTreeMap<(Family, Table), ObservedTable>, Error> {
        let of = |family| {
            let mut tables = Vec::new();
            for table in Table::ALL {
                match self.read(backend, family, table) {
                    Ok(observed) => tables.push(((family, table), observed)),
                    // A host without IPv6 has no use for ip6tables. If the policy needs it, applying the policy fails.
                    Err(error) if family == Family::V6 && self.may_be_missing(backend, family, &error) => {
                        tracing::debug!(%error, "no ip6tables");
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(tables)
        };
        let [v4, v6] = side_by_side(Family::ALL, of);
        Ok(v4?.into_iter().chain(v6?).collect())
    }

    /// Puts back the chains and jumps that were found changed, and leaves the others alone, with their counters: with
    /// 10,000 rules, writing all of them takes most of the time there is.
    ///
    /// # Errors
    /// Those of [`Firewall::apply`] and [`Firewall::verify`].
    pub(super) fn repair(&mut self, policy: &Policy, changed: &Observed) -> Result<(), Error> {
        let mut plan = self.plan(policy, changed);
        plan.restores.retain(|restore| changed.tables.contains_key(&(restore.family, restore.table)));
        for restore in &mut plan.restores {
            let key = (restore.family, restore.table);
            if let (Some(written), Some(now)) = (self.written.get(&key), changed.tables.get(&key)) {
                restore.leave_out(&written.same_chains(&now.own()));
            }
        }
        self.apply(&plan)?;
        let rulesets = self.rulesets(policy);
        self.seen = None;
        for (family, table) in changed.tables.keys() {
            let there = self.read(self.backend(), *family, *table)?;
            let wanted = rulesets.iter().find(|r| r.family == *family).and_then(|r| r.table(*table));
            self.accept(*family, *table, wanted, &there)?;
        }
        Ok(())
    }

    /// Returns whether the rules were read back at this generation of nf_tables and are as wanted.
    pub(super) fn is_verified_at(&self, generation: u32) -> bool {
        self.seen.as_ref().is_some_and(|seen| seen.generation == generation)
    }

    /// Returns the generation of nf_tables; `None` with the other back end, which has none.
    fn generation(&self) -> Option<u32> {
        let asked = || Nft::open().and_then(|mut nft| nft.generation()).ok();
        (self.backend() == Backend::Nft).then(asked).flatten()
    }

    /// Writes the difference to the rules in the kernel, and reads back the tables that were written.
    fn write(&mut self, rulesets: &[Ruleset; 2], reduced: bool) -> Result<(), Error> {
        let before = self.generation();
        let known = self.seen.take().filter(|seen| Some(seen.generation) == before);
        let (observed, known) = match known {
            Some(seen) => (Observed { tables: seen.tables, other: BTreeMap::new() }, true),
            None => (self.observe()?, false),
        };
        let mut plan = plan_of(rulesets, &observed);
        if reduced {
            plan.restores.retain_mut(|restore| {
                let key = (restore.family, restore.table);
                let Some(wanted) = wanted_of(rulesets, key) else { return true };
                let rendered = self.rendered.get(&key).cloned().unwrap_or_default();
                let as_written = |name: &str| {
                    known
                        || observed
                            .tables
                            .get(&key)
                            .zip(self.written.get(&key))
                            .is_some_and(|(there, written)| written.has_chain(name, there))
                };
                let rendered = rendered.into_iter().filter(|(name, _)| as_written(name)).collect();
                restore.reduce(wanted, &rendered)
            });
        }
        // What is written next is unknown until it has been read back.
        let written: BTreeSet<_> =
            plan.restores.iter().map(|restore| (restore.family, restore.table)).collect();
        written.iter().for_each(|key| drop(self.rendered.remove(key)));
        self.apply(&plan)?;
        let generation = self.generation();
        // Another program may have written meanwhile: then nothing is known of any table.
        let commits = u32::try_from(plan.restores.len()).ok();
        let alone = known
            && plan.removals.is_empty()
            && before.zip(commits).map(|(before, commits)| before.wrapping_add(commits)) == generation;
        if alone {
            let mut tables = observed.tables;
            let read = side_by_side(Family::ALL, |family| {
                let of_family = written.iter().filter(|(of, _)| *of == family);
                let read = of_family.map(|key| Ok((*key, self.read(self.backend(), key.0, key.1)?)));
                read.collect::<Result<Vec<_>, Error>>()
            });
            for there in read {
                for (key, there) in there? {
                    self.accept(key.0, key.1, wanted_of(rulesets, key), &there)?;
                    tables.insert(key, there.without_own_rules());
                }
            }
            self.seen = generation.map(|generation| Seen { generation, tables });
            return Ok(());
        }
        self.accept_all(rulesets, generation)
    }

    /// Reads back all tables. `generation`: of nf_tables, before.
    fn accept_all(&mut self, rulesets: &[Ruleset; 2], generation: Option<u32>) -> Result<(), Error> {
        let mut observed = self.read_all(self.backend())?;
        let absent = ObservedTable::default();
        for ruleset in rulesets {
            for table in Table::ALL {
                let there = observed.get(&(ruleset.family, table)).unwrap_or(&absent);
                self.accept(ruleset.family, table, ruleset.table(table), there)?;
            }
        }
        observed.values_mut().for_each(|there| *there = std::mem::take(there).without_own_rules());
        self.seen = generation.map(|generation| Seen { generation, tables: observed });
        Ok(())
    }

    /// Keeps the rules as read back, to compare later states with, if they are as wanted.
    fn accept(
        &mut self,
        family: Family,
        table: Table,
        wanted: Option<&TableRules>,
        there: &ObservedTable,
    ) -> Result<(), Error> {
        if let Some(found) = there.mismatch(table, wanted) {
            return Err(Error::NotAsWritten { family, found });
        }
        self.written.insert((family, table), there.own());
        self.rendered.insert((family, table), wanted.map(edit::fingerprints).unwrap_or_default());
        Ok(())
    }

    /// Whether rules that cannot be read need not be looked for.
    fn may_be_missing(&self, backend: Backend, family: Family, error: &Error) -> bool {
        backend != self.backend()
            || matches!(error, Error::ProgramMissing { .. })
            || (family == Family::V6 && !Path::new("/proc/thread-self/net/if_inet6").exists())
    }

    /// Deletes a table that bridge made, if it is as empty as it was made.
    fn remove_table(&self, family: Family, table: Table) -> Result<bool, Error> {
        /// Other programs that write anything to nf_tables between the look and the removal end a try.
        const TRIES: usize = 20;
        let failed = |source| Error::Kernel { request: format!("remove {family} table {table}"), source };
        let mut nft = Nft::open().map_err(failed)?;
        for _ in 0..TRIES {
            let generation = nft.generation().map_err(failed)?;
            if !self.read(Backend::Nft, family, table)?.is_pristine() {
                return Ok(false);
            }
            match nft.delete_table(family, table, generation) {
                Ok(()) => return Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::ERESTART) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(false)
    }

    /// Applies one part of a plan; returns a note if a table that bridge made and no longer needs remains.
    fn restore(&self, backend: Backend, restore: &Restore) -> Result<Option<String>, Error> {
        apply::restore(&self.config.programs, backend, restore)?;
        let Restore { family, table, last, .. } = *restore;
        Ok(match backend {
            _ if !last => None,
            Backend::Legacy => Some(format!(
                "{family} table {table} of iptables-legacy was not there before and stays, empty: \
                 it goes with its kernel module (iptable_{table}, ip6table_{table}) or at the next boot"
            )),
            Backend::Nft if self.remove_table(family, table)? => None,
            Backend::Nft => Some(format!(
                "{family} table {table} was not there before and stays: other programs use it now"
            )),
        })
    }
}

/// Runs `work` for two families at the same time: most of it is waiting for programs.
fn side_by_side<T: Send>([one, other]: [Family; 2], work: impl Fn(Family) -> T + Sync) -> [T; 2] {
    std::thread::scope(|scope| {
        let second = scope.spawn(|| work(other));
        let first = work(one);
        [first, second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))]
    })
}

fn wanted_of(rulesets: &[Ruleset], (family, table): (Family, Table)) -> Option<&TableRules> {
    rulesets.iter().find(|ruleset| ruleset.family == family).and_then(|ruleset| ruleset.table(table))
}

/// Plans the change from the observed rules to the wanted ones.
fn plan_of(rulesets: &[Ruleset; 2], observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let absent = ObservedTable::default();
    for ruleset in rulesets {
        for table in Table::ALL {
            let there = observed.tables.get(&(ruleset.family, table)).unwrap_or(&absent);
            plan.restores.extend(plan::restore(ruleset.family, table, ruleset.table(table), there));
        }
    }
    for ((family, table), there) in &observed.other {
        plan.removals.extend(plan::restore(*family, *table, None, there));
    }
    plan
}

impl Firewall for Iptables {
    type Error = Error;
    type Observed = Observed;
    type Plan = Plan;

    fn observe(&self) -> Result<Observed, Error> {
        let other = self.read_all(self.backend().other()).unwrap_or_else(|error| {
            tracing::debug!(%error, "the other back end is not there");
            BTreeMap::new()
        });
        Ok(Observed { tables: self.read_all(self.backend())?, other })
    }

    fn plan(&self, policy: &Policy, observed: &Observed) -> Plan {
        plan_of(&self.rulesets(policy), observed)
    }

    fn apply(&mut self, plan: &Plan) -> Result<(), Error> {
        let restores = plan.restores.iter().map(|restore| (self.backend(), restore));
        let removals = plan.removals.iter().map(|removal| (self.backend().other(), removal));
        for (backend, restore) in restores.chain(removals) {
            crate::fault::point("iptables:restore");
            if let Some(remains) = self.restore(backend, restore)? {
                tracing::info!("{remains}");
            }
        }
        Ok(())
    }

    fn verify(&mut self, policy: &Policy) -> Result<(), Error> {
        let generation = self.generation();
        self.accept_all(&self.rulesets(policy), generation)
    }

    fn converge(&mut self, policy: &Policy) -> Result<(), Error> {
        const TIMES: u32 = 3;
        let rulesets = self.rulesets(policy);
        let mut reduced = true;
        let mut more = 1..TIMES;
        loop {
            let result = self.write(&rulesets, reduced);
            match result {
                Err(Error::NotAsWritten { .. }) if more.next().is_some() => {}
                // An edit may have met a chain that another program changed in the same moment.
                Err(Error::Refused { .. } | Error::Failed { .. }) if reduced => {}
                result => return result,
            }
            reduced = false;
        }
    }

    fn drift(&self) -> Result<Option<(String, Observed)>, Error> {
        let mut drift = None;
        let mut tables = BTreeMap::new();
        for (key, written) in &self.written {
            let (family, table) = *key;
            if *written == OwnRules::default() {
                continue;
            }
            let now = self.read(self.backend(), family, table)?;
            if let Some(drifted) = written.drift(table, &now.own()) {
                drift.get_or_insert_with(|| format!("{family} {drifted}"));
                tables.insert(*key, now);
            }
        }
        Ok(drift.map(|drift| (drift, Observed { tables, other: BTreeMap::new() })))
    }

    fn save(&self, policy: &Policy) -> Result<Vec<PathBuf>, Error> {
        // Rendering takes time that is spent in vain where nothing is saved.
        if self.config.saving.places().is_empty() {
            return Ok(Vec::new());
        }
        self.config.saving.save(&self.rulesets(policy))
    }

    fn hits(&self) -> Result<BTreeMap<String, Hits>, Error> {
        let mut hits: BTreeMap<String, Hits> = BTreeMap::new();
        for table in self.read_all(self.backend())?.values() {
            for (name, of) in table.hits() {
                *hits.entry(name).or_default() += of;
            }
        }
        Ok(hits)
    }

    fn present(&self) -> Result<Option<String>, Error> {
        let Observed { tables, other } = self.observe()?;
        let rules: usize = tables.values().chain(other.values()).map(|table| table.own().rules()).sum();
        Ok((rules > 0).then(|| format!("{rules} rules in iptables")))
    }

    fn teardown(&mut self) -> Remains<Error> {
        let mut remains = Remains::default();
        for backend in [self.backend(), self.backend().other()] {
            for (family, table) in Family::ALL.into_iter().flat_map(|f| Table::ALL.map(|table| (f, table))) {
                crate::fault::point("iptables:teardown");
                match self.read(backend, family, table) {
                    Ok(observed) => {
                        let removal = plan::restore(family, table, None, &observed);
                        match removal.map(|removal| self.restore(backend, &removal)) {
                            Some(Ok(note)) => remains.notes.extend(note),
                            Some(Err(error)) => remains.errors.push(error),
                            None => {}
                        }
                    }
                    // Where the program, its back end or IPv6 is missing, nothing was ever written.
                    Err(error) if self.may_be_missing(backend, family, &error) => {
                        tracing::debug!(%error, "nothing to remove");
                    }
                    Err(error) => remains.errors.push(error),
                }
            }
        }
        if let Err(error) = self.config.saving.remove() {
            remains.errors.push(error);
        }
        self.written.clear();
        self.rendered.clear();
        self.seen = None;
        remains
    }
}
