//! Prints the figures of the routes of a large cluster as JSON: `routes-bench [NODES]`, 5,000 if not said.

fn main() -> anyhow::Result<()> {
    let nodes = std::env::args().nth(1).map_or(Ok(5000), |nodes| nodes.parse())?;
    println!("{}", serde_json::to_string_pretty(&bridge_tests::routes_bench::run(nodes))?);
    Ok(())
}
