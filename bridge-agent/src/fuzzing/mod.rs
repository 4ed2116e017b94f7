//! Targets of `cargo xtask fuzz`; the tests run them on `fuzz/seeds`. Compiled for these alone.
//!
//! A target panics where an input is handled wrongly, and returns whether it is accepted.

mod api;
mod cluster;
mod config;
mod discovery;
mod state;

pub use self::{api::api, cluster::cluster, config::config, discovery::discovery, state::state};

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    /// Also a test of the seeds: an input meant to be accepted that is not leads the fuzzer nowhere.
    fn replay(folder: &str, target: fn(&[u8]) -> bool) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
        let mut count = 0;
        for file in fs::read_dir(&folder).unwrap() {
            let path = file.unwrap().path();
            // Cases of `check --expect`: no configuration.
            if path.ends_with("cases.yaml") {
                continue;
            }
            let accepted = target(&fs::read(&path).unwrap());
            let refused = path.file_name().unwrap().to_string_lossy().starts_with("refused");
            assert_ne!(accepted, refused, "{}", path.display());
            count += 1;
        }
        assert!(count > 0, "{} is empty", folder.display());
    }

    #[test]
    fn config() {
        replay("fuzz/seeds/config", super::config);
        replay("deploy/examples", super::config);
    }

    #[test]
    fn api() {
        replay("fuzz/seeds/api", super::api);
    }

    #[test]
    fn discovery() {
        replay("fuzz/seeds/discovery", super::discovery);
    }

    #[test]
    fn cluster() {
        replay("fuzz/seeds/cluster", super::cluster);
    }

    #[test]
    fn state() {
        replay("fuzz/seeds/state", super::state);
    }
}
