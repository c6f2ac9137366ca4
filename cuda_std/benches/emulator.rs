//! What the emulator's primitives cost: `cargo bench -p cuda_std` prints it.

use cuda_std::emulator;
use cuda_std::kernel;
use cuda_std::launch::{Kernel, KernelArgs, LaunchConfig};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, sync_warp, warp_reduce_add, warp_reduce_add_n};
use std::time::Instant;

const ROUNDS: u32 = 10_000;

/// Nothing but starting and returning.
#[kernel]
unsafe fn trivial(out: *mut u32) {
    // SAFETY: one element per thread of a block.
    unsafe { *out.add(thread_idx_x() as usize) = 1 };
}

/// One reduction after the other.
#[kernel]
unsafe fn reduce(out: *mut f32) {
    let mut sum = 1.0;
    for _ in 0..ROUNDS {
        sum = warp_reduce_add(FULL_MASK, sum, 32) * (1.0 / 32.0);
    }
    // SAFETY: one element per thread of a block.
    unsafe { *out.add(thread_idx_x() as usize) = sum };
}

/// One reduction of four values after the other.
#[kernel]
unsafe fn reduce_4(out: *mut f32) {
    let mut sums = [1.0; 4];
    for _ in 0..ROUNDS {
        sums = warp_reduce_add_n(FULL_MASK, sums, 32).map(|sum| sum * (1.0 / 32.0));
    }
    // SAFETY: one element per thread of a block.
    unsafe { *out.add(thread_idx_x() as usize) = sums[0] };
}

/// One warp barrier after the other.
#[kernel]
unsafe fn warp_barriers() {
    for _ in 0..ROUNDS {
        sync_warp(FULL_MASK);
    }
}

/// One barrier after the other.
#[kernel]
unsafe fn barriers() {
    for _ in 0..ROUNDS {
        sync_threads();
    }
}

/// Nanoseconds per `n`, the best of a few.
fn time<A: KernelArgs + Copy>(what: &str, kernel: &Kernel<A>, grid: u32, block: u32, args: A, n: u32) {
    let config =
        LaunchConfig { grid: [grid, 1, 1], block: [block, 1, 1], dynamic_shared_bytes: 0, cluster: 1 };
    let run = || {
        let start = Instant::now();
        args.with_pointers(|pointers| {
            // SAFETY: the arguments have the kernel's types and point to 1,024 elements.
            unsafe { emulator::launch(kernel.info(), config, pointers) }
                .expect("the kernels do nothing wrong");
        });
        start.elapsed().as_secs_f64() * 1e9 / f64::from(n)
    };
    let best = (0..5).map(|_| run()).fold(f64::INFINITY, f64::min);
    println!("{what}: {best:.0} ns");
}

fn main() {
    let mut words = vec![0u32; 1024];
    let mut floats = vec![0f32; 1024];
    let (words, floats) = (words.as_mut_ptr(), floats.as_mut_ptr());
    time("warp_reduce_add, 32 lanes", &REDUCE, 1, 32, (floats,), ROUNDS);
    time("warp_reduce_add_n of 4, 32 lanes", &REDUCE_4, 1, 32, (floats,), ROUNDS);
    time("sync_warp, 32 lanes", &WARP_BARRIERS, 1, 32, (), ROUNDS);
    time("sync_threads, 256 threads", &BARRIERS, 1, 256, (), ROUNDS);
    time("sync_threads, 1024 threads", &BARRIERS, 1, 1024, (), ROUNDS);
    time("a launch of 1 block of 32 trivial threads", &TRIVIAL, 1, 32, (words,), 1);
    time("32 trivial threads, of 100,000 blocks on all cores", &TRIVIAL, 100_000, 32, (words,), 100_000);
    time("256 trivial threads, of 10,000 blocks on all cores", &TRIVIAL, 10_000, 256, (words,), 10_000);
}
