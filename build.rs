//! Build script of `host`: compiles `gpu-kernels` to PTX, one file per GPU architecture.

use anyhow::{Context, Result};
use cuda_builder::CudaBuilder;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The architectures that Warpline is compiled for, oldest first; a GPU runs the newest that it is not older than, one
/// that ends with an `a` only if it is of this very architecture.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_90a"];

fn main() {
    // One line, as the compiler's own messages already stand above it.
    if let Err(error) = run() {
        println!("cargo::error={}", format!("{error:#}").trim().replace('\n', " "));
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let out_dir = PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let results = std::thread::scope(|scope| {
        let builds = ARCHITECTURES.map(|arch| {
            let path = out_dir.join(format!("{arch}.ptx"));
            scope.spawn(move || CudaBuilder::new("../gpu-kernels").arch(arch).copy_to(path).build())
        });
        builds.map(|build| build.join().expect("a build thread does not panic"))
    });
    let mut table = String::from("[\n");
    for result in results {
        let ptx = result?;
        let number = ptx.arch.trim_start_matches("sm_").trim_end_matches('a');
        let version: u32 = number.parse().context("an architecture is sm_<number>")?;
        let (arch, path) = (&ptx.arch, &ptx.path);
        table += &format!(
            "    PtxImage {{ arch: {arch:?}, version: {version}, text: include_str!({path:?}) }},\n"
        );
    }
    table += "]\n";
    std::fs::write(out_dir.join("ptx_images.rs"), table)?;
    println!("cargo:rerun-if-changed=../build.rs");

    if let Some(hash) = git_hash() {
        println!("cargo:rustc-env=WARPLINE_GIT_HASH={hash}");
    }
    Ok(())
}

/// The commit that is checked out, where this is a git checkout.
fn git_hash() -> Option<String> {
    for path in ["../.git/HEAD", "../.git/logs/HEAD"] {
        if Path::new(path).is_file() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let output = Command::new("git").args(["rev-parse", "--short=10", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
