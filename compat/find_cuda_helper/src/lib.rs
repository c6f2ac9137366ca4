//! Stand-in for rust-cuda's `find_cuda_helper`, patched in by the workspace.
//!
//! The build scripts of `cust` and `cust_raw` call [`include_cuda`] to find a CUDA toolkit and to link
//! `libcuda`. Warpline's binaries define those symbols themselves (`compat/cuda_driver`) and open the
//! driver at run time, so there is nothing to find and nothing to link.

/// Does nothing: no CUDA toolkit is needed to build.
pub fn include_cuda() {}
