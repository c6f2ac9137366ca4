//! Barriers in shared memory (mbarrier): they count arrivals and the bytes of copies, and flip their parity when all are
//! there.

/// Makes a barrier that `arrivals` arrivals complete. Copies see it once this thread has met the others.
///
/// # Safety
/// `barrier` is the address of 8 bytes of shared memory at a multiple of 8, which nobody else uses yet.
#[inline(always)]
pub(crate) unsafe fn init(barrier: u32, arrivals: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe {
        core::arch::asm!(
            "mbarrier.init.shared.b64 [{barrier}], {arrivals};",
            barrier = in(reg32) barrier,
            arrivals = in(reg32) arrivals,
            options(nostack, preserves_flags),
        );
        #[cfg(cuda_sm_90)]
        core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack, preserves_flags));
    }
}

/// Has the barrier count this thread.
///
/// # Safety
/// `barrier` is the address of one.
#[inline(always)]
pub(crate) unsafe fn arrive(barrier: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe {
        core::arch::asm!(
            "mbarrier.arrive.shared.b64 _, [{barrier}];",
            barrier = in(reg32) barrier,
            options(nostack, preserves_flags),
        );
    }
}

/// Has the barrier count this thread once all that it has started to copy (cp.async) has arrived.
///
/// # Safety
/// `barrier` is the address of one.
#[cfg(not(cuda_sm_90))]
#[inline(always)]
pub(crate) unsafe fn arrive_with_copies(barrier: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe {
        core::arch::asm!(
            "cp.async.mbarrier.arrive.noinc.shared.b64 [{barrier}];",
            barrier = in(reg32) barrier,
            options(nostack, preserves_flags),
        );
    }
}

/// Waits until the barrier at this address has completed a round of this parity.
///
/// # Safety
/// It is a barrier.
#[inline(always)]
pub(crate) unsafe fn wait(barrier: u32, parity: u32) {
    // SAFETY: the caller's promise.
    while !unsafe { is_over(barrier, parity) } {}
}

macro_rules! looks {
    ($($(#[$doc:meta])* $name:ident, $instruction:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// It is a barrier.
        #[inline(always)]
        pub(crate) unsafe fn $name(barrier: u32, parity: u32) -> bool {
            let is_over: u32;
            // SAFETY: looks at the barrier, or waits for some time. Not `nomem`: what follows may not be moved before it.
            unsafe {
                core::arch::asm!(
                    "{{",
                    ".reg .pred over;",
                    $instruction,
                    "selp.u32 {is_over}, 1, 0, over;",
                    "}}",
                    is_over = out(reg32) is_over,
                    barrier = in(reg32) barrier,
                    parity = in(reg32) parity,
                    options(nostack, preserves_flags),
                );
            }
            is_over != 0
        }
    )*};
}
looks! {
    /// Whether the barrier at this address has completed a round of this parity; may wait for that for some time.
    is_over, cfg_select! {
        cuda_sm_90 => "mbarrier.try_wait.parity.shared.b64 over, [{barrier}], {parity};",
        _ => "mbarrier.test_wait.parity.shared.b64 over, [{barrier}], {parity};",
    };
    /// Whether the barrier at this address has completed a round of this parity.
    is_over_now, "mbarrier.test_wait.parity.shared.b64 over, [{barrier}], {parity};";
}
