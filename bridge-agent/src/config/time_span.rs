//! Durations as they are written: `30s`, `1h30m`, `500ms`.

use std::fmt;
use std::time::Duration;

use super::leaf::{Leaf, Problem, has_leading_zero, leaf};

/// A duration, from 1 ms to 365 days, in whole milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimeSpan(Duration);

leaf!(TimeSpan);

/// Units by their suffix, the longest first.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
const MOST: Duration = Duration::from_secs(365 * 86_400);

impl TimeSpan {
    /// A span of whole seconds.
    #[must_use]
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// The duration.
    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl Leaf for TimeSpan {
    const FORMAT: &'static str = "time-span";
    const EXAMPLE: &'static str = "30s";

    fn parse(text: &str) -> Result<Self, Problem> {
        const HELP: &str = "write a number and a unit (ms, s, m, h, d), such as 30s, 5m or 1h30m";
        let bad = || {
            let help = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
                format!("say the unit: {text}s for seconds")
            } else {
                HELP.into()
            };
            Problem::new(format!("`{text}` is not a duration"), help)
        };
        let mut rest = text;
        let (mut total, mut before): (u64, u64) = (0, u64::MAX);
        if rest.is_empty() {
            return Err(bad());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let (digits, after) = rest.split_at(digits);
            let number: u64 = digits.parse().map_err(|_| bad())?;
            let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
            let (letters, after) = after.split_at(letters);
            let (unit, scale) = *UNITS.iter().find(|(unit, _)| *unit == letters).ok_or_else(bad)?;
            if has_leading_zero(digits) {
                let message =
                    format!("`{digits}` in `{text}` has a leading zero, which some readers take for octal");
                return Err(Problem::new(message, format!("write {number}{unit} if it is decimal")));
            }
            if scale >= before {
                let message = format!("the units of `{text}` are not in order");
                return Err(Problem::new(message, "write each unit once, the largest first, such as 1h30m"));
            }
            (rest, before) = (after, scale);
            total = number.checked_mul(scale).and_then(|part| total.checked_add(part)).ok_or_else(bad)?;
        }
        let span = Duration::from_millis(total);
        if span.is_zero() || span > MOST {
            return Err(Problem::new(
                format!("the duration `{text}` is out of bounds"),
                "write one from 1ms to 365d",
            ));
        }
        Ok(Self(span))
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_millis();
        for (unit, scale) in UNITS {
            let count = rest / u128::from(scale);
            if count > 0 {
                write!(f, "{count}{unit}")?;
                rest %= u128::from(scale);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_add_up_and_print_back() {
        for (text, seconds, printed) in
            [("30s", 30, "30s"), ("120s", 120, "2m"), ("1h30m", 5400, "1h30m"), ("24h", 86_400, "1d")]
        {
            let span = TimeSpan::parse(text).unwrap();
            assert_eq!(span.duration(), Duration::from_secs(seconds));
            assert_eq!(span.to_string(), printed);
            assert_eq!(TimeSpan::parse(printed), Ok(span));
        }
        assert_eq!(TimeSpan::parse("1500ms").unwrap().to_string(), "1s500ms");
    }

    #[test]
    fn a_bare_number_is_told_to_say_its_unit() {
        assert_eq!(TimeSpan::parse("30").unwrap_err().help, "say the unit: 30s for seconds");
        assert_eq!(TimeSpan::parse("05s").unwrap_err().help, "write 5s if it is decimal");
        for bad in [
            "5s5s",
            "1m1h",
            "1h007m",
            "",
            "s",
            "-1s",
            "1.5s",
            "1 s",
            "30S",
            "0s",
            "366d",
            "1y",
            "5s5",
            "99999999999999999999d",
        ] {
            assert!(TimeSpan::parse(bad).is_err(), "{bad:?}");
        }
    }
}
