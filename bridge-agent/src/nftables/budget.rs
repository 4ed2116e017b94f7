//! The size of a policy that nftables can apply in time. Pure.

use super::error::Error;
use super::render;
use super::render::Options;
use crate::model::Policy;

/// The most elements of all sets: 10,000 take about half a second to write.
pub const MAX_ELEMENTS: usize = 60_000;
/// The most lookups of one kind for a new flow.
const MAX_LAYERS: usize = 64;

/// Checks the size of a policy.
///
/// # Errors
/// [`Error::TooManyElements`] and [`Error::TooManyLayers`], with the figure.
pub fn check(policy: &Policy) -> Result<(), Error> {
    // Counted first: lists of addresses multiply.
    let (elements, most) = render::count(policy);
    if elements > MAX_ELEMENTS {
        let rule = most.map(|rule| rule.name.clone()).unwrap_or_default();
        return Err(Error::TooManyElements { elements, limit: MAX_ELEMENTS, rule });
    }
    let rules = render::ruleset(policy, &Options::default());
    let layer = |name: &String| name.rsplit('-').next().and_then(|number| number.parse::<usize>().ok());
    let maps = rules.maps.iter().filter(|(_, map)| map.counts);
    let layers = maps.filter_map(|(name, _)| layer(name)).max().map_or(0, |last| last + 1);
    if layers > MAX_LAYERS {
        return Err(Error::TooManyLayers { layers, limit: MAX_LAYERS });
    }
    Ok(())
}
