//! The compiled kernels: they assemble for every architecture, spill nothing where it counts, and use dp4a.

use gpu_kernels::gemv::few::FEW_TOKENS;
use host::device::{ptx_image_for, ptx_images};
use std::path::PathBuf;
use std::process::Command;

/// Architectures that people have, and of which each is served by the newest PTX it is not older than.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// `make test` says where ptxas is; a CUDA toolkit has it on the PATH.
fn ptxas() -> PathBuf {
    std::env::var_os("WARPLINE_PTXAS").map_or_else(|| PathBuf::from("ptxas"), PathBuf::from)
}

/// What `ptxas -v` says of one kernel.
#[derive(Debug)]
struct Usage {
    kernel: String,
    registers: u32,
    spilled_bytes: u32,
    stack_bytes: u32,
}

fn assemble(architecture: &str, text: &str) -> Vec<Usage> {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let input = folder.join("kernels.ptx");
    std::fs::write(&input, text).unwrap();
    let output = Command::new(ptxas())
        .args(["-v", &format!("-arch={architecture}"), "-o"])
        .arg(folder.join("kernels.cubin"))
        .arg(&input)
        .output()
        .unwrap_or_else(|error| {
            panic!("{} does not run ({error}): scripts/fetch-ptxas brings it", ptxas().display())
        });
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ptxas refuses the kernels for {architecture}:\n{log}");

    let number_before = |line: &str, unit: &str| -> u32 {
        let head = line.split(unit).next().unwrap_or_default().trim_end();
        head.rsplit([' ', ','])
            .next()
            .unwrap_or_default()
            .parse()
            .unwrap_or_else(|_| panic!("no number in {line:?}"))
    };
    let mut usages: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let kernel = rest.split('\'').next().unwrap().to_owned();
            usages.push(Usage { kernel, registers: 0, spilled_bytes: 0, stack_bytes: 0 });
        } else if line.contains("bytes stack frame") {
            let usage = usages.last_mut().unwrap();
            usage.stack_bytes = number_before(line, " bytes stack frame");
            usage.spilled_bytes = number_before(line, " bytes spill stores");
        } else if line.contains("Used ") {
            usages.last_mut().unwrap().registers = number_before(line, " registers");
        }
    }
    usages
}

#[test]
fn kernels_assemble_without_spills() {
    for architecture in ARCHITECTURES {
        let image = ptx_image_for(architecture).unwrap();
        let own = format!("sm_{architecture}");
        let architecture = if image.runs_on(architecture + 1) { own.as_str() } else { image.arch };
        let usages = assemble(architecture, image.text);
        assert_eq!(usages.len(), image.kernels().count());
        for prefix in [
            "gemv",
            "gemv_few",
            "gemm",
            "pack_panels",
            "quantize_tokens",
            "attention",
            "prefill_attention",
            "rms_norm",
            "sample",
            "layers",
        ] {
            let hot: Vec<&Usage> = usages.iter().filter(|usage| usage.kernel.starts_with(prefix)).collect();
            // Clusters of so many blocks are compute capability 9.0's alone.
            if prefix == "layers" && architecture != "sm_90a" {
                assert!(hot.is_empty(), "{architecture}: {hot:?}");
                continue;
            }
            assert!(!hot.is_empty(), "no kernel is called {prefix}...");
            let most = hot.iter().max_by_key(|usage| usage.registers).unwrap();
            println!("{architecture}: {} {prefix} kernels, at most {} registers", hot.len(), most.registers);
            for usage in hot {
                assert_eq!((usage.spilled_bytes, usage.stack_bytes), (0, 0), "{architecture}: {usage:?}");
            }
        }
        // A block of 1024 threads does not start with more, since an SM has 65,536.
        for usage in usages.iter().filter(|usage| usage.kernel == "argmax") {
            assert!(usage.registers <= 64, "{architecture}: {usage:?}");
        }
    }
}

/// The driver gets one kernel at a time: each must be complete by itself.
#[test]
fn each_kernel_is_a_module() {
    for image in ptx_images() {
        let names: Vec<&str> = image.kernels().collect();
        assert!(names.len() > 30, "{}: {names:?}", image.arch);
        let mut assembled = 0;
        for name in &names {
            let module = image.module(name).unwrap();
            assert_eq!(module.matches(".entry ").count(), 1, "{name}");
            // Of each kind one, and all that share memory in other ways.
            let of_many = ["gemv", "gemm", "attention", "prefill_attention", "layers"]
                .iter()
                .any(|of| name.starts_with(of));
            if !of_many || ["q4_k", "128", "h1"].iter().any(|one| name.ends_with(one)) {
                let usages = assemble(image.arch, &module);
                assert_eq!(usages.iter().map(|usage| usage.kernel.as_str()).collect::<Vec<_>>(), [*name]);
                assembled += 1;
            }
        }
        println!("{}: {assembled} of {} kernels assembled by themselves", image.arch, names.len());
        let error = image.module("gemv").unwrap_err();
        assert!(error.to_string().contains("no kernel gemv"), "{error}");
    }
}

#[test]
fn products_for_many_tokens_use_tensor_cores() {
    for image in ptx_images() {
        let instruction = if image.arch == "sm_90a" { "wgmma.mma_async" } else { "mma.sync" };
        for kernel in
            ["gemm_tokens_128", "gemm_exact", "prefill_attention_d128", "prefill_attention_q8_0_d64"]
        {
            let body = image.module(kernel).unwrap();
            assert!(body.contains(instruction), "{}: {kernel} has no {instruction}", image.arch);
            assert!(!body.contains(".local"), "{}: {kernel} uses local memory", image.arch);
        }
    }
}

#[test]
fn integer_kernels_use_dp4a() {
    for image in ptx_images() {
        let arch = image.arch;
        // For each token the eight of a unit.
        for (kernel, n_tokens) in [("gemv", 1), ("gemv_few", FEW_TOKENS)] {
            for format in ["q8_0", "q4_1", "q4_k", "q6_k"] {
                let name = format!("{kernel}_{format}");
                let body = image.module(&name).unwrap();
                let count = body.matches("dp4a.s32.s32").count();
                assert!(count >= 8 * n_tokens, "{arch}: {name} has {count} dp4a instructions");
                assert!(!body.contains(".local"), "{arch}: {name} uses local memory");
            }
        }
    }
}
