//! Bind before connect: `cargo run --example connect -- /run/bridge/agent.sock 192.168.31.67:443`

use bridge_client::Connector;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(agent), Some(to)) = (arguments.next(), arguments.next()) else {
        return Err("usage: connect SOCKET ADDRESS:PORT".into());
    };
    let stream = Connector::agent_at(agent).connect(to.parse()?)?;
    println!("{}", stream.local_addr()?.port());
    Ok(())
}
