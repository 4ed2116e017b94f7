//! Keeps the packet path as the configuration and the interfaces of the node want it.

mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bridge_common::filter::{control::Control, fast_path::ability};

use super::{
    desired::{Desired, Error, Prepared, compile},
    fast_path::Switch,
    named::Named,
    seed::seed,
    sweeper::Sweeper,
    term::Term,
};
use crate::{
    config::Config,
    conntrack::Forgetting,
    datapath::{
        self, Behaviour, Change, Datapath, Displaced, Displacement, Maps, Mechanism, Options, Pins,
        Published, Shield,
    },
    interfaces::{Bindings, Chosen, Device, Hosted, Observer, Selection, Snapshot},
    kernel::backoff::Backoff,
    model::Role,
    policy::{Tables, TablesStats},
    state::ActivePolicy,
};

/// Target of log lines from the programs: `--log-level enforce=debug` enables them.
const KERNEL_LOG: &str = "enforce";

#[derive(Debug)]
pub(super) struct Enforcer {
    datapath: Datapath,
    maps: Arc<Maps>,
    sweeper: Option<Sweeper>,
    observer: Observer,
    desired: Desired,
    snapshot: Snapshot,
    seeded: Option<usize>,
    published: Option<Published>,
    stats: Option<TablesStats>,
    chosen: Chosen,
    named: Named,
    bindings: Bindings,
    hosted: Hosted,
    /// While a policy is on trial: the one before it, to which the kernel may go back by itself, and until when.
    former: Option<(Desired, Instant)>,
    /// Abilities that each of the chosen interfaces has, bits of [`ability`].
    abilities: Vec<u32>,
    fast_path: Switch,
    /// State of the shield at each interface towards the LAN, by index.
    shields: BTreeMap<u32, Shield>,
    pins_restored: u64,
    programs_restored: u64,
    /// Programs that are not where they should be.
    displaced: Vec<Displaced>,
    /// Why pins are missing.
    unpinned: Option<String>,
    /// Pods whose connections conntrack is to forget.
    forgetting: Forgetting,
    again: Again,
}

/// State before a commit.
#[derive(Debug)]
pub(super) struct Before {
    desired: Desired,
    snapshot: Snapshot,
    observer: Observer,
    former: Option<(Desired, Instant)>,
    published: Option<Published>,
    stats: Option<TablesStats>,
    /// The active policy; `None` if the commit overwrites a policy of a trial.
    control: Option<Control>,
}

/// What has failed and is due again.
#[derive(Debug, Default)]
struct Again {
    /// To attach all chosen interfaces.
    attach: Backoff,
    /// To read the interfaces and to publish the policy for them.
    follow: Backoff,
    /// To remove the remains of another version.
    remove: Backoff,
    /// To put the programs of bridge before those of others.
    order: Backoff,
}

impl Enforcer {
    /// Brings enforcement up, or takes it over.
    pub(super) fn start(
        pins: &Pins,
        state: &Path,
        config: &Config,
        prepared: Prepared,
        term: Term<'_>,
    ) -> Result<Self, Error> {
        let Prepared { desired, snapshot, observer, tables, former } = prepared;
        let flows = config.enforcement.flows;
        let datapath = Datapath::load(&Options {
            pins: pins.clone(),
            flows: flows.established,
            half_open: flows.half_open,
            mechanism: Mechanism::Best,
            debug: tracing::enabled!(target: KERNEL_LOG, tracing::Level::DEBUG),
        })?;
        let maps = Arc::new(Maps::open(pins)?);
        let bindings = Bindings::resume(datapath.hosted()?);
        let named = Named::load(state);
        let chosen = Chosen::by_name(named.known().clone());
        let (seeded, published, stats) = (None, None, None);
        let fast_path = Switch::new(Arc::clone(&maps));
        let mut enforcer = Self {
            datapath,
            sweeper: None,
            maps,
            observer,
            desired,
            snapshot,
            seeded,
            published,
            stats,
            chosen,
            named,
            bindings,
            hosted: Hosted::default(),
            former: None,
            abilities: Vec::new(),
            fast_path,
            shields: BTreeMap::new(),
            pins_restored: 0,
            programs_restored: 0,
            displaced: Vec::new(),
            unpinned: None,
            forgetting: Forgetting::default(),
            again: Again::default(),
        };
        match (former, term) {
            (Some(former), Term::Rest(_, left)) => enforcer.former = Some((former, Instant::now() + left)),
            // No process remembers a trial that may be left.
            _ => enforcer.datapath.fall_back(),
        }
        if let Err(error) = enforcer.bring_up(&tables) {
            if !enforcer.datapath.adopted() {
                // Nothing was there before, and nothing half done is to stay.
                drop(enforcer);
                if let Err(error) = datapath::undo(pins) {
                    tracing::error!(%error, "left behind after a failed start");
                }
            }
            return Err(error);
        }
        enforcer.fast_path.set(enforcer.desired.fast_path);
        // Last: reading the log takes its map from programs that are not loaded yet.
        if let Err(error) = enforcer.datapath.forward_log() {
            tracing::warn!(%error, "cannot read the log of the programs");
        }
        crate::fault::point("start:enforcing");
        enforcer.remove_other_versions();
        Ok(enforcer)
    }

    fn remove_other_versions(&mut self) {
        let removed = self.datapath.remove_other_versions();
        self.again.remove.note(removed.is_ok());
        match removed {
            Ok(0) => {}
            Ok(attachments) => {
                tracing::info!(attachments, "removed the leftovers of another version of bridge")
            }
            Err(error) => tracing::warn!(%error, "cannot remove all that another version of bridge has left"),
        }
    }

    fn bring_up(&mut self, tables: &Tables) -> Result<(), Error> {
        if self.datapath.is_unseeded(self.desired.behaviour.audit)? {
            // Nothing was enforced so far. Until the connections that are there are known, nothing is denied; those
            // that are opened meanwhile are already followed.
            // Where another version of bridge enforces, it goes on so, and knows flows that conntrack need not know.
            let lenient = Behaviour { audit: true, events_per_second: 0, ..self.desired.behaviour };
            self.datapath.publish(tables, &lenient, None)?;
            self.attach()?;
            crate::fault::point("start:lenient");
            self.carry_over();
            self.seeded = seed(&self.maps, tables);
            // Flows that it has learned meanwhile.
            self.carry_over();
        }
        match self.publish(tables, None) {
            // Its time has ended since the last check; the next event handles that.
            Err(Error::Datapath(datapath::Error::NoTrial)) => {}
            result => result?,
        }
        self.attach()
    }

    /// Activates a policy; with `trial`, only for that time at first.
    fn publish(&mut self, tables: &Tables, trial: Option<Duration>) -> Result<(), Error> {
        let behaviour = self.desired.behaviour;
        let published = match &self.former {
            None => self.datapath.publish(tables, &behaviour, trial)?,
            Some((former, until)) => {
                let before = compile(former, &self.snapshot)?;
                let left = until.saturating_duration_since(Instant::now());
                if self.maps.control().deadline() > 0 {
                    self.datapath.replace_trial((tables, &behaviour), (&before, &former.behaviour))?
                } else {
                    // So far both were the same to the kernel, so that it had nothing to go back to; or it has been.
                    let published = self.datapath.publish(&before, &former.behaviour, None)?;
                    if left.is_zero() {
                        published
                    } else {
                        self.datapath.publish(tables, &behaviour, Some(left))?
                    }
                }
            }
        };
        self.stats = Some(tables.stats());
        self.published = Some(published);
        match published {
            Published::Switched { generation, took } => {
                tracing::info!(generation, rules = tables.rule_count, ?took, "policy active");
            }
            Published::Unchanged { generation } => {
                tracing::debug!(generation, "the policy is active already");
            }
        }
        Ok(())
    }

    fn attach(&mut self) -> Result<(), Error> {
        let mut chosen = self.desired.selection.choose_after(&self.snapshot, &self.chosen);
        if let Some((former, _)) = &self.former {
            let also = former.selection.choose(&self.observer.snapshot(&former.selection)?).targets;
            let of_trial: BTreeSet<u32> = chosen.targets.iter().map(|target| target.index).collect();
            chosen.targets.extend(also.into_iter().filter(|target| !of_trial.contains(&target.index)));
        }
        for remark in chosen.remarks.iter().filter(|remark| !self.chosen.remarks.contains(remark)) {
            tracing::warn!("{remark}");
        }
        if let Some(why) = chosen.misled.as_ref().filter(|_| chosen.misled != self.chosen.misled) {
            tracing::error!("{why}");
        }
        let keep = if self.desired.unshielded.is_none() { chosen.targets.as_slice() } else { &[] };
        let unshielded = self.datapath.unshield(keep);
        let (changes, result) = self.datapath.attach(&chosen.targets);
        for Change { interface, hook, action } in changes {
            tracing::info!(interface, hook = hook.name(), ?action, "interface");
        }
        self.named.set(chosen.names());
        self.chosen = chosen;
        let hosted = self.host();
        self.allow_fast_path();
        self.shield(true);
        result?;
        unshielded?;
        hosted
    }

    /// Shields the interfaces towards the LAN, if the configuration says so. `again`: also those that could not be lately.
    fn shield(&mut self, again: bool) {
        let targets = &self.chosen.targets;
        let shields = match self.desired.unshielded {
            None => {
                let (shields, result) = self.datapath.shield(targets, again);
                if let Err(error) = result {
                    tracing::warn!(%error, "a shield is left");
                }
                shields
            }
            Some(reason) => {
                let lan = targets.iter().filter(|target| target.role == Role::External);
                lan.map(|target| (target.index, Shield::Off(reason.to_owned()))).collect()
            }
        };
        for target in targets {
            let shield = shields.get(&target.index);
            if let Some(shield) = shield.filter(|_| shield != self.shields.get(&target.index)) {
                tracing::info!(interface = target.name, xdp = %shield, "shield");
            }
        }
        self.shields = shields;
    }

    /// Writes the pods of this node for the kernel side, and removes the flows of pods that have gone.
    fn host(&mut self) -> Result<(), Error> {
        let hosted = self.desired.selection.hosted(&self.snapshot, &mut self.bindings);
        for (address, port) in hosted.refused.difference(&self.hosted.refused) {
            let interface = self.snapshot.links.get(port).map_or("?", |link| link.name.as_str());
            tracing::warn!(%address, interface, "a pod uses an address that is not its own: denied");
        }
        self.hosted = hosted;
        self.datapath.set_tunnels(self.snapshot.links.values().filter_map(|link| link.tunnel))?;
        let gone = self.datapath.host(&self.hosted.pods, &self.chosen.targets)?;
        if !gone.is_empty() {
            let flows = self.maps.forget_addresses(&gone)?;
            tracing::debug!(pods = gone.len(), flows, "flows of pods that have gone are forgotten");
            self.forgetting.add(gone);
        }
        self.forgetting.try_again();
        Ok(())
    }

    /// Takes over the flows of another version of bridge. Without them, they would be cut, unless conntrack knows them;
    /// that is no reason not to enforce.
    fn carry_over(&self) {
        match self.datapath.migrate_flows() {
            Ok(0) => {}
            Ok(flows) => tracing::info!(flows, "took over flows from another version of bridge"),
            Err(error) => {
                tracing::warn!(%error, "not all flows of another version of bridge could be taken over")
            }
        }
    }

    /// Applies another configuration. Returns the state before; after an error that is still active.
    pub(super) fn commit(&mut self, prepared: Prepared, term: Term<'_>) -> Result<Before, Error> {
        self.restore_pins()?;
        let Prepared { desired, snapshot, observer, tables, former } = prepared;
        let (former, trial) = match term {
            Term::Good => (None, None),
            Term::Trial(time) => (None, Some(time)),
            Term::Rest(_, left) => (former.map(|former| (former, Instant::now() + left)), None),
        };
        // In the rest of a trial the place of the former policy is written again.
        let control = former.is_none().then(|| self.datapath.checkpoint());
        let before = Before {
            desired: std::mem::replace(&mut self.desired, desired),
            snapshot: std::mem::replace(&mut self.snapshot, snapshot),
            observer: std::mem::replace(&mut self.observer, observer),
            former: std::mem::replace(&mut self.former, former),
            published: self.published,
            stats: self.stats,
            control,
        };
        if self.desired.has_other_scope(&before.desired) {
            seed(&self.maps, &tables);
        }
        if let Err(error) = self.publish(&tables, trial) {
            self.restore(before);
            return Err(error);
        }
        if let Some(time) = trial {
            self.former = Some((before.desired.clone(), Instant::now() + time));
        }
        self.attach_as_far_as_possible();
        self.fast_path.set(self.desired.fast_path);
        Ok(before)
    }

    /// Takes [`Enforcer::commit`] back.
    pub(super) fn rollback(&mut self, before: Before) {
        self.restore(before);
        self.attach_as_far_as_possible();
        self.fast_path.set(self.desired.fast_path);
    }

    fn restore(&mut self, before: Before) {
        let Before { desired, snapshot, observer, former, published, stats, control } = before;
        if let Some(control) = control {
            self.datapath.rollback(control);
        }
        (self.desired, self.snapshot, self.observer, self.former) = (desired, snapshot, observer, former);
        (self.published, self.stats) = (published, stats);
    }

    /// The policy is active, even if single interfaces fail.
    fn attach_as_far_as_possible(&mut self) {
        let attached = self.attach();
        self.again.attach.note(attached.is_ok());
        if let Err(error) = attached {
            tracing::error!(%error, "not everything is attached; the agent tries again");
            self.chosen.remarks.push(error.to_string());
        }
    }

    /// Checks the interfaces and follows changes; after a failure, again and again.
    pub(super) fn interfaces_changed(&mut self) -> Result<(), Error> {
        // New interfaces are attached nevertheless.
        drop(self.restore_pins());
        let again = self.again.follow != Backoff::default();
        let followed = self.follow_interfaces(again);
        self.again.follow.note(followed.is_ok());
        followed
    }

    fn follow_interfaces(&mut self, again: bool) -> Result<(), Error> {
        let snapshot = self.observer.snapshot(&self.desired.selection)?;
        if snapshot == self.snapshot && !again {
            return Ok(());
        }
        let addresses_changed = snapshot.addresses != self.snapshot.addresses;
        self.snapshot = snapshot;
        // New interfaces are attached first: they may already carry packets.
        self.attach_as_far_as_possible();
        if addresses_changed || again {
            let tables = compile(&self.desired, &self.snapshot)?;
            match self.publish(&tables, None) {
                // Its time has ended: its end, which comes next, compiles again.
                Err(Error::Datapath(datapath::Error::NoTrial)) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Makes the policy on trial final; to be followed by [`Enforcer::end_trial`] or [`Enforcer::unconfirm`].
    pub(super) fn confirm(&mut self) -> Result<Control, Error> {
        Ok(self.datapath.confirm()?)
    }

    /// Takes [`Enforcer::confirm`] back.
    pub(super) fn unconfirm(&mut self, control: Control) {
        self.datapath.rollback(control);
    }

    /// Activates the policy before the one on trial, if one is; [`Enforcer::commit`] must follow.
    pub(super) fn fall_back(&mut self) {
        self.datapath.fall_back();
        if let Some((_, until)) = &mut self.former {
            *until = Instant::now();
        }
    }

    /// Releases state that only a policy on trial needs.
    pub(super) fn end_trial(&mut self) {
        self.former = None;
        self.attach_as_far_as_possible();
    }

    /// Polls for changes that the kernel sends no notification for.
    pub(super) fn check(&mut self) {
        drop(self.restore_pins());
        if self.sweeper.is_none() {
            self.sweeper = Sweeper::start(Arc::clone(&self.maps)).ok();
        }
        self.try_again();
        self.restore_order();
        if self.hosted.is_to_be_polled(&self.chosen.targets) {
            drop(self.follow_interfaces(false));
        }
        if self.desired.unshielded.is_none() {
            self.shield(false);
        }
        if self.fast_path.is_on() {
            self.allow_fast_path();
            self.fast_path.check();
        }
    }

    /// Repeats what has failed and is due.
    fn try_again(&mut self) {
        if self.again.follow.is_due() {
            match self.interfaces_changed() {
                Ok(()) => tracing::info!("the agent follows the interfaces again"),
                Err(error) => tracing::debug!(%error, "the agent still cannot follow the interfaces"),
            }
        }
        self.forgetting.try_again();
        self.named.try_again();
        if self.again.attach.is_due() {
            self.attach_as_far_as_possible();
        }
        if self.again.remove.is_due() {
            self.remove_other_versions();
        }
        if self.fast_path.is_due() {
            self.fast_path.set(self.desired.fast_path);
        }
    }

    /// Restores removed pins. Until that is possible, everything lives with this process.
    fn restore_pins(&mut self) -> Result<(), Error> {
        let (restored, result) = self.datapath.restore_pins();
        if restored > 0 {
            tracing::warn!(restored, "restored pins that another program had removed or unmounted");
            self.pins_restored += restored as u64;
        }
        let unpinned = result.as_ref().err().map(|error| {
            format!("pins are gone, so that nothing is enforced any more when the agent ends: {error}")
        });
        if unpinned != self.unpinned {
            if let Some(remark) = &unpinned {
                tracing::error!("{remark}");
            }
            self.unpinned = unpinned;
        }
        Ok(result?)
    }

    /// Attaches programs that others have detached, and puts them first again; the less often, the longer another one insists.
    fn restore_order(&mut self) {
        let displaced = match self.datapath.displaced(&self.chosen.targets) {
            Ok(displaced) => displaced,
            Err(error) => return tracing::debug!(%error, "cannot compare the attached programs"),
        };
        let before = std::mem::replace(&mut self.displaced, displaced);
        if self.displaced.is_empty() {
            // A quiet time makes the next displacement the first one.
            if before.is_empty() && self.again.order.is_due() {
                self.again.order.note(true);
            }
            return;
        }
        if self.again.order != Backoff::default() && !self.again.order.is_due() {
            return;
        }
        for Displaced { interface, hook, how } in &self.displaced {
            let problem = match how {
                Displacement::Missing => "another program has detached bridge",
                Displacement::Behind => "another program has put itself before bridge",
            };
            tracing::warn!(interface, hook = hook.name(), problem, "restoring the order of programs");
        }
        self.again.order.note(false);
        if let Err(error) = self.datapath.give_way(&self.displaced) {
            tracing::error!(%error, "a program keeps its place behind others");
        }
        self.attach_as_far_as_possible();
        let left = self.datapath.displaced(&self.chosen.targets).unwrap_or_else(|_| self.displaced.clone());
        self.programs_restored += self.displaced.iter().filter(|one| !left.contains(one)).count() as u64;
        self.displaced = left;
    }

    /// Allows the fast path on those interfaces where no other program must see the packets.
    fn allow_fast_path(&mut self) {
        if !self.desired.fast_path {
            self.abilities = Vec::new();
            return;
        }
        let (abilities, result) = self.datapath.allow_fast_path(&self.chosen.targets);
        if let Err(error) = result {
            tracing::debug!(%error, "an interface takes no part in the fast path");
        }
        if abilities != self.abilities {
            for (target, allowed) in self.chosen.targets.iter().zip(&abilities) {
                tracing::debug!(interface = target.name, allows = ?names(*allowed), "fast path");
            }
        }
        self.abilities = abilities;
    }

    pub(super) fn selection(&self) -> &Selection {
        &self.desired.selection
    }

    /// Returns the indexes of the bridges of this node.
    pub(super) fn bridges(&self) -> BTreeSet<u32> {
        let bridges = self.snapshot.links.iter().filter(|(_, link)| link.device == Device::Bridge);
        bridges.map(|(index, _)| *index).collect()
    }

    /// Returns the policy that judges, and the addresses that it is for.
    pub(super) fn active(&self) -> ActivePolicy {
        ActivePolicy {
            policy: Arc::clone(&self.desired.policy),
            pool: self.desired.pool.clone(),
            local: self.snapshot.addresses.iter().copied().collect(),
        }
    }

    /// Whether programs of an earlier run were there at the start.
    pub(super) fn adopted(&self) -> bool {
        self.datapath.adopted()
    }

    pub(super) fn maps(&self) -> &Arc<Maps> {
        &self.maps
    }

    /// Returns the number of the active policy.
    pub(super) fn generation(&self) -> u32 {
        self.published.map_or(0, Published::generation)
    }

    /// Detaches everything and forgets every policy.
    pub(super) fn take_down(self, pins: &Pins) -> Result<(), Error> {
        drop(self.datapath);
        let (_, result) = datapath::down(pins, &crate::pool::pins::is_of_a_pool);
        Ok(result?)
    }
}

/// Returns the names of an interface's fast-path abilities.
fn names(allowed: u32) -> Vec<String> {
    [(ability::INPUT, "in"), (ability::OUTPUT, "out"), (ability::PEER, "peer")]
        .into_iter()
        .filter(|(bit, _)| allowed & bit != 0)
        .map(|(_, name)| name.to_owned())
        .collect()
}
