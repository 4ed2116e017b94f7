//! `lab`: plays the scenes, keeps a lab up to try things in, cleans up after killed ones.

use std::io::{IsTerminal as _, stderr};
use std::pin::pin;
use std::process::ExitCode;

use anyhow::{Result, bail};
use bridge_lab::lab::{self, Lab};
use bridge_lab::scenes::{self, Stage};
use bridge_lab::wait::end_requested;
use clap::{Args, Parser, Subcommand};

/// LAN host A, node B and pods C1 and C2 on this machine, in network namespaces.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Play the scenes, then keep the lab up (also without a subcommand)
    Run(RunArgs),
    /// Set up the lab, without the scenes, and keep it up
    Up,
    /// Remove the leftovers of labs whose process was killed
    Clean,
}

#[derive(Args)]
struct RunArgs {
    /// End after the scenes: with 0 if every one came out, else with 1
    #[arg(long)]
    once: bool,
    /// Print one JSON object for each scene, with name, expected, seen and ok
    #[arg(long)]
    json: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let command = cli.command.unwrap_or(Command::Run(cli.run));
    let explained = !matches!(&command, Command::Run(args) if args.json);
    let work = tokio::task::spawn_blocking(move || match command {
        Command::Run(args) => run(&args),
        Command::Up => up(),
        Command::Clean => clean(),
    });
    let mut end = pin!(end_requested());
    // Keeps the lab up until the user ends it, then returns the exit code.
    let (stays, code) = tokio::select! {
        done = work => done??,
        signal = &mut end => {
            signal?;
            let errors = lab::remove_own();
            eprintln!("ended before its time");
            errors.iter().for_each(|error| eprintln!("{error}"));
            // The work goes on in its thread, on a lab that is gone: not to be waited for.
            std::process::exit(1);
        }
    };
    if let Some(stage) = stays {
        if explained {
            explain(&stage);
        }
        end.await?;
    }
    Ok(code)
}

fn run(args: &RunArgs) -> Result<(Option<Stage>, ExitCode)> {
    let total = scenes::all().count();
    progress(0, total, "set-up");
    let mut stage = Stage::set()?;
    let mut played = Vec::new();
    for (index, scene) in scenes::all().enumerate() {
        progress(index + 1, total, scene.name);
        let scene = scenes::play(scene, &mut stage);
        if args.json {
            println!("{}", serde_json::to_string(&scene)?);
        }
        played.push(scene);
    }
    clear_progress();
    if !args.json {
        println!("{}", scenes::table(&played));
    }
    let code = if played.iter().all(|scene| scene.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    Ok(((!args.once).then_some(stage), code))
}

/// Shows the scene that is being played, on a terminal only: one line, redrawn (ECMA-48, EL).
fn progress(number: usize, total: usize, name: &str) {
    if stderr().is_terminal() {
        let name: String = name.chars().take(60).collect();
        eprint!("\r[{number}/{total}] {name}\x1b[K");
    }
}

fn clear_progress() {
    if stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}

fn up() -> Result<(Option<Stage>, ExitCode)> {
    Ok((Some(Stage::on(Lab::builder().build()?)), ExitCode::SUCCESS))
}

fn clean() -> Result<(Option<Stage>, ExitCode)> {
    let (gone, errors) = lab::clean();
    for lab in gone {
        println!("removed {lab}");
    }
    if !errors.is_empty() {
        bail!("not everything could be removed:\n{}", errors.join("\n"));
    }
    Ok((None, ExitCode::SUCCESS))
}

/// Prints commands to try in a lab that stays up.
fn explain(Stage { lab, agent, .. }: &Stage) {
    println!("\nThe lab {} stays up until Ctrl-C:", lab.id());
    for host in lab.hosts().iter().chain(lab.nodes()).chain(lab.pods()) {
        println!("  {:<3} {:<15} {:<11} /run/netns/{}", host.name, host.v4, host.v6, host.netns.name());
    }
    let enter = |host: &lab::Host| format!("nsenter --net=/run/netns/{}", host.netns.name());
    let (a, b, c1) = (lab.a(), lab.b(), lab.c1());
    println!("Try, in other terminals:");
    if agent.is_some() {
        // A server of the scenes is still there.
        println!("  {} nc -v -p 61050 {} 9443", enter(a), c1.v4);
        println!("  {} nc -v {} 9443    # refused: not from a port of the pool", enter(a), c1.v4);
    } else {
        println!("  {} nc -l -p 40002", enter(c1));
        println!("  {} nc -v {} 40002", enter(a), c1.v4);
    }
    println!("  {} tcpdump -ni any\n  {} ip route", enter(b), enter(a));
    if let Some(agent) = agent {
        let denied = format!("{}:9443", c1.v4);
        for arguments in [
            &["explain", &a.v4.to_string(), &denied][..],
            &["status"],
            &["rules"],
            &["flows"],
            &["monitor", "--verdict", "reject"],
        ] {
            let command = agent.command(arguments);
            let words = std::iter::once(command.get_program()).chain(command.get_args());
            println!("  {}", words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "));
        }
        println!(
            "  bpftool map dump pinned {}/v{}/flows",
            agent.pins().display(),
            bridge_common::ABI_VERSION
        );
    }
}
