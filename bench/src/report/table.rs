//! The report on a terminal.

use comfy_table::{CellAlignment, Table, presets};

use crate::{
    gates::Judged,
    metric::Metric,
    report::{Measured, Report},
    stats::Series,
};

/// Everything a person wants to see at the end of a run.
pub fn render(report: &Report) -> String {
    let machine = &report.machine;
    let mut text = format!(
        "{}, {} cores, Linux {}, underlay {}, TCP {}, {} rounds of {} s\n",
        machine.cpu_model,
        machine.cores,
        machine.kernel,
        report.conditions.underlay,
        report.conditions.congestion,
        report.rounds,
        report.seconds
    );
    let all: Vec<&Measured> = report.contenders.iter().chain(&report.ceilings).collect();
    for measured in &all {
        text += &format!("  {}: {}\n", measured.name, measured.version);
    }
    if !all.is_empty() {
        text += &figures(&all);
    }
    if report.gates.iter().any(|gate| gate.passed.is_some()) {
        text += "\n\n";
        text += &gates(&report.gates);
    }
    for (name, ratio) in &report.iperf3_ratio {
        text += &format!("\niperf3 / mesh-bench, tcp1, {name}: {}", series(ratio));
    }
    if let Some(peers) = &report.peers {
        text += &format!("\n{peers}");
    }
    for failure in &report.failures {
        text += &format!("\nFAILED {failure}");
    }
    if !report.missing.is_empty() {
        text += &format!("\nnot installed: {} (bash bench/rivals.sh installs them)", report.missing.join(", "));
    }
    text += if report.ok { "\nok" } else { "\nNOT OK" };
    text
}

/// Median (min–max), as short as the figure allows.
pub fn series(series: &Series) -> String {
    match (series.median(), series.min(), series.max()) {
        (Some(median), Some(min), Some(max)) if series.values().count() > 1 => {
            format!("{} ({}-{})", number(median), number(min), number(max))
        }
        (Some(median), ..) => number(median),
        _ => "-".to_owned(),
    }
}

/// Three significant digits, no more than two of them behind the point.
pub fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn figures(all: &[&Measured]) -> String {
    let mut table = new_table();
    let names = all.iter().map(|measured| measured.name.clone());
    table.set_header(std::iter::once(String::new()).chain(names));
    for metric in Metric::ALL {
        let cells: Vec<String> =
            all.iter().map(|measured| measured.series(metric).map_or_else(|| "-".to_owned(), series)).collect();
        if cells.iter().any(|cell| cell != "-") {
            table.add_row(std::iter::once(metric.label().to_owned()).chain(cells));
        }
    }
    align_right(table)
}

fn gates(judged: &[Judged]) -> String {
    let mut table = new_table();
    table.set_header(["ours / theirs, median of rounds", "gate", "goal", "reached", ""]);
    for gate in judged.iter().filter(|gate| gate.passed.is_some()) {
        let verdict = match (gate.passed, gate.goal_passed) {
            (Some(true), Some(true)) => "ok, goal",
            (Some(true), _) => "ok",
            _ => "MISSED",
        };
        table.add_row([
            gate.what.clone(),
            format!("{} {}", gate.bound, number(gate.gate)),
            gate.goal.map_or_else(String::new, |goal| format!("{} {}", gate.bound, number(goal))),
            series(&gate.reached),
            verdict.to_owned(),
        ]);
    }
    align_right(table)
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table
}

fn align_right(mut table: Table) -> String {
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{measured, report};

    #[test]
    fn numbers_have_three_digits_or_fewer_behind_the_point() {
        assert_eq!([0.123, 9.876, 12.34, 1234.5].map(number), ["0.12", "9.88", "12.3", "1234"]);
        assert_eq!(series(&Series::from([2.0, 1.0, 3.0])), "2.00 (1.00-3.00)");
        assert_eq!((series(&Series::from([2.0])), series(&Series::default())), ("2.00".into(), "-".into()));
    }

    #[test]
    fn a_table_shows_each_contender_what_is_missing_and_the_verdict() {
        let mut report = report(vec![measured("meshspan", &[(Metric::Tcp1, 4.0)])], vec![]);
        report.gates = crate::gates::judge(report.conditions.underlay, &report.contenders, &[], &Series::default());
        report.ok = false;
        report.failures.push("round 1, gotatun, tcp8: it ended".into());
        let text = render(&report);
        for part in ["meshspan", "TCP, 1 stream", "4.00", "not installed: gotatun", "FAILED round 1", "NOT OK"] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        assert!(!text.contains("TCP, 8 streams"), "what was not measured has no row\n{text}");
    }
}
