//! Every eBPF program stays within its budget of `bridge-ebpf/budget.toml`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Btf, EbpfLoader, VerifierLogLevel,
    programs::{Program, ProgramError},
};
use bridge_agent::datapath::object;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Deserialize;

/// Verification cost of a program, or its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cost {
    /// Instructions processed, on all paths together.
    instructions: u32,
    /// Bytes of stack, of the program and of the functions it calls, added up.
    stack: u32,
}

/// By object and program.
type Costs = BTreeMap<String, BTreeMap<String, Cost>>;

/// Limits, and the compiler that they are for.
#[derive(Debug, Deserialize)]
struct Budget {
    /// As it writes its name into the debug information of an object.
    compiler: String,
    #[serde(flatten)]
    limits: Costs,
}

/// Of the cost by the compiler of the budget, another one may need this many percent more: it inlines other functions.
const OTHER_COMPILER: u32 = 50;

#[test]
fn programs_stay_within_their_budget() -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bridge-ebpf/budget.toml");
    let mut budget: Budget =
        toml::from_str(&fs::read_to_string(&file)?).context("bridge-ebpf/budget.toml")?;
    let mut measured = Costs::new();
    let mut compilers = BTreeSet::new();
    for (name, bytes) in object::ALL {
        compilers.insert(compiler(bytes).with_context(|| format!("object {name} names no compiler"))?);
        measured.insert((*name).to_owned(), measure(bytes).with_context(|| format!("object {name}"))?);
    }
    let compilers = Vec::from_iter(compilers).join(", ");
    println!("compiled by {compilers}; the budget is for {}", budget.compiler);
    if compilers != budget.compiler {
        for limit in budget.limits.values_mut().flat_map(BTreeMap::values_mut) {
            limit.instructions += limit.instructions * OTHER_COMPILER / 100;
            limit.stack += limit.stack * OTHER_COMPILER / 100;
        }
    }
    print(&budget.limits, &measured);
    let complaints = complaints(&budget.limits, &measured);
    ensure!(
        complaints.is_empty(),
        "bridge-ebpf/budget.toml:\n{}\ncompiled by {compilers}; the budget is for {}",
        complaints.join("\n"),
        budget.compiler
    );
    Ok(())
}

/// Returns the version of rustc that the debug information of an object names.
fn compiler(object: &[u8]) -> Option<String> {
    const PREFIX: &[u8] = b"rustc version ";
    let at = object.windows(PREFIX.len()).position(|window| window == PREFIX)? + PREFIX.len();
    let version = object[at..].split(|byte| matches!(byte, b' ' | b')' | 0)).next()?;
    Some(format!("rustc {}", String::from_utf8_lossy(version)))
}

#[test]
fn the_compiler_is_read_from_debug_information() {
    let strings = b"main\0clang LLVM (rustc version 1.96.0 (ac68faa20 2026-05-25))\0core";
    assert_eq!(compiler(strings).as_deref(), Some("rustc 1.96.0"));
    assert_eq!(compiler(b"clang version 22.1.4"), None);
}

fn print(budget: &Costs, measured: &Costs) {
    println!(
        "{:<9} {:<24} {:>12} {:>9}  {:>6} {:>6}",
        "object", "program", "instructions", "budget", "stack", "budget"
    );
    for (object, programs) in measured {
        for (program, cost) in programs {
            let limit = budget.get(object).and_then(|programs| programs.get(program));
            let limit = |of: fn(&Cost) -> u32| limit.map_or("none".to_owned(), |cost| of(cost).to_string());
            println!(
                "{object:<9} {program:<24} {:>12} {:>9}  {:>6} {:>6}",
                cost.instructions,
                limit(|cost| cost.instructions),
                cost.stack,
                limit(|cost| cost.stack)
            );
        }
    }
}

/// Returns the faults of `measured`, or of `budget`.
fn complaints(budget: &Costs, measured: &Costs) -> Vec<String> {
    let mut complaints = Vec::new();
    for (object, programs) in measured {
        for (program, cost) in programs {
            let limit = budget.get(object).and_then(|programs| programs.get(program));
            // Room for differences in counting between kernels.
            let room = cost.instructions + cost.instructions / 10 + 10;
            let line = format!("{program} = {{ instructions = {room}, stack = {} }}", cost.stack);
            match limit {
                None => complaints.push(format!("{program} has no budget; add below [{object}]\n{line}")),
                Some(limit) if cost.instructions > limit.instructions || cost.stack > limit.stack => {
                    complaints.push(format!(
                        "{program} needs {} instructions (budget {}) and {} bytes of stack (budget {}); make it cheaper, \
                         or if it is worth it, write below [{object}]: {line}",
                        cost.instructions, limit.instructions, cost.stack, limit.stack
                    ));
                }
                Some(_) => {}
            }
        }
    }
    let names = |costs: &Costs| -> BTreeSet<(String, String)> {
        let pairs = costs.iter().flat_map(|(o, programs)| programs.keys().map(|p| (o.clone(), p.clone())));
        pairs.collect()
    };
    for (object, program) in names(budget).difference(&names(measured)) {
        complaints.push(format!("there is no program {program} in object {object}; remove its budget"));
    }
    complaints
}

/// Returns the verifier's statistics of each program of an object.
fn measure(object: &[u8]) -> Result<BTreeMap<String, Cost>> {
    let mut ebpf = EbpfLoader::new().verifier_log_level(VerifierLogLevel::STATS).load(object)?;
    // Read while it can be opened.
    let btf = Btf::from_sys_fs().context("the kernel's types")?;
    // aya hands out the verifier's log with an error only. Without a descriptor to be had, a program that the verifier
    // has accepted still cannot be loaded: the log is complete, and the error is EMFILE.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), maximum: limit.maximum })?;
    let results: Vec<_> =
        ebpf.programs_mut().map(|(name, program)| (name.to_owned(), try_load(name, program, &btf))).collect();
    setrlimit(Resource::Nofile, limit)?;

    let mut costs = BTreeMap::new();
    for (name, result) in results {
        let cost = match result {
            Err(ProgramError::LoadError { io_error, verifier_log })
                if io_error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) =>
            {
                parse(&verifier_log.to_string()).with_context(|| format!("log of {name}: {verifier_log}"))?
            }
            Err(error) => return Err(error).context(name),
            Ok(()) => bail!("{name} was loaded without a descriptor"),
        };
        costs.insert(name, cost);
    }
    ensure!(!costs.is_empty(), "no programs");
    Ok(costs)
}

fn try_load(name: &str, program: &mut Program, btf: &Btf) -> Result<(), ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::Iter(program) if name == "pool_walk" => program.load("bpf_sk_storage_map", btf),
        other => panic!("this test does not know how to load a program of type {:?}", other.prog_type()),
    }
}

/// Reads the statistics (`BPF_LOG_STATS`): `print_verification_stats` in kernel/bpf/verifier.c.
fn parse(log: &str) -> Option<Cost> {
    let after = |prefix| log.lines().find_map(|line| line.strip_prefix(prefix));
    let instructions = after("processed ")?.split(' ').next()?.parse().ok()?;
    let frames = after("stack depth ")?.split('+').map(|frame| frame.trim().parse::<u32>());
    Some(Cost { instructions, stack: frames.sum::<Result<u32, _>>().ok()? })
}

#[test]
fn statistics_are_read() {
    let log = "verification time 188 usec\nstack depth 16+32\nprocessed 1234 insns (limit 1000000) \
               max_states_per_insn 1 total_states 2 peak_states 2 mark_read 1\n";
    assert_eq!(parse(log), Some(Cost { instructions: 1234, stack: 48 }));
    assert_eq!(parse("processed 1234 insns"), None);
}

#[test]
fn what_is_beyond_missing_in_or_left_over_in_the_budget_is_named() {
    let costs = |program: &str, instructions| -> Costs {
        let cost = Cost { instructions, stack: 8 };
        BTreeMap::from([("enforce".into(), BTreeMap::from([(program.into(), cost)]))])
    };
    assert_eq!(complaints(&costs("a", 100), &costs("a", 100)), Vec::<String>::new());
    let beyond = complaints(&costs("a", 100), &costs("a", 101));
    assert!(beyond.len() == 1 && beyond[0].contains("101 instructions"), "{beyond:?}");
    let missing = complaints(&Costs::new(), &costs("a", 100));
    assert!(missing[0].contains("[enforce]\na = { instructions = 120, stack = 8 }"), "{missing:?}");
    assert_eq!(
        complaints(&costs("a", 100), &Costs::new()),
        ["there is no program a in object enforce; remove its budget"]
    );
}
