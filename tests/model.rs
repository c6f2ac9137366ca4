//! The model layer: every operation of the forward pass against f64, sessions, and what loading refuses.

pub mod made_up;
mod reference;
mod together;

use crate::kernels::{Random, assert_close, devices, nmse};
use crate::tiny_model::{N_EMBD, N_FF, TinyModel};
use gpu_kernels::step::Step;
use host::device::{Buffer, Device};
use host::gguf::{GgmlType, Gguf};
use host::model::{
    Activations, Buffers, FfnBuffers, Fusion, Halt, KvFormat, Model, ModelOptions, Op, Point, Probe, Session,
    Tokens, ffn, layer,
};
use host::ops::{self, Input, KvCache, Next, Operand};
use made_up::{K_QUANTS, LLAMA, MIXED, MadeUp, QWEN2, SHAPES, Shape};
use reference::{Reference, unwatched};
use std::collections::HashMap;

/// On the exact path, how far one operation may be from f64 on the same input, as part of its largest value.
const OPERATION: f64 = 4e-6;
/// On the exact path, how far any value of a whole run may be from f64, as part of the largest of its vector: a key
/// or value that rounds to the other neighbour in f16 is off by 1/2048.
const RUN: f64 = 1e-3;
/// On the Q8_1 path, the NMSE of one operation against f64 on the same input: the bound that ggml's own tests use.
const Q8_1_OPERATION: f64 = 5e-4;
/// On the Q8_1 path, the NMSE of the logits of a whole run: about as much for each of its dozen roundings.
const Q8_1_RUN: f64 = 1e-2;

/// Short, with a token that comes twice and the vocabulary's first.
const PROMPT: [u32; 6] = [3, 10, 0, 7, 3, 9];

fn load(device: &Device, made_up: &MadeUp, activations: Activations) -> Model {
    load_fused(device, made_up, activations, Fusion::Fused)
}

fn load_fused(device: &Device, made_up: &MadeUp, activations: Activations, fusion: Fusion) -> Model {
    let options = ModelOptions { activations, fusion, ..ModelOptions::default() };
    load_with(device, &made_up.gguf, &options).unwrap()
}

fn load_with(device: &Device, gguf: &Gguf, options: &ModelOptions) -> anyhow::Result<Model> {
    Model::load(device.clone(), gguf, options, &mut |_, _| {})
}

/// The one line a user sees when a model does not load.
#[track_caller]
fn refusal(device: &Device, gguf: &Gguf, options: &ModelOptions) -> String {
    let line = format!("{:#}", load_with(device, gguf, options).err().expect("the model must not load"));
    assert!(!line.contains('\n'), "{line}");
    line
}

fn logits(session: &mut Session) -> Vec<f32> {
    let mut logits = Vec::new();
    session.logits(&mut logits).unwrap();
    logits
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |max, v| v.abs().max(max))
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

/// Every point of the forward pass.
fn points(shape: &Shape, fusion: Fusion) -> impl Iterator<Item = Point> {
    const FUSED: [Op; 6] =
        [Op::QRope, Op::KvAppend, Op::Attention, Op::AttnOutput, Op::FfnSwiglu, Op::FfnOutput];
    const UNFUSED: [Op; 6] = [Op::AttnNorm, Op::Q, Op::K, Op::V, Op::KRope, Op::FfnNorm];
    let (outside, more): (&[Op], &[Op]) = match fusion {
        Fusion::Fused => (&[Op::Embed, Op::Logits], &[]),
        Fusion::Unfused => (&[Op::Embed, Op::OutputNorm, Op::Logits], &UNFUSED),
    };
    let in_layer = FUSED.iter().chain(more);
    let layers =
        (0..shape.n_layer).flat_map(move |layer| in_layer.clone().map(move |&op| Point { op, layer }));
    outside.iter().map(|&op| Point { op, layer: 0 }).chain(layers)
}

/// What every point of the forward pass holds, for each token of [`PROMPT`]; of the KV cache what is at the token's position,
/// keys and then values: `[n_head_kv, head_dim]` each.
fn trace(made_up: &MadeUp, model: &Model) -> Vec<HashMap<Point, Vec<f32>>> {
    let mut session = model.session().unwrap();
    PROMPT
        .iter()
        .map(|&token| {
            let position = session.position();
            let mut at = |point: Point| {
                let values = session.run_until(token, point).unwrap();
                match point.op {
                    Op::KvAppend => {
                        let row = made_up.shape.head_dim;
                        let heads = values.chunks_exact(model.n_ctx() * row);
                        heads.flat_map(|head| head[position * row..][..row].to_vec()).collect()
                    }
                    _ => values,
                }
            };
            let values =
                points(made_up.shape, model.settings().fusion).map(|point| (point, at(point))).collect();
            session.feed(&[token]).unwrap();
            values
        })
        .collect()
}

/// Calls `check` with what the device made at every point and what f64 makes of the device's own earlier values.
fn check_operations(made_up: &MadeUp, model: &Model, check: &mut impl FnMut(&str, &[f32], &[f64])) {
    let mut reference = Reference::new(made_up);
    for (position, (&token, device)) in PROMPT.iter().zip(trace(made_up, model)).enumerate() {
        let mut n_points = 0;
        reference.token(token, &mut |op, layer, expected| {
            // What a fused kernel keeps to itself is taken as f64 has it.
            let Some(found) = device.get(&Point { op, layer }) else { return expected };
            n_points += 1;
            let what = format!("{}, {op:?} of layer {layer}, position {position}", made_up.shape.what);
            check(&format!("{what} on {}", model.device().describe()), found, &expected);
            widened(found)
        });
        assert_eq!(n_points, device.len(), "points that the reference does not know");
    }
}

#[test]
fn every_operation_matches_f64() {
    for made_up in SHAPES.map(MadeUp::new) {
        for device in devices() {
            for fusion in [Fusion::Fused, Fusion::Unfused] {
                let model = load_fused(device, &made_up, Activations::F32, fusion);
                check_operations(&made_up, &model, &mut |what, found, expected| {
                    // A fused kernel rounds keys and values of its own to f16: some to the other neighbour.
                    let of_cache = fusion == Fusion::Fused && what.contains("KvAppend");
                    let tolerance = if of_cache { RUN } else { OPERATION };
                    assert_close(found, expected, tolerance, largest(expected), what);
                });
            }
        }
    }
}

#[test]
fn whole_runs_match_f64() {
    for made_up in SHAPES.map(MadeUp::new) {
        for device in devices() {
            for fusion in [Fusion::Fused, Fusion::Unfused] {
                let model = load_fused(device, &made_up, Activations::F32, fusion);
                let mut reference = Reference::new(&made_up);
                for (&token, values) in PROMPT.iter().zip(trace(&made_up, &model)) {
                    reference.token(token, &mut |op, layer, expected| {
                        if let Some(found) = values.get(&Point { op, layer }) {
                            let what = format!("{}, {fusion:?} {op:?} of layer {layer}", made_up.shape.what);
                            assert_close(found, &expected, RUN, largest(&expected), &what);
                        }
                        expected
                    });
                }
            }
        }
    }
}

#[test]
fn every_operation_on_q8_1_is_near_f64() {
    for made_up in SHAPES.map(MadeUp::new) {
        for device in devices() {
            for fusion in [Fusion::Fused, Fusion::Unfused] {
                let model = load_fused(device, &made_up, Activations::Q8_1, fusion);
                check_operations(&made_up, &model, &mut |what, found, expected| {
                    let error = nmse(found, expected);
                    assert!(error < Q8_1_OPERATION, "{what}: NMSE {error:e}");
                });
            }
        }
    }
}

/// What a session makes of [`PROMPT`], token by token.
fn check_logits(device: &Device, made_up: &MadeUp) {
    let model = load(device, made_up, Activations::Q8_1);
    let mut session = model.session().unwrap();
    let mut reference = Reference::new(made_up);
    for token in PROMPT {
        session.feed(&[token]).unwrap();
        let expected = reference.token(token, &mut unwatched);
        let error = nmse(&logits(&mut session), &expected);
        assert!(error < Q8_1_RUN, "{} on {}: NMSE {error:e}", made_up.shape.what, device.describe());
    }
}

#[test]
fn logits_on_q8_1_are_near_f64() {
    for made_up in SHAPES.map(MadeUp::new) {
        for device in devices() {
            check_logits(device, &made_up);
        }
    }
}

/// What the network's first product reads of its input.
fn operand(device: &Device, x: &Buffer<f32>, activations: Activations) -> Operand {
    let mut operand = Operand::alloc(device, x.len(), activations == Activations::F32).unwrap();
    ops::make_operand(device, x, Next { operand: &mut operand, gamma: None }).unwrap();
    operand
}

fn ffn_input<'a>(activations: Activations, x: &'a Buffer<f32>, operand: &'a Operand) -> Input<'a> {
    match activations {
        Activations::F32 => Input::F32(x, None),
        Activations::Q8_1 => Input::Operand(operand),
    }
}

#[test]
fn ffn_matches_f64() {
    for made_up in SHAPES.map(MadeUp::new) {
        let &Shape { n_embd, n_ff, n_layer, .. } = made_up.shape;
        for device in devices() {
            for activations in [Activations::F32, Activations::Q8_1] {
                let model = load(device, &made_up, activations);
                let mut buffers = FfnBuffers::alloc(device, n_ff, activations).unwrap();
                let mut random = Random::new(1);
                for index in 0..n_layer {
                    let x = random.vector(n_embd);
                    let expected = Reference::new(&made_up).ffn(index, &widened(&x));
                    let check = |found: &[f32], expected: &[f64]| match activations {
                        Activations::F32 => {
                            assert_close(found, expected, OPERATION, largest(expected), made_up.shape.what)
                        }
                        Activations::Q8_1 => {
                            let error = nmse(found, expected);
                            assert!(error < Q8_1_OPERATION, "{}: NMSE {error:e}", made_up.shape.what);
                        }
                    };
                    check(&model.ffn_from_slice(index, &x).unwrap(), &expected);

                    // On device buffers the network adds to what is there.
                    let input = device.alloc_from(&x).unwrap();
                    let before = random.vector(n_embd);
                    let mut output = device.alloc_from(&before).unwrap();
                    let weights = model.weights().layer(index).unwrap();
                    let operand = operand(device, &input, activations);
                    let taken = ffn_input(activations, &input, &operand);
                    ffn(device, weights, taken, &mut output, &mut buffers).unwrap();
                    let added: Vec<f64> = expected.iter().zip(widened(&before)).map(|(a, b)| a + b).collect();
                    check(&device.to_vec(&output).unwrap(), &added);
                    assert_eq!(device.to_vec(&input).unwrap(), x);
                }
            }
        }
    }
}

#[test]
fn ffn_names_what_does_not_fit() {
    let made_up = MadeUp::new(&LLAMA);
    for device in devices() {
        let model = load(device, &made_up, Activations::F32);
        let message = |result: anyhow::Result<Vec<f32>>| format!("{:#}", result.unwrap_err());
        let line = message(model.ffn_from_slice(0, &[0.0; 95]));
        assert_eq!(line, "the hidden state has 95 values, not 96");
        let line = message(model.ffn_from_slice(3, &[0.0; 96]));
        assert_eq!(line, "the model has 3 layers, there is no layer 3");

        let weights = model.weights().layer(0).unwrap();
        let zeros = |len| device.alloc_from(&vec![0.0f32; len]).unwrap();
        for (activations, n_x, n_y, n_ff, expected) in [
            (Activations::F32, 95, 96, 160, "the matrix is 320 x 96, the vector has 95 values"),
            (Activations::Q8_1, 95, 96, 160, "the matrix is 320 x 96, the vector has 95 values"),
            (Activations::F32, 96, 95, 160, "buffer y has 95 values, 96 are needed"),
            (Activations::Q8_1, 96, 96, 128, "buffer y has 128 values, 160 are needed"),
        ] {
            let mut buffers = FfnBuffers::alloc(device, n_ff, activations).unwrap();
            let x = zeros(n_x);
            let operand = operand(device, &x, activations);
            let x = ffn_input(activations, &x, &operand);
            let error = ffn(device, weights, x, &mut zeros(n_y), &mut buffers);
            let line = format!("{:#}", error.unwrap_err());
            assert!(line.contains(expected), "{line}");
        }
    }
}

#[test]
fn a_layer_on_device_buffers_matches_f64() {
    for made_up in [&LLAMA, &QWEN2, &MIXED].map(MadeUp::new) {
        let shape = made_up.shape;
        for device in devices() {
            let model = load(device, &made_up, Activations::F32);
            let index = shape.n_layer - 1;
            let weights = model.weights().layer(index).unwrap();
            let mut buffers = Buffers::alloc(device, model.config(), model.settings()).unwrap();
            let mut cache =
                KvCache::alloc(device, KvFormat::F16, shape.n_head_kv, 4, shape.head_dim).unwrap();
            let mut run = |x: &[f32], position, probe| {
                device.upload(&mut buffers.steps, &[Step { token: 0, position }]).unwrap();
                // Leaves the angles of the position, and an embedding that is not wanted here.
                let Buffers { steps, rotation, x: hidden, .. } = &mut buffers;
                let (token_embd, rope) = (&model.weights().token_embd, &model.settings().rope);
                ops::embed(device, token_embd, steps, 1, rope, hidden, rotation, None, false).unwrap();
                device.upload(&mut buffers.x, x).unwrap();
                let (norm, next_norm) = (&weights.attn_norm, &model.weights().output_norm);
                let next = Next { operand: &mut buffers.x_operand, gamma: Some(norm) };
                ops::make_operand(device, &buffers.x, next).unwrap();
                let (settings, tokens) = (model.settings(), Tokens::One);
                layer(device, weights, next_norm, settings, &mut cache, &mut buffers, tokens, index, probe)?;
                Ok::<_, Halt>(device.to_vec(&buffers.x).unwrap())
            };
            let mut reference = Reference::new(&made_up);
            let mut random = Random::new(2);
            for position in 0..4 {
                let x = random.vector(shape.n_embd);
                let mut attention = Vec::new();
                let expected = reference.layer(index, widened(&x), &mut |op, _, values| {
                    if op == Op::Attention {
                        attention.clone_from(&values);
                    }
                    values
                });
                match run(&x, position, Probe::StopAt(Point { op: Op::Attention, layer: index })) {
                    Err(Halt::At(found)) => {
                        assert_close(&found, &attention, RUN, largest(&attention), shape.what);
                    }
                    other => panic!("the probe did not stop the layer: {other:?}"),
                }
                let found = run(&x, position, Probe::Nothing).unwrap();
                assert_close(&found, &expected, RUN, largest(&expected), shape.what);
            }
        }
    }
}

/// What the reference has no point for: quantization, the cache, gate and up.
#[test]
fn a_run_stops_between_what_the_reference_has() {
    let made_up = MadeUp::new(&QWEN2);
    let shape = made_up.shape;
    for device in devices() {
        let model = load_fused(device, &made_up, Activations::Q8_1, Fusion::Unfused);
        let mut session = model.session().unwrap();
        session.feed(&PROMPT).unwrap();
        let mut at = |op, layer| session.run_until(5, Point { op, layer }).unwrap();
        for (op, layer, quantized) in [
            (Op::AttnNorm, 1, Op::AttnNormQ8),
            (Op::Attention, 1, Op::AttentionQ8),
            (Op::FfnNorm, 1, Op::FfnNormQ8),
            (Op::FfnSwiglu, 1, Op::FfnSwigluQ8),
            (Op::OutputNorm, 0, Op::OutputNormQ8),
        ] {
            let (exact, found) = (at(op, layer), at(quantized, layer));
            assert_eq!(exact.len(), found.len(), "{quantized:?}");
            for (block, found) in exact.chunks(32).zip(found.chunks(32)) {
                let half_step = largest(&widened(block)) / 127.0 * 0.5001;
                let block: Vec<f64> = widened(block);
                assert_close(found, &block, half_step, 1.0, &format!("{quantized:?}"));
            }
        }

        let (gate_up, hidden) = (at(Op::FfnGateUp, 1), widened(&at(Op::FfnSwiglu, 1)));
        let (gate, up) = gate_up.split_at(shape.n_ff);
        let product = |(&gate, &up): (&f32, &f32)| gate / (1.0 + (-gate).exp()) * up;
        let expected: Vec<f32> = gate.iter().zip(up).map(product).collect();
        assert_close(&expected, &hidden, OPERATION, largest(&hidden), "gate and up");

        let (cache, k, v) = (at(Op::KvAppend, 1), at(Op::KRope, 1), at(Op::V, 1));
        let (keys, values) = cache.split_at(cache.len() / 2);
        for (cached, new) in [(keys, k), (values, v)] {
            for (head, new) in new.chunks(shape.head_dim).enumerate() {
                let start = (head * model.n_ctx() + PROMPT.len()) * shape.head_dim;
                let rounded: Vec<f32> = new.iter().map(|&v| half::f16::from_f32(v).to_f32()).collect();
                assert_eq!(cached[start..][..shape.head_dim], rounded);
            }
        }
    }
}

#[test]
fn a_truncated_session_goes_on_as_if_it_had_never_been_longer() {
    for made_up in [&MIXED, &QWEN2].map(MadeUp::new) {
        for device in devices() {
            for activations in [Activations::F32, Activations::Q8_1] {
                let model = load(device, &made_up, activations);
                let mut session = model.session().unwrap();
                session.feed(&PROMPT[..2]).unwrap();
                session.feed(&PROMPT[2..]).unwrap();
                session.truncate(2);
                assert_eq!(session.position(), 2);
                session.feed(&[5, 1]).unwrap();

                let mut fresh = model.session().unwrap();
                fresh.feed(&PROMPT[..2]).unwrap();
                fresh.feed(&[5, 1]).unwrap();
                assert_eq!(logits(&mut session), logits(&mut fresh), "{}", made_up.shape.what);

                // To nothing, and to more than there is.
                session.truncate(0);
                session.feed(&PROMPT).unwrap();
                session.truncate(100);
                assert_eq!(session.position(), PROMPT.len());
                let mut fresh = model.session().unwrap();
                fresh.feed(&PROMPT).unwrap();
                assert_eq!(logits(&mut session), logits(&mut fresh), "{}", made_up.shape.what);
            }
        }
    }
}

/// Twelve tokens: at once, in pieces of several sizes, some of them too small to go through at once, and one by one.
#[test]
fn a_prompt_gives_the_same_logits_at_once_and_token_by_token() {
    let prompt = [PROMPT, PROMPT].concat();
    for made_up in SHAPES.map(MadeUp::new) {
        for device in devices() {
            for activations in [Activations::F32, Activations::Q8_1] {
                let run = |n_batch: usize, look: bool| {
                    let options =
                        ModelOptions { activations, n_batch: Some(n_batch), ..ModelOptions::default() };
                    let model = load_with(device, &made_up.gguf, &options).unwrap();
                    let mut session = model.session().unwrap();
                    let mut all = Vec::new();
                    for chunk in prompt.chunks(n_batch) {
                        if look {
                            // A look at an operation leaves no trace, also where other tokens would follow.
                            session.run_until(1, Point { op: Op::FfnOutput, layer: 0 }).unwrap();
                        }
                        let before = session.position();
                        let keep = |i: usize, logits: &[f32]| {
                            assert_eq!(before + i, all.len() / made_up.shape.n_vocab);
                            all.extend_from_slice(logits);
                            Ok(())
                        };
                        session.feed_watched(chunk, keep).unwrap();
                        assert_eq!(session.position(), before + chunk.len());
                    }
                    // The last one's logits are those that a session keeps.
                    let mut fed = model.session().unwrap();
                    fed.feed(&prompt).unwrap();
                    (all, logits(&mut fed))
                };
                let (one_by_one, last_one) = run(1, true);
                for n_batch in [2, 3, 4, 5, 7, 12, 64] {
                    let what = format!("{}, {n_batch} at a time, {}", made_up.shape.what, device.describe());
                    let (found, last) = run(n_batch, false);
                    let n_vocab = made_up.shape.n_vocab;
                    for (found, wanted) in [
                        (&found, &one_by_one),
                        (&last, &last_one),
                        (&last, &found[found.len() - n_vocab..].to_vec()),
                    ] {
                        let wanted = widened(wanted);
                        match activations {
                            Activations::F32 => assert_close(found, &wanted, RUN, largest(&wanted), &what),
                            Activations::Q8_1 => {
                                let error = nmse(found, &wanted);
                                assert!(error <= Q8_1_RUN, "{what}: NMSE {error:e}");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// So many tokens that blocks share a context, a step is recorded for each number of them, and the last one shares it otherwise.
#[test]
fn a_long_context_gives_the_same_logits_at_once_and_token_by_token() {
    let prompt: Vec<u32> = (0..300).map(|i| PROMPT[i * i % PROMPT.len()]).collect();
    for made_up in [&QWEN2, &MIXED].map(MadeUp::new) {
        for device in devices() {
            for activations in [Activations::F32, Activations::Q8_1] {
                let run = |n_batch| {
                    let options = ModelOptions {
                        activations,
                        n_batch: Some(n_batch),
                        n_ctx: Some(prompt.len()),
                        ..ModelOptions::default()
                    };
                    let model = load_with(device, &made_up.gguf, &options).unwrap();
                    let mut session = model.session().unwrap();
                    [130, 260, 300].map(|end| {
                        session.feed(&prompt[session.position()..end]).unwrap();
                        logits(&mut session)
                    })
                };
                for (found, wanted) in run(1).iter().zip(run(64)) {
                    let what = format!("{}, {}", made_up.shape.what, device.describe());
                    let wanted = widened(&wanted);
                    match activations {
                        Activations::F32 => assert_close(found, &wanted, RUN, largest(&wanted), &what),
                        Activations::Q8_1 => {
                            let error = nmse(found, &wanted);
                            assert!(error <= Q8_1_RUN, "{what}: NMSE {error:e}");
                        }
                    }
                }
            }
        }
    }
}

/// A cache in Q8_0 costs some precision, whichever way tokens go in.
#[test]
fn a_cache_in_q8_0_gives_nearly_the_same_logits() {
    let prompt = [PROMPT, PROMPT].concat();
    for made_up in [&LLAMA, &QWEN2, &MIXED].map(MadeUp::new) {
        for device in devices() {
            let run = |kv_format, n_batch, fusion| {
                let activations = Activations::F32;
                let options = ModelOptions {
                    activations,
                    kv_format,
                    n_batch: Some(n_batch),
                    fusion,
                    ..Default::default()
                };
                let model = load_with(device, &made_up.gguf, &options).unwrap();
                let mut session = model.session().unwrap();
                session.feed(&prompt).unwrap();
                let bytes = model.kv_bytes_per_token(1);
                (logits(&mut session), bytes)
            };
            let (exact, exact_bytes) = run(KvFormat::F16, 1, Fusion::Fused);
            for (n_batch, fusion) in
                [(1, Fusion::Fused), (1, Fusion::Unfused), (5, Fusion::Fused), (64, Fusion::Fused)]
            {
                let (found, bytes) = run(KvFormat::Q8_0, n_batch, fusion);
                assert_eq!(bytes * 32, exact_bytes * 17);
                let error = nmse(&found, &widened(&exact));
                let what = format!("{}, {n_batch} at a time, {fusion:?}", made_up.shape.what);
                assert!(error > 0.0 && error <= 1e-3, "{what}: NMSE {error:e}");
            }
        }
    }
}

#[test]
fn greedy_is_the_argmax_of_the_logits() {
    for made_up in SHAPES.map(MadeUp::new) {
        for device in devices() {
            let model = load(device, &made_up, Activations::default());
            let mut session = model.session().unwrap();
            for token in PROMPT {
                session.feed(&[token]).unwrap();
                let greedy = session.greedy().unwrap();
                let logits = logits(&mut session);
                assert_eq!(logits.len(), made_up.shape.n_vocab);
                let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let argmax = logits.iter().position(|&logit| logit == best).unwrap();
                assert_eq!(greedy as usize, argmax, "{}", made_up.shape.what);
            }
        }
    }
}

#[test]
fn logits_are_only_there_after_a_token_was_fed() {
    #[track_caller]
    fn check_absent(session: &mut Session) {
        for error in [session.logits(&mut Vec::new()).err(), session.greedy().err()] {
            assert_eq!(error.unwrap().to_string(), "there are no logits: no token was fed");
        }
    }
    let made_up = MadeUp::new(&LLAMA);
    for device in devices() {
        let model = load(device, &made_up, Activations::F32);
        let mut session = model.session().unwrap();
        check_absent(&mut session);
        session.feed(&[]).unwrap();
        check_absent(&mut session);
        session.feed(&PROMPT).unwrap();
        let before = logits(&mut session);
        session.feed(&[]).unwrap();
        session.truncate(PROMPT.len());
        assert_eq!(logits(&mut session), before);
        session.truncate(PROMPT.len() - 1);
        check_absent(&mut session);
        session.feed(&[1]).unwrap();
        session.run_until(1, Point { op: Op::Logits, layer: 0 }).unwrap();
        check_absent(&mut session);
    }
}

#[test]
fn a_session_refuses_what_does_not_fit_and_stays_as_it_was() {
    let made_up = MadeUp::new(&LLAMA);
    let options = ModelOptions { n_ctx: Some(8), ..ModelOptions::default() };
    for device in devices() {
        let model = load_with(device, &made_up.gguf, &options).unwrap();
        assert_eq!(model.n_ctx(), 8);
        let mut session = model.session().unwrap();
        session.feed(&PROMPT).unwrap();
        let before = logits(&mut session);
        for (tokens, expected) in [
            (&[1, 37][..], "token 37 is not in the vocabulary of 37 tokens"),
            (&[u32::MAX], "token 4294967295 is not in the vocabulary of 37 tokens"),
            (&[1, 2, 3], "3 tokens do not fit: the context has room for 8, 6 are in it"),
        ] {
            assert_eq!(session.feed(tokens).unwrap_err().to_string(), expected);
            assert_eq!(session.check(tokens).unwrap_err().to_string(), expected);
            assert_eq!(session.position(), PROMPT.len());
            assert_eq!(logits(&mut session), before);
        }
        let mut run_until = |token, op, layer| {
            let line = session.run_until(token, Point { op, layer }).unwrap_err().to_string();
            assert_eq!(session.position(), PROMPT.len());
            line
        };
        assert_eq!(run_until(1, Op::Q, 3), "the model has 3 layers, there is no layer 3");
        assert_eq!(run_until(37, Op::Q, 0), "token 37 is not in the vocabulary of 37 tokens");
        let line = run_until(1, Op::Embed, 1);
        assert!(line.contains("operations outside the layers count as layer 0"), "{line}");

        // The last places are usable.
        session.feed(&[1, 2]).unwrap();
        let line = session.run_until(1, Point { op: Op::Q, layer: 0 }).unwrap_err().to_string();
        assert_eq!(line, "1 tokens do not fit: the context has room for 8, 8 are in it");
    }
}

#[test]
fn a_context_that_does_not_fit_the_model_is_refused() {
    let made_up = MadeUp::new(&LLAMA);
    let with = |n_ctx| ModelOptions { n_ctx, ..ModelOptions::default() };
    for device in devices() {
        let line = refusal(device, &made_up.gguf, &with(Some(0)));
        assert!(line.contains("a context of 0 tokens"), "{line}");
        let line = refusal(device, &made_up.gguf, &with(Some(513)));
        let expected = "(memory): a context of 513 tokens is wanted, the model was trained for 512";
        assert_eq!(line, expected);
        for n_ctx in [Some(512), None] {
            assert_eq!(load_with(device, &made_up.gguf, &with(n_ctx)).unwrap().n_ctx(), 512);
        }
    }
}

#[test]
fn loading_names_the_file_and_the_tensor() {
    let up = "blk.1.ffn_up.weight";
    let [mut missing, mut misshapen, mut unsupported] = [(); 3].map(|()| TinyModel::llama());
    missing.unset_tensor(up);
    misshapen.set_tensor(up, &[N_EMBD, N_FF + 32], GgmlType::Q8_0);
    unsupported.set_tensor(up, &[N_EMBD, N_FF], GgmlType::Q5_0);
    let folder = tempfile::tempdir().unwrap();
    for (name, model, expected) in [
        ("missing.gguf", missing, "is missing: needed one of shape [64, 96]"),
        ("misshapen.gguf", misshapen, "needed the shape [64, 96], found [64, 128]"),
        ("unsupported.gguf", unsupported, "needed the type F32, F16, Q8_0, Q4_1, Q4_K, Q6_K, found Q5_0"),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, model.to_bytes()).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        for device in devices() {
            let line = refusal(device, &gguf, &ModelOptions::default());
            assert!(line.starts_with(&format!("{}: tensor \"{up}\"", path.display())), "{line}");
            assert!(line.contains(expected), "{line}");
        }
    }
}

#[test]
fn loading_reports_every_byte_and_a_token_reads_most_of_them() {
    for made_up in [&LLAMA, &MIXED, &K_QUANTS].map(MadeUp::new) {
        let size = |name: &str| made_up.gguf.tensor_info(name).map_or(0, |info| info.n_bytes as u64);
        let all: u64 = made_up.gguf.tensors().map(|tensor| tensor.info.n_bytes as u64).sum();
        for device in devices() {
            let mut calls = Vec::new();
            let options = ModelOptions::default();
            let mut progress = |done, total| calls.push((done, total));
            let model = Model::load(device.clone(), &made_up.gguf, &options, &mut progress).unwrap();
            assert!(calls.is_sorted_by(|a, b| a.0 < b.0 && a.1 == b.1), "{calls:?}");
            let &(done, total) = calls.last().unwrap();
            assert_eq!(done, total, "{}", made_up.shape.what);

            // One row of the embeddings, and all of them where they also make the logits.
            let embeddings = size("token_embd.weight");
            let unread = if made_up.shape.tied { 0 } else { embeddings };
            let read = all - size("rope_freqs.weight") - unread + embeddings / made_up.shape.n_vocab as u64;
            assert_eq!(model.weight_bytes_per_token(), read, "{}", made_up.shape.what);
        }
    }
}
