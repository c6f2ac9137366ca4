//! `host profile`: a step, operation by operation, against what memory allows.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use host::model::Fusion;
use host::profile::{
    self, Figures, PathProfile, Profile, ProfileOptions, SLOW_OF_CEILING, SLOW_SHARE, STEPS,
};
use serde::Serialize;

use super::args::{self, ProfileArgs};
use super::{load, print_json, status};

/// Everything that `--json` prints.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// The file; none where weights are random.
    file: Option<String>,
    model: Option<String>,
    device: String,
    activations: &'static str,
    weight_bytes_per_token: u64,
    #[serde(flatten)]
    profile: Profile,
}

impl Report {
    fn title(&self) -> String {
        let file = self.file.as_deref().and_then(|file| Path::new(file).file_name()?.to_str());
        let name = file.or(self.model.as_deref()).unwrap_or("the model");
        let Self { activations, version, profile, .. } = self;
        format!("{name}, activations {activations}, depth {}, host {version}", profile.depth)
    }
}

pub(super) fn run(args: &ProfileArgs) -> Result<()> {
    let chart = match &args.chart {
        Some(path) => Some((path, create(path)?)),
        None => None,
    };
    let model_options = args.run.model_options(Some(args.depth + STEPS));
    let mut model = load::file_or_preset(&args.model, &args.run, &model_options)?;
    let options = ProfileOptions {
        depth: args.depth,
        repeat: args.repeat as usize,
        fusions: if args.run.unfused { &[Fusion::Unfused] } else { &[Fusion::Unfused, Fusion::Fused] },
    };
    let bar = load::progress_bar("timing: {msg}");
    let profile = profile::measure(&mut model, &options, &mut |path| bar.set_message(path.to_owned()));
    bar.finish_and_clear();
    let report = Report {
        version: args::version(),
        file: args.model.file.as_ref().map(|file| file.display().to_string()),
        model: model.config().name.clone(),
        device: model.device().describe(),
        activations: args.run.activations.name(),
        weight_bytes_per_token: model.weight_bytes_per_token(),
        profile: profile?,
    };
    if let Some((path, mut file)) = chart {
        let svg = profile::draw(&report.profile, &report.title())?;
        file.write_all(svg.as_bytes()).with_context(|| cannot_write(path))?;
        status!("the chart is in {}", path.display());
    }
    if args.json { print_json(&report) } else { Ok(print_tables(&report)?) }
}

/// Makes the chart's file before anything is measured, which takes long.
fn create(path: &Path) -> Result<File> {
    let is_svg = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    ensure!(is_svg, "{}: the chart is an SVG picture, its name must end in .svg", path.display());
    File::create(path).with_context(|| cannot_write(path))
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write the chart to {}", path.display())
}

fn print_tables(report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let Profile { ceiling_gb_per_s, ceiling_bytes, empty_us, paths, not_captured, .. } = &report.profile;
    writeln!(out, "{}", report.title())?;
    writeln!(
        out,
        "ceiling: {ceiling_gb_per_s:.1} GB/s, by a kernel that reads {:.1} MB; an operation's floor is its bytes at that rate",
        *ceiling_bytes as f64 / 1e6
    )?;
    writeln!(
        out,
        "clock: two events with nothing between them are at least {empty_us:.2} us apart, taken off each operation on a plain stream"
    )?;
    for path in paths {
        writeln!(out)?;
        print_path(path, &mut out)?;
    }
    if let Some(reason) = not_captured {
        writeln!(out, "\ncaptured: not timed, {reason}")?;
    }
    if paths.iter().flat_map(|path| &path.operations).any(|figures| figures.is_slow) {
        writeln!(
            out,
            "\n* over {:.0}% of the token and under {:.0}% of the ceiling",
            100.0 * SLOW_SHARE,
            100.0 * SLOW_OF_CEILING
        )?;
    }
    out.flush()
}

fn print_path(path: &PathProfile, out: &mut impl Write) -> io::Result<()> {
    let how = match path.name {
        "captured" | "together" => {
            "a recording of each operation alone; \"in step\" is what the step takes less without it"
        }
        _ => "a plain stream, an event behind each operation",
    };
    writeln!(
        out,
        "{}: the step takes {:.1} us, its operations {:.1} us ({how})",
        path.name, path.step_us, path.total.us
    )?;
    let is_captured = path.total.us_in_step.is_some();
    let mut header = vec![
        "operation",
        "calls",
        "us/call",
        "us",
        "MB",
        "GB/s",
        "GFLOP/s",
        "share",
        "floor us",
        "of ceiling",
    ];
    if is_captured {
        header.push("in step us");
    }
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header);
    for level in path.levels.iter().filter(|level| level.calls > 0) {
        table.add_row(sum_row(level));
        for figures in path.operations.iter().filter(|figures| figures.level == level.level) {
            let mark = if figures.is_slow { " *" } else { "" };
            table.add_row(row(figures, format!("  {}{mark}", figures.name)));
        }
    }
    for sum in [&path.layer, &path.total] {
        table.add_row(sum_row(sum));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    writeln!(out, "{}", table.trim_fmt())
}

/// A row of several operations, of which there is no call.
fn sum_row(figures: &Figures) -> Vec<String> {
    let mut cells = row(figures, figures.name.to_owned());
    cells[2].clear();
    cells
}

fn row(figures: &Figures, name: String) -> Vec<String> {
    let mut cells = vec![
        name,
        figures.calls.to_string(),
        format!("{:.2}", figures.us_per_call),
        format!("{:.1}", figures.us),
        format!("{:.3}", figures.bytes as f64 / 1e6),
        format!("{:.1}", figures.gb_per_s),
        if figures.flops > 0 { format!("{:.1}", figures.gflop_per_s) } else { String::new() },
        format!("{:.1}%", 100.0 * figures.share),
        format!("{:.2}", figures.floor_us),
        format!("{:.1}%", 100.0 * figures.of_ceiling),
    ];
    cells.extend(figures.us_in_step.map(|us| format!("{us:.1}")));
    cells
}
