//! The eBPF objects that the agent carries inside it, as `cargo xtask build` made them.

/// Embeds an object, aligned for the ELF parser.
macro_rules! embed {
    ($name:literal) => {
        aya::include_bytes_aligned!(concat!(env!("BRIDGE_BPF_OBJECTS"), "/", $name))
    };
}

/// Judges packets between pods and LAN hosts.
pub static ENFORCE: &[u8] = embed!("enforce");

/// Gives connections a source port of the pool.
pub static POOL: &[u8] = embed!("pool");

/// Every object of the agent, with the name of the binary of `bridge-ebpf` that it was built from.
pub static ALL: &[(&str, &[u8])] = &[("enforce", ENFORCE), ("pool", POOL)];

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    /// Sends the packets of the benchmarks, which embed it themselves.
    const FOREIGN: &str = "generate";

    #[test]
    fn every_built_object_is_listed() {
        let built: BTreeSet<_> = fs::read_dir(env!("BRIDGE_BPF_OBJECTS"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != FOREIGN)
            .collect();
        let listed: BTreeSet<_> = super::ALL.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(built, listed);
    }
}
