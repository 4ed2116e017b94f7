//! Beside a story, with flows of their own: datagrams with VLAN tags, and datagrams from where their source cannot be.

use bridge_common::filter::policy::class;

use super::super::dice::Dice;
use super::super::endpoints::is_pod;
use super::super::{Difference, Expected, Flow, Sent, Side};
use super::Story;

/// VLAN tags that eBPF follows.
const MAX_TAGS: usize = 8;

impl Story<'_> {
    /// The dice are of these packets alone: whatever is drawn here, a seed means the same packets to the stories.
    pub(super) fn forms(&mut self) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let mut dice = Dice::new(u64::from(self.tag) << 32 | u64::from(a) << 16 | u64::from(b));
        if b == 0 || self.is_foreign() {
            return;
        }
        let flow = self.flow;
        self.flow.source_port = dice.port();
        match dice.below(16) {
            0 => self.tagged(&mut dice),
            1 => self.spoofed(),
            _ => {}
        }
        self.flow = flow;
    }

    /// Priority tags (IEEE 802.1Q, VLAN 0), which the kernel removes, however many.
    fn tagged(&mut self, dice: &mut Dice) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let most = if dice.percent(75) { 3 } else { 2 * MAX_TAGS };
        let count = 1 + dice.below(most);
        let packet = (0..count).fold(self.there().udp(a, b, &self.mark()), |packet, _| packet.vlan(0));
        let opens = self.opens(class::UDP);
        // The kernel has moved the first one out of the buffer.
        let followed = count <= MAX_TAGS + 1;
        let expected = Expected::differing(Difference::Tags, opens && followed, opens);
        self.send("datagram with VLAN tags", true, packet, expected);
    }

    /// A datagram in the name of a host of the other side.
    fn spoofed(&mut self) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let packets = vec![self.there().udp(a, b, &self.mark())];
        let from = self.flow.from().other();
        // In the LAN, only the names of pods are protected.
        let passes = from == Side::Lan && !is_pod(self.policy, self.flow.source);
        self.sent.push(Sent {
            label: "datagram with a forged source",
            from,
            packets,
            arrives: None,
            expected: passes.into(),
        });
    }
}
