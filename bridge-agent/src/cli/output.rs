//! Standard output and standard error: formats, colours, the progress line, and confirmation on a terminal.

use std::{
    ffi::OsStr,
    io::{self, BufRead as _, IsTerminal, Write},
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annotate_snippets::{Level, Renderer};
use clap::Args;
use serde::Serialize;

use super::{error::Error, progress, values::time};
use crate::{
    agent,
    config::{ConfigErrors, Diagnostics},
};

/// Format of results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
    /// A table with every column.
    Wide,
    /// A file, for `bugreport`.
    File(PathBuf),
}

/// Reads the value of `-o`.
pub(super) fn output(text: &str) -> Result<Output, String> {
    match text {
        "json" => Ok(Output::Json),
        "yaml" => Ok(Output::Yaml),
        "wide" => Ok(Output::Wide),
        file if file.contains(['.', '/']) => Ok(Output::File(file.into())),
        _ => Err("write json, yaml or wide; for bugreport a file such as report.tar.gz".to_owned()),
    }
}

/// Set once per process: machine-readable results are YAML instead of JSON.
static YAML: OnceLock<()> = OnceLock::new();

/// Lets [`print_json`] write YAML.
pub(super) fn choose_yaml() {
    YAML.get_or_init(|| ());
}

/// Whether the reader of standard output has closed it (`| head`).
static READER_LEFT: AtomicBool = AtomicBool::new(false);

/// Whether a command that prints for ever ends.
pub(super) fn reader_left() -> bool {
    READER_LEFT.load(Ordering::Relaxed)
}

/// Whether a stream gets colours: it is a terminal, and `NO_COLOR` is unset or empty (no-color.org).
pub(crate) fn colours(terminal: bool, no_color: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Renders diagnostics for standard error.
pub(super) fn renderer() -> Renderer {
    let styled = colours(io::stderr().is_terminal(), std::env::var_os("NO_COLOR").as_deref());
    if styled { Renderer::styled() } else { Renderer::plain() }
}

/// Shows findings in a configuration.
pub(super) fn print_diagnostics(diagnostics: &Diagnostics) -> Result<(), Error> {
    to_stderr(&diagnostics.render(&renderer()))
}

/// Shows an error: for people on standard error, with `json` as an object on standard output.
pub fn show(error: &Error, json: bool) {
    if matches!(error, Error::Silent | Error::NoAgent | Error::ChangesDue) {
        // The result is printed already.
        return;
    }
    // Where neither stream can be written to, the exit code is all that is left.
    let _ = if json { print_json(&to_json(error)) } else { print_error(error) };
}

fn to_json(error: &Error) -> serde_json::Value {
    match error {
        Error::Config(ConfigErrors(Diagnostics { list, left_off }))
        | Error::Agent(agent::Error::Config(ConfigErrors(Diagnostics { list, left_off }))) => {
            serde_json::json!({ "ok": false, "diagnostics": list, "leftOff": left_off })
        }
        other => serde_json::json!({ "ok": false, "error": other.to_string(), "help": other.help() }),
    }
}

fn print_error(error: &Error) -> Result<(), Error> {
    match error {
        Error::Config(errors) | Error::Agent(agent::Error::Config(errors)) => print_diagnostics(&errors.0),
        other => {
            let message = other.to_string();
            let title = Level::ERROR.primary_title(&message);
            let group = match other.help() {
                Some(help) => title.element(Level::HELP.message(help)),
                None => annotate_snippets::Group::with_title(title),
            };
            to_stderr(&format!("{}\n", renderer().render(&[group])))
        }
    }
}

pub(super) fn to_stderr(text: &str) -> Result<(), Error> {
    progress::end();
    let written = io::stderr().lock().write_all(text.as_bytes());
    written.map_err(|source| Error::Stream { action: "cannot write to standard error", source })
}

/// Prints a result as JSON, or as YAML with `-o yaml`.
pub(super) fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<(), Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Format(error.to_string());
    if YAML.get().is_some() {
        // By way of JSON: both formats have the same fields.
        let value = serde_json::to_value(value).map_err(|error| failed(&error))?;
        let text = serde_saphyr::to_string(&value).map_err(|error| failed(&error))?;
        return print(&format!("---\n{}\n", text.trim_end()));
    }
    let text = serde_json::to_string_pretty(value).map_err(|error| failed(&error))?;
    print(&format!("{text}\n"))
}

/// Prints a result. A reader that has closed the pipe is no failure.
pub(super) fn print(text: &str) -> Result<(), Error> {
    progress::end();
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            READER_LEFT.store(true, Ordering::Relaxed);
            Ok(())
        }
        Err(source) => Err(Error::Stream { action: "cannot write to standard output", source }),
        Ok(()) => Ok(()),
    }
}

/// Asks on a terminal whether to do something that cannot be undone. Scripts, whose standard input is no terminal, have decided.
pub(super) fn confirmed(question: &str) -> Result<(), Error> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Ok(());
    }
    to_stderr(&format!("{question} [y/N] "))?;
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    read.map_err(|source| Error::Stream { action: "cannot read standard input", source })?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Error::NotDone),
    }
}

/// `--watch`: shows a table again and again.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Watch {
    /// Show it again every 2 seconds, or every TIME, until interrupted
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "2s",
        value_parser = time)]
    watch: Option<Duration>,
}

impl Watch {
    /// Whether the table is shown again.
    pub(super) const fn is_on(&self) -> bool {
        self.watch.is_some()
    }

    /// Runs `show` once, or for ever at the chosen interval.
    pub(super) fn repeat(&self, mut show: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
        let Some(interval) = self.watch else { return show() };
        let clears = io::stdout().is_terminal();
        loop {
            if clears {
                // Cursor to the top left, then erase to the end of the screen.
                print("\x1b[H\x1b[J")?;
            }
            show()?;
            if reader_left() {
                return Ok(());
            }
            std::thread::sleep(interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_needs_a_terminal_and_no_no_color() {
        assert!(colours(true, None));
        assert!(colours(true, Some(OsStr::new(""))), "no-color.org: present and not empty");
        assert!(!colours(true, Some(OsStr::new("1"))));
        assert!(!colours(false, None));
    }

    #[test]
    fn an_unknown_output_names_the_known_ones() {
        assert_eq!(output("yaml"), Ok(Output::Yaml));
        assert_eq!(output("report.tar.gz"), Ok(Output::File("report.tar.gz".into())));
        assert!(output("yml").unwrap_err().contains("json, yaml or wide"));
    }
}
