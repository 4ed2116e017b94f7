//! The programs of the packet path, run on hand-made packets by BPF_PROG_TEST_RUN: no interface, no traffic, but the
//! real programs, the real maps, and the policy written as the agent writes it.

use std::{net::IpAddr, path::PathBuf, sync::atomic::AtomicBool, time::Duration};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf},
    programs::{SchedClassifier, Xdp},
};
use bridge_agent::{
    datapath::{Behaviour, CacheSize, Datapath, Hook, Mechanism, Options, Pins, SHIELD_PROGRAM, now, object},
    model::Policy,
    policy,
};
use bridge_common::filter::{
    address::Address,
    control::Control,
    counters::{Counters, Reason},
    event::Event,
    fast_path::ticks,
    flow::{Flow, FlowKey, FragmentKey, flag, state},
    flow_cache,
    interface::{Interface, role, tunnel},
    policy::{RuleHits, direction},
};
use bridge_common::protocol;

use zerocopy::FromBytes as _;

use crate::packet::Packet;

/// Addresses that the policy knows as the node's own.
pub const NODE_ADDRESSES: [&str; 4] = ["192.168.31.17", "10.200.1.1", "fd31::17", "fd20:1::1"];

/// Index of the loopback interface, where BPF_PROG_TEST_RUN runs every hook: to the programs, towards the LAN.
pub const LAN_INTERFACE: u32 = 1;
/// Index of an attached interface towards pods. Packets at egress hooks may have come in by it.
pub const POD_INTERFACE: u32 = 77_000;
/// Index of an interface that is not attached, as [`POD_INTERFACE`].
pub const OTHER_INTERFACE: u32 = 99_000;

/// Outer packets of the node's tunnels: IP protocol and UDP port (VXLAN, GRE).
pub const TUNNELS: [(u8, u16); 2] = [(17, 8472), (47, 0)];

/// Offset of `ingress_ifindex` in `struct __sk_buff` (linux/bpf.h).
const INGRESS_IFINDEX: usize = 36;

/// The level of the programs' log (`aya_log::LEVEL`).
const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

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
    shielded: bool,
}

/// A hook, and the interface that a packet came in by; at ingress hooks that is [`LAN_INTERFACE`] whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The program that runs.
    pub hook: Hook,
    /// `ingress_ifindex`; 0: the node itself sends the packet.
    pub input: u32,
}

impl Place {
    /// A hook that a packet reaches from an interface.
    #[must_use]
    pub const fn from(hook: Hook, input: u32) -> Self {
        Self { hook, input }
    }
}

impl From<Hook> for Place {
    fn from(hook: Hook) -> Self {
        Self { hook, input: 0 }
    }
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
    /// Whether the shield has dropped it.
    pub shielded: bool,
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

/// The flow tables: TCP connections, flows of other protocols, those beyond a share, flows that wait for a reply.
pub const TABLES: [&str; 4] = ["flows", "other_flows", "overflow", "half_open"];

/// Timeouts that no test outlives: tests that need time to pass turn back the clock of a flow with [`Node::age`].
pub const TIMEOUT: Duration = Duration::from_secs(300);

/// Settings that a test starts from: enforce, reject, every new flow reported, no limit that a test would meet.
#[must_use]
pub fn behaviour() -> Behaviour {
    let timeout = u64::try_from(TIMEOUT.as_nanos()).expect("five minutes");
    Behaviour {
        timeouts: [timeout; state::COUNT],
        audit: false,
        reject: true,
        events_per_second: u32::MAX,
        answers_per_second: u32::MAX,
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

    /// As [`Node::new`], with room for `flows` flows in each table, half as many in that of other protocols than TCP.
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
        for (index, role) in [(LAN_INTERFACE, role::EXTERNAL), (POD_INTERFACE, role::INTERNAL)] {
            let link_header = u32::try_from(ETHERNET)?;
            interfaces.insert(index, Interface { role, link_header, ..Interface::default() }, 0)?;
        }
        let mut tunnels: HashMap<_, u32, u32> = open(&pins, "tunnels")?;
        for (protocol, port) in TUNNELS {
            tunnels.insert(tunnel(protocol, port), 1, 0)?;
        }
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
        // As the agent loads them: without the debug log.
        loader.override_global(LOG_LEVEL, &0u8, true);
        let mut programs = loader.load(object::ENFORCE).context("loading the programs a second time")?;
        for hook in Hook::ALL {
            program(&mut programs, hook)?.load()?;
        }
        shield(&mut programs)?.load()?;
        let (counted, audited) = (Tally::open(&pins, "counters")?, Tally::open(&pins, "audited")?);
        Ok(Self { datapath, programs, root, pins, counted, audited, shielded: false })
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

    /// Makes an address that of a pod of this node, behind the interface with this index; 0: of none.
    ///
    /// # Errors
    /// The kernel refused to write the entry.
    pub fn host(&mut self, pod: IpAddr, interface: u32) -> Result<()> {
        let mut hosted: HashMap<_, Address, u32> = open(&self.pins, "hosted")?;
        match interface {
            0 => Ok(hosted.remove(&pod.into())?),
            interface => Ok(hosted.insert(Address::from(pod), interface, 0)?),
        }
    }

    /// Makes an interface the inner side of a tunnel.
    ///
    /// # Errors
    /// The kernel refused to write the entry.
    pub fn make_tunnel(&mut self, interface: u32) -> Result<()> {
        let mut interfaces: HashMap<_, u32, Interface> = open(&self.pins, "interfaces")?;
        let known = interfaces.get(&interface, 0)?;
        Ok(interfaces.insert(interface, Interface { tunnel: 1, ..known }, 0)?)
    }

    /// Makes the node one without pods.
    ///
    /// # Errors
    /// The kernel refused to delete an entry.
    pub fn host_none(&mut self) -> Result<()> {
        clear::<Address, u32>(open(&self.pins, "hosted")?)
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
        for table in TABLES {
            clear::<FlowKey, Flow>(open(&self.pins, table)?)?;
        }
        // Sets the counters of the shares to zero.
        self.datapath.maps.remove_expired_flows(&AtomicBool::new(false))?;
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

    /// Puts the shield before [`Hook::ExternalIngress`], or takes it away.
    pub fn set_shield(&mut self, on: bool) {
        self.shielded = on;
    }

    /// Runs the shield on a frame. Returns the reason that it was dropped and counted for; `None`: it goes on, as it was.
    ///
    /// # Errors
    /// The kernel refused to run it, it changed the frame, or a frame that goes on was counted.
    pub fn run_shield(&mut self, frame: &[u8]) -> Result<Option<Reason>> {
        let mut out = vec![0; frame.len() + 256];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = shield(&mut self.programs)?.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        let (counted, audited) = (self.counted.more()?, self.audited.more()?);
        ensure!(audited.is_none() && out == frame, "the shield only drops");
        match (result.return_value, counted) {
            // XDP_DROP and XDP_PASS (linux/bpf.h).
            (1, Some((direction::INBOUND, reason))) => Ok(Some(reason)),
            (2, None) => Ok(None),
            (action, counted) => anyhow::bail!("the shield returned {action} and counted {counted:?}"),
        }
    }

    /// Runs the program of a hook on a frame, behind the shield if that is there.
    ///
    /// # Errors
    /// The kernel refused to run it, or the packet was counted more than once.
    pub fn run(&mut self, place: impl Into<Place>, frame: &[u8]) -> Result<Judged> {
        let Place { hook, input } = place.into();
        if self.shielded
            && hook == Hook::ExternalIngress
            && let Some(reason) = self.run_shield(frame)?
        {
            let counted = Some((direction::INBOUND, reason));
            return Ok(Judged {
                action: Action::Drop,
                counted,
                audited: None,
                frame: frame.to_vec(),
                shielded: true,
            });
        }
        let mut out = vec![0; frame.len() + 256];
        let mut context = [0; INGRESS_IFINDEX + size_of::<u32>()];
        context[INGRESS_IFINDEX..].copy_from_slice(&input.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = program(&mut self.programs, hook)?.test_run(options)?;
        let length = result.data_size_out as usize;
        out.truncate(length);
        let action = match result.return_value.cast_signed() {
            -1 => Action::Next,
            2 => Action::Drop,
            7 => Action::Answer,
            other => anyhow::bail!("{} returned {other}", hook.name()),
        };
        Ok(Judged {
            action,
            counted: self.counted.more()?,
            audited: self.audited.more()?,
            frame: out,
            shielded: false,
        })
    }

    /// As [`Node::cost`], of the shield.
    ///
    /// # Errors
    /// The kernel refused to run it.
    pub fn cost_of_shield(&mut self, frame: &[u8], packets: u32) -> Result<f64> {
        let options = TestRunOptions { data_in: Some(frame), repeat: packets, ..TestRunOptions::new() };
        let result = shield(&mut self.programs)?.test_run(options)?;
        Ok(result.duration.as_secs_f64() * 1e9)
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
    pub fn passes(&mut self, place: impl Into<Place>, packet: &Packet, reason: Reason) {
        let judged = self.run(place, &packet.frame()).expect("the program runs");
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(reason), "{packet:?}");
        assert_eq!(judged.action, Action::Next, "{packet:?}");
        assert_eq!(judged.frame, packet.frame(), "a packet that passes is not touched");
    }

    /// Asserts that a packet is denied for this reason.
    pub fn denies(&mut self, place: impl Into<Place>, packet: &Packet, reason: Reason) -> Judged {
        let judged = self.run(place, &packet.frame()).expect("the program runs");
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(reason), "{packet:?}");
        assert_ne!(judged.action, Action::Next, "{packet:?}");
        judged
    }

    /// Asserts that a packet is none of the programs' business.
    pub fn ignores(&mut self, place: impl Into<Place>, packet: &Packet) {
        let judged = self.run(place, &packet.frame()).expect("the program runs");
        assert_eq!((judged.action, judged.counted, judged.audited), (Action::Next, None, None), "{packet:?}");
        assert_eq!(judged.frame, packet.frame(), "a packet that is ignored is not touched");
    }

    /// The entry of a flow, of the established table or else the half-open one; the name of the table with it.
    #[must_use]
    pub fn flow(&self, key: &FlowKey) -> Option<(&'static str, Flow)> {
        TABLES.into_iter().find_map(|table| {
            let map: HashMap<_, FlowKey, Flow> = open(&self.pins, table).expect("a flow table");
            map.get(key, 0).ok().map(|flow| (table, flow))
        })
    }

    /// One of the [`TABLES`].
    ///
    /// # Errors
    /// The kernel refused to open it.
    pub fn flow_table(&self, name: &'static str) -> Result<HashMap<MapData, FlowKey, Flow>> {
        open(&self.pins, name)
    }

    /// The hits of the rules of the policy in `slot`, by CPU and rule.
    ///
    /// # Errors
    /// The kernel refused to open the map.
    pub fn rule_hits(&self, slot: u32) -> Result<Array<MapData, RuleHits>> {
        Ok(Array::try_from(Map::from_map_data(MapData::from_pin(self.pins.table(slot, "rule_hits"))?)?)?)
    }

    /// Makes a flow older.
    pub fn age(&self, key: &FlowKey, by: Duration) {
        assert!(self.age_if_known(key, by), "a known flow");
    }

    /// As [`Node::age`]; returns whether there is such a flow.
    pub fn age_if_known(&self, key: &FlowKey, by: Duration) -> bool {
        let Some((table, mut flow)) = self.flow(key) else { return false };
        let mut map: HashMap<_, FlowKey, Flow> = open(&self.pins, table).expect("a flow table");
        let by = u64::try_from(by.as_nanos()).expect("less than 500 years");
        let last_seen = now().checked_sub(by).expect("the machine has been up for that long");
        if key.protocol == protocol::TCP && table != "half_open" && flow.flags & flag::FIN_PENDING != 0 {
            flow.set_pending_fin(flow.pending_fin().0, ticks(last_seen));
        }
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
            events.push(Event::read_from_bytes(&item).expect("an event"));
        }
        events
    }

    /// Makes the flow cache forget a flow.
    pub fn forget_cached(&self, key: &FlowKey) {
        self.datapath.maps.forget_cached(key);
    }

    /// Returns the datapath, for calls that have no short name here.
    pub fn datapath(&mut self) -> &mut Datapath {
        &mut self.datapath
    }
}

/// A program that costs as much as [`Reference::LOOKUPS`] lookups in a hash table, to compare others with.
pub struct Reference(Ebpf);

impl Reference {
    /// Lookups of a run.
    pub const LOOKUPS: f64 = 16.0;

    /// Loads it.
    ///
    /// # Errors
    /// Whatever loading says.
    pub fn new() -> Result<Self> {
        static OBJECT: &[u8] =
            aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/generate"));
        let mut ebpf = Ebpf::load(OBJECT).context("loading the reference")?;
        let program: &mut SchedClassifier =
            ebpf.program_mut("reference").context("the reference")?.try_into()?;
        program.load()?;
        Ok(Self(ebpf))
    }

    /// Nanoseconds of a lookup, as the mean over `runs` runs.
    ///
    /// # Errors
    /// The kernel refused to run it.
    pub fn lookup(&self, runs: u32) -> Result<f64> {
        let program: &SchedClassifier = self.0.program("reference").context("the reference")?.try_into()?;
        let options = TestRunOptions { data_in: Some(&[0; 64]), repeat: runs, ..TestRunOptions::new() };
        Ok(program.test_run(options)?.duration.as_secs_f64() * 1e9 / Self::LOOKUPS)
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

fn shield(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut(SHIELD_PROGRAM).context("a program of the object")?.try_into()?)
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
