//! How many ports one client may keep from others.

use super::*;

/// Number of ports that a namespace of a group gets towards destination 1 until it is refused, and the refusal.
fn fill(tables: &Private, quota: u32, netns: u64, group: u64) -> (u32, Refusal) {
    let seat = slots::enter(tables, &destination(1), netns, group).unwrap();
    let refused =
        (0..).map(|n| (n, slots::claim(tables, seat, quota, false))).find(|(_, claim)| claim.is_err());
    let (count, claim) = refused.unwrap();
    slots::leave(tables, seat);
    (count, claim.unwrap_err())
}

#[test]
fn a_quota_counts_what_is_kept_from_others() {
    let layout = layout(&[(61001, 61100)]);
    let tables = Private::new(&layout);
    let claim = |netns, group, fresh_first| {
        let seat = slots::enter(&tables, &destination(1), netns, group).unwrap();
        slots::claim(&tables, seat, 2, fresh_first).map(|claim| (seat, claim.index))
    };
    let (seat, index) = claim(1, 7, false).unwrap();
    claim(1, 7, false).unwrap();
    assert_eq!(claim(1, 7, false), Err(Refusal::QUOTA));
    claim(2, 8, false).unwrap();
    slots::release(&tables, seat, index);
    // A warm port is kept from others as well: it may be used again, but no other one.
    let free = |index: &u32| bitmap::is_free(&tables, layout.geometry().free(seat.slot), *index);
    let other = (0..64).find(free).unwrap();
    assert_eq!(slots::claim_exact(&tables, seat, 2, other), Err(Refusal::QUOTA));
    assert_eq!(claim(1, 7, true).unwrap().1, index);
    assert_eq!(claim(1, 7, true), Err(Refusal::QUOTA));
    // However many namespaces a group has, it has two quotas.
    claim(3, 7, false).unwrap();
    claim(4, 7, false).unwrap();
    assert_eq!(claim(5, 7, false), Err(Refusal::QUOTA));
    claim(6, 9, false).unwrap();
    // One that is put back counts no more.
    let seat = slots::enter(&tables, &destination(1), 10, 10).unwrap();
    for _ in 0..5 {
        let claim = slots::claim(&tables, seat, 1, false).unwrap();
        slots::unclaim(&tables, seat, 1, claim);
    }
}

#[test]
fn a_client_takes_all_ports_as_long_as_it_is_alone() {
    let layout = layout(&[(61001, 61100)]);
    let tables = Private::new(&layout);
    let quota = layout.config.quota;
    assert_eq!(quota, shares::SHARE | 100);
    // Two namespaces of one group are two clients, but one group.
    assert_eq!(fill(&tables, quota, 1, 7), (100, Refusal::EXHAUSTED));
    assert_eq!(fill(&tables, quota, 2, 7), (0, Refusal::EXHAUSTED));
    assert_eq!(tables.share(shares::all_ports(tables.destination_slot(&destination(1)).unwrap())), 100);
}

#[test]
fn each_client_leaves_ports_to_others_while_there_are_any() {
    let layout = layout(&[(61001, 61100)]);
    let (tables, quota) = (Private::new(&layout), layout.config.quota);
    let seat = slots::enter(&tables, &destination(2), 1, 1).unwrap();
    // That a claim was undone is not forgotten.
    for _ in 0..200 {
        let claim = slots::claim(&tables, seat, quota, false).unwrap();
        slots::unclaim(&tables, seat, quota, claim);
    }
    assert_eq!(fill(&tables, quota, 2, 7), (75, Refusal::SHARE));
    assert_eq!(fill(&tables, quota, 1, 1), (19, Refusal::SHARE));
    // However many namespaces a group has, it leaves a sixteenth of the ports that others have left.
    let more: u32 = (3..100).map(|netns| fill(&tables, quota, netns, 7).0).sum();
    assert_eq!(more, 1);
    assert_eq!(fill(&tables, quota, 200, 200), (4, Refusal::SHARE));
}

#[test]
fn known_clients_count_before_they_connect() {
    let layout = layout(&[(61001, 61100)]);
    let tables = Private::new(&layout);
    assert_eq!(fill(&tables, layout.config.quota | shares::OTHERS, 1, 1), (75, Refusal::SHARE));
}
