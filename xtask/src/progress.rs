//! Shows that a silent task still runs.

use std::{
    io::{IsTerminal, Write, stderr},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Tasks that end sooner show nothing.
const DELAY: Duration = Duration::from_secs(1);
/// Time between two lines where standard error is no terminal.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// A line on standard error with the name of a task and its time. Dropping it ends the display.
pub(crate) struct Progress {
    thread: Option<JoinHandle<()>>,
    // Dropped before the thread is joined: that ends it.
    end: Option<Sender<()>>,
}

impl Progress {
    /// Shows `task` on a terminal as one line that is redrawn every second, elsewhere as a line a minute.
    pub(crate) fn of(task: impl Into<String>) -> Self {
        if stderr().is_terminal() { Self::start(task.into(), DELAY, Redrawn) } else { Self::lines(task) }
    }

    /// Shows `task` as a line a minute, beside other output.
    pub(crate) fn lines(task: impl Into<String>) -> Self {
        Self::start(task.into(), LOG_INTERVAL, Line)
    }

    fn start(task: String, interval: Duration, mut display: impl Display) -> Self {
        let (end, ended) = mpsc::channel();
        let begin = Instant::now();
        let thread = thread::spawn(move || {
            let (mut pause, mut shown) = (DELAY, false);
            while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                display.show(&format!("{task}: {} s", begin.elapsed().as_secs()));
                (pause, shown) = (interval, true);
            }
            if shown {
                display.finish();
            }
        });
        Self { thread: Some(thread), end: Some(end) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A display that panicked must not fail the task.
            drop(thread.join());
        }
    }
}

trait Display: Send + 'static {
    fn show(&mut self, line: &str);
    fn finish(&mut self) {}
}

struct Line;

impl Display for Line {
    fn show(&mut self, line: &str) {
        eprintln!("{line}");
    }
}

/// Writes over its last line (ECMA-48, EL).
struct Redrawn;

impl Display for Redrawn {
    fn show(&mut self, line: &str) {
        // A display that cannot be written to is no reason to stop.
        drop(write!(stderr(), "\r{line}\x1b[K"));
    }

    fn finish(&mut self) {
        drop(write!(stderr(), "\r\x1b[K"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Recorded(Arc<Mutex<Vec<String>>>);

    impl Display for Recorded {
        fn show(&mut self, line: &str) {
            self.0.lock().unwrap().push(line.to_owned());
        }

        fn finish(&mut self) {
            self.0.lock().unwrap().push("end".to_owned());
        }
    }

    #[test]
    fn a_task_of_more_than_a_second_is_shown_until_it_ends() {
        let lines = Recorded::default();
        let progress = Progress::start("linking".into(), Duration::from_secs(3600), lines.clone());
        let deadline = Instant::now() + Duration::from_secs(60);
        while lines.0.lock().unwrap().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        drop(progress);
        let lines = lines.0.lock().unwrap();
        assert!(lines[0].starts_with("linking: "), "{lines:?}");
        assert_eq!(lines[1..], ["end"]);
    }

    #[test]
    fn a_short_task_shows_nothing_and_is_not_delayed() {
        let (lines, begin) = (Recorded::default(), Instant::now());
        drop(Progress::start("linking".into(), DELAY, lines.clone()));
        assert!(begin.elapsed() < DELAY);
        assert!(lines.0.lock().unwrap().is_empty());
    }
}
