//! The CPU as a device: kernels run in `cuda_std`'s emulator, at once, over all cores.

use anyhow::{Result, anyhow};
use cuda_std::emulator;
use cuda_std::launch::{KernelInfo, LaunchConfig};
use std::alloc::{Layout, alloc, dealloc};
use std::ffi::c_void;
use std::ptr::NonNull;

/// Buffers start at multiples of this, as CUDA's do.
const ALIGNMENT: usize = 256;

pub(super) struct CpuDevice {
    cores: usize,
    /// Why there is no GPU, where one was wanted.
    reason: Option<String>,
}

impl CpuDevice {
    pub(super) fn new(reason: Option<String>) -> Self {
        Self { cores: std::thread::available_parallelism().map_or(1, usize::from), reason }
    }

    pub(super) fn describe(&self) -> String {
        let cores = format!("CPU, {} core{}", self.cores, if self.cores == 1 { "" } else { "s" });
        match &self.reason {
            Some(reason) => format!("{cores}, running the GPU kernels in the emulator (no GPU: {reason})"),
            None => format!("{cores}, running the GPU kernels in the emulator"),
        }
    }

    pub(super) fn cores(&self) -> u32 {
        self.cores as u32
    }

    pub(super) fn zero(&self, start: *mut u8, bytes: usize) -> Result<()> {
        // SAFETY: the memory is a buffer of this length, and no kernel runs between calls.
        unsafe { std::ptr::write_bytes(start, 0, bytes) };
        Ok(())
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<CpuMemory> {
        CpuMemory::new(bytes).ok_or_else(|| anyhow!("out of memory: {bytes} bytes needed for a buffer"))
    }

    pub(super) fn upload(&self, to: *mut u8, bytes: &[u8]) -> Result<()> {
        // SAFETY: `to` is a buffer of this length, and no kernel runs between calls.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    pub(super) fn download(&self, from: *const u8, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: `from` is a buffer of this length, and no kernel runs between calls.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// # Safety
    /// The pointers are to arguments that keep the kernel's contract.
    pub(super) unsafe fn launch(
        &self,
        kernel: &KernelInfo,
        config: LaunchConfig,
        pointers: &[*mut c_void],
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { emulator::launch(kernel, config, pointers)? };
        Ok(())
    }
}

/// Memory at a multiple of [`ALIGNMENT`].
pub(super) struct CpuMemory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory, owned.
unsafe impl Send for CpuMemory {}
// SAFETY: nothing is read or written through a shared reference without a kernel's or copy's own contract.
unsafe impl Sync for CpuMemory {}

impl CpuMemory {
    fn new(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).ok()?;
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        Some(Self { start, layout })
    }

    pub(super) fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for CpuMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
