//! TCP: openings, whole connections, and stray segments.

use bridge_common::filter::policy::class;

use super::super::dice::Dice;
use super::super::{Difference, Expected, Flow};
use super::Story;
use crate::packet::Tcp;

/// Where the checksum is in a TCP header.
const CHECKSUM: usize = 16;
/// Segments of a scan. In the order FIN, SYN, RST, PSH, ACK, URG.
const STRAYS: [(&str, [bool; 6]); 9] = [
    ("ACK", [false, false, false, false, true, false]),
    ("SYN ACK", [false, true, false, false, true, false]),
    ("RST", [false, false, true, false, false, false]),
    ("FIN ACK", [true, false, false, false, true, false]),
    ("no flags", [false; 6]),
    ("FIN PSH URG", [true, false, false, true, false, true]),
    ("SYN FIN", [true, true, false, false, false, false]),
    ("SYN RST", [false, true, true, false, false, false]),
    ("all flags", [true; 6]),
];

impl Story<'_> {
    /// Sequence numbers of both sides.
    fn numbers(&self) -> (u32, u32) {
        (self.tag << 12, !(self.tag << 12))
    }

    pub(super) fn tcp_syn(&self) -> Tcp {
        let mut syn = Tcp::syn(self.flow.source_port, self.flow.destination_port);
        syn.header.sequence_number = self.numbers().0;
        syn
    }

    /// A SYN that differs from [`Story::tcp_syn`] as one that asks for ECN does (RFC 3168, section 6.1.1).
    fn tcp_syn_for_ecn(&self) -> Tcp {
        let mut syn = self.tcp_syn();
        (syn.header.ece, syn.header.cwr) = (true, true);
        syn
    }

    pub(super) fn tcp_opening(&mut self, dice: &mut Dice) {
        let opens = self.opens(class::TCP);
        let (what, syn) = if dice.percent(20) {
            ("SYN that asks for ECN", self.tcp_syn_for_ecn())
        } else {
            ("SYN", self.tcp_syn())
        };
        let packet = self.there().tcp(syn);
        if dice.percent(7) {
            let expected = Expected::differing(Difference::Damage, opens, self.is_free(class::TCP));
            self.send("SYN with a wrong checksum", true, self.with_another(&packet, CHECKSUM), expected);
            return;
        }
        let (packet, what, expected) = self.dressed(dice, packet, what, class::TCP);
        self.send(what, true, packet, expected);
    }

    fn flags(&self, [fin, syn, rst, psh, ack, urg]: [bool; 6], sequence: u32) -> Tcp {
        let mut tcp = self.tcp_syn().payload(&self.mark());
        let header = &mut tcp.header;
        header.sequence_number = sequence;
        (header.fin, header.syn, header.rst) = (fin, syn, rst);
        (header.psh, header.ack, header.urg) = (psh, ack, urg);
        header.acknowledgment_number = u32::from(ack);
        tcp
    }

    pub(super) fn tcp_stray(&mut self, dice: &mut Dice) {
        let (what, flags) = *dice.pick(&STRAYS);
        let packet = self.there().tcp(self.flags(flags, self.numbers().0));
        let free = self.is_free(class::TCP);
        self.send(what, true, packet, free);
    }

    /// A SYN that is answered by an RST, and comes again.
    pub(super) fn tcp_refusal(&mut self, dice: &mut Dice) {
        let opens = self.opens(class::TCP);
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        self.send("SYN that is refused", true, self.there().tcp(self.tcp_syn()), opens);
        let mut refusal = Tcp::ack(b, a, 0, self.numbers().0.wrapping_add(1));
        refusal.header.rst = true;
        self.send("refusal", false, self.back().tcp(refusal), opens);
        if dice.percent(50) {
            self.send("SYN after a refusal", true, self.there().tcp(self.tcp_syn_for_ecn()), opens);
        }
    }

    /// A handshake, data both ways, and now and then an end; on the way, stray segments.
    pub(super) fn tcp_connection(&mut self, dice: &mut Dice) {
        let (opens, free) = (self.opens(class::TCP), self.is_free(class::TCP));
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let (mine, theirs) = self.numbers();
        self.send("SYN of a connection", true, self.there().tcp(self.tcp_syn()), opens);
        if dice.percent(10) {
            let early = Tcp::ack(a, b, mine.wrapping_add(1), 77).payload(&self.mark());
            self.send("ACK before the SYN ACK", true, self.there().tcp(early), free);
        }
        let mut syn_ack = Tcp::syn_ack(b, a);
        syn_ack.header.sequence_number = theirs;
        syn_ack.header.acknowledgment_number = mine.wrapping_add(1);
        self.send("SYN ACK of a connection", false, self.back().tcp(syn_ack), opens);
        let (mine, theirs) = (mine.wrapping_add(1), theirs.wrapping_add(1));
        if dice.percent(10) {
            let blind = Tcp::ack(a, b, mine, theirs.wrapping_add(1 << 24)).payload(&self.mark());
            self.send("ACK of a number that was not sent", true, self.there().tcp(blind), free);
        }
        self.send("ACK of a connection", true, self.there().tcp(Tcp::ack(a, b, mine, theirs)), opens);
        let data = Tcp::ack(a, b, mine, theirs).payload(&self.mark());
        self.send("data", true, self.there().tcp(data), opens);
        let mine = mine.wrapping_add(8);
        let data = Tcp::ack(b, a, theirs, mine).payload(&self.mark());
        self.send("data of the other side", false, self.back().tcp(data), opens);
        let (mut mine, mut theirs) = (mine, theirs.wrapping_add(8));
        // In half of them, so long that the rest may take the fast path.
        for _ in 0..dice.below(7).saturating_sub(3) {
            let data = Tcp::ack(a, b, mine, theirs).payload(&self.mark());
            self.send("talk", true, self.there().tcp(data), opens);
            mine = mine.wrapping_add(8);
            let data = Tcp::ack(b, a, theirs, mine).payload(&self.mark());
            self.send("talk of the other side", false, self.back().tcp(data), opens);
            theirs = theirs.wrapping_add(8);
        }
        self.tcp_intrusion(dice, mine, theirs);
        let data = Tcp::ack(a, b, mine, theirs).payload(&self.mark());
        self.send("more data", true, self.there().tcp(data), opens);
        self.tcp_end(dice, mine.wrapping_add(8), theirs);
    }

    /// Sends stray segments in the middle of a connection.
    fn tcp_intrusion(&mut self, dice: &mut Dice, mine: u32, theirs: u32) {
        let (opens, free) = (self.opens(class::TCP), self.is_free(class::TCP));
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        match dice.below(8) {
            0 => {
                let far = Tcp::ack(a, b, mine.wrapping_add(1 << 30), theirs).payload(&self.mark());
                let expected = Expected::differing(Difference::Window, opens, free);
                self.send("data beyond the window", true, self.there().tcp(far), expected);
            }
            1 => {
                let data = self.there().tcp(Tcp::ack(a, b, mine, theirs).payload(&self.mark()));
                let expected = Expected::differing(Difference::Damage, opens, free);
                self.send("data with a wrong checksum", true, self.with_another(&data, CHECKSUM), expected);
            }
            2 => {
                let (_, flags) = *dice.pick(&STRAYS[4..]);
                let packet = self.there().tcp(self.flags(flags, mine));
                self.send("flags that no sender sets, in a connection", true, packet, free);
            }
            3 => {
                let syn = self.there().tcp(self.tcp_syn_for_ecn());
                self.send("SYN again in a connection", true, syn, opens);
            }
            _ => {}
        }
    }

    fn tcp_end(&mut self, dice: &mut Dice, mine: u32, theirs: u32) {
        let (opens, free) = (self.opens(class::TCP), self.is_free(class::TCP));
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let ended = match dice.below(4) {
            0 => {
                self.send("FIN", true, self.there().tcp(Tcp::fin(a, b, mine, theirs)), opens);
                let fin = Tcp::fin(b, a, theirs, mine.wrapping_add(1));
                self.send("FIN of the other side", false, self.back().tcp(fin), opens);
                let ack = Tcp::ack(a, b, mine.wrapping_add(1), theirs.wrapping_add(1));
                self.send("last ACK", true, self.there().tcp(ack), opens);
                true
            }
            1 => {
                self.send("RST of a connection", false, self.back().tcp(Tcp::rst(b, a, theirs)), opens);
                true
            }
            2 => {
                let turned = self.mirrored().opens(class::TCP);
                let by_iptables = if opens { free } else { turned };
                let expected = Expected::differing(Difference::TurnedRound, turned, by_iptables);
                let syn = self.back().tcp(Tcp::syn(b, a));
                self.send("SYN of the other side in a connection", false, syn, expected);
                false
            }
            _ => false,
        };
        if ended && dice.percent(40) {
            let mut syn = self.tcp_syn();
            syn.header.sequence_number = mine.wrapping_add(1 << 17);
            self.send("SYN on the ports of an ended connection", true, self.there().tcp(syn), opens);
        }
    }
}
