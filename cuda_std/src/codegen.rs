//! When values are worked out. A compiler moves that: behind a wait, where there is none of the time that is left before it, or out of a
//! loop, into registers that are needed inside. On the emulator all of this is the value itself.

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

/// The value, which neither the compiler nor ptxas can know before: by way of a shuffle. What both know to be the same in each round of a
/// loop they work out once, and keep. All lanes of a warp make this call together.
#[inline(always)]
pub fn unforeseen(value: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => crate::warp::warp_shuffle_xor(crate::warp::FULL_MASK, value, 0, crate::warp::WARP_SIZE),
        _ => value,
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
