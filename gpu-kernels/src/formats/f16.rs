//! F16: IEEE half-precision floats.

use super::{FloatUnit, RUN, UNIT, WeightFormat};
use cuda_std::float::f16_to_f32;
use half::f16;

/// 16-bit floats, unquantized.
#[derive(Clone, Copy, Debug)]
pub struct F16;

impl WeightFormat for F16 {
    type Block = f16;
    const BLOCK_LEN: usize = 1;
    type Unit = FloatUnit;

    #[inline(always)]
    fn columns(unit: usize) -> [usize; 2] {
        [unit * UNIT, unit * UNIT + RUN]
    }

    #[inline(always)]
    unsafe fn load(row: *const f16, unit: usize, n_cols: usize) -> FloatUnit {
        FloatUnit(Self::columns(unit).map(|start| {
            core::array::from_fn(|i| {
                let column = start + i;
                // SAFETY: the column is inside the row, which the caller vouches for.
                if column < n_cols { f16_to_f32(unsafe { *row.add(column) }.to_bits()) } else { 0.0 }
            })
        }))
    }
}
