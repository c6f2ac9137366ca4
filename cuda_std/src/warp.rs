//! Collectives of a warp: 32 neighbouring threads of a block, called lanes.
//!
//! `mask` names the lanes that take part, [`FULL_MASK`] for all. Every lane in it that has not returned must call the
//! same function with the same mask. `width` divides the warp into groups of that many lanes (a power of two, at most
//! [`WARP_SIZE`]) that work apart from each other.
//!
//! A value that comes from a lane outside the mask, or from one that has returned, is unspecified; the emulator makes
//! all its bits ones (a NaN). The emulator computes reductions in exactly a GPU's order, so floats are equal to the bit.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::with_thread;

mod reduce;
mod shuffle;
mod vote;

pub use reduce::{
    Reduce, warp_max_u32, warp_reduce_add, warp_reduce_add_4, warp_reduce_add_n, warp_reduce_max,
    warp_sum_u32,
};
pub use shuffle::{
    Shuffle, warp_shuffle_down, warp_shuffle_idx, warp_shuffle_up, warp_shuffle_xor, warp_shuffle_xor_n,
};
pub use vote::{sync_warp, warp_vote_all, warp_vote_any, warp_vote_ballot};

/// Lanes in a warp.
pub const WARP_SIZE: u32 = 32;

/// The mask of all lanes.
pub const FULL_MASK: u32 = u32::MAX;

/// A value that is the same for all lanes, which make this call together.
///
/// It goes through a shuffle, by which the assembler knows that it is: what follows from it is worked out once for the warp, in
/// uniform registers, and what lies behind a branch on it is not compiled for a warp that has parted. On the emulator a value that is
/// not the same is a panic.
#[inline(always)]
#[track_caller]
pub fn warp_uniform(value: u32) -> u32 {
    let first = warp_shuffle_idx(FULL_MASK, value, 0, WARP_SIZE);
    #[cfg(not(target_arch = "nvptx64"))]
    assert_eq!(value, first, "warp_uniform: lane {} has another value than lane 0", lane_id());
    first
}

/// This thread's lane: its place in the warp.
#[inline(always)]
pub fn lane_id() -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let lane;
            // SAFETY: reads a special register.
            unsafe {
                core::arch::asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack, preserves_flags))
            }
            lane
        }
        _ => with_thread(|thread| thread.lane()),
    }
}

/// This thread's warp in a one-dimensional block: `thread_idx_x / 32`.
#[inline(always)]
pub fn warp_id() -> u32 {
    crate::thread::thread_idx_x() / WARP_SIZE
}

/// `width` must be a power of two up to the size of a warp.
#[inline(always)]
#[track_caller]
fn check_width(width: u32) {
    if cfg!(any(not(target_arch = "nvptx64"), debug_assertions)) {
        assert!(
            width.is_power_of_two() && width <= WARP_SIZE,
            "a width of {width} lanes: it must be a power of two, at most {WARP_SIZE}"
        );
    }
}
