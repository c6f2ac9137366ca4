//! Bulk copies (cp.async.bulk, compute capability 9.0): one thread starts one, a barrier in shared memory counts its bytes.

/// Has the barrier count this thread, and expect `bytes` bytes more of what is copied.
///
/// # Safety
/// `barrier` is the address of one.
#[inline(always)]
pub(crate) unsafe fn expect(barrier: u32, bytes: u32) {
    // SAFETY: the caller vouches for the address.
    unsafe {
        core::arch::asm!(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};",
            barrier = in(reg32) barrier,
            bytes = in(reg32) bytes,
            options(nostack, preserves_flags),
        );
    }
}

/// Starts copying `bytes` bytes, a multiple of 16, to address `to` of shared memory, a multiple of 16.
///
/// # Safety
/// `barrier` is the address of one; `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing
/// writes until they have arrived; `to` has room for them, which nobody uses meanwhile.
#[inline(always)]
pub(crate) unsafe fn copy(to: u32, from: *const u8, bytes: u32, barrier: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], {bytes}, [{barrier}];",
            barrier = in(reg32) barrier,
            to = in(reg32) to,
            from = in(reg64) from,
            bytes = in(reg32) bytes,
            options(nostack, preserves_flags),
        );
    }
}

/// The same of what is not expected to be read again: in the L2 cache it gives way to everything else.
///
/// # Safety
/// As [`copy`].
#[inline(always)]
pub(crate) unsafe fn copy_once(to: u32, from: *const u8, bytes: u32, barrier: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!(
            "{{ .reg .b64 policy;",
            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
                [{to}], [{from}], {bytes}, [{barrier}], policy; }}",
            barrier = in(reg32) barrier,
            to = in(reg32) to,
            from = in(reg64) from,
            bytes = in(reg32) bytes,
            options(nostack, preserves_flags),
        );
    }
}
