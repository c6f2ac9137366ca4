//! Compiles a Rust kernel crate to PTX from a build script.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use cuda_builder::CudaBuilder;
//!
//! let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
//! CudaBuilder::new("../gpu-kernels").arch("sm_90").copy_to(out.join("sm_90.ptx")).build()?;
//! # Ok(())
//! # }
//! ```
//!
//! The kernel crate is an ordinary library crate. It is built a second time here, for rustc's own
//! `nvptx64-nvidia-cuda` target, by the *device toolchain*: a fixed rustc with the source of `core`
//! ([`toolchain`]), since no prebuilt `core` for a given GPU architecture exists.

#![allow(clippy::multiple_crate_versions)]

mod ptx;
pub mod toolchain;

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

pub use ptx::Ptx;

/// rustc's target for NVIDIA GPUs.
const TARGET: &str = "nvptx64-nvidia-cuda";

/// The PTX version that is written: the drivers of CUDA 11.8 and later read it.
const PTX_VERSION: &str = "ptx78";
/// The same for compute capability 9.0 and later, with the instructions for bulk copies: CUDA 12.0.
const PTX_VERSION_90: &str = "ptx80";
/// The same for 9.0 alone, with those by which blocks of a cluster write to each other's shared memory: CUDA 12.1.
const PTX_VERSION_90A: &str = "ptx81";

/// Loops of a fixed length are unrolled as far as it goes: an array that is indexed at run time lies in local memory
/// instead of registers. Other loops are not: copies of a body that holds a whole tile only take registers.
const UNROLLING: &str = "-Cllvm-args=-unroll-threshold=4000 -Cllvm-args=-unroll-runtime=false";

/// Compiles one kernel crate for one GPU architecture.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    crate_dir: PathBuf,
    arch: String,
    copy_to: Option<PathBuf>,
    target_dir: Option<PathBuf>,
}

impl CudaBuilder {
    /// A build of the kernel crate in `crate_dir` (absolute, or relative to the crate whose build script runs),
    /// for `sm_80` unless [`arch`](Self::arch) says otherwise.
    pub fn new(crate_dir: impl Into<PathBuf>) -> Self {
        Self { crate_dir: crate_dir.into(), arch: "sm_80".into(), copy_to: None, target_dir: None }
    }

    /// The GPU architecture to compile for, such as `sm_90`: the PTX runs on this and every later one. With an `a` at its
    /// end, such as `sm_90a`, on this one alone.
    pub fn arch(mut self, arch: impl Into<String>) -> Self {
        self.arch = arch.into();
        self
    }

    /// Where a copy of the PTX goes.
    pub fn copy_to(mut self, path: impl Into<PathBuf>) -> Self {
        self.copy_to = Some(path.into());
        self
    }

    /// Where cargo keeps its intermediate files; `target/cuda-builder/<arch>` of the outer build by default,
    /// so that debug, release and test builds share one compiled `core`.
    pub fn target_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.target_dir = Some(path.into());
        self
    }

    /// Compiles the crate and checks the PTX.
    ///
    /// In a build script it also tells cargo which files the PTX depends on: the kernel crate's and those of
    /// every crate it has by path.
    ///
    /// # Errors
    /// When the device toolchain is missing (the message holds the command that installs it), when the crate
    /// does not compile (rustc's own messages go to stderr), or when the PTX is not self-contained.
    pub fn build(&self) -> Result<Ptx> {
        let crate_dir = self
            .crate_dir
            .canonicalize()
            .with_context(|| format!("cannot find the kernel crate {}", self.crate_dir.display()))?;
        println!("cargo:rerun-if-env-changed={}", toolchain::OVERRIDE);
        println!("cargo:rerun-if-changed={}", crate_dir.display());
        let toolchain = toolchain::find(&crate_dir)?;
        for dependency in path_dependencies(&toolchain, &crate_dir)? {
            println!("cargo:rerun-if-changed={}", dependency.display());
        }

        let target_dir = match &self.target_dir {
            Some(dir) => dir.clone(),
            None => default_target_dir()?.join(&self.arch),
        };
        let status = toolchain
            .cargo(&crate_dir)
            .args(["rustc", "--release", "--lib", "--crate-type", "cdylib"])
            .args(["-Zbuild-std=core", "--target", TARGET, "--target-dir"])
            .arg(&target_dir)
            .args(["--", "--emit=asm", "-Clinker=true"])
            .env("RUSTFLAGS", self.rustflags()?)
            .status()
            .with_context(|| format!("cannot run {}", toolchain.cargo.display()))?;
        ensure!(status.success(), "the kernels in {} do not compile for {}", crate_dir.display(), self.arch);

        let name = crate_name(&crate_dir)?.replace('-', "_");
        let assembly = target_dir.join(TARGET).join("release/deps").join(format!("{name}.s"));
        let ptx = Ptx::read(&assembly, &self.arch)?;
        match &self.copy_to {
            Some(path) => ptx.copy_to(path),
            None => Ok(ptx),
        }
    }
}

impl CudaBuilder {
    /// The compiler's flags. Device code asks for instructions of newer GPUs with `cfg(cuda_sm_90)`: compute
    /// capability 9.0 or later; for those of 9.0 alone, which no later one has (`wgmma`, clusters of 16 blocks), with `cfg(cuda_sm_90a)`.
    fn rustflags(&self) -> Result<String> {
        let number: u32 = self
            .arch
            .strip_prefix("sm_")
            .and_then(|digits| digits.trim_end_matches(|c: char| c.is_ascii_lowercase()).parse().ok())
            .with_context(|| format!("an architecture is sm_<number>, found {}", self.arch))?;
        let ptx_version = match number {
            _ if self.arch == "sm_90a" => PTX_VERSION_90A,
            90.. => PTX_VERSION_90,
            _ => PTX_VERSION,
        };
        let mut newer = String::new();
        if number >= 90 {
            newer += " --cfg cuda_sm_90";
        }
        if self.arch == "sm_90a" {
            newer += " --cfg cuda_sm_90a";
        }
        Ok(format!(
            "-Ctarget-cpu={} -Ctarget-feature=+{ptx_version} -Zunstable-options -Cpanic=immediate-abort{newer} {UNROLLING}",
            self.arch
        ))
    }
}

/// `target/cuda-builder` beside the outer build's own folders.
fn default_target_dir() -> Result<PathBuf> {
    let out_dir =
        std::env::var_os("OUT_DIR").context("OUT_DIR is not set: give target_dir outside a build script")?;
    // OUT_DIR is target/<profile>/build/<package>-<hash>/out.
    let target = Path::new(&out_dir).ancestors().nth(4).context("OUT_DIR is not inside a target folder")?;
    Ok(target.join("cuda-builder"))
}

/// The folders of all crates that the crate in `crate_dir` reaches by path, itself included.
fn path_dependencies(toolchain: &toolchain::Toolchain, crate_dir: &Path) -> Result<Vec<PathBuf>> {
    let output = toolchain
        .cargo(crate_dir)
        .args(["tree", "--prefix", "none", "--edges", "normal,build", "--target", TARGET])
        .output()
        .with_context(|| format!("cannot run {}", toolchain.cargo.display()))?;
    ensure!(
        output.status.success(),
        "cargo tree failed in {}: {}",
        crate_dir.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    // Lines read `name v1.2.3 (/path/to/crate)`, with `(proc-macro)` and `(*)` where they apply.
    let paths = String::from_utf8_lossy(&output.stdout)
        .lines()
        .flat_map(|line| line.split(" (").skip(1))
        .map(|part| PathBuf::from(part.trim_end_matches(')')))
        .filter(|path| path.is_absolute())
        .collect();
    Ok(paths)
}

/// The package name that the crate's manifest gives.
fn crate_name(crate_dir: &Path) -> Result<String> {
    let manifest = crate_dir.join("Cargo.toml");
    let text =
        std::fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    text.lines()
        .skip_while(|line| line.trim() != "[package]")
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == "name")
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        .with_context(|| format!("{} names no package", manifest.display()))
}

/// What the outer cargo or rustup set for its own build, which a nested cargo must not inherit.
fn clear_outer_cargo(command: &mut Command) {
    const CLEARED: [&str; 8] = [
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "CARGO",
        "RUSTUP_TOOLCHAIN",
        "RUSTC_LINKER",
    ];
    for (name, _) in std::env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let from_cargo =
            text.starts_with("CARGO_") && text != "CARGO_HOME" && !text.starts_with("CARGO_NET_");
        if from_cargo || CLEARED.contains(&text) {
            command.env_remove(&name);
        }
    }
}
