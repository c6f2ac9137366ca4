//! Warpline runs GGUF language models with GPU kernels written in Rust.
//!
//! ```no_run
//! use host::device::{Device, DeviceChoice};
//! use host::gguf::Gguf;
//! use host::model::{Model, ModelOptions};
//! use host::tokenizer::Tokenizer;
//!
//! fn main() -> anyhow::Result<()> {
//!     let gguf = Gguf::open("model.gguf")?;
//!     let tokenizer = Tokenizer::from_gguf(&gguf)?;
//!     let device = Device::open(DeviceChoice::Auto)?;
//!     let model = Model::load(device, &gguf, &ModelOptions::default(), &mut |_done, _total| {})?;
//!
//!     let mut session = model.session()?;
//!     session.feed(&tokenizer.encode("The capital of France is")?)?;
//!     for _ in 0..16 {
//!         let token = session.greedy()?;
//!         if tokenizer.is_end(token) {
//!             break;
//!         }
//!         print!("{}", tokenizer.decode(&[token]));
//!         session.feed(&[token])?;
//!     }
//!     println!();
//!     Ok(())
//! }
//! ```

pub mod chat;
pub mod config;
pub mod device;
pub mod eval;
pub mod gguf;
pub mod inspect;
pub mod model;
pub mod ops;
pub mod profile;
pub mod sampling;
pub mod tokenizer;
