//! The `bridge-agent` command.

fn main() {}
