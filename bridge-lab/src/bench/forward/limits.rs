//! The project's promises of speed, and whether this run met them.

use super::contender::Contender;
use super::figures::{Figures, Spread};
use super::traffic::Traffic;

/// A promise.
#[derive(Clone, Debug, PartialEq)]
pub struct Limit {
    /// The promise in words.
    pub promise: String,
    /// `None`: not in this run.
    pub measured: Option<f64>,
    /// Bound on the measured value.
    pub limit: Bound,
}

/// Kind of bound on a measured value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// It may be more.
    AtLeast(f64),
    /// It may be less.
    AtMost(f64),
}

impl Limit {
    /// Whether it was kept; `None`: it was not measured.
    #[must_use]
    pub fn holds(&self) -> Option<bool> {
        let measured = self.measured?;
        Some(match self.limit {
            Bound::AtLeast(limit) => measured >= limit,
            Bound::AtMost(limit) => measured <= limit,
        })
    }

    /// A line for people.
    #[must_use]
    pub fn line(&self) -> String {
        let verdict = match self.holds() {
            Some(true) => "ok",
            Some(false) => "MISSED",
            None => "not measured",
        };
        let limit = match self.limit {
            Bound::AtLeast(limit) => format!("at least {limit:.2}"),
            Bound::AtMost(limit) => format!("at most {limit:.2}"),
        };
        let measured = self.measured.map_or_else(String::new, |measured| format!("{measured:.2}, "));
        format!("{verdict:<12} {}: {measured}{limit}", self.promise)
    }
}

/// Those that a comparison can show.
pub(super) fn limits(figures: &Figures) -> Vec<Limit> {
    use Contender::{Ebpf, FastPath, None as NoFirewall};
    const MANY: u32 = 10_000;
    let ratio = |contender, traffic, rules| figures.get(contender, traffic, rules)?.ratio();
    let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
    let mut limits = Vec::new();
    let mut at_least = |promise: String, measured: Option<f64>, limit: f64| {
        limits.push(Limit { promise, measured, limit: Bound::AtLeast(limit) });
    };
    for traffic in [Traffic::Established, Traffic::EstablishedMany] {
        at_least(
            format!("fast path to no firewall, {MANY} rules, {}", traffic.title()),
            median(ratio(FastPath, traffic, MANY)),
            1.4,
        );
    }
    for traffic in [Traffic::Bulk, Traffic::RequestResponse] {
        // Of both: either may have been disturbed.
        let spread = |contender| figures.get(contender, traffic, MANY)?.rate();
        let noise = spread(NoFirewall).zip(spread(FastPath)).map(|(a, b)| a.relative() + b.relative());
        at_least(
            format!("fast path to no firewall beyond the spread, {MANY} rules, {}", traffic.title()),
            median(ratio(FastPath, traffic, MANY)),
            1.0 - noise.unwrap_or(0.0),
        );
    }
    for traffic in [Traffic::Established, Traffic::EstablishedMany] {
        at_least(
            format!("without the fast path to no firewall, {MANY} rules, {}", traffic.title()),
            median(ratio(Ebpf, traffic, MANY)),
            0.9,
        );
    }
    limits.extend(new_flows(figures));
    limits
}

/// Those of new flows.
pub(super) fn new_flows(figures: &Figures) -> Vec<Limit> {
    use Contender::{Ebpf, EbpfNftables, FastPath, IptablesLegacy, Nftables, NftablesSet};
    let mut limits = Vec::new();
    for (other, limit) in [(IptablesLegacy, 4.0), (NftablesSet, 1.3)] {
        for own in [FastPath, Ebpf] {
            limits.push(Limit {
                promise: format!("new flows at 1000 rules, {} to {}", own.title(), other.title()),
                measured: figures.between(own, other, Traffic::NewFlows, 1000).map(|ratio| ratio.median),
                limit: Bound::AtLeast(limit),
            });
        }
    }
    let many = figures.get(EbpfNftables, Traffic::NewFlows, 10_000);
    limits.push(Limit {
        promise: format!("new flows at 10000 rules, {} to no firewall", EbpfNftables.title()),
        measured: many.and_then(|figure| figure.ratio()).map(|ratio| ratio.median),
        limit: Bound::AtLeast(0.25),
    });
    let alone = figures.between(Nftables, NftablesSet, Traffic::NewFlows, 10_000);
    limits.push(Limit {
        promise: format!("new flows at 10000 rules, {} to {}", Nftables.title(), NftablesSet.title()),
        measured: alone.map(|ratio| ratio.median),
        limit: Bound::AtLeast(1.0),
    });
    limits
}

/// Those of denied packets.
pub(super) fn denied(figures: &Figures) -> Vec<Limit> {
    use Contender::{Ebpf, IptablesRaw, Shield, TcDrop, XdpDrop};
    let mut limits = Vec::new();
    for traffic in [Traffic::DeniedUdp, Traffic::DeniedSyn] {
        for (own, base, limit) in [(Ebpf, TcDrop, 0.9), (Ebpf, IptablesRaw, 1.0), (Shield, XdpDrop, 0.5)] {
            limits.push(Limit {
                promise: format!("1000 rules, {} to {}, {}", own.title(), base.title(), traffic.title()),
                measured: figures.between(own, base, traffic, 1000).map(|ratio| ratio.median),
                limit: Bound::AtLeast(limit),
            });
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::figures;
    use super::*;

    fn lines(figures: &Figures, word: &str) -> Vec<String> {
        limits(figures).iter().map(Limit::line).filter(|line| line.contains(word)).collect()
    }

    #[test]
    fn a_ratio_is_held_against_its_limit() {
        let rates = |fast| {
            figures(&[
                (Contender::None, Traffic::Established, 10_000, [100.0, 100.0]),
                (Contender::FastPath, Traffic::Established, 10_000, [fast, fast]),
            ])
        };
        let word = "fast path to no firewall, 10000 rules, established, 1 flow";
        assert!(lines(&rates(141.0), word)[0].starts_with("ok"));
        assert!(lines(&rates(139.0), word)[0].starts_with("MISSED"));
        assert!(lines(&Figures::default(), word)[0].starts_with("not measured"));
    }

    #[test]
    fn bulk_may_be_slower_by_the_spread_of_the_run_and_no_more() {
        let rates = |fast: f64| {
            figures(&[
                (Contender::None, Traffic::Bulk, 10_000, [90.0, 110.0]),
                (Contender::FastPath, Traffic::Bulk, 10_000, [fast * 0.9, fast * 1.1]),
            ])
        };
        // Quartiles 95 and 105, so 5 % on either side.
        assert!(lines(&rates(91.0), "bulk")[0].starts_with("ok"));
        assert!(lines(&rates(89.0), "bulk")[0].starts_with("MISSED"));
    }

    #[test]
    fn new_flows_are_compared_with_the_usual_alternatives() {
        let figures = figures(&[
            (Contender::IptablesLegacy, Traffic::NewFlows, 1000, [10.0, 10.0]),
            (Contender::NftablesSet, Traffic::NewFlows, 1000, [40.0, 40.0]),
            (Contender::Ebpf, Traffic::NewFlows, 1000, [50.0, 50.0]),
        ]);
        let lines = lines(&figures, "bridge, eBPF to");
        assert!(lines[0].starts_with("ok") && lines[0].contains("5.00"), "{lines:?}");
        assert!(lines[1].starts_with("MISSED") && lines[1].contains("1.25"), "{lines:?}");
    }
}
