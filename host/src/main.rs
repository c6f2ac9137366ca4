//! Warpline's command line.

fn main() {}
