//! A thread of the launch: where it stands, what its block gets from others, and the weights on their way.

use super::layout::{LAYER_WORDS, LayerRef, Layout, Product};
use super::{Arguments, GATE_UP, OUTPUT, QKV, WARPS};
use crate::formats::UNIT;
use crate::formats::tile::TILE_ROWS;
use core::mem::offset_of;
use cuda_std::cluster::{Arrivals, block_rank};
use cuda_std::codegen::{no_sooner, settled, unforeseen};
use cuda_std::shared::DynamicShared;
use cuda_std::warp::WARP_SIZE;

/// A thread of the launch.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    pub(super) a: Arguments,
    pub(super) memory: DynamicShared<u32>,
    pub(super) rank: u32,
    pub(super) warp: u32,
    pub(super) lane: u32,
}

/// What blocks send each other, once in every layer.
#[derive(Clone, Copy)]
pub(super) struct Mail {
    pub(super) arrivals: Arrivals,
    /// Bytes that a block gets.
    pub(super) bytes: u32,
}

impl Walk {
    #[inline(always)]
    pub(super) fn floats(self) -> DynamicShared<f32> {
        self.memory.view()
    }

    /// The query, key and value of the block's head.
    #[inline(always)]
    pub(super) fn qkv(self) -> Mail {
        Mail {
            arrivals: Arrivals::at(self.memory, self.a.layout.qkv_mail),
            bytes: 4 * (3 * self.a.shape.head_dim),
        }
    }

    /// All heads.
    #[inline(always)]
    pub(super) fn heads(self) -> Mail {
        Mail { arrivals: Arrivals::at(self.memory, self.a.layout.heads_mail), bytes: 4 * self.a.shape.n_q() }
    }

    /// The hidden state after attention.
    #[inline(always)]
    pub(super) fn attended(self) -> Mail {
        Mail {
            arrivals: Arrivals::at(self.memory, self.a.layout.attended_mail),
            bytes: 4 * self.a.shape.n_embd,
        }
    }

    /// What is between the halves of the feed-forward network, in Q8_1.
    #[inline(always)]
    pub(super) fn hidden(self) -> Mail {
        let n_ff = self.a.shape.n_ff;
        Mail {
            arrivals: Arrivals::at(self.memory, self.a.layout.hidden_mail),
            bytes: n_ff + 8 * (n_ff / UNIT as u32),
        }
    }

    /// The hidden state after the layer.
    #[inline(always)]
    pub(super) fn after(self) -> Mail {
        Mail { arrivals: Arrivals::at(self.memory, self.a.layout.layer_mail), bytes: 4 * self.a.shape.n_embd }
    }

    /// What counts the arrival of a product's weights.
    #[inline(always)]
    pub(super) fn weights(self, product: Product) -> Arrivals {
        Arrivals::at(self.memory, product.arrivals)
    }

    /// Thread `thread` of the block.
    #[inline(always)]
    pub(super) fn new(a: Arguments, memory: DynamicShared<u32>, thread: u32) -> Self {
        let thread = unforeseen(thread);
        Self { a, memory, rank: block_rank(), warp: thread / WARP_SIZE, lane: thread % WARP_SIZE }
    }

    /// The same thread, of which nothing is known that was worked out before: there are no registers for what could be kept from
    /// layer to layer, and local memory is as far away as the weights. All lanes of a warp make this call together.
    #[inline(always)]
    pub(super) fn afresh(self) -> Self {
        let thread = unforeseen(self.warp * WARP_SIZE + self.lane);
        let layout = self.a.layout.no_sooner(thread);
        let products = layout.products.map(|product| product.no_sooner(thread));
        let a = Arguments {
            shape: self.a.shape.no_sooner(thread),
            layout: Layout { products, ..layout },
            ..self.a
        };
        Self {
            a,
            memory: settled(self.memory),
            rank: no_sooner(self.rank, thread),
            warp: thread / WARP_SIZE,
            lane: thread % WARP_SIZE,
        }
    }

    /// Whether this is the thread that expects and asks for what arrives.
    #[inline(always)]
    pub(super) fn is_fetcher(self) -> bool {
        self.warp == WARPS && self.lane == 0
    }

    /// Whether the block has a query head.
    #[inline(always)]
    pub(super) fn has_head(self) -> bool {
        self.rank < self.a.shape.n_head
    }

    /// Begins to count what arrives, and expects the first mail. One thread makes this call.
    // Written out: a loop over an array would put the arguments into local memory.
    #[inline(always)]
    pub(super) fn set_up(self) {
        let [qkv, output, gate_up, down] = self.a.layout.products;
        self.weights(qkv).set_up();
        self.weights(output).set_up();
        self.weights(gate_up).set_up();
        self.weights(down).set_up();
        let set_up = |mail: Mail| {
            mail.arrivals.set_up();
            mail.arrivals.expect(mail.bytes);
        };
        if self.has_head() {
            set_up(self.qkv());
        }
        set_up(self.heads());
        set_up(self.attended());
        set_up(self.hidden());
        set_up(self.after());
    }

    /// Waits for mail of layer `layer`, and has the next layer's expected.
    #[inline(always)]
    pub(super) fn receive(self, mail: Mail, layer: u32) {
        mail.arrivals.wait(layer);
        if self.is_fetcher() && layer + 1 < self.a.shape.n_layer {
            mail.arrivals.expect(mail.bytes);
        }
    }

    /// An address that the layer's [`LayerRef`] has as word pair `field`.
    #[inline(always)]
    pub(super) fn address<T>(self, layer: u32, field: usize) -> *mut T {
        let at = (self.a.layout.layers + layer * LAYER_WORDS) as usize / 2 + field / 8;
        core::ptr::with_exposed_provenance_mut(self.memory.view::<u64>().get(at) as usize)
    }

    /// Asks for the factors of a norm.
    ///
    /// # Safety
    /// They are the product's; its part of shared memory is not read any more.
    #[inline(always)]
    unsafe fn fetch_gamma(self, product: Product, gamma: *const u8) {
        // SAFETY: the caller's promise.
        unsafe { self.weights(product).fetch(product.gamma, gamma, 4 * product.n_gamma) };
    }

    /// Asks for this block's quads, of those that a matrix has from quad `start` of the product on, `n` of them.
    ///
    /// # Safety
    /// As [`fetch_gamma`](Self::fetch_gamma).
    #[inline(always)]
    unsafe fn fetch_quads(self, product: Product, tiles: *const u8, start: u32, n: u32) {
        let first = product.first_quad(self.rank);
        let (from, to) = (first.max(start), (first + product.quads_of(self.rank)).min(start + n));
        if from < to {
            let skipped = 4 * (from - start) as usize * product.quad_words as usize;
            let at = product.quads + (from - first) * product.quad_words;
            // SAFETY: the caller's promise.
            unsafe {
                let bytes = 4 * (to - from) * product.quad_words;
                self.weights(product).fetch(at, tiles.wrapping_add(skipped), bytes);
            }
        }
    }

    /// Asks for the block's share of a product of layer `layer`, where there is one.
    ///
    /// # Safety
    /// The arguments are as their fields say; the product's part of shared memory is not read any more. One thread makes this call.
    #[inline(always)]
    pub(super) unsafe fn fetch<const PRODUCT: usize>(self, layer: u32) {
        if layer >= self.a.shape.n_layer {
            return;
        }
        let product = self.a.layout.products[PRODUCT];
        let quads = product.quads_of(self.rank) * product.quad_words;
        self.weights(product).expect(4 * (product.n_gamma + quads));
        let address = |field| self.address::<u8>(layer, field).cast_const();
        let (n_q, n_kv) = (self.a.shape.n_q() / TILE_ROWS as u32, self.a.shape.n_kv() / TILE_ROWS as u32);
        // SAFETY: the matrices have as many quads.
        unsafe {
            match PRODUCT {
                QKV => {
                    self.fetch_gamma(product, address(offset_of!(LayerRef, attn_norm)));
                    self.fetch_quads(product, address(offset_of!(LayerRef, q)), 0, n_q);
                    self.fetch_quads(product, address(offset_of!(LayerRef, k)), n_q, n_kv);
                    self.fetch_quads(product, address(offset_of!(LayerRef, v)), n_q + n_kv, n_kv);
                }
                OUTPUT => {
                    let tiles = address(offset_of!(LayerRef, attn_output));
                    self.fetch_quads(product, tiles, 0, product.n_quads());
                }
                GATE_UP => {
                    self.fetch_gamma(product, address(offset_of!(LayerRef, ffn_norm)));
                    let tiles = address(offset_of!(LayerRef, gate_up));
                    self.fetch_quads(product, tiles, 0, product.n_quads());
                }
                _ => {
                    let tiles = address(offset_of!(LayerRef, down));
                    self.fetch_quads(product, tiles, 0, product.n_quads());
                }
            }
        }
    }
}
