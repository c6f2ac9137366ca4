//! F32: plain floats.

use super::{FloatUnit, RUN, UNIT, WeightFormat};

/// 32-bit floats, unquantized.
#[derive(Clone, Copy, Debug)]
pub struct F32;

impl WeightFormat for F32 {
    type Block = f32;
    const BLOCK_LEN: usize = 1;
    type Unit = FloatUnit;

    #[inline(always)]
    fn columns(unit: usize) -> [usize; 2] {
        [unit * UNIT, unit * UNIT + RUN]
    }

    #[inline(always)]
    unsafe fn load(row: *const f32, unit: usize, n_cols: usize) -> FloatUnit {
        FloatUnit(Self::columns(unit).map(|start| {
            core::array::from_fn(|i| {
                let column = start + i;
                // SAFETY: the column is inside the row, which the caller vouches for.
                if column < n_cols { unsafe { *row.add(column) } } else { 0.0 }
            })
        }))
    }
}
