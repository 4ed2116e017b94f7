//! What comes out.

use anyhow::Result;
use bridge_tests::agent::Agent;
use bridge_tests::lab::{Family, Lab};
use bridge_tests::traffic::tcp;

use super::support::speed_up;
use crate::support::{INBOUND, OUTBOUND, USUAL_RULES, config, open};

#[test]
fn connections_of_both_directions_get_into_the_fast_path() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, port) in [(lab.a(), lab.c1(), INBOUND), (lab.c1(), lab.a(), OUTBOUND)] {
            let _server = tcp::Server::echo(&server.netns, server.at(family, port))?;
            let mut connection = open(client, server.at(family, port))?;
            speed_up(&agent, &mut connection)?;
        }
    }
    Ok(())
}
