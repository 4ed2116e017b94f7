//! The run: all contenders in turn, round after round, so that other load on the machine falls on all alike.

use anyhow::Result;

use super::beside::Beside;
use super::contender::Contender;
use super::figures::{Figure, Figures, divided};
use super::place::Place;
use super::traffic::{Effort, MANY, Traffic};

/// Scope and thoroughness of the comparison.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    pub(super) sizes: Vec<u32>,
    /// The first is the reference of the others.
    pub(super) contenders: Vec<Contender>,
    pub(super) traffic: Vec<Traffic>,
    pub(super) rounds: usize,
    pub(super) effort: Effort,
    /// Whether new connections beside a flood of denied packets are measured, too.
    pub(super) beside: bool,
}

/// Runs it. A contender that cannot take part is there with the reason.
///
/// # Errors
/// No lab, or traffic that does not come through with the first contender.
pub(super) fn compare(scope: &Scope) -> Result<(Figures, Vec<Beside>)> {
    let (mut figures, mut besides) = (Figures::default(), Vec::new());
    for rules in &scope.sizes {
        eprintln!("measuring: {rules} rules");
        let (of_size, beside) = at_size(scope, *rules)?;
        figures.0.extend(of_size);
        besides.extend(beside);
    }
    Ok((figures, besides))
}

fn at_size(scope: &Scope, rules: u32) -> Result<(Vec<Figure>, Vec<Beside>)> {
    let mut contestants: Vec<Contestant> = Vec::new();
    for &contender in &scope.contenders {
        let place = match contender.missing(rules)? {
            Some(why) => Err(why),
            None if contender == scope.contenders[0] => Ok(Place::new(contender, rules)?),
            None => Place::new(contender, rules).map_err(|error| format!("{error:#}")),
        };
        contestants.push((contender, place));
    }
    let mut runs = vec![vec![Vec::new(); scope.traffic.len()]; contestants.len()];
    let mut besides: Vec<_> = scope.contenders.iter().map(|one| Beside::new(*one, rules)).collect();
    for round in 0..scope.rounds {
        if scope.traffic.iter().any(|traffic| traffic.needs_flows()) {
            in_turn(&mut contestants, round, |_, place| place.establish(MANY))?;
        }
        for (kind, traffic) in scope.traffic.iter().enumerate() {
            // One kind after the other, so that the same seconds are compared.
            in_turn(&mut contestants, round + kind, |index, place| {
                runs[index][kind].push(traffic.sample(place, &scope.effort)?);
                Ok(())
            })?;
        }
        if scope.beside {
            in_turn(&mut contestants, round, |index, place| besides[index].sample(place, &scope.effort))?;
        }
        in_turn(&mut contestants, round, |_, place| place.forget())?;
    }
    let base = runs[0].clone();
    let mut figures = Vec::new();
    for ((contender, contestant), runs) in contestants.into_iter().zip(runs) {
        for ((&traffic, runs), base) in scope.traffic.iter().zip(runs).zip(&base) {
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
    besides.retain(|beside| !beside.is_empty());
    Ok((figures, besides))
}

/// A contender, and its lab or the reason why it has none.
type Contestant = (Contender, Result<Place, String>);

/// Runs `work` with every contender; the order rotates. A contender that fails does not stop the others, but without
/// the first one there is nothing to compare with.
fn in_turn(
    contestants: &mut [Contestant],
    time: usize,
    mut work: impl FnMut(usize, &mut Place) -> Result<()>,
) -> Result<()> {
    for turn in 0..contestants.len() {
        let index = (time + turn) % contestants.len();
        let (_, contestant) = &mut contestants[index];
        let Ok(place) = contestant else { continue };
        match work(index, place) {
            Ok(()) => {}
            Err(error) if index == 0 => return Err(error),
            Err(error) => *contestant = Err(format!("{error:#}")),
        }
    }
    Ok(())
}
