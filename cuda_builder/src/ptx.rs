//! The PTX that came out, and the checks that it must pass before anything loads it.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// A compiled PTX file.
#[derive(Clone, Debug)]
pub struct Ptx {
    /// Where it is.
    pub path: PathBuf,
    /// The architecture it was compiled for, such as `sm_90`.
    pub arch: String,
    /// The names of its kernels, in file order.
    pub kernels: Vec<String>,
}

impl Ptx {
    /// Reads and checks the compiler's output.
    pub(crate) fn read(path: &Path, arch: &str) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the PTX {}", path.display()))?;
        let kernels = check(&text, arch).and_then(|()| {
            let bounded = with_launch_bounds(&text)?;
            if bounded != text {
                std::fs::write(path, &bounded)?;
            }
            Ok(kernel_names(&text))
        });
        let kernels = kernels.with_context(|| format!("the PTX {} cannot be used", path.display()))?;
        Ok(Self { path: path.to_owned(), arch: arch.to_owned(), kernels })
    }

    /// Copies the file, leaving one with equal content untouched so that nothing after it is rebuilt.
    pub(crate) fn copy_to(&self, path: &Path) -> Result<Self> {
        let new = std::fs::read(&self.path)?;
        if std::fs::read(path).ok().as_deref() != Some(&new) {
            std::fs::write(path, &new).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(Self { path: path.to_owned(), ..self.clone() })
    }
}

/// A kernel file must name its target, hold a kernel, and have nothing but kernels: each is loaded by itself, without what it would call.
fn check(text: &str, arch: &str) -> Result<()> {
    let target = text.lines().find_map(|line| line.trim().strip_prefix(".target ")).unwrap_or("none");
    ensure!(target.split(',').any(|part| part.trim() == arch), "it is for {target}, not for {arch}");
    ensure!(
        !kernel_names(text).is_empty(),
        "it holds no kernel: is #[kernel] on the functions, are they reachable?"
    );
    let undefined: Vec<&str> =
        text.lines().filter(|line| line.trim_start().starts_with(".extern .func")).collect();
    ensure!(
        undefined.is_empty(),
        "it calls functions that do not exist on the GPU: {}",
        undefined.join("; ")
    );
    let functions: Vec<&str> = text.lines().filter_map(function_name).collect();
    ensure!(
        functions.is_empty(),
        "it has functions that are no kernels, where each kernel is loaded by itself: mark them #[inline(always)], and make one of a \
         closure that is called in several places: {}",
        functions.join("; ")
    );
    Ok(())
}

/// The name of a function that is no kernel, in the line that begins it.
fn function_name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once(".func ")?;
    let is_declaration = before.split_whitespace().all(|word| word.starts_with('.') && word != ".extern");
    // What it returns comes first, in parentheses.
    let name =
        after.trim_start().strip_prefix('(').map_or(after, |rest| rest.split_once(')').map_or("", |it| it.1));
    let name = name.trim_start().split(['(', ' ', ';']).next().unwrap_or(name);
    (is_declaration && !name.is_empty()).then_some(name)
}

/// What a line of the assembly starts with that gives a kernel's launch bounds: `#[kernel(launch_bounds(..))]` writes
/// it, followed by the kernel's name, the threads of a block, and the blocks on a multiprocessor.
const LAUNCH_BOUNDS: &str = "// cuda_std launch_bounds ";

/// The text with directives for the launch bounds that its comments give; the comments go.
fn with_launch_bounds(text: &str) -> Result<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let bounds: Vec<String> =
        lines.iter().filter_map(|line| line.trim().strip_prefix(LAUNCH_BOUNDS)).map(str::to_owned).collect();
    lines.retain(|line| !line.trim().starts_with(LAUNCH_BOUNDS));
    for bound in bounds {
        let [name, threads, blocks] = bound.split(' ').collect::<Vec<_>>()[..] else {
            bail!("launch bounds are a name and two numbers, found {bound:?}");
        };
        let start = format!(".entry {name}(");
        let entry = lines.iter().position(|line| line.contains(&start));
        let entry = entry.with_context(|| format!("launch bounds for {name}, which is no kernel"))?;
        // The directives stand between the parameters and the body.
        let body = lines[entry..].iter().position(|line| line.trim_start().starts_with('{'));
        let body = entry + body.with_context(|| format!("the kernel {name} has no body"))?;
        lines.insert(body, format!(".maxntid {threads}, 1, 1\n.minnctapersm {blocks}"));
    }
    Ok(lines.join("\n") + "\n")
}

fn kernel_names(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.split_once(".entry "))
        .map(|(_, rest)| rest.split(['(', ' ']).next().unwrap_or(rest).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = ".version 7.8\n.target sm_90\n.address_size 64\n";

    #[test]
    fn kernels_are_listed_by_name() {
        let text = format!("{HEAD}.visible .entry rms_norm(\n.visible .entry gemv_q4_k(\n");
        assert!(check(&text, "sm_90").is_ok());
        assert_eq!(kernel_names(&text), ["rms_norm", "gemv_q4_k"]);
    }

    #[test]
    fn launch_bounds_become_directives() {
        let kernel = |name| format!(".visible .entry {name}(\n\t.param .u32 n\n)\n");
        let comment = "\t// cuda_std launch_bounds b 256 2";
        let text = format!("{HEAD}{comment}\n{}{{\n}}\n{}{{\n}}\n", kernel("a"), kernel("b"));
        let expected = format!(
            "{HEAD}{}{{\n}}\n{}.maxntid 256, 1, 1\n.minnctapersm 2\n{{\n}}\n",
            kernel("a"),
            kernel("b")
        );
        assert_eq!(with_launch_bounds(&text).unwrap(), expected);
        assert_eq!(with_launch_bounds(&expected).unwrap(), expected);
        let error = with_launch_bounds(&text.replace("bounds b", "bounds c")).unwrap_err();
        assert!(error.to_string().contains("for c, which is no kernel"));
    }

    #[test]
    fn undefined_functions_and_wrong_targets_are_refused() {
        let text = format!("{HEAD}.visible .entry a(\n");
        assert!(check(&text, "sm_80").unwrap_err().to_string().contains("sm_80"));
        assert!(check(HEAD, "sm_90").unwrap_err().to_string().contains("no kernel"));
        let text = format!("{text}.extern .func (.param .b32 r) expf\n");
        assert!(check(&text, "sm_90").unwrap_err().to_string().contains("expf"));
    }

    #[test]
    fn functions_that_are_no_kernels_are_refused() {
        let kernel = format!("{HEAD}// the .func of a comment\n.visible .entry a(\n");
        assert!(check(&kernel, "sm_90").is_ok());
        for (line, name) in [
            (".func _RNCNvMs_8multiply0B5_", "_RNCNvMs_8multiply0B5_"),
            (".visible .func (.param .b32 r) square(", "square"),
            (".weak .func  cube(.param .b32 x);", "cube"),
        ] {
            let error = check(&format!("{kernel}{line}\n"), "sm_90").unwrap_err().to_string();
            assert!(error.ends_with(&format!(": {name}")), "{line}: {error}");
        }
    }
}
