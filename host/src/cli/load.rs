//! Opening files, devices and models, with progress on stderr.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use host::device::Device;
use host::gguf::Gguf;
use host::model::{Model, ModelOptions};
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{ModelArgs, RunArgs};
use super::status;

/// Opens the device, says which, and loads the model onto it.
pub(super) fn model(gguf: &Gguf, run: &RunArgs, options: &ModelOptions) -> Result<Model> {
    with_progress(run, |device, progress| Model::load(device, gguf, options, progress))
}

/// The same of a file, or of random weights.
pub(super) fn file_or_preset(args: &ModelArgs, run: &RunArgs, options: &ModelOptions) -> Result<Model> {
    match (&args.file, &args.preset) {
        (_, Some(preset)) => {
            with_progress(run, |device, progress| Model::random(device, preset, options, progress))
        }
        (Some(file), None) => model(&Gguf::open(file)?, run, options),
        (None, None) => bail!("needed a file or --preset"),
    }
}

fn with_progress(
    run: &RunArgs,
    load: impl FnOnce(Device, &mut dyn FnMut(u64, u64)) -> Result<Model>,
) -> Result<Model> {
    let start = Instant::now();
    let device = Device::open(run.device.into())?;
    status!("{}", device.describe());
    let opened = start.elapsed();
    let bar = progress_bar("loading {bar:30} {bytes} of {total_bytes}");
    let model = load(device, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let model = model?;
    let name = model.config().name.as_deref().unwrap_or("the model");
    let total = start.elapsed();
    status!(
        "loaded {} in {:.1} s (device and kernels {:.1} s, weights {:.1} s), context {} tokens",
        host::gguf::Shown::new(name),
        total.as_secs_f64(),
        opened.as_secs_f64(),
        (total - opened).as_secs_f64(),
        model.n_ctx()
    );
    Ok(model)
}

/// A bar on stderr, which stays hidden where stderr is no terminal.
pub(super) fn progress_bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

/// Reads a text file; `-` is stdin.
pub(super) fn text(path: &Path) -> Result<String> {
    let name = if path == Path::new("-") { "stdin".to_owned() } else { path.display().to_string() };
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        fs::read(path)
    };
    String::from_utf8(bytes.with_context(|| name.clone())?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow!("{name}: needed UTF-8 text, found the byte 0x{:02x} at offset {at}", e.as_bytes()[at])
    })
}
