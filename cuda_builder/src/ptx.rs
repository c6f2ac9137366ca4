//! The PTX that came out, and the checks that it must pass before anything loads it.

use anyhow::{Context, Result, ensure};
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
        check(&text, arch).with_context(|| format!("the PTX {} cannot be used", path.display()))?;
        Ok(Self { path: path.to_owned(), arch: arch.to_owned(), kernels: kernel_names(&text) })
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

/// A kernel file must name its target, hold a kernel, and call nothing that it does not define.
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
    Ok(())
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
    fn undefined_functions_and_wrong_targets_are_refused() {
        let text = format!("{HEAD}.visible .entry a(\n");
        assert!(check(&text, "sm_80").unwrap_err().to_string().contains("sm_80"));
        assert!(check(HEAD, "sm_90").unwrap_err().to_string().contains("no kernel"));
        let text = format!("{text}.extern .func (.param .b32 r) expf\n");
        assert!(check(&text, "sm_90").unwrap_err().to_string().contains("expf"));
    }
}
