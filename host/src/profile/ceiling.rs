//! The bandwidth that a kernel which only reads reaches: what no other kernel can exceed for long.

use super::median;
use crate::device::{Buffer, Device};
use crate::ops;
use anyhow::Result;
use gpu_kernels::read::BLOCK_DIM;

/// Bytes that are read on a GPU, where there is room: many times any cache.
const GPU_BYTES: usize = 2 << 30;
/// Where there is no room for that, at least this many: more than the largest L2 cache.
const LEAST_GPU_BYTES: usize = 256 << 20;
/// Bytes that are read on the CPU, where a load costs far more than memory does.
const CPU_BYTES: usize = 16 << 20;
/// Blocks to a multiprocessor: which is best differs between GPUs.
const BLOCKS: [usize; 3] = [4, 8, 16];
/// How often each is timed.
const REPEATS: usize = 10;

/// Memory to be read, and how fast that is.
pub(super) struct Ceiling {
    data: Buffer<[u32; 4]>,
    sums: Buffer<u32>,
    /// Of one read, in microseconds.
    us: f64,
}

impl Ceiling {
    /// Times the reading of as much memory as there is room for: the best grid's median.
    pub(super) fn measure(device: &Device) -> Result<Self> {
        let data = memory(device)?;
        let mut best: Option<Self> = None;
        for blocks in BLOCKS {
            let mut sums = device.alloc(blocks * device.multiprocessors() as usize * BLOCK_DIM)?;
            let mut marks = vec![device.mark()?];
            for _ in 0..=REPEATS {
                ops::read(device, &data, &mut sums)?;
                marks.push(device.mark()?);
            }
            let times = marks.windows(2).map(|pair| device.microseconds_between(&pair[0], &pair[1]));
            // The first one loads the kernel.
            let us = median(times.skip(1).collect::<Result<_>>()?);
            if best.as_ref().is_none_or(|best| us < best.us) {
                best = Some(Self { data: data.part(0..data.len()), sums, us });
            }
        }
        Ok(best.expect("there is a grid"))
    }

    /// Bytes of one read.
    pub(super) fn n_bytes(&self) -> usize {
        self.data.n_bytes()
    }

    /// In 10^9 bytes per second.
    pub(super) fn gb_per_s(&self) -> f64 {
        self.n_bytes() as f64 / self.us / 1e3
    }

    /// Keeps a GPU busy for this long, so that what is issued meanwhile runs without waiting for the host. The CPU has
    /// done what is issued.
    pub(super) fn keep_busy(&mut self, device: &Device, us: f64) -> Result<()> {
        if !device.is_cuda() {
            return Ok(());
        }
        for _ in 0..(us / self.us).ceil() as usize {
            ops::read(device, &self.data, &mut self.sums)?;
        }
        Ok(())
    }
}

/// Memory to be read.
fn memory(device: &Device) -> Result<Buffer<[u32; 4]>> {
    let mut bytes = if device.is_cuda() { GPU_BYTES } else { CPU_BYTES };
    loop {
        match device.alloc_zeroed(bytes / size_of::<[u32; 4]>()) {
            Err(_) if device.is_cuda() && bytes > LEAST_GPU_BYTES => bytes /= 2,
            other => return other,
        }
    }
}
