//! Figures from runs: median, spread, and the ratio to no firewall at all.

use serde::Serialize;

use super::contender::Contender;
use super::traffic::Traffic;

/// The middle of several runs, and how far they were apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
    /// First and third quartile.
    pub(super) quartiles: (f64, f64),
}

impl Spread {
    /// `None`: no run.
    pub(super) fn of(runs: &[f64]) -> Option<Self> {
        let mut runs = runs.to_vec();
        runs.sort_by(f64::total_cmp);
        let (&least, &most) = (runs.first()?, runs.last()?);
        Some(Self {
            median: quantile(&runs, 0.5),
            least,
            most,
            quartiles: (quantile(&runs, 0.25), quantile(&runs, 0.75)),
        })
    }

    /// Half the distance of the quartiles, as a part of the median.
    pub(super) fn relative(&self) -> f64 {
        (self.quartiles.1 - self.quartiles.0) / 2.0 / self.median
    }
}

/// Between the two runs nearest to it, in proportion.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = part * (sorted.len() - 1) as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index of a small list")]
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (at - at.floor())
}

/// Result of a contender for one kind of traffic, at one number of rules.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) contender: Contender,
    pub(super) traffic: Traffic,
    pub(super) rules: u32,
    /// Rates, in the order of the rounds; or why there are none.
    pub(super) runs: Result<Vec<f64>, String>,
    /// Each divided by that of the reference in the same round.
    pub(super) ratios: Vec<f64>,
}

impl Figure {
    /// For instance `forward-established-10k-rules-fastpath`.
    pub(super) fn name(&self) -> String {
        let rules = match self.rules {
            thousands if thousands >= 1000 && thousands % 1000 == 0 => format!("{}k", thousands / 1000),
            rules => rules.to_string(),
        };
        format!("forward-{}-{rules}-rules-{}", self.traffic.key(), self.contender.key())
    }

    pub(super) fn rate(&self) -> Option<Spread> {
        Spread::of(self.runs.as_ref().ok()?)
    }

    pub(super) fn ratio(&self) -> Option<Spread> {
        Spread::of(&self.ratios)
    }

    /// As it is written to a file.
    pub(super) fn record(&self) -> Record {
        let (rate, ratio) = (self.rate(), self.ratio());
        let denied = Traffic::DENIED.contains(&self.traffic);
        Record {
            name: self.name(),
            contender: self.contender.key(),
            value: rate.map(|rate| rate.median),
            unit: self.traffic.unit(),
            ratio_to_no_firewall: ratio.filter(|_| !denied).map(|ratio| ratio.median),
            ratio_to_tc_drop: ratio.filter(|_| denied).map(|ratio| ratio.median),
            ratio_least: ratio.map(|ratio| ratio.least),
            ratio_most: ratio.map(|ratio| ratio.most),
            least: rate.map(|rate| rate.least),
            most: rate.map(|rate| rate.most),
            runs: self.runs.as_ref().map_or(0, Vec::len),
            missing: self.runs.as_ref().err().cloned(),
        }
    }
}

/// A figure in JSON.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    name: String,
    contender: &'static str,
    /// Median.
    value: Option<f64>,
    unit: &'static str,
    /// Median of the ratios of single rounds, not the ratio of the medians: a disturbed round is disturbed for both.
    ratio_to_no_firewall: Option<f64>,
    /// The same of denied traffic, whose reference is the bare drop at TC.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_to_tc_drop: Option<f64>,
    ratio_least: Option<f64>,
    ratio_most: Option<f64>,
    least: Option<f64>,
    most: Option<f64>,
    runs: usize,
    /// Why there is no value.
    #[serde(skip_serializing_if = "Option::is_none")]
    missing: Option<String>,
}

/// All figures of one run.
#[derive(Clone, Debug, Default)]
pub(super) struct Figures(pub(super) Vec<Figure>);

impl Figures {
    pub(super) fn get(&self, contender: Contender, traffic: Traffic, rules: u32) -> Option<&Figure> {
        self.0.iter().find(|f| (f.contender, f.traffic, f.rules) == (contender, traffic, rules))
    }

    /// The numbers of rules, ascending.
    pub(super) fn sizes(&self) -> Vec<u32> {
        let mut sizes: Vec<_> = self.0.iter().map(|figure| figure.rules).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// One contender's rates to another's, round by round.
    pub(super) fn between(&self, a: Contender, b: Contender, traffic: Traffic, rules: u32) -> Option<Spread> {
        let runs = |contender| self.get(contender, traffic, rules)?.runs.as_ref().ok();
        Spread::of(&divided(runs(a)?, runs(b)?))
    }
}

/// Element by element.
pub(super) fn divided(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a / b).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Contenders' rates in two rounds at a number of rules.
    pub(in super::super) fn figures(rates: &[(Contender, Traffic, u32, [f64; 2])]) -> Figures {
        let base = |traffic, rules| {
            rates.iter().find(|r| (r.0, r.1, r.2) == (Contender::None, traffic, rules)).map(|r| r.3)
        };
        let figure = |&(contender, traffic, rules, runs): &(Contender, Traffic, u32, [f64; 2])| Figure {
            contender,
            traffic,
            rules,
            runs: Ok(runs.to_vec()),
            ratios: base(traffic, rules).map(|base| divided(&runs, &base)).unwrap_or_default(),
        };
        Figures(rates.iter().map(figure).collect())
    }

    #[test]
    fn median_quartiles_and_ends() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0, 5.0]).unwrap();
        assert_eq!((spread.least, spread.median, spread.most), (1.0, 3.0, 5.0));
        assert_eq!(spread.quartiles, (2.0, 4.0));
        assert!((spread.relative() - 1.0 / 3.0).abs() < 1e-9);
        let even = Spread::of(&[1.0, 2.0]).unwrap();
        assert_eq!((even.median, even.quartiles), (1.5, (1.25, 1.75)));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn a_record_has_the_fields_that_readers_use() {
        let figures = figures(&[
            (Contender::None, Traffic::Established, 10_000, [100.0, 200.0]),
            (Contender::FastPath, Traffic::Established, 10_000, [150.0, 280.0]),
        ]);
        let json = serde_json::to_value(figures.0[1].record()).unwrap();
        assert_eq!(json["name"], "forward-established-10k-rules-fastpath");
        assert_eq!(json["contender"], "fastpath");
        assert_eq!(json["value"], 215.0);
        assert_eq!(json["unit"], "packets per CPU second");
        // Of 1.5 and 1.4: the second round was faster for both.
        assert_eq!(json["ratio_to_no_firewall"], 1.45);
    }

    #[test]
    fn a_missing_figure_has_a_reason() {
        let figure = Figure {
            contender: Contender::FastPath,
            traffic: Traffic::NewFlows,
            rules: 100,
            runs: Err("no such key".into()),
            ratios: Vec::new(),
        };
        let json = serde_json::to_value(figure.record()).unwrap();
        assert_eq!(json["name"], "forward-new-flows-100-rules-fastpath");
        assert_eq!(json["value"], serde_json::Value::Null);
        assert_eq!(json["missing"], "no such key");
    }
}
