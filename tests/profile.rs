//! What operations cost, and that a profile accounts for the whole step.

use crate::kernels::devices;
use crate::model::made_up::{MadeUp, SHAPES};
use crate::tiny_model::TinyModel;
use host::device::{Device, DeviceChoice};
use host::gguf::Gguf;
use host::model::{Activations, Fusion, Model, ModelOptions, Op, Point};
use host::profile::{Cost, Level, Profile, ProfileOptions, STEPS, cost, measure};

fn load(device: &Device, gguf: &Gguf, activations: Activations, fusion: Fusion) -> Model {
    let options = ModelOptions { activations, fusion, ..ModelOptions::default() };
    Model::load(device.clone(), gguf, &options, &mut |_, _| {}).unwrap()
}

/// Two layers of 64 values, 2 query heads of 32 and 1 key-value head, 96 inside, 16 tokens, all in F32.
#[test]
fn costs_match_counts_by_hand() {
    let device = Device::open(DeviceChoice::Cpu).unwrap();
    let gguf = TinyModel::qwen2().to_gguf();
    let costs = |activations, fusion| {
        let model = load(&device, &gguf, activations, fusion);
        move |op| cost(&model, Point { op, layer: 0 }, 5).unwrap()
    };
    let fused = costs(Activations::Q8_1, Fusion::Fused);
    let unfused = costs(Activations::Q8_1, Fusion::Unfused);
    let exact = costs(Activations::F32, Fusion::Unfused);
    let check = |found: Cost, weight_bytes, other_bytes, flops| {
        assert_eq!(found, Cost { weight_bytes, other_bytes, flops });
    };

    // A norm, 64 + 32 + 32 rows of 64 with a bias; in: 64 values and 16 angles, out: 64 queries, 2 x 32 values of cache.
    check(fused(Op::QRope), 256 + 128 * (256 + 4), 256 + 128 + 256 + 128, 2 * 128 * 64);
    // Keys and values of 5 positions; 64 queries, 64 results.
    let attention = |found| check(found, 0, 5 * 2 * 32 * 2 + 2 * 256, 4 * 5 * 32 * 2);
    attention(fused(Op::Attention));
    attention(unfused(Op::Attention));
    // A norm, 192 rows of 64.
    check(fused(Op::FfnSwiglu), 256 + 192 * 256, 256 + 384, 2 * 192 * 64);
    // The hidden state is read, and written again.
    check(fused(Op::FfnOutput), 96 * 256, 384 + 2 * 256, 2 * 96 * 64);
    check(fused(Op::Logits), 256 + 16 * 256, 256 + 64, 2 * 16 * 64);
    // A row; 64 values, 16 frequencies of 8 bytes, 16 angles of 8 bytes.
    check(fused(Op::Embed), 256, 256 + 128 + 128, 0);
    check(fused(Op::Choice), 0, 64, 0);
    // All layers are what their operations are.
    let n_layer = load(&device, &gguf, Activations::Q8_1, Fusion::Fused).config().n_layer as u64;
    let of_layer = [Op::QRope, Op::Attention, Op::AttnOutput, Op::FfnSwiglu, Op::FfnOutput];
    let sum: Cost = of_layer.map(&fused).into_iter().sum();
    check(fused(Op::Layers), n_layer * sum.weight_bytes, n_layer * sum.other_bytes, n_layer * sum.flops);

    // Q8_1: a byte each and 8 more for 32 of them.
    check(unfused(Op::AttnNormQ8), 0, 256 + 64 + 16, 0);
    check(unfused(Op::FfnSwigluQ8), 0, 384 + 96 + 24, 0);
    check(unfused(Op::Q), 64 * (256 + 4), 64 + 16 + 256, 2 * 64 * 64);
    check(exact(Op::Q), 64 * (256 + 4), 256 + 256, 2 * 64 * 64);
    check(unfused(Op::K), 32 * (256 + 4), 64 + 16 + 128, 2 * 32 * 64);
    check(unfused(Op::AttnNorm), 256, 512, 0);
    check(unfused(Op::QRope), 0, 512 + 128, 0);
    check(unfused(Op::KvAppend), 0, 2 * 128 + 2 * 64, 0);
    check(unfused(Op::FfnGateUp), 192 * 256, 64 + 16 + 2 * 384, 2 * 192 * 64);
    check(unfused(Op::FfnSwiglu), 0, 3 * 384, 0);
    check(unfused(Op::Logits), 16 * 256, 64 + 16 + 64, 2 * 16 * 64);
}

fn profile(model: &mut Model, depth: usize) -> Profile {
    let fusions = &[Fusion::Unfused, Fusion::Fused];
    measure(model, &ProfileOptions { depth, repeat: 1, fusions }, &mut |_| {}).unwrap()
}

#[test]
fn every_path_reads_all_weights_once() {
    for device in devices() {
        // A GPU's stream of its own: what other tests issue on theirs is not to lie between this one's events.
        let choice = if device.is_cuda() { DeviceChoice::Cuda } else { DeviceChoice::Cpu };
        let device = &Device::open(choice).unwrap();
        for made_up in SHAPES.map(MadeUp::new) {
            for activations in [Activations::Q8_1, Activations::F32] {
                let mut model = load(device, &made_up.gguf, activations, Fusion::Fused);
                let profile = profile(&mut model, 3);
                let names: Vec<&str> = profile.paths.iter().map(|path| path.name).collect();
                if device.is_cuda() {
                    assert_eq!(names, ["unfused", "fused", "captured"]);
                } else {
                    assert_eq!(names, ["unfused", "fused"]);
                    assert!(profile.not_captured.is_some());
                }
                let n_layer = made_up.shape.n_layer;
                for path in &profile.paths {
                    let what = format!("{}, {}", made_up.shape.what, path.name);
                    assert_eq!(path.total.weight_bytes, model.weight_bytes_per_token(), "{what}");
                    assert_eq!(path.total.flops, profile.paths[0].total.flops, "{what}");
                    let outside =
                        ["embedding", "norm, logits", "logits", "output norm", "choice", "quantize output"];
                    for operation in &path.operations {
                        let is_outside = outside.iter().any(|name| operation.name.starts_with(name));
                        let calls = if is_outside { 1 } else { n_layer };
                        assert_eq!(operation.calls, calls, "{what}: {}", operation.name);
                    }
                    let attention: Vec<_> =
                        path.operations.iter().filter(|figures| figures.level == Some(Level::Midi)).collect();
                    // Three tokens in the cache, and the step's own.
                    let flops = 4 * 4 * n_layer * made_up.shape.n_head * made_up.shape.head_dim;
                    assert_eq!(
                        attention.iter().map(|figures| figures.flops).collect::<Vec<_>>(),
                        [flops as u64]
                    );
                    let times = (path.step_us, path.total.us);
                    assert!(times.0 > 0.0 && times.1 > 0.0, "{what}: {times:?}");
                    assert_eq!(path.total.us_in_step.is_some(), path.name == "captured", "{what}");
                }
            }
        }
    }
}

#[test]
fn a_profile_needs_room_behind_the_depth() {
    let device = Device::open(DeviceChoice::Cpu).unwrap();
    let options = ModelOptions { n_ctx: Some(16), ..ModelOptions::default() };
    let gguf = TinyModel::llama().to_gguf();
    let mut model = Model::load(device, &gguf, &options, &mut |_, _| {}).unwrap();
    let mut try_at = |depth| {
        let options = ProfileOptions { depth, repeat: 1, fusions: &[Fusion::Fused] };
        measure(&mut model, &options, &mut |_| {}).map(|profile| profile.depth)
    };
    assert_eq!(try_at(16 - STEPS).unwrap(), 16 - STEPS);
    let error = try_at(16 - STEPS + 1).unwrap_err().to_string();
    assert_eq!(error, "9 tokens and 8 steps behind them do not fit: the context has room for 16");
}
