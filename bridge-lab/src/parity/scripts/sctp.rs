//! SCTP: openings, whole associations, and packets of none.

use bridge_common::filter::policy::class;

use super::super::dice::Dice;
use super::super::{Difference, Expected, Flow, local};
use super::Story;

/// The tag that `Packet::sctp_init` asks for.
const MINE: u32 = 0x0102_0304;
const THEIRS: u32 = 0x0506_0708;
const INIT_ACK: u8 = 2;
const HEARTBEAT: u8 = 4;
/// The tag is the sender's (RFC 9260, 8.5.1).
const REFLECTED: u8 = 1;

impl Story<'_> {
    pub(super) fn sctp(&mut self, dice: &mut Dice) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        if dice.percent(40) {
            self.send("INIT", true, self.there().sctp_init(a, b), self.opens(class::SCTP));
            return;
        }
        if dice.percent(40) && !local().contains(&self.flow.destination) {
            // Dice of their own: whatever is drawn here, a seed means the same packets to the other stories.
            let ports = u64::from(a) << 16 | u64::from(b);
            self.sctp_association(&mut Dice::new(u64::from(self.tag) << 32 | ports));
            return;
        }
        let (what, chunk) = *dice.pick(&[
            ("DATA", 0),
            ("INIT ACK", INIT_ACK),
            ("SACK", 3),
            ("HEARTBEAT", HEARTBEAT),
            ("ABORT", 6),
        ]);
        let packet = self.there().sctp(a, b, self.tag | 1, &self.chunk(chunk, 0, 1));
        let passes = self.is_free(class::SCTP);
        self.send(what, true, packet, passes);
    }

    /// A chunk with the mark of its packet; `announced`: of INIT ACK.
    fn chunk(&self, kind: u8, flags: u8, announced: u32) -> Vec<u8> {
        if kind == INIT_ACK {
            return [&[kind, flags, 0, 20][..], &announced.to_be_bytes(), &self.mark(), &[0; 4]].concat();
        }
        [&[kind, flags, 0, 12][..], &self.mark()].concat()
    }

    fn send_chunk(
        &mut self,
        what: &'static str,
        from_opener: bool,
        (kind, flags, tag): (u8, u8, u32),
        expected: impl Into<Expected>,
    ) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let chunk = self.chunk(kind, flags, THEIRS);
        let packet = if from_opener {
            self.there().sctp(a, b, tag, &chunk)
        } else {
            self.back().sctp(b, a, tag, &chunk)
        };
        self.send(what, from_opener, packet, expected);
    }

    /// RFC 9260, section 5.1; on the way, packets with other tags.
    fn sctp_association(&mut self, dice: &mut Dice) {
        let opens = self.opens(class::SCTP);
        let free = self.is_free(class::SCTP);
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let init = self.there().sctp_init(a, b);
        self.send("INIT of an association", true, init, opens);
        if dice.percent(30) {
            self.send_chunk("INIT ACK of another association", false, (INIT_ACK, 0, MINE ^ 1), free);
        }
        self.send_chunk("INIT ACK of an association", false, (INIT_ACK, 0, MINE), opens);
        if dice.percent(30) {
            self.send_chunk("COOKIE ECHO of another association", true, (10, 0, THEIRS ^ 1), free);
        }
        self.send_chunk("COOKIE ECHO", true, (10, 0, THEIRS), opens);
        self.send_chunk("COOKIE ACK", false, (11, 0, MINE), opens);
        for _ in 0..dice.below(4) {
            self.sctp_with_a_wrong_tag(dice);
        }
        self.send_chunk("HEARTBEAT of an association", true, (HEARTBEAT, 0, THEIRS), opens);
        self.send_chunk("HEARTBEAT of the other side", false, (HEARTBEAT, 0, MINE), opens);
        if dice.percent(40) {
            let from_opener = dice.percent(50);
            let (own, other) = if from_opener { (MINE, THEIRS) } else { (THEIRS, MINE) };
            let (flags, tag) = if dice.percent(50) { (REFLECTED, own) } else { (0, other) };
            self.send_chunk("ABORT of an association", from_opener, (6, flags, tag), opens);
        }
    }

    fn sctp_with_a_wrong_tag(&mut self, dice: &mut Dice) {
        let (opens, free) = (self.opens(class::SCTP), self.is_free(class::SCTP));
        let from_opener = dice.percent(50);
        let (own, other) = if from_opener { (MINE, THEIRS) } else { (THEIRS, MINE) };
        let wrong = *dice.pick(&[0, own, other ^ 1, other.wrapping_add(1)]);
        let unchecked = Expected::differing(Difference::Tag, free, opens);
        let (what, chunk, expected) = match dice.below(8) {
            0 | 1 => ("DATA with a wrong tag", (0, 0, wrong), free.into()),
            2 => ("ABORT with a wrong tag", (6, 0, wrong), free.into()),
            3 => ("ABORT that reflects a wrong tag", (6, REFLECTED, other), free.into()),
            4 => ("SHUTDOWN with a wrong tag", (7, 0, wrong), free.into()),
            5 => ("COOKIE ECHO with a wrong tag", (10, 0, wrong), free.into()),
            6 => ("SHUTDOWN ACK with a wrong tag", (8, 0, wrong), unchecked),
            _ => ("HEARTBEAT with a wrong tag", (HEARTBEAT, 0, wrong), unchecked),
        };
        self.send_chunk(what, from_opener, chunk, expected);
    }
}
