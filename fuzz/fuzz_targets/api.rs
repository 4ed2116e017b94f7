#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    bridge_agent::fuzzing::api(input);
});
