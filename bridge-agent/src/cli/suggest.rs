//! `bridge-agent suggest`: rules for connections that were denied, or would have been.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;

use super::{Error, Global, get, print, print_json};
use crate::api::SuggestAnswer;
use crate::config::{GROUP, TimeSpan, leaf::Leaf as _};
use crate::explain::{Reported, Suggested};

/// Suggest rules for connections that were denied, or would have been.
///
/// From the connections that the kernel counted, also while no agent ran: audited ones, and
/// with --include-denied refused ones. The rules allow exactly the connections that were seen,
/// and each of these was judged again by the policy with the rules.
#[derive(Debug, Args)]
#[command(after_help = "Example: `mode: audit`, a day of traffic, then
  bridge-agent suggest --since 1d
Add the rules, write `mode: enforce`, and try it:
  bridge-agent apply --confirm 5m bridge.yaml")]
pub struct Suggest {
    /// Only connections that were seen within this time, such as 30m or 1d
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<Duration>,
    /// Also connections that were denied in enforce mode
    #[arg(long)]
    include_denied: bool,
    /// Also destination ports of 32768 and more, which look like those of clients
    #[arg(long)]
    include_ephemeral: bool,
    /// Print a BridgePolicy instead of rules for bridge.yaml
    #[arg(long)]
    policy: bool,
}

fn time(text: &str) -> Result<Duration, String> {
    TimeSpan::parse(text)
        .map(TimeSpan::duration)
        .map_err(|problem| format!("{}; {}", problem.message, problem.help))
}

impl Suggest {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let since = self.since.map(|since| format!("&sinceSeconds={}", since.as_secs())).unwrap_or_default();
        let path = format!(
            "/v1/suggest?includeDenied={}&includeEphemeral={}{since}",
            self.include_denied, self.include_ephemeral
        );
        let answer: SuggestAnswer = get(global, &path)?;
        if global.json {
            return print_json(&answer);
        }
        print(&self.text(&answer)?)
    }

    fn text(&self, answer: &SuggestAnswer) -> Result<String, Error> {
        let SuggestAnswer { suggestion, suppressed_events: _, evicted } = answer;
        let pairs: usize = suggestion.rules.iter().map(|one| one.pairs).sum();
        let mut text = format!("# {} rules for {pairs} connections that were seen\n", suggestion.rules.len());
        // A String takes any text.
        if *evicted > 0 {
            let _ = writeln!(text, "# Incomplete: {evicted} kinds of connections made room for others");
        }
        for Reported { denial, why } in &suggestion.reported {
            let class = &denial.class;
            let _ = writeln!(
                text,
                "# no rule: {} {} {} pod {} port {}, {} packets: {why}",
                class.direction, class.protocol, class.external, class.pod, class.port, denial.count
            );
        }
        if suggestion.rules.is_empty() {
            return Ok(text);
        }
        let indent = if self.policy {
            let _ = write!(
                text,
                "apiVersion: {GROUP}/v1alpha1\nkind: BridgePolicy\nmetadata:\n  name: seen\nspec:\n  rules:\n"
            );
            "    "
        } else {
            text += "rules:\n";
            "  "
        };
        for Suggested { rule, pairs, count, first, last } in &suggestion.rules {
            let _ = writeln!(
                text,
                "{indent}# allows {pairs} connections, {pairs} were seen: {count} packets from {first} to {last}"
            );
            let list = serde_saphyr::to_string(&[rule]).map_err(|error| Error::Format(error.to_string()))?;
            for line in list.lines() {
                let _ = writeln!(text, "{indent}{line}");
            }
        }
        Ok(text)
    }
}
