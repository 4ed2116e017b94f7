//! A line on the terminal while a command takes longer than a second.

use std::{
    io::{IsTerminal as _, Write as _, stderr},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use crate::kernel::lock::lock;

/// Time until the first line, and between two.
const INTERVAL: Duration = Duration::from_secs(1);

/// State of the one progress line of this process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Line {
    Pending,
    Shown,
    Ended,
}

static LINE: Mutex<Line> = Mutex::new(Line::Pending);

/// Shows `task` with its seconds, from its second second on until [`end`]. Shows nothing where standard error is no terminal.
pub(super) fn start(task: &'static str) {
    if !stderr().is_terminal() {
        return;
    }
    let begin = Instant::now();
    thread::spawn(move || {
        loop {
            thread::sleep(INTERVAL);
            let mut line = lock(&LINE);
            if *line == Line::Ended {
                return;
            }
            let text = format!("\r\x1b[K{task}: {} s", begin.elapsed().as_secs());
            // A terminal that has closed shows no progress.
            drop(stderr().lock().write_all(text.as_bytes()));
            *line = Line::Shown;
        }
    });
}

/// Erases the line, before other output.
pub(super) fn end() {
    let mut line = lock(&LINE);
    if *line == Line::Shown {
        drop(stderr().lock().write_all(b"\r\x1b[K"));
    }
    *line = Line::Ended;
}
