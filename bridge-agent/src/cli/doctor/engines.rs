//! Back ends of iptables, programs of others, pins of other versions, and the interfaces.

use std::{
    env,
    fs::{File, TryLockError},
    io,
    path::PathBuf,
};

use super::{context::Context, finding::Finding};
use crate::{
    agent::firewall_settings,
    config::Xdp,
    datapath,
    interfaces::Route,
    iptables::{Programs, backend},
    model::{Role, Target},
};

pub(super) fn check(context: &Context<'_>) -> Vec<Finding> {
    if context.node().is_none() {
        return vec![Finding::not_run("engines", "this is no node: a LAN host enforces nothing")];
    }
    vec![
        backends(context),
        xtables_lock(),
        interfaces(context),
        programs(context),
        shields(context),
        pins(context),
    ]
}

fn backends(context: &Context<'_>) -> Finding {
    const CHECK: &str = "engines.iptables-backends";
    let wanted = context.config.as_ref().and_then(|config| firewall_settings(config).backend);
    match backend::choose(&Programs::default(), wanted) {
        Ok(backend::Choice { backend, warning: None }) => {
            Finding::ok(CHECK, format!("rules are in iptables-{} only", backend.name()))
        }
        Ok(backend::Choice { warning: Some(warning), .. }) => {
            let (seen, remedy) = warning.split_once(". ").unwrap_or((&warning, "see docs/iptables.md"));
            Finding::warn(CHECK, seen, remedy)
        }
        Err(error) => Finding::not_run(CHECK, error.to_string()),
    }
}

/// Tries the lock that the programs of iptables-legacy take; they wait for its holder.
fn xtables_lock() -> Finding {
    const CHECK: &str = "engines.xtables-lock";
    // As iptables(8) finds it.
    let path =
        env::var_os("XTABLES_LOCKFILE").map_or_else(|| PathBuf::from("/run/xtables.lock"), PathBuf::from);
    let shown = path.display();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Finding::ok(CHECK, format!("there is no {shown}: no program has taken it"));
        }
        Err(error) => return Finding::not_run(CHECK, format!("{shown}: {error}")),
    };
    match file.try_lock() {
        Ok(()) => Finding::ok(CHECK, format!("{shown} is free")),
        Err(TryLockError::WouldBlock) => Finding::warn(
            CHECK,
            format!("another program holds {shown}"),
            format!("changes of iptables rules wait for it: `fuser -v {shown}` names the program"),
        ),
        Err(TryLockError::Error(error)) => Finding::not_run(CHECK, format!("{shown}: {error}")),
    }
}

fn interfaces(context: &Context<'_>) -> Finding {
    const CHECK: &str = "engines.interfaces";
    let names = |external: bool| {
        let side =
            context.chosen.targets.iter().filter(move |target| (target.role == Role::External) == external);
        side.map(|target| format!("{} ({})", target.name, chosen_by(context, target))).collect::<Vec<_>>()
    };
    let (lan, pods) = (names(true), names(false));
    if lan.is_empty() {
        return Finding::fail(
            CHECK,
            "no interface leads to networks.external",
            "nothing from the LAN would be judged: name it in enforcement.interfaces.external, or add the route",
        );
    }
    if let Some(why) = &context.chosen.misled {
        return Finding::fail(
            CHECK,
            why,
            "add enforcement.interfaces.internal; `ip link` shows the interfaces of pods",
        );
    }
    if pods.is_empty() {
        return Finding::warn(
            CHECK,
            format!("LAN: {}; none leads to networks.pods", lan.join(", ")),
            "as long as no pod runs here this is expected; else name them in enforcement.interfaces.internal",
        );
    }
    Finding::ok(CHECK, format!("LAN: {}; pods: {}", lan.join(", "), pods.join(", ")))
}

/// Returns the reason why an interface is chosen: its name, or the route that leaves by it.
fn chosen_by(context: &Context<'_>, target: &Target) -> String {
    let named = context.config.iter().any(|config| {
        let interfaces = &config.enforcement.interfaces;
        interfaces.external.iter().chain(&interfaces.internal).any(|pattern| pattern.matches(&target.name))
    });
    if named {
        return "by name".to_owned();
    }
    let by_it = |route: &&Route| route.hops.iter().any(|(index, _)| *index == target.index);
    let longest = context.snapshot.routes.iter().filter(by_it).max_by_key(|route| route.to.prefix_len());
    longest.map_or_else(|| "at its bridge".to_owned(), |route| format!("route {}", route.to))
}

fn programs(context: &Context<'_>) -> Finding {
    const CHECK: &str = "engines.foreign-programs";
    let mut alien = Vec::new();
    for target in &context.chosen.targets {
        match datapath::programs_before(&context.global.pins(), target) {
            Ok(0) => {}
            Ok(count) => alien.push(format!("{count} on {}", target.name)),
            Err(error) => return Finding::not_run(CHECK, format!("hooks of {}: {error}", target.name)),
        }
    }
    if alien.is_empty() {
        return Finding::ok(CHECK, "no program of others is before bridge's own");
    }
    Finding::warn(
        CHECK,
        format!("programs of others are first: {}", alien.join(", ")),
        "they may pass packets before bridge judges them: `bpftool net show dev NAME` names them; restart the agent to move \
         bridge's to the front",
    )
}

fn shields(context: &Context<'_>) -> Finding {
    const CHECK: &str = "engines.xdp";
    if context.config.as_ref().is_none_or(|config| config.enforcement.xdp == Xdp::Off) {
        return Finding::ok(CHECK, "off: enforcement.xdp is off");
    }
    if !context.global.pins().exist() {
        return Finding::not_run(CHECK, "no agent enforces yet");
    }
    let (mut native, mut off) = (Vec::new(), Vec::new());
    for target in context.chosen.targets.iter().filter(|target| target.role == Role::External) {
        match datapath::is_shielded(&context.global.pins(), target) {
            Ok(true) => native.push(target.name.clone()),
            Ok(false) => off.push(target.name.clone()),
            Err(error) => return Finding::not_run(CHECK, format!("{}: {error}", target.name)),
        }
    }
    if off.is_empty() {
        return Finding::ok(CHECK, format!("native: {}", native.join(", ")));
    }
    let native = if native.is_empty() { String::new() } else { format!("; native: {}", native.join(", ")) };
    Finding::warn(
        CHECK,
        format!("off: {}{native}", off.join(", ")),
        "denied packets meet the hooks behind instead, and rules hold all the same: `bridge-agent status` of a running agent \
         says why",
    )
}

fn pins(context: &Context<'_>) -> Finding {
    const CHECK: &str = "engines.pins";
    let pins = context.global.pins();
    match (pins.exist(), pins.exist_of_any_version()) {
        (true, _) => Finding::ok(CHECK, format!("{} is of this version", pins.directory().display())),
        (false, false) => Finding::ok(CHECK, format!("nothing is pinned below {}", pins.root().display())),
        (false, true) => Finding::warn(
            CHECK,
            format!("{} has pins of another version", pins.root().display()),
            "that version enforces until an agent of this one starts and takes them over",
        ),
    }
}
