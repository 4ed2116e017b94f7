//! The configuration file.

use annotate_snippets::Renderer;

use crate::{
    config::{self, Diagnostic, Diagnostics},
    iptables::{
        render::{Options, restore_input},
        ruleset::Family,
    },
    model::Policy,
    policy,
    pool::{Layout, Settings, layout::Occupied},
};

/// An accepted configuration is compiled and rendered, and is the same when it is written out and read again, with and
/// without its defaults; a refusal has a reason and a remedy.
///
/// # Panics
/// It is not so.
pub fn config(input: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(input) else { return false };
    let loaded = match config::parse(text, Some("bridge.yaml".as_ref())) {
        Ok(loaded) => loaded,
        Err(errors) => {
            assert!(!errors.0.list.is_empty(), "a refusal says why");
            explained(&errors.0);
            return false;
        }
    };
    explained(&loaded.warnings);
    let policy = loaded.policy();
    if let Err(error) = policy::compile(&policy, &[]) {
        assert!(!error.to_string().is_empty());
    }
    for family in Family::ALL {
        drop(restore_input(&policy, &Options::default(), family));
    }
    if let Some(settings) = Settings::from_config(&loaded.config) {
        let _ = Layout::plan(&settings, &Occupied::default());
    }
    let written = loaded.config.to_yaml().expect("no value fails to be written");
    assert_eq!(again(&written), loaded.config, "{written}");
    let effective = loaded.config.effective();
    let written = effective.to_yaml().expect("no value fails to be written");
    let read = again(&written);
    assert_eq!(read, effective, "{written}");
    assert_eq!(spelled_out(read.policy()), spelled_out(policy), "{written}");
    true
}

/// Each finding has a reason and a remedy, and can be shown.
fn explained(diagnostics: &Diagnostics) {
    for Diagnostic { message, help, .. } in &diagnostics.list {
        assert!(!message.is_empty() && !help.is_empty(), "{message:?} {help:?}");
    }
    drop(diagnostics.render(&Renderer::plain()));
}

fn again(text: &str) -> config::Config {
    match config::parse(text, None) {
        Ok(loaded) => loaded.config,
        Err(errors) => panic!("the written file is refused: {errors}\n{text}"),
    }
}

/// The networks of a rule that names none are those of all.
fn spelled_out(mut policy: Policy) -> Policy {
    for rule in &mut policy.rules {
        rule.external.get_or_insert_with(|| policy.external.clone());
        rule.pods.get_or_insert_with(|| policy.pods.clone());
    }
    policy
}
