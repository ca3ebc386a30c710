//! What a benchmark found: medians, their ratio, and how far single rounds lie apart.

use std::fmt;

use serde_json::{Value, json};

/// The figures of a benchmark.
#[derive(Debug)]
pub(crate) struct Report {
    /// What was measured, in one sentence.
    pub(crate) title: String,
    /// The unit of the figures: "events/s".
    pub(crate) unit: &'static str,
    /// In what the sides differ, a sentence or two each.
    pub(crate) notes: Vec<String>,
    /// What was compared.
    pub(crate) comparisons: Vec<Comparison>,
}

/// One thing against its yardstick, round by round.
#[derive(Debug)]
pub(crate) struct Comparison {
    /// The thing: "nats-server 2.9.10, default sync, 16 writers".
    pub(crate) subject: String,
    /// What it is measured against.
    pub(crate) yardstick: &'static str,
    /// The thing's figures, a round each.
    pub(crate) measured: Vec<f64>,
    /// The yardstick's figures in the same rounds.
    pub(crate) against: Vec<f64>,
    /// The least ratio that was promised, where one was.
    pub(crate) limit: Option<f64>,
}

impl Comparison {
    /// The ratio of the medians.
    pub(crate) fn ratio(&self) -> f64 {
        median(&self.measured) / median(&self.against)
    }

    /// The smallest and the largest ratio of a single round.
    fn spread(&self) -> (f64, f64) {
        let ratios = self.measured.iter().zip(&self.against).map(|(m, a)| m / a);
        ratios.fold((f64::INFINITY, 0.0), |(low, high), r| {
            (f64::min(low, r), f64::max(high, r))
        })
    }

    /// Whether single rounds differ so much that their median says little.
    fn is_noisy(&self) -> bool {
        let (low, high) = self.spread();
        high > 2.0 * low
    }

    /// Whether what was promised is kept, to the two digits that are printed.
    fn keeps_its_limit(&self) -> bool {
        self.limit
            .is_none_or(|limit| (self.ratio() * 100.0).round() >= (limit * 100.0).round())
    }

    fn verdict(&self) -> &'static str {
        match self.limit {
            None => "",
            Some(_) if self.keeps_its_limit() => "kept",
            Some(_) => "MISSED",
        }
    }
}

impl Report {
    /// Whether every promise is kept.
    pub(crate) fn keeps_its_limits(&self) -> bool {
        self.comparisons.iter().all(Comparison::keeps_its_limit)
    }

    /// All figures, for programs.
    pub(crate) fn to_json(&self) -> Value {
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let comparisons: Vec<Value> = self
            .comparisons
            .iter()
            .map(|c| {
                let (low, high) = c.spread();
                json!({
                    "subject": c.subject,
                    "yardstick": c.yardstick,
                    "measured": c.measured,
                    "measured_median": median(&c.measured),
                    "against": c.against,
                    "against_median": median(&c.against),
                    "ratio": c.ratio(),
                    "ratio_of_rounds": { "min": low, "max": high },
                    "noisy": c.is_noisy(),
                    "limit": c.limit,
                    "kept": c.keeps_its_limit(),
                })
            })
            .collect();
        json!({
            "title": self.title,
            "unit": self.unit,
            "notes": self.notes,
            "machine": { "os": std::env::consts::OS, "arch": std::env::consts::ARCH, "cores": cores },
            "comparisons": comparisons,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.title)?;
        let header = [
            "what",
            self.unit,
            "yardstick",
            self.unit,
            "ratio",
            "rounds",
            "limit",
            "",
        ];
        let mut rows: Vec<[String; 8]> = vec![header.map(str::to_owned)];
        for c in &self.comparisons {
            let (low, high) = c.spread();
            rows.push([
                c.subject.clone(),
                format!("{:.0}", median(&c.measured)),
                c.yardstick.to_owned(),
                format!("{:.0}", median(&c.against)),
                format!("{:.2}", c.ratio()),
                format!("{low:.2}-{high:.2}"),
                c.limit.map_or_else(String::new, |l| format!("{l:.2}")),
                c.verdict().to_owned(),
            ]);
        }
        let mut widths = [0; 8];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = usize::max(*width, cell.len());
            }
        }
        for row in &rows {
            for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
                match column {
                    0 | 2 | 7 => write!(f, "{cell:<width$}  ")?,
                    _ => write!(f, "{cell:>width$}  ")?,
                }
            }
            writeln!(f)?;
        }
        for note in &self.notes {
            writeln!(f, "\n{note}")?;
        }
        let noisy = self.comparisons.iter().filter(|c| c.is_noisy()).count();
        if noisy > 0 {
            let all = self.comparisons.len();
            writeln!(
                f,
                "\nIn {noisy} of {all} comparisons the ratios of single rounds differ more than \
                 twofold: something else keeps this machine busy, and those figures say little."
            )?;
        }
        Ok(())
    }
}

/// The median; of an even number of figures the mean of the two in the middle.
fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_that_of_the_sorted_figures() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }

    #[test]
    fn a_limit_is_kept_to_the_digits_that_are_printed() {
        let mut comparison = Comparison {
            subject: "a".into(),
            yardstick: "b",
            measured: vec![0.896],
            against: vec![1.0],
            limit: Some(0.9),
        };
        assert_eq!(comparison.verdict(), "kept");
        comparison.measured = vec![0.894];
        assert_eq!(comparison.verdict(), "MISSED");
    }
}
