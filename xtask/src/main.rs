//! Set up, build, run, test and measure bridge.

fn main() {}
