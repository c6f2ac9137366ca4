//! Attention of many tokens: against f64 on the same rounded numbers, and more loosely on those as they were.

use super::attention::{cache, reference};
use super::{Guarded, Random, assert_close, devices, nmse};
use half::f16;
use host::ops::{self, AttentionShape, Chunk, KvLayer};

#[test]
fn prefill_attention_matches_f64() {
    for device in devices() {
        for (n_head, n_head_kv, head_dim) in [
            (2, 1, 32),
            (3, 1, 64),
            (6, 1, 64),
            (4, 4, 80),
            (4, 2, 96),
            (7, 1, 128),
            (2, 2, 192),
            (2, 1, 256),
        ] {
            for (position, n_tokens) in
                [(0, 1), (0, 7), (1, 16), (63, 33), (0, 64), (100, 65), (257, 129), (0, 200), (511, 2)]
            {
                let n_ctx = position + n_tokens + 3;
                let mut random = Random::new((position * 1000 + n_tokens + head_dim) as u64);
                let cache = cache(device, n_head_kv, n_ctx, head_dim, position + n_tokens, &mut random);
                // Queries large enough for a peaked softmax, which an unstable one gets wrong.
                let n_q = n_head * head_dim;
                let q: Vec<f32> = random.vector(n_tokens * n_q).into_iter().map(|v| 6.0 * v).collect();
                let scale = 1.0 / (head_dim as f32).sqrt();
                let expected = |q: &[f32]| -> Vec<f64> {
                    let tokens = q.chunks_exact(n_q).enumerate();
                    tokens.flat_map(|(i, q)| reference(q, &cache, position + i + 1, scale.into())).collect()
                };
                let rounded: Vec<f32> = q.iter().map(|&v| f16::from_f32(v).to_f32()).collect();
                let what = format!(
                    "{n_head}:{n_head_kv} heads of {head_dim}, {n_tokens} tokens at {position}, {}",
                    device.describe()
                );
                let buffer = device.alloc_from(&q).unwrap();
                let mut out = Guarded::new(device, n_tokens * n_q);
                let (shape, chunk) =
                    (AttentionShape { n_head, scale, n_fresh: 1 }, Chunk { position, n_tokens });
                ops::prefill_attention(device, &buffer, &cache.layer, chunk, shape, &mut out.buffer).unwrap();
                let found = out.finish(device, &what);
                // Weights are rounded to 11 bits, values are at most 2.
                assert_close(&found, &expected(&rounded), 1e-3, 2.0, &what);
                let error = nmse(&found, &expected(&q));
                assert!(error <= 1e-5, "{what}: NMSE {error:e}");
            }
        }
    }
}

#[test]
fn large_queries_are_saturated() {
    for device in devices() {
        let (head_dim, n_tokens) = (64, 20);
        let mut random = Random::new(1);
        let cache = cache(device, 1, n_tokens, head_dim, n_tokens, &mut random);
        for magnitude in [0.0f32, 1e3, 1e6] {
            let q: Vec<f32> = random.vector(n_tokens * head_dim).into_iter().map(|v| magnitude * v).collect();
            let buffer = device.alloc_from(&q).unwrap();
            let mut out = Guarded::new(device, n_tokens * head_dim);
            let shape = AttentionShape { n_head: 1, scale: 1.0, n_fresh: 1 };
            let chunk = Chunk { position: 0, n_tokens };
            ops::prefill_attention(device, &buffer, &cache.layer, chunk, shape, &mut out.buffer).unwrap();
            // All numbers, and the first token sees its own value alone.
            let found = out.finish(device, "large queries");
            let first: Vec<f64> = cache.v[..head_dim].iter().map(|v| v.to_f64()).collect();
            assert_close(&found[..head_dim], &first, 1e-3, 1.0, "the first token");
        }
    }
}

#[test]
fn chunks_that_do_not_fit_are_refused() {
    let device = &devices()[0];
    let cache = KvLayer::alloc(device, 2, 8, 32).unwrap();
    let (q, mut out) = (device.alloc::<f32>(256).unwrap(), device.alloc::<f32>(256).unwrap());
    let mut message_of = |scale, n_head, position, n_tokens| {
        let (shape, chunk) = (AttentionShape { n_head, scale, n_fresh: 1 }, Chunk { position, n_tokens });
        let result = ops::prefill_attention(device, &q, &cache, chunk, shape, &mut out);
        format!("{:#}", result.unwrap_err())
    };
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(message_of(scale, 2, 0, 1).contains("above 0"));
    }
    let mut message = |n_head, position, n_tokens| message_of(1.0, n_head, position, n_tokens);
    assert!(message(3, 0, 1).contains("3 query heads over 2 key-value heads"));
    assert!(message(2, 6, 3).contains("the cache has room for 8"));
    assert!(message(2, 0, 0).contains("no tokens"));
    assert!(message(4, 0, 3).contains("384 are needed"));
}
