//! What a GPU kernel in Rust may use: thread indices, barriers, warp collectives, shared memory, atomics, integer
//! dot products, fast float functions. The names follow rust-cuda's crate of the same name.
//!
//! There is one API and two implementations. For `nvptx64-nvidia-cuda` every function is an intrinsic or a line of
//! PTX. For any other target it runs in the [`emulator`], which executes whole grids on the CPU's cores; a host
//! program launches the same [`kernel`] either there or, through the CUDA driver, on a GPU.
//!
//! A crate with kernels starts with
//!
//! ```ignore
//! #![cfg_attr(target_arch = "nvptx64", no_std)]
//! #![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]
//! ```
//!
//! and is an ordinary stable crate on the CPU.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(abi_unadjusted, asm_experimental_arch, link_llvm_intrinsics, stdarch_nvptx)
)]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]

// `#[kernel]` names the crate by its path; so do the doc tests and the crate's own kernels.
extern crate self as cuda_std;

pub mod atomic;
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
pub mod cluster;
pub mod codegen;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
pub mod float;
pub mod grid;
pub mod intrinsics;
#[cfg(not(target_arch = "nvptx64"))]
pub mod launch;
pub mod memory;
pub mod pipeline;
pub mod shared;
pub mod tensor;
pub mod thread;
pub mod warp;

pub use cuda_std_macros::kernel;
