//! Files that the agent or another program has written and the agent reads.

use std::{
    net::IpAddr,
    sync::LazyLock,
    time::{Duration, Instant},
};

use crate::{
    agent::trial::Record,
    config::{self, Config},
    iptables::{render, ruleset::Family, save::file},
    kubernetes::{plan::plan, saved::In},
    model::{PortSet, parse_ranges},
    routes::discovery::{registry::Entry, state},
};

static NODE: LazyLock<Config> = LazyLock::new(|| {
    let text = include_str!("../../../deploy/examples/node.yaml");
    config::parse(text, None).expect("the example is valid").config
});

/// The first byte selects the file. Content of a file that the agent itself writes is written and read again, the same;
/// a file cut off anywhere is refused, never half accepted.
///
/// # Panics
/// It is not so.
pub fn state(input: &[u8]) -> bool {
    let Some((kind, bytes)) = input.split_first() else { return false };
    match kind {
        b'0' => discovered(bytes),
        b'1' => cluster(bytes),
        b'2' => trial(bytes),
        b'3' => str::from_utf8(bytes).is_ok_and(saved_rules),
        b'4' => str::from_utf8(bytes).is_ok_and(reserved_ports),
        _ => false,
    }
}

/// State of discovery before a restart.
fn discovered(bytes: &[u8]) -> bool {
    const LONGEST: Duration = Duration::from_secs(3600);
    let parse = |bytes: &[u8]| state::parse(bytes, LONGEST);
    let Ok(known) = parse(bytes) else { return false };
    assert!(known.iter().all(|(_, entry)| entry.expires <= Instant::now() + LONGEST));
    let written =
        state::encode(known.iter().map(|(address, entry)| (address, entry))).expect("it can be written");
    let unexpired = |known: &[(IpAddr, Entry)]| -> Vec<_> {
        // Entries that expire meanwhile are left out.
        let stays = known.iter().filter(|(_, entry)| entry.expires > Instant::now() + LONGEST / 2);
        stays.map(|(address, entry)| (*address, entry.egress, entry.name.clone())).collect()
    };
    let again = parse(&written).expect("the written file can be read");
    assert_eq!(unexpired(&again), unexpired(&known));
    refused_in_part(&written, |part| parse(part).is_err());
    true
}

/// Known state of a cluster.
fn cluster(bytes: &[u8]) -> bool {
    let Ok(saved) = In::read(bytes) else { return false };
    let written = saved.write().expect("it can be written");
    assert_eq!(In::read(&*written).expect("the written file can be read"), saved);
    refused_in_part(&written, |part| In::read(part).is_err());
    // As a start while the API server is away does.
    let policy = plan(&NODE, &saved.cluster, Some(&saved.node)).config.policy();
    let _ = crate::policy::compile(&policy, &[]);
    for family in Family::ALL {
        drop(render::ruleset(&policy, &render::Options::default(), family));
    }
    true
}

/// The record of a configuration on trial.
fn trial(bytes: &[u8]) -> bool {
    let Ok(record) = serde_json::from_slice::<Record>(bytes) else { return false };
    let written = serde_json::to_vec(&record).expect("it can be written");
    assert_eq!(serde_json::from_slice::<Record>(&written).expect("the written file can be read"), record);
    refused_in_part(&written, |part| serde_json::from_slice::<Record>(part).is_err());
    true
}

/// A file of saved iptables rules: rules of others stay unchanged, and saving twice is saving once.
fn saved_rules(text: &str) -> bool {
    let others = file::without(text);
    assert_eq!(file::without(&others), others, "taken out twice");
    for family in Family::ALL {
        let rules = render::ruleset(&NODE.policy(), &render::Options::default(), family);
        let once = file::with(text, &rules);
        assert_eq!(file::with(&once, &rules), once, "saved twice");
        let left = file::without(&once);
        // The last line may have had no end.
        assert_eq!(
            left.strip_suffix('\n').unwrap_or(&left),
            others.strip_suffix('\n').unwrap_or(&others),
            "rules of others"
        );
    }
    true
}

/// The kernel's list of reserved ports, and the agent's own part of it.
fn reserved_ports(text: &str) -> bool {
    let ports: PortSet = parse_ranges(text).into_iter().collect();
    let printed = ports.to_string();
    let again: PortSet = parse_ranges(&printed).into_iter().collect();
    assert_eq!(again, ports, "{printed}");
    true
}

/// Whatever part of a file is there, it is not taken for the whole: of long ones, some parts.
fn refused_in_part(whole: &[u8], is_refused: impl Fn(&[u8]) -> bool) {
    for end in (0..whole.len()).step_by(whole.len().div_ceil(64)) {
        assert!(is_refused(&whole[..end]), "the first {end} bytes are taken for the whole");
    }
}
