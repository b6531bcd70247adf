//! What was measured, as a table and as a picture. Knows figures; measures nothing.

use std::{fmt::Write as _, fs, io, path::Path};

/// A line of the table.
pub struct Row {
    pub what: String,
    /// What was measured, in words.
    pub measured: String,
    /// The ratio or figure that the target is about, where there is one.
    pub target: Option<Target>,
}

/// What is wanted of a figure.
pub struct Target {
    pub value: f64,
    pub wanted: Wanted,
    pub unit: &'static str,
}

/// On which side of a bound the figure is to be.
#[derive(Clone, Copy)]
pub enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(&self) -> bool {
        match self.wanted {
            Wanted::AtLeast(bound) => self.value >= bound,
            Wanted::AtMost(bound) => self.value <= bound,
        }
    }

    fn words(&self) -> (String, String) {
        let (sign, bound) = match self.wanted {
            Wanted::AtLeast(bound) => ("≥", bound),
            Wanted::AtMost(bound) => ("≤", bound),
        };
        (format!("{:.2}{}", self.value, self.unit), format!("{sign} {bound:.2}{}", self.unit))
    }
}

/// Rates for the picture: what was asked, and how fast each agent was.
pub struct Bars {
    pub what: String,
    pub rates: Vec<(&'static str, f64)>,
}

/// The table in Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from("| what | measured | figure | target | |\n|---|---|---|---|---|\n");
    for Row { what, measured, target } in rows {
        let (figure, wanted, met) = match target {
            None => (String::new(), String::new(), ""),
            Some(target) => {
                let (figure, wanted) = target.words();
                (figure, wanted, if target.is_met() { "met" } else { "**missed**" })
            }
        };
        let _ = writeln!(out, "| {what} | {measured} | {figure} | {wanted} | {met} |");
    }
    out
}

/// The picture: a group of bars for each question, as long as the rate is a part of the fastest in its group.
pub fn picture(groups: &[Bars]) -> String {
    const COLOURS: [(&str, &str); 5] = [
        ("strongroom", "#1b6ca8"),
        ("floor", "#9aa5b1"),
        ("raw", "#c9ced6"),
        ("ssh-agent", "#d98324"),
        ("gpg-agent", "#b0413e"),
    ];
    const LEFT: usize = 210;
    const BAR: usize = 14;
    const STEP: usize = 18;
    const WIDTH: usize = 430;
    let height = 20 + groups.iter().map(|group| group.rates.len() * STEP + 14).sum::<usize>();
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"800\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"800\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    let mut y = 14;
    for Bars { what, rates } in groups {
        let _ = writeln!(out, "<text x=\"10\" y=\"{}\" fill=\"#222222\">{what}</text>", y + 11);
        let most = rates.iter().map(|(_, rate)| *rate).fold(1.0, f64::max);
        for (name, rate) in rates {
            let colour = COLOURS.iter().find(|(known, _)| known == name).map_or("#555555", |(_, colour)| colour);
            let length = (rate / most * WIDTH as f64).max(1.0);
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" fill=\"#222222\">{name} {rate:.0}/s</text>",
                LEFT as f64 + length + 6.0,
                y + 11
            );
            y += STEP;
        }
        y += 14;
    }
    out.push_str("</svg>\n");
    out
}

/// Writes both into `directory`.
pub fn write(directory: &Path, heading: &str, rows: &[Row], groups: &[Bars]) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let text = format!("# Beside other agents\n\n{heading}\n\n![Signatures a second](agents.svg)\n\n{}", table(rows));
    fs::write(directory.join("agents.md"), text)?;
    fs::write(directory.join("agents.svg"), picture(groups))
}
