//! The same with tokio: `cargo run --features tokio --example connect_tokio -- /run/bridge/agent.sock 192.168.31.67:443`

use bridge_client::{Connector, aio};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(agent), Some(to)) = (arguments.next(), arguments.next()) else {
        return Err("usage: connect_tokio SOCKET ADDRESS:PORT".into());
    };
    let stream = aio::connect(&Connector::agent_at(agent), to.parse()?).await?;
    println!("{}", stream.local_addr()?.port());
    Ok(())
}
