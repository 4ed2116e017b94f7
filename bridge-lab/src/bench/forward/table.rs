//! The comparison as Markdown, aligned so that a terminal shows it as well.

use std::fmt::Write as _;

use super::contender::Contender;
use super::figures::{Figure, Figures};
use super::traffic::Traffic;

/// A table for each kind of traffic: ratios to `base`, and the rate that they are ratios to.
pub(super) fn markdown(figures: &Figures, base: Contender, machine: &str, how: &str) -> String {
    let sizes = figures.sizes();
    let mut text = format!("{machine}; {how}\n");
    for traffic in Traffic::ALL {
        let measured = |contender| figures.0.iter().any(|f| (f.contender, f.traffic) == (contender, traffic));
        let contenders: Vec<_> = Contender::ALL.into_iter().filter(|each| measured(*each)).collect();
        if contenders.is_empty() {
            continue;
        }
        let mut rows = vec![header(&sizes, base)];
        for contender in contenders {
            let cells = sizes.iter().map(|rules| cell(figures, base, contender, traffic, *rules));
            rows.push([contender.title().to_owned()].into_iter().chain(cells).collect());
        }
        write!(text, "\n**{}**\n\n{}", traffic.title(), aligned(&rows)).expect("writing to a string");
    }
    text + &missing(figures)
}

/// The lines of a summary: traffic, rules, and their title.
const SUMMARY: [(Traffic, u32, &str); 4] = [
    (Traffic::EstablishedMany, 10_000, "established, 10,000 flows"),
    (Traffic::NewFlows, 1000, "new flows"),
    (Traffic::Bulk, 10_000, "TCP bulk"),
    (Traffic::Connect, 10_000, "TCP connects"),
];
/// The columns of a summary.
const SUMMARY_CONTENDERS: [Contender; 5] = [
    Contender::FastPath,
    Contender::Ebpf,
    Contender::NftablesSet,
    Contender::IptablesNft,
    Contender::IptablesLegacy,
];

/// Renders the headline figures as one Markdown table: a line for each kind of traffic.
pub(super) fn summary(figures: &Figures, machine: &str, how: &str) -> String {
    let titles = SUMMARY_CONTENDERS.map(|contender| contender.title().to_owned());
    let mut rows = vec![["ratio to no firewall".to_owned()].into_iter().chain(titles).collect()];
    for (traffic, rules, title) in SUMMARY {
        let cell = |contender| {
            let figure = figures.get(contender, traffic, rules);
            match figure.map(Figure::ratio) {
                Some(Some(ratio)) => format!("{:.2} ± {:.0} %", ratio.median, ratio.relative() * 100.0),
                Some(None) => "missing".to_owned(),
                None => String::new(),
            }
        };
        let title = format!("{title}, {} rules", grouped(f64::from(rules)));
        rows.push([title].into_iter().chain(SUMMARY_CONTENDERS.map(cell)).collect());
    }
    format!("{}\n{machine}; {how}, ± half the distance of the quartiles.\n", aligned(&rows))
}

fn header(sizes: &[u32], base: Contender) -> Vec<String> {
    let columns = sizes.iter().map(|rules| match rules {
        1 => "1 rule".to_owned(),
        rules => format!("{} rules", grouped(f64::from(*rules))),
    });
    [format!("ratio to {} (range)", base.title())].into_iter().chain(columns).collect()
}

fn cell(figures: &Figures, base: Contender, contender: Contender, traffic: Traffic, rules: u32) -> String {
    let Some(figure) = figures.get(contender, traffic, rules) else { return String::new() };
    match (figure.rate(), figure.ratio()) {
        (Some(rate), _) if contender == base => {
            format!("{} {}", grouped(rate.median), traffic.unit())
        }
        (_, Some(ratio)) => format!("**{:.2}** ({:.2}–{:.2})", ratio.median, ratio.least, ratio.most),
        _ => "missing".to_owned(),
    }
}

/// With a comma between thousands.
pub(super) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(super) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let pad = |row: &Vec<String>| {
        row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect::<Vec<_>>()
    };
    let rule = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut lines = rows.iter().map(|row| line(pad(row)));
    let head = lines.next().unwrap_or_default();
    head + &line(rule) + &lines.collect::<String>()
}

/// Lines between which a document has the figures of forwarding, and of denying.
pub(super) const BEGIN: &str = "<!-- cargo xtask bench --publish -->";
pub(super) const BEGIN_DENIED: &str = "<!-- cargo xtask bench denied --publish -->";
pub(super) const END: &str = "<!-- end of the figures -->";

/// Replaces the lines between the markers of `document` by `text`; `None` if it has no markers.
pub(super) fn replace(document: &str, begin: &str, text: &str) -> Option<String> {
    let (before, rest) = document.split_once(begin)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{begin}\n\n{text}\n{END}{after}"))
}

/// Why something is missing, each reason once.
fn missing(figures: &Figures) -> String {
    let mut reasons: Vec<String> = Vec::new();
    for figure in &figures.0 {
        if let Err(why) = &figure.runs {
            let first = why.lines().next().unwrap_or_default();
            let line =
                format!("{} at {} rules: {first}", figure.contender.title(), grouped(figure.rules.into()));
            if !reasons.contains(&line) {
                reasons.push(line);
            }
        }
    }
    if reasons.is_empty() { String::new() } else { format!("\nMissing: {}.\n", reasons.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::figures;
    use super::*;

    #[test]
    fn text_between_the_markers_is_replaced_and_other_text_is_kept() {
        let document = format!("# bridge\n{BEGIN}\nold\n{END}\nmore\n");
        let once = replace(&document, BEGIN, "new\n").unwrap();
        assert_eq!(once, format!("# bridge\n{BEGIN}\n\nnew\n\n{END}\nmore\n"));
        assert_eq!(replace(&once, BEGIN, "new\n"), Some(once));
        assert_eq!(replace("# bridge\n", BEGIN, "new\n"), None);
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(7.4), "7");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
        assert_eq!(grouped(100_000.0), "100,000");
    }

    #[test]
    fn a_summary_has_a_line_for_each_traffic_and_a_column_for_each_contender() {
        let mut figures = figures(&[
            (Contender::None, Traffic::NewFlows, 1000, [1000.0, 1000.0]),
            (Contender::Ebpf, Traffic::NewFlows, 1000, [500.0, 700.0]),
            (Contender::FastPath, Traffic::NewFlows, 1000, [0.0, 0.0]),
        ]);
        figures.0[2].runs = Err("no such key".into());
        figures.0[2].ratios.clear();
        let text = summary(&figures, "2 CPUs", "3 rounds");
        let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        let rows: Vec<_> = text.lines().map(cells).filter(|cells| cells.len() == 8).collect();
        assert_eq!(rows[0][2..5], ["bridge, fast path", "bridge, eBPF", "nftables, interval set"]);
        let row = rows.iter().find(|row| row[1] == "new flows, 1,000 rules").unwrap();
        assert_eq!(row[2..6], ["missing", "0.60 ± 8 %", "", ""]);
        assert_eq!(rows.len(), 2 + SUMMARY.len());
    }

    #[test]
    fn a_table_has_ratios_and_names_missing_contenders() {
        let mut figures = figures(&[
            (Contender::None, Traffic::Established, 1, [1000.0, 1200.0]),
            (Contender::Ebpf, Traffic::Established, 1, [900.0, 960.0]),
            (Contender::FastPath, Traffic::Established, 1, [0.0, 0.0]),
        ]);
        figures.0[2].runs = Err("no such key\nand more".into());
        figures.0[2].ratios.clear();
        let text = markdown(&figures, Contender::None, "2 CPUs", "3 rounds");
        assert!(text.contains("| bridge, eBPF                 | **0.85** (0.80–0.90)"), "{text}");
        assert!(text.contains("1,100 packets per CPU second"), "{text}");
        assert!(text.ends_with("Missing: bridge, fast path at 1 rules: no such key.\n"), "{text}");
        // Every line of a table is as long as its first.
        let table: Vec<_> = text.lines().skip_while(|line| !line.starts_with('|')).take(5).collect();
        assert!(table.iter().all(|line| line.chars().count() == table[0].chars().count()), "{text}");
    }
}
