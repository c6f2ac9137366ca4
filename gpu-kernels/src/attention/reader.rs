//! What a lane reads of keys and values: where it will multiply them.

use super::PIECE;
use crate::activations::OCTET;
use crate::kv_cache::{KvCodec, KvRef};
use cuda_std::codegen::no_sooner;

/// A lane's part of a piece of sixteen keys: of rows `group` and `group + 8` two times eight dimensions, the second ones 32 further
/// on. `group` is the lane divided by four, `member` the rest, as in [`cuda_std::tensor`].
pub(super) type Keys<C> = [[<C as KvCodec>::Raw; 2]; 2];
/// A lane's part of a piece of sixteen values: of rows `2 * member`, the next one, and both eight further on, eight dimensions.
pub(super) type Values<C> = [<C as KvCodec>::Raw; 4];

/// What a lane reads of a head's keys and values.
#[derive(Clone, Copy)]
pub(super) struct Reader {
    /// The head's.
    pub(super) keys: KvRef,
    /// The head's.
    pub(super) values: KvRef,
    pub(super) head_dim: u32,
    /// The lane divided by four, and the rest.
    pub(super) group: u32,
    pub(super) member: u32,
}

impl Reader {
    /// The same, of which nothing is known before `token`: addresses of what is read in each round of a loop would be kept in registers
    /// else, more than there are.
    #[inline(always)]
    pub(super) fn no_sooner(self, token: u32) -> Self {
        Self { group: no_sooner(self.group, token), member: no_sooner(self.member, token), ..self }
    }

    /// Where a position's row starts. Beyond the last one of `end` that one is as good as any: it gets no weight.
    #[inline(always)]
    fn row(self, position: u32, end: u32) -> u32 {
        position.min(end - 1) * self.head_dim
    }

    /// Eight dimensions from `dim` on of a row; beyond the head's end its last ones are as good as any: the query is 0 there, and nobody
    /// looks at such a value.
    ///
    /// # Safety
    /// The row is written.
    #[inline(always)]
    unsafe fn eight<C: KvCodec>(self, cache: KvRef, row: u32, dim: u32) -> C::Raw {
        // SAFETY: the caller's promise.
        unsafe { C::fetch(cache, (row + dim.min(self.head_dim - OCTET as u32)) as usize) }
    }

    /// Asks for a piece of the keys of the sixteen positions from `first` on, of `end`.
    ///
    /// # Safety
    /// The positions before `end` are written, and there is one.
    #[inline(always)]
    pub(super) unsafe fn keys<C: KvCodec>(self, piece: usize, first: u32, end: u32) -> Keys<C> {
        let (low, high) = (self.row(first + self.group, end), self.row(first + self.group + 8, end));
        let near = (PIECE * piece) as u32 + OCTET as u32 * self.member;
        let far = near + PIECE as u32 / 2;
        // SAFETY: the caller's promise.
        unsafe {
            [
                [self.eight::<C>(self.keys, low, near), self.eight::<C>(self.keys, low, far)],
                [self.eight::<C>(self.keys, high, near), self.eight::<C>(self.keys, high, far)],
            ]
        }
    }

    /// Likewise of the values.
    ///
    /// # Safety
    /// As [`keys`](Self::keys).
    #[inline(always)]
    pub(super) unsafe fn values<C: KvCodec>(self, piece: usize, first: u32, end: u32) -> Values<C> {
        let row = first + 2 * self.member;
        let dim = (PIECE * piece) as u32 + OCTET as u32 * self.group;
        // SAFETY: the caller's promise.
        unsafe {
            [
                self.eight::<C>(self.values, self.row(row, end), dim),
                self.eight::<C>(self.values, self.row(row + 1, end), dim),
                self.eight::<C>(self.values, self.row(row + 8, end), dim),
                self.eight::<C>(self.values, self.row(row + 9, end), dim),
            ]
        }
    }

    /// The keys of all pieces.
    ///
    /// # Safety
    /// As [`keys`](Self::keys).
    #[inline(always)]
    pub(super) unsafe fn all_keys<C: KvCodec, const PIECES: usize>(
        self,
        first: u32,
        end: u32,
    ) -> [Keys<C>; PIECES] {
        // SAFETY: the caller's promise.
        core::array::from_fn(|piece| unsafe { self.keys::<C>(piece, first, end) })
    }

    /// The values of all pieces.
    ///
    /// # Safety
    /// As [`keys`](Self::keys).
    #[inline(always)]
    pub(super) unsafe fn all_values<C: KvCodec, const PIECES: usize>(
        self,
        first: u32,
        end: u32,
    ) -> [Values<C>; PIECES] {
        // SAFETY: the caller's promise.
        core::array::from_fn(|piece| unsafe { self.values::<C>(piece, first, end) })
    }
}
