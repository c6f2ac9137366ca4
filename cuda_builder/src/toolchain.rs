//! The device toolchain: a fixed rustc and cargo, with the source of `core`.
//!
//! Three places are looked at, in this order: the folder that the environment variable [`OVERRIDE`] names;
//! rustup's toolchain of the version that the kernel crate's `rust-toolchain.toml` pins; the system's rustc in
//! `/usr/bin` (Debian's `rustc-web`), when it has that version.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names a folder that holds `bin/rustc` and `bin/cargo`, such as the sysroot of a toolchain.
pub const OVERRIDE: &str = "CUDA_BUILDER_TOOLCHAIN";

/// A rustc and a cargo that can compile for the GPU.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// The cargo of the same version.
    pub cargo: PathBuf,
}

impl Toolchain {
    /// A cargo command that runs in `dir` with this toolchain and nothing of an outer cargo's settings.
    pub(crate) fn cargo(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.cargo);
        crate::clear_outer_cargo(&mut command);
        command
            .current_dir(dir)
            .env("RUSTC", &self.rustc)
            // -Zbuild-std and the nvptx intrinsics are unstable; this lets a stable compiler accept them.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
        command
    }

    fn in_folder(folder: &Path) -> Self {
        Self { rustc: folder.join("bin/rustc"), cargo: folder.join("bin/cargo") }
    }

    /// `None` when the compiler is there, has the version `wanted` (if one is given) and the source of `core`;
    /// otherwise what is missing.
    fn lacks(&self, wanted: Option<&str>) -> Option<String> {
        if !self.rustc.is_file() || !self.cargo.is_file() {
            return Some(format!("{} and {} are not both there", self.rustc.display(), self.cargo.display()));
        }
        let ask = |arguments: &[&str]| -> Option<String> {
            let output = Command::new(&self.rustc).args(arguments).output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let Some(version) = ask(&["--version"]) else {
            return Some(format!("{} does not run", self.rustc.display()));
        };
        if let Some(wanted) = wanted
            && version.split(' ').nth(1) != Some(wanted)
        {
            return Some(format!("{} is {version}, not {wanted}", self.rustc.display()));
        }
        let sysroot = PathBuf::from(ask(&["--print", "sysroot"]).unwrap_or_default());
        let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        (!source.is_file())
            .then(|| format!("{} has no library source ({})", self.rustc.display(), source.display()))
    }
}

/// Finds the device toolchain for the kernel crate in `crate_dir`.
///
/// # Errors
/// When there is none: the message says where it was looked for and which command installs it.
pub fn find(crate_dir: &Path) -> Result<Toolchain> {
    let version = pinned_version(crate_dir)?;
    if let Some(folder) = std::env::var_os(OVERRIDE) {
        let toolchain = Toolchain::in_folder(Path::new(&folder));
        return match toolchain.lacks(None) {
            None => Ok(toolchain),
            Some(reason) => bail!("{OVERRIDE} names {}, but {reason}", Path::new(&folder).display()),
        };
    }
    let mut reasons = Vec::new();
    let rustup = rustup_folder(&version);
    for toolchain in rustup
        .iter()
        .map(|folder| Toolchain::in_folder(folder))
        .chain([Toolchain::in_folder(Path::new("/usr"))])
    {
        match toolchain.lacks(Some(&version)) {
            None => return Ok(toolchain),
            Some(reason) => reasons.push(reason),
        }
    }
    let command = if Path::new("/etc/debian_version").is_file() {
        "sudo apt-get install rustc-web cargo-web rust-web-src".to_owned()
    } else {
        format!("rustup toolchain install {version} --profile minimal --component rust-src")
    };
    bail!(
        "the device toolchain (rustc {version} with its library source) is missing: {}. Install it with:\n\n    {command}\n",
        reasons.join("; ")
    )
}

/// The `channel` of the kernel crate's `rust-toolchain.toml`.
fn pinned_version(crate_dir: &Path) -> Result<String> {
    let path = crate_dir.join("rust-toolchain.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .filter_map(|line| line.split_once('='))
        .find(|(key, _)| key.trim() == "channel")
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        .with_context(|| format!("{} names no channel", path.display()))
}

/// Where rustup keeps the toolchain `version` of this machine's own platform, if it has it.
fn rustup_folder(version: &str) -> Option<PathBuf> {
    let home = match std::env::var_os("RUSTUP_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".rustup"),
    };
    let host = std::env::var("HOST").ok()?;
    Some(home.join("toolchains").join(format!("{version}-{host}")))
}
