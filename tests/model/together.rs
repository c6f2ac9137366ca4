//! All layers in one launch against f64.

use super::made_up::{K_QUANTS, LLAMA, MIXED, MadeUp, QWEN2, Shape};
use super::reference::Reference;
use super::{Q8_1_RUN, check_logits, load, widened};
use crate::kernels::{assert_close, devices, nmse};
use gpu_kernels::formats::Format;
use gpu_kernels::operand::SCALE;
use gpu_kernels::step::Step;
use half::f16;
use host::device::{Device, DeviceChoice};
use host::model::{Activations, Buffers, KvFormat, Op, together};
use host::ops::{self, KvCache, Next};
use host::sampling::SamplingOptions;

/// Fewer quads than warps, as few units as can be, and more than a tile of them.
const SMALL: Shape = Shape { what: "llama in Q4_1", n_ff: 1184, format: |_, _| Format::Q4_1, ..LLAMA };

/// More than a tile of columns, more quads than warps, several rounds of positions, pairs half a head apart, and two heads to a key-value head.
const WIDE: Shape = Shape {
    what: "qwen2 in Q4_1",
    n_layer: 1,
    n_embd: 1056,
    n_ff: 96,
    n_head: 8,
    n_head_kv: 4,
    head_dim: 96,
    n_rot: 64,
    biases: false,
    format: |_, _| Format::Q4_1,
    ..QWEN2
};

/// The same in the other format, with fewer heads, for which there is room.
const WIDE_Q8_0: Shape =
    Shape { what: "qwen2 in Q8_0", n_head: 4, n_head_kv: 2, format: |_, _| Format::Q8_0, ..WIDE };

/// Heads of as many values as there may be, which are not all rotated, and more than a tile of hidden values.
const LONG_HEADS: Shape = Shape {
    what: "llama with long heads in Q8_0",
    n_layer: 1,
    n_ff: 1184,
    n_head: 2,
    n_head_kv: 2,
    head_dim: 256,
    n_rot: 64,
    format: |_, _| Format::Q8_0,
    ..LLAMA
};

/// Positions that the cache has room for.
const N_CTX: usize = 48;

fn run(device: &Device, shape: &'static Shape, n_tokens: u32) {
    let made_up = MadeUp::new(shape);
    let model = load(device, &made_up, Activations::Q8_1);
    let (weights, settings) = (model.weights(), model.settings());
    let cache = |_| KvCache::alloc(device, KvFormat::F16, shape.n_head_kv, N_CTX, shape.head_dim).unwrap();
    let mut caches: Vec<KvCache> = (0..shape.n_layer).map(cache).collect();
    // What is at later positions is no matter.
    for cache in &mut caches {
        cache.fill_with_noise(device, 7).unwrap();
    }
    let mut b = Buffers::alloc(device, model.config(), settings).unwrap();
    // SAFETY: model and caches live as long.
    let Some(mut layers) = (unsafe { together(device, weights, settings, &mut caches).unwrap() }) else {
        assert!(
            !device.describe().contains("sm_90a") && device.is_cuda(),
            "{} has clusters",
            device.describe()
        );
        return;
    };
    let mut reference = Reference::new(&made_up);
    for position in 0..n_tokens {
        let token = position * 7 % shape.n_vocab as u32;
        let what = format!("{}, position {position} on {}", shape.what, device.describe());
        device.upload(&mut b.steps, &[Step { token, position }]).unwrap();
        ops::embed(
            device,
            &weights.token_embd,
            &b.steps,
            1,
            &settings.rope,
            &mut b.x,
            &mut b.rotation,
            None,
            true,
        )
        .unwrap();
        let next = Next { operand: &mut b.x_operand, gamma: Some(&weights.output_norm) };
        ops::layers(device, &mut layers, &b.steps, &b.rotation, &mut b.x, next).unwrap();

        let caches: Vec<Vec<f32>> = caches.iter().map(|cache| cache.to_f32(device).unwrap()).collect();
        let mut expected = Vec::new();
        reference.token(token, &mut |op, layer, values| match op {
            Op::FfnOutput if layer + 1 == shape.n_layer => {
                expected.clone_from(&values);
                values
            }
            // What the device has appended is what later positions see.
            Op::KvAppend => {
                let heads = caches[layer].chunks_exact(N_CTX * shape.head_dim);
                let at = position as usize * shape.head_dim;
                let found: Vec<f32> = heads.flat_map(|head| head[at..][..shape.head_dim].to_vec()).collect();
                let error = nmse(&found, &values);
                assert!(
                    error < Q8_1_RUN,
                    "{what}: keys and values of layer {layer} have an NMSE of {error:e}"
                );
                widened(&found)
            }
            _ => values,
        });
        let found = device.to_vec(&b.x).unwrap();
        let error = nmse(&found, &expected);
        assert!(error < Q8_1_RUN, "{what}: NMSE {error:e}");
        // What comes after the layers gets the same.
        let gamma = device.to_vec(&weights.output_norm).unwrap();
        let scaled: Vec<f64> = found.iter().zip(&gamma).map(|(&x, &g)| f64::from(x) * f64::from(g)).collect();
        // An f16 has eleven digits down to 2^-14, below which its steps stay as they are.
        let least = f64::from(f16::MIN_POSITIVE.to_f32() / SCALE);
        assert_close(&b.x_operand.to_f32(device).unwrap(), &scaled, 1.0 / 2048.0, least, &what);
        let squares: f64 = widened(&found).iter().map(|x| x * x).sum();
        let sum = b.x_operand.sum_of_squares(device).unwrap();
        assert!((sum - squares).abs() <= 1e-6 * squares, "{what}: the squares are {squares}, not {sum}");
    }
}

// A test each, since compute-sanitizer's racecheck takes minutes for one of them.

#[test]
fn all_layers_of_a_small_model_are_near_f64() {
    devices().iter().for_each(|device| run(device, &SMALL, 8));
}

#[test]
fn all_layers_of_a_wide_model_are_near_f64() {
    devices().iter().for_each(|device| run(device, &WIDE, 40));
}

#[test]
fn all_layers_of_a_wide_model_in_q8_0_are_near_f64() {
    devices().iter().for_each(|device| run(device, &WIDE_Q8_0, 8));
}

#[test]
fn all_layers_with_long_heads_are_near_f64() {
    devices().iter().for_each(|device| run(device, &LONG_HEADS, 40));
}

/// Sessions go that way where it is faster, and the logits are as good as the others'.
#[test]
fn sessions_are_near_f64_whichever_way_they_go() {
    for device in devices() {
        check_logits(device, &MadeUp::new(&SMALL));
    }
}

/// Tokens that the device chooses are the same, whether it runs one step or several ahead, and whatever was under way before.
#[test]
fn tokens_are_the_same_however_far_ahead_the_device_is() {
    const N: usize = 40;
    const PROMPT: [u32; 3] = [5, 1, 7];
    for shape in [&SMALL, &LLAMA] {
        let made_up = MadeUp::new(shape);
        for device in devices() {
            let model = load(device, &made_up, Activations::Q8_1);
            let mut session = model.session().unwrap();
            let options = SamplingOptions { temp: 1.5, top_k: 0, top_p: 1.0, seed: 3 };
            session.set_sampling(&options).unwrap();
            let end = PROMPT.len() + N - 1;
            // One by one: each choice is waited for before its token is fed.
            session.feed(&PROMPT).unwrap();
            let mut expected = Vec::new();
            for known in PROMPT.len()..=end {
                session.choose().unwrap();
                expected.push(session.next_chosen().unwrap());
                if known < end {
                    session.feed(&expected[expected.len() - 1..]).unwrap();
                }
            }
            assert!(expected.iter().any(|token| *token != expected[0]), "{expected:?}");
            for n_read in [2, 11, N, N] {
                session.truncate(0);
                session.feed(&PROMPT).unwrap();
                session.choose().unwrap();
                let mut found = Vec::new();
                for known in PROMPT.len()..PROMPT.len() + n_read {
                    session.run_ahead(known, end).unwrap();
                    found.push(session.next_chosen().unwrap());
                }
                assert!(session.position() <= end, "{} tokens were fed, not {end}", session.position());
                assert_eq!(found, expected[..n_read], "{}, {}", shape.what, device.describe());
            }
            assert_eq!(session.next_chosen().unwrap_err().to_string(), "no token is outstanding");
        }
    }
}

#[test]
fn what_does_not_fit_goes_kernel_by_kernel() {
    const WIDER: Shape = Shape { n_ff: 12_288, ..WIDE };
    const BIASED: Shape = Shape { format: |_, _| Format::Q8_0, ..QWEN2 };
    const MANY_HEADS: Shape = Shape { n_head: 17, head_dim: 32, n_head_kv: 1, ..SMALL };
    let device = &Device::open(DeviceChoice::Cpu).unwrap();
    let goes = |shape: &'static Shape, activations| {
        let model = load(device, &MadeUp::new(shape), activations);
        let cache =
            |_| KvCache::alloc(device, KvFormat::F16, shape.n_head_kv, N_CTX, shape.head_dim).unwrap();
        let mut caches: Vec<KvCache> = (0..shape.n_layer).map(cache).collect();
        // SAFETY: model and caches live as long.
        unsafe { together(device, model.weights(), model.settings(), &mut caches).unwrap() }.is_some()
    };
    assert!(goes(&SMALL, Activations::Q8_1) && goes(&WIDE, Activations::Q8_1));
    assert!(!goes(&SMALL, Activations::F32), "the exact path");
    for shape in [&LLAMA, &MIXED, &K_QUANTS, &WIDER, &BIASED, &MANY_HEADS] {
        assert!(!goes(shape, Activations::Q8_1), "{}", shape.what);
    }
}
