//! ICMP and ICMPv6: queries, replies, errors.

use bridge_common::filter::policy::class;

use super::super::dice::Dice;
use super::super::{Difference, Expected, Flow, endpoints};
use super::Story;
use crate::packet::{Icmp, Packet};

/// ICMP types that are neither query, reply nor error, or not of these days: alternate host address, router
/// solicitation, traceroute, photuris.
const ODD_V4: [u8; 4] = [6, 10, 30, 40];
/// Node information query (RFC 4620), multicast listener report, one for experiments.
const ODD_V6: [u8; 3] = [139, 131, 200];
impl Story<'_> {
    pub(super) fn icmp(&mut self, dice: &mut Dice) {
        let v4 = self.flow.source.is_ipv4();
        let id = dice.port();
        self.flow = Flow { source_port: id, destination_port: id, ..self.flow };
        let (request, reply) = if v4 { (8, 0) } else { (128, 129) };
        let message = |kind: u8, mark: Vec<u8>| {
            let [high, low] = id.to_be_bytes();
            Icmp::Other(kind, 0, [high, low, 0, 1], mark)
        };
        let (opens, free) = (self.opens(class::ICMP), self.is_free(class::ICMP));
        match dice.below(10) {
            0 | 1 => {
                let packet = self.there().icmp(&message(reply, self.mark()));
                self.send("unsolicited echo reply", true, packet, free);
            }
            2 => {
                let odd = if v4 { *dice.pick(&ODD_V4) } else { *dice.pick(&ODD_V6) };
                let packet = self.there().icmp(&message(odd, self.mark()));
                self.send("odd ICMP type", true, packet, free);
            }
            3 if v4 => {
                let query = *dice.pick(&[13, 15, 17]);
                let packet = self.there().icmp(&message(query, self.mark()));
                self.send("ICMP query", true, packet, opens);
            }
            _ => {
                let packet = self.there().icmp(&message(request, self.mark()));
                self.send("echo request", true, packet, opens);
                let packet = self.back().icmp(&message(reply, self.mark()));
                self.send("echo reply", false, packet, opens);
                let packet = self.there().icmp(&message(request, self.mark()));
                self.send("another echo request", true, packet, opens);
                if dice.percent(30) {
                    let other = self.mirrored().opens(class::ICMP);
                    let packet = self.back().icmp(&message(request, self.mark()));
                    self.send("echo request of the other side", false, packet, other);
                    let packet = self.back().icmp(&message(reply, self.mark()));
                    let expected =
                        Expected::differing(Difference::CrossingQueries, free || opens && !other, opens);
                    self.send("echo reply between crossing requests", false, packet, expected);
                    let packet = self.there().icmp(&message(reply, self.mark()));
                    self.send("echo reply to the other side", true, packet, other);
                }
            }
        }
    }

    /// A first packet, and an error about it, of the other side or of a router before it; or an error about one that
    /// was never sent.
    pub(super) fn icmp_error(&mut self, dice: &mut Dice) {
        let Flow { source, destination, source_port: a, destination_port: b } = self.flow;
        let (of, first) = if dice.percent(50) {
            (class::UDP, self.there().udp(a, b, &self.mark()))
        } else {
            (class::TCP, self.there().tcp(self.tcp_syn()))
        };
        let opens = self.opens(of);
        let quoted = [first.ip(), self.mark()].concat();
        let known = dice.percent(60);
        if known {
            self.send("first packet before its error", true, first, opens);
        }
        let error = match dice.below(3) {
            0 => Icmp::Unreachable(if source.is_ipv4() { 3 } else { 4 }, quoted),
            1 => Icmp::TooBig(1280, quoted),
            _ => Icmp::TimeExceeded(quoted),
        };
        // A router behind a pod has to be routed there; those of the LAN may have any address of it.
        let from_router = !self.to_pod() && dice.percent(30);
        let router =
            if from_router { endpoints::beyond(dice, self.policy, destination) } else { destination };
        let back = Flow { source: router, destination: source, source_port: 0, destination_port: 0 };
        let back = Story { flow: back, ..self.mirrored() };
        let unjudged = back.is_free(class::ICMP);
        let foreign = back.is_foreign() && back.to_pod();
        let what = match (known, from_router) {
            (true, false) => "error about a known flow",
            (true, true) => "error of a router about a known flow",
            (false, false) => "error about an unknown flow",
            (false, true) => "error of a router about an unknown flow",
        };
        let related = known && opens;
        let expected: Expected = if unjudged && !foreign {
            true.into()
        } else {
            // Of flows out of scope, eBPF follows those that pods open.
            let untracked = self.is_free(of) && !self.is_foreign();
            Expected::differing(Difference::UntrackedError, related && !untracked, related)
        };
        self.send(what, false, Packet::new(router, source).icmp(&error), expected);
    }
}
