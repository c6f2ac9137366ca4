//! The kernels' PTX, as the build script embeds it.

use anyhow::{Context as _, Result};

/// The kernels compiled for one GPU architecture.
#[derive(Debug)]
pub struct PtxImage {
    /// The architecture, such as `sm_90`.
    pub arch: &'static str,
    /// Its number: 90 for sm_90, which runs on compute capability 9.0 and later.
    pub version: u32,
    /// All kernels in one module.
    pub text: &'static str,
}

/// What starts a kernel in PTX.
const ENTRY: &str = "\n.visible .entry ";

/// Written by the build script, oldest architecture first.
const IMAGES: &[PtxImage] = &include!(concat!(env!("OUT_DIR"), "/ptx_images.rs"));

/// The kernels for each architecture, oldest first.
pub fn ptx_images() -> &'static [PtxImage] {
    IMAGES
}

/// The kernels for a GPU of compute capability `version / 10`.`version % 10`; `None` where it is too old.
pub fn ptx_image_for(version: u32) -> Option<&'static PtxImage> {
    IMAGES.iter().rev().find(|image| image.runs_on(version))
}

impl PtxImage {
    /// Whether a GPU of this compute capability takes it: PTX for sm_90a runs on 9.0 alone.
    pub fn runs_on(&self, version: u32) -> bool {
        if self.arch.ends_with('a') { version == self.version } else { version >= self.version }
    }

    /// The names of the kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> {
        self.text.split(ENTRY).skip(1).map(|rest| rest.split('(').next().unwrap_or(rest))
    }

    /// One kernel as a module of its own. The driver compiles a module as a whole when it loads it, and a run needs few
    /// of the kernels.
    ///
    /// # Errors
    /// When there is no kernel of this name.
    pub fn module(&self, kernel: &str) -> Result<String> {
        let mut parts = self.text.split(ENTRY);
        // What stands before all kernels: version, target, shared memory.
        let shared = parts.next().unwrap_or_default();
        let has_name = |text: &&str| text.strip_prefix(kernel).is_some_and(|rest| rest.starts_with('('));
        let body = parts.find(has_name).with_context(|| format!("the PTX has no kernel {kernel}"))?;
        Ok([shared, ENTRY, body].concat())
    }
}
