//! Votes, and the barrier of a warp.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{Collective, Lanes, collective};

/// Waits until all lanes of the mask are here. What they wrote to memory before is then visible to all of them.
#[inline(always)]
pub fn sync_warp(mask: u32) {
    cfg_select! {
        // SAFETY: a barrier touches no memory of its own.
        target_arch = "nvptx64" => unsafe { device::sync(mask) },
        _ => collective::<Sync>(mask, 0, ()),
    }
}

/// Whether `predicate` holds in any lane of the mask.
#[inline(always)]
pub fn warp_vote_any(mask: u32, predicate: bool) -> bool {
    cfg_select! {
        // SAFETY: a vote touches no memory.
        target_arch = "nvptx64" => unsafe { device::any(mask, predicate) },
        _ => warp_vote_ballot(mask, predicate) != 0,
    }
}

/// Whether `predicate` holds in every lane of the mask.
#[inline(always)]
pub fn warp_vote_all(mask: u32, predicate: bool) -> bool {
    cfg_select! {
        // SAFETY: a vote touches no memory.
        target_arch = "nvptx64" => unsafe { device::all(mask, predicate) },
        _ => warp_vote_ballot(mask, !predicate) == 0,
    }
}

/// The lanes of the mask in which `predicate` holds, one bit each.
#[inline(always)]
pub fn warp_vote_ballot(mask: u32, predicate: bool) -> u32 {
    cfg_select! {
        // SAFETY: a vote touches no memory.
        target_arch = "nvptx64" => unsafe { device::ballot(mask, predicate) },
        _ => collective::<Vote>(mask, 0, u32::from(predicate)),
    }
}

#[cfg(not(target_arch = "nvptx64"))]
struct Sync;

#[cfg(not(target_arch = "nvptx64"))]
impl Collective for Sync {
    type Operand = ();
    const NAME: &'static str = "sync_warp";

    fn compute(_lanes: &Lanes<()>, _parameter: u32) {}
}

#[cfg(not(target_arch = "nvptx64"))]
struct Vote;

#[cfg(not(target_arch = "nvptx64"))]
impl Collective for Vote {
    type Operand = u32;
    const NAME: &'static str = "a warp vote";

    fn compute(lanes: &Lanes<u32>, _parameter: u32) {
        let votes = (0..32).fold(0, |votes, lane| votes | lanes.get(lane).unwrap_or(0) << lane);
        lanes.set_each(|_| votes);
    }
}

#[cfg(target_arch = "nvptx64")]
mod device {
    unsafe extern "unadjusted" {
        #[link_name = "llvm.nvvm.bar.warp.sync"]
        pub(super) fn sync(mask: u32);
        #[link_name = "llvm.nvvm.vote.any.sync"]
        pub(super) fn any(mask: u32, predicate: bool) -> bool;
        #[link_name = "llvm.nvvm.vote.all.sync"]
        pub(super) fn all(mask: u32, predicate: bool) -> bool;
        #[link_name = "llvm.nvvm.vote.ballot.sync"]
        pub(super) fn ballot(mask: u32, predicate: bool) -> u32;
    }
}
