//! The metrics that Prometheus expects of every process (proc(5)).

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{TypedMetric as _, counter::ConstCounter, gauge::ConstGauge},
};
use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Process {
    pub(super) cpu_seconds: f64,
    pub(super) resident: u64,
    pub(super) virtual_memory: u64,
    /// Since 1970.
    pub(super) started: f64,
    pub(super) threads: u64,
    pub(super) open_descriptors: u64,
    pub(super) max_descriptors: u64,
}

impl Process {
    /// Reads the values of this process; `None` without /proc.
    pub(super) fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the program, in parentheses, may hold anything.
        let fields: Vec<u64> =
            stat.rsplit_once(')')?.1.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        let field = |number: usize| fields.get(number - 3).copied();
        let boot = fs::read_to_string("/proc/stat").ok()?;
        let boot: f64 = boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        let seconds = |ticks: u64| ticks as f64 / clock_ticks_per_second() as f64;
        Some(Self {
            cpu_seconds: seconds(field(14)? + field(15)?),
            threads: field(20)?,
            started: boot + seconds(field(22)?),
            virtual_memory: field(23)?,
            resident: field(24)? * page_size() as u64,
            open_descriptors: fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            max_descriptors: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
        })
    }
}

/// `None` writes nothing.
#[derive(Debug)]
pub(super) struct ProcessCollector(pub(super) Option<Process>);

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(process) = self.0 else { return Ok(()) };
        let name = ("process_cpu_seconds", "User and system time of the agent");
        let counter = encoder.encode_descriptor(name.0, name.1, None, ConstCounter::<f64>::TYPE)?;
        ConstCounter::new(process.cpu_seconds).encode(counter)?;
        let name = ("process_start_time_seconds", "Start of the agent, since 1970");
        let gauge = encoder.encode_descriptor(name.0, name.1, None, ConstGauge::<f64>::TYPE)?;
        ConstGauge::new(process.started).encode(gauge)?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory of the agent", process.resident),
            ("process_virtual_memory_bytes", "Virtual memory of the agent", process.virtual_memory),
            ("process_threads", "Threads of the agent", process.threads),
            ("process_open_fds", "Open file descriptors of the agent", process.open_descriptors),
            ("process_max_fds", "Maximum number of open file descriptors", process.max_descriptors),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, ConstGauge::<i64>::TYPE)?;
            ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(gauge)?;
        }
        Ok(())
    }
}
