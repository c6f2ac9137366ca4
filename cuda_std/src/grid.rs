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

/// The value, worked out by now: a compiler moves work to the branch that needs its result, be that behind a meeting of the
/// block.
#[inline(always)]
pub fn settled<T: Settle>(value: T) -> T {
    value.settle()
}

/// The value, which is worked out no sooner than `token`: what follows from it is not kept in registers from one round of a loop
/// to the next where the token is each round's own.
#[inline(always)]
pub fn no_sooner(value: u32, token: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let same;
            // SAFETY: a move. It depends on its operands alone.
            unsafe {
                core::arch::asm!(
                    "mov.u32 {same}, {value}; // {token}",
                    same = out(reg32) same,
                    value = in(reg32) value,
                    token = in(reg32) token,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            same
        }
        _ => {
            let _ = token;
            value
        }
    }
}

/// What can be [`settled`].
pub trait Settle: Copy {
    /// Settles it.
    fn settle(self) -> Self;
}

macro_rules! settle {
    ([$($generics:tt)*] $ty:ty, $instruction:literal, $class:ident) => {
        impl<$($generics)*> Settle for $ty {
            #[inline(always)]
            fn settle(self) -> Self {
                cfg_select! {
                    target_arch = "nvptx64" => {
                        let settled: Self;
                        // SAFETY: a move. Not `pure`: it stays where it is.
                        unsafe {
                            core::arch::asm!(
                                $instruction,
                                settled = out($class) settled,
                                value = in($class) self,
                                options(nomem, nostack, preserves_flags),
                            );
                        }
                        settled
                    }
                    _ => self,
                }
            }
        }
    };
}
settle!([] u32, "mov.u32 {settled}, {value};", reg32);
settle!([] f32, "mov.f32 {settled}, {value};", reg32);
settle!([T] *mut T, "mov.u64 {settled}, {value};", reg64);
