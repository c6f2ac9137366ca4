//! The order in which a packed matrix holds its rows.
//!
//! A warp ends up with the products of four neighbouring rows, and one thread then finishes them. So rows that an
//! operation needs together are packed together: the two values of a rotated pair, or a gate and its up.

/// Orders of rows; the launch passes one as [`RowOrder`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the file has them.
    Natural = 0,
    /// Two rows of the first half of the rows, then the same two of the second half: gate and up of a feed-forward
    /// network, as one matrix.
    Halves = 1,
    /// Within each head, rows `i` and `i + n_rot / 2` side by side: the pairs of a half-split rotation.
    RotatedPairs = 2,
}

/// Which row of a matrix stands where.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOrder {
    /// An [`Order`].
    pub order: u32,
    /// For [`Order::Halves`] the rows of each half, even; for [`Order::RotatedPairs`] the rows of a head.
    pub group: u32,
    /// For [`Order::RotatedPairs`] the rows of a head that are rotated, a multiple of 2.
    pub n_rot: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: three words, laid out alike on both sides.
unsafe impl cuda_std::launch::KernelArg for RowOrder {}

impl RowOrder {
    /// As the file has them.
    pub const NATURAL: Self = Self { order: Order::Natural as u32, group: 0, n_rot: 0 };

    /// The row that stands at `place`.
    #[inline(always)]
    pub fn row_at(self, place: usize) -> usize {
        let (group, half) = (self.group as usize, self.n_rot as usize / 2);
        if self.order == Order::Halves as u32 {
            place / 4 * 2 + place % 2 + place / 2 % 2 * group
        } else if self.order == Order::RotatedPairs as u32 {
            let i = place % group;
            if i < 2 * half { place - i + i / 2 + i % 2 * half } else { place }
        } else {
            place
        }
    }

    /// Where row `row` stands.
    #[inline(always)]
    pub fn place_of(self, row: usize) -> usize {
        let (group, half) = (self.group as usize, self.n_rot as usize / 2);
        if self.order == Order::Halves as u32 {
            let in_half = row % group;
            in_half / 2 * 4 + in_half % 2 + row / group * 2
        } else if self.order == Order::RotatedPairs as u32 {
            let i = row % group;
            if i < 2 * half { row - i + i % half * 2 + i / half } else { row }
        } else {
            row
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_rows_are_inverse() {
        let halves = RowOrder { order: Order::Halves as u32, group: 10, n_rot: 0 };
        let pairs = |group, n_rot| RowOrder { order: Order::RotatedPairs as u32, group, n_rot };
        for (order, n_rows) in [
            (RowOrder::NATURAL, 7),
            (halves, 20),
            (pairs(16, 16), 48),
            (pairs(24, 16), 72),
            (pairs(8, 2), 16),
        ] {
            for row in 0..n_rows {
                assert!(order.place_of(row) < n_rows);
                assert_eq!(order.row_at(order.place_of(row)), row, "{order:?}");
            }
        }
        assert_eq!([0, 1, 2, 3, 4].map(|place| halves.row_at(place)), [0, 1, 10, 11, 2]);
        assert_eq!([0, 1, 2, 17].map(|place| pairs(24, 16).row_at(place)), [0, 8, 1, 17]);
    }
}
