//! The programs of the packet path, run on hand-made packets by BPF_PROG_TEST_RUN: no interface, no traffic, but the
//! real programs, the real maps, and the policy written as the agent writes it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::SchedClassifier,
};
use bridge_agent::{
    datapath::{Behaviour, CacheSize, Datapath, Hook, Mechanism, Options, Pins, now, object},
    model::Policy,
    policy,
};
use bridge_common::filter::{
    control::Control,
    counters::{Counters, Reason},
    event::Event,
    flow::{Flow, FlowKey, FragmentKey, state},
    flow_cache,
    interface::{Interface, role},
    policy::direction,
};

use crate::packet::Packet;

/// Addresses that the policy knows as the node's own.
pub const NODE_ADDRESSES: [&str; 4] = ["192.168.31.17", "10.200.1.1", "fd31::17", "fd20:1::1"];

/// Index of the loopback interface, which BPF_PROG_TEST_RUN lets packets come in by.
const LOOPBACK: u32 = 1;

/// Length of an Ethernet header in bytes.
const ETHERNET: usize = 14;

/// The programs, loaded under pins of their own, with an active policy.
pub struct Node {
    datapath: Datapath,
    programs: Ebpf,
    root: PathBuf,
    pins: Pins,
    counted: Tally,
    audited: Tally,
}

/// Result for a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The action.
    pub action: Action,
    /// Direction (see [`bridge_common::filter::policy::direction`]) and reason it was counted under; `None`: it was none of
    /// the programs' business.
    pub counted: Option<(u8, Reason)>,
    /// The same in audit mode, for a packet that would have been denied.
    pub audited: Option<(u8, Reason)>,
    /// The frame as the program left it.
    pub frame: Vec<u8>,
}

/// Return value of a program (include/uapi/linux/pkt_cls.h, include/uapi/linux/bpf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `TCX_NEXT`.
    Next,
    /// `TC_ACT_SHOT`.
    Drop,
    /// `TC_ACT_REDIRECT`: the answer goes out by the interface that the packet came in by.
    Answer,
}

/// Timeouts that no test outlives: tests that need time to pass turn back the clock of a flow with [`Node::age`].
pub const TIMEOUT: Duration = Duration::from_secs(3600);

/// Settings that a test starts from: enforce, reject, every new flow reported, no limit that a test would meet.
#[must_use]
pub fn behaviour() -> Behaviour {
    let timeout = u64::try_from(TIMEOUT.as_nanos()).expect("an hour");
    Behaviour {
        timeouts: [timeout; state::COUNT],
        audit: false,
        reject: true,
        events_per_second: u32::MAX,
        report_allowed: true,
    }
}

impl Node {
    /// Loads the programs and activates `policy`.
    ///
    /// # Errors
    /// Whatever loading or compiling says.
    pub fn new(policy: &Policy, behaviour: &Behaviour) -> Result<Self> {
        Self::with_room(policy, behaviour, 1024)
    }

    /// As [`Node::new`], with room for `flows` flows in each of the two tables.
    ///
    /// # Errors
    /// Whatever loading or compiling says.
    pub fn with_room(policy: &Policy, behaviour: &Behaviour, flows: u32) -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let root = PathBuf::from(format!("/sys/fs/bpf/bridge-test-{}-{serial}", std::process::id()));
        let pins = Pins::new(&root);
        let options =
            Options { pins: pins.clone(), flows, half_open: flows, mechanism: Mechanism::Best, debug: false };
        let mut datapath = Datapath::load(&options).context("loading the packet path")?;
        let mut interfaces: HashMap<_, u32, Interface> = open(&pins, "interfaces")?;
        interfaces.insert(
            LOOPBACK,
            Interface { role: role::EXTERNAL, link_header: u32::try_from(ETHERNET)?, fast_path: 0, ..Interface::default() },
            0,
        )?;
        publish(&mut datapath, policy, behaviour)?;
        // A second copy of the programs, on the maps of the first: those belong to the datapath.
        let mut loader = EbpfLoader::new();
        let names: Vec<String> = std::fs::read_dir(pins.directory())?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        for name in &names {
            loader.map_pin_path(name, pins.map(name));
        }
        let cache = CacheSize::of_machine()?;
        cache.apply(&mut loader);
        let mut programs = loader.load(object::ENFORCE).context("loading the programs a second time")?;
        for hook in Hook::ALL {
            program(&mut programs, hook)?.load()?;
        }
        let (counted, audited) = (Tally::open(&pins, "counters")?, Tally::open(&pins, "audited")?);
        Ok(Self { datapath, programs, root, pins, counted, audited })
    }

    /// Activates another policy.
    ///
    /// # Errors
    /// Whatever compiling or writing says.
    pub fn publish(&mut self, policy: &Policy, behaviour: &Behaviour) -> Result<()> {
        publish(&mut self.datapath, policy, behaviour)
    }

    /// Returns which of the two policies that are held is active; see [`Node::put_in_force`].
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.datapath.maps.slot()
    }

    /// Activates again a policy that was published before, by its slot.
    ///
    /// # Errors
    /// The kernel refused to write the word.
    pub fn put_in_force(&mut self, slot: u32) -> Result<()> {
        let mut control: Array<_, Control> = open(&self.pins, "control")?;
        control.set(0, Control::slot(slot), 0)?;
        Ok(())
    }

    /// Empties the flow tables and the table of first fragments.
    ///
    /// # Errors
    /// The kernel refused to delete an entry.
    pub fn forget_flows(&mut self) -> Result<()> {
        self.empty_tables()?;
        let mut stamps = self.stamps()?;
        for index in 0..flow_cache::STAMPS {
            stamps.set(index, stamps.get(&index, 0)?.wrapping_add(1), 0)?;
        }
        Ok(())
    }

    /// As [`Node::forget_flows`], without a word to the flow cache.
    ///
    /// # Errors
    /// The kernel refused to delete an entry.
    pub fn empty_tables(&mut self) -> Result<()> {
        for table in ["flows", "half_open"] {
            clear::<FlowKey, Flow>(open(&self.pins, table)?)?;
        }
        clear::<FragmentKey, u64>(open(&self.pins, "fragments")?)
    }

    /// Gives all flows one stamp, so that those of the flow cache differ in nothing but themselves.
    ///
    /// # Errors
    /// The kernel refused to write one.
    pub fn level_stamps(&self) -> Result<()> {
        let mut stamps = self.stamps()?;
        Ok((0..flow_cache::STAMPS).try_for_each(|index| stamps.set(index, 7, 0))?)
    }

    fn stamps(&self) -> Result<Array<MapData, u64>> {
        open(&self.pins, "flow_stamps")
    }

    /// Runs the program of `hook` on a frame.
    ///
    /// # Errors
    /// The kernel refused to run it, or the packet was counted more than once.
    pub fn run(&mut self, hook: Hook, frame: &[u8]) -> Result<Judged> {
        let mut out = vec![0; frame.len() + 256];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program(&mut self.programs, hook)?.test_run(options)?;
        let length = result.data_size_out as usize;
        out.truncate(length);
        let action = match result.return_value.cast_signed() {
            -1 => Action::Next,
            2 => Action::Drop,
            7 => Action::Answer,
            other => anyhow::bail!("{} returned {other}", hook.name()),
        };
        Ok(Judged { action, counted: self.counted.more()?, audited: self.audited.more()?, frame: out })
    }

    /// Nanoseconds that the program of `hook` takes for a frame, as the mean over `packets` runs.
    ///
    /// # Errors
    /// The kernel refused to run it.
    pub fn cost(&mut self, hook: Hook, frame: &[u8], packets: u32) -> Result<f64> {
        let options = TestRunOptions { data_in: Some(frame), repeat: packets, ..TestRunOptions::new() };
        let result = program(&mut self.programs, hook)?.test_run(options)?;
        Ok(result.duration.as_secs_f64() * 1e9)
    }

    /// Asserts that a packet is let through for this reason.
    pub fn passes(&mut self, hook: Hook, packet: &Packet, reason: Reason) {
        let judged = self.run(hook, &packet.frame()).expect("the program runs");
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(reason), "{packet:?}");
        assert_eq!(judged.action, Action::Next, "{packet:?}");
        assert_eq!(judged.frame, packet.frame(), "a packet that passes is not touched");
    }

    /// Asserts that a packet is denied for this reason.
    pub fn denies(&mut self, hook: Hook, packet: &Packet, reason: Reason) -> Judged {
        let judged = self.run(hook, &packet.frame()).expect("the program runs");
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(reason), "{packet:?}");
        assert_ne!(judged.action, Action::Next, "{packet:?}");
        judged
    }

    /// Asserts that a packet is none of the programs' business.
    pub fn ignores(&mut self, hook: Hook, packet: &Packet) {
        let judged = self.run(hook, &packet.frame()).expect("the program runs");
        assert_eq!((judged.action, judged.counted, judged.audited), (Action::Next, None, None), "{packet:?}");
        assert_eq!(judged.frame, packet.frame(), "a packet that is ignored is not touched");
    }

    /// The entry of a flow, of the established table or else the half-open one; the name of the table with it.
    #[must_use]
    pub fn flow(&self, key: &FlowKey) -> Option<(&'static str, Flow)> {
        ["flows", "half_open"].into_iter().find_map(|table| {
            let map: HashMap<_, FlowKey, Flow> = open(&self.pins, table).expect("a flow table");
            map.get(key, 0).ok().map(|flow| (table, flow))
        })
    }

    /// Makes a flow older.
    pub fn age(&self, key: &FlowKey, by: Duration) {
        assert!(self.age_if_known(key, by), "a known flow");
    }

    /// As [`Node::age`]; whether there is such a flow.
    pub fn age_if_known(&self, key: &FlowKey, by: Duration) -> bool {
        let Some((table, flow)) = self.flow(key) else { return false };
        let mut map: HashMap<_, FlowKey, Flow> = open(&self.pins, table).expect("a flow table");
        let by = u64::try_from(by.as_nanos()).expect("less than 500 years");
        let last_seen = now().checked_sub(by).expect("the machine has been up for that long");
        map.insert(key, Flow { last_seen, ..flow }, 0).expect("room for an entry that is there");
        self.datapath.maps.forget_cached(key);
        true
    }

    /// Every event since the last call.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        let mut ring: RingBuf<MapData> = open(&self.pins, "events").expect("the ring buffer");
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: as long as an event, which is plain old data.
            events.push(unsafe { item.as_ptr().cast::<Event>().read_unaligned() });
        }
        events
    }

    /// Returns the datapath, for calls that have no short name here.
    pub fn datapath(&mut self) -> &mut Datapath {
        &mut self.datapath
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn publish(datapath: &mut Datapath, policy: &Policy, behaviour: &Behaviour) -> Result<()> {
    let local: Vec<_> = NODE_ADDRESSES.iter().map(|address| address.parse().expect("an address")).collect();
    let tables = policy::compile(policy, &local)?;
    datapath.publish(&tables, behaviour, None)?;
    Ok(())
}

fn program(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut(hook.name()).context("a program of the object")?.try_into()?)
}

fn open<T: TryFrom<Map, Error = aya::maps::MapError>>(pins: &Pins, name: &'static str) -> Result<T> {
    Ok(T::try_from(Map::from_map_data(MapData::from_pin(pins.map(name))?)?)?)
}

/// Removes every entry.
fn clear<K: aya::Pod, V: aya::Pod>(mut map: HashMap<MapData, K, V>) -> Result<()> {
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>()?;
    for key in keys {
        map.remove(&key)?;
    }
    Ok(())
}

/// A map of counters, and its values at the last reading: only packets of this process count there.
struct Tally {
    map: PerCpuArray<MapData, Counters>,
    rows: [Vec<Counters>; direction::COUNT],
}

impl Tally {
    fn open(pins: &Pins, name: &'static str) -> Result<Self> {
        let mut tally = Self { map: open(pins, name)?, rows: Default::default() };
        for (index, row) in (0..).zip(&mut tally.rows) {
            *row = tally.map.get(&index, 0)?.to_vec();
        }
        Ok(tally)
    }

    /// Direction and reason of the one counter that went up since the last call, by one packet.
    fn more(&mut self) -> Result<Option<(u8, Reason)>> {
        let mut found = None;
        for (index, row) in (0..).zip(&mut self.rows) {
            let values = self.map.get(&u32::from(index), 0)?;
            if values[..] == row[..] {
                continue;
            }
            for (before, after) in row.iter().zip(values.iter()) {
                for reason in Reason::ALL {
                    let more = after.get(*reason).packets - before.get(*reason).packets;
                    if more > 0 {
                        ensure!(
                            more == 1 && found.is_none(),
                            "a packet is counted once, not also as {reason:?}"
                        );
                        found = Some((index, *reason));
                    }
                }
            }
            *row = values.to_vec();
        }
        Ok(found)
    }
}
