//! Warpline's integration tests: one program, one module per subject.
//!
//! Where does a new test go? Into the module below that is named after what it tests; a new subject is a new file
//! next to this one and a `mod` line here, in alphabetical order. A test of something private stays in its own
//! source file, under `#[cfg(test)]`. Tests build the files they need (`tiny_model`), so that they run anywhere.

mod cli;
mod config;
mod device;
mod gguf;
mod golden;
mod inspect;
mod kernels;
mod model;
mod model_files;
mod profile;
mod ptx;
mod tiny_model;
mod tiny_vocabulary;
mod tokenizer;
