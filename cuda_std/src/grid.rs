//! Overlap between a kernel and the one before it on the stream (programmatic dependent launch).
//!
//! Where the launch allows it, a kernel may start while the one before it still runs. It can then do what depends on
//! nothing (fetch weights, set up shared memory) until [`wait_for_previous`], after which everything that earlier
//! kernels wrote is there: the one before it has ended, and so has whatever that one waited for.
//!
//! Every thread of a kernel launched this way must reach [`wait_for_previous`], also one with nothing to do. Nothing
//! that another kernel writes may be touched before: several kernels that follow each other may be under way at once.
//!
//! GPUs older than compute capability 9.0 and the emulator run kernels one after the other; both calls do nothing.

/// Waits until the kernels before this one have ended and what they wrote is visible.
#[inline(always)]
pub fn wait_for_previous() {
    // SAFETY: waits, and does nothing else. Not `nomem`: no access to memory may be moved across.
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    unsafe {
        core::arch::asm!("griddepcontrol.wait;", options(nostack, preserves_flags))
    }
}

/// As [`wait_for_previous`], once `known`, which is below 2^31, has been worked out. A compiler knows no reason to work out
/// before a wait what is used after it; this is one.
#[inline(always)]
pub fn wait_for_previous_knowing(known: u32) {
    // SAFETY: waits, and does nothing else. The predicate always holds.
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    unsafe {
        core::arch::asm!(
            "{{ .reg .pred holds;",
            "setp.lt.u32 holds, {known}, 0x80000000;",
            "@holds griddepcontrol.wait; }}",
            known = in(reg32) known,
            options(nostack, preserves_flags),
        );
    }
    debug_assert!(known < 1 << 31, "what is known must be below 2^31, found {known}");
}

/// Allows the next kernel to start once all blocks of this one have said so, or have ended; best said early.
#[inline(always)]
pub fn let_next_start() {
    // SAFETY: a hint to the scheduler.
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    unsafe {
        core::arch::asm!("griddepcontrol.launch_dependents;", options(nostack, preserves_flags))
    }
}
