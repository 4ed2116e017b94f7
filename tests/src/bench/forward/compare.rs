//! The run: everybody in turn, round after round, so that what else the machine does falls on all alike.

use anyhow::{Context as _, Result};

use super::contender::Contender;
use super::figures::{Figure, Figures, divided};
use super::place::Place;
use super::traffic::{Effort, MANY, Traffic};

/// What is compared, and how thoroughly.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    pub(super) sizes: Vec<u32>,
    pub(super) rounds: usize,
    pub(super) effort: Effort,
}

/// Runs it. A contender that cannot take part is there with the reason.
///
/// # Errors
/// No lab, or traffic that does not come through without a firewall.
pub(super) fn compare(scope: &Scope) -> Result<Figures> {
    let mut figures = Figures::default();
    for rules in &scope.sizes {
        eprintln!("measuring: forward, {rules} rules");
        figures.0.extend(at_size(scope, *rules)?);
    }
    Ok(figures)
}

fn at_size(scope: &Scope, rules: u32) -> Result<Vec<Figure>> {
    let mut contestants = Vec::new();
    for contender in Contender::ALL {
        let place = match contender.missing(rules)? {
            Some(why) => Err(why),
            None if contender == Contender::None => Ok(Place::new(contender, rules)?),
            None => Place::new(contender, rules).map_err(|error| format!("{error:#}")),
        };
        contestants.push((contender, place));
    }
    let mut runs = vec![[(); Traffic::ALL.len()].map(|()| Vec::new()); contestants.len()];
    for round in 0..scope.rounds {
        for turn in 0..contestants.len() {
            // Each is first as often as the others.
            let index = (round + turn) % contestants.len();
            let (contender, contestant) = &mut contestants[index];
            let Ok(place) = contestant else { continue };
            match one_round(place, scope) {
                Ok(rates) => runs[index].iter_mut().zip(rates).for_each(|(runs, rate)| runs.push(rate)),
                Err(error) if *contender == Contender::None => return Err(error),
                // What it cannot do, the others are not kept from.
                Err(error) => *contestant = Err(format!("{error:#}")),
            }
        }
    }
    let base = runs[0].clone();
    let mut figures = Vec::new();
    for ((contender, contestant), runs) in contestants.into_iter().zip(runs) {
        for ((traffic, runs), base) in Traffic::ALL.into_iter().zip(runs).zip(&base) {
            let (runs, ratios) = match &contestant {
                Ok(_) => (Ok(runs.clone()), divided(&runs, base)),
                Err(why) => (Err(why.clone()), Vec::new()),
            };
            figures.push(Figure { contender, traffic, rules, runs, ratios });
        }
        if let Err(why) = contestant {
            eprintln!("missing at {rules} rules: {}: {why}", contender.title());
        }
    }
    Ok(figures)
}

/// Every kind of traffic once, in the order of [`Traffic::ALL`].
fn one_round(place: &mut Place, scope: &Scope) -> Result<Vec<f64>> {
    place.establish(MANY)?;
    let rates = Traffic::ALL.into_iter().map(|traffic| traffic.sample(place, &scope.effort)).collect();
    place.forget().context("forget connections")?;
    rates
}
