//! Where the products of several tokens go: an [epilogue](crate::gemv::epilogue) for each token, of a kind that is known at
//! run time.

use crate::gemv::epilogue::{Add, Epilogue, Qkv, Store, Swiglu};
use crate::operand::Operand;

/// What becomes of the products.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// `y = W x`.
    Store = 0,
    /// `y += W x`.
    Add = 1,
    /// `y = silu(G x) * (U x)`.
    Swiglu = 2,
    /// Queries, keys and values.
    Qkv = 3,
}

/// Where the products go.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// An [`OutputKind`].
    pub kind: u32,
    /// Values of `y` from one token to the next, a multiple of 4.
    pub stride: u32,
    /// `[n_tokens, stride]`, at a multiple of 16 bytes.
    pub y: *mut f32,
    /// For queries, keys and values: of the first token. The queries, rotations and steps of the others follow.
    pub qkv: Qkv,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Output {}

/// What a kernel does with the epilogues of its tokens.
pub trait ForTokens {
    /// Does it; `epilogue` gives that of a token.
    ///
    /// # Safety
    /// The epilogues' pointers must be as their fields say, for every token that is asked for.
    unsafe fn with<E: Epilogue>(self, epilogue: impl Fn(u32) -> E);
}

impl Output {
    /// Does `work` with the epilogues of this kind.
    ///
    /// # Safety
    /// The output must be as its fields say, and have the tokens that `work` asks for.
    #[inline(always)]
    pub unsafe fn dispatch(self, work: impl ForTokens) {
        let y = |token: u32| self.y.wrapping_add(token as usize * self.stride as usize);
        // SAFETY: the caller's promise.
        unsafe {
            if self.kind == OutputKind::Store as u32 {
                work.with(|token| Store { y: y(token), largest: core::ptr::null_mut() });
            } else if self.kind == OutputKind::Add as u32 {
                work.with(|token| Add { y: y(token), operand: Operand::NOTHING });
            } else if self.kind == OutputKind::Swiglu as u32 {
                work.with(|token| Swiglu { y: y(token), operand: Operand::NOTHING });
            } else {
                work.with(|token| self.qkv.at_token(token, self.stride));
            }
        }
    }
}
