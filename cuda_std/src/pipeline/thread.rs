//! Copies of a thread: 16 bytes each, wherever in shared memory they go.

use crate::shared::DynamicShared;

/// Starts copying 16 bytes from device memory into elements `index` to `index + 3`, `index` a multiple of 4; zeros where
/// they are not wanted, and `from` is not read then. On the emulator the copy is complete at once.
///
/// # Safety
/// `from` is at a multiple of 16; where they are wanted it is to 16 bytes of readable device memory, which nothing writes
/// until the copy has been waited for.
#[inline(always)]
pub unsafe fn copy_async(to: DynamicShared<u32>, index: usize, from: *const u8, is_wanted: bool) {
    cfg_select! {
        target_arch = "nvptx64" => {
            // SAFETY: the caller vouches for `from`; the handle for the shared memory.
            unsafe {
                core::arch::asm!(
                    "cp.async.cg.shared.global.L2::128B [{to}], [{from}], 16, {bytes};",
                    to = in(reg32) to.address_of(index),
                    from = in(reg64) from,
                    bytes = in(reg32) if is_wanted { 16u32 } else { 0 },
                    options(nostack, preserves_flags),
                );
            }
        }
        _ => {
            debug_assert!(from.addr().is_multiple_of(16), "misaligned copy");
            if is_wanted {
                // SAFETY: the caller vouches for the source.
                unsafe { to.copy_from(index, from, 16) };
            } else {
                to.set4(index, [0; 4]);
            }
        }
    }
}

/// Ends a group of this thread's copies: those since the group before.
#[inline(always)]
pub fn commit_copies() {
    // SAFETY: counts copies, and does nothing else.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        core::arch::asm!("cp.async.commit_group;", options(nostack, preserves_flags));
    }
}

/// Waits until all but the last `GROUPS` of this thread's groups have arrived. Others see them after a barrier.
#[inline(always)]
pub fn wait_for_copies<const GROUPS: u32>() {
    // SAFETY: waits. Not `nomem`: reads of what was copied may not be moved before it.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        core::arch::asm!("cp.async.wait_group {groups};", groups = const GROUPS, options(nostack, preserves_flags));
    }
}
