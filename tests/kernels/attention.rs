//! Attention over the KV cache, and appending to it.

use super::{Guarded, Random, assert_close, devices, nearest};
use gpu_kernels::kv_cache::KvFormat;
use gpu_kernels::step::Step;
use half::f16;
use host::device::Device;
use host::ops::{
    self, AttentionShape, AttentionWorkspace, Chunk, KvCache, KvLayer, KvStage, Next, Operand,
    QuantizedKvLayer,
};

/// Keys and values for `n_ctx` positions, of which the first `length` are real and the rest poisoned with NaN.
pub(super) struct Cache {
    pub(super) layer: KvLayer,
    n_head_kv: usize,
    n_ctx: usize,
    head_dim: usize,
    /// `[n_head_kv, n_ctx, head_dim]`
    k: Vec<f16>,
    pub(super) v: Vec<f16>,
}

pub(super) fn cache(
    device: &Device,
    n_head_kv: usize,
    n_ctx: usize,
    head_dim: usize,
    length: usize,
    random: &mut Random,
) -> Cache {
    let mut fill = || -> Vec<f16> {
        (0..n_head_kv * n_ctx * head_dim)
            .map(|i| match i / head_dim % n_ctx < length {
                true => f16::from_f32(2.0 * random.symmetric()),
                false => f16::NAN,
            })
            .collect()
    };
    let (k, v) = (fill(), fill());
    let mut layer = KvLayer::alloc(device, n_head_kv, n_ctx, head_dim).unwrap();
    device.upload(&mut layer.k, &k).unwrap();
    device.upload(&mut layer.v, &v).unwrap();
    Cache { layer, n_head_kv, n_ctx, head_dim, k, v }
}

/// Attention in f64, one head after the other.
pub(super) fn reference(q: &[f32], cache: &Cache, length: usize, scale: f64) -> Vec<f64> {
    let &Cache { n_head_kv, n_ctx, head_dim, .. } = cache;
    let n_head = q.len() / head_dim;
    let mut out = Vec::new();
    for head in 0..n_head {
        let offset = head / (n_head / n_head_kv) * n_ctx * head_dim;
        let row = |values: &[f16], p: usize, d: usize| values[offset + p * head_dim + d].to_f64();
        let scores: Vec<f64> = (0..length)
            .map(|p| {
                scale
                    * (0..head_dim)
                        .map(|d| f64::from(q[head * head_dim + d]) * row(&cache.k, p, d))
                        .sum::<f64>()
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        out.extend(
            (0..head_dim).map(|d| (0..length).map(|p| weights[p] * row(&cache.v, p, d)).sum::<f64>() / total),
        );
    }
    out
}

#[test]
fn attention_matches_f64() {
    const LENGTHS: [usize; 12] = [1, 2, 31, 32, 33, 63, 128, 129, 257, 511, 600, 1031];
    for device in devices() {
        for (n_head, n_head_kv, head_dim, n_splits) in [
            (1, 1, 32, 1),
            (9, 3, 64, 1),
            (9, 3, 64, 3),
            (4, 4, 80, 5),
            (4, 4, 96, 2),
            (12, 2, 128, 4),
            (28, 4, 128, 1),
            (7, 1, 128, 64),
            (8, 1, 64, 7),
            (10, 2, 48, 3),
            (3, 1, 160, 2),
            (2, 1, 224, 1),
            (2, 2, 256, 3),
            (20, 2, 64, 2),
            (18, 1, 256, 2),
        ] {
            let mut workspace =
                AttentionWorkspace::with_splits(device, n_head, n_head_kv, head_dim, n_splits).unwrap();
            for length in LENGTHS {
                let n_ctx = length + length % 5;
                let mut random = Random::new((length * 1000 + head_dim) as u64);
                let cache = cache(device, n_head_kv, n_ctx, head_dim, length, &mut random);
                // Queries large enough for a peaked softmax, which an unstable one gets wrong.
                let q: Vec<f32> = random.vector(n_head * head_dim).into_iter().map(|v| 6.0 * v).collect();
                let scale = 1.0 / (head_dim as f32).sqrt();
                let expected = reference(&q, &cache, length, scale.into());

                let what = format!(
                    "{n_head}:{n_head_kv} heads of {head_dim}, {length} positions in {n_splits} parts, {}",
                    device.describe()
                );
                let step = device.alloc_from(&[Step { token: 0, position: length as u32 - 1 }]).unwrap();
                let q = device.alloc_from(&q).unwrap();
                let shape = AttentionShape { n_head, scale, n_fresh: 1 };
                // Several times with one workspace: a launch leaves it as it was. Dealt out for a block, for clusters and for more blocks,
                // rehearsed or not.
                for (suited_to, rehearsals) in [(1, 0), (100_000, 1), (1, 2), (length, 1), (1024, 0)] {
                    workspace.suit(suited_to);
                    workspace.rehearse(rehearsals);
                    let mut out = Guarded::new(device, n_head * head_dim);
                    let mut left = Operand::alloc(device, n_head * head_dim, false).unwrap();
                    let (layer, buffer) = (&cache.layer, &mut out.buffer);
                    let next = Some(Next { operand: &mut left, gamma: None });
                    ops::attention(device, &q, layer, &step, shape, &mut workspace, buffer, next).unwrap();
                    let out = out.finish(device, &what);
                    assert_close(&out, &expected, 2e-5, 0.5, &what);
                    assert_eq!(left.to_f32(device).unwrap(), nearest(&out), "{what}");
                }
            }
        }
    }
}

#[test]
fn scores_far_apart_do_not_overflow() {
    for device in devices() {
        let (head_dim, length) = (64, 100);
        let mut random = Random::new(1);
        let cache = cache(device, 1, length, head_dim, length, &mut random);
        for magnitude in [0.0f32, 1e3, 1e4] {
            let q: Vec<f32> = random.vector(head_dim).into_iter().map(|v| magnitude * v).collect();
            let expected = reference(&q, &cache, length, 1.0);
            let step = device.alloc_from(&[Step { token: 0, position: length as u32 - 1 }]).unwrap();
            let q = device.alloc_from(&q).unwrap();
            let mut out = Guarded::new(device, head_dim);
            let shape = AttentionShape { n_head: 1, scale: 1.0, n_fresh: 1 };
            let mut workspace = AttentionWorkspace::alloc(device, 1, 1, head_dim).unwrap();
            ops::attention(device, &q, &cache.layer, &step, shape, &mut workspace, &mut out.buffer, None)
                .unwrap();
            // A score's rounding error, 1e-7 of up to 1e6, moves its weight by as many per cent.
            let what = format!("magnitude {magnitude}");
            assert_close(&out.finish(device, &what), &expected, 0.1, 1.0, &what);
        }
    }
}

#[test]
fn kv_append_writes_one_position_of_every_head() {
    for device in devices() {
        for (n_head_kv, n_ctx, head_dim) in [(1, 1, 32), (3, 17, 64), (2, 5, 128), (1, 3, 256)] {
            for position in [0, n_ctx / 2, n_ctx - 1] {
                let mut random = Random::new((n_ctx + position) as u64);
                let mut cache = cache(device, n_head_kv, n_ctx, head_dim, n_ctx, &mut random);
                let (k, v) = (random.vector(n_head_kv * head_dim), random.vector(n_head_kv * head_dim));
                let step = device.alloc_from(&[Step { token: 0, position: position as u32 }]).unwrap();
                let (k_new, v_new) = (device.alloc_from(&k).unwrap(), device.alloc_from(&v).unwrap());
                ops::kv_append(device, &k_new, &v_new, &mut cache.layer, &step).unwrap();

                let check = |found: Vec<f16>, before: &[f16], new: &[f32]| {
                    for (i, value) in found.into_iter().enumerate() {
                        let (head, p, d) = (i / head_dim / n_ctx, i / head_dim % n_ctx, i % head_dim);
                        let expected =
                            if p == position { f16::from_f32(new[head * head_dim + d]) } else { before[i] };
                        assert_eq!(value, expected, "head {head}, position {p}, dimension {d}");
                    }
                };
                check(device.to_vec(&cache.layer.k).unwrap(), &cache.k, &k);
                check(device.to_vec(&cache.layer.v).unwrap(), &cache.v, &v);
            }
        }
    }
}

#[test]
fn head_sizes_that_kernels_cannot_take_are_refused() {
    let device = &devices()[0];
    for head_dim in [0, 8, 100, 288] {
        let error = KvLayer::alloc(device, 1, 4, head_dim).unwrap_err().to_string();
        assert!(error.contains(&format!("found {head_dim}")), "{error}");
    }
    let layer = KvLayer::alloc(device, 2, 4, 32).unwrap();
    let step = device.alloc_from(&[Step::default()]).unwrap();
    let (q, mut out) = (device.alloc_from(&[0.0f32; 96]).unwrap(), device.alloc_from(&[0.0f32; 96]).unwrap());
    let shape = AttentionShape { n_head: 3, scale: 1.0, n_fresh: 1 };
    let mut workspaces = [2, 4].map(|n_head| AttentionWorkspace::alloc(device, n_head, 2, 32).unwrap());
    let mut run = |shape, workspace: usize| {
        ops::attention(device, &q, &layer, &step, shape, &mut workspaces[workspace], &mut out, None)
    };
    let error = run(shape, 0).unwrap_err().to_string();
    assert!(error.contains("3 query heads over 2 key-value heads"), "{error}");
    let error = AttentionWorkspace::alloc(device, 3, 2, 32).unwrap_err().to_string();
    assert!(error.contains("3 query heads over 2 key-value heads"), "{error}");
    let shape = AttentionShape { n_head: 4, scale: 1.0, n_fresh: 1 };
    let error = run(shape, 0).unwrap_err().to_string();
    assert!(error.contains("4 query heads over 2 key-value heads, the workspace is for 2 over 2"), "{error}");
    let error = run(shape, 1).unwrap_err().to_string();
    assert!(error.contains("128 are needed"), "{error}");
}

/// A cache in Q8_0 whose first `length` positions are the cache's, and what it holds after rounding.
fn quantized(device: &Device, cache: &Cache, length: usize) -> (QuantizedKvLayer, Cache) {
    let &Cache { n_head_kv, n_ctx, head_dim, .. } = cache;
    let mut layer = QuantizedKvLayer::alloc(device, n_head_kv, n_ctx, head_dim).unwrap();
    let mut stage = KvStage::alloc(device, n_head_kv, n_ctx, head_dim).unwrap();
    device.upload(&mut stage.layer.k, &cache.k).unwrap();
    device.upload(&mut stage.layer.v, &cache.v).unwrap();
    let steps: Vec<Step> = (0..length).map(|p| Step { token: 0, position: p as u32 }).collect();
    let steps = device.alloc_from(&steps).unwrap();
    ops::quantize_kv(device, &stage, &steps, length, &mut layer).unwrap();

    let round = |values: &[f16]| -> Vec<f16> {
        let round = |block: &[f16]| -> Vec<f16> {
            let amax = block.iter().fold(0.0f32, |max, v| max.max(v.to_f32().abs()));
            let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
            let d = f16::from_f32(amax / 127.0).to_f32();
            block.iter().map(|v| f16::from_f32((v.to_f32() * inverse).round_ties_even() * d)).collect()
        };
        values.chunks(32).flat_map(round).collect()
    };
    let rounded = Cache {
        layer: KvLayer::alloc(device, n_head_kv, n_ctx, head_dim).unwrap(),
        k: round(&cache.k),
        v: round(&cache.v),
        ..*cache
    };
    (layer, rounded)
}

#[test]
fn attention_over_a_cache_in_q8_0_matches_f64() {
    for device in devices() {
        for (n_head, n_head_kv, head_dim, length) in [
            (3, 1, 64, 77),
            (4, 2, 128, 300),
            (2, 2, 96, 1),
            (7, 1, 128, 65),
            (2, 1, 256, 130),
            (5, 1, 32, 64),
        ] {
            let mut random = Random::new((length + head_dim) as u64);
            let exact = cache(device, n_head_kv, length + 3, head_dim, length, &mut random);
            let (layer, rounded) = quantized(device, &exact, length);
            let q: Vec<f32> = random.vector(n_head * head_dim).into_iter().map(|v| 6.0 * v).collect();
            let scale = 1.0 / (head_dim as f32).sqrt();
            let expected = reference(&q, &rounded, length, scale.into());
            let what = format!("{n_head}:{n_head_kv} heads of {head_dim}, {length} positions");

            let step = device.alloc_from(&[Step { token: 0, position: length as u32 - 1 }]).unwrap();
            let q = device.alloc_from(&q).unwrap();
            let shape = AttentionShape { n_head, scale, n_fresh: 1 };
            let mut workspace =
                AttentionWorkspace::with_splits(device, n_head, n_head_kv, head_dim, 3).unwrap();
            let mut out = Guarded::new(device, n_head * head_dim);
            ops::attention(device, &q, &layer, &step, shape, &mut workspace, &mut out.buffer, None).unwrap();
            // The reference's keys and values are rounded to f16 once more.
            assert_close(&out.finish(device, &what), &expected, 3e-3, 2.0, &what);

            let mut out = Guarded::new(device, n_head * head_dim);
            let chunk = Chunk { position: length - 1, n_tokens: 1 };
            ops::prefill_attention(device, &q, &layer, chunk, shape, &mut out.buffer).unwrap();
            assert_close(&out.finish(device, &what), &expected, 5e-3, 2.0, &what);
        }
    }
}

#[test]
fn quantize_kv_matches_its_twin_and_leaves_other_positions() {
    for device in devices() {
        let (n_head_kv, n_ctx, head_dim) = (3, 9, 96);
        let mut random = Random::new(7);
        let stage_values = [(); 2].map(|()| random.vector(n_head_kv * 4 * head_dim));
        let mut stage = KvStage::alloc(device, n_head_kv, 4, head_dim).unwrap();
        let halves = |values: &[f32]| -> Vec<f16> { values.iter().map(|&v| f16::from_f32(v)).collect() };
        device.upload(&mut stage.layer.k, &halves(&stage_values[0])).unwrap();
        device.upload(&mut stage.layer.v, &halves(&stage_values[1])).unwrap();
        let mut cache = KvCache::alloc(device, KvFormat::Q8_0, n_head_kv, n_ctx, head_dim).unwrap();
        cache.fill_with_noise(device, 1).unwrap();
        let before = cache.to_f32(device).unwrap();
        // Three tokens, not in order.
        let positions = [5, 2, 8];
        let steps = device.alloc_from(&positions.map(|position| Step { token: 0, position })).unwrap();
        let KvCache::Q8_0(layer) = &mut cache else { panic!("a cache in Q8_0 was asked for") };
        ops::quantize_kv(device, &stage, &steps, 3, layer).unwrap();
        let after = cache.to_f32(device).unwrap();
        for (i, (&found, &before)) in after.iter().zip(&before).enumerate() {
            let (which, i) = (i / (n_head_kv * n_ctx * head_dim), i % (n_head_kv * n_ctx * head_dim));
            let (head, position, d) = (i / head_dim / n_ctx, i / head_dim % n_ctx, i % head_dim);
            let Some(token) = positions.iter().position(|&p| p as usize == position) else {
                assert_eq!(found, before, "position {position} was written");
                continue;
            };
            let row = &stage_values[which][(head * 4 + token) * head_dim..][..head_dim];
            let row: Vec<f32> = row.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
            let amax = row[d / 32 * 32..][..32].iter().fold(0.0f32, |max, v| max.max(v.abs()));
            let wanted = (row[d] * (127.0 / amax)).round_ties_even() * f16::from_f32(amax / 127.0).to_f32();
            assert_eq!(found, wanted, "head {head}, position {position}, {d}");
        }
    }
}

#[test]
fn caches_that_q8_0_cannot_hold_are_refused() {
    let device = &devices()[0];
    let error = QuantizedKvLayer::alloc(device, 1, 4, 80).unwrap_err().to_string();
    assert!(error.contains("a multiple of 32 values, found 80"), "{error}");
    let stage = KvStage::alloc(device, 2, 4, 64).unwrap();
    let steps = device.alloc_from(&[Step::default(); 5]).unwrap();
    let run = |n_head_kv, n_tokens| {
        let mut cache = QuantizedKvLayer::alloc(device, n_head_kv, 8, 64).unwrap();
        ops::quantize_kv(device, &stage, &steps, n_tokens, &mut cache).unwrap_err().to_string()
    };
    assert!(run(1, 1).contains("2 heads of 64 values for a cache of 1 heads of 64"));
    assert!(run(2, 5).contains("5 tokens of a stage for 4"));
}
