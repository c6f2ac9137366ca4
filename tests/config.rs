//! Model dimensions: what is read from metadata, and what is refused.

use host::config::{Architecture, Config, RopeConfig, RopeLayout, RopeScaling, Yarn};
use host::gguf::GgmlType;

use crate::tiny_model::{HEAD_DIM, N_EMBD, N_VOCAB, TinyModel};

fn read(model: &TinyModel) -> anyhow::Result<Config> {
    let gguf = model.to_gguf();
    let config = Config::from_gguf(&gguf)?;
    config.check_tensors(&gguf)?;
    Ok(config)
}

/// The one line a user sees.
#[track_caller]
fn refusal(model: &TinyModel) -> String {
    let line = format!("{:#}", read(model).expect_err("the model is broken"));
    assert!(!line.contains('\n'), "{line}");
    assert!(line.starts_with("(memory): "), "{line}");
    line
}

#[test]
fn llama_reads_dimensions_and_defaults() {
    let config = read(&TinyModel::llama()).unwrap();
    let expected = Config {
        architecture: Architecture::Llama,
        name: None,
        n_vocab: 16,
        n_embd: 64,
        n_ff: 96,
        n_layer: 2,
        n_head: 2,
        n_head_kv: 1,
        head_dim: 32,
        n_ctx_train: 128,
        rms_eps: 1e-5,
        rope: RopeConfig {
            base: 10_000.0,
            n_rot: 32,
            layout: RopeLayout::Interleaved,
            scaling: RopeScaling::None,
        },
    };
    assert_eq!(config, expected);
}

#[test]
fn qwen2_rotates_half_split_and_takes_biases() {
    let mut model = TinyModel::qwen2();
    model.set("qwen2.rope.freq_base", 1e6f32).set("general.name", "tiny");
    let config = read(&model).unwrap();
    assert_eq!(config.architecture, Architecture::Qwen2);
    assert_eq!(config.name.as_deref(), Some("tiny"));
    assert_eq!((config.rope.base, config.rope.layout), (1e6, RopeLayout::HalfSplit));
}

#[test]
fn optional_keys_and_tensors_are_used() {
    let mut model = TinyModel::llama();
    model
        .set("llama.vocab_size", N_VOCAB as u64) // another width
        .set("tokenizer.ggml.tokens", vec![String::from("x"); N_VOCAB])
        .set("llama.attention.key_length", HEAD_DIM as u32)
        .set("llama.attention.value_length", HEAD_DIM as u32)
        .set("llama.rope.dimension_count", 16u32)
        .set("llama.rope.scaling.type", "linear")
        .set("llama.rope.scaling.factor", 4f32)
        .set_tensor("rope_freqs.weight", &[8], GgmlType::F32)
        .set_tensor("output.weight", &[N_EMBD, N_VOCAB], GgmlType::Q8_0);
    let config = read(&model).unwrap();
    assert_eq!((config.rope.n_rot, config.rope.scaling), (16, RopeScaling::Linear(4.0)));
}

#[test]
fn kv_heads_default_to_heads() {
    let mut model = TinyModel::llama();
    model.unset("llama.attention.head_count_kv");
    for layer in 0..2 {
        for name in ["k", "v"] {
            model.set_tensor(&format!("blk.{layer}.attn_{name}.weight"), &[64, 64], GgmlType::F32);
        }
    }
    assert_eq!(read(&model).unwrap().n_head_kv, 2);
}

#[test]
fn rope_frequencies_match_the_formula() {
    let mut rope =
        RopeConfig { base: 10_000.0, n_rot: 4, layout: RopeLayout::HalfSplit, scaling: RopeScaling::None };
    assert_eq!(rope.frequencies(None), [1.0, 0.01]);
    assert_eq!(rope.frequencies(Some(&[1.0, 8.0])), [1.0, 0.00125]);
    rope.scaling = RopeScaling::Linear(2.0);
    assert_eq!(rope.frequencies(None), [0.5, 0.005]);
}

#[test]
fn yarn_matches_its_reference() {
    // What the paper's own code (find_correction_range, linear_ramp_mask) gives for Qwen2.5's heads and factor, in Python.
    let yarn = Yarn {
        factor: 4.0,
        original_context: 32_768,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: 1.0,
    };
    let scaling = RopeScaling::Yarn(yarn);
    let mut rope = RopeConfig { base: 1e6, n_rot: 128, layout: RopeLayout::HalfSplit, scaling };
    let frequencies = rope.frequencies(None);
    for (pair, expected) in [
        (0, 1.0),
        (23, 0.006978305848598663),
        (24, 0.005375321490790102),
        (30, 0.0010643609812470017),
        (39, 6.490394320837028e-05),
        (40, 4.445698525097307e-05),
        (63, 3.102344401879299e-07),
    ] {
        let error = (frequencies[pair] / expected - 1.0).abs();
        assert!(error < 1e-12, "pair {pair}: {} is not {expected}", frequencies[pair]);
    }
    assert!((f64::from(rope.magnitude()) - 1.138629436111989).abs() < 1e-6);
    rope.scaling = RopeScaling::Linear(4.0);
    assert_eq!(rope.magnitude(), 1.0);

    let mut model = TinyModel::llama();
    model.set("llama.rope.scaling.type", "yarn").set("llama.rope.scaling.factor", 4f32);
    let n_ctx_train = read(&model).unwrap().n_ctx_train;
    let defaults = Yarn { original_context: n_ctx_train, ..yarn };
    assert_eq!(read(&model).unwrap().rope.scaling, RopeScaling::Yarn(defaults));
    model
        .set("llama.rope.scaling.original_context_length", 100u32)
        .set("llama.rope.scaling.yarn_beta_fast", 16f32)
        .set("llama.rope.scaling.yarn_beta_slow", 2f32)
        .set("llama.rope.scaling.attn_factor", 0.5f32);
    let given =
        Yarn { original_context: 100, beta_fast: 16.0, beta_slow: 2.0, attention_factor: 0.5, ..yarn };
    assert_eq!(read(&model).unwrap().rope.scaling, RopeScaling::Yarn(given));
}

#[test]
fn no_scaling_is_spelt_in_many_ways() {
    for factor in [0f32, 1.0] {
        let mut model = TinyModel::llama();
        model.set("llama.rope.scaling.factor", factor);
        assert_eq!(read(&model).unwrap().rope.scaling, RopeScaling::None);
    }
    let mut model = TinyModel::llama();
    model.set("llama.rope.scaling.type", "none").set("llama.rope.scaling.factor", 4f32);
    assert_eq!(read(&model).unwrap().rope.scaling, RopeScaling::None);
    let mut model = TinyModel::llama();
    model.set("llama.rope.scale_linear", 8f32); // the older key
    assert_eq!(read(&model).unwrap().rope.scaling, RopeScaling::Linear(8.0));
}

#[test]
fn every_required_key_is_named_when_missing() {
    for key in [
        "general.architecture",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let mut model = TinyModel::llama();
        let line = refusal(model.unset(key));
        assert!(line.contains(&format!("key \"{key}\" is missing: needed ")), "{line}");
    }
}

#[test]
fn every_dimension_is_refused_when_zero_or_of_another_type() {
    for key in [
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.context_length",
        "llama.rope.dimension_count",
    ] {
        let mut model = TinyModel::llama();
        let line = refusal(model.set(key, 0u32));
        assert!(line.contains(&format!("key \"{key}\": needed a number from 1 up, found 0")), "{line}");
        let line = refusal(model.set(key, -1i64));
        assert!(line.contains(&format!("key \"{key}\": needed u32, found i64 -1")), "{line}");
        let line = refusal(model.set(key, u64::MAX));
        assert!(line.contains(&format!("key \"{key}\": needed u32, found u64 {}", u64::MAX)), "{line}");
        let line = refusal(model.set(key, "many"));
        assert!(line.contains(&format!("key \"{key}\": needed u32, found string \"many\"")), "{line}");
    }
}

#[test]
fn values_that_do_not_fit_are_refused() {
    /// A model, changed at one key, and what the error must say after that key.
    #[track_caller]
    fn check(key: &str, value: impl Into<host::gguf::Value>, message: &str) {
        let mut model = TinyModel::llama();
        let line = refusal(model.set(key, value));
        assert!(line.contains(&format!("key \"{key}\": {message}")), "{line}");
    }
    check("general.architecture", "gpt2", "needed one of llama, qwen2, found \"gpt2\"");
    check("llama.expert_count", 8u32, "needed a dense model (0 experts), found 8");
    check("llama.attention.head_count", 3u32, "needed a divisor of the embedding length 64, found 3");
    check(
        "llama.attention.head_count",
        8u32,
        "needed a head length that is a multiple of 16, at most 256, found 8",
    );
    check("llama.attention.head_count_kv", 4u32, "needed a divisor of the 2 query heads, found 4");
    check(
        "llama.attention.key_length",
        288u32,
        "needed a head length that is a multiple of 16, at most 256, found 288",
    );
    check("llama.attention.key_length", 0u32, "needed a head length");
    check("llama.attention.value_length", 64u32, "needed the length of a key, 32, found 64");
    check("llama.attention.layer_norm_rms_epsilon", 0f32, "needed a positive number, found 0");
    check("llama.attention.layer_norm_rms_epsilon", f32::NAN, "needed a positive number, found NaN");
    check("llama.rope.freq_base", -1f32, "needed a positive number, found -1");
    check("llama.rope.freq_base", 1e300f64, "needed f32, found f64 1");
    check(
        "llama.rope.dimension_count",
        31u32,
        "needed an even number of at most 32, the head length, found 31",
    );
    check(
        "llama.rope.dimension_count",
        34u32,
        "needed an even number of at most 32, the head length, found 34",
    );
    check("llama.rope.scaling.type", "longrope", "needed none, linear or yarn, found longrope");
    check("llama.rope.scaling.factor", f32::INFINITY, "needed a number that is not negative, found inf");
    check("llama.vocab_size", 17u32, "needed 16, the rows of token_embd.weight, found 17");
    check(
        "tokenizer.ggml.tokens",
        vec![String::from("x"); 15],
        "needed 16 tokens, one for each row of token_embd.weight, found 15",
    );
    // Far more layers than tensors: refused at the first that is missing.
    let mut model = TinyModel::llama();
    let line = refusal(model.set("llama.block_count", u32::MAX));
    assert!(line.contains("tensor \"blk.2.attn_norm.weight\" is missing"), "{line}");
}

#[test]
fn every_required_tensor_is_named_when_missing() {
    let complete = TinyModel::llama().to_gguf();
    for tensor in complete.tensors() {
        let name = &tensor.info.name;
        let mut model = TinyModel::llama();
        let line = refusal(model.unset_tensor(name));
        assert!(line.contains(&format!("tensor \"{name}\" is missing")), "{line}");
    }
}

#[test]
fn every_tensor_is_refused_in_another_shape() {
    let complete = TinyModel::qwen2().to_gguf();
    for tensor in complete.tensors() {
        let info = tensor.info;
        if info.name == "token_embd.weight" {
            continue; // decides the vocabulary's size; the next test covers it
        }
        let mut shape = info.shape.clone();
        *shape.last_mut().unwrap() += 32;
        let mut model = TinyModel::qwen2();
        let line = refusal(model.set_tensor(&info.name, &shape, info.ggml_type));
        let message = format!("tensor \"{}\": needed the shape {:?}, found {shape:?}", info.name, info.shape);
        assert!(line.contains(&message), "{line}");
    }
}

#[test]
fn embeddings_must_fit_vocabulary_and_embedding_length() {
    let mut model = TinyModel::llama();
    model.set("llama.vocab_size", N_VOCAB as u32);
    let line = refusal(model.set_tensor("token_embd.weight", &[N_EMBD, 17], GgmlType::F32));
    assert!(line.contains("key \"llama.vocab_size\": needed 17"), "{line}");
    let line = refusal(model.set_tensor("token_embd.weight", &[N_EMBD + 1, 16], GgmlType::F32));
    assert!(line.contains("\"token_embd.weight\": needed the shape [64, 16], found [65, 16]"), "{line}");
}

#[test]
fn formats_that_cannot_run_are_refused() {
    let mut model = TinyModel::llama();
    let line = refusal(model.set_tensor("blk.1.ffn_up.weight", &[64, 96], GgmlType::Q4_0));
    let message =
        "tensor \"blk.1.ffn_up.weight\": needed the type F32, F16, Q8_0, Q4_1, Q4_K, Q6_K, found Q4_0";
    assert!(line.contains(message), "{line}");
    let mut model = TinyModel::llama();
    let line = refusal(model.set_tensor("blk.0.ffn_norm.weight", &[64], GgmlType::F16));
    assert!(line.contains("tensor \"blk.0.ffn_norm.weight\": needed the type F32, found F16"), "{line}");
    let mut model = TinyModel::llama();
    model.set_tensor("blk.1.ffn_up.weight", &[64, 96], GgmlType::Q4_1);
    read(&model).unwrap();
}

#[test]
fn biases_come_all_three_or_not_at_all() {
    let mut model = TinyModel::qwen2();
    let line = refusal(model.unset_tensor("blk.1.attn_k.bias"));
    let message = "tensor \"blk.1.attn_k.bias\" is missing: needed together with \"blk.1.attn_q.bias\"";
    assert!(line.contains(message), "{line}");
    for layer in 0..2 {
        for name in ["q", "k", "v"] {
            model.unset_tensor(&format!("blk.{layer}.attn_{name}.bias"));
        }
    }
    read(&model).unwrap();
}

#[test]
fn tensors_that_would_be_ignored_are_refused() {
    for name in ["blk.0.attn_output.bias", "blk.2.attn_q.weight", "blk.00.attn_q.weight", "extra"] {
        let mut model = TinyModel::llama();
        let line = refusal(model.set_tensor(name, &[64], GgmlType::F32));
        assert!(line.contains(&format!("tensor \"{name}\": needed only tensors of a llama model")), "{line}");
    }
}
