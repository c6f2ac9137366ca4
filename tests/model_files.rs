//! Where the real models are that some tests need; scripts/fetch-model puts them into the cache.

use std::path::PathBuf;

fn cached(variable: &str, file: &str) -> PathBuf {
    std::env::var_os(variable).map(PathBuf::from).unwrap_or_else(|| {
        let home = std::env::var_os("HOME").expect("HOME is set");
        PathBuf::from(home).join(".cache/warpline").join(file)
    })
}

/// SmolLM2-135M-Instruct, which `make test` brings.
pub fn smollm2() -> PathBuf {
    let path = cached("WARPLINE_SMOLLM2", "SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is not there: scripts/fetch-model smollm2 brings it", path.display());
    path
}

/// Qwen2.5-Coder-1.5B-Instruct, where somebody has fetched its gigabyte.
pub fn qwen() -> Option<PathBuf> {
    let path = cached("WARPLINE_QWEN", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf");
    path.is_file().then_some(path)
}
