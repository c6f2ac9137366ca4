//! A chart of one path: a bar per operation, and its floor.

use super::{Figures, Level, PathProfile, Profile};
use anyhow::{Context as _, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// All lengths in pixels.
const WIDTH: i32 = 1080;
/// Where bars start, and where the longest one ends.
const LEFT: i32 = 230;
const RIGHT: i32 = 850;
/// Above the first bar, and below the last one.
const TOP: i32 = 84;
const BOTTOM: i32 = 50;
/// From one bar to the next, and its own height.
const ROW: i32 = 30;
const BAR: i32 = 18;

const INK: RGBColor = RGBColor(34, 34, 34);
const GRID: RGBColor = RGBColor(224, 224, 224);

/// The color of a level's bars.
fn color(level: Option<Level>) -> RGBColor {
    match level {
        Some(Level::Macro) => RGBColor(66, 133, 190),
        Some(Level::Midi) => RGBColor(230, 145, 56),
        Some(Level::Micro) | None => RGBColor(110, 168, 100),
    }
}

/// An SVG picture of the last path: for each operation a bar as long as its time a token, with a line across where its
/// floor is.
///
/// # Errors
/// When no path was timed, or the picture cannot be made.
pub fn draw(profile: &Profile, title: &str) -> Result<String> {
    let path = profile.paths.last().context("no path was timed")?;
    let mut svg = String::new();
    let height = TOP + BOTTOM + ROW * path.operations.len() as i32;
    let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
    let summary = format!(
        "{}: the step takes {:.1} us, its operations {:.1} us; black lines: their bytes at {:.0} GB/s",
        path.name, path.step_us, path.total.us, profile.ceiling_gb_per_s
    );
    // The error borrows from the area.
    draw_on(&area, path, [title, &summary])
        .and_then(|()| area.present())
        .map_err(|e| anyhow!("cannot draw: {e}"))?;
    drop(area);
    Ok(svg)
}

type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw_on<'a>(area: &Area<'a>, path: &PathProfile, [title, summary]: [&str; 2]) -> Drawn<'a> {
    area.fill(&WHITE)?;
    text(area, title, (20, 24), 17, HPos::Left)?;
    text(area, summary, (20, 50), 14, HPos::Left)?;
    for (i, level) in Level::ALL.into_iter().enumerate() {
        let x = RIGHT + 20 + 70 * i as i32;
        area.draw(&Circle::new((x, 50), 6, color(Some(level)).filled()))?;
        text(area, level.name(), (x + 12, 50), 14, HPos::Left)?;
    }

    let longest = path.operations.iter().map(|figures| figures.us.max(figures.floor_us)).fold(1e-3, f64::max);
    let at = |us: f64| LEFT + (us / longest * f64::from(RIGHT - LEFT)).round() as i32;
    let end = TOP + ROW * path.operations.len() as i32;
    let step = tick(longest);
    for i in 0..=(longest / step) as usize {
        let us = step * i as f64;
        area.draw(&PathElement::new([(at(us), TOP - 6), (at(us), end)], GRID))?;
        text(area, &format!("{}", (us * 1e6).round() / 1e6), (at(us), end + 12), 13, HPos::Center)?;
    }
    text(area, "us a token", (RIGHT, end + 32), 13, HPos::Right)?;
    for (i, figures) in path.operations.iter().enumerate() {
        bar(area, figures, TOP + ROW * i as i32, &at)?;
    }
    Ok(())
}

fn bar<'a>(area: &Area<'a>, figures: &Figures, top: i32, at: &dyn Fn(f64) -> i32) -> Drawn<'a> {
    let (middle, start) = (top + ROW / 2, at(0.0));
    let (upper, lower) = (middle - BAR / 2, middle + BAR / 2);
    // What takes nearly nothing is still seen.
    let end = at(figures.us).max(start + 1);
    let floor = at(figures.floor_us);
    area.draw(&Rectangle::new([(start, upper), (end, lower)], color(figures.level).filled()))?;
    area.draw(&PathElement::new([(floor, upper - 4), (floor, lower + 4)], INK.stroke_width(2)))?;
    text(area, figures.name, (LEFT - 10, middle), 14, HPos::Right)?;
    let label =
        format!("{:.1} us, floor {:.1} ({:.0}%)", figures.us, figures.floor_us, 100.0 * figures.of_ceiling);
    text(area, &label, (end.max(floor) + 8, middle), 14, HPos::Left)
}

/// Text beside or around a point, in its middle.
fn text<'a>(area: &Area<'a>, text: &str, at: (i32, i32), size: i32, side: HPos) -> Drawn<'a> {
    let style = TextStyle::from(("sans-serif", size)).color(&INK).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text, at, style))
}

/// A round number that divides `longest` into 4 to 10 parts.
fn tick(longest: f64) -> f64 {
    let power = 10f64.powf((longest / 4.0).log10().floor());
    [5.0, 2.0, 1.0].map(|n| n * power).into_iter().find(|step| longest / step >= 4.0).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        for (longest, expected) in [(4.0, 1.0), (9.99, 2.0), (21.0, 5.0), (812.0, 200.0), (0.5, 0.1)] {
            let step = tick(longest);
            assert!((step - expected).abs() < 1e-9, "{longest}: {step}");
        }
    }
}
