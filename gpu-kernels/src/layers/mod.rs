//! All layers of a small model in one launch, for one token.
//!
//! Between two kernels lies most of a microsecond, which a small model's products do not take themselves. Here one cluster of
//! blocks goes through all layers: a block has its share of each matrix, what it makes of a vector it sends into every
//! other block's shared memory ([`cuda_std::cluster::Arrivals`]), and once a product is over its share of the next layer's is asked for. So weights
//! arrive three operations ahead, and nothing but positions in the KV cache is read from device memory in between. That takes
//! a model of which a sixteenth of a layer fits shared memory ([`Layout`]); others go kernel by kernel ([`crate::gemv`]).
//!
//! The vector of a product is made Q8_1 by each block for itself, a unit by each warp, but for that between the halves of the feed-forward
//! network, of which a block makes whole units and sends them so. Products of a normalised vector get the norm's factor at the
//! end, as in [`crate::gemv::input`].
//!
//! Nothing here is long: what counts is how many instructions lie one after the other between a vector's arrival and the next one's. So
//! whatever does not need the vector is done before it is there: a lane has its weights in registers by then, and knows where it reads
//! and writes. And nothing is kept from one operation to the next ([`Walk::afresh`]), since these registers are needed.
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
use crate::formats::InPlanes;
use crate::formats::tile::TILE_ROWS;
use crate::operand::Operand;
use crate::step::Step;
use cuda_std::cluster::sync_cluster;
use cuda_std::grid::{let_next_start, wait_for_previous};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::launch::Kernel;
use cuda_std::memory::{ld_global_u32x4, st_global_u32x4};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::WARP_SIZE;
use cuda_std::{dynamic_shared, kernel};
use layout::LAYER_WORDS;
use products::broadcast_4;
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

/// Units of a row of queries, keys and values, or of attention's projection, that each of the eight lanes which share it has in registers
/// before the vector is there. For gate and up, where two lanes share a row, it is `MANY`, for down, where eight do, `SOME`: as many as
/// there are registers for.
const FEW: usize = 3;
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
unsafe fn run<F: InPlanes, const LANES: u32, const MANY: usize, const SOME: usize>(a: Arguments) {
    let memory = dynamic_shared!(LAYERS_MEMORY: [u32]);
    let thread = thread_idx_x();
    let walk = Walk::new(a, memory, thread);
    let Layout { x, layers, .. } = a.layout;
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
    // Not before: the product behind would ask for weights while the choice of this token is waiting for what it reads.
    let_next_start();
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
    // Queries, keys and values share a vector's place with gate and up.
    walk.clear_scales(a.layout.products[OUTPUT]);
    walk.clear_scales(a.layout.products[GATE_UP]);
    walk.clear_scales(a.layout.products[DOWN]);
    sync_threads();

    let mut layer = 0;
    while layer < a.shape.n_layer {
        // Weights come long before vectors do, and are taken into registers meanwhile. Whoever has all of the results of an operation
        // knows that its own block has read that operation's weights: those of the next layer are asked for, once the vector at hand
        // is ready.
        let walk = walk.afresh();
        let Layout { x, products, .. } = walk.a.layout;
        walk.weights(products[QKV]).wait(layer);
        let place = |turn| walk.place(turn);
        let loaded = walk.load_first::<F, 8, FEW, _>(products[QKV], place);
        let next = walk.next_unit(products[QKV], x[0]);
        // What earlier steps have written does not wait for this layer's query.
        // SAFETY: the caller's promise.
        let fetched = unsafe { walk.fetch_first::<LANES>(layer, position) };
        if layer > 0 {
            walk.receive(walk.after(), layer - 1);
        }
        walk.prepare_normalised(products[QKV], x[0], next);
        if walk.is_fetcher() && layer > 0 {
            // SAFETY: the layer before has come.
            unsafe { walk.fetch::<DOWN>(layer) };
        }
        // SAFETY: the caller's promise.
        unsafe {
            walk.multiply::<F, 8, FEW, _>(products[QKV], loaded, place, |_, place, sum| {
                walk.finish_qkv(layer, place, broadcast_4(sum * walk.norm_factor()));
            });
            if walk.has_head() {
                walk.afresh().attend::<LANES>(layer, position, fetched);
            }
        }

        let walk = walk.afresh();
        let Layout { x, products, .. } = walk.a.layout;
        walk.weights(products[OUTPUT]).wait(layer);
        let before = |turn| walk.row_of(x[0], turn);
        let loaded = walk.load_first::<F, 8, FEW, _>(products[OUTPUT], before);
        let heads = walk.a.layout.heads;
        let next = walk.next_unit(products[OUTPUT], heads);
        walk.receive(walk.heads(), layer);
        walk.prepare(products[OUTPUT], heads, next);
        if walk.is_fetcher() {
            // SAFETY: all queries, keys and values have been sent.
            unsafe { walk.fetch::<QKV>(layer + 1) };
        }
        walk.multiply::<F, 8, FEW, _>(products[OUTPUT], loaded, before, |turn, before, sum| {
            walk.send_rows(walk.attended(), x[1], turn, before + sum);
        });

        let walk = walk.afresh();
        let Layout { x, products, .. } = walk.a.layout;
        walk.weights(products[GATE_UP]).wait(layer);
        let loaded = walk.load_first::<F, 2, MANY, _>(products[GATE_UP], |_| ());
        let next = walk.next_unit(products[GATE_UP], x[1]);
        walk.receive(walk.attended(), layer);
        walk.prepare_normalised(products[GATE_UP], x[1], next);
        if walk.is_fetcher() {
            // SAFETY: all of the product's results have come.
            unsafe { walk.fetch::<OUTPUT>(layer + 1) };
        }
        walk.multiply::<F, 2, MANY, _>(
            products[GATE_UP],
            loaded,
            |_| (),
            |turn, (), sum| {
                walk.keep_hidden(turn, sum * walk.norm_factor());
            },
        );
        sync_threads();
        walk.send_hidden();

        let walk = walk.afresh();
        let Layout { x, products, .. } = walk.a.layout;
        walk.weights(products[DOWN]).wait(layer);
        let before = |turn| walk.row_of(x[1], turn);
        let loaded = walk.load_first::<F, 8, SOME, _>(products[DOWN], before);
        walk.receive(walk.hidden(), layer);
        if walk.is_fetcher() {
            // SAFETY: as above.
            unsafe { walk.fetch::<GATE_UP>(layer + 1) };
        }
        walk.multiply::<F, 8, SOME, _>(products[DOWN], loaded, before, |turn, before, sum| {
            walk.send_rows(walk.after(), x[0], turn, before + sum);
        });
        layer += 1;
    }
    walk.receive(walk.after(), a.shape.n_layer - 1);

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
    ($(($Type:ident, $lanes:literal, $many:literal, $some:literal, $module:ident))*) => {$(
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
                unsafe { run::<crate::formats::$Type, $lanes, $many, $some>(arguments) }
            }
        }
    )*};
}
const _: () = assert!(BLOCK_DIM == 608);
define_kernels! {
    (Q8_0, 8, 4, 3, q8_0_d64)
    (Q8_0, 16, 4, 3, q8_0_d128)
    (Q8_0, 32, 4, 3, q8_0_d256)
    (Q4_1, 8, 9, 6, q4_1_d64)
    (Q4_1, 16, 9, 6, q4_1_d128)
    (Q4_1, 32, 9, 6, q4_1_d256)
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
    let kernel = [8, 16, 32].iter().position(|&lanes| lanes == shape.lanes_per_position())?;
    Some((kernels[kernel], layout))
}
