//! All layers of a small model in one launch, for one token.
//!
//! Between two kernels lies most of a microsecond, which a small model's products do not take themselves. Here one cluster of
//! blocks goes through all layers: a block has its share of each matrix, what it makes of a vector it sends into every
//! other block's shared memory ([`cuda_std::cluster::Arrivals`]), and once a product is over its share of the next layer's is asked for. So weights
//! arrive three operations ahead, and nothing but positions in the KV cache is read from device memory in between. That takes
//! a model of which a sixteenth of a layer fits shared memory ([`Layout`]); others go kernel by kernel ([`crate::gemv`]).
//!
//! The vector of a product is made Q8_1 by each block for itself, a unit by each warp; a warp multiplies one or several quads at a time
//! and finishes them, so that a product has one meeting of the block. Products of a normalised vector get the norm's factor at
//! the end, as in [`crate::gemv::input`].
//!
//! Bytes moved: every weight once, keys and values once for each query head.

mod attention;
mod layout;
mod outputs;
mod products;
mod walk;

pub use layout::{LayerRef, Layout, Product, Shape};

#[cfg(not(target_arch = "nvptx64"))]
use crate::formats::Format;
use crate::formats::WeightFormat;
use crate::formats::tile::TILE_ROWS;
use crate::math::silu;
use crate::operand::Operand;
use crate::step::Step;
use cuda_std::cluster::{block_rank, sync_cluster};
use cuda_std::grid::{let_next_start, wait_for_previous};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::launch::Kernel;
use cuda_std::memory::{ld_global_u32x4, st_global_u32x4};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor};
use cuda_std::{dynamic_shared, kernel};
use layout::LAYER_WORDS;
use walk::Walk;

/// Blocks of the cluster: the most that there can be.
pub const BLOCKS: u32 = 16;
/// Warps of a block that multiply: one more asks for weights and works out norms, and with up to 20 a thread has 96 registers. The
/// hidden state of SmolLM2-135M has as many units, which are made Q8_1 in one turn; any number works.
pub const WARPS: u32 = 18;
/// Threads in a block.
pub const BLOCK_DIM: u32 = (WARPS + 1) * WARP_SIZE;
/// Most query heads: a block takes one.
pub const MAX_HEADS: u32 = BLOCKS;

/// What the launch works on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    /// `[n_layer]`.
    pub layers: *const LayerRef,
    /// Holds the position.
    pub step: *const Step,
    /// Cosine and sine of the angle of each pair at the step's position: `[n_rot / 2]`.
    pub rotation: *const [f32; 2],
    /// The hidden state, `[n_embd]`, at a multiple of 16 bytes.
    pub x: *mut f32,
    /// That after the last layer as the next product reads it, with a sum of squares for each quad of rows.
    pub operand: Operand,
    /// The model's.
    pub shape: Shape,
    /// That of the shape and the weights' format.
    pub layout: Layout,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Arguments {}

/// Which of [`Layout::products`].
const QKV: usize = 0;
const OUTPUT: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;

/// All layers.
///
/// # Safety
/// The arguments are as their fields say, in device memory; the layout is of the shape and of format `F`; the launch is one
/// cluster of [`BLOCKS`] blocks of [`BLOCK_DIM`] threads, with the layout's shared memory; the step's position is below `n_ctx`.
#[inline(always)]
unsafe fn run<F: WeightFormat, const LANES: u32>(a: Arguments) {
    let memory = dynamic_shared!(LAYERS_MEMORY: [u32]);
    // By way of a shuffle, since what is read from a special register would be read again and again, which takes longer.
    let thread = warp_shuffle_xor(FULL_MASK, thread_idx_x(), 0, WARP_SIZE);
    let walk = Walk { a, memory, rank: block_rank(), warp: thread / WARP_SIZE, lane: thread % WARP_SIZE };
    let Layout { x, heads, hidden, layers, products, .. } = a.layout;
    let floats = walk.floats();
    if walk.is_fetcher() {
        walk.set_up();
    }
    let mut i = thread;
    while i < a.shape.n_layer * LAYER_WORDS {
        // SAFETY: the word is one of the layers'.
        memory.set((layers + i) as usize, unsafe { *a.layers.cast::<u32>().add(i as usize) });
        i += BLOCK_DIM;
    }
    // From here on others may send.
    sync_cluster();
    let_next_start();
    if walk.is_fetcher() {
        // SAFETY: the caller's promise; nothing has been read.
        unsafe {
            walk.fetch::<QKV>(0);
            walk.fetch::<OUTPUT>(0);
            walk.fetch::<GATE_UP>(0);
            walk.fetch::<DOWN>(0);
        }
    }
    wait_for_previous();
    // SAFETY: the vectors are as the fields say.
    let position = unsafe {
        let mut i = thread;
        while i < a.shape.n_embd {
            floats.set((x[0] + i) as usize, *a.x.add(i as usize));
            i += BLOCK_DIM;
        }
        (*a.step).position
    };
    walk.place_rows(position);
    walk.weights(products[QKV]).wait(0);
    sync_threads();

    let mut layer = 0;
    while layer < a.shape.n_layer {
        // Whoever has all of the results of an operation knows that its own block has read that operation's weights: those of the
        // next layer are asked for, once the vector at hand is ready.
        walk.prepare_normalised(products[QKV], x[0]);
        if walk.warp == WARPS {
            walk.work_out_norm(products[QKV]);
        }
        if walk.is_fetcher() && layer > 0 {
            // SAFETY: the layer before has come.
            unsafe { walk.fetch::<DOWN>(layer) };
        }
        // SAFETY: the caller's promise.
        unsafe {
            // What earlier steps have written does not wait for this layer's query, where there are registers for it.
            let fetched = if F::IN_PAIRS { Some(walk.fetch_first::<LANES>(layer, position)) } else { None };
            walk.multiply::<F, 32, 1, _>(
                products[QKV],
                |turn| walk.place(turn),
                |_, place, sums| {
                    let factor = walk.norm_factor(2 * layer);
                    walk.finish_qkv(layer, place, sums.map(|sum| sum * factor));
                },
            );
            if walk.has_head() {
                let fetched = fetched.unwrap_or_else(|| walk.fetch_first::<LANES>(layer, position));
                walk.afresh().attend::<LANES>(layer, position, fetched);
            }
        }

        walk.receive_for(products[OUTPUT], walk.heads(), layer);
        walk.prepare::<1>(products[OUTPUT], |column| floats.get((heads + column) as usize));
        if walk.is_fetcher() {
            // SAFETY: all queries, keys and values have been sent.
            unsafe { walk.fetch::<QKV>(layer + 1) };
        }
        walk.multiply::<F, 32, 1, _>(
            products[OUTPUT],
            |turn| walk.rows_of(x[0], turn),
            |turn, rows, sums| walk.send_sum(walk.attended(), x[1], turn, rows, sums),
        );

        walk.receive_for(products[GATE_UP], walk.attended(), layer);
        walk.prepare_normalised(products[GATE_UP], x[1]);
        if walk.warp == WARPS {
            walk.work_out_norm(products[GATE_UP]);
        }
        if walk.is_fetcher() {
            // SAFETY: all of the product's results have come.
            unsafe { walk.fetch::<OUTPUT>(layer + 1) };
        }
        let send_hidden = |turn, (), sums: [f32; TILE_ROWS]| {
            let factor = walk.norm_factor(2 * layer + 1);
            let [gate0, gate1, up0, up1] = sums.map(|sum| sum * factor);
            walk.send_hidden(turn, [silu(gate0) * up0, silu(gate1) * up1]);
        };
        walk.multiply::<F, 8, 3, _>(products[GATE_UP], |_| (), send_hidden);

        walk.receive_for(products[DOWN], walk.hidden(), layer);
        walk.prepare::<3>(products[DOWN], |column| {
            // A bfloat16 is the upper half of a number.
            let half = memory.view::<u16>().get((2 * hidden + column) as usize);
            f32::from_bits(u32::from(half) << 16)
        });
        if walk.is_fetcher() {
            // SAFETY: as above.
            unsafe { walk.fetch::<GATE_UP>(layer + 1) };
        }
        walk.multiply::<F, 32, 2, _>(
            products[DOWN],
            |turn| walk.rows_of(x[1], turn),
            |turn, rows, sums| walk.send_sum(walk.after(), x[0], turn, rows, sums),
        );

        layer += 1;
        if layer < a.shape.n_layer {
            walk.weights(products[QKV]).wait(layer);
        }
        walk.receive(walk.after(), layer - 1);
    }

    // All blocks have it.
    let mut quad = thread;
    while walk.rank == 0 && quad < a.shape.n_embd / TILE_ROWS as u32 {
        let row = quad as usize * TILE_ROWS;
        let values = floats.get4(x[0] as usize + row);
        let [v0, v1, v2, v3] = values;
        // SAFETY: the rows are the hidden state's.
        unsafe {
            let [g0, g1, g2, g3] = ld_global_u32x4(a.operand.gamma.add(row).cast()).map(f32::from_bits);
            st_global_u32x4(a.x.add(row).cast(), values.map(f32::to_bits));
            a.operand.store_4(row, [v0 * g0, v1 * g1, v2 * g2, v3 * g3]);
            *a.operand.squares.add(quad as usize) = (v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3);
        }
        quad += BLOCK_DIM;
    }
}

macro_rules! define_kernels {
    ($(($Type:ident, $lanes:literal, $module:ident))*) => {$(
        #[doc = concat!("Weights in ", stringify!($Type), ", heads of which ", stringify!($lanes), " lanes share a position.")]
        pub mod $module {
            use super::*;

            /// All layers of a model for one token: `x` through every layer, keys and values appended to the caches.
            ///
            /// # Safety
            /// The arguments are as their fields say, in device memory, all matrices in the module's format and heads of at most eight
            /// values a lane, and the layout is of them; the launch is one cluster of [`BLOCKS`] blocks of [`BLOCK_DIM`] threads, with the
            /// shared memory of the layout; the step's position is below `n_ctx`.
            ///
            /// # Parameters
            /// - `arguments`: the model's layers, and the hidden state
            ///
            /// # Thread mapping
            /// A block takes a sixteenth of the quads of each matrix, and a query head; a warp a quad or several; the last warp asks
            /// for weights.
            #[kernel(suffix = $module, overlapping, launch_bounds(608, 1))]
            pub unsafe fn layers(arguments: Arguments) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<crate::formats::$Type, $lanes>(arguments) }
            }
        }
    )*};
}
const _: () = assert!(BLOCK_DIM == 608);
define_kernels! {
    (Q8_0, 8, q8_0_d64)
    (Q8_0, 16, q8_0_d128)
    (Q8_0, 32, q8_0_d256)
    (Q4_1, 8, q4_1_d64)
    (Q4_1, 16, q4_1_d128)
    (Q4_1, 32, q4_1_d256)
}

/// The kernel for weights of a format, and how it lays out shared memory, where there is one.
#[cfg(not(target_arch = "nvptx64"))]
pub fn own_kernel(format: Format, shape: &Shape) -> Option<(&'static Kernel<(Arguments,)>, Layout)> {
    use crate::formats::{Q4_1, Q8_0};
    let (kernels, layout) = match format {
        Format::Q8_0 => {
            ([&q8_0_d64::LAYERS, &q8_0_d128::LAYERS, &q8_0_d256::LAYERS], Layout::new::<Q8_0>(shape))
        }
        Format::Q4_1 => {
            ([&q4_1_d64::LAYERS, &q4_1_d128::LAYERS, &q4_1_d256::LAYERS], Layout::new::<Q4_1>(shape))
        }
        _ => return None,
    };
    let longest = [64, 128, 256].iter().position(|&longest| shape.head_dim <= longest)?;
    Some((kernels[longest], layout))
}
