//! Warpline runs GGUF language models with GPU kernels written in Rust.

pub mod chat;
pub mod config;
pub mod device;
pub mod eval;
pub mod gguf;
pub mod inspect;
pub mod model;
pub mod ops;
pub mod sampling;
pub mod tokenizer;
