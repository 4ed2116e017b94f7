//! The Prometheus text format 0.0.4, made of OpenMetrics, for readers that do not ask for OpenMetrics.
//!
//! The formats differ in comments only: of a counter the text format names the sample (`_total`), it has neither `# UNIT` nor
//! `# EOF`, and no type `info`.

use std::fmt::{self, Write};

/// Media type of the text format.
pub(super) const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Passes OpenMetrics on as text format, line by line.
#[derive(Debug)]
pub(super) struct TextFormat<W> {
    to: W,
    line: String,
    /// Help of the family whose type comes in the next line.
    help: String,
}

impl<W: Write> TextFormat<W> {
    pub(super) const fn new(to: W) -> Self {
        Self { to, line: String::new(), help: String::new() }
    }

    fn end_line(&mut self) -> fmt::Result {
        let line = std::mem::take(&mut self.line);
        if line.starts_with("# HELP ") {
            self.help = line;
            return Ok(());
        }
        if line.starts_with("# UNIT ") || line == "# EOF" {
            return Ok(());
        }
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' ')) else {
            return writeln!(self.to, "{line}");
        };
        let (suffix, kind) = match kind {
            "counter" => ("_total", kind),
            "info" => ("_info", "gauge"),
            "unknown" => ("", "untyped"),
            _ => ("", kind),
        };
        let help = std::mem::take(&mut self.help);
        if let Some((_, help)) = help.strip_prefix("# HELP ").and_then(|help| help.split_once(' ')) {
            writeln!(self.to, "# HELP {name}{suffix} {help}")?;
        }
        writeln!(self.to, "# TYPE {name}{suffix} {kind}")
    }
}

impl<W: Write> Write for TextFormat<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive('\n') {
            match part.strip_suffix('\n') {
                Some(end) => {
                    self.line.push_str(end);
                    self.end_line()?;
                }
                None => self.line.push_str(part),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_name_the_samples_wherever_the_text_is_cut() {
        let open = "# HELP a Help of a.\n# TYPE a counter\na_total{x=\"# EOF\"} 1\n# HELP b_seconds Time.\n# TYPE b_seconds \
                    gauge\n# UNIT b_seconds seconds\nb_seconds 2\n# HELP c Version.\n# TYPE c info\nc_info{v=\"1\"} 1\n# EOF\n";
        let expected = "# HELP a_total Help of a.\n# TYPE a_total counter\na_total{x=\"# EOF\"} 1\n# HELP b_seconds Time.\n\
                        # TYPE b_seconds gauge\nb_seconds 2\n# HELP c_info Version.\n# TYPE c_info gauge\nc_info{v=\"1\"} 1\n";
        for cut in 0..=open.len() {
            let mut text = TextFormat::new(String::new());
            text.write_str(&open[..cut]).unwrap();
            text.write_str(&open[cut..]).unwrap();
            assert_eq!(text.to, expected, "cut at {cut}");
        }
    }
}
