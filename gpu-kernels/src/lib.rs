//! Warpline's kernels: one file per operation, one file per weight format.
//!
//! The crate is compiled twice. For `nvptx64-nvidia-cuda` it becomes the PTX that `host` loads. For the host's own
//! target it is an ordinary library: it gives `host` the block structs, the tile sizes and, through `cuda_std`'s
//! emulator, the same kernels on the CPU.
//!
//! Kernels know nothing of files or models. They take raw pointers into device memory; the launcher of each
//! (`host::ops`) is the one place that calls it, and it checks every length first.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]

pub mod activations;
pub mod argmax;
pub mod attention;
pub mod block;
pub mod embed;
pub mod formats;
pub mod gemm;
pub mod gemv;
pub mod kv_cache;
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
pub mod layers;
pub mod many_output;
pub mod math;
pub mod operand;
pub mod pack;
pub mod panels;
pub mod prefill_attention;
pub mod quantize;
pub mod random;
pub mod read;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod step;
pub mod swiglu;
pub mod token_vector;
