//! Set up, build, run, test and measure bridge: `cargo xtask help`.

mod abi;
mod build;
mod cluster;
mod cmd;
mod crds;
mod dist;
mod docs;
mod fuzz;
mod image;
mod lint;
mod progress;
mod prose;
mod run;
mod setup;
mod steps;
mod test;
mod vm;
mod workspace;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

/// Set up, build, run, test and measure bridge
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install missing build, run and test tools; the other commands do so themselves
    Setup,
    /// Build the eBPF objects, and the agent that embeds them
    Build {
        /// Optimise the agent (the eBPF objects always are)
        #[arg(long)]
        release: bool,
    },
    /// Run the lab: LAN host, node and pods with real traffic through them; or the agent on this very host
    Run {
        /// Arguments of the lab, for instance --once or --json
        #[arg(allow_hyphen_values = true)]
        lab: Vec<OsString>,
        /// Run `bridge-agent` with these arguments on this host instead
        #[arg(last = true)]
        agent: Vec<OsString>,
    },
    /// Check and test everything, from formatting to privileged tests; or only the tests whose name contains FILTER
    Test {
        /// Part of the name of a test
        filter: Option<String>,
    },
    /// Check formatting, lints, licences, unused dependencies, the ABI, the words and links of the pages, and commit subjects
    Lint,
    /// Count the words that the style avoids, or list the lines with one of them
    Words {
        /// For instance nobody
        word: Option<String>,
        /// Lower the ceilings in xtask/words.toml to today's figures
        #[arg(long, conflicts_with = "word")]
        lower: bool,
    },
    /// Compare the layout of bridge-common with the one on record
    Abi {
        /// Record the present one
        #[arg(long)]
        bless: bool,
    },
    /// Write files made of the types of the agent: custom resource definitions, schema of the configuration, description of the API
    Crds,
    /// Build kube-apiserver, etcd and kubectl for the tests, as `cluster` does, unless they exist
    KubeAssets,
    /// Measure, side by side with the usual alternatives
    Bench {
        /// Arguments of the benchmark
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// Count the packets that are lost, and those let through, while the agent is killed, upgraded, reloaded, removed
    Gap {
        /// For instance --kills 100 --rate 10000
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// Run agents, reloads, kills and traffic together for long, and look for failures and leaks
    Soak {
        /// For instance --minutes 60
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// Build the container image, with buildah, on a base made by debootstrap
    Image {
        /// Take this base instead, for instance docker.io/library/debian:bookworm-slim
        #[arg(long)]
        base: Option<String>,
        /// Build it a second time, compare, and run the agent from it in the lab
        #[arg(long)]
        test: bool,
    },
    /// Run a Kubernetes cluster with bridge on this machine, play its scenes, and keep it up
    Cluster {
        /// Build the missing programs only
        #[arg(long)]
        build: bool,
        /// Arguments of the cluster, for instance --once, --cni ptp, --proxy iptables, --overlay, --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Build static binaries for x86_64 and aarch64, packages, bill of materials and checksums into target/dist/out
    Dist(dist::Options),
    /// Build the documentation as a site into target/docs/site, and check its links
    Docs,
    /// Play the story of the README in the lab, and write it to docs/demo.cast and docs/demo.svg
    Record,
    /// Attack a node from the LAN, and count the legitimate connections that suffer
    Attack {
        /// For instance --packets 5000000 --rate 200000
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// Try every known way past the default deny, with each engine and both
    Mediation {
        /// For instance --only NodePort --engines ebpf
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// Fuzz the agent's parsers, guided by coverage: configuration, API, discovery, cluster file, saved state
    Fuzz {
        /// Only this one
        #[arg(value_enum)]
        target: Option<fuzz::Target>,
        /// How long each
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,
    },
    /// Send random packets through the eBPF programs and through a plain model of the verdict
    Model {
        /// For the comparison: --packets N, --seed N, --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Send the same random packets through eBPF and through iptables, and compare the verdicts
    Parity {
        /// For instance --packets 1000000 --seed 1
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// Play the scenes on Debian's kernels, in emulation
    Vm {
        /// Only on this one; can be repeated
        #[arg(long = "kernel", value_enum)]
        kernels: Vec<vm::Kernel>,
        /// Write the results into docs/kernels.md
        #[arg(long)]
        write: bool,
        /// Run this shell command there instead
        #[arg(last = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Setup => setup::main(),
        Command::Build { release } => build::main(release),
        Command::Run { lab, agent } => run::main(&lab, &agent),
        Command::Test { filter } => test::main(filter.as_deref()),
        Command::Lint => lint::main(),
        Command::Words { lower: true, .. } => prose::lower_ceilings(),
        Command::Words { word, .. } => prose::list_words(word.as_deref()),
        Command::Abi { bless } => abi::main(bless),
        Command::Crds => crds::main(),
        Command::KubeAssets => setup::kube_assets::main(),
        Command::Bench { arguments } => run::bench(&arguments),
        Command::Record => run::record(),
        Command::Attack { arguments } => run::tool("attack", &arguments),
        Command::Mediation { arguments } => run::tool("mediation", &arguments),
        Command::Gap { arguments } => run::tool("gap", &arguments),
        Command::Soak { arguments } => run::tool("soak", &arguments),
        Command::Image { base, test } => image::main(base.as_deref(), test),
        Command::Cluster { build, arguments } => cluster::main(build, &arguments),
        Command::Dist(options) => dist::main(options),
        Command::Docs => docs::main(),
        Command::Fuzz { target, seconds } => fuzz::main(target, seconds),
        Command::Model { arguments } => run::tool("model", &arguments),
        Command::Parity { arguments } => run::tool("parity", &arguments),
        Command::Vm { kernels, write, command } => vm::main(&kernels, write, &command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_the_lab_and_of_the_agent_are_told_apart() {
        let parse =
            |words: &[&str]| match Arguments::try_parse_from([&["cargo xtask", "run"], words].concat()) {
                Ok(Arguments { command: Command::Run { lab, agent } }) => (lab, agent),
                _ => panic!("{words:?}"),
            };
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(parse(&[]), (vec![], vec![]));
        assert_eq!(parse(&["--once", "--json"]), (words(&["--once", "--json"]), vec![]));
        assert_eq!(parse(&["--", "run", "--config", "F"]), (vec![], words(&["run", "--config", "F"])));
    }

    #[test]
    fn arguments_of_the_benchmark_pass_through() {
        let parsed = Arguments::try_parse_from(["cargo xtask", "bench", "--quick", "forward"]);
        let Ok(Arguments { command: Command::Bench { arguments } }) = parsed else { panic!() };
        assert_eq!(arguments, ["--quick", "forward"]);
    }

    #[test]
    fn arguments_of_the_comparison_pass_through() {
        let parsed = Arguments::try_parse_from(["cargo xtask", "parity", "--packets", "9", "--seed", "1"]);
        let Ok(Arguments { command: Command::Parity { arguments } }) = parsed else { panic!() };
        assert_eq!(arguments, ["--packets", "9", "--seed", "1"]);
    }
}
