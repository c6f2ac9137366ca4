//! ggml's tensor types: how many weights a block holds, and in how many bytes.

use std::fmt;

macro_rules! ggml_types {
    ($($name:ident = $id:literal, $block_len:literal weights in $block_bytes:literal bytes;)*) => {
        /// How a tensor's weights are stored. Warpline can show all of these and run some of them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(non_camel_case_types)]
        #[repr(u32)]
        pub enum GgmlType {
            $(
                #[doc = concat!("Blocks of ", $block_len, " weights in ", $block_bytes, " bytes.")]
                $name = $id,
            )*
        }

        impl GgmlType {
            /// Every type, by id.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The type with this number in a file.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// ggml's name, such as `Q4_K`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// Weights in a block.
            pub const fn block_len(self) -> usize {
                match self {
                    $(Self::$name => $block_len,)*
                }
            }

            /// Bytes in a block.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(Self::$name => $block_bytes,)*
                }
            }
        }
    };
}

// Numbers that are left out belonged to types that ggml has removed.
ggml_types! {
    F32 = 0, 1 weights in 4 bytes;
    F16 = 1, 1 weights in 2 bytes;
    Q4_0 = 2, 32 weights in 18 bytes;
    Q4_1 = 3, 32 weights in 20 bytes;
    Q5_0 = 6, 32 weights in 22 bytes;
    Q5_1 = 7, 32 weights in 24 bytes;
    Q8_0 = 8, 32 weights in 34 bytes;
    Q8_1 = 9, 32 weights in 36 bytes;
    Q2_K = 10, 256 weights in 84 bytes;
    Q3_K = 11, 256 weights in 110 bytes;
    Q4_K = 12, 256 weights in 144 bytes;
    Q5_K = 13, 256 weights in 176 bytes;
    Q6_K = 14, 256 weights in 210 bytes;
    Q8_K = 15, 256 weights in 292 bytes;
    IQ2_XXS = 16, 256 weights in 66 bytes;
    IQ2_XS = 17, 256 weights in 74 bytes;
    IQ3_XXS = 18, 256 weights in 98 bytes;
    IQ1_S = 19, 256 weights in 50 bytes;
    IQ4_NL = 20, 32 weights in 18 bytes;
    IQ3_S = 21, 256 weights in 110 bytes;
    IQ2_S = 22, 256 weights in 82 bytes;
    IQ4_XS = 23, 256 weights in 136 bytes;
    I8 = 24, 1 weights in 1 bytes;
    I16 = 25, 1 weights in 2 bytes;
    I32 = 26, 1 weights in 4 bytes;
    I64 = 27, 1 weights in 8 bytes;
    F64 = 28, 1 weights in 8 bytes;
    IQ1_M = 29, 256 weights in 56 bytes;
    BF16 = 30, 1 weights in 2 bytes;
    TQ1_0 = 34, 256 weights in 54 bytes;
    TQ2_0 = 35, 256 weights in 66 bytes;
    MXFP4 = 39, 32 weights in 17 bytes;
    NVFP4 = 40, 64 weights in 36 bytes;
    Q1_0 = 41, 128 weights in 18 bytes;
}

impl GgmlType {
    /// The type's number in a file.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// Bytes that a tensor of this shape takes; `None` where that does not fit `usize` or a row is not whole blocks.
    pub fn n_bytes(self, shape: &[usize]) -> Option<usize> {
        let row_len = shape.first().copied().unwrap_or(1);
        if !row_len.is_multiple_of(self.block_len()) {
            return None;
        }
        let n_elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
        (n_elements / self.block_len()).checked_mul(self.block_bytes())
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
