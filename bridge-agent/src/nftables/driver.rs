//! The driver: the pure parts put together with nft.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::carry::{self, Carry};
use super::error::Error;
use super::programs::Programs;
use super::render::{self, Options};
use super::ruleset::Ruleset;
use super::{read, save, script};
use crate::firewall::{Firewall, Hits, Remains};
use crate::kernel::nftables::{Ruleset as Generation, Transaction};
use crate::model::{Policy, Topology};

/// How the driver works.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Settings of the rules beside the policy.
    pub options: Options,
    /// Where nft is.
    pub programs: Programs,
    /// Whether and where rules are saved.
    pub saving: save::Saving,
}

/// The table of bridge in nf_tables.
#[derive(Debug)]
pub struct Nftables {
    config: Config,
    /// The last rules that the kernel took.
    written: Option<Written>,
    /// The last transactions that it took, oldest first.
    transactions: VecDeque<Transaction>,
    /// The first generation that the last writing of the whole table may have had: what was changed before is no more.
    rewritten: Option<u32>,
}

/// Transactions whose notifications may still wait.
const RECENT: usize = 16;
/// Time from a write until the rules are read back.
const AT_LEISURE: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Written {
    rules: Ruleset,
    at: Instant,
    /// The generation of the kernel's ruleset right after, if no other program wrote at the same time.
    generation: Option<u32>,
    /// As read back; `None`: not read back yet.
    fingerprint: Option<Option<u64>>,
    /// The script that writes all of it, for a repair; made at leisure.
    whole: Option<String>,
}

/// See [`Firewall::Observed`]: a hash of the table, if there is one.
pub type Observed = Option<u64>;

/// See [`Firewall::Plan`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    rules: Ruleset,
    /// One transaction; empty if nothing changes.
    script: String,
}

impl Nftables {
    /// Looks for nft.
    ///
    /// # Errors
    /// If it is not installed.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.programs.nft()?;
        Ok(Self { config, written: None, transactions: VecDeque::new(), rewritten: None })
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

    /// Returns whether the rules were read back since they were written.
    pub(super) fn is_verified(&self) -> bool {
        self.written.as_ref().is_some_and(|written| written.fingerprint.is_some())
    }

    /// Whether the rules should be read back now: soon after they were written, if another program wrote at the same time.
    pub(super) fn is_due(&self) -> bool {
        self.written.as_ref().is_some_and(|written| {
            let due = written.generation.is_none() || written.at.elapsed() >= AT_LEISURE;
            due && written.fingerprint.is_none()
        })
    }

    /// Returns the last transactions of this driver, and the generation before which changes of the table do not matter.
    pub(super) fn transactions(&mut self) -> (&[Transaction], Option<u32>) {
        (self.transactions.make_contiguous(), self.rewritten)
    }

    /// Writes the whole table as it was written last, whatever stands there. The counters begin at zero if it was removed;
    /// returns whether they go on.
    pub(super) fn restore(&mut self, policy: &Policy, removed: bool) -> Result<bool, Error> {
        let Some(Written { rules, whole, .. }) = self.written.take() else {
            return self.rewrite(policy).map(|()| false);
        };
        let hits = if removed { BTreeMap::new() } else { self.counted() };
        let goes_on = !hits.is_empty();
        // The script that is kept has no counters: it is for a table that is gone.
        let script = whole.filter(|_| !goes_on);
        self.write_whole(rules, script, hits)?;
        Ok(goes_on)
    }

    fn write_whole(
        &mut self,
        rules: Ruleset,
        script: Option<String>,
        hits: BTreeMap<String, Hits>,
    ) -> Result<(), Error> {
        let plain = hits.is_empty();
        let script = script.unwrap_or_else(|| whole(&rules, hits));
        self.write(rules, &script)?;
        self.rewritten = self.transactions.back().map(|(first, _)| *first);
        if let Some(written) = self.written.as_mut().filter(|_| plain) {
            written.whole = Some(script);
        }
        Ok(())
    }

    /// Returns the hits of the table in the kernel, if there is one. Without them the rules hold as well.
    fn counted(&self) -> BTreeMap<String, Hits> {
        read::content(&self.config.programs).ok().flatten().unwrap_or_default().hits
    }

    fn write(&mut self, rules: Ruleset, script: &str) -> Result<(), Error> {
        if script.is_empty() {
            return Ok(());
        }
        crate::fault::point("nftables:apply");
        let before = generation()?;
        self.config.programs.apply(script)?;
        // One transaction counts as one.
        let (first, last) = (before.wrapping_add(1), generation()?);
        if self.transactions.len() == RECENT {
            self.transactions.pop_front();
        }
        self.transactions.push_back((first, last));
        let generation = (first == last).then_some(last);
        self.written =
            Some(Written { rules, at: Instant::now(), generation, fingerprint: None, whole: None });
        Ok(())
    }

    fn rules(&self, policy: &Policy) -> Ruleset {
        render::ruleset(policy, &self.config.options)
    }

    /// Writes the whole table, whatever stands there, with the counters of an earlier one.
    pub(super) fn rewrite(&mut self, policy: &Policy) -> Result<(), Error> {
        let (rules, hits) = (self.rules(policy), self.counted());
        self.write_whole(rules, None, hits)
    }

    /// Reads the hits of rules whose elements move. Without them the rules hold as well.
    fn carry(&self, from: &Ruleset, to: &Ruleset) -> Carry {
        let groups = carry::moved(from, to);
        if groups.is_empty() {
            return Carry::default();
        }
        match read::content(&self.config.programs) {
            Ok(content) => Carry::new(groups, &content.unwrap_or_default().groups),
            Err(error) => {
                tracing::debug!(%error, "the counters cannot be read");
                Carry::default()
            }
        }
    }

    /// Reads the counters that say why packets were denied, by `bridge:REASON`.
    pub(super) fn counters(&self) -> Result<BTreeMap<String, Hits>, Error> {
        Ok(read::counters(&self.config.programs)?.unwrap_or_default())
    }
}

fn whole(rules: &Ruleset, hits: BTreeMap<String, Hits>) -> String {
    if *rules == Ruleset::default() { script::removal() } else { script::full_with(rules, hits) }
}

fn generation() -> Result<u32, Error> {
    let asked = Generation::open().and_then(|mut ruleset| ruleset.generation());
    asked.map_err(|source| Error::Kernel { request: "ask nf_tables for its generation".into(), source })
}

impl Firewall for Nftables {
    type Error = Error;
    type Observed = Observed;
    type Plan = Plan;

    fn observe(&self) -> Result<Observed, Error> {
        read::fingerprint(&self.config.programs)
    }

    fn plan(&self, policy: &Policy, observed: &Observed) -> Plan {
        let rules = self.rules(policy);
        let script = match &self.written {
            Some(written) if written.fingerprint == Some(*observed) => script::change(&written.rules, &rules),
            _ => whole(&rules, BTreeMap::new()),
        };
        Plan { rules, script }
    }

    fn apply(&mut self, plan: &Plan) -> Result<(), Error> {
        self.write(plan.rules.clone(), &plan.script)
    }

    fn verify(&mut self, _policy: &Policy) -> Result<(), Error> {
        let Some(written) = &mut self.written else { return Ok(()) };
        let fingerprint = read::fingerprint(&self.config.programs)?;
        // Without another transaction since, the content is that of the own one.
        if written.generation.is_none_or(|own| generation().ok() != Some(own)) {
            let there = read::content(&self.config.programs)?.unwrap_or_default();
            let wanted = &written.rules;
            let sizes = (wanted.elements(), wanted.rules(), wanted.chains.len());
            if (there.elements, there.rules, there.chains) != sizes {
                return Err(Error::NotAsWritten {
                    found: format!(
                        "{} elements, {} rules and {} chains instead of {}, {} and {}",
                        there.elements, there.rules, there.chains, sizes.0, sizes.1, sizes.2
                    ),
                });
            }
        }
        written.fingerprint = Some(fingerprint);
        if written.whole.is_none() {
            written.whole = Some(whole(&written.rules, BTreeMap::new()));
        }
        Ok(())
    }

    fn drift(&self) -> Result<Option<(String, Observed)>, Error> {
        let Some(Written { fingerprint: Some(known), .. }) = &self.written else { return Ok(None) };
        let now = self.observe()?;
        let drift = match (known, now) {
            (known, now) if *known == now => return Ok(None),
            (_, None) => "was removed",
            _ => "was changed by another program",
        };
        Ok(Some((format!("table inet {} {drift}", super::TABLE), now)))
    }

    fn save(&self, policy: &Policy) -> Result<Vec<PathBuf>, Error> {
        Ok(self.config.saving.save(&self.rules(policy))?.into_iter().collect())
    }

    fn hits(&self) -> Result<BTreeMap<String, Hits>, Error> {
        Ok(read::content(&self.config.programs)?.unwrap_or_default().hits)
    }

    fn present(&self) -> Result<Option<String>, Error> {
        let there = self.observe()?;
        Ok(there.map(|_| format!("table inet {}", super::TABLE)))
    }

    fn teardown(&mut self) -> Remains<Error> {
        let mut remains = Remains::default();
        crate::fault::point("nftables:teardown");
        match self.config.programs.apply(&script::removal()) {
            // Without nft nothing was ever written.
            Ok(()) | Err(Error::ProgramMissing) => {}
            Err(error) => remains.errors.push(error),
        }
        remains.errors.extend(self.config.saving.remove().err());
        self.written = None;
        remains
    }

    /// Writes the difference to the last rules; the whole table, if the kernel does not take that. The rules are read back
    /// later: see [`Firewall::verify`].
    fn converge(&mut self, policy: &Policy) -> Result<(), Error> {
        if let Some(Written { rules, .. }) = &self.written {
            let wanted = self.rules(policy);
            let script = script::change_with(rules, &wanted, &self.carry(rules, &wanted));
            match self.write(wanted, &script) {
                Ok(()) => return Ok(()),
                // Another program has changed the table.
                Err(error) => tracing::debug!(%error, "the whole table is written"),
            }
        }
        self.rewrite(policy)
    }
}
