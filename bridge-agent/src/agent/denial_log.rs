//! Denied packets as lines of the system log (syslog(3), RFC 3164).

use std::{
    fmt::Write as _,
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use crate::{config::Syslog, datapath::Verdict};

/// Facility daemon, severity warning.
const PRIORITY: u8 = 3 << 3 | 4;
const SECOND: Duration = Duration::from_secs(1);

/// Writes at most a number of lines per second, and never waits for the reader.
#[derive(Debug)]
pub(super) struct DenialLog {
    settings: Syslog,
    socket: Option<UnixDatagram>,
    /// Start of the second in which `written` lines were written.
    since: Instant,
    written: u32,
    /// Denials without a line since the last line.
    left_out: u64,
}

impl DenialLog {
    /// Returns the log for these settings: the one before, if they are the same.
    pub(super) fn following(before: Option<Self>, settings: Option<&Syslog>) -> Option<Self> {
        let settings = settings?;
        before.filter(|log| log.settings == *settings).or_else(|| Some(Self::new(settings.clone())))
    }

    fn new(settings: Syslog) -> Self {
        Self { settings, socket: None, since: Instant::now(), written: 0, left_out: 0 }
    }

    pub(super) fn note(&mut self, verdict: &Verdict) {
        if verdict.verdict == "allow" {
            return;
        }
        self.left_out += u64::from(verdict.suppressed);
        if self.since.elapsed() >= SECOND {
            (self.since, self.written) = (Instant::now(), 0);
        }
        if self.written >= self.settings.rate || !self.send(&line(verdict, self.left_out)) {
            self.left_out += 1;
            return;
        }
        self.written += 1;
        self.left_out = 0;
    }

    /// Returns whether the system log took the line. A log that was restarted has another socket at the same path.
    fn send(&mut self, line: &str) -> bool {
        for _ in 0..2 {
            if self.socket.is_none() {
                self.socket = self.connect().ok();
            }
            match self.socket.as_ref().map(|socket| socket.send(line.as_bytes())) {
                Some(Ok(_)) => return true,
                // It reads too slowly.
                Some(Err(error)) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
                Some(Err(_)) => self.socket = None,
                None => return false,
            }
        }
        false
    }

    fn connect(&self) -> std::io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.connect(&self.settings.socket)?;
        Ok(socket)
    }
}

/// The fields by the names that `monitor --json` uses; the system log adds the time.
fn line(verdict: &Verdict, left_out: u64) -> String {
    let Verdict {
        time: _,
        verdict,
        reason,
        direction,
        protocol,
        source,
        source_port,
        destination,
        destination_port,
        rule,
        interface,
        length,
        detail,
        generation,
        suppressed: _,
    } = verdict;
    let mut line = format!(
        "<{PRIORITY}>bridge-agent[{}]: verdict={verdict} reason={reason} direction={direction} protocol={protocol} \
         source={source} sourcePort={source_port} destination={destination} destinationPort={destination_port}",
        std::process::id()
    );
    // Writing to a string does not fail.
    if let Some(rule) = rule {
        _ = write!(line, " rule={}", escaped(rule));
    }
    _ = write!(
        line,
        " interface={} length={length} detail={detail} generation={generation}",
        escaped(interface)
    );
    if left_out > 0 {
        _ = write!(line, " suppressed={left_out}");
    }
    line
}

/// A value that forges no field and no line.
fn escaped(value: &str) -> String {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '=' | '\\');
    if value.chars().all(plain) { value.to_owned() } else { format!("{value:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(rule: Option<&str>) -> Verdict {
        Verdict { rule: rule.map(ToOwned::to_owned), ..Verdict::sample() }
    }

    #[test]
    fn a_line_names_its_fields() {
        let text = line(&verdict(None), 0);
        let (head, fields) = text.split_once(": ").unwrap();
        assert!(head.starts_with("<28>bridge-agent["), "{head}");
        assert_eq!(
            fields,
            "verdict=reject reason=no_rule direction=inbound protocol=tcp source=192.168.31.67 sourcePort=50000 \
             destination=10.200.1.91 destinationPort=22 interface=eth0 length=74 detail=2 generation=1"
        );
    }

    #[test]
    fn names_forge_no_field_and_no_line() {
        let text = line(&verdict(Some("ns/a b=\"\n<13>x")), 3);
        assert!(text.contains("rule=\"ns/a b=\\\"\\n<13>x\" interface=") && !text.contains('\n'), "{text}");
        assert!(text.ends_with(" suppressed=3"), "{text}");
    }

    #[test]
    fn lines_are_limited_counted_and_never_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let settings = Syslog { socket: crate::config::AbsolutePath(path.clone()), rate: 3 };
        let mut log = DenialLog::new(settings);
        log.note(&verdict(None));
        let reader = UnixDatagram::bind(&path).unwrap();
        reader.set_nonblocking(true).unwrap();
        let read = || {
            let mut buffer = [0; 1024];
            let length = reader.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        (0..100).for_each(|_| log.note(&verdict(None)));
        let lines: Vec<_> = std::iter::from_fn(read).collect();
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(lines[0].ends_with(" suppressed=1"), "a denial without a log is lost: {lines:?}");
        log.since = Instant::now().checked_sub(SECOND).unwrap();
        log.note(&Verdict { verdict: "allow".into(), ..verdict(None) });
        log.note(&Verdict { suppressed: 5, ..verdict(None) });
        assert!(read().unwrap().ends_with(" suppressed=102"), "97 without a line, and 5 of the kernel");
        // The log is restarted: another socket at the same path.
        drop(reader);
        std::fs::remove_file(&path).unwrap();
        let reader = UnixDatagram::bind(&path).unwrap();
        reader.set_nonblocking(true).unwrap();
        log.note(&verdict(None));
        assert!(reader.recv(&mut [0; 1024]).is_ok(), "the agent writes to the socket of before");
        // One that reads nothing.
        log.settings.rate = u32::MAX;
        let start = Instant::now();
        (0..20_000).for_each(|_| log.note(&verdict(None)));
        assert!(start.elapsed() < Duration::from_secs(5) && log.left_out > 0, "{:?}", start.elapsed());
    }
}
