//! Which thread this is, and the barrier of a block.

#[cfg(target_arch = "nvptx64")]
use core::arch::nvptx;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::with_thread;

macro_rules! index_functions {
    ($($name:ident, $intrinsic:ident, $getter:ident[$axis:literal], $doc:literal;)*) => {$(
        #[doc = $doc]
        #[inline(always)]
        pub fn $name() -> u32 {
            cfg_select! {
                // SAFETY: reads a special register.
                target_arch = "nvptx64" => unsafe { nvptx::$intrinsic() as u32 },
                _ => with_thread(|thread| thread.$getter()[$axis]),
            }
        }
    )*};
}

index_functions! {
    thread_idx_x, _thread_idx_x, thread_index[0], "The thread's index in its block, in x.";
    thread_idx_y, _thread_idx_y, thread_index[1], "The thread's index in its block, in y.";
    thread_idx_z, _thread_idx_z, thread_index[2], "The thread's index in its block, in z.";
    block_idx_x, _block_idx_x, block_index[0], "The block's index in the grid, in x.";
    block_idx_y, _block_idx_y, block_index[1], "The block's index in the grid, in y.";
    block_idx_z, _block_idx_z, block_index[2], "The block's index in the grid, in z.";
    block_dim_x, _block_dim_x, block_dim[0], "Threads in a block, in x.";
    block_dim_y, _block_dim_y, block_dim[1], "Threads in a block, in y.";
    block_dim_z, _block_dim_z, block_dim[2], "Threads in a block, in z.";
    grid_dim_x, _grid_dim_x, grid_dim[0], "Blocks in the grid, in x.";
    grid_dim_y, _grid_dim_y, grid_dim[1], "Blocks in the grid, in y.";
    grid_dim_z, _grid_dim_z, grid_dim[2], "Blocks in the grid, in z.";
}

/// The thread's index in the whole grid, in x.
#[inline(always)]
pub fn index_1d() -> u32 {
    block_idx_x() * block_dim_x() + thread_idx_x()
}

/// Waits until all threads of the block that have not returned are here. What they wrote to shared and global memory
/// before is then visible to all of them.
///
/// Every thread of the block must come to the same barrier. The emulator reports a block in which some never do.
#[inline(always)]
pub fn sync_threads() {
    cfg_select! {
        // SAFETY: a barrier touches no memory of its own.
        target_arch = "nvptx64" => unsafe { nvptx::_syncthreads() },
        _ => with_thread(|thread| thread.sync_threads()),
    }
}

/// Suspends the thread for about `nanoseconds`, for loops that wait for another thread.
#[inline(always)]
pub fn nanosleep(nanoseconds: u32) {
    cfg_select! {
        target_arch = "nvptx64" => {
            // SAFETY: touches no memory. Not `nomem`: loads must not move across a wait.
            unsafe { core::arch::asm!("nanosleep.u32 {};", in(reg32) nanoseconds, options(nostack, preserves_flags)) }
        }
        _ => {
            let _ = nanoseconds;
            spin_hint();
        }
    }
}

/// Says that the thread is waiting for another one to write to memory.
///
/// The emulator lets the other threads run; without this (or an atomic load) a loop that waits would never end
/// there. See [`emulator`](crate::emulator) for what may wait for what.
#[inline(always)]
pub fn spin_hint() {
    cfg_select! {
        target_arch = "nvptx64" => nanosleep(20),
        _ => with_thread(|thread| thread.spin()),
    }
}

/// Says that this thread has arrived where others of its block [meet for the last time](meet_for_the_last_time). It does not
/// wait for them, but returns. Whole warps make this call, in blocks of one dimension.
#[inline(always)]
pub fn arrive_at_last_meeting() {
    // On the emulator nobody waits for a thread that has returned.
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: waits for nothing. Not `nomem`: what this thread has written is there for those who wait.
    unsafe {
        core::arch::asm!(
            "{{ .reg .u32 threads;",
            "mov.u32 threads, %ntid.x;",
            "barrier.cta.arrive 1, threads; }}",
            options(nostack, preserves_flags),
        );
    }
}

/// Waits until every other thread of the block has called this as well, or [`arrive_at_last_meeting`]; the block meets no more.
/// What they have written to shared memory before is there. Whole warps make this call, in blocks of one dimension.
#[inline(always)]
pub fn meet_for_the_last_time() {
    cfg_select! {
        target_arch = "nvptx64" => {
            // SAFETY: waits. Not `nomem`: no access to memory may be moved across.
            unsafe {
                core::arch::asm!(
                    "{{ .reg .u32 threads;",
                    "mov.u32 threads, %ntid.x;",
                    "barrier.cta.sync 1, threads; }}",
                    options(nostack, preserves_flags),
                );
            }
        }
        _ => sync_threads(),
    }
}
