//! What changes from token to token, kept in device memory so that a decode step is a fixed list of launches.

use bytemuck::{Pod, Zeroable};

/// The token being processed and where it stands.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Step {
    /// The token's id.
    pub token: u32,
    /// Its position, counted from 0: as many tokens are in the KV cache before it.
    pub position: u32,
}
