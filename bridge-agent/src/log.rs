//! Logs on standard error, for people or for machines.

use std::io::{IsTerminal, stderr};

use clap::ValueEnum;
use tracing::Subscriber;
use tracing_subscriber::filter::{EnvFilter, LevelFilter, ParseError};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter is not one of tracing's.
    #[error(
        "`{filter}` is no log level: {source}; write error, warn, info, debug or trace, or target=level,..."
    )]
    Filter {
        /// The given filter.
        filter: String,
        /// The fault.
        source: ParseError,
    },
    /// A word that tracing would take for a target, which silences every other one.
    #[error("`{0}` is no log level; write error, warn, info, debug or trace, or target=level,...")]
    Level(String),
    /// Something else in this process logs already.
    #[error("logging is already set up: {0}")]
    Taken(#[from] TryInitError),
}

/// Sends the logs of this process to standard error. `filter` is a level, or tracing's `target=level,...`.
///
/// # Errors
/// If `filter` is not a filter, or logging is set up already.
pub fn init(format: Format, filter: &str) -> Result<(), Error> {
    // The journal has a time for every line and shows no colours.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let style = Style { colours: stderr().is_terminal() && !journal && !plain, time: !journal };
    // Users of the log crate (the log of the eBPF programs is one) are included.
    Ok(subscriber(format, filter, style, stderr)?.try_init()?)
}

/// Whether a part of a filter is a level, or names a target or span and its level.
fn is_directive(part: &str) -> bool {
    part.contains('=') || !part.is_empty() && part.parse::<LevelFilter>().is_ok()
}

#[derive(Clone, Copy)]
struct Style {
    colours: bool,
    time: bool,
}

fn subscriber<W>(
    format: Format,
    filter: &str,
    style: Style,
    writer: W,
) -> Result<impl Subscriber + use<W>, Error>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    if let Some(word) = filter.split(',').map(str::trim).find(|part| !is_directive(part)) {
        return Err(Error::Level(word.to_owned()));
    }
    let filter =
        EnvFilter::try_new(filter).map_err(|source| Error::Filter { filter: filter.to_owned(), source })?;
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(style.colours);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match (format, style.time) {
        (Format::Json, _) => Box::new(lines.json().flatten_event(true).with_current_span(false)),
        (Format::Text, true) => Box::new(lines.with_target(false)),
        (Format::Text, false) => Box::new(lines.with_target(false).without_time()),
    };
    Ok(tracing_subscriber::registry().with(lines).with(filter))
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: Format, filter: &str) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let style = Style { colours: false, time: false };
        let subscriber = subscriber(format, filter, style, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(rules = 3, "policy switched");
            tracing::debug!("detail");
        });
        String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn text_is_one_line_per_event_above_the_level() {
        assert_eq!(logged(Format::Text, "info").trim(), "INFO policy switched rules=3");
        assert_eq!(logged(Format::Text, "debug").lines().count(), 2);
        assert_eq!(logged(Format::Text, "error"), "");
    }

    #[test]
    fn json_is_one_object_per_event() {
        let line: serde_json::Value = serde_json::from_str(&logged(Format::Json, "info")).unwrap();
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["message"], "policy switched");
        assert_eq!(line["rules"], 3);
        assert!(line["timestamp"].is_string());
    }

    #[test]
    fn a_wrong_filter_says_what_to_write() {
        let style = Style { colours: false, time: false };
        for wrong in
            ["bridge_agent=loud", "loud", "", "info,loud", "bridge_agent", "warn,bridge_agent=info,x"]
        {
            let error = subscriber(Format::Text, wrong, style, io::sink).err().unwrap();
            assert!(error.to_string().contains("write error, warn, info, debug or trace"), "{error}");
        }
        for right in ["info", "WARN", "off", "warn,bridge_agent=debug", "bridge_agent=trace"] {
            assert!(subscriber(Format::Text, right, style, io::sink).is_ok(), "{right}");
        }
    }
}
