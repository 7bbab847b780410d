//! The report as one page that needs nothing but itself.

use std::fmt::Write as _;

use crate::{
    gates::Judged,
    metric::Metric,
    report::{
        Report,
        chart::{bars, escape},
        table::{number, series},
    },
};

const PLOTS: [Metric; 10] = [
    Metric::Tcp1,
    Metric::Tcp8,
    Metric::Bidir,
    Metric::CpuPerByte,
    Metric::DaemonCpuPerByte,
    Metric::Udp200CpuPerByte,
    Metric::RttLoadedP50,
    Metric::RttLoadedP99,
    Metric::Udp1400,
    Metric::Udp64,
];
const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}\
table{border-collapse:collapse;font-size:13px;margin:1rem 0}td,th{padding:.25rem .6rem;border-bottom:1px solid #d0d7de;text-align:right}\
td:first-child,th:first-child{text-align:left}.missed{color:#b42318;font-weight:600}.ok{color:#1a7f64}\
figure{margin:1.5rem 0}figure svg{max-width:100%}.scroll{overflow-x:auto}";

/// HTML that is well-formed XML too.
pub fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut page = String::from(
        "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head><meta charset=\"utf-8\"/>",
    );
    let mut add = |text: String| {
        let _ = writeln!(page, "{text}");
    };
    add(format!(
        "<meta name=\"viewport\" content=\"width=device-width\"/><title>mesh-bench throughput</title><style>{STYLE}</style></head>\n<body>"
    ));
    add("<h1>Tunnel throughput on one machine</h1>".to_owned());
    add(format!(
        "<p>{}, {} cores, {} MiB, Linux {}. Underlay <b>{}</b>, TCP <b>{}</b>, {} rounds of {} s, interleaved. Verdict: <b class=\"{}\">{}</b>.</p>",
        escape(&machine.cpu_model),
        machine.cores,
        machine.memory_mib,
        escape(&machine.kernel),
        report.conditions.underlay,
        escape(&report.conditions.congestion),
        report.rounds,
        report.seconds,
        if report.ok { "ok" } else { "missed" },
        if report.ok { "ok" } else { "not ok" },
    ));
    add("<p>Both ends, the traffic generator and the kernel share these cores: figures are CPU per byte in disguise. Compare within this page only.</p>".to_owned());
    if !report.missing.is_empty() {
        add(format!("<p>Not installed: {}.</p>", escape(&report.missing.join(", "))));
    }
    for metric in PLOTS {
        if report.contenders.iter().any(|measured| measured.median(metric).is_some()) {
            add(format!("<figure>{}</figure>", bars(report, metric)));
        }
    }
    if report.gates.iter().any(|gate| gate.passed.is_some()) {
        add(format!("<h2>Gates and goals</h2>\n{}", gates(&report.gates)));
    }
    add(format!(
        "<h2>All figures</h2>\n<p>Median (smallest–largest round).</p>\n<div class=\"scroll\">{}</div>",
        figures(report)
    ));
    for failure in &report.failures {
        add(format!("<p class=\"missed\">{}</p>", escape(failure)));
    }
    page += "</body>\n</html>\n";
    page
}

fn gates(judged: &[Judged]) -> String {
    let rows = judged.iter().filter_map(|gate| {
        let (class, verdict) = match (gate.passed?, gate.goal_passed) {
            (true, Some(true)) => ("ok", "goal reached"),
            (true, _) => ("ok", "ok"),
            (false, _) => ("missed", "missed"),
        };
        Some(format!(
            "<tr><td>{}</td><td>{} {}</td><td>{}</td><td>{}</td><td class=\"{class}\">{verdict}</td></tr>",
            escape(&gate.what),
            escape(gate.bound),
            number(gate.gate),
            gate.goal.map_or_else(String::new, |goal| format!("{} {}", escape(gate.bound), number(goal))),
            series(&gate.reached),
        ))
    });
    let rows: String = rows.collect();
    format!("<table><tr><th>ours / theirs</th><th>gate</th><th>goal</th><th>reached</th><th></th></tr>{rows}</table>")
}

fn figures(report: &Report) -> String {
    let all: Vec<_> = report.contenders.iter().chain(&report.ceilings).collect();
    let head: String = all
        .iter()
        .map(|measured| format!("<th title=\"{}\">{}</th>", escape(&measured.version), escape(&measured.name)))
        .collect();
    let rows = Metric::ALL.into_iter().filter(|metric| all.iter().any(|measured| measured.median(*metric).is_some()));
    let rows: String = rows
        .map(|metric| {
            let cells: String = all
                .iter()
                .map(|measured| format!("<td>{}</td>", measured.series(metric).map_or_else(|| "-".to_owned(), series)))
                .collect();
            format!("<tr><td>{}</td>{cells}</tr>", escape(metric.label()))
        })
        .collect();
    format!("<table><tr><th></th>{head}</tr>{rows}</table>")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{
        report::tests::{measured, report},
        stats::Series,
    };

    #[test]
    fn a_page_is_well_formed_holds_its_plots_and_loads_nothing() {
        let figures = [(Metric::Tcp1, 4.0), (Metric::CpuPerByte, 3.0), (Metric::RttLoadedP99, 9000.0)];
        let mut report = report(
            vec![measured("meshspan", &figures), measured("a & <b>", &figures)],
            vec![measured("veth", &figures)],
        );
        report.gates = crate::gates::judge(
            report.conditions.underlay,
            &report.contenders,
            &report.ceilings,
            &Series::from([1.0; 3]),
        );
        report.failures.push("round 1, a & <b>: gone".into());
        let html = render(&report);
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let document = roxmltree::Document::parse_with_options(&html, options).unwrap();
        let count = |name: &str| document.descendants().filter(|node| node.tag_name().name() == name).count();
        assert_eq!((count("svg"), count("script"), count("link"), count("img")), (3, 0, 0, 0));
        assert!(document.descendants().any(|node| node.text() == Some("a & <b>")));
        let urls: Vec<_> = html.match_indices("http").map(|(at, _)| &html[at..at + 18]).collect();
        assert!(urls.iter().all(|url| url.starts_with("http://www.w3.org")), "{urls:?}");
    }
}
