//! Bar charts as SVG: a bar a contender, its length the median, a whisker from the smallest to the largest round.

use std::fmt::Write as _;

use crate::{
    contender::MESHSPAN,
    metric::{Better, Metric},
    report::{Measured, Report, table::number},
};

const WIDTH: f64 = 720.0;
const NAMES: f64 = 150.0;
/// Room for the figure behind the longest bar.
const FIGURES: f64 = 150.0;
const BAR: f64 = 18.0;
const STEP: f64 = 28.0;
const TOP: f64 = 46.0;

/// The picture for a README: one TCP stream.
pub fn throughput(report: &Report) -> String {
    bars(report, Metric::Tcp1)
}

/// All contenders that have this figure, the ceilings last and pale.
pub fn bars(report: &Report, metric: Metric) -> String {
    let shown: Vec<(&Measured, bool)> = report
        .contenders
        .iter()
        .map(|measured| (measured, false))
        .chain(report.ceilings.iter().map(|measured| (measured, true)))
        .filter(|(measured, _)| measured.median(metric).is_some())
        .collect();
    let highest = shown.iter().filter_map(|(measured, _)| measured.series(metric)?.max()).fold(0.0, f64::max);
    let scale = |value: f64| if highest > 0.0 { value / highest * (WIDTH - NAMES - FIGURES) } else { 0.0 };
    let height = TOP + STEP * shown.len() as f64 + 8.0;
    let better = match metric.better() {
        Better::Higher => "longer is better",
        Better::Lower => "shorter is better",
    };
    let mut svg = String::new();
    let mut line = |text: String| {
        let _ = writeln!(svg, "{text}");
    };
    line(format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="system-ui, sans-serif" font-size="13">"#
    ));
    line(format!(r#"<title>{}</title>"#, escape(metric.label())));
    line(format!(r##"<text x="0" y="16" font-weight="600" fill="#1b1f24">{}</text>"##, escape(metric.label())));
    line(format!(
        r##"<text x="0" y="34" font-size="11" fill="#57606a">median of {} rounds, whisker from smallest to largest; {better}; underlay {}, TCP {}</text>"##,
        report.rounds,
        report.conditions.underlay,
        escape(&report.conditions.congestion)
    ));
    for (row, (measured, ceiling)) in shown.into_iter().enumerate() {
        let Some(series) = measured.series(metric) else { continue };
        let (Some(median), Some(min), Some(max)) = (series.median(), series.min(), series.max()) else { continue };
        let y = TOP + STEP * row as f64;
        let middle = y + BAR / 2.0;
        let colour = match (measured.name == MESHSPAN, ceiling) {
            (true, _) => "#1a7f64",
            (_, true) => "#d0d7de",
            _ => "#8c959f",
        };
        let (from, to) = (NAMES + scale(min), NAMES + scale(max));
        line(format!(
            r##"<text x="{}" y="{}" text-anchor="end" fill="#1b1f24">{}</text>"##,
            NAMES - 8.0,
            middle + 4.5,
            escape(&measured.name)
        ));
        line(format!(
            r#"<rect x="{NAMES}" y="{y:.1}" width="{:.1}" height="{BAR}" rx="2" fill="{colour}"/>"#,
            scale(median)
        ));
        line(format!(
            r##"<path d="M{from:.1} {middle:.1}H{to:.1}M{from:.1} {:.1}v8M{to:.1} {:.1}v8" stroke="#1b1f24" fill="none"/>"##,
            middle - 4.0,
            middle - 4.0
        ));
        line(format!(
            r##"<text x="{:.1}" y="{}" fill="#1b1f24">{}<tspan fill="#57606a" font-size="11"> ({}–{})</tspan></text>"##,
            to + 8.0,
            middle + 4.5,
            number(median),
            number(min),
            number(max)
        ));
    }
    svg += "</svg>\n";
    svg
}

/// Text as XML wants it.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            // No XML text may hold them.
            letter if letter.is_control() => escaped.push(' '),
            letter => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::report::tests::{measured, report};

    #[test]
    fn a_chart_is_xml_with_a_bar_for_each_who_has_the_figure() {
        let all = vec![
            measured(MESHSPAN, &[(Metric::Tcp1, 4.0)]),
            measured("a <b> & \"c\"", &[(Metric::Tcp1, 2.0)]),
            measured("without", &[(Metric::Tcp8, 2.0)]),
        ];
        let svg = throughput(&report(all, vec![measured("veth", &[(Metric::Tcp1, 16.0)])]));
        let document = roxmltree::Document::parse(&svg).unwrap();
        let widths: Vec<f64> = document
            .descendants()
            .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "rect")))
            .map(|bar| bar.attribute("width").unwrap().parse().unwrap())
            .collect();
        assert_eq!(widths.len(), 3, "{svg}");
        assert!((widths[0] / widths[1] - 2.0).abs() < 0.02 && widths[2] <= WIDTH - NAMES - FIGURES, "{widths:?}");
    }
}
