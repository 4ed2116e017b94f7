//! The comparison as a picture: ratio to no firewall over the number of rules, a panel for each kind of traffic.

use std::fmt::Write as _;

use super::contender::Contender;
use super::figures::Figures;
use super::table::grouped;
use super::traffic::Traffic;

/// In pixels.
const PANEL: (f64, f64) = (430.0, 270.0);
/// Left, top, right, bottom.
const MARGIN: (f64, f64, f64, f64) = (46.0, 34.0, 14.0, 34.0);
const COLUMNS: usize = 2;
const LEGEND: f64 = 70.0;
/// Contenders in a line of the legend.
const LEGEND_COLUMNS: usize = 5;

/// Distinguishable also for those who do not see red and green (Okabe and Ito).
fn colour(contender: Contender) -> &'static str {
    match contender {
        Contender::None => "#000000",
        Contender::IptablesLegacy => "#d55e00",
        Contender::IptablesNft => "#e69f00",
        Contender::NftablesSet => "#cc79a7",
        Contender::Ebpf => "#56b4e9",
        Contender::EbpfIptables => "#0072b2",
        Contender::EbpfNftables => "#7b3294",
        Contender::Nftables => "#8c6d31",
        Contender::FastPath => "#009e73",
        Contender::IptablesRaw | Contender::TcDrop | Contender::XdpDrop | Contender::Shield => "#999999",
    }
}

/// An SVG document.
pub(super) fn svg(figures: &Figures, machine: &str) -> String {
    let rows = Traffic::ALLOWED.len().div_ceil(COLUMNS);
    let (width, height) = (PANEL.0 * COLUMNS as f64, LEGEND + PANEL.1 * rows as f64);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"16\">Ratio to no firewall, by number of rules; {}</text>\n",
        escaped(machine)
    );
    for (index, contender) in Contender::FORWARD.into_iter().enumerate() {
        let x = 10.0 + 168.0 * (index % LEGEND_COLUMNS) as f64;
        let y = 28.0 + 16.0 * (index / LEGEND_COLUMNS) as f64;
        let colour = colour(contender);
        writeln!(
            text,
            "<rect x=\"{x}\" y=\"{y}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"{}\" \
             font-size=\"9.5\">{}</text>",
            x + 14.0,
            y + 9.0,
            escaped(contender.title())
        )
        .expect("writing to a string");
    }
    for (index, traffic) in Traffic::ALLOWED.into_iter().enumerate() {
        let (column, row) = (index % COLUMNS, index / COLUMNS);
        let (x, y) = (PANEL.0 * column as f64, LEGEND + PANEL.1 * row as f64);
        write!(text, "<g transform=\"translate({x} {y})\">\n{}</g>\n", panel(figures, traffic))
            .expect("writing to a string");
    }
    text + "</svg>\n"
}

fn panel(figures: &Figures, traffic: Traffic) -> String {
    let sizes = figures.sizes();
    let ratios = |contender| {
        let point = move |(index, rules): (usize, &u32)| {
            Some((index, figures.get(contender, traffic, *rules)?.ratio()?))
        };
        sizes.iter().enumerate().filter_map(point).collect::<Vec<_>>()
    };
    let all = Contender::FORWARD.into_iter().flat_map(ratios);
    // Up to the next half above whatever is there.
    let top = (all.map(|(_, ratio)| ratio.most).fold(1.2, f64::max) * 2.0).ceil() / 2.0;
    let (left, above, right, below) = MARGIN;
    let (inner_width, inner_height) = (PANEL.0 - left - right, PANEL.1 - above - below);
    let x = |index: usize| left + inner_width * (index as f64 + 0.5) / sizes.len().max(1) as f64;
    let y = |ratio: f64| above + inner_height * (1.0 - ratio / top);
    let mut text = format!(
        "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{}</text>\n",
        above - 10.0,
        traffic.title()
    );
    let mut line = |out: std::fmt::Arguments<'_>| writeln!(text, "{out}").expect("writing to a string");
    let mut tick = 0.0;
    while tick <= top {
        let (y, end) = (y(tick), PANEL.0 - right);
        let strong = if (tick - 1.0).abs() < 1e-9 { "#555555" } else { "#dddddd" };
        line(format_args!(
            "<line x1=\"{left}\" x2=\"{end}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"{strong}\"/>"
        ));
        line(format_args!(
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
            left - 6.0,
            y + 4.0
        ));
        tick += 0.5;
    }
    for (index, rules) in sizes.iter().enumerate() {
        let (x, y) = (x(index), PANEL.1 - below + 16.0);
        let rules = grouped(f64::from(*rules));
        line(format_args!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{rules}</text>"));
    }
    for contender in Contender::FORWARD.into_iter().filter(|contender| *contender != Contender::None) {
        let (points, colour) = (ratios(contender), colour(contender));
        let path: Vec<_> = points.iter().map(|(i, r)| format!("{:.1},{:.1}", x(*i), y(r.median))).collect();
        if path.is_empty() {
            continue;
        }
        let path = path.join(" ");
        line(format_args!(
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        ));
        for (index, ratio) in points {
            let (x, low, middle, high) = (x(index), y(ratio.least), y(ratio.median), y(ratio.most));
            line(format_args!(
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\" stroke=\"{colour}\"/>\
                 <circle cx=\"{x:.1}\" cy=\"{middle:.1}\" r=\"3\" fill=\"{colour}\"/>"
            ));
        }
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::figures;
    use super::*;

    /// Every element that is opened is closed in its turn, and nothing is outside the one at the top.
    fn check_well_formed(svg: &str) {
        let mut open = Vec::new();
        let mut rest = svg;
        while let Some(start) = rest.find('<') {
            assert!(!open.is_empty() || rest[..start].trim().is_empty(), "text outside: {}", &rest[..start]);
            let end = start + rest[start..].find('>').expect("a tag ends");
            let tag = &rest[start + 1..end];
            assert!(!tag.contains('<') && tag.matches('"').count().is_multiple_of(2), "{tag}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(tag.split(' ').next().unwrap());
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
    }

    #[test]
    fn the_picture_is_well_formed_and_shows_every_point() {
        let figures = figures(&[
            (Contender::None, Traffic::Established, 1, [100.0, 100.0]),
            (Contender::Ebpf, Traffic::Established, 1, [90.0, 95.0]),
            (Contender::None, Traffic::Established, 100, [100.0, 100.0]),
            (Contender::Ebpf, Traffic::Established, 100, [90.0, 95.0]),
        ]);
        let svg = svg(&figures, "a <fast> CPU & more");
        check_well_formed(&svg);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("a &lt;fast&gt; CPU &amp; more"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn nothing_measured_is_a_picture_too() {
        check_well_formed(&svg(&Figures::default(), ""));
    }
}
