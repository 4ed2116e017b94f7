//! SCTP associations.

use anyhow::{Context as _, Result};

use super::{CLOSED, Finding, Ground, OPEN, OUT, SECOND, SILENCE, Setting, config};
use crate::lab::{Family, Host, Lab};
use crate::packet::Packet;
use crate::wire::{Capture, Frame};

/// The tag that `Packet::sctp_init` asks for.
const CLIENT: u32 = 0x0102_0304;
const SERVER: u32 = 0x0a0b_0c0d;
const DATA: u8 = 0;
const ABORT: u8 = 6;
const COOKIE_ECHO: &[u8] = &[10, 0, 0, 8, 1, 2, 3, 4];
const COOKIE_ACK: &[u8] = &[11, 0, 0, 4];
const SHUTDOWN: &[u8] = &[7, 0, 0, 8, 0, 0, 0, 0];
const SHUTDOWN_ACK: &[u8] = &[8, 0, 0, 4];
const SHUTDOWN_COMPLETE: &[u8] = &[14, 0, 0, 4];

/// After a shutdown, and with its rule gone, an association begins again on the same ports.
pub(super) fn again(setting: Setting) -> Result<Finding> {
    let rule = "rules:\n  - {name: sctp, direction: inbound, protocol: sctp, ports: [60001]}\n";
    let mut ground = Ground::new(setting, Lab::builder(), &config(setting, "", "", rule))?;
    let mut finding = Finding::default();
    for family in Family::BOTH {
        let (a, c1) = (ground.a(), ground.c1());
        let mut at_pod = Capture::start(&c1.netns, "eth0")?;
        let to_pod = || Packet::new(a.ip(family), c1.ip(family));
        let to_lan = || Packet::new(c1.ip(family), a.ip(family));
        let init_ack = init_ack(SERVER);
        let (client, server) = (CLIENT, SERVER);
        let steps: [(bool, u32, &[u8]); 7] = [
            (false, client, &init_ack),
            (true, server, COOKIE_ECHO),
            (false, client, COOKIE_ACK),
            (true, server, SHUTDOWN),
            (false, client, SHUTDOWN_ACK),
            (true, server, SHUTDOWN_COMPLETE),
            (true, server, SHUTDOWN_COMPLETE),
        ];
        ground.send_from_lan(a, to_pod().sctp_init(5000, OPEN))?;
        let came =
            |frame: &Frame| !frame.outgoing && frame.addresses() == Some((a.ip(family), c1.ip(family)));
        finding.legitimate(format!("the first INIT, {family:?}"), at_pod.find(SECOND, came)?.is_some());
        for (inbound, tag, chunk) in steps {
            std::thread::sleep(SILENCE / 10);
            if inbound {
                ground.send_from_lan(a, to_pod().sctp(5000, OPEN, tag, chunk))?;
            } else {
                ground.send_from_pod(c1, to_lan().sctp(OPEN, 5000, tag, chunk))?;
            }
        }
        let complete = |frame: &Frame| !frame.outgoing && frame.bytes.ends_with(SHUTDOWN_COMPLETE);
        finding.legitimate(
            format!("the end of the association, {family:?}"),
            at_pod.find(SECOND, complete)?.is_some(),
        );
        ground.agent.reload(&config(setting, "", "", ""))?;
        let (a, c1) = (ground.a(), ground.c1());
        let mut at_pod = Capture::start(&c1.netns, "eth0").context("capture at the pod")?;
        ground.send_from_lan(a, Packet::new(a.ip(family), c1.ip(family)).sctp_init(5000, OPEN))?;
        let came =
            |frame: &Frame| !frame.outgoing && frame.addresses() == Some((a.ip(family), c1.ip(family)));
        finding.attack(format!("the second INIT, {family:?}"), at_pod.find(SILENCE, came)?.is_some());
        ground.agent.reload(&config(setting, "", "", rule))?;
    }
    Ok(finding)
}

/// An INIT ACK that asks for this tag, with a state cookie.
fn init_ack(tag: u32) -> Vec<u8> {
    let mut chunk = vec![2, 0, 0, 28];
    chunk.extend(tag.to_be_bytes());
    chunk.extend(65_536_u32.to_be_bytes());
    chunk.extend([0, 1, 0, 1]);
    chunk.extend(1_u32.to_be_bytes());
    chunk.extend([0, 7, 0, 8, 1, 2, 3, 4]);
    chunk
}

/// A chunk of this type, with a mark of four octets at its end.
fn marked(kind: u8, mark: u32) -> Vec<u8> {
    let mut chunk = vec![kind, 3, 0, 20];
    if kind == ABORT {
        chunk[1] = 0;
    }
    chunk.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    chunk.extend(mark.to_be_bytes());
    chunk
}

/// One end of an association.
struct Side<'a> {
    host: &'a Host,
    port: u16,
}

/// A stranger speaks in the name of a LAN host that has an association with a pod, and guesses its verification tags.
pub(super) fn wrong_tags(setting: Setting) -> Result<Finding> {
    let rules = "rules:\n  - {name: in, direction: inbound, protocol: sctp, ports: [60001]}\n  \
                 - {name: out, direction: outbound, protocol: sctp, ports: [8443]}\n";
    let ground = Ground::new(setting, Lab::builder(), &config(setting, "", "", rules))?;
    let (a, x, c1) = (ground.a(), ground.x(), ground.c1());
    let mut finding = Finding::default();
    for family in Family::BOTH {
        for inbound in [true, false] {
            let (lan, pod) = if inbound {
                (Side { host: a, port: 5000 }, Side { host: c1, port: OPEN })
            } else {
                (Side { host: a, port: OUT }, Side { host: c1, port: CLOSED })
            };
            let case = format!("{family:?}, {}", if inbound { "to the pod" } else { "from the pod" });
            let (of_lan, of_pod) = if inbound { (CLIENT, SERVER) } else { (SERVER, CLIENT) };
            let packet = |from: &Side<'_>, to: &Side<'_>, tag: u32, chunk: &[u8]| {
                Packet::new(from.host.ip(family), to.host.ip(family)).sctp(from.port, to.port, tag, chunk)
            };
            let send = |from_lan: bool, tag: u32, chunk: &[u8]| -> Result<()> {
                std::thread::sleep(SILENCE / 10);
                if from_lan {
                    ground.send_from_lan(a, packet(&lan, &pod, tag, chunk))
                } else {
                    ground.send_from_pod(c1, packet(&pod, &lan, tag, chunk))
                }
            };
            let mut at_pod = Capture::start(&c1.netns, "eth0")?;
            let mut at_lan = Capture::start(&a.netns, "eth0")?;
            let client = if inbound { a } else { c1 };
            let init = if inbound {
                Packet::new(a.ip(family), c1.ip(family)).sctp_init(lan.port, pod.port)
            } else {
                Packet::new(c1.ip(family), a.ip(family)).sctp_init(pod.port, lan.port)
            };
            if inbound {
                ground.send_from_lan(client, init)?
            } else {
                ground.send_from_pod(client, init)?
            }
            std::thread::sleep(SILENCE / 10);
            let stale = init_ack(0x7777_7777);
            ground.send_from_lan(x, packet(&lan, &pod, 0x6666_6666, &stale))?;
            send(!inbound, CLIENT, &init_ack(SERVER))?;
            send(inbound, SERVER, COOKIE_ECHO)?;
            send(!inbound, CLIENT, COOKIE_ACK)?;
            ground.send_from_lan(x, packet(&lan, &pod, 0x6666_6666, &stale))?;
            let wrong = [("0", 0), ("its own", of_lan), ("another", !of_pod), ("the next", of_pod + 1)];
            for (mark, (_, tag)) in (100..).zip(wrong) {
                ground.send_from_lan(x, packet(&lan, &pod, tag, &marked(DATA, mark)))?;
                ground.send_from_lan(x, packet(&lan, &pod, tag, &marked(ABORT, mark)))?;
            }
            send(true, of_pod, &marked(DATA, 1))?;
            send(false, of_lan, &marked(DATA, 2))?;
            let mut came = Vec::new();
            at_pod.find(SILENCE, |frame: &Frame| {
                came.extend((!frame.outgoing).then(|| frame.bytes.clone()));
                false
            })?;
            let marks = |chunk: &[u8]| came.iter().any(|bytes| bytes.ends_with(chunk));
            finding.attack(format!("a stale INIT ACK, {case}"), marks(&stale));
            for (mark, (name, _)) in (100..).zip(wrong) {
                finding.attack(format!("DATA with tag: {name}, {case}"), marks(&marked(DATA, mark)));
                finding.attack(format!("ABORT with tag: {name}, {case}"), marks(&marked(ABORT, mark)));
            }
            finding.legitimate(format!("DATA of the LAN host, {case}"), marks(&marked(DATA, 1)));
            let answer = marked(DATA, 2);
            let answered = |frame: &Frame| !frame.outgoing && frame.bytes.ends_with(&answer);
            finding.legitimate(format!("DATA of the pod, {case}"), at_lan.find(SECOND, answered)?.is_some());
        }
    }
    Ok(finding)
}
